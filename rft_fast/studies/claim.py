"""The paper's claim as a test: do models whose interpolation fails have more flat layers?

Algorithm 1 prunes layers with near-zero sharpness because models that fail are said to have them. That some
layer is near zero may hold for every model, so flat layers are counted, at several margins, and the
counts of models that fail are compared with those of models that gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..names import ZERO_MARGIN
from .associations import Pairing, associate
from .interpolate import summarize
from .rows import asked, check_table, of_study
from .saturation import flags
from .sharpness import LAYER_STUDY, student_t

At = Literal["best", "finetuned"]
FACTORS = (0.5, 1.0, 2.0, 5.0)  # margins in nats, as multiples of the margin of flat layers
SHARES = (0.003, 0.01)  # margins as shares of the sum over layers
SETTING = ["dataset", "rho", "on", "estimator", "noise", "adaptive", "noise_batch", "normalized"]
KEYS = ["dataset", "measured_on", *SETTING[1:], "at", "unit", "margin"]
_GROUPS = {"failure": 1.0, "gain": 0.0, "high gain": 0.0}  # of decided modes: whether the model fails


def claim(
    rows: pd.DataFrame, margin: float = ZERO_MARGIN, *, classes: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Count the flat layers of each model, at its best alpha and at alpha = 1, by several margins.

    A layer is flat at one alpha if the two-sided 95 % interval of its sharpness lies within a margin of zero:
    ``|S| + t * se < margin``, with Student's t over draws (the equivalence test of
    :func:`rft_fast.studies.near_zero` at that alpha).

    Args:
        rows: rows of the interpolation and of layer-wise sharpness of several models; others are ignored.
        margin: margin of a flat layer in nats, above 0; half, two and five times it are tried, too, and 0.3 %
            and 1 % of the sum over the layers.
        classes: data set -> number of classes that it is scored among, to decide which rows are saturated.

    Returns:
        One row per out-of-distribution data set, way of measuring, model, ``at`` and margin:

        - ``dataset``, ``model``, ``gain``, ``best_alpha`` and ``mode`` of :func:`rft_fast.studies.summarize`;
        - ``measured_on`` and the other columns of a way of measuring sharpness;
        - ``at``: *best* or *finetuned*; ``alpha``: the measured position nearest to ``best_alpha``, above 0
          if that is, or 1; ``by_definition``: true at alpha = 0, where noise on fine-tuned weights changes
          nothing, so that every sharpness is 0;
        - ``unit``: *nats* or *share*; ``margin``: in that unit; ``layers``: their number; ``flat``: that of
          flat ones; ``smallest``, ``smallest_layer``: the least sharpness, in nats, and its layer;
          ``total``: the sum; ``saturated``: number of layers whose sharpness is.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no rows of an interpolation out of distribution or of layer-wise sharpness, a
            model lacks layers that others have, or nothing was measured at alpha = 1.
    """
    check_table(rows, "claim")
    return count_flat(rows, lambda: summarize(rows), margin, classes or {})


def count_flat(
    rows: pd.DataFrame,
    path: Callable[[], pd.DataFrame],
    margin: float,
    classes: Mapping[str, int],
) -> pd.DataFrame:
    """Make the table of :func:`claim` from an analysis that exists already; path: returns that analysis."""
    if not margin > 0:
        raise ValueError(f"claim: expected a margin above 0 nats, got {margin}")
    measured = of_study(rows, LAYER_STUDY, "claim")
    measured = measured.assign(
        estimator=asked(measured),
        half=student_t(measured) * measured["sharpness_se"],
        saturated=flags(measured, classes).fillna(False).astype(bool),
    )
    far = path()
    far = far[far["ood"]]
    if far.empty:
        raise ValueError(
            "claim: expected rows of the study 'interpolation' on out-of-distribution data, got none"
        )
    margins = [("nats", factor * margin) for factor in FACTORS] + [("share", share) for share in SHARES]
    found = []
    for key, group in measured.groupby(SETTING, sort=False, dropna=False):
        names = dict(zip(["measured_on", *SETTING[1:]], key, strict=True))
        _check(group, f"claim: layer-sharpness on {key[0]!r} at rho={key[1]:g}")
        models = dict(list(group.groupby("model", sort=False)))
        for fact in far[far["model"].isin(list(models))].to_dict("records"):
            about = {name: fact[name] for name in ("dataset", "model", "gain", "best_alpha", "mode")}
            for at, place in _places(models[fact["model"]], fact["best_alpha"]):
                about["at"] = at
                for unit, size in margins:
                    found.append(
                        {
                            **about,
                            **names,
                            "unit": unit,
                            "margin": size,
                            **_count(place, unit, size),
                        }
                    )
    return pd.DataFrame(found)


def _check(group: pd.DataFrame, where: str) -> None:
    """Refuse models that have not all layers at all positions, or lack alpha = 1."""
    if not (group["alpha"] == 1).any():
        raise ValueError(
            f"{where}: expected alpha = 1 among the positions, got {sorted(group['alpha'].unique())}"
        )
    every = set(product(group["layer"].unique(), group["alpha"].unique()))
    for model, own in group.groupby("model", sort=False):
        if missing := every - set(zip(own["layer"], own["alpha"], strict=True)):
            layer, alpha = min(missing)
            raise ValueError(
                f"{where}: {model!r} lacks {len(missing)} of {len(every)} rows, such as {layer} at "
                f"alpha={alpha:g}; finish the run, or leave the model out"
            )


def _places(own: pd.DataFrame, best: float) -> Iterator[tuple[At, pd.DataFrame]]:
    """Yield the rows of one model at the two positions; the best one may not have been measured at all."""
    alphas = own["alpha"].unique()
    if best > 0:
        alphas = alphas[alphas > 0]
    nearest = min(alphas, key=lambda alpha: abs(alpha - best))
    if best > 0 or nearest == 0:
        yield "best", own[own["alpha"] == nearest]
    elif (own["on"] == "finetuned").all():  # not measured, but known
        yield "best", own[own["alpha"] == nearest].assign(alpha=0.0, sharpness=0.0, half=0.0, saturated=False)
    yield "finetuned", own[own["alpha"] == 1]


def _count(place: pd.DataFrame, unit: str, margin: float) -> dict[str, object]:
    """Count the flat layers of one model at one position."""
    values, half = (place[name].to_numpy(dtype=float, na_value=np.nan) for name in ("sharpness", "half"))
    exact = place["alpha"].iloc[0] == 0 and place["on"].iloc[0] == "finetuned"
    half = np.zeros_like(values) if exact else half
    total = float(values.sum())
    bound = margin if unit == "nats" else margin * total
    least = int(np.argmin(values))
    return {
        "alpha": float(place["alpha"].iloc[0]),
        "by_definition": exact,
        "layers": len(values),
        "flat": len(values) if exact else int((np.abs(values) + half < bound).sum()),
        "smallest": float(values[least]),
        "smallest_layer": place["layer"].iloc[least],
        "total": total,
        "saturated": int(place["saturated"].sum()),
    }


def claim_tests(table: pd.DataFrame) -> pd.DataFrame:
    """Compare the flat layers of models that fail with those of models that gain, by permutation.

    Kendall's tau-b with failure (1 for models of the mode *failure*, 0 for those of *gain* and *high gain*;
    the undecided are left out) is the rank test of two groups; that with the gain uses all models. Tests are
    corrected by max-T (:func:`rft_fast.studies.permutation.max_t`) for all margins, measures and ways of
    measuring of one data set, outcome and ``at``. Models whose sharpness is 0 by definition are left out.

    Args:
        table: the result of :func:`claim`.

    Returns:
        One row per data set, way of measuring, ``at``, ``measure`` (*flat layers* at a margin, or *smallest
        sharpness*) and ``outcome`` (*failure* or *gain*): ``models``, ``failing`` (those that fail),
        ``mean_failing``, ``mean_gaining`` (of the measure), ``defined`` (number of models left out), and
        ``kendall``, ``without_low``, ``without_high``, ``p``, ``p_max``, ``tests``, ``needed`` as in
        :func:`rft_fast.studies.correlation`. Shares of a sum with saturated layers are not tested.
    """
    pairings: list[Pairing] = []
    for key, group in table.groupby(KEYS, sort=False, dropna=False):
        stated = dict(zip(KEYS, key, strict=True))
        used = group[~group["by_definition"]]
        left_out = len(group) - len(used)
        measures = [("flat layers", "flat", used["saturated"] * (stated["unit"] == "share"))]
        if (stated["unit"], stated["margin"]) == tuple(table[["unit", "margin"]].iloc[0]):
            measures.append(("smallest sharpness", "smallest", used["saturated"] * 0))
        for (measure, column, saturated), outcome in product(measures, ("failure", "gain")):
            own = {**stated, "measure": measure, "outcome": outcome, "defined": left_out}
            if measure != "flat layers":
                own |= {"unit": None, "margin": None}
            pairings.append(_pairing(used, own, column, saturated))
    return pd.DataFrame(associate(pairings))[_COLUMNS].astype({"tests": "Int64"})


_COLUMNS = [
    *KEYS[:-2], "measure", "unit", "margin", "outcome", "models", "failing", "defined", "mean_failing",
    "mean_gaining", "saturated", "tied", "kendall", "without_low", "without_high", "p", "p_max", "tests",
    "needed",
]  # fmt: skip


def joined(table: pd.DataFrame, tests: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of :func:`claim` with the tests of their margin, as ``p_max_failure``."""
    number = table.groupby(KEYS, sort=False, dropna=False).ngroup()
    counts = tests[tests["measure"] == "flat layers"]
    return table.assign(
        **{
            f"{name}_{outcome}": own[name].to_numpy()[number]
            for outcome, own in counts.groupby("outcome")
            for name in ("kendall", "p", "p_max")
        }
    )


def _pairing(used: pd.DataFrame, stated: Mapping[str, Any], column: str, saturated: Sequence[int]) -> Pairing:
    """Compare one measure with failure or gain, over the models that have both."""
    fails = used["mode"].map(_GROUPS).to_numpy(dtype=float, na_value=np.nan)
    values = used[column].to_numpy(dtype=float)
    means = {
        name: float(values[fails == group].mean()) if (fails == group).any() else np.nan
        for name, group in (("mean_failing", 1), ("mean_gaining", 0))
    }
    outcome = fails if stated["outcome"] == "failure" else used["gain"].to_numpy(dtype=float)
    known = ~np.isnan(outcome)
    return Pairing(
        {**stated, "failing": int((fails == 1).sum()), **means},
        (stated["dataset"], stated["at"], stated["outcome"]),
        tuple(used["model"][known]),
        values[known],
        outcome[known],
        saturated=int((np.asarray(saturated)[known] > 0).sum()),
    )
