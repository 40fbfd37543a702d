"""Rank correlations of measures with outcomes over models: values, intervals, permutation tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .interpolate import Z95
from .permutation import max_t, partial, signs, tau


@dataclass(frozen=True)
class Pairing:
    """A measure and an outcome of the same models.

    Attributes:
        stated: columns that describe it.
        family: what it is corrected together with, such as study, data set and outcome.
        models: names of the n models.
        x: the measure, float64 [n].
        y: the outcome, float64 [n].
        errors: standard errors of ``x``, float64 [n]; None: differences of ``x`` are taken as exact.
        clean: loss of the unperturbed models in nats, float64 [n], for the partial correlation; None: none.
        saturated: number of models whose measure is saturated; with any, nothing is tested.
    """

    stated: Mapping[str, Any]
    family: tuple[str, ...]
    models: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    errors: np.ndarray | None = None
    clean: np.ndarray | None = None
    saturated: int = 0


@dataclass
class _Signs:
    """The pairs of models of a pairing, compared: int8 [n, n] each."""

    x: np.ndarray
    y: np.ndarray
    exact: np.ndarray  # of x, without its errors


def associate(pairings: Sequence[Pairing], groups: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Correlate each measure with its outcome, and test the families jointly.

    Args:
        pairings: measures with outcomes.
        groups: model -> group, for the range without one group; None: each model is its own.

    Returns:
        One row per pairing: ``stated`` and the columns that :func:`rft_fast.studies.correlation` describes,
        from ``models`` on.
    """
    compared = [_compare(pairing) for pairing in pairings]
    rows = [_row(pairing, both) for pairing, both in zip(pairings, compared, strict=True)]
    by_models: dict[tuple[str, ...], list[int]] = {}
    for number, (pairing, row) in enumerate(zip(pairings, rows, strict=True)):
        if not math.isnan(row["kendall"]):
            by_models.setdefault(pairing.models, []).append(number)
    # Only what is tested counts among the families.
    tested = {models: [n for n in own if not pairings[n].saturated] for models, own in by_models.items()}
    sizes = Counter(pairings[n].family for own in tested.values() for n in own)
    parts = Counter(family for own in tested.values() for family in {pairings[n].family for n in own})
    for models, own in by_models.items():
        kept = [(groups or {}).get(model, model) for model in models]
        for n, (low, high) in zip(own, _without(own, compared, kept), strict=True):
            rows[n] |= {"without_low": low, "without_high": high}
        if numbers := tested[models]:
            both = [found for n in numbers if (found := compared[n]) is not None]
            outcomes, which = np.unique([each.y for each in both], axis=0, return_inverse=True)
            families = [pairings[n].family for n in numbers]
            places = {family: place for place, family in enumerate(dict.fromkeys(families))}
            tests = max_t(
                np.array([each.x for each in both]),
                outcomes,
                which.reshape(-1),
                np.array([places[family] for family in families]),
                np.array([parts[family] for family in families]),
            )
            for n, p, p_max, needed in zip(numbers, *tests, strict=True):
                rows[n] |= {"p": p, "p_max": p_max, "needed": needed, "tests": sizes[pairings[n].family]}
    return rows


def _compare(pairing: Pairing) -> _Signs | None:
    """Compare all pairs of models; None with fewer than three, or a value that is not finite."""
    if len(pairing.models) < 3 or not np.isfinite([pairing.x, pairing.y]).all():
        return None
    exact = signs(pairing.x)
    x = exact if pairing.errors is None else signs(pairing.x, pairing.errors)
    return _Signs(x, signs(pairing.y), exact)


def _row(pairing: Pairing, both: _Signs | None) -> dict[str, Any]:
    n = len(pairing.models)
    kendall = spearman = given = math.nan
    tied = 0
    if both is not None:
        kendall = float(tau(both.x, both.y))
        # The sums of signs are twice the centred ranks, with ties at their mean.
        spearman = _cosine(both.exact.sum(1, dtype=float), both.y.sum(1, dtype=float))
        tied = int((both.x == 0).sum() - n) // 2
        if pairing.clean is not None and np.isfinite(pairing.clean).all():
            z = signs(pairing.clean)
            given = partial(kendall, float(tau(both.x, z)), float(tau(z, both.y)))
    tau_low, tau_high = _interval(kendall, 0.437, n - 4)
    rho_low, rho_high = _interval(spearman, 1 + spearman**2 / 2, n - 3)
    return {
        **pairing.stated,
        "models": n,
        "nonfinite": int((~np.isfinite([pairing.x, pairing.y])).any(0).sum()),
        "saturated": pairing.saturated,
        "tied": tied,
        "kendall": kendall,
        "kendall_low": tau_low,
        "kendall_high": tau_high,
        "without_low": math.nan,
        "without_high": math.nan,
        "p": math.nan,
        "p_max": math.nan,
        "tests": None,
        "needed": math.nan,
        "partial": given,
        "spearman": spearman,
        "spearman_low": rho_low,
        "spearman_high": rho_high,
    }


def _without(
    own: Sequence[int], compared: Sequence[_Signs | None], groups: Sequence[str]
) -> list[tuple[float, float]]:
    """The range of tau without each of the groups in turn, for pairings of the same models."""
    known = [both for n in own if (both := compared[n]) is not None]
    x, y = np.array([both.x for both in known]), np.array([both.y for both in known])
    found = []
    for group in dict.fromkeys(groups):
        rest = np.flatnonzero([name != group for name in groups])
        found.append(tau(x[:, rest][:, :, rest], y[:, rest][:, :, rest]))
    taus = np.array(found)
    return list(zip(taus.min(0).tolist(), taus.max(0).tolist(), strict=True))  # NaN if one is not defined


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle: Pearson's r for centred values."""
    size = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size else math.nan


def _interval(r: float, scale: float, degrees: int) -> tuple[float, float]:
    """95 % interval of a correlation whose z = atanh(r) has the variance ``scale / degrees``."""
    if degrees <= 0 or not abs(r) < 1 - 1e-9:  # rounding puts some just below 1
        return math.nan, math.nan
    z, margin = math.atanh(r), Z95 * math.sqrt(scale / degrees)
    return math.tanh(z - margin), math.tanh(z + margin)
