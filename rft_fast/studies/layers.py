"""Figure 2 of the paper: one layer on the path, every other layer held at an end (Def. 1.1).

Its loss along alpha tells stragglers (Def. 1.2): single layers that spoil the interpolation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import NormalDist
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .path import check_alphas, check_evaluator
from .rows import Progress, Sink, complete, frame, scored

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "layers"
MARGIN = 0.1  # nats: instability that makes a straggler
OTHERS = {"zeroshot": 0.0, "finetuned": 1.0}


def layerwise_interpolation(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    layers: Sequence[str] | None = None,
    *,
    others: str = "zeroshot",
    model: str = "",
    zeroshot: dict[str, Scores] | None = None,
    sink: Sink | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Scores each layer at alpha with all other layers zero-shot, on every data set (Def. 1.1).

    Layers are taken in the order in which the model runs them, so that what comes before a layer runs
    once for all of its positions. The live model is as it was before once the study ends, also
    when it fails.

    Args:
        path: the live model between its two ends.
        evaluator: scores the path's live model.
        alphas: positions in [0, 1], with 0 and 1 among them.
        layers: names or ``re:`` patterns of layers of the path; None: all of them.
        others: where the other layers are, ``"zeroshot"`` or ``"finetuned"``.
        model: name of the fine-tuned model, written into the rows.
        zeroshot: the evaluator's scores at alpha = 0, if they are known; of use where the others are there.
        sink: called with each row, a layer's rows once all its positions are measured.
        progress: called with the number of a layer's positions once they are measured.

    Returns:
        One row per (layer, alpha, data set) with the columns of :data:`rft_fast.studies.COLUMNS`.
        ``gain``, ``rise`` and the two instabilities (Def. 1) compare with the layer's own ends, paired
        over samples. The end at which the other layers are is measured once for all layers.

    Raises:
        ValueError: positions that :func:`rft_fast.studies.check_alphas` refuses, an unknown layer
            (with the nearest names) or an inert one (with the reason), an evaluator of another model.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    if others not in OTHERS:
        raise ValueError(f"layers: others must be one of {', '.join(OTHERS)}; got {others!r}")
    rest = OTHERS[others]
    spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.select(layers)}
    moves = sorted(set(grid) - {rest})
    rows: list[dict[str, object]] = []
    pieces = evaluator.pieces()
    # Layer (None: none) -> scores at each position, and how long they took; joined from piece to piece.
    measured: dict[str | None, list[tuple[dict[str, Scores], float]]] = {}

    def keep(layer: str | None, new: list[dict[str, Scores]], seconds: float) -> None:
        nothing: tuple[dict[str, Scores], float] = ({}, 0.0)
        before = measured.get(layer, [nothing] * len(new))
        share = seconds / len(new)
        measured[layer] = [(_then(s, n), t + share) for (s, t), n in zip(before, new, strict=True)]

    with path.at(rest):
        for piece in pieces:
            walk = piece.walk()
            if others != "zeroshot" or zeroshot is None:
                start = perf_counter()
                keep(None, [walk.scores()], perf_counter() - start)
            else:
                measured[None] = [(zeroshot, 0.0)]
            for layer in sorted(spans, key=spans.__getitem__):
                first, last = spans[layer]
                walk.advance(first)
                start = perf_counter()

                def write(k: int, layer: str = layer) -> None:
                    path.write(moves[k], layers=[layer])

                keep(layer, walk.variants(write, len(moves), last), perf_counter() - start)
                path.write(rest, layers=[layer])
                if piece is not pieces[-1]:
                    continue
                if progress is not None:
                    progress(len(moves))
                at = {rest: measured[None][0], **dict(zip(moves, measured.pop(layer), strict=True))}
                for alpha in grid:
                    for row in _rows(evaluator, at, alpha):
                        rows.append(complete({**row, "model": model, "layer": layer, "others": others}))
                        if sink is not None:
                            sink(rows[-1])
                measured[None] = [(measured[None][0][0], 0.0)]  # its time counts once
    return frame(rows)


def _then(scores: dict[str, Scores], more: dict[str, Scores]) -> dict[str, Scores]:
    """Scores of data sets, and those of further images of some of them."""
    return scores | {name: scores[name].then(new) if name in scores else new for name, new in more.items()}


def _rows(
    evaluator: Evaluator, measured: dict[float, tuple[dict[str, Scores], float]], alpha: float
) -> list[dict[str, object]]:
    scores, seconds = measured[alpha]
    first, last = measured[0.0][0], measured[1.0][0]
    found = []
    for dataset in evaluator.datasets:
        name = dataset.name
        row = scored(STUDY, evaluator, name, scores, seconds)
        score = scores[name]
        row["alpha"], row["rho"], row["keep"] = alpha, 0.0, 1.0
        row["gain"], row["gain_se"] = score.gain_over(first[name])
        row["rise"], row["rise_se"] = score.rise_over(first[name])
        loss, accuracy = score.instability(first[name], last[name])
        row["instability"], row["instability_se"] = loss
        row["instability_accuracy"], row["instability_accuracy_se"] = accuracy
        found.append(row)
    return found


def stragglers(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Which layers are stragglers (Def. 1.2), by a stated rule.

    A layer's instability (Def. 1) is the largest of ``L(alpha) - (L(0) + L(1)) / 2`` over alpha. It is a
    straggler when the lower end of its one-sided 95 % interval, Bonferroni-corrected for all layers
    and positions of its model and data set, lies above ``margin``, and the loss there above the
    loss at alpha = 0 by the same rule: Def. 1 alone would also count half of any *improvement*.

    Args:
        rows: of :func:`layerwise_interpolation`; rows of other studies among them are left aside.
        margin: in nats; instabilities below it do not matter.

    Returns:
        One row per (model, data set, others, layer) in the order of measurement: ``instability``,
        ``instability_se``, ``instability_low`` and the ``alpha`` where it is reached, ``rise`` and
        ``rise_se`` there, ``instability_accuracy`` (largest over alpha, with ``_se``), ``straggler``,
        ``margin``, ``ood``, ``samples``, ``alphas`` (how many). Losses that are not finite make a
        layer's instability not finite; such a layer is a straggler.

    Raises:
        ValueError: no rows of the study, or a layer without both of its ends.
    """
    if not margin >= 0:
        raise ValueError(f"stragglers: expected a margin of at least 0 nats, got {margin}")
    rows = rows[rows["study"] == STUDY]
    if rows.empty:
        raise ValueError(f"stragglers: expected rows of the study {STUDY!r}, got none")
    found = []
    for (name, dataset, others), group in rows.groupby(["model", "dataset", "others"], sort=False):
        z = NormalDist().inv_cdf(1 - 0.05 / len(group))
        for layer, curve in group.groupby("layer", sort=False):
            try:
                check_alphas(curve["alpha"])
            except ValueError as error:
                raise ValueError(f"stragglers: {layer!r} of {name!r} on {dataset!r}: {error}") from None
            fact = _straggler(curve.sort_values("alpha"), z, margin)
            found.append({"model": name, "dataset": dataset, "others": others, "layer": layer, **fact})
    return pd.DataFrame(found).astype(
        {"model": "string", "dataset": "string", "others": "string", "layer": "string"}
    )


def _straggler(curve: pd.DataFrame, z: float, margin: float) -> dict[str, object]:
    at = int(np.argmax(curve["instability"].to_numpy()))  # argmax finds a NaN, max would hide it
    worst = curve.iloc[at]
    accuracy = curve.iloc[int(np.argmax(curve["instability_accuracy"].to_numpy()))]
    low = worst["instability"] - z * worst["instability_se"]
    rises = worst["rise"] - z * worst["rise_se"] > 0
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
        "margin": margin,
    }
