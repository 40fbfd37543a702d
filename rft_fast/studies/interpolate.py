"""Figure 1 of the paper: accuracy and loss along the whole path, and their summary.

``alpha = 0`` is zero-shot and ``alpha = 1`` fine-tuned, as in the paper's figures; its formulas
write the mirrored ``alpha * theta_0 + (1 - alpha) * theta_1``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..common.numeric import check_alphas as check_alphas
from ..names import XI as XI
from .bands import Z95 as Z95
from .gains import STUDY as STUDY
from .gains import check_path, gain_bounds, hits_of, id_alphas, of_path
from .images import Images, Kept, check_images
from .rows import Measured, Sink, as_number, check_table, of_study, scored

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

TOGETHER = 4096  # most images of data sets that are scored together


def check_evaluator(path: Path, evaluator: Evaluator, study: str) -> None:
    """Check that an evaluator scores the live model of a path.

    Raises:
        TypeError: not a path, or not an evaluator.
        ValueError: the evaluator belongs to another model.
    """
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
    finetuned: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure accuracy and loss of ``theta(alpha) = (1 - alpha) theta_0 + alpha theta_1`` (Figure 1).

    On return, and on any error, the live model is restored bit for bit.

    Args:
        path: the live model between its two ends.
        evaluator: scores the live model of ``path`` on one or more data sets.
        alphas: positions in [0, 1], including 0 and 1; measured in ascending order.
        model: name of the fine-tuned model, written into the rows.
        zeroshot: scores at alpha = 0 by data set, if known; missing ones are measured and added. Models
            fine-tuned from the same checkpoint can share this dictionary. Scores without entropies
            (:meth:`rft_fast.evaluate.Evaluator.noting`) leave ``entropy`` missing.
        finetuned: scores at alpha = 1 by data set, likewise, of this model. Any other position needs them
            for its bump, so they are made first.
        only: numbers of the measurements to make; None: all. There is one per (alpha, data set), numbered
            from 0 in ascending order of alpha and, for each alpha, in the evaluator's order of data sets.
        sink: called with the number and the rows of each measurement as soon as it is made.
        images: a dictionary that receives the results of single images: number of a measurement -> those of
            each of its rows (:func:`rft_fast.studies.image_results`). None: they are not kept.

    Returns:
        One row per (alpha, data set), with the columns of :data:`rft_fast.studies.COLUMNS`. ``loss`` is in
        nats, ``accuracy`` a fraction. ``gain`` is A(alpha) - A(0), ``rise`` is L(alpha) - L(0) and ``bump``
        is L(alpha) - [(1 - alpha) L(0) + alpha L(1)], each with a standard error paired over samples.
        ``distance`` is that of the weights from zero-shot (:attr:`rft_fast.Path.distance` times alpha),
        ``entropy`` the mean entropy of the predictions.
        ``seconds`` is the time of the position, divided among the data sets in proportion to their samples.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: :func:`check_alphas` refuses the positions, the evaluator belongs to another model, or
            ``only`` holds a number that no measurement has.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    zeroshot = {} if zeroshot is None else zeroshot
    finetuned = {} if finetuned is None else finetuned
    record = Measured(STUDY, len(grid) * len(evaluator.datasets), only, sink, images)
    along(record, 0, path, evaluator, grid, zeroshot, finetuned, {"study": STUDY, "model": model})
    return record.frame()


def along(
    record: Measured,
    first: int,
    path: Path,
    evaluator: Evaluator,
    grid: Sequence[float],
    zeroshot: MutableMapping[str, Scores],
    finetuned: MutableMapping[str, Scores],
    common: Mapping[str, object],
) -> None:
    """Make the measurements of one path, as :func:`interpolation` numbers them.

    Args:
        record: receives them.
        first: number of the first one.
        path, evaluator, zeroshot, finetuned: as for :func:`interpolation`.
        grid: positions, in ascending order.
        common: columns of all rows.
    """
    ahead: dict[str, float] = {}  # data set -> seconds of its scores at alpha = 1 before their turn
    names = [data.name for data in evaluator.datasets]
    for place, alpha in enumerate(grid):
        for group in together(evaluator):
            numbers = [first + place * len(names) + names.index(name) for name in group]
            if not any(map(record.wants, numbers)):
                continue
            start = perf_counter()
            base = end_scores(path, evaluator, group, zeroshot, 0.0)
            last, scores = base, base  # at alpha = 0 the bump is 0, whatever the other end
            if alpha != 0:
                start = perf_counter()  # the time at alpha = 0 is in that row
                last = scores = end_scores(path, evaluator, group, finetuned, 1.0)
            if 0 < alpha < 1:
                now = perf_counter()
                ahead[group[0]] = ahead.get(group[0], 0.0) + now - start
                start = now
                with path.at(alpha):
                    scores = evaluator.among(base).noting().scores()
            seconds = perf_counter() - start + (ahead.get(group[0], 0.0) if alpha == 1 else 0.0)
            for number, (name, score) in zip(numbers, scores.items(), strict=True):
                if not record.wants(number):
                    continue
                row = scored(STUDY, evaluator, name, scores, seconds)
                row |= {"alpha": alpha, "rho": 0.0, "keep": 1.0, **common}
                row["gain"], row["gain_se"] = score.gain_over(base[name])
                row["rise"], row["rise_se"] = score.rise_over(base[name])
                row["bump"], row["bump_se"] = score.bump(base[name], last[name], alpha)
                row["distance"], row["entropy"] = alpha * path.distance, score.entropy
                record.add(number, [row], [score])


def end_scores(
    path: Path, evaluator: Evaluator, names: Iterable[str], known: MutableMapping[str, Scores], alpha: float
) -> dict[str, Scores]:
    """Return the scores at an end of the path on the named data sets, in their order.

    Scores missing from ``known`` are measured and added to it.
    """
    names = list(names)
    if not all(name in known for name in names):
        with path.at(alpha):
            for name, scores in evaluator.among(names).noting().scores().items():
                if name not in known:
                    known[name] = scores
    return {name: known[name] for name in names}


def together(evaluator: Evaluator) -> list[list[str]]:
    """Group the data sets that are scored together, always in the same way, whichever are wanted.

    Small sets together keep all cores busy; large ones alone limit what an interrupted run loses. What runs
    side by side decides how many threads a batch has, and with that its last bits: hence the fixed groups.
    """
    groups: list[list[str]] = []
    size = TOGETHER
    for data in evaluator.datasets:
        if size + len(data.labels) > TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(data.name)
        size += len(data.labels)
    return groups


def summarize(
    rows: pd.DataFrame,
    xi: float = XI,
    images: Images | None = None,
    bounds: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Summarize the path of each model on each data set: gain, mode, barrier, bump and instability.

    The gain is the best of many positions on the images that chose it, which makes it optimistic. Its bounds
    and the mode are corrected for that: see :func:`rft_fast.studies.gain_bounds`.

    Args:
        rows: rows of :func:`interpolation`; rows of other studies are ignored.
        xi: smallest gain in accuracy that counts as high, a fraction in [0, 1): 0.02 is two points.
        images: results of single images of these rows; None: there are none.
        bounds: :func:`rft_fast.studies.gain_bounds` of these rows and images; None: made here.

    Returns:
        One row per (model, data set), in the order of first appearance:

        - ``zero_shot``, ``fine_tuned``: A(0) and A(1);
        - ``gain`` (Eq. 2): max over alpha of A(alpha) - A(0), never negative, with ``gain_se``, its pointwise
          standard error, and ``best_alpha``, the smallest alpha that reaches it;
        - ``gain_low``, ``gain_high``: the highest lower and the highest upper bound of A(alpha) - A(0) over
          alpha > 0: lower and upper bound of the best gain, each with 95 % probability; ``gain_method``
          (max-t or bonferroni) and ``gain_critical``, the number of standard errors;
        - ``mode`` (:func:`rft_fast.studies.verdicts.mode`): *gain*, *high gain*, *failure* or *undecided*,
          by these bounds; missing for data in distribution, where it is not defined; ``gain_shown``: the
          highest gain of a position whose lower bound is above 0, or 0;
        - ``mode_observed``: by the paper's definition, of the observed gain alone: *failure* if no alpha
          beats A(0), *high gain* if one does by at least ``xi``, otherwise *gain*;
        - ``gain_held_out``, ``gain_held_out_se``: the gain of the alpha chosen on four fifths of the images,
          measured on the others (:func:`rft_fast.studies.bands.held_out`); missing without ``images``, or
          with fewer than five of them;
        - ``id_alpha``, ``gain_id_alpha``, ``gain_id_alpha_se``: the alpha that accuracy on in-distribution
          data chooses (:func:`rft_fast.studies.id_alphas`), and the gain there; missing without such data;
        - ``barrier`` (Eq. 1), also called depth: max over alpha of L(alpha) - L(0), in nats, with
          ``barrier_se`` and ``barrier_alpha``;
        - ``bump`` (Entezari et al. 2022, their barrier): max over alpha of L(alpha) - [(1 - alpha) L(0) +
          alpha L(1)], in nats, 0 for a path that never rises above the straight line between its ends, with
          ``bump_se`` and ``bump_alpha``; missing for rows of versions that did not measure it;
        - ``barrier_low``, ``bump_low``: lower ends of one-sided 95 % intervals of barrier and bump, by
          Student's t over images, Bonferroni-corrected for the positions above 0, or between 0 and 1; the
          bump's is missing without such a position;
        - ``instability_loss`` (Def. 1): max over alpha of L(alpha) - (L(0) + L(1)) / 2, in nats, and
          ``instability_accuracy``: (A(0) + A(1)) / 2 - min over alpha of A(alpha);
        - ``ood``, ``samples``, ``alphas`` (the number of positions), ``xi``.

        If the loss is not finite at some alpha, neither are barrier, bump and loss instability.

    Raises:
        TypeError: ``rows`` is not a table of rows, ``xi`` is not a number, or ``images`` is not what gives
            results.
        ValueError: ``xi`` is outside [0, 1), there are no rows of an interpolation, :func:`check_alphas`
            refuses the positions of a (model, data set), as for an unfinished run, or ``images`` do not
            belong to the rows.
    """
    if not 0 <= as_number("summarize: xi", xi) < 1:
        raise ValueError(f"summarize: expected xi as a fraction in [0, 1), got {xi}; 2 % is 0.02")
    check_images(images, "summarize")
    rows = of_study(rows, STUDY, "summarize")
    groups = {key: own.sort_values("alpha") for key, own in rows.groupby(["model", "dataset"], sort=False)}
    for (model, dataset), curve in groups.items():
        check_path(model, dataset, curve)
    bounds = gain_bounds(rows, images) if bounds is None else bounds
    bounded = dict(list(bounds.groupby(["model", "dataset"], sort=False)))
    chosen = {} if rows["ood"].fillna(False).all() else id_alphas(rows).to_dict()
    facts = pd.DataFrame(
        [
            {
                "model": model,
                "dataset": dataset,
                **_summary(curve),
                **of_path(curve, bounded[model, dataset], hits_of(curve, images), chosen.get(model), xi),
            }
            for (model, dataset), curve in groups.items()
        ]
    )
    return facts.astype(dict.fromkeys(_TEXTS, "string"))


_TEXTS = ("model", "dataset", "mode", "mode_observed", "gain_method")


def best_gains(rows: pd.DataFrame) -> pd.Series:
    """Return the best gain of each model in mean out-of-distribution accuracy.

    That is the maximum over alpha > 0 of the mean over data sets of A(alpha) - A(0). It is negative if no
    alpha beats zero-shot, so that failures can be ranked, too.

    Args:
        rows: rows of :func:`interpolation`; rows of other studies are ignored. If no data set is out of
            distribution, the mean is over all of them.

    Returns:
        Gains (fractions) indexed by model, in the order of measurement.

    Raises:
        TypeError: ``rows`` is not a table of rows.
    """
    check_table(rows, "best_gains")
    rows = rows[(rows["study"] == STUDY) & (rows["alpha"] > 0)]
    far = rows["ood"].fillna(False).astype(bool)
    means = rows[far if far.any() else ~far].groupby(["model", "alpha"], sort=False)["gain"].mean()
    return means.groupby("model", sort=False).max()


def extremes(everyone: Sequence[str], gains: pd.Series, count: int) -> list[str]:
    """Return the models that gain most and least, in the order of ``everyone``.

    Args:
        everyone: names of all models.
        gains: :func:`best_gains` of these.
        count: how many models; of an odd number, one more that gains.
    """
    ranked = list(gains.sort_values(ascending=False, kind="stable").index)
    picked = {*ranked[: (count + 1) // 2], *ranked[len(ranked) - count // 2 :]}
    return [name for name in everyone if name in picked]


def _summary(curve: pd.DataFrame) -> dict[str, object]:
    """Summarize accuracy and loss of one path, but not its gain. curve: its rows, by ascending alpha."""
    alphas, loss, accuracy = (curve[name].to_numpy() for name in ("alpha", "loss", "accuracy"))
    rise, bump = curve["rise"].to_numpy(), curve["bump"].to_numpy()
    worst, top = int(np.argmax(rise)), int(np.argmax(bump))  # unlike max, argmax finds a NaN
    return {
        "ood": bool(curve["ood"].iloc[0]),
        "samples": int(curve["samples"].iloc[0]),
        "alphas": len(alphas),
        "zero_shot": accuracy[0],
        "fine_tuned": accuracy[-1],
        "barrier": rise[worst],
        "barrier_se": float(curve["rise_se"].iloc[worst]),
        "barrier_low": lower_end(curve[curve["alpha"] > 0], "rise"),
        "barrier_alpha": alphas[worst],
        "bump": bump[top],
        "bump_se": float(curve["bump_se"].iloc[top]),
        "bump_low": lower_end(curve[curve["alpha"].between(0, 1, inclusive="neither")], "bump"),
        "bump_alpha": alphas[top] if bump[top] == bump[top] else math.nan,
        "instability_loss": _above_ends(loss),
        "instability_accuracy": _above_ends(-accuracy),
    }


def lower_end(rows: pd.DataFrame, name: str, tests: int | None = None) -> float:
    """Return the lower end of a one-sided 95 % interval of the largest value of a column of rows.

    Student's t over images, Bonferroni-corrected: this far in the tail, the normal distribution would see
    effects in few images.

    Args:
        rows: rows of the same images, each of which is a test.
        name: the column; ``<name>_se`` has its standard error.
        tests: number of tests to correct for; None: the number of rows.

    Returns:
        NaN without rows, or where a value or an error is missing or not finite.
    """
    if rows.empty:
        return math.nan
    t = stdtrit(rows["samples"].iloc[0] - 1, 1 - 0.05 / (tests or len(rows)))
    ends = (rows[name] - t * rows[f"{name}_se"]).to_numpy(dtype=float)
    return float(ends.max()) if np.isfinite(ends).all() else math.nan


def _above_ends(curve: np.ndarray) -> float:
    """Height of the curve's maximum above the mean of its two ends."""
    ends = (curve[0] + curve[-1]) / 2
    return float(np.max(curve) - ends) if math.isfinite(ends) else math.nan
