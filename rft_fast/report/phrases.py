"""Texts that summary and page share."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pandas as pd

from ..common.words import some
from ..settings import Prune
from ..studies.permutation import least
from ..studies.pruning import NAMED, kind
from ..studies.verdicts import Shape, layer_shape

SATURATED = "the perturbed model answers at chance, which says nothing of flatness"
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


def pruned_layers(own: Prune) -> str:
    """What is pruned, by the settings: ``"flat layers, of stragglers"``."""
    return kind(NAMED) if own.layers is not None else ", of ".join(map(kind, own.criteria))


def limits(table: pd.DataFrame) -> str:
    """Say which correlations so few models cannot show, in sentences.

    Args:
        table: the result of :func:`rft_fast.studies.correlation`, or some of its rows.
    """
    texts = []
    for models, group in table[table["models"] >= 3].groupby("models"):
        alone, tests = least(int(models)), group["tests"].max()
        if np.isnan(alone):
            texts.append(f"With {models} models, no rank correlation can be significant at 5 %.")
            continue
        text = (
            f"With {models} models and no ties, a Kendall's tau below {alone:.2f} is never significant at 5 %"
        )
        if tests > 1:
            needed = group.loc[group["tests"] == tests, "needed"].median()
            text += f"; corrected for {tests} tests, "
            text += "none is" if np.isnan(needed) else f"it takes about {needed:.2f}"
        texts.append(f"{text}.")
    return " ".join(texts)


def p_value(value: float) -> str:
    """Format a p value; a dash if there is none."""
    return "-" if pd.isna(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"
