"""What a pickle yields instead of imported names and objects, and how reading one fails."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .machine import Machine


class Unreadable(Exception):
    """Why a file cannot be read, as the end of a sentence that its name begins."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle imports. Nothing stands behind it. name: raw; str() is fit to print."""

    name: str

    def __str__(self) -> str:
        return re.sub(r"[^\w.<>]", "?", self.name)[:200]


class Refused(Unreadable):
    """That a pickle asks to call something that is not answered. name: fit to print."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"asks to call {name} while it is read, which could run any code. Nothing was executed"
        )


class Shell:
    """What remains of an object. kind: its class. state: its attributes. items: if it is a kind of dict."""

    __slots__ = ("items", "kind", "state")

    def __init__(self, kind: Global) -> None:
        self.kind = kind
        self.state: dict[Any, Any] = {}
        self.items: dict[Any, Any] = {}

    def __str__(self) -> str:
        return str(self.kind)


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value that was read past: an option of an image transform, a sparse tensor. what: in words."""

    what: str

    def __str__(self) -> str:
        return self.what


class Building(ABC):
    """What is made first and filled by its state afterwards, as pickles do with arrays."""

    @abstractmethod
    def build(self, machine: Machine, state: Any) -> None:
        """Takes the state that the pickle gives it."""


def kind_of(value: Any) -> str:
    """What a value is, for messages: its own text may be long or hostile."""
    return str(value) if isinstance(value, (Global, Shell, Opaque)) else type(value).__name__
