"""Text of messages: escaping, lists of names, line wrapping, cells of tables, differences of settings."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# C0, DEL, C1; direction marks; line and paragraph separators; noncharacters; zero-width characters, which
# make different names look the same (joiners stay: some scripts and emoji need them).
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: str, lines: bool = False) -> str:
    """Escape control characters as JSON does (``\\u001b``); other text is unchanged.

    Args:
        text: any text.
        lines: keep line ends and tabs; otherwise the result is one line.
    """

    def escape(found: re.Match[str]) -> str:
        one = found[0]
        return one if lines and one in "\n\t" else _SHORT.get(one, f"\\u{ord(one):04x}")

    return _CONTROL.sub(escape, text)


# Characters, wide forms among them, that start a formula in spreadsheets, after spaces and apostrophes.
_FORMULA = re.compile(r"[\s']*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\s']*[\t\r\n]")


def cell(value: Any) -> Any:
    """Protect a value of a CSV file from becoming a formula in a spreadsheet.

    Args:
        value: of any type.

    Returns:
        Text that a spreadsheet might evaluate, such as ``=1+1``, with an apostrophe in front
        (:func:`from_cell` removes it); other values unchanged.
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def from_cell(text: str) -> str:
    """Return the text that :func:`cell` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def message(error: object) -> str:
    """Format an error so that no name in it can start a line; only indented continuation lines remain.

    Args:
        error: an exception or a text.
    """
    return re.sub(r"\n(?!  )", r"\\n", str(error))


def some(names: Sequence[object], shown: int = 5) -> str:
    """List the first few names, escaped, and the number of the others.

    Args:
        names: any objects.
        shown: how many are listed.
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(visible(str(name)) for name in names[:shown]) + more


def many(count: object, one: str, several: str = "") -> str:
    """Describe a count: ``"1 draw"``, ``"5 to 20 draws"``.

    Args:
        count: a number, or a range in words.
        one: what follows the number 1, such as ``"of 5 layers is flat"``.
        several: what follows other numbers; if empty, ``one`` with an s.
    """
    return f"{count} {one if str(count) == '1' else several or f'{one}s'}"


def signed(text: str) -> str:
    """Use the minus sign for hyphens, and remove the sign of zeros."""
    return re.sub(r"(?<![\w.])[-+](0(\.0+)?)(?![\d.])", r"\1", text).replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Format seconds: ``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def suggestion(name: str, known: Iterable[str], otherwise: str = "known are") -> str:
    """Suggest the known name nearest to an unknown one, or list all of them.

    Args:
        name: the unknown name.
        known: the names that exist.
        otherwise: what introduces the list.

    Returns:
        ``did you mean 'x'?`` or ``known are x, y``, with ``otherwise`` in place of *known are*.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(names)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def paragraph(text: str, names: Iterable[str] = (), bullet: str = "") -> list[str]:
    """Wrap a text for the terminal, without breaking names: a line with a longer name is longer.

    Args:
        text: one line, as :func:`visible` returns it.
        names: names that may appear in it.
        bullet: in front of the first line; the others are indented by its length.

    Returns:
        The lines.
    """
    for name in sorted(map(visible, names), key=len, reverse=True):  # longest first: some are parts of others
        text = text.replace(name, name.translate(_FIRM))
    lines = textwrap.wrap(
        text,
        min(100, shutil.get_terminal_size((80, 24)).columns),
        break_long_words=False,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
    )
    return [line.translate(_LOOSE) for line in lines]


# Where lines break, and stand-ins that no text contains after visible().
_FIRM = {ord(" "): 0x80, ord("-"): 0x81}
_LOOSE = {stand_in: character for character, stand_in in _FIRM.items()}


def differences(
    there: Mapping[str, Any],
    now: Mapping[str, Any],
    but: Callable[[tuple[str, ...]], bool] = lambda _: False,
    called: Callable[[tuple[str, ...]], str] = ".".join,
    sides: tuple[str, str] = ("there", "now"),
    shown: Callable[[tuple[str, ...], Any], Any] = lambda _, value: value,
    told: Callable[[tuple[str, ...], Any, Any], str] = lambda *_: "",
) -> list[str]:
    """Describe how two nested tables differ.

    Args:
        there: the first table.
        now: the second one.
        but: whether an entry is ignored, by its keys from the outermost table on.
        called: what an entry is called, likewise.
        sides: what the two tables are called.
        shown: what the value of an entry is shown as, by its keys and the value.
        told: how two values of an entry differ, by its keys and both values; empty: both are shown.

    Returns:
        One clause per differing entry, such as ``run.xi: 0.05 there, 0.06 now``.
    """
    a, b = dict(flat(there)), dict(flat(now))

    def value(table: dict[tuple[str, ...], Any], names: tuple[str, ...]) -> Any:
        return shown(names, table[names]) if names in table else "nothing"

    def clause(names: tuple[str, ...]) -> str:
        both = names in a and names in b
        own = told(names, a[names], b[names]) if both else ""
        return own or f"{value(a, names)} {sides[0]}, {value(b, names)} {sides[1]}"

    return [
        f"{called(names)}: {clause(names)}"
        for names in dict.fromkeys([*a, *b])
        if not but(names) and (names not in a or names not in b or a[names] != b[names])
    ]


def flat(table: Mapping[str, Any], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Flatten a nested table.

    Args:
        table: mappings within a mapping.
        outer: keys of the tables that contain it.

    Yields:
        All keys of an entry, any of which may contain dots, and its value; an empty table is a value.
    """
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, (*outer, key))
        else:
            yield (*outer, key), value
