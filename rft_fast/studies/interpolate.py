"""Figure 1 of the paper: accuracy and loss along the whole path, and what they say.

``alpha = 0`` is zero-shot and ``alpha = 1`` fine-tuned, as in the paper's figures; its formulas
write the mirrored ``alpha * theta_0 + (1 - alpha) * theta_1``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, MutableMapping
from statistics import NormalDist
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..common.numeric import check_alphas as check_alphas
from ..names import XI as XI
from .rows import Measured, Sink, as_number, check_table, of_study, scored

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "interpolation"
Z95 = NormalDist().inv_cdf(0.975)
TOGETHER = 4096  # images of data sets that are scored together


def check_evaluator(path: Path, evaluator: Evaluator, study: str) -> None:
    """Raises ValueError for an evaluator of another model than the path's, TypeError for what is none."""
    for value, method, kind in ((path, "at", "Path"), (evaluator, "scores", "evaluate.Evaluator")):
        if not hasattr(value, method) or not hasattr(value, "model"):
            raise TypeError(f"{study}: expected an rft_fast.{kind}, got {type(value).__name__}")
    if evaluator.model is not path.model:
        raise ValueError(
            f"{study}: expected an evaluator of the path's live model, got one of another "
            "model, whose scores would never change; build it as Evaluator(path.model, ...)"
        )


def interpolation(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    *,
    model: str = "",
    zeroshot: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame:
    """Scores ``theta(alpha) = (1 - alpha) theta_0 + alpha theta_1`` on every data set.

    The live model is as it was before once the study ends, also when it fails.

    Args:
        path: the live model between its two ends.
        evaluator: scores the path's live model.
        alphas: positions in [0, 1], with 0 and 1 among them; measured in ascending order.
        model: name of the fine-tuned model, written into the rows.
        zeroshot: data set -> the evaluator's scores at alpha = 0, where they are known; the study adds
            those that it needs. Give the same dictionary for all models fine-tuned from one: there they are
            the same.
        only: numbers of the measurements to make; None: all. There is one for each (alpha, data set),
            numbered in ascending order of alpha and, for each alpha, in the evaluator's order of its sets.
        sink: called with each measurement's number and rows as soon as it is made.

    Returns:
        One row per (alpha, data set) with the columns of :data:`rft_fast.studies.COLUMNS`. ``gain``
        is A(alpha) - A(0) and ``rise`` L(alpha) - L(0), with standard errors paired over samples.
        ``seconds`` is the data set's share, by samples, of the time its position took.

    Raises:
        TypeError: arguments of other types.
        ValueError: positions that :func:`check_alphas` refuses, an evaluator of another model, numbers
            that there are none of.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    zeroshot = {} if zeroshot is None else zeroshot
    names = [data.name for data in evaluator.datasets]
    record = Measured(STUDY, len(grid) * len(names), only, sink)
    for place, alpha in enumerate(grid):
        for group in _together(evaluator):
            numbers = [place * len(names) + names.index(name) for name in group]
            if not any(map(record.wants, numbers)):
                continue
            start = perf_counter()
            base = zeroshot_scores(path, evaluator, group, zeroshot)
            scores = base
            if alpha != 0:
                start = perf_counter()  # what alpha = 0 took counts there
                with path.at(alpha):
                    scores = evaluator.among(base).scores()
            seconds = perf_counter() - start
            for number, (name, score) in zip(numbers, scores.items(), strict=True):
                if not record.wants(number):
                    continue
                row = scored(STUDY, evaluator, name, scores, seconds)
                row |= {"model": model, "alpha": alpha, "rho": 0.0, "keep": 1.0}
                row["gain"], row["gain_se"] = score.gain_over(base[name])
                row["rise"], row["rise_se"] = score.rise_over(base[name])
                record.add(number, [row])
    return record.frame()


def zeroshot_scores(
    path: Path, evaluator: Evaluator, names: Iterable[str], known: MutableMapping[str, Scores]
) -> dict[str, Scores]:
    """Scores at alpha = 0 on data sets of these names, in their order; those not known are measured, and
    added to the known ones."""
    names = list(names)
    if not all(name in known for name in names):
        with path.at(0.0):
            for name, scores in evaluator.among(names).scores().items():
                if name not in known:
                    known[name] = scores
    return {name: known[name] for name in names}


def _together(evaluator: Evaluator) -> list[list[str]]:
    """The data sets in groups. Small ones are scored together, which keeps all cores busy; large ones each on
    its own, so that little is lost with a run that is killed. Always the same ones, also where not all are
    wanted: what runs side by side decides how many threads a batch has, and so its last bits."""
    groups: list[list[str]] = []
    size = TOGETHER
    for data in evaluator.datasets:
        if size + len(data.labels) > TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(data.name)
        size += len(data.labels)
    return groups


def summarize(rows: pd.DataFrame, xi: float = XI) -> pd.DataFrame:
    """What the path of each model says on each data set.

    The interval of the gain is the pointwise 95 % normal interval, paired over samples, at the best
    alpha. It does not allow for that alpha having been chosen as the best on the same samples,
    which makes the gain optimistic.

    Args:
        rows: of :func:`interpolation`; rows of other studies among them are left aside.
        xi: the accuracy, as a fraction, from which on a gain is high.

    Returns:
        One row per (model, data set), in the order of first appearance:

        - ``zero_shot``, ``fine_tuned``: A(0) and A(1);
        - ``gain`` (Eq. 2): max over alpha of A(alpha) - A(0), hence never negative, with
          ``gain_se``, ``gain_low``, ``gain_high`` and the smallest alpha that reaches it,
          ``best_alpha``;
        - ``barrier`` (Eq. 1), the depth: max over alpha of L(alpha) - L(0), with ``barrier_se`` and
          ``barrier_alpha``;
        - ``instability_loss`` (Def. 1): max over alpha of L(alpha) - (L(0) + L(1)) / 2, and
          ``instability_accuracy``: (A(0) + A(1)) / 2 - min over alpha of A(alpha);
        - ``mode``: *failure* when no alpha beats A(0), *high gain* when one does by at least xi,
          otherwise *gain*; missing on data that are in distribution, where it is not defined;
        - ``ood``, ``samples``, ``alphas`` (how many), ``xi``.

        A loss that is not finite at any alpha makes barrier and loss instability not finite too.

    Raises:
        TypeError: no table of rows, xi that is no number.
        ValueError: xi outside [0, 1), no rows of an interpolation, or a (model, data set) whose
            positions :func:`check_alphas` refuses, such as those of a run that was stopped.
    """
    if not 0 <= as_number("summarize: xi", xi) < 1:
        raise ValueError(f"summarize: expected xi as a fraction in [0, 1), got {xi}; 2 % is 0.02")
    rows = of_study(rows, STUDY, "summarize")
    groups = rows.groupby(["model", "dataset"], sort=False)
    facts = pd.DataFrame(
        [
            _summary(str(model), str(dataset), group.sort_values("alpha"), xi)
            for (model, dataset), group in groups
        ]
    )
    return facts.astype({"model": "string", "dataset": "string", "mode": "string"})


def best_gains(rows: pd.DataFrame) -> pd.Series:
    """Model -> the highest gain on its path in mean accuracy over the out-of-distribution sets.

    That is the maximum over alpha > 0 of the mean over data sets of A(alpha) - A(0): negative where no
    alpha beats zero-shot, so that failures have an order, too. Models are in the order of measurement.
    Where no data set is out of distribution, all of them count. Raises TypeError for no table of rows.

    Args:
        rows: of :func:`interpolation`; rows of other studies among them are left aside.
    """
    check_table(rows, "best_gains")
    rows = rows[(rows["study"] == STUDY) & (rows["alpha"] > 0)]
    far = rows["ood"].fillna(False).astype(bool)
    means = rows[far if far.any() else ~far].groupby(["model", "alpha"], sort=False)["gain"].mean()
    return means.groupby("model", sort=False).max()


def _summary(model: str, dataset: str, curve: pd.DataFrame, xi: float) -> dict[str, object]:
    try:
        alphas = check_alphas(curve["alpha"])
    except ValueError as error:
        raise ValueError(f"summarize: {model!r} on {dataset!r}: {error}") from None
    loss, accuracy = curve["loss"].to_numpy(), curve["accuracy"].to_numpy()
    gain, rise = curve["gain"].to_numpy(), curve["rise"].to_numpy()
    best, worst = int(np.argmax(gain)), int(np.argmax(rise))  # argmax finds a NaN, max hides none
    ood = bool(curve["ood"].iloc[0])
    gain_se = float(curve["gain_se"].iloc[best])
    mode = "failure" if gain[best] <= 0 else "high gain" if gain[best] >= xi else "gain"
    return {
        "model": model,
        "dataset": dataset,
        "ood": ood,
        "samples": int(curve["samples"].iloc[0]),
        "alphas": len(alphas),
        "zero_shot": accuracy[0],
        "fine_tuned": accuracy[-1],
        "best_alpha": alphas[best],
        "gain": gain[best],
        "gain_se": gain_se,
        "gain_low": gain[best] - Z95 * gain_se,
        "gain_high": gain[best] + Z95 * gain_se,
        "barrier": rise[worst],
        "barrier_se": float(curve["rise_se"].iloc[worst]),
        "barrier_alpha": alphas[worst],
        "instability_loss": _above_ends(loss),
        "instability_accuracy": _above_ends(-accuracy),
        "mode": mode if ood else None,
        "xi": xi,
    }


def _above_ends(curve: np.ndarray) -> float:
    """How far the curve's highest point lies above the mean of its two ends."""
    ends = (curve[0] + curve[-1]) / 2
    return float(np.max(curve) - ends) if math.isfinite(ends) else math.nan
