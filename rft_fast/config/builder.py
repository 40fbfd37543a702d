"""``Builder``: command line, TOML and JSON made from the fields of settings classes."""

from __future__ import annotations

import argparse
import difflib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..common import program
from ..common.fields import Entry, Group, Tree, entries

Given = Mapping[str, Any]  # option, without dashes -> its value: those that were given, and no defaults
_Settings = TypeVar("_Settings")
COMMAND, ZOO, PAPER, QUICK = "command line", "zoo", "paper", "quick"  # who gives options


class Builder:
    """The options of some settings classes.

    Args:
        kinds: the classes.
        groups: groups that come first in the help, in this order.

    Raises:
        ValueError: two fields are the same option.
    """

    def __init__(self, kinds: Sequence[type], groups: Sequence[Group] = ()) -> None:
        self._kinds = tuple(kinds)
        self._groups = tuple(groups)
        self.entries: dict[str, Entry] = {}
        for entry in (entry for kind in kinds for entry in entries(kind)):
            if entry.name in self.entries:
                raise ValueError(f"settings: two fields are the option {entry.name}")
            self.entries[entry.name] = entry

    @property
    def strings(self) -> set[str]:
        """The options as they are written on a command line."""
        off = (f"--no-{name}" for name, entry in self.entries.items() if entry.option.off)
        return {*(f"--{name}" for name in self.entries), *off}

    # --- command line -----------------------------------------------------------------------------

    def add_to(self, top: program.Parser) -> None:
        """Add the options, group by group. Options that are not given are missing in the parsed namespace.

        If some options are common, the short help shows only these.
        """
        brief: dict[argparse.Action, str] = {}
        groups: dict[Group, list[Entry]] = {group: [] for group in self._groups}
        for entry in self.entries.values():
            groups.setdefault(entry.group, []).append(entry)
        for group, members in groups.items():
            shown = top.add_argument_group(group.title, group.about or None)
            for entry in members:
                option, *others = _add(shown, entry)
                brief |= {option: entry.option.common} | dict.fromkeys(others, "")
        if any(brief.values()):
            top.shorten(brief)

    def given(self, arguments: argparse.Namespace) -> Given:
        """Return the options that a command line gave, with their values.

        Raises:
            ValueError: the values of an option do not go together.
        """
        found: dict[str, Any] = {}
        for name, entry in self.entries.items():
            dest = _dest(name)
            if hasattr(arguments, dest):
                value = getattr(arguments, dest)
                found[name] = (
                    value if entry.option.many is None else _whole(entry, value, f"argument --{name}")
                )
        return found

    def fields(self, kind: type, given: Given) -> dict[str, Any]:
        """Return the given fields of one settings class: field -> value."""
        return {
            entry.field: given[name]
            for name, entry in self.entries.items()
            if entry.kind is kind and name in given
        }

    def of(self, kind: type[_Settings], given: Given, **others: Any) -> _Settings:
        """Create the settings of one class. others: its fields that are no options."""
        return kind(**self.fields(kind, given), **others)

    # --- tables of TOML ---------------------------------------------------------------------------

    def of_table(
        self, table: Mapping[str, Any], error: Callable[[str, str], ValueError], prefix: str = ""
    ) -> Given:
        """Read options from a table of a TOML file, which is not trusted.

        Args:
            table: option, without dashes -> a string, number, true or a list.
            error: creates an error from the name of an entry and what is wrong with it.
            prefix: prefix of such names.

        Raises:
            ValueError: an unknown option, one that a file may not set, or an invalid value.
        """
        found: dict[str, Any] = {}
        for name, value in table.items():
            try:
                values = _plain(value)
                entry = self._entry_of_file(name)
                found[entry.name] = _of_toml(entry, values)
            except ValueError as wrong:
                raise error(f"{prefix}{name}", str(wrong)) from None
        return found

    def _entry_of_file(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None and name.startswith("no-"):
            other = self.entries.get(name[3:])
            entry = other if other is not None and other.option.off else None
        if entry is None:
            near = difflib.get_close_matches(name, self.entries, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help-all of the sweep lists them"
            raise ValueError(f"is no option; {hint}")
        if reason := entry.option.own or entry.group.own:
            raise ValueError(f"is not allowed in a zoo: {reason}")
        return entry

    # --- trees and JSON ---------------------------------------------------------------------------

    def tree(self, sources: Mapping[str, Given]) -> Tree:
        """Create the settings from their sources.

        Args:
            sources: name of a source -> the options that it gives. Later sources override earlier ones.
        """
        givers = {name: who for who, given in sources.items() for name in given}
        values = {name: value for given in sources.values() for name, value in given.items()}
        for name, entry in self.entries.items():
            followed = entry.option.follows
            if name not in values and followed in values:
                values[name] = values[followed]
        return self._made(values, givers)

    def as_json(self, tree: Tree) -> dict[str, Any]:
        """Return the tables of ``config.json`` that record the settings."""
        found: dict[str, Any] = {}
        for entry in self.entries.values():
            if place := entry.group.place:
                table = found
                for name in place:
                    table = table.setdefault(name, {})
                table[entry.field] = _to_json(getattr(tree.of(entry.kind), entry.field))
        return found

    def of_json(self, config: Mapping[str, Any]) -> Tree:
        """Read settings from ``config.json``. Missing ones have their defaults."""
        values: dict[str, Any] = {}
        for name, entry in self.entries.items():
            table: Any = config
            for part in entry.group.place:
                table = table.get(part, {}) if isinstance(table, Mapping) else {}
            if entry.group.place and isinstance(table, Mapping) and entry.field in table:
                values[name] = _of_json(table[entry.field])
        return self._made(values, {})

    def recorded(self, names: Sequence[str]) -> Entry | None:
        """Find the option that an entry of ``config.json`` records. names: of the entry, outermost first."""
        for entry in self.entries.values():
            if entry.group.place and (*entry.group.place, entry.field) == tuple(names):
                return entry
        return None

    def _made(self, values: Given, givers: Mapping[str, str]) -> Tree:
        return Tree(*(self.of(kind, values) for kind in self._kinds), givers=givers)


def _dest(name: str) -> str:
    return name.replace("-", "_")


def _add(group: Any, entry: Entry) -> list[argparse.Action]:
    option, name = entry.option, entry.name
    how: dict[str, Any] = {"dest": _dest(name), "default": argparse.SUPPRESS}
    how["help"] = option.help.replace("%(default)s", str(entry.default))
    if entry.flag:
        return [group.add_argument(f"--{name}", action="store_const", const=not entry.default, **how)]
    if entry.required:
        how["required"] = True
    if option.metavar is not None:
        how["metavar"] = option.metavar
    if option.choices is not None:
        how["choices"] = option.choices
    if entry.check is not None:
        how["type"] = _typed(entry.check)
    if option.many is not None:
        how |= {"nargs": "+", "action": _MANY[option.many]}
    elif option.off:
        how["action"] = _OnOrOff
    added = [group.add_argument(f"--{name}", **how)]
    if option.off:
        how = {"dest": _dest(name), "default": argparse.SUPPRESS, "help": option.off}
        added.append(group.add_argument(f"--no-{name}", action=_OnOrOff, nargs=0, const=None, **how))
    return added


def _typed(check: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


class _Once(argparse.Action):
    """Refuses a repeated option, whose values would silently replace the first ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "given more than once; give all values after one of it")
        setattr(namespace, self.dest, values)


_MANY = {"once": _Once, "each": "extend", "last": "store"}


class _OnOrOff(argparse.Action):
    """An option with a value, or ``--no-OPTION`` without one, but not both."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        off = self.nargs == 0
        if hasattr(namespace, self.dest) and (getattr(namespace, self.dest) is None) != off:
            other = f"--{'' if off else 'no-'}{self.dest.replace('_', '-')}"
            raise argparse.ArgumentError(self, f"cannot be combined with {other}")
        setattr(namespace, self.dest, None if off else values)


# --- values ---------------------------------------------------------------------------------------


def _whole(entry: Entry, values: Iterable[Any], where: str = "") -> Any:
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    try:
        return tuple(flat) if entry.option.whole is None else entry.option.whole(flat)
    except ValueError as error:
        text = str(error).removeprefix(f"{entry.name}: ")  # which the place says already
        raise ValueError(f"{where}: {text}" if where else text) from None


def _plain(value: Any) -> list[Any]:
    """The values of an entry of TOML, as a list."""
    if value is False:
        raise ValueError("can only be true; leave it out otherwise")
    values = value if isinstance(value, list) else [value]
    plain = [
        v for v in values if isinstance(v, (str, int, float)) and (v is value or not isinstance(v, bool))
    ]
    if not values or len(plain) < len(values):
        raise ValueError(f"must be a string, a number, true or a list, got {value!r}")
    return values


def _of_toml(entry: Entry, values: list[Any]) -> Any:
    if entry.flag or values[0] is True:
        if not entry.flag or values[0] is not True:
            raise ValueError("can only be true" if entry.flag else "needs a value, got true")
        return not entry.default
    read = [_read(entry, str(one)) for one in values]
    if entry.option.many is not None:
        return _whole(entry, read)
    if len(read) != 1:
        raise ValueError(f"needs exactly one value, got {values}")
    return read[0]


def _read(entry: Entry, text: str) -> Any:
    option = entry.option
    if option.choices is not None and text not in option.choices:
        raise ValueError(f"must be one of {', '.join(option.choices)}; got {text!r}")
    return text if entry.check is None else entry.check(text)


def fits(entry: Entry, text: str) -> bool:
    """Whether a word can be a value of an option."""
    try:
        _read(entry, text)
    except ValueError:
        return False
    return True


def _to_json(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_to_json(each) for each in value]
    return str(value) if isinstance(value, pathlib.Path) else value


def _of_json(value: Any) -> Any:
    return tuple(map(_of_json, value)) if isinstance(value, list) else value
