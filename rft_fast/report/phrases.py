"""Texts that summary and page share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pandas as pd

from ..common.words import some
from ..studies.verdicts import Shape, layer_shape

MEASURES = {"general": "all weights", "stragglers": "the stragglers"}


def images(rows: pd.DataFrame, each: str = "{:,} images of {}", between: str = ", ") -> str:
    """Describe the number of images of each data set."""
    counts = rows.groupby("dataset", sort=False)["samples"].max()
    return between.join(each.format(count, name) for name, count in counts.items())


def span(counts: pd.Series) -> str:
    """Describe the range of counts: ``"20"``, ``"20 to 200"``, or ``"no"`` without any."""
    ordered = sorted(counts.dropna().unique())
    return " to ".join(map(str, dict.fromkeys([ordered[0], ordered[-1]]))) if ordered else "no"


def by_shape(facts: pd.DataFrame, most: int = 3) -> str:
    """List stragglers by the shape of their loss: ``"1 by a bump (a), 2 by a slope (b, c)"``.

    Args:
        facts: rows of :func:`rft_fast.studies.stragglers`, all stragglers, in the order of the names.
        most: number of names of each shape.
    """
    found: dict[Shape, list[str]] = {}
    for fact in facts.to_dict("records"):
        found.setdefault(layer_shape(fact), []).append(fact["layer"])
    words: dict[Shape, str] = {"bump": " by a bump", "slope": " by a slope"}
    return ", ".join(
        f"{len(found[each])}{words.get(each, '')} ({some(found[each], most)})"
        for each in get_args(Shape)
        if each in found
    )


def tau(fact: Mapping[Any, Any]) -> str:
    """Format Kendall's tau with its 95 % interval, if defined."""
    if np.isnan(fact["kendall"]):
        return "-"
    if np.isnan(fact["kendall_low"]):
        return f"{fact['kendall']:+.2f}"
    return f"{fact['kendall']:+.2f} [{fact['kendall_low']:+.2f}, {fact['kendall_high']:+.2f}]"
