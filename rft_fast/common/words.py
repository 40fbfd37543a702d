"""What messages share."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# C0, DEL, C1; marks that change the direction of text; line and paragraph separators; what is no character;
# what takes no room, so that two names look like one (joiners stay: some scripts, and emoji, need them).
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb]"
)
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: str, lines: bool = False) -> str:
    """Text with its control characters written out (``\\u001b``, as JSON has them); other text is unchanged.

    Args:
        text: any, names that are other people's in it.
        lines: keep line ends and tabs, as in a text of several lines; otherwise the result is one line.
    """

    def escape(found: re.Match[str]) -> str:
        one = found[0]
        return one if lines and one in "\n\t" else _SHORT.get(one, f"\\u{ord(one):04x}")

    return _CONTROL.sub(escape, text)


# What spreadsheets take for the beginning of a formula, with their wide forms, behind spaces and quotes.
_FORMULA = re.compile(r"[\s']*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\s']*[\t\r\n]")


def cell(value: Any) -> Any:
    """A value as a cell of CSV that people open in a spreadsheet: no text becomes a formula there.

    Text that a spreadsheet might compute, such as ``=1+1``, gets an apostrophe in front, as people type it
    there; numbers stay as they are. :func:`from_cell` takes the apostrophe away.
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def from_cell(text: str) -> str:
    """The text that :func:`cell` made this of."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def message(error: object) -> str:
    """An error as text in which no name can pose as a line: only indented lines begin anew."""
    return re.sub(r"\n(?!  )", r"\\n", str(error))


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(visible(str(name)) for name in names[:shown]) + more


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest that is, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def paragraph(text: str, names: Iterable[str] = (), bullet: str = "") -> list[str]:
    """A text as lines of up to 100 characters, longer where a name is: each name stands in one line, whole.

    Args:
        text: one that :func:`visible` made one line of.
        names: those that may stand in it.
        bullet: before the first line; the others are indented by as much.
    """
    for name in sorted(map(visible, names), key=len, reverse=True):  # some are parts of others
        text = text.replace(name, name.translate(_FIRM))
    lines = textwrap.wrap(
        text, 100, break_long_words=False, initial_indent=bullet, subsequent_indent=" " * len(bullet)
    )
    return [line.translate(_LOOSE) for line in lines]


# What lines are broken at, and characters that visible() leaves in no text, which stand for it meanwhile.
_FIRM = {ord(" "): 0x80, ord("-"): 0x81}
_LOOSE = {stand_in: character for character, stand_in in _FIRM.items()}


def differences(
    there: Mapping[str, Any], now: Mapping[str, Any], but: Callable[[tuple[str, ...]], bool] = lambda _: False
) -> list[str]:
    """How two nested tables differ, in words: one sentence for each entry.

    but: whether an entry does not matter, by its names from the outermost table on.
    """
    a, b = dict(flat(there)), dict(flat(now))
    return [
        f"{'.'.join(names)} {a.get(names, 'nothing')} there, {b.get(names, 'nothing')} now"
        for names in dict.fromkeys([*a, *b])
        if not but(names) and (names not in a or names not in b or a[names] != b[names])
    ]


def flat(table: Mapping[str, Any], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Entries that are no tables, or empty ones, by all their names: any of which may have a dot in it."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, (*outer, key))
        else:
            yield (*outer, key), value
