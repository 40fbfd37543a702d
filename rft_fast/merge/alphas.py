"""A position for every layer: tables of patterns, and LiNeS (:mod:`rft_fast.path.coefficients`)."""

from __future__ import annotations

from collections.abc import Sequence

from ..path import coefficients


def table(entries: Sequence[float | tuple[str | None, float]], layers: Sequence[str]) -> dict[str, float]:
    """Give every layer its alpha.

    Args:
        entries: numbers, at most one, for layers that no pattern names; and pairs of a pattern (a layer's
            name, or ``re:`` and a regular expression for whole names) and a number. A pair of None is as the
            number alone.
        layers: names of layers.

    Returns:
        Layer -> alpha, in the order of ``layers``.

    Raises:
        ValueError: a pattern names no layer, two name the same one, or a layer has no alpha.
    """
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]
    return coefficients.spread(pairs, layers, "merge: alpha", "a number")


def lines(layers: Sequence[str], gamma: float, beta: float) -> dict[str, float]:
    """Give every layer the alpha of LiNeS (Wang et al. 2024): :func:`rft_fast.path.coefficients.lines`.

    Args:
        layers: names of layers, in any order.
        gamma: alpha of the first block.
        beta: what the last block has more.

    Raises:
        ValueError: no layer of the image tower is in a block, a tower has only one block, or its blocks are
            in several stages.
    """
    return coefficients.lines(layers, gamma, beta, "merge", "--alpha LAYER=X ...")
