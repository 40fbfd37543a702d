"""Figure 2 of the paper: one layer on the path, every other layer held at an end (Def. 1.1).

Its loss along alpha tells stragglers (Def. 1.2): single layers that spoil the interpolation.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import closing
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..common.words import some
from ..names import OTHERS, STRAGGLER_MARGIN, Names, Others
from .interpolate import check_alphas, check_evaluator
from .rows import AT_ONCE, Measured, Row, Sink, as_number, chunks, of_study, only_one, scored, walk_to

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "layers"
MARGIN = STRAGGLER_MARGIN


def layerwise_interpolation(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    layers: Names | None = None,
    *,
    others: Others = "zeroshot",
    model: str = "",
    zeroshot: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame:
    """Scores each layer at alpha with all other layers zero-shot, on every data set (Def. 1.1).

    Layers are taken in the order in which the model runs them, so that what comes before a layer runs
    once for all of its positions. Layers that are the same at both ends (``path.unchanged``) are not
    measured: their scores are those of the model with all layers at the end of the others, and a warning
    names them. The live model is as it was before once the study ends, also
    when it fails.

    Args:
        path: the live model between its two ends.
        evaluator: scores the path's live model.
        alphas: positions in [0, 1], with 0 and 1 among them.
        layers: names or ``re:`` patterns of layers of the path; None: all of them.
        others: where the other layers are, ``"zeroshot"`` or ``"finetuned"``.
        model: name of the fine-tuned model, written into the rows.
        zeroshot: as in :func:`rft_fast.studies.interpolation`; of use where the others are there.
        only: numbers of the measurements to make; None: all. There is one for each (data set, layer),
            numbered in the evaluator's order of its data sets and, for each of them, in that of the layers.
        sink: called with each measurement's number and rows as soon as it is made.

    Returns:
        One row per (data set, layer, alpha) with the columns of :data:`rft_fast.studies.COLUMNS`.
        ``gain``, ``rise`` and the two instabilities (Def. 1) compare with the layer's own ends, paired
        over samples. The end at which the other layers are is measured once for all layers.

    Raises:
        TypeError: arguments of other types.
        ValueError: positions that :func:`rft_fast.studies.check_alphas` refuses, an unknown layer
            (with the nearest names) or an inert one (with the reason), an evaluator of another model,
            numbers that there are none of.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    if others not in tuple(OTHERS):
        raise ValueError(f"layers: others must be one of {', '.join(OTHERS)}; got {others!r}")
    rest = OTHERS[others]
    spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.select(layers)}
    ordered = sorted(spans, key=spans.__getitem__)
    record = Measured(STUDY, len(ordered) * len(evaluator.datasets), only, sink)
    known = {} if zeroshot is None or rest != 0 else zeroshot
    unchanged = [layer for layer in ordered if layer in set(path.unchanged)]
    if unchanged:
        of = f" of {model}" if model else ""
        path.warn(
            f"layers: {len(unchanged)} of {len(ordered)} layers{of} are the same at both ends, so nothing is "
            f"to be measured: their instability is 0 ({some(unchanged, 3)})"
        )
    for place, data in enumerate(evaluator.datasets):
        numbers = {layer: n for n, layer in enumerate(ordered, place * len(ordered)) if record.wants(n)}
        if not numbers:
            continue
        start = perf_counter()
        if data.name not in known:
            with path.at(rest):
                known[data.name] = evaluator.among([data.name]).scores()[data.name]
        once = perf_counter() - start  # counts in the first row
        moved = {layer: spans[layer] for layer in numbers if layer not in unchanged}
        curves = _curves(path, evaluator.among([data.name]), grid, rest, moved)
        still = (
            (layer, dict.fromkeys(grid, known[data.name]), 0.0) for layer in numbers if layer not in moved
        )
        with closing(curves):
            for layer, scores, seconds in chain(still, curves):
                at = {alpha: (score, seconds) for alpha, score in scores.items()}
                at[rest], once = (known[data.name], once), 0.0
                rows = [_row(evaluator, data.name, at, alpha) for alpha in grid]
                common = {"model": model, "layer": layer, "others": others}
                record.add(numbers[layer], [row | common for row in rows])
    return record.frame()


def _curves(
    path: Path, evaluator: Evaluator, grid: Sequence[float], rest: float, spans: Mapping[str, tuple[int, int]]
) -> Generator[tuple[str, dict[float, Scores], float]]:
    """Each layer, its scores on one data set where it is not with the rest, and how long one of them took."""
    if not spans:
        return
    moves = [alpha for alpha in grid if alpha != rest]
    pieces = evaluator.pieces()
    with path.at(rest):
        # What comes before the layers is held for one piece at a time: where there are several, each is
        # taken through a few layers before the next, so that these are finished.
        walks = [piece.walk() for piece in pieces] if len(pieces) == 1 else []
        for chunk in chunks(list(spans), 1 if walks else AT_ONCE):
            found: dict[str, list[Scores]] = {}
            seconds = dict.fromkeys(chunk, 0.0)
            for walk in walks or (piece.walk() for piece in pieces):
                for layer in chunk:
                    first, last = spans[layer]
                    walk_to(walk, first)
                    start = perf_counter()

                    def write(k: int, layer: str = layer) -> None:
                        path.write(moves[k], layers=[layer])

                    new = [only_one(scores) for scores in walk.variants(write, len(moves), last)]
                    before = found.get(layer)
                    found[layer] = (
                        new if before is None else [a.then(b) for a, b in zip(before, new, strict=True)]
                    )
                    path.write(rest, layers=[layer])
                    seconds[layer] += perf_counter() - start
            for layer in chunk:
                yield layer, dict(zip(moves, found[layer], strict=True)), seconds[layer] / len(moves)


def _row(
    evaluator: Evaluator, name: str, measured: Mapping[float, tuple[Scores, float]], alpha: float
) -> Row:
    score, seconds = measured[alpha]
    first, last = measured[0.0][0], measured[1.0][0]
    row = scored(STUDY, evaluator, name, {name: score}, seconds)
    row["alpha"], row["rho"], row["keep"] = alpha, 0.0, 1.0
    row["gain"], row["gain_se"] = score.gain_over(first)
    row["rise"], row["rise_se"] = score.rise_over(first)
    loss, accuracy = score.instability(first, last)
    row["instability"], row["instability_se"] = loss
    row["instability_accuracy"], row["instability_accuracy_se"] = accuracy
    return row


def stragglers(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Which layers are stragglers (Def. 1.2), by a stated rule.

    A layer's instability (Def. 1) is the largest of ``L(alpha) - (L(0) + L(1)) / 2`` over alpha. It is a
    straggler when the lower end of its one-sided 95 % interval (Student's t over images,
    Bonferroni-corrected for all layers and positions of its model and data set) lies above ``margin``,
    and the loss there above the loss at alpha = 0 by the same rule: Def. 1 alone would also count half
    of any *improvement*. Layers at which no loss of any image changes, as where both ends are the same
    weights, are none, and are not counted by the correction.

    Args:
        rows: of :func:`layerwise_interpolation`; rows of other studies among them are left aside.
        margin: in nats; instabilities below it do not matter.

    Returns:
        One row per (model, data set, others, layer) in the order of measurement: ``instability``,
        ``instability_se``, ``instability_low`` and the ``alpha`` where it is reached, ``rise`` and
        ``rise_se`` there, ``instability_accuracy`` (largest over alpha, with ``_se``), ``straggler``,
        ``unchanged`` (no loss changes), ``margin``, ``ood``, ``samples``, ``alphas`` (how many). Losses that
        are not finite make a layer's instability not finite; such a layer is a straggler.

    Raises:
        TypeError: no table of rows, a margin that is no number.
        ValueError: no rows of the study, or a layer without both of its ends.
    """
    if not as_number("stragglers: margin", margin) >= 0:
        raise ValueError(f"stragglers: expected a margin of at least 0 nats, got {margin}")
    rows = of_study(rows, STUDY, "stragglers")
    found = []
    for (name, dataset, others), group in rows.groupby(["model", "dataset", "others"], sort=False):
        moving = (group["rise"] != 0) | (group["rise_se"] != 0)
        tests = int(moving.groupby(group["layer"]).transform("any").sum())
        # Student's t over images: so far in its tail the normal one would find stragglers in any few.
        t = float(stdtrit(group["samples"].iloc[0] - 1, 1 - 0.05 / max(1, tests)))
        for layer, curve in group.groupby("layer", sort=False):
            try:
                check_alphas(curve["alpha"])
            except ValueError as error:
                raise ValueError(f"stragglers: {layer!r} of {name!r} on {dataset!r}: {error}") from None
            fact = _straggler(curve.sort_values("alpha"), t, margin)
            found.append({"model": name, "dataset": dataset, "others": others, "layer": layer, **fact})
    return pd.DataFrame(found).astype(
        {"model": "string", "dataset": "string", "others": "string", "layer": "string"}
    )


def _straggler(curve: pd.DataFrame, t: float, margin: float) -> dict[str, object]:
    at = int(np.argmax(curve["instability"].to_numpy()))  # argmax finds a NaN, max would hide it
    worst = curve.iloc[at]
    accuracy = curve.iloc[int(np.argmax(curve["instability_accuracy"].to_numpy()))]
    low = worst["instability"] - t * worst["instability_se"]
    rises = worst["rise"] - t * worst["rise_se"] > 0
    return {
        "ood": bool(worst["ood"]),
        "samples": int(worst["samples"]),
        "alphas": len(curve),
        "instability": worst["instability"],
        "instability_se": worst["instability_se"],
        "instability_low": low,
        "alpha": worst["alpha"],
        "rise": worst["rise"],
        "rise_se": worst["rise_se"],
        "instability_accuracy": accuracy["instability_accuracy"],
        "instability_accuracy_se": accuracy["instability_accuracy_se"],
        "straggler": bool((low > margin and rises) or not np.isfinite(worst["instability"])),
        "unchanged": bool(((curve["rise"] == 0) & (curve["rise_se"] == 0)).all()),
        "margin": margin,
    }
