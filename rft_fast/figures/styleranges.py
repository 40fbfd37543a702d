"""Ranges of the numbers in style files: beyond them, a figure cannot be drawn or read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cycler import Cycler

_DASHES = (0, 100)
_COLOURS = 1000  # more than a figure has curves
# Patterns of keys -> least, most, unit. The first that fits counts. Negative pads put text inside the axes.
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    (r"savefig\.dpi", 36, 2400, "dots per inch"),
    (r"font\.size|.*\.(label|title|title_font|font)size", 2, 24, "points"),
    (r"font\.(weight|stretch)|axes\.(label|title)weight", 0, 1000, ""),
    (r".*alpha", 0, 1, ""),
    (r"lines\.linewidth", 0.05, 20, "points"),  # dashes are multiples of it
    (r".*(width|\.size|capsize|markersize)", 0, 50, "points"),
    (r"axes\.(label|title)pad|[xy]tick\.m\w+\.pad", -50, 50, "points"),
    (r"axes\.[xy]margin", -0.4, 2, "of the data's range"),
    (r"figure\.constrained_layout\.._?pad", 0, 0.25, "inches"),
    (r"figure\.constrained_layout\..space", 0, 0.5, "of a panel"),
    (r"legend\.(numpoints|scatterpoints)", 1, 10, ""),
    (r"[xy]tick\.minor\.ndivs", 1, 10, ""),
    (r"lines\.marker", 0, 11, ""),
    (r"lines\.(\w+_pattern|dashes)", *_DASHES, "line widths"),
    (r"axes\.formatter\.limits", -100, 100, "powers of ten"),
    (r".*", 0, 20, ""),  # distances in a legend, in sizes of its font
)


def check(key: str, value: Any) -> None:
    """Check the numbers of a setting; words, such as *medium*, pass.

    Args:
        key: name of the setting.
        value: its value, as matplotlib has validated it.

    Raises:
        ValueError: a number is out of range or not finite, or dashes are no pairs or too short; with
            the range.
    """
    if isinstance(value, Cycler):
        _check_cycle(key, value)
        return
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            least, most, unit = next(known[1:] for known in _RANGES if re.fullmatch(known[0], key))
            if not least <= number <= most:  # so is NaN
                raise ValueError(
                    f"{key}: expected {least:g} to {most:g} {unit}".rstrip() + f", got {number:g}"
                )
    if key.endswith("_pattern"):
        _check_dashes(key, value)


def check_length(cycle: Cycler[Any, Any]) -> None:
    """Check how many entries ``axes.prop_cycle`` has, before matplotlib lists them.

    Raises:
        ValueError: none, or too many.
    """
    if not 1 <= len(cycle) <= _COLOURS:
        raise ValueError(f"axes.prop_cycle: expected 1 to {_COLOURS} entries, got {len(cycle)}")


def _check_cycle(key: str, cycle: Cycler[Any, Any]) -> None:
    for name, values in cycle.by_key().items():
        for value in values:
            try:
                check(name if name == "alpha" else f"lines.{name}", value)
                if name in ("linestyle", "dashes") and isinstance(value, tuple | list):
                    _check_dashes(name, value[1] if name == "linestyle" else value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _check_dashes(key: str, lengths: Iterable[float] | None) -> None:
    """Backends take pairs alone, and short dashes of a long line fill the memory."""
    every = list(lengths or ())
    least, most = _DASHES
    if every and (len(every) % 2 or not all(least <= one <= most for one in every) or sum(every) < 1):
        raise ValueError(
            f"{key}: expected pairs of dash and gap, each {least} to {most} line widths, together 1 or more; "
            f"got {', '.join(f'{one:g}' for one in every)}"
        )
