"""The alpha that people would choose without labels from elsewhere, and the accuracy that each choice costs.

The best position of a path is known only with labels of the out-of-distribution (OOD) images. Each rule
below chooses one without them; its regret is the accuracy at the best position minus that at the chosen one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .bands import FOLDS, best, dealt
from .gains import STUDY, check_path, results_of
from .images import check_images
from .rows import check_table
from .verdicts import half_width, two_way_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .images import Images

RULES = {
    "ID accuracy": "highest mean accuracy in distribution",
    "ID loss": "lowest mean loss in distribution",
    "ID bump": "loss in distribution furthest below the straight line between its ends",
    "agreement": "predictions on the OOD images that agree about equally with those of both ends",
    "confidence": "lowest mean entropy of the predictions on the OOD images",
    "alpha 0.5": "the position nearest to 0.5",
    "fine-tuned": "alpha = 1",
    "zero-shot": "alpha = 0",
}
"""Name of a rule -> the position that it chooses, the smallest of equal ones."""


def choice(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Choose alpha for each model by each of :data:`RULES`, and measure the regret of the choice.

    The regret of rule r on n OOD images is the mean of ``hit(best, i) - hit(chosen by r, i)``. The best
    position is cross-fitted: for the images of each of five folds it is the one of highest accuracy on the
    other four folds, so it is not chosen by chance on the images that it is measured on, and a regret may be
    below 0. Without results of single images, the best position is that of the highest accuracy, which makes
    every regret too large, and nothing is known of its error.

    Args:
        rows: rows of :func:`rft_fast.studies.interpolation`, also on in-distribution data; others are
            ignored.
        images: results of single images of these rows; None: there are none, and the rule *agreement*, which
            needs predictions, is left out. So is *confidence* where some rows of a path are of a
            version without entropies.

    Returns:
        One row per OOD data set, model and rule:

        - ``dataset``, ``model``, ``rule``;
        - ``alpha``: the chosen position; ``best_alpha``: that of highest accuracy;
        - ``accuracy``: at ``alpha``, a fraction; ``gain``: minus that at alpha = 0;
        - ``regret``, ``regret_se``: a fraction, and its standard error over images; ``cross_fitted``: whether
          the best position is; ``samples``.

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``images`` is not what gives results.
        ValueError: there are no rows on OOD data or none on in-distribution data, or
            :func:`rft_fast.studies.check_alphas` refuses the positions of a path.
    """
    return pd.DataFrame([fact for fact, _ in _paths(rows, images)])


def choice_means(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Average the regrets of :func:`choice` over the models.

    The 95 % intervals are by Student's t with one degree of freedom less than there are models. The variance
    of a mean counts that the models are a sample, and that they share their images: it is the variance over
    models plus that over images minus that over both (two-way clusters; Cameron, Gelbach and Miller, 2011),
    and at least the larger of the first two. Intervals of differences between rules are
    Bonferroni-corrected for all of these on a data set.

    Args:
        rows, images: as for :func:`choice`.

    Returns:
        One row per OOD data set and rule: ``dataset``, ``rule``, ``models``, ``regret`` (the mean),
        ``regret_se``, ``regret_low``, ``regret_high``, ``largest`` (the largest regret of a model) and
        ``beyond_id`` with ``beyond_id_low`` and ``beyond_id_high``: the mean of the regret minus that of *ID
        accuracy*. Errors and bounds are NaN for one model, and where no results of single images are known;
        bounds also where all regrets or differences are equal, which is no certainty.

    Raises:
        TypeError, ValueError: as :func:`choice` does.
    """
    regrets: dict[tuple[str, str], dict[str, NDArray[np.float64] | None]] = {}
    means: dict[tuple[str, str], dict[str, float]] = {}
    for fact, regret in _paths(rows, images):
        key = fact["dataset"], fact["rule"]
        regrets.setdefault(key, {})[fact["model"]] = regret
        means.setdefault(key, {})[fact["model"]] = fact["regret"]
    found = []
    for (dataset, rule), by_model in means.items():
        values, baseline = list(by_model.values()), regrets[dataset, "ID accuracy"]
        known = _table([*regrets[dataset, rule].values()])
        usual = _table([baseline[model] for model in by_model])  # a rule may not know all models
        paired = None if known is None or usual is None or known.shape != usual.shape else known - usual
        mean, error, low, high = _interval(values, known)
        differences = [value - means[dataset, "ID accuracy"][model] for model, value in by_model.items()]
        others = sum(where == dataset and name != "ID accuracy" for where, name in means)
        beyond = _interval(differences, paired, others)
        found.append(
            {
                "dataset": dataset,
                "rule": rule,
                "models": len(values),
                "regret": mean,
                "regret_se": error,
                "regret_low": low,
                "regret_high": high,
                "largest": max(values),
                "beyond_id": beyond[0],
                "beyond_id_low": beyond[2],
                "beyond_id_high": beyond[3],
            }
        )
    return pd.DataFrame(found)


def _paths(
    rows: pd.DataFrame, images: Images | None
) -> Iterator[tuple[dict[str, Any], NDArray[np.float64] | None]]:
    """Yield a row of :func:`choice`, and its regret image by image, [n]; None: not known."""
    check_table(rows, "choice")
    check_images(images, "choice")
    rows = rows[rows["study"] == STUDY].sort_values("alpha", kind="stable")
    far = rows["ood"].fillna(False).astype(bool)
    for which, there, option in (("out-of", far, "--data"), ("in", ~far, "--id-data")):
        if not there.any():
            raise ValueError(
                f"choice: expected rows of the interpolation on {which}-distribution data, got none; "
                f"measure such a data set, too ({option})"
            )
    near = {model: _by_id(own) for model, own in rows[~far].groupby("model", sort=False)}
    for (dataset, model), curve in rows[far].groupby(["dataset", "model"], sort=False):
        check_path(model, dataset, curve)
        if model not in near:
            raise ValueError(f"choice: {str(model)!r} has no rows on in-distribution data; measure them, too")
        yield from _rules(curve, near[model], images)


def _by_id(own: pd.DataFrame) -> dict[str, float]:
    """Return the positions that the data in distribution choose for one model."""
    values = own[["accuracy", "loss", "bump"]].fillna(math.inf)  # a loss that is NaN on one data set
    means = values.groupby(own["alpha"]).mean()
    alphas = means.index.to_numpy()
    return {
        "ID accuracy": float(alphas[best(means["accuracy"])]),
        "ID loss": float(alphas[best(-means["loss"])]),
        "ID bump": float(alphas[best(-means["bump"])]),
    }


def _rules(
    curve: pd.DataFrame, by_id: Mapping[str, float], images: Images | None
) -> Iterator[tuple[dict[str, Any], NDArray[np.float64] | None]]:
    alphas, accuracy = curve["alpha"].to_numpy(dtype=float), curve["accuracy"].to_numpy(dtype=float)
    known = results_of(curve, images, "choice")
    chosen = dict(by_id)
    if known is not None and (predictions := known.predictions) is not None:
        agreement = np.minimum(*((predictions == predictions[end]).mean(axis=1) for end in (0, -1)))
        chosen["agreement"] = float(alphas[best(agreement)])
    unknown = curve["entropy"].isna() & np.isfinite(curve["loss"])  # otherwise the logits are not numbers
    if curve["entropy"].notna().any() and not unknown.any():
        chosen["confidence"] = float(alphas[best(-curve["entropy"].fillna(math.inf))])
    chosen["alpha 0.5"] = float(alphas[int(np.argmin(np.abs(alphas - 0.5)))])
    chosen |= {"fine-tuned": 1.0, "zero-shot": 0.0}
    top = None
    if known is not None and known.hits.shape[1] >= FOLDS:
        top = cross_fitted(known.hits)
    for rule in (rule for rule in RULES if rule in chosen):
        if chosen[rule] not in alphas:
            model, dataset = curve["model"].iloc[0], curve["dataset"].iloc[0]
            raise ValueError(
                f"choice: {str(model)!r} was measured in distribution at alpha = {chosen[rule]:g}, but "
                f"not on {str(dataset)!r}; measure both at the same positions"
            )
        at = int(np.flatnonzero(alphas == chosen[rule])[0])
        regret = None if known is None or top is None else top - known.hits[at]
        yield (
            {
                "dataset": str(curve["dataset"].iloc[0]),
                "model": str(curve["model"].iloc[0]),
                "rule": rule,
                "alpha": chosen[rule],
                "best_alpha": float(alphas[best(accuracy)]),
                "accuracy": float(accuracy[at]),
                "gain": float(accuracy[at] - accuracy[0]),
                "regret": float(accuracy.max() - accuracy[at] if regret is None else regret.mean()),
                "regret_se": math.nan if regret is None else _error(regret),
                "cross_fitted": regret is not None,
                "samples": int(curve["samples"].iloc[0]),
            },
            regret,
        )


def cross_fitted(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the hits at the best position of each image, which the image itself has no part in.

    Args:
        hits: Whether each image is classified correctly, [positions, n], n at least the number of folds.

    Returns:
        float64 [n]: of each image at the position of highest accuracy on the folds without it.
    """
    fold, table = dealt(hits.shape[1]), hits.astype(np.float64)
    total, found = table.sum(axis=1), np.empty(hits.shape[1])
    for number in range(FOLDS):
        own = fold == number
        found[own] = table[best(total - table[:, own].sum(axis=1)), own]
    return found


def _error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _table(regrets: list[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    """Return regrets as [models, images]; None if some are not known, or of other images."""
    known = [each for each in regrets if each is not None]
    return np.stack(known) if len(known) == len(regrets) and len({*map(len, known)}) == 1 else None


def _interval(
    values: list[float], table: NDArray[np.float64] | None, tests: int = 1
) -> tuple[float, float, float, float]:
    """Return mean, standard error and bounds of some models' means, corrected for a number of intervals."""
    mean, models = float(np.mean(values)), len(values)
    if table is None or models < 2 or table.shape[1] < 2:
        return mean, math.nan, math.nan, math.nan
    error = two_way_error(table)
    half = half_width(error, models - 1, tests)
    return mean, error, mean - half, mean + half
