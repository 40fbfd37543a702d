"""Checks of numbers that callers pass: types, order, and alphas of a path."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np


def as_number(name: str, value: object) -> float:
    """Convert a value to float.

    Args:
        name: of the argument, for the message.
        value: any number; strings are refused, even numeric ones.

    Raises:
        TypeError: it is not a number.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}") from None


def ascending(name: str, values: Iterable[float]) -> list[float]:
    """Convert numbers to floats in ascending order.

    Args:
        name: of the argument, for the message.
        values: numbers in any order; ``-0.0`` becomes ``0.0``.

    Raises:
        TypeError: they are not an iterable of numbers.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list of numbers, got {values!r}")
    return sorted(as_number(name, value) + 0.0 for value in values)  # + 0.0 turns -0.0 into 0.0


def check_alphas(alphas: Iterable[float]) -> list[float]:
    """Check the positions of a study and return them in ascending order.

    Args:
        alphas: positions on the path, 0 (zero-shot) and 1 (fine-tuned) among them.

    Raises:
        TypeError: a value is not a number.
        ValueError: there are none, one is not finite, outside [0, 1] or repeated, or an end is missing: gain,
            barrier and instability are measured from the ends.
    """
    grid = ascending("alphas", alphas)
    outside = [alpha for alpha in grid if not 0 <= alpha <= 1]
    if outside:
        raise ValueError(f"alphas: expected finite numbers in [0, 1], got {outside}")
    twice = sorted({a for a, b in pairwise(grid) if a == b})
    if twice:
        raise ValueError(f"alphas: expected each position once, got {twice} more than once")
    missing = sorted({0.0, 1.0} - set(grid))
    if missing:
        raise ValueError(
            f"alphas: expected 0 and 1 among them, got {grid}; add {missing}, because gain, "
            "barrier and instability are measured from the ends"
        )
    return grid


# --- as text ----------------------------------------------------------------------------------------------


def as_float(text: str) -> float:
    """The number that a text is; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def whole(low: int, high: int = sys.maxsize) -> Callable[[str], int]:
    """A check: text -> integer in [low, high]. It raises ValueError."""

    def check(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            what = f"from {low} to {high}" if high < sys.maxsize else f"of at least {low}"
            raise ValueError(f"expected an integer {what}, got {text!r}")
        return int(text)

    return check


positive = whole(1)


def above_zero(text: str) -> float:
    """A finite number above 0. Raises ValueError."""
    value = as_float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"expected a number above 0, got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number in [0, 1). Raises ValueError."""
    value = as_float(text)
    if not 0 <= value < 1:
        raise ValueError(
            f"expected a fraction, at least 0 and below 1 (2 percentage points are 0.02), got {text!r}"
        )
    return value


def spaced(text: str) -> list[float]:
    """One number, or ``start:stop:count`` evenly spaced ones with both ends. Raises ValueError."""
    try:
        if ":" not in text:
            return [float(text)]
        start, stop, count = text.split(":")
        if int(count) < 2:
            raise ValueError("a range needs a start and a stop")
        # Rounded, so that tenths are written as people write them.
        return [round(x, 12) for x in np.linspace(float(start), float(stop), int(count)).tolist()]
    except ValueError:
        raise ValueError(
            f"expected a number, or start:stop:count with a count of at least 2, got {text!r}"
        ) from None
