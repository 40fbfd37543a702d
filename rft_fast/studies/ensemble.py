"""Ensembles of the logits of the two ends: the control of averaging weights.

At each alpha, ``(1 - alpha) z_0 + alpha z_1`` with the logits z of the zero-shot and of the fine-tuned model.
An ensemble runs two models; a model on the path is one. Where both have the same accuracy, the path gains no
more than averaging what the two models say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .gains import STUDY as PATH
from .gains import check_path, results_of
from .images import Images, Kept, check_images
from .interpolate import check_alphas, check_evaluator
from .rows import Measured, Sink, of_study, scored
from .verdicts import half_width

if TYPE_CHECKING:
    from ..evaluate import Evaluator
    from ..path import Path

STUDY = "ensemble"


def ensemble(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    *,
    model: str = "",
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure ensembles of the logits of the two ends of a path.

    Each end runs once for all positions. The logits of the zero-shot end are held for all images of a data
    set, in float32. On return, and on any error, the live model is restored bit for bit.

    Args:
        path: the live model between its two ends.
        evaluator: scores the live model of ``path`` on one or more data sets.
        alphas: shares of the fine-tuned model in [0, 1], including 0 and 1, which have the bits of the ends.
        model: name of the fine-tuned model, written into the rows.
        only: numbers of the measurements to make; None: all. There is one per data set, in the evaluator's
            order, numbered from 0.
        sink: called with the number and the rows of each measurement as soon as it is made.
        images: a dictionary that receives the results of single images, as in
            :func:`rft_fast.studies.interpolation`.

    Returns:
        One row per (data set, alpha), with the columns of :data:`rft_fast.studies.COLUMNS` that
        :func:`rft_fast.studies.interpolation` fills, except ``distance``.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: :func:`rft_fast.studies.check_alphas` refuses the positions, the evaluator belongs to
            another model, or ``only`` holds a number that no measurement has.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    record = Measured(STUDY, len(evaluator.datasets), only, sink, images)
    for number, data in enumerate(evaluator.datasets):
        if not record.wants(number):
            continue
        start = perf_counter()
        with path.at(0.0):
            found = evaluator.among([data.name]).walk().blend(lambda end: path.write(float(end)), grid)
        seconds = (perf_counter() - start) / len(grid)
        scores = [each[data.name] for each in found]
        rows = []
        for alpha, each, score in zip(grid, found, scores, strict=True):
            row = scored(STUDY, evaluator, data.name, each, seconds)
            row |= {"model": model, "alpha": alpha, "rho": 0.0, "keep": 1.0}
            row["gain"], row["gain_se"] = score.gain_over(scores[0])
            row["rise"], row["rise_se"] = score.rise_over(scores[0])
            row["bump"], row["bump_se"] = score.bump(scores[0], scores[-1], alpha)
            rows.append(row)
        record.add(number, rows, scores)
    return record.frame()


def ensemble_difference(rows: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Compare the path with the ensembles of its two ends, at the same positions.

    Args:
        rows: rows of :func:`ensemble` and of :func:`rft_fast.studies.interpolation`; others are ignored.
        images: results of single images of these rows; None: there are none, and differences have no error.

    Returns:
        One row per (model, data set):

        - ``gain_path``, ``gain_ensemble``: max over alpha of A(alpha) - A(0), of both; optimistic, since
          alpha is chosen on the same images;
        - ``difference``: accuracy on the path minus that of the ensemble, the mean over the positions between
          the ends; ``difference_se``, its standard error, paired over images, and ``difference_low``,
          ``difference_high``, a 95 % interval by Student's t; missing where no image differs;
        - ``ood``, ``samples``, ``alphas`` (number of positions between the ends).

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``images`` is not what gives results.
        ValueError: there are no rows of the study, or a path has other positions than its ensembles, or none
            between the ends.
    """
    check_images(images, "ensemble_difference")
    blends = of_study(rows, STUDY, "ensemble_difference")
    paths = {key: own for key, own in rows[rows["study"] == PATH].groupby(["model", "dataset"], sort=False)}
    found = []
    for (model, dataset), blend in blends.groupby(["model", "dataset"], sort=False):
        curves = [own.sort_values("alpha") for own in (paths.get((model, dataset), blend.iloc[:0]), blend)]
        path, blend = curves
        if path["alpha"].tolist() != blend["alpha"].tolist():
            raise ValueError(
                f"ensemble_difference: {str(model)!r} on {str(dataset)!r}: the path has the positions "
                f"{path['alpha'].tolist()}, the ensembles {blend['alpha'].tolist()}; measure both at the same"
            )
        check_path(model, dataset, path)
        inner = path["alpha"].between(0, 1, inclusive="neither").to_numpy()
        if not inner.any():
            raise ValueError(
                f"ensemble_difference: {str(model)!r} on {str(dataset)!r} has no position between its ends"
            )
        mean = float((path["accuracy"].to_numpy() - blend["accuracy"].to_numpy())[inner].mean())
        error = half = math.nan
        known = [results_of(curve, images, "ensemble_difference") for curve in curves]
        samples = int(blend["samples"].iloc[0])
        if known[0] is not None and known[1] is not None and samples > 1:
            each = (known[0].hits[inner].astype(np.float64) - known[1].hits[inner]).mean(axis=0)
            error = float(each.std(ddof=1)) / math.sqrt(samples)
            half = half_width(error, samples - 1)
        found.append(
            {
                "model": str(model),
                "dataset": str(dataset),
                "ood": bool(blend["ood"].iloc[0]),
                "gain_path": float(path["gain"].max()),
                "gain_ensemble": float(blend["gain"].max()),
                "difference": mean,
                "difference_se": error,
                "difference_low": mean - half,
                "difference_high": mean + half,
                "samples": samples,
                "alphas": int(inner.sum()),
            }
        )
    return pd.DataFrame(found)
