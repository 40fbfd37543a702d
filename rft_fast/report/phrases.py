"""Texts that summary and page share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import numpy as np
import pandas as pd

from ..common.words import many, some
from ..settings import Prune
from ..studies.permutation import least
from ..studies.pruning import NAMED, kind
from ..studies.verdicts import Shape, layer_shape

SATURATED = "the perturbed model answers at chance, which says nothing about flatness"
PAPER_CLAIM = "The paper reports flat layers in models whose interpolation fails."
PAPER_CORRELATION = (
    "The paper reports that the sharpness of the whole model does not predict accuracy, and that of the "
    "stragglers does."
)
MEASURES = {"general": "all weights", "stragglers": "the stragglers"}


def images(rows: pd.DataFrame, before: str = "", between: str = ", ") -> str:
    """Describe the number of images of each data set, each with the text ``before`` it."""
    counts = rows.groupby("dataset", sort=False)["samples"].max()
    return between.join(f"{before}{many(f'{count:,}', 'image')} of {name}" for name, count in counts.items())


def span(counts: pd.Series) -> str:
    """Describe the range of counts: ``"20"``, ``"20 to 200"``, or ``"no"`` without any."""
    ordered = sorted(counts.dropna().unique())
    return " to ".join(map(str, dict.fromkeys([ordered[0], ordered[-1]]))) if ordered else "no"


def listed_names(names: Iterable[str], most: int = 3) -> list[str]:
    """The first few names, and the number of the others."""
    shown = [some([name]) for name in names]
    return [*shown[:most], f"{len(shown) - most} more"] if len(shown) > most else shown


def joined(parts: Sequence[str]) -> str:
    """Join parts of a sentence: ``"a, b and c"``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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


def points(value: float) -> str:
    """Format a difference in accuracy, a fraction, in points (%)."""
    return _zero(f"{100 * value:+.1f}")


def nats(value: float) -> str:
    """Format a difference in loss."""
    if not np.isfinite(value):
        return "infinitely many" if value > 0 else "an unknown number of"
    return _zero(f"{value:.3f}" if 0.01 <= abs(value) < 100 else f"{value:.{2 if abs(value) < 1 else 4}g}")


def _zero(text: str) -> str:
    """Remove the sign of a zero."""
    return text.lstrip("+-") if not text.strip("+-0.") else text


def within(low: float, high: float, form: Callable[[float], str], what: str) -> str:
    """Format an interval: ``"[95 % interval: -0.2, +1.3]"``; ``"[no interval]"`` if an end is unknown."""
    known = pd.notna(low) and pd.notna(high)
    return f"[{what}: {form(low)}, {form(high)}]" if known else "[no interval]"
