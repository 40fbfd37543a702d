"""Settings as fields of frozen dataclasses, of which :mod:`rft_fast.config.builder` makes options."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

_Settings = TypeVar("_Settings")


@dataclass(frozen=True)
class Group:
    """Options that the help shows together.

    A settings class names its own as a class variable, ``GROUP``.

    Attributes:
        title: heading in the help.
        about: text below it.
        place: table of ``config.json`` that records them, by its names from the outermost on; empty: none.
        own: reason why no zoo file may set them; empty where it may.
    """

    title: str
    about: str = ""
    place: tuple[str, ...] = ()
    own: str = ""


@dataclass(frozen=True)
class Option:
    """How a field is given on the command line and in files.

    Attributes:
        help: text of the help. ``%(default)s`` stands for the default.
        common: its text in the short help, one line; empty: only ``--help-all`` shows it.
        name: name without dashes; None: the field's, with ``no-`` before it where the default is True.
        metavar: placeholder of the value in the help.
        check: text -> value, or a list of several; raises ValueError. ``int`` and ``float`` stand for
            :func:`integer` and :func:`number`.
        choices: the possible values, instead of a check.
        many: the option takes several values, and may be given ``once``, or repeatedly: ``each`` adds values,
            or the ``last`` counts. None: a single value.
        whole: all values -> the value of the field; raises ValueError. None: a tuple.
        paths: whether values may be file names.
        follows: the option whose value is the default.
        none: what the value None, or no values, is called in tables and messages, if not so.
        named: whether the values are pairs of a name and a content, so that messages name what differs.
        off: help of ``--no-NAME``, which sets None; empty: no such option.
        own: reason why no zoo file may set it; empty where it may.
        compared: whether runs with different values differ. False where the effect is recorded and compared.
        group: a group other than that of the class.
        more: what the program itself needs to know of the field.
    """

    help: str
    common: str = ""
    name: str | None = None
    metavar: str | None = None
    check: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    many: Literal["once", "each", "last"] | None = None
    whole: Callable[[Sequence[Any]], Any] | None = None
    paths: bool = False
    follows: str | None = None
    none: str = ""
    named: bool = False
    off: str = ""
    own: str = ""
    compared: bool = True
    group: Group | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of a settings class that is also an option.

    Args:
        default: its value where it is not given. A bool makes an option without a value, which turns it over.
        help: as of :class:`Option`.
        how: the other attributes of :class:`Option`.
    """
    return dataclasses.field(default=default, metadata=described(help, **how))


def described(help: str, **how: Any) -> dict[type[Option], Option]:
    """Metadata of a field, for one that has no default (the option is required) or makes it.

    Args:
        help: as of :class:`Option`.
        how: its other attributes.
    """
    return {Option: Option(help, **how)}


def integer(text: str) -> int:
    """A check: an integer.

    Raises:
        ValueError: the text is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected an integer, got {text!r}") from None


def number(text: str) -> float:
    """A check: a number.

    Raises:
        ValueError: the text is none.
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None


def named_path(text: str) -> tuple[str, pathlib.Path]:
    """A check: ``NAME=PATH``, or a path -> name and path.

    A path alone goes by the name of its folder, or of its file without the ending.

    Raises:
        ValueError: a part is empty, or the path has no name, such as ``/``.
    """
    if "=" in text:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ValueError(f"expected NAME=PATH, got {text!r}")
        return name, pathlib.Path(value)
    path = pathlib.Path(text).resolve()
    name = path.stem if path.is_file() else path.name
    if not name:
        raise ValueError(f"{text} has no name of its own; name it: NAME={text}")
    return name, pathlib.Path(text)


# Whose own errors are words for programmers -> checks that say what was expected.
_WORDED: Mapping[Any, Callable[[str], Any]] = {int: integer, float: number}


@dataclass(frozen=True)
class Entry:
    """An option and the field that it sets."""

    kind: type
    field: str
    default: Any
    option: Option
    group: Group

    @property
    def name(self) -> str:
        """Name of the option, without dashes."""
        plain = self.field.replace("_", "-")
        return self.option.name or (f"no-{plain}" if self.default is True else plain)

    @property
    def check(self) -> Callable[[str], Any] | None:
        """The check of the option, whose errors say what was expected."""
        check = self.option.check
        return None if check is None else _WORDED.get(check, check)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> bool:
        """Whether the option takes no value."""
        return isinstance(self.default, bool)


def entries(kind: type) -> Iterator[Entry]:
    """Return the options of a settings class, in the order of its fields."""
    for field in dataclasses.fields(kind):
        if (found := field.metadata.get(Option)) is not None:
            group = found.group or kind.GROUP  # type: ignore[attr-defined]
            make = field.default_factory
            default = field.default if make is dataclasses.MISSING else make()
            yield Entry(kind, field.name, default, found, group)


class Tree:
    """Settings by class, immutable. A missing class has its defaults.

    Args:
        settings: instances of different settings classes.
        givers: option -> who gave it: ``"command line"``, ``"zoo"``, ``"paper"`` or ``"quick"``; the others
            have their defaults.
    """

    def __init__(self, *settings: object, givers: Mapping[str, str] | None = None) -> None:
        self._settings = {type(each): each for each in settings}
        self._givers = dict(givers or {})

    def of(self, kind: type[_Settings]) -> _Settings:
        """The settings of a class."""
        found = self._settings.get(kind)
        return found if isinstance(found, kind) else kind()

    def giver(self, name: str) -> str:
        """Who gave an option; empty where it has its default."""
        return self._givers.get(name, "")

    def but(self, *settings: object) -> Tree:
        """The tree with other settings of these classes."""
        return Tree(*(self._settings | {type(each): each for each in settings}).values(), givers=self._givers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self._settings == other._settings

    def __hash__(self) -> int:
        return hash(tuple(self._settings.values()))

    def __repr__(self) -> str:
        return f"Tree({', '.join(map(repr, self._settings.values()))})"
