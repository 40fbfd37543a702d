"""Tables of text that fit the terminal: columns aligned by display width, long names shortened."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence

from .words import visible

_GAP = "  "
_NAME = 24  # columns that a shortened name keeps at least, where there is room
_LEAST = 8  # fewer would not tell names apart
_DOTS = "..."


def columns() -> int:
    """Return the width of the terminal, or 80 if the output is a file or a pipe."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def display_width(text: str) -> int:
    """Return how many columns a text takes; East Asian characters take two, combining ones none."""
    if text.isascii() and text.isprintable():
        return len(text)
    from wcwidth import wcswidth, wcwidth  # is not needed, nor always there, for the kernels alone

    whole = wcswidth(text)
    return whole if whole >= 0 else sum(max(0, wcwidth(one)) for one in text)


def shortened(text: str, size: int) -> str:
    """Return a text with its middle left out, so that it takes at most ``size`` columns."""
    if display_width(text) <= size:
        return text
    from wcwidth import wcwidth

    room = size - len(_DOTS)
    head = _taken(text, room - room // 2)
    tail = text[::-1]
    while display_width(tail[::-1]) > room - display_width(head) or (tail and wcwidth(tail[-1]) <= 0):
        tail = tail[:-1]
    return head + _DOTS + tail[::-1]


def _taken(text: str, size: int) -> str:
    while display_width(text) > size:
        text = text[:-1]
    return text


def padded(text: str, size: int, left: bool = False) -> str:
    """Fill a text with spaces to ``size`` columns; ``left``: behind it."""
    spaces = " " * (size - display_width(text))
    return text + spaces if left else spaces + text


def aligned(
    rows: Iterable[Sequence[str]],
    last: bool = False,
    indent: str = "  ",
    size: int | None = None,
    style: Callable[[str], str] = str,
) -> list[str]:
    """Align columns: the first to the left, the others to the right, except the last if ``last``.

    Cells that make a table too wide are shortened in their middle, and listed in full below it. A table that
    is still too wide is continued below, with its first column again.

    Args:
        rows: the cells; headings are rows like others.
        last: align the last column to the left.
        indent: what each line starts with.
        size: columns of the terminal; None: of this one.
        style: applied to each padded cell, such as colours, which take no columns.

    Returns:
        The lines.
    """
    cells = [[visible(cell) for cell in row] for row in rows]
    if not cells:
        return []
    room = (columns() if size is None else size) - len(indent)
    cells, legend = _shorten(cells, room)
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    lines: list[str] = []
    for block in _blocks(widths, room):
        lines += [""] if lines else []
        for row in cells:
            line = [
                style(padded(row[place], widths[place], left=not place or (last and place == len(row) - 1)))
                for place in block
            ]
            lines += [(indent + _GAP.join(line)).rstrip()] if any(row[place] for place in block) else []
    return [*lines, *(f"{indent}{short}: {name}" for short, name in legend.items())]


def labelled(
    pairs: Iterable[tuple[str, str]], indent: str = "", size: int | None = None, wrap: bool = True
) -> list[str]:
    """Align texts behind their labels, in full; long ones continue on the next line, at a space.

    Args:
        pairs: label and text of each line.
        indent: what each line starts with.
        size: columns of the terminal; None: of this one.
        wrap: False: each text on one line, such as a command that people copy.

    Returns:
        The lines.
    """
    known = [(visible(label), visible(text)) for label, text in pairs]
    width = max((display_width(label) for label, _ in known), default=0)
    before = len(indent) + width + len(_GAP)
    room = (columns() if size is None else size) - before
    lines = []
    for label, text in known:
        first, *others = _wrapped(text, room) if wrap else [text]
        lines.append(f"{indent}{padded(label, width, left=True)}{_GAP}{first}".rstrip())
        lines += [" " * before + other for other in others]
    return lines


def _wrapped(text: str, room: int) -> list[str]:
    """Divide a text at spaces; a word that is longer than a line stays whole."""
    lines = [""]
    for place, word in enumerate(text.split(" ")):
        longer = f"{lines[-1]} {word}" if place else word
        if lines[-1] and display_width(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _total(widths: Iterable[int]) -> int:
    return sum(width + len(_GAP) for width in widths) - len(_GAP)


def _blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """Divide columns into tables that fit, each with the first column."""
    blocks: list[list[int]] = [[0]]
    for place in range(1, len(widths)):
        fits = _total(widths[one] for one in [*blocks[-1], place]) <= room
        if fits or blocks[-1] == [0]:
            blocks[-1].append(place)
        else:
            blocks.append([0, place])
    return blocks


def _shorten(cells: list[list[str]], room: int) -> tuple[list[list[str]], dict[str, str]]:
    """Shorten cells if the table is too wide; return the cells, and short -> full."""
    natural = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    excess = _total(natural) - room
    if excess <= 0:
        return cells, {}
    # As much as the table needs, or as is useful if it has to be divided anyway.
    floor = min(_NAME, max(_LEAST, room - max(natural[1:], default=0) - len(_GAP)))
    limits = []
    for width in natural:
        limit = max(min(width, floor), width - max(0, excess))
        excess -= width - limit
        limits.append(limit)
    legend: dict[str, str] = {}
    short: dict[str, str] = {}
    for row in cells:
        for place, cell in enumerate(row):
            if display_width(cell) > limits[place] and cell not in short:
                text = shortened(cell, limits[place])
                number = 2
                while text in legend:  # another name is the same without its middle
                    text = shortened(cell, limits[place] - len(f"~{number}")) + f"~{number}"
                    number += 1
                legend[text] = cell
                short[cell] = text
    return [[short.get(cell, cell) for cell in row] for row in cells], legend
