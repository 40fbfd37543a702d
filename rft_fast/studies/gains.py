"""Gains of the paths in rows: bounds by position, and the position that accuracy in distribution chooses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..common.numeric import check_alphas
from .bands import FOLDS, best, bonferroni, held_out, simultaneous
from .images import check_images
from .rows import check_table
from .verdicts import mode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .images import ImageResults, Images

STUDY = "interpolation"
MAX_T, BONFERRONI = "max-t", "bonferroni"


def gain_bounds(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Bound A(alpha) - A(0) at all positions of each path at once.

    Lower bounds hold for all positions of a path at once with 95 % probability, and so do upper ones: by
    max-T with the correlations of the paired differences (:func:`rft_fast.studies.bands.simultaneous`) where
    results of single images are at hand, and corrected by Bonferroni where they are not.

    Args:
        rows: rows of :func:`rft_fast.studies.interpolation`; rows of other studies are ignored.
        images: results of single images of these rows; None: there are none.

    Returns:
        ``model``, ``dataset``, ``alpha``, ``gain``, ``gain_low``, ``gain_high``, ``critical`` (number of
        standard errors from a gain to its bounds) and ``method`` (max-t or bonferroni), a row for each of
        these rows, path by path in ascending order of alpha. Bounds are exactly 0 at alpha = 0, and NaN
        elsewhere for a single image.

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``images`` is not what gives results.
        ValueError: :func:`rft_fast.studies.check_alphas` refuses the positions of a path, or ``images`` are
            of other positions or another number of images than the rows.
    """
    check_table(rows, "gain_bounds")
    check_images(images, "gain_bounds")
    rows = rows[rows["study"] == STUDY].sort_values("alpha", kind="stable")
    found = []
    for (model, dataset), curve in rows.groupby(["model", "dataset"], sort=False):
        check_path(model, dataset, curve)
        hits = hits_of(curve, images)
        if hits is not None:
            bounds, method = simultaneous(hits), MAX_T
        else:
            gain, error = (curve[name].to_numpy() for name in ("gain", "gain_se"))
            bounds, method = bonferroni(gain, error, int(curve["samples"].iloc[0])), BONFERRONI
        found.append(
            pd.DataFrame(
                {
                    "model": model,
                    "dataset": dataset,
                    "alpha": curve["alpha"].to_numpy(),
                    "gain": bounds.gain,
                    "gain_low": bounds.low,
                    "gain_high": bounds.high,
                    "critical": bounds.critical,
                    "method": method,
                }
            )
        )
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=_COLUMNS)


_COLUMNS = ["model", "dataset", "alpha", "gain", "gain_low", "gain_high", "critical", "method"]


def check_path(model: object, dataset: object, curve: pd.DataFrame) -> None:
    """Check the positions of a path.

    Raises:
        ValueError: :func:`rft_fast.studies.check_alphas` refuses them.
    """
    try:
        check_alphas(curve["alpha"])
    except ValueError as error:
        raise ValueError(f"interpolation: {str(model)!r} on {str(dataset)!r}: {error}") from None


def hits_of(curve: pd.DataFrame, images: Images | None) -> NDArray[np.bool_] | None:
    """Return the hits of one path's images, [positions, n] by ascending alpha; None if they were not kept.

    Raises:
        ValueError: As :func:`results_of` does.
    """
    results = results_of(curve, images, "gain_bounds")
    return None if results is None else results.hits


def results_of(curve: pd.DataFrame, images: Images | None, caller: str) -> ImageResults | None:
    """Return the results of one path's images, by ascending alpha; None if they were not kept.

    Args:
        curve: The rows of the path.
        images: Gives the results; None: there are none.
        caller: Named in the error.

    Raises:
        ValueError: They are of other positions or another number of images than the rows.
    """
    if images is None:
        return None
    model, dataset = str(curve["model"].iloc[0]), str(curve["dataset"].iloc[0])
    results = images.of(str(curve["study"].iloc[0]), model, dataset)
    if results is None:
        return None
    alphas, samples = curve["alpha"].to_numpy(), int(curve["samples"].iloc[0])
    order = np.argsort(results.alphas, kind="stable")
    if not np.array_equal(results.alphas[order], np.sort(alphas)) or results.hits.shape[1] != samples:
        raise ValueError(
            f"{caller}: expected results of {samples} images at the positions of {model!r} on "
            f"{dataset!r}, {alphas.tolist()}, got those of {results.hits.shape[1]} at "
            f"{results.alphas.tolist()}"
        )
    return results.ordered(order)


def hits_in_order(own: pd.DataFrame, images: Images | None, caller: str) -> NDArray[np.float64] | None:
    """Return the hits of all rows of a study of a model on a data set, in their order; None: not kept.

    Args:
        own: The rows.
        images: Gives the results; None: there are none.
        caller: Named in the error.

    Raises:
        ValueError: They are of other positions or another number of images than the rows.
    """
    first = own.iloc[0]
    study, model, dataset = (str(first[name]) for name in ("study", "model", "dataset"))
    kept = None if images is None else images.of(study, model, dataset)
    if kept is None:
        return None
    if kept.alphas.tolist() != own["alpha"].tolist() or kept.hits.shape[1] != first["samples"]:
        raise ValueError(
            f"{caller}: expected results of {first['samples']} images of the {len(own)} rows of "
            f"{model!r} on {dataset!r}, got those of {kept.hits.shape[1]} images of {len(kept.hits)} rows"
        )
    return kept.hits.astype(np.float64)


def id_alphas(rows: pd.DataFrame) -> pd.Series:
    """Choose alpha for each model by its mean accuracy on in-distribution data.

    Args:
        rows: rows of :func:`rft_fast.studies.interpolation`; rows of other studies are ignored.

    Returns:
        The position of highest mean accuracy over the in-distribution data sets, the smallest of equal ones,
        indexed by model.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no such rows of in-distribution data.
    """
    check_table(rows, "id_alphas")
    near = rows[(rows["study"] == STUDY) & ~rows["ood"].fillna(False).astype(bool)]
    if near.empty:
        raise ValueError(
            "id_alphas: expected rows of the interpolation on in-distribution data, to choose "
            "alpha, got none; measure an in-distribution set, too (--id-data)"
        )
    means = near.groupby(["model", "alpha"])["accuracy"].mean()
    chosen = {model: own.index.get_level_values("alpha")[best(own)] for model, own in means.groupby("model")}
    return pd.Series(chosen, dtype=float)


def of_path(
    curve: pd.DataFrame,
    bounds: pd.DataFrame,
    hits: NDArray[np.bool_] | None,
    chosen: float | None,
    xi: float,
) -> dict[str, Any]:
    """Summarize the gain of one path.

    Args:
        curve: its rows, by ascending alpha.
        bounds: its rows of :func:`gain_bounds`.
        hits: its hits, as :func:`hits_of` returns them; None: not known.
        chosen: the position that in-distribution accuracy chooses; None: not known.
        xi: gain that counts as high, a fraction.
    """
    moved = bounds[bounds["alpha"] > 0]
    at = best(bounds["gain"])
    ood = bool(curve["ood"].iloc[0])
    observed = float(bounds["gain"].iloc[at])
    fact: dict[str, Any] = {
        "gain": observed,
        "gain_se": float(curve["gain_se"].iloc[at]),
        "best_alpha": float(bounds["alpha"].iloc[at]),
        "gain_low": _largest(moved["gain_low"]),
        "gain_high": _largest(moved["gain_high"]),
        "gain_shown": float(moved.loc[moved["gain_low"] > 0, "gain"].max(skipna=True)),
        "gain_method": bounds["method"].iloc[0],
        "gain_critical": float(bounds["critical"].iloc[0]),
        "gain_held_out": math.nan,
        "gain_held_out_se": math.nan,
        "id_alpha": math.nan,
        "gain_id_alpha": math.nan,
        "gain_id_alpha_se": math.nan,
        "xi": xi,
    }
    if math.isnan(fact["gain_shown"]):
        fact["gain_shown"] = 0.0
    if hits is not None and hits.shape[1] >= FOLDS:
        fact["gain_held_out"], fact["gain_held_out_se"] = held_out(hits)
    if ood and chosen is not None:
        fact["id_alpha"] = chosen
        for row in curve[curve["alpha"] == chosen].to_dict("records"):
            fact |= {"gain_id_alpha": row["gain"], "gain_id_alpha_se": row["gain_se"]}
    fact["mode"] = mode(fact) if ood else None
    fact["mode_observed"] = _observed(observed, xi) if ood else None
    return fact


def _largest(values: pd.Series) -> float:
    """Return the largest value; NaN if one is."""
    return float(values.max(skipna=False))


def _observed(gain: float, xi: float) -> str:
    """Return the mode by the paper's definition: of the observed gain alone."""
    return "failure" if gain <= 0 else "high gain" if gain >= xi else "gain"
