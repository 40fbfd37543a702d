"""Paths between two fine-tuned models: bumps in the loss, and the gain over the better model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .bands import FOLDS, best, dealt
from .gains import check_path, hits_in_order
from .images import Images, Kept, check_images
from .interpolate import along, check_alphas, check_evaluator, lower_end
from .others import Others, State, end
from .rows import Measured, Sink, of_study
from .verdicts import interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "pairs"
KEYS = ["model", "partners", "dataset"]


def pairs(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    others: Others | Mapping[str, State],
    names: Iterable[str] | None = None,
    *,
    model: str = "",
    finetuned: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure the paths from the fine-tuned end of a path to other models, on every data set.

    Beside the two ends of ``path`` and the live model, one other model is in memory at a time. On return, and
    on any error, the live model is restored bit for bit.

    Args:
        path, evaluator, alphas, model, sink, images: as for :func:`rft_fast.studies.interpolation`.
        others: name -> state dict of another model, with the names and shapes of the live model.
        names: the models to measure the path to; None: all of ``others`` but ``model``.
        finetuned: scores at the fine-tuned end of ``path`` by data set, if known; missing ones are measured
            and added.
        only: numbers of the measurements to make; None: all. For each other model, they are numbered as those
            of :func:`rft_fast.studies.interpolation`.

    Returns:
        One row per (other model, alpha, data set), with the columns of :data:`rft_fast.studies.COLUMNS`.
        ``partners`` is the other model, which is at alpha = 1; at alpha = 0 is ``model``. Differences are
        relative to these two ends.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: as for :func:`rft_fast.studies.interpolation`; a name is unknown or stands there twice; or
            a model does not fit the live one.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    known = others if isinstance(others, Others) else Others(others)
    names = [name for name in known.names if name != model] if names is None else list(names)
    known.check(names, STUDY)
    finetuned = {} if finetuned is None else finetuned
    size = len(grid) * len(evaluator.datasets)
    record = Measured(STUDY, len(names) * size, only, sink, images)
    for place, name in enumerate(names):
        first = place * size
        if any(map(record.wants, range(first, first + size))):
            common = {"study": STUDY, "model": model, "partners": name}
            with known.between(path, end(path, 1), known.state(name)) as other:
                along(record, first, other, evaluator, grid, finetuned, {}, common)
    return record.frame()


def pair_effects(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Summarize each path between two fine-tuned models.

    Intervals are of 95 %, paired over images, by Student's t, and Bonferroni-corrected for all pairs of a
    data set; they are missing without results of single images, and where no image differs, which is no
    certainty.

    Args:
        rows: rows of :func:`pairs`; others are ignored.
        images: results of single images of these rows; None: there are none.

    Returns:
        One row per (model, other model, data set):

        - ``model``, ``partner``, ``dataset``, ``ood``; ``accuracy_model``, ``accuracy_partner``: of the ends;
        - ``gain``: max over alpha of A(alpha), minus the larger accuracy of the two ends, and ``gain_alpha``;
          optimistic, since both are chosen on the same images;
        - ``gain_held_out``, ``gain_held_out_se``: the same with position and better end chosen on four fifths
          of the images and measured on the others (five folds), with ``gain_held_out_low`` and ``_high``;
        - ``middle``: the position nearest to 0.5, and ``above_line``: A(middle) minus the straight line
          between the accuracies of the ends, with ``above_line_se``, ``above_line_low``, ``above_line_high``;
        - ``bump``, the barrier of linear mode connectivity (Frankle et al. 2020): max over alpha of L(alpha)
          - [(1 - alpha) L(0) + alpha L(1)], in nats, with ``bump_se``, ``bump_alpha`` and ``bump_low``, the
          lower end of a one-sided 95 % interval, corrected for the positions between the ends, too;
        - ``samples``, ``alphas``: the number of positions.

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``images`` is not what gives results.
        ValueError: there are no rows of the study, a path has no position between its ends, or
            :func:`rft_fast.studies.check_alphas` refuses its positions.
    """
    check_images(images, "pair_effects")
    rows = of_study(rows, STUDY, "pair_effects").reset_index(drop=True)
    tests = rows.drop_duplicates(KEYS)["dataset"].value_counts()
    found = []
    for (model, dataset), own in rows.groupby(["model", "dataset"], sort=False):
        hits = hits_in_order(own, images, "pair_effects")
        for partner, curve in own.groupby("partners", sort=False):
            check_path(f"{model} to {partner}", dataset, curve)
            table = None if hits is None else hits[own.index.get_indexer(curve.index)]
            order = np.argsort(curve["alpha"].to_numpy(), kind="stable")
            curve, table = curve.iloc[order], None if table is None else table[order]
            fact = {"model": str(model), "partner": str(partner), "dataset": str(dataset)}
            found.append(fact | _path(curve, table, int(tests[dataset])))
    return pd.DataFrame(found)


def _path(curve: pd.DataFrame, hits: NDArray[np.float64] | None, tests: int) -> dict[str, Any]:
    """Summarize one path.

    Args:
        curve: its rows, by ascending alpha.
        hits: its hits, likewise, [positions, n]; None: not known.
        tests: number of pairs to correct for.
    """
    alphas, accuracy = curve["alpha"].to_numpy(dtype=float), curve["accuracy"].to_numpy(dtype=float)
    first, inner, samples = curve.iloc[0], curve.iloc[1:-1], int(curve["samples"].iloc[0])
    if inner.empty:
        raise ValueError(
            f"pair_effects: the path from {first['model']!r} to {first['partners']!r} has no position "
            "between its ends; measure some, such as 0.5"
        )
    over = None if hits is None or samples < FOLDS else _over_better_end(hits)
    at = 1 + int(np.argmin(np.abs(alphas[1:-1] - 0.5)))
    line = np.array([1 - alphas[at], alphas[at]])
    above = None if hits is None else np.round(hits[at] - line @ hits[[0, -1]], 12)  # 0 where nothing differs
    bump = curve["bump"].to_numpy(dtype=float)
    top = int(np.argmax(bump))  # unlike max, argmax finds a NaN
    return {
        "ood": bool(first["ood"]),
        "accuracy_model": accuracy[0],
        "accuracy_partner": accuracy[-1],
        "gain": accuracy.max() - max(accuracy[0], accuracy[-1]),
        "gain_alpha": alphas[best(accuracy)],
        **interval("gain_held_out", over, tests),
        "middle": alphas[at],
        **interval("above_line", above, tests),
        "above_line": float(accuracy[at] - line @ accuracy[[0, -1]]),
        "bump": bump[top],
        "bump_se": float(curve["bump_se"].iloc[top]),
        "bump_alpha": alphas[top],
        "bump_low": lower_end(inner, "bump", len(inner) * tests),
        "samples": samples,
        "alphas": len(alphas),
    }


def _over_better_end(hits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each image the hit at the best position minus that at the better end, chosen without it."""
    fold, total, found = dealt(hits.shape[1]), hits.sum(axis=1), np.empty(hits.shape[1])
    for number in range(FOLDS):
        own = fold == number
        rest = total - hits[:, own].sum(axis=1)
        better = 0 if rest[0] >= rest[-1] else -1
        found[own] = hits[best(rest), own] - hits[better, own]
    return found
