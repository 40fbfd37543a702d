"""The paper's central claim as a table: does sharpness predict which model does well out of distribution?

The claim is that general sharpness does not, and that the layer-wise sharpness of straggler layers does. Each
row of the table is one answer: a rank correlation over the models of a zoo.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..names import Names
from .interpolate import STUDY as INTERPOLATION
from .interpolate import Z95, summarize
from .layers import MARGIN
from .layers import STUDY as LAYERS
from .layers import stragglers as find_stragglers
from .rows import COLUMNS, asked, check_table

# Columns that distinguish one measurement of the models' sharpness from another.
SETTING = ["dataset", "rho", "on", "estimator"]
# Columns that must not vary within one of them, or their effect would be mixed with that of the models.
PROTOCOL = ["noise", "adaptive", "noise_batch", "normalized"]
_STUDIES = ["sharpness", "layer-sharpness"]


def correlation(rows: pd.DataFrame, stragglers: Names | None = None, margin: float = MARGIN) -> pd.DataFrame:
    """Correlate sharpness with out-of-distribution accuracy and gain, by rank, over models.

    Sharpness is the general sharpness, that of one layer, or the mean over the straggler layers of each
    model. The outcome is the accuracy at the same alpha, or the gain (Eq. 2), on an out-of-distribution data
    set. Only models with both are correlated.

    The 95 % intervals are closed forms on Fisher's z = atanh(r): for Kendall's tau with the variance 0.437 /
    (n - 4) of Fieller, Hartley and Pearson (1957), for Spearman's rho with (1 + r^2 / 2) / (n - 3) of Bonett
    and Wright (2000). They are approximate for few models, treat models as independent draws, and correct
    neither for the noise of each sharpness nor for the number of rows. Stragglers found on the same models
    also make their own row optimistic. There is no interval (NaN) for n <= 4 models (Kendall) or n <= 3
    (Spearman), where the variance is not defined, nor at r = 1 or -1, where z is infinite.

    Args:
        rows: rows of the interpolation and of general or layer-wise sharpness, or both, of several models;
            rows of other studies are ignored.
        stragglers: the straggler layers; None: those that :func:`rft_fast.studies.stragglers` finds in any
            model, from rows of the layer-wise interpolation. Without any, the table has no such measure.
        margin: margin of that search, in nats.

    Returns:
        One row per outcome, measure and alpha > 0:

        - ``dataset``, ``outcome``: the out-of-distribution data set, and *accuracy* or *gain* on it;
        - ``measure``: *general*, *stragglers* or *layer*; ``layer``: its name (for stragglers joined by ",
          ", for general missing); ``measured_on``: the data set of the sharpness;
        - ``alpha``, ``rho``, ``on``, ``estimator``, ``noise``, ``adaptive``, ``noise_batch``, ``normalized``
          and ``draws``, ``samples``, ``seed`` of the sharpness, the last three missing if they vary;
        - ``models``: number of models correlated; ``nonfinite``: number of those with a value that is not
          finite;
        - ``kendall`` (tau-b), ``kendall_low``, ``kendall_high``, ``spearman``, ``spearman_low``,
          ``spearman_high``: NaN with fewer than three models, with ``nonfinite`` above 0, or if either side
          is the same for all models.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no rows of an interpolation out of distribution or of a sharpness;
            :func:`rft_fast.studies.summarize` refuses a path; a sharpness mixes protocols, was measured
            twice, or is missing at some layer or alpha of a model; the sharpness of a straggler was not
            measured; no row has three models.
    """
    check_table(rows, "correlation")
    rows = _rounded(rows)
    return correlate(rows, lambda: summarize(_ood(rows)), lambda: find_stragglers(rows, margin), stragglers)


def correlate(
    rows: pd.DataFrame,
    path: Callable[[], pd.DataFrame],
    unstable: Callable[[], pd.DataFrame],
    stragglers: Names | None = None,
) -> pd.DataFrame:
    """Make the table of :func:`correlation` from analyses that exist already.

    Args:
        rows: as for :func:`correlation`.
        path: returns :func:`rft_fast.studies.summarize` of the rows, at least of those out of distribution.
        unstable: returns :func:`rft_fast.studies.stragglers`; called if there are rows of the layer-wise
            interpolation and ``stragglers`` is None.
        stragglers: as for :func:`correlation`.
    """
    rows = _rounded(rows)
    outcomes = list(_outcomes(rows, path))
    table = pd.DataFrame(
        [
            {"dataset": dataset, "outcome": outcome, **measure, **facts}
            for measure, x in _measures(rows, stragglers, unstable)
            for dataset, outcome, y in outcomes
            for facts in _associations(x, y)
        ]
    )
    if (table["models"] < 3).all():
        raise ValueError(
            f"correlation: expected at least 3 models with both interpolation and sharpness, got "
            f"{table['models'].max()}; interpolation: {_names(rows, [INTERPOLATION])}; "
            f"sharpness: {_names(rows, _STUDIES)}"
        )
    return table[_COLUMNS].astype(_TYPES)


_COLUMNS = (
    "dataset outcome measured_on measure layer alpha rho on estimator noise adaptive noise_batch normalized "
    "draws samples seed models nonfinite "
    "kendall kendall_low kendall_high spearman spearman_low spearman_high"
).split()
_TYPES = {name: COLUMNS[name] for name in _COLUMNS if name in COLUMNS and name != "nonfinite"}
_TYPES |= dict.fromkeys(["outcome", "measured_on", "measure"], "string")


def _rounded(rows: pd.DataFrame) -> pd.DataFrame:
    # One grid may write 0.3 and another 0.30000000000000004.
    return rows.assign(alpha=rows["alpha"].round(9), estimator=asked(rows))


def _ood(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["study"] == INTERPOLATION) & rows["ood"].fillna(False)]


def _outcomes(rows: pd.DataFrame, path: Callable[[], pd.DataFrame]) -> Iterator[tuple[str, str, Any]]:
    """Yield data set, outcome and its values by model: per alpha for accuracy, a single one for the gain."""
    rows = _ood(rows)
    if rows.empty:
        raise ValueError(
            f"correlation: expected rows of the study {INTERPOLATION!r} on out-of-distribution data, got none"
        )
    gains = path().set_index(["dataset", "model"])["gain"]
    for dataset, group in rows.groupby("dataset", sort=False):
        yield str(dataset), "accuracy", group.pivot(index="model", columns="alpha", values="accuracy")
        yield str(dataset), "gain", gains[dataset]


def _measures(
    rows: pd.DataFrame, stragglers: Names | None, unstable: Callable[[], pd.DataFrame]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield the columns that identify a measure of sharpness, and its values: models by alphas."""
    measured = rows[rows["study"].isin(_STUDIES) & (rows["alpha"] > 0)]
    if measured.empty:
        raise ValueError(f"correlation: expected rows of the study {' or '.join(_STUDIES)}, got none")
    names = _straggler_layers(rows, measured["layer"].dropna().unique(), stragglers, unstable)
    for (dataset, *setting), group in measured.groupby([*SETTING, "study"], sort=False, dropna=False):
        _check(group, f"correlation: {setting.pop()} on {dataset!r} at rho={setting[0]:g}")
        stated = {
            "measured_on": dataset,
            **dict(zip(SETTING[1:], setting, strict=True)),
            **{name: _common(group[name]) for name in (*PROTOCOL, "draws", "samples", "seed")},
        }
        layers = {
            layer: part.pivot(index="model", columns="alpha", values="sharpness")
            for layer, part in group.groupby("layer", sort=False, dropna=False)
        }
        if group["layer"].isna().all():
            (general,) = layers.values()
            yield {**stated, "measure": "general", "layer": None}, general
            continue
        if names:
            if missing := [name for name in names if name not in layers]:
                raise ValueError(
                    f"correlation: the layer-wise sharpness on {dataset!r} has no rows of the stragglers "
                    f"{missing}; measure them as well, or name the stragglers"
                )
            mean = sum(layers[name] for name in names) / len(names)
            yield {**stated, "measure": "stragglers", "layer": ", ".join(names)}, mean
        for layer, values in layers.items():
            yield {**stated, "measure": "layer", "layer": layer}, values


def _straggler_layers(
    rows: pd.DataFrame,
    layers: Sequence[str],
    stragglers: Names | None,
    unstable: Callable[[], pd.DataFrame],
) -> list[str]:
    """The given names if they were measured; else those found in any model, which may be none."""
    if stragglers is not None:
        for name in stragglers:
            if name not in layers:
                near = difflib.get_close_matches(name, layers, 3, 0.3)
                raise ValueError(
                    f"correlation: no layer-wise sharpness of the straggler {name!r} was measured; "
                    f"the nearest of the {len(layers)} measured layers: {near}"
                )
        return list(dict.fromkeys(stragglers))
    if not len(layers) or not (rows["study"] == LAYERS).any():
        return []
    found = unstable()
    return list(found.loc[found["straggler"], "layer"].unique())


def _check(group: pd.DataFrame, where: str) -> None:
    """Refuse a group unless it has one row per model, layer and alpha, all of one protocol."""
    for name in PROTOCOL:
        if group[name].nunique(dropna=False) > 1:
            raise ValueError(f"{where}: expected one {name}, got {list(group[name].unique())}")
    keys = ["model", "layer", "alpha"]
    counts = group.groupby(keys, sort=False, dropna=False).size()
    if (counts > 1).any():
        raise ValueError(f"{where}: measured more than once, say {_say(counts.index[counts > 1][0])}")
    every = pd.MultiIndex.from_product([group[key].unique() for key in keys])
    if len(missing := every.difference(counts.index, sort=False)):
        raise ValueError(
            f"{where}: {len(missing)} of {len(every)} rows are missing, say {_say(missing[0])}; finish the "
            "run, or leave out the rows of models, layers or alphas that were not measured for all"
        )


def _say(key: tuple[str, Any, float]) -> str:
    model, layer, alpha = key
    return f"{model!r}{'' if pd.isna(layer) else f', {layer}'} at alpha={alpha:g}"


def _common(values: pd.Series) -> Any:
    """The value that all rows share, or None."""
    return values.iloc[0] if values.nunique(dropna=False) == 1 else None


def _names(rows: pd.DataFrame, studies: Sequence[str]) -> list[str]:
    return list(rows.loc[rows["study"].isin(studies), "model"].unique())


def _associations(x: pd.DataFrame, y: Any) -> Iterator[dict[str, float]]:
    """Yield both rank correlations at each alpha, over the models that x and y share."""
    models = x.index.intersection(y.index)
    x, y = x.loc[models], y.loc[models]
    for alpha in x:
        if y.ndim == 2 and alpha not in y:  # no accuracies there
            yield {"alpha": alpha, **_association(np.empty(0), np.empty(0))}
        else:
            outcome = y if y.ndim == 1 else y[alpha]
            yield {"alpha": alpha, **_association(x[alpha].to_numpy(), outcome.to_numpy())}


def _association(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    n = len(x)
    finite = np.isfinite(x) & np.isfinite(y)
    tau = rho = math.nan
    if n >= 3 and finite.all():
        signs = [np.sign(np.subtract.outer(values, values)) for values in (x, y)]
        # The sums of signs are twice the centred ranks, with ties at their mean.
        tau, rho = _cosine(*signs), _cosine(*(each.sum(1) for each in signs))
    tau_low, tau_high = _interval(tau, 0.437, n - 4)
    rho_low, rho_high = _interval(rho, 1 + rho**2 / 2, n - 3)
    return {
        "models": n,
        "nonfinite": int((~finite).sum()),
        "kendall": tau,
        "kendall_low": tau_low,
        "kendall_high": tau_high,
        "spearman": rho,
        "spearman_low": rho_low,
        "spearman_high": rho_high,
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle: tau-b for the signs of all pairs, Pearson's r for centred values."""
    size = math.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size else math.nan


def _interval(r: float, scale: float, degrees: int) -> tuple[float, float]:
    """95 % interval of a correlation whose z = atanh(r) has the variance ``scale / degrees``."""
    if degrees <= 0 or not abs(r) < 1 - 1e-9:  # rounding puts some just below 1
        return math.nan, math.nan
    z, margin = math.atanh(r), Z95 * math.sqrt(scale / degrees)
    return math.tanh(z - margin), math.tanh(z + margin)
