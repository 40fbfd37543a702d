"""Checks of numbers that callers pass: types, order, and alphas of a path."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


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
            f"alphas: expected the ends 0 and 1 among them, got {grid}; add {missing}, since gain, "
            "barrier and instability are measured from the ends"
        )
    return grid
