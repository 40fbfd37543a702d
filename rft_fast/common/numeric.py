"""Numbers that are given by people: found to be numbers, in order, fit for a path."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


def as_number(name: str, value: object) -> float:
    """The value as a float; text is none, even where it could be read as one. Raises TypeError."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}") from None


def ascending(name: str, values: Iterable[float]) -> list[float]:
    """The values in ascending order, once they are found to be numbers. Raises TypeError."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list of numbers, got {values!r}")
    return sorted(as_number(name, value) + 0.0 for value in values)  # + 0.0 turns -0.0 into 0.0


def check_alphas(alphas: Iterable[float]) -> list[float]:
    """The positions in ascending order, once they are found fit for a study.

    Raises:
        TypeError: something that is no number.
        ValueError: no positions, one that is not finite, outside [0, 1] or given twice, or 0 or 1
            missing: gain, barrier and instability are all measured from the two ends.
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
