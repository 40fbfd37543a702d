"""Figure 2 of the paper: one layer along the path, every other layer held at one end (Def. 1.1).

Its loss along alpha identifies stragglers (Def. 1.2): single layers that make the interpolation unstable.
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

from ..common.words import many, some
from ..names import OTHERS, REFERENCES, STRAGGLER_MARGIN, Names, Others, Reference
from .images import Kept
from .interpolate import check_alphas, check_evaluator, end_scores, lower_end
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
    reference: Reference = "own",
    model: str = "",
    zeroshot: MutableMapping[str, Scores] | None = None,
    finetuned: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure each layer at alpha with all other layers zero-shot, on every data set (Def. 1.1, Figure 2).

    Layers are measured in the order of execution, so the stages before a layer run once for all of its
    positions. Layers with equal ends (``path.unchanged``) are not measured, and a warning names them: their
    scores are those of the model with all layers at the end of the others. On return, and on any error, the
    live model is restored bit for bit.

    Args:
        path: the live model between its two ends.
        evaluator: scores the live model of ``path`` on one or more data sets.
        alphas: positions in [0, 1], including 0 and 1.
        layers: names or ``re:`` patterns of layers of the path; None: all of them.
        others: end at which the other layers are held, ``"zeroshot"`` or ``"finetuned"``.
        reference: what instability is measured from: the mean of the layer's own two ends (``"own"``), or
            that of the two original models (``"models"``), as the paper words Def. 1.1. The second is half of
            L(0) - L(1) of the models even for a layer that changes nothing, so it also measures what the
            layer has no part in.
        model: name of the fine-tuned model, written into the rows.
        zeroshot: scores at alpha = 0 by data set, as in :func:`rft_fast.studies.interpolation`; used if
            ``others`` or ``reference`` needs them.
        finetuned: scores of the whole model at alpha = 1, likewise.
        only: numbers of the measurements to make; None: all. There is one per (data set, layer), numbered
            from 0 in the evaluator's order of data sets and, for each of them, in the order of the layers.
        sink: called with the number and the rows of each measurement as soon as it is made.
        images: a dictionary that receives the results of single images: number of a measurement -> those of
            each of its rows (:func:`rft_fast.studies.image_results`). None: they are not kept.

    Returns:
        One row per (data set, layer, alpha), with the columns of :data:`rft_fast.studies.COLUMNS`. ``gain``,
        ``rise`` and ``bump`` are relative to the layer's own ends, the two instabilities (Def. 1) to
        ``reference``; all are paired over samples. The position where the layer joins the others is measured
        once for all layers.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: :func:`rft_fast.studies.check_alphas` refuses the positions, a layer is unknown (the
            message lists the nearest names) or inert (with the reason), the evaluator belongs to another
            model, or ``only`` holds a number that no measurement has.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    if others not in tuple(OTHERS):
        raise ValueError(f"layers: others must be one of {', '.join(OTHERS)}; got {others!r}")
    if reference not in tuple(REFERENCES):
        raise ValueError(f"layers: reference must be one of {', '.join(REFERENCES)}; got {reference!r}")
    rest = OTHERS[others]
    ends: dict[float, MutableMapping[str, Scores]] = {
        0.0: {} if zeroshot is None else zeroshot,
        1.0: {} if finetuned is None else finetuned,
    }
    spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.select(layers)}
    ordered = sorted(spans, key=spans.__getitem__)
    record = Measured(STUDY, len(ordered) * len(evaluator.datasets), only, sink, images)
    unchanged = [layer for layer in ordered if layer in set(path.unchanged)]
    if unchanged:
        every = f"of {len(ordered)} layers" + (f" of {model}" if model else "")
        path.warn(
            f"layers: {many(len(unchanged), f'{every} is', f'{every} are')} the same at both ends, so "
            f"the loss does not change with alpha ({some(unchanged, 3)})"
        )
    for place, data in enumerate(evaluator.datasets):
        numbers = {layer: n for n, layer in enumerate(ordered, place * len(ordered)) if record.wants(n)}
        if not numbers:
            continue
        start = perf_counter()
        held, *models = (
            end_scores(path, evaluator, [data.name], ends[alpha], alpha)[data.name]
            for alpha in ((rest,) if reference == "own" else (rest, 0.0, 1.0))
        )
        once = perf_counter() - start  # part of the first row
        moved = {layer: spans[layer] for layer in numbers if layer not in unchanged}
        curves = _curves(path, evaluator.among([data.name]), grid, rest, moved)
        still = ((layer, dict.fromkeys(grid, held), 0.0) for layer in numbers if layer not in moved)
        with closing(curves):
            for layer, scores, seconds in chain(still, curves):
                at = {alpha: (score, seconds) for alpha, score in scores.items()}
                at[rest], once = (held, once), 0.0
                rows = [moved_row(STUDY, evaluator, data.name, at, alpha, models) for alpha in grid]
                common = {"model": model, "layer": layer, "others": others, "reference": reference}
                record.add(numbers[layer], [row | common for row in rows], [at[alpha][0] for alpha in grid])
    return record.frame()


def _curves(
    path: Path, evaluator: Evaluator, grid: Sequence[float], rest: float, spans: Mapping[str, tuple[int, int]]
) -> Generator[tuple[str, dict[float, Scores], float]]:
    """Yield each layer, its scores at every alpha other than ``rest``, and the seconds per position."""
    if not spans:
        return
    moves = [alpha for alpha in grid if alpha != rest]
    pieces = evaluator.pieces()
    with path.at(rest):
        # Activations before the layers are held for one piece at a time. With several pieces, each goes
        # through a few layers before the next one, so that these layers are finished.
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


def moved_row(
    study: str,
    evaluator: Evaluator,
    name: str,
    measured: Mapping[float, tuple[Scores, float]],
    alpha: float,
    models: Sequence[Scores] = (),
) -> Row:
    """Return the row of some layers at alpha.

    Args:
        study: name of the study.
        evaluator: what scored them.
        name: name of the data set.
        measured: alpha -> scores and seconds.
        alpha: the position.
        models: scores at the two ends of the whole model, if instability is measured from them.
    """
    score, seconds = measured[alpha]
    first, last = measured[0.0][0], measured[1.0][0]
    row = scored(study, evaluator, name, {name: score}, seconds)
    row["alpha"], row["rho"], row["keep"] = alpha, 0.0, 1.0
    row["gain"], row["gain_se"] = score.gain_over(first)
    row["rise"], row["rise_se"] = score.rise_over(first)
    row["bump"], row["bump_se"] = score.bump(first, last, alpha)
    loss, accuracy = score.instability(*(models or (first, last)))
    row["instability"], row["instability_se"] = loss
    row["instability_accuracy"], row["instability_accuracy_se"] = accuracy
    return row


def stragglers(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Find the straggler layers (Def. 1.2) by a statistical test.

    The instability of a layer (Def. 1) is the maximum over alpha of ``L(alpha) - (L(0) + L(1)) / 2``, where
    L(0) and L(1) are the losses that the rows' ``reference`` names. A layer is a straggler if, at that alpha,
    the lower bound of its instability exceeds ``margin`` and that of its rise in loss over alpha = 0 exceeds
    zero (without the second condition, half of any *improvement* would count). The bounds are one-sided at
    95 %, by Student's t over images, Bonferroni-corrected for all layers and positions of the model and data
    set. Layers that change no loss of any image, as with equal ends, are not stragglers and are not counted
    in the correction.

    Args:
        rows: rows of :func:`layerwise_interpolation`; rows of other studies are ignored.
        margin: smallest instability that matters, in nats, at least 0.

    Returns:
        One row per (model, data set, others, layer), in the order of measurement:

        - ``instability``, ``instability_se``, ``instability_low`` (the lower bound), in nats, reached at
          ``alpha``; ``rise`` and ``rise_se`` there;
        - ``instability_accuracy``, ``instability_accuracy_se``: the largest over alpha, a fraction;
        - ``bump``, ``bump_se``, ``bump_alpha``: max over alpha of the loss above the straight line between
          the layer's own ends, 0 if there is none, and ``bump_low``, its lower bound, corrected likewise;
          missing for rows of versions that did not measure it;
        - ``straggler``: the result; always true if a loss, and with it the instability, is not finite;
        - ``unchanged``: whether no loss changes; ``reference``, ``margin``, ``ood``, ``samples``, ``alphas``
          (the number of positions).

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``margin`` is not a number.
        ValueError: ``margin`` is negative, there are no rows of the study, or a layer lacks one of its ends.
    """
    if not as_number("stragglers: margin", margin) >= 0:
        raise ValueError(f"stragglers: expected a margin of at least 0 nats, got {margin}")
    rows = of_study(rows, STUDY, "stragglers")
    found = []
    for (name, dataset, others), group in rows.groupby(["model", "dataset", "others"], sort=False):
        moving = (group["rise"] != 0) | (group["rise_se"] != 0)
        tests = int(moving.groupby(group["layer"]).transform("any").sum())
        # Student's t over images: this far in the tail, the normal distribution would find stragglers in few
        # images.
        t = float(stdtrit(group["samples"].iloc[0] - 1, 1 - 0.05 / max(1, tests)))
        for layer, curve in group.groupby("layer", sort=False):
            try:
                check_alphas(curve["alpha"])
            except ValueError as error:
                raise ValueError(f"stragglers: {layer!r} of {name!r} on {dataset!r}: {error}") from None
            fact = _straggler(curve.sort_values("alpha"), t, margin, tests)
            found.append({"model": name, "dataset": dataset, "others": others, "layer": layer, **fact})
    return pd.DataFrame(found).astype(
        {"model": "string", "dataset": "string", "others": "string", "layer": "string"}
    )


def _straggler(curve: pd.DataFrame, t: float, margin: float, tests: int) -> dict[str, object]:
    at = int(np.argmax(curve["instability"].to_numpy()))  # unlike max, argmax finds a NaN
    worst = curve.iloc[at]
    accuracy = curve.iloc[int(np.argmax(curve["instability_accuracy"].to_numpy()))]
    bump = curve.iloc[int(np.argmax(curve["bump"].to_numpy()))]
    between = curve[curve["alpha"].between(0, 1, inclusive="neither")]
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
        "bump": bump["bump"],
        "bump_se": bump["bump_se"],
        "bump_low": lower_end(between, "bump", max(1, tests)),
        "bump_alpha": bump["alpha"] if np.isfinite(bump["bump"]) else np.nan,
        "straggler": bool((low > margin and rises) or not np.isfinite(worst["instability"])),
        "unchanged": bool(((curve["rise"] == 0) & (curve["rise_se"] == 0)).all()),
        "reference": "own" if pd.isna(worst["reference"]) else worst["reference"],
        "margin": margin,
    }
