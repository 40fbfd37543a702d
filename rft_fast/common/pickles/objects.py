"""Stand-ins for the names and objects of a pickle, and the errors of reading one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


class Unreadable(Exception):
    """A file cannot be read; the message continues a sentence that starts with the file's name."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle imports; it is never resolved.

    Attributes:
        name: module and name, dotted, as in the file. ``str()`` gives a printable form.
    """

    name: str

    def __str__(self) -> str:
        return re.sub(r"[^\w.<>]", "?", self.name)[:200]


class Refused(Unreadable):
    """A pickle calls something that is not allowed.

    Args:
        name: printable name of what is called.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"calls {name} while it is loaded, which could run any code. Nothing was executed")


class Shell:
    """An object of any class, without behaviour: only what the pickle sets on it.

    Attributes:
        kind: its class.
        state: its attributes by name.
        items: its items, if it is a kind of dict.
    """

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: Global) -> None:
        self.kind = kind
        self.state: dict[Any, Any] = {}
        self.items: dict[Any, Any] = {}

    def __str__(self) -> str:
        return str(self.kind)


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value that is skipped, such as an option of an image transform or a sparse tensor.

    Attributes:
        what: description for messages.
    """

    what: str

    def __str__(self) -> str:
        return self.what


def kind_of(value: Any) -> str:
    """Name the kind of a value in messages; its own text may be long or hostile."""
    return str(value) if isinstance(value, (Global, Shell, Opaque)) else type(value).__name__
