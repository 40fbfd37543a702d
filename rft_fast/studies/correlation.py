"""The paper's central claim as a table: does sharpness predict which model does well out of distribution?

The claim is that general sharpness does not, and that the layer-wise sharpness of straggler layers does. Each
row of the table is one answer: a rank correlation over the models of a zoo. Other measures of the same
models, which cost less, stand beside it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ..common.words import many
from ..names import Names
from .associations import Pairing, associate
from .interpolate import STUDY as INTERPOLATION
from .interpolate import summarize
from .layers import MARGIN
from .layers import STUDY as LAYERS
from .layers import stragglers as find_stragglers
from .rows import COLUMNS, asked, check_table
from .saturation import flags

# Columns that distinguish one measurement of the models' sharpness from another.
SETTING = ["dataset", "rho", "on", "estimator"]
# Columns that must not vary within one of them, or their effect would be mixed with that of the models.
PROTOCOL = ["noise", "adaptive", "noise_batch", "normalized"]
COMPETITORS = ("minus clean loss", "ID accuracy", "bump", "distance")
"""Measures that need no perturbation: the loss of the unperturbed model on the images of the sharpness, with
the sign changed; accuracy in distribution; the bump there, the largest height of the path's loss above the
straight line between its ends; the Euclidean distance of the weights from zero-shot, without any images."""
_STUDIES = ["sharpness", "layer-sharpness"]


def correlation(
    rows: pd.DataFrame,
    stragglers: Names | None = None,
    margin: float = MARGIN,
    *,
    classes: Mapping[str, int] | None = None,
    groups: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Correlate sharpness with out-of-distribution accuracy and gain, by rank, over models.

    Sharpness is the general sharpness, that of one layer, or the mean over the straggler layers of each
    model. The outcome is the accuracy at the same alpha, or the gain (Eq. 2), on an out-of-distribution data
    set. Only models with both are correlated. The rows of :data:`COMPETITORS` correlate other measures of
    the same models.

    Tests are by permutation of the models (:func:`rft_fast.studies.permutation.max_t`): of all orders for up
    to 9 models, of 20,000 seeded ones for more. ``p_max`` is corrected for all rows of a family by the
    largest statistic of each permutation: the rows of one data set and outcome that are of general sharpness,
    of layer-wise sharpness (stragglers included), or of the competitors. Stragglers found on the same models
    still make their own row optimistic. Rows with a saturated sharpness are not tested and not in the family.

    Two models are tied in a sharpness if it differs by less than two standard errors of the difference: of
    that of their changes against zero-shot, which are paired over draws, where all rows have
    ``sharpness_change_se``, else of their own, taken as independent.

    The 95 % intervals are pointwise, for orientation. They are closed forms on Fisher's z = atanh(r): for
    Kendall's tau with the variance 0.437 / (n - 4) of Fieller, Hartley and Pearson (1957), for Spearman's rho
    with (1 + r^2 / 2) / (n - 3) of Bonett and Wright (2000). There is none (NaN) for n <= 4 models
    (Kendall) or n <= 3 (Spearman), where the variance is not defined, nor at r = 1 or -1.

    Args:
        rows: rows of the interpolation and of general or layer-wise sharpness, or both, of several models;
            rows of other studies are ignored.
        stragglers: the straggler layers; None: those that :func:`rft_fast.studies.stragglers` finds in any
            model, from rows of the layer-wise interpolation. Without any, the table has no such measure.
        margin: margin of that search, in nats.
        classes: data set -> number of classes that it is scored among, to decide which rows are saturated
            where they do not say so themselves.
        groups: model -> group, such as its recipe, for ``without_low`` and ``without_high``; None: each model
            is a group.

    Returns:
        One row per outcome, measure and alpha > 0:

        - ``dataset``, ``outcome``: the out-of-distribution data set, and *accuracy* or *gain* on it;
        - ``measure``: *general*, *stragglers*, *layer* or one of :data:`COMPETITORS`; ``layer``: its name
          (for stragglers joined by ", "); ``measured_on``: the data set of the measure (of a distance:
          missing); ``circular``: whether its images are those of the outcome, so that the loss of the same
          images stands on both sides;
        - ``alpha``, ``rho``, ``on``, ``estimator``, ``noise``, ``adaptive``, ``noise_batch``, ``normalized``
          and ``draws``, ``samples``, ``seed`` of the sharpness, the last three missing if they vary;
        - ``models``: number of models correlated; ``nonfinite``: number of those with a value that is not
          finite; ``saturated``: number of those whose sharpness is;
        - ``ties``: errors that decide on ties, *paired*, *unpaired* or *none*; ``tied``: number of tied
          pairs;
        - ``kendall`` (tau-b), ``kendall_low``, ``kendall_high``, ``spearman`` (without those ties),
          ``spearman_low``, ``spearman_high``: NaN with fewer than three models, with ``nonfinite`` above 0,
          or if either side is the same for all models; ``without_low``, ``without_high``: range of tau with
          one group left out; ``partial``: Kendall's partial tau given the clean loss on the same images;
        - ``p``, ``p_max``, ``tests`` (the number of rows of the family), and ``needed``: the smallest size of
          tau for which ``p_max`` would be at most 0.05, NaN if there is none. Missing if the row is not
          tested.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no rows of an interpolation out of distribution or of a sharpness;
            :func:`rft_fast.studies.summarize` refuses a path; a sharpness mixes protocols, was measured
            twice, or is missing at some layer or alpha of a model; the sharpness of a straggler was not
            measured; no row has three models.
    """
    check_table(rows, "correlation")
    rows = _rounded(rows)
    return correlate(
        rows,
        lambda: summarize(_ood(rows)),
        lambda: find_stragglers(rows, margin),
        stragglers,
        classes or {},
        groups,
    )


def correlate(
    rows: pd.DataFrame,
    path: Callable[[], pd.DataFrame],
    unstable: Callable[[], pd.DataFrame],
    stragglers: Names | None = None,
    classes: Mapping[str, int] | None = None,
    groups: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Make the table of :func:`correlation` from analyses that exist already.

    Args:
        rows: as for :func:`correlation`.
        path: returns :func:`rft_fast.studies.summarize` of the rows, at least of those out of distribution.
        unstable: returns :func:`rft_fast.studies.stragglers`; called if there are rows of the layer-wise
            interpolation and ``stragglers`` is None.
        stragglers, classes, groups: as for :func:`correlation`.
    """
    rows = _rounded(rows)
    outcomes = list(_outcomes(rows, path))
    measures = list(_measures(rows, stragglers, unstable, classes or {}))
    measures += _competitors(rows, measures)
    pairings = [
        pairing
        for measure in measures
        for dataset, outcome, y in outcomes
        for pairing in _pairings(measure, dataset, outcome, y)
    ]
    table = pd.DataFrame(associate(pairings, groups))
    if (table["models"] < 3).all():
        raise ValueError(
            f"correlation: expected at least 3 models with both interpolation and sharpness, got "
            f"{table['models'].max()}; interpolation: {_names(rows, [INTERPOLATION])}; "
            f"sharpness: {_names(rows, _STUDIES)}"
        )
    return table[_COLUMNS].astype(_TYPES)


_COLUMNS = (
    "dataset outcome measured_on circular measure layer alpha rho on estimator noise adaptive noise_batch "
    "normalized draws samples seed models nonfinite saturated ties tied "
    "kendall kendall_low kendall_high without_low without_high p p_max tests needed partial "
    "spearman spearman_low spearman_high"
).split()
_TYPES = {
    name: COLUMNS[name] for name in _COLUMNS if name in COLUMNS and name not in ("nonfinite", "saturated")
}
_TYPES |= dict.fromkeys(["outcome", "measured_on", "measure", "ties"], "string") | {
    "circular": "boolean",
    "tests": "Int64",
}


@dataclass(frozen=True)
class _Measure:
    """A measure of the models.

    Attributes:
        stated: the columns that identify it.
        family: what it is corrected together with.
        values: models by alphas.
        errors: standard errors that decide on ties, likewise; None: none.
        clean: loss of the unperturbed models in nats, likewise; None: unknown.
        saturated: which values are saturated, likewise; None: none.
    """

    stated: Mapping[str, Any]
    family: str
    values: pd.DataFrame
    errors: pd.DataFrame | None = None
    clean: pd.DataFrame | None = None
    saturated: pd.DataFrame | None = None


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
    rows: pd.DataFrame,
    stragglers: Names | None,
    unstable: Callable[[], pd.DataFrame],
    classes: Mapping[str, int],
) -> Iterator[_Measure]:
    """Yield each measure of sharpness."""
    measured = rows[rows["study"].isin(_STUDIES) & (rows["alpha"] > 0)]
    if measured.empty:
        raise ValueError(f"correlation: expected rows of the study {' or '.join(_STUDIES)}, got none")
    names = _straggler_layers(rows, measured["layer"].dropna().unique(), stragglers, unstable)
    measured = measured.assign(saturated=flags(measured, classes).fillna(False).astype(bool))
    for (dataset, *setting), group in measured.groupby([*SETTING, "study"], sort=False, dropna=False):
        _check(group, f"correlation: {setting.pop()} on {dataset!r} at rho={setting[0]:g}")
        paired = "sharpness_change_se" in group and bool(group["sharpness_change_se"].notna().all())
        known = paired or bool(group["sharpness_se"].notna().any())
        stated = {
            "measured_on": dataset,
            **dict(zip(SETTING[1:], setting, strict=True)),
            **{name: _common(group[name]) for name in (*PROTOCOL, "draws", "samples", "seed")},
            "ties": "paired" if paired else "unpaired" if known else "none",
        }
        error = "sharpness_change_se" if paired else "sharpness_se"
        layers = {
            layer: _measure(part, {**stated, "measure": "layer", "layer": layer}, "layers", error)
            for layer, part in group.groupby("layer", sort=False, dropna=False)
        }
        if group["layer"].isna().all():
            (general,) = layers.values()
            yield replace(general, stated={**stated, "measure": "general", "layer": None}, family="general")
            continue
        if names:
            if missing := [name for name in names if name not in layers]:
                raise ValueError(
                    f"correlation: the layer-wise sharpness on {dataset!r} has no rows of the stragglers "
                    f"{missing}; measure them as well, or name the stragglers"
                )
            own = {**stated, "measure": "stragglers", "layer": ", ".join(names)}
            yield _mean([layers[name] for name in names], own)
        yield from layers.values()


def _measure(rows: pd.DataFrame, stated: Mapping[str, Any], family: str, error: str) -> _Measure:
    """The measure of one row per model and alpha."""
    rows = rows.assign(clean=rows["loss"] - rows["sharpness"])
    values, errors, clean, saturated = (
        rows.pivot(index="model", columns="alpha", values=name)
        for name in ("sharpness", error, "clean", "saturated")
    )
    return _Measure(stated, family, values, errors, clean, saturated)


def _mean(measures: Sequence[_Measure], stated: Mapping[str, Any]) -> _Measure:
    """The mean of layers, whose noises are independent."""
    first, count = measures[0], len(measures)
    return replace(
        first,
        stated=stated,
        values=sum(each.values for each in measures) / count,
        errors=sum(each.errors**2 for each in measures if each.errors is not None) ** 0.5 / count,
        saturated=sum(each.saturated for each in measures if each.saturated is not None) > 0,
    )


def _competitors(rows: pd.DataFrame, measures: Sequence[_Measure]) -> Iterator[_Measure]:
    """Yield measures that need no perturbation, at the alphas of the sharpness."""
    alphas = sorted({alpha for measure in measures for alpha in measure.values})

    def made(
        name: str, dataset: object, values: pd.DataFrame, errors: pd.DataFrame | None = None
    ) -> _Measure:
        empty = dict.fromkeys(["layer", *SETTING[1:], *PROTOCOL, "draws", "samples", "seed"])
        ties = "none" if errors is None else "unpaired"
        return _Measure(
            {**empty, "measure": name, "measured_on": dataset, "ties": ties}, "competitors", values, errors
        )

    seen = set()
    for measure in measures:
        dataset = measure.stated["measured_on"]
        if dataset not in seen and measure.clean is not None and measure.clean.notna().to_numpy().any():
            seen.add(dataset)
            yield made(COMPETITORS[0], dataset, -measure.clean)
    paths = rows[rows["study"] == INTERPOLATION]
    near = paths[~paths["ood"].fillna(False).astype(bool)]
    for dataset, group in near.groupby("dataset", sort=False):
        found = group.pivot(index="model", columns="alpha", values="accuracy")
        yield made(COMPETITORS[1], dataset, found.reindex(columns=alphas).dropna(axis=1, how="all"))
    if "distance" in paths and paths["distance"].notna().any():
        each = paths.dropna(subset=["distance"]).drop_duplicates(["model", "alpha"])
        found = each.pivot(index="model", columns="alpha", values="distance")
        yield made(COMPETITORS[3], None, found.reindex(columns=alphas).dropna(axis=1, how="all"))
    if "bump" not in near:
        return
    for dataset, group in near.dropna(subset=["bump"]).groupby("dataset", sort=False):
        worst = group.loc[group.groupby("model", sort=False)["bump"].idxmax()].set_index("model")
        values, errors = (pd.DataFrame(dict.fromkeys(alphas, worst[name])) for name in ("bump", "bump_se"))
        yield made(COMPETITORS[2], dataset, values, errors)


def _pairings(measure: _Measure, dataset: str, outcome: str, y: Any) -> Iterator[Pairing]:
    """Yield the measure with an outcome at each alpha, over the models that have both."""
    models = measure.values.index.intersection(y.index)
    stated = {"dataset": dataset, "outcome": outcome, "circular": measure.stated["measured_on"] == dataset}
    for alpha in measure.values:
        own = models if y.ndim == 1 or alpha in y else models[:0]  # no accuracies there
        results = (y if y.ndim == 1 else y.get(alpha, pd.Series(dtype=float))).loc[own]
        values = measure.values.loc[own, alpha].to_numpy(dtype=float)
        errors, clean, saturated = (
            None if each is None else each.loc[own, alpha].to_numpy(dtype=float)
            for each in (measure.errors, measure.clean, measure.saturated)
        )
        yield Pairing(
            {**measure.stated, **stated, "alpha": alpha},
            (measure.family, dataset, outcome),
            tuple(own),
            values,
            results.to_numpy(dtype=float),
            errors,
            clean,
            0 if saturated is None else int(np.nansum(saturated)),
        )


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
        raise ValueError(f"{where}: measured more than once, such as {_say(counts.index[counts > 1][0])}")
    every = pd.MultiIndex.from_product([group[key].unique() for key in keys])
    if len(missing := every.difference(counts.index, sort=False)):
        of = f"of {len(every)} rows"
        raise ValueError(
            f"{where}: {many(len(missing), f'{of} is', f'{of} are')} missing, such as "
            f"{_say(missing[0])}; finish the run, or leave out the rows of models, layers or "
            "alphas that were not measured for all"
        )


def _say(key: tuple[str, Any, float]) -> str:
    model, layer, alpha = key
    return f"{model!r}{'' if pd.isna(layer) else f', {layer}'} at alpha={alpha:g}"


def _common(values: pd.Series) -> Any:
    """The value that all rows share, or None."""
    return values.iloc[0] if values.nunique(dropna=False) == 1 else None


def _names(rows: pd.DataFrame, studies: Sequence[str]) -> list[str]:
    return list(rows.loc[rows["study"].isin(studies), "model"].unique())
