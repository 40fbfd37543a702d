"""What a 95 % interval allows one to conclude, decided once for summary, findings and report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd
from scipy.special import stdtrit

from .interpolate import STUDY as PATH
from .interpolate import Z95
from .permutation import LEVEL

Sign = Literal["above", "below", "unclear", "unknown"]
Gain = Literal["gain", "unclear", "not excluded", "unknown", "none"]
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


def half_width(error: float, freedom: float) -> float:
    """Half of the 95 % interval of a mean over masks, by Student's t.

    Accuracy changes in steps of one image, so a few masks may change the same images: a standard error of 0
    is no certainty.

    Args:
        error: standard error of the mean.
        freedom: degrees of freedom.

    Returns:
        NaN if the error is 0 or unknown, or without degrees of freedom.
    """
    return float(stdtrit(freedom, 0.975)) * error if freedom > 0 and error > 0 else math.nan


def gains(path: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Classify the gain of each path.

    Args:
        path: the result of :func:`rft_fast.studies.summarize`.
        rows: the rows it was made of.

    Returns:
        ``path`` with ``furthest``, the highest upper end of the pointwise 95 % intervals of A(alpha) - A(0)
        over alpha > 0 (NaN without one), and ``verdict`` (:func:`gain`).
    """
    rows = rows[(rows["study"] == PATH) & (rows["alpha"] > 0)]
    ends = (rows["gain"] + Z95 * rows["gain_se"]).groupby([rows["model"], rows["dataset"]])
    furthest = ends.agg(lambda own: own.max(skipna=False)).rename("furthest")
    found = path.join(furthest, on=["model", "dataset"])
    return found.assign(verdict=[gain(fact, fact["furthest"]) for fact in found.to_dict("records")])


def gain(fact: Mapping[Any, Any], furthest: float) -> Gain:
    """Classify the gain of one path.

    Args:
        fact: a row of :func:`rft_fast.studies.summarize`.
        furthest: highest upper end of an interval of A(alpha) - A(0) over alpha > 0.

    Returns:
        "gain", or "unclear" if its interval includes 0. If no alpha beats zero-shot: "none", or "not
        excluded" if an interval reaches above 0; "unknown" without intervals, as for a single image.
    """
    if fact["gain"] > 0:
        return "gain" if fact["gain_low"] > 0 else "unclear"
    if math.isnan(furthest):
        return "unknown"
    return "not excluded" if furthest > 0 else "none"


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
        says nothing of flatness; "unknown" without a test.
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
