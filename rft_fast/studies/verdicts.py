"""What a 95 % interval allows one to conclude, decided once for summary, findings and report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from .bands import Z95
from .permutation import LEVEL

Sign = Literal["above", "below", "unclear", "unknown"]
Mode = Literal["high gain", "gain", "undecided", "failure"]
Association = Literal["above", "below", "unclear", "saturated", "unknown"]
Straggling = Literal["straggler", "unchanged", "unclear", "stable"]
Shape = Literal["bump", "slope", "no rise", "unknown"]


def sign(low: float, high: float) -> Sign:
    """Classify a quantity by its interval.

    Args:
        low: lower end; NaN if there is no interval.
        high: upper end.

    Returns:
        Whether the quantity is "above" or "below" 0; "unclear" if the interval includes 0; "unknown" without
        an interval.
    """
    if pd.isna(low) or pd.isna(high):
        return "unknown"
    if low <= 0 <= high:
        return "unclear"
    return "above" if low > 0 else "below"


def half_width(error: float, freedom: float, tests: int = 1) -> float:
    """Half of the 95 % interval of a mean over masks, by Student's t.

    Accuracy changes in steps of one image, so a few masks may change the same images: a standard error of 0
    is no certainty.

    Args:
        error: standard error of the mean.
        freedom: degrees of freedom.
        tests: number of intervals that hold together, by Bonferroni's correction.

    Returns:
        NaN if the error is 0 or unknown, or without degrees of freedom.
    """
    return float(stdtrit(freedom, 1 - 0.025 / tests)) * error if freedom > 0 and error > 0 else math.nan


def interval(name: str, each: NDArray[np.float64] | None, tests: int = 1) -> dict[str, float]:
    """Return a mean over images with its standard error and its 95 % interval, by Student's t.

    Args:
        name: what it is called; the others are ``<name>_se``, ``<name>_low`` and ``<name>_high``.
        each: its value for each image, [n]; None: not known, and all are NaN.
        tests: number of intervals that hold together, by Bonferroni's correction.
    """
    mean = error = half = math.nan
    if each is not None and len(each) > 1:
        mean, error = float(each.mean()), float(each.std(ddof=1)) / math.sqrt(len(each))
        half = half_width(error, len(each) - 1, tests)
    return {name: mean, f"{name}_se": error, f"{name}_low": mean - half, f"{name}_high": mean + half}


def two_way_error(table: NDArray[np.float64]) -> float:
    """Standard error of the mean of a table, both of whose dimensions are samples, such as models and images.

    The variance is that over rows plus that over columns minus that over both (two-way clusters; Cameron,
    Gelbach and Miller, 2011), and at least the larger of the first two.

    Args:
        table: [rows, columns].

    Returns:
        NaN with fewer than two rows or columns.
    """
    if min(table.shape) < 2:
        return math.nan
    rows, columns = (table.mean(axis=axis).var(ddof=1) / table.shape[1 - axis] for axis in (1, 0))
    both = table.var(ddof=1) / table.size
    return math.sqrt(max(rows, columns, rows + columns - both))


def mode(fact: Mapping[Any, Any]) -> Mode:
    """Classify the gain of a path by bounds that hold for all positions at once.

    Args:
        fact: a row of :func:`rft_fast.studies.summarize`; of any data set.

    Returns:
        "gain" if some position has a lower bound above 0, "high gain" if one of these gains at least ``xi``;
        "failure" if none has and all upper bounds are below ``xi``: no gain of that size is possible;
        otherwise "undecided", also without bounds, as for a single image.
    """
    if fact["gain_shown"] > 0:
        return "high gain" if fact["gain_shown"] >= fact["xi"] else "gain"
    return "failure" if fact["gain_high"] < fact["xi"] else "undecided"


def shape(fact: Mapping[Any, Any]) -> Shape:
    """Classify how the loss goes along a path, by corrected intervals.

    Args:
        fact: a row of :func:`rft_fast.studies.summarize`.

    Returns:
        "bump" if the loss rises above the straight line between its ends; otherwise "slope" if it rises above
        that at alpha = 0, for which the ends alone may be the reason, and "no rise" if it is not shown to;
        "unknown" without intervals, or without a position between the ends.
    """
    if fact["bump_low"] > 0:
        return "bump"
    if math.isnan(fact["bump_low"]) or math.isnan(fact["barrier_low"]):
        return "unknown"
    return "slope" if fact["barrier_low"] > 0 else "no rise"


def layer_shape(fact: Mapping[Any, Any]) -> Shape:
    """Classify the instability of a straggler, by corrected intervals.

    Args:
        fact: a row of :func:`rft_fast.studies.stragglers`.

    Returns:
        "bump" if the loss rises above the straight line between the layer's own ends, otherwise "slope": its
        ends alone may be the reason; "no rise" for a layer that is no straggler; "unknown" where the bump was
        not measured or is not finite.
    """
    if not fact["straggler"]:
        return "no rise"
    if math.isnan(fact["bump_low"]):
        return "unknown"
    return "bump" if fact["bump_low"] > 0 else "slope"


def association(fact: Mapping[Any, Any]) -> Association:
    """Classify a rank correlation by its permutation p, corrected for the others of its family.

    Args:
        fact: a row of :func:`rft_fast.studies.correlation`.

    Returns:
        "above" or "below" 0 where ``p_max`` is at most 0.05, else "unclear"; "saturated" where a sharpness
        says nothing about flatness; "unknown" without a test.
    """
    if fact["saturated"]:
        return "saturated"
    if pd.isna(fact["p_max"]):
        return "unknown"
    if fact["p_max"] > LEVEL:
        return "unclear"
    return "above" if fact["kendall"] > 0 else "below"


def straggling(fact: Mapping[Any, Any]) -> Straggling:
    """Classify a layer.

    Args:
        fact: a row of :func:`rft_fast.studies.stragglers`.

    Returns:
        "unclear" for a layer that is no straggler but whose pointwise intervals reach above the margin and,
        for the rise in loss, above 0.
    """
    if fact["straggler"]:
        return "straggler"
    if fact["unchanged"]:
        return "unchanged"
    high, rise = (fact[name] + Z95 * fact[f"{name}_se"] for name in ("instability", "rise"))
    return "unclear" if high > fact["margin"] and rise > 0 else "stable"
