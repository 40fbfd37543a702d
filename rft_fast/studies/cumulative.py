"""Cumulative paths: layers 1 to i, or i to L, together on the path (layer-wise linear mode connectivity).

Adilova et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import closing
from itertools import chain, product
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..common.words import some
from ..names import CUMULATIVE, Cumulative, Names
from .bands import bonferroni
from .images import Kept
from .interpolate import check_alphas, check_evaluator, end_scores, lower_end
from .layers import moved_row
from .rows import AT_ONCE, Measured, Sink, chunks, of_study, only_one, walk_to

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "cumulative"
KEYS = ["model", "dataset", "cumulative"]  # of the sets of layers that are compared


def cumulative_interpolation(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    layers: Names | None = None,
    *,
    directions: Sequence[Cumulative] = ("first",),
    model: str = "",
    zeroshot: MutableMapping[str, Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure layers 1 to i, or i to L, at alpha with all others zero-shot, for every i and data set.

    Layers are counted in the order of execution. The set of all layers is the whole model: tensors in no
    layer, and layers with equal ends, move with the first of the others. With ``layers``, only these move.
    Activations before a set, or before its end, serve the next set: all sets take no more forward passes than
    :func:`rft_fast.studies.layerwise_interpolation` does, unless the text tower moves, too, or the
    activations at all positions do not fit in memory. The live model is restored as there.

    Args:
        path, evaluator, alphas, layers, model, zeroshot, sink, images: as there.
        directions: ``"first"``: layers 1 to i are at alpha; ``"last"``: layers i to L; or both.
        only: as there; measurements are numbered by direction, data set and layer.

    Returns:
        One row per (direction, data set, layer i, alpha), with the columns of
        :data:`rft_fast.studies.COLUMNS`. Differences are relative to the two ends of the set.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: no direction or an unknown one, or as there.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    if isinstance(directions, str) or not directions or not {*directions} <= {*CUMULATIVE}:
        raise ValueError(
            f"cumulative: directions: expected a list of first, last or both; got {directions!r}"
        )
    zeroshot = {} if zeroshot is None else zeroshot
    spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.select(layers)}
    ordered = sorted(spans, key=spans.__getitem__)
    moving = {layer: spans[layer][0] for layer in ordered if layer not in path.unchanged}
    ways = list(product([way for way in CUMULATIVE if way in directions], evaluator.datasets))
    record = Measured(STUDY, len(ways) * len(ordered), only, sink, images)
    if same := [layer for layer in ordered if layer not in moving]:
        text = f"{len(same)} of {len(ordered)} layers{f' of {model}' if model else ''} are the same at both"
        path.warn(f"cumulative: {text} ends, so that sets with and without them are equal ({some(same, 3)})")
    for place, (way, data) in enumerate(ways):
        cuts: dict[int, dict[str, int]] = {}  # place in ``moving`` where the set ends or begins -> layers
        for at, layer in enumerate(ordered):
            if record.wants(number := place * len(ordered) + at):
                before = ordered[: at + (way == "first")]
                cuts.setdefault(len([name for name in before if name in moving]), {})[layer] = number
        if not cuts:
            continue
        start = perf_counter()
        held = end_scores(path, evaluator, [data.name], zeroshot, 0.0)[data.name]
        once = perf_counter() - start  # part of the first row
        nothing = {0 if way == "first" else len(moving)}
        none = ((cut, dict.fromkeys(grid, held), 0.0) for cut in nothing & {*cuts})
        among, whole = evaluator.among([data.name]), len(ordered) == len(path.layers)
        curves = _curves(path, among, grid[1:], way, moving, whole, sorted({*cuts} - nothing))
        with closing(curves):
            for cut, scores, seconds in chain(none, curves):
                for layer, number in cuts[cut].items():
                    found = {alpha: (score, seconds / len(cuts[cut])) for alpha, score in scores.items()}
                    found[0.0], once = (held, once), 0.0
                    rows = [moved_row(STUDY, evaluator, data.name, found, alpha) for alpha in grid]
                    common = {"model": model, "layer": layer, "others": "zeroshot", "reference": "own"}
                    common["cumulative"] = way
                    record.add(number, [row | common for row in rows], [found[alpha][0] for alpha in grid])
    return record.frame()


def _curves(
    path: Path,
    evaluator: Evaluator,
    moves: Sequence[float],
    way: Cumulative,
    begins: Mapping[str, int],
    whole: bool,
    cuts: Sequence[int],
) -> Generator[tuple[int, dict[float, Scores], float]]:
    """Yield each cut, the scores of the layers before it (or behind) at alpha, and the seconds per position.

    Args:
        path, evaluator, way: as for the study; of one data set and direction.
        moves: positions above 0.
        begins: layers that move -> first station; in the order of execution.
        whole: whether other tensors move with the first of them.
        cuts: numbers of layers before the cut, ascending.
    """
    layers, stations = list(begins), list(begins.values())
    text = len(evaluator.stages.text)
    # A walk has one alpha before the cut, and others behind it. In the text, it holds features of the images,
    # which are behind the cut, so only one.
    apart = [[alpha] for alpha in moves] if text else [moves]
    bases = [(alpha, [0.0]) for alpha in moves] if way == "first" else [(0.0, ends) for ends in apart]
    pieces = evaluator.pieces(len(bases) * evaluator.boundary) if cuts else []
    with path.at(0.0):
        alone = [piece.walk() for piece in pieces for _ in bases] if len(pieces) == 1 else []
        for chunk in chunks(cuts, 1 if alone else AT_ONCE):
            found: dict[int, list[Scores]] = {}
            seconds = dict.fromkeys(chunk, 0.0)
            for piece, cut in ((piece, cut) for piece in pieces for cut in chunk):
                start = perf_counter()
                new: list[Scores] = []
                if not alone and cut == chunk[0]:
                    walks = [piece.walk() for _ in bases]
                station = stations[min(cut, len(layers) - 1)]
                behind = None if whole and not cut else layers[cut:]
                for walk, (base, ends) in zip(alone or walks, bases, strict=True):

                    def write(k: int, ends: Sequence[float] = ends, behind: Names | None = behind) -> None:
                        path.write(ends[k], layers=behind)

                    path.write(base, layers=None if whole else layers)
                    if text:
                        write(0)
                    if cut:  # the first layer may take others before it along
                        walk_to(walk, station)
                    new += map(only_one, walk.variants(write, len(ends), evaluator.stations - 1))
                piece.executor.holding(len(bases) * sum(map(len, piece.feeds)))
                pairs = zip(found.get(cut, []), new, strict=False)
                found[cut] = [before.then(more) for before, more in pairs] or new
                seconds[cut] += perf_counter() - start
            for cut in chunk:
                yield cut, dict(zip(moves, found[cut], strict=True)), seconds[cut] / len(moves)


def cumulative_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """Judge each set of layers: whether it is shown to lower accuracy at some alpha, or to have a bump.

    Bounds are one-sided at 95 %, by Student's t over images, Bonferroni-corrected for all sets and positions
    of a model, data set and direction.

    Args:
        rows: rows of :func:`cumulative_interpolation`; rows of other studies are ignored.

    Returns:
        One row per (model, dataset, cumulative, layer), smaller sets first:

        - ``moved``, ``layers``: number of layers in the set, and of all;
        - ``change``: A(alpha) - A(0) at the ``alpha`` of its lowest upper bound, ``change_high``; ``falls``:
          whether this bound is below 0;
        - ``bump``, ``bump_alpha``: the largest over alpha; ``bump_low``: its highest lower bound; ``bumps``:
          whether this bound is above 0.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no rows of the study, or a set lacks one of its ends.
    """
    rows = of_study(rows, STUDY, "cumulative_effects").reset_index(drop=True)
    found = []
    for key, group in rows.groupby(KEYS, sort=False):
        curves = [own.sort_values("alpha") for _, own in group.groupby("layer", sort=False)]
        moves = pd.concat([curves[0].iloc[:1], *(curve.iloc[1:] for curve in curves)])
        bounds = bonferroni(moves["gain"], moves["gain_se"], int(moves["samples"].iloc[0]))
        high = pd.Series(bounds.high, moves.index)
        for moved, curve in enumerate(curves if key[2] == "first" else curves[::-1], 1):
            try:
                check_alphas(curve["alpha"])
            except ValueError as error:
                raise ValueError(f"cumulative_effects: {curve['layer'].iloc[0]!r}: {error}") from None
            # Unlike those of pandas, argmin and argmax find a NaN.
            at = curve.iloc[1 + int(np.argmin(high[curve.index[1:]].to_numpy()))]
            top = curve.iloc[int(np.argmax(curve["bump"].to_numpy()))]
            low = lower_end(curve.iloc[1:-1], "bump", len(moves) - 1)
            found.append(
                {
                    **dict(zip(KEYS, key, strict=True)),
                    **{"layer": at["layer"], "moved": moved, "layers": len(curves)},
                    **{"change": at["gain"], "alpha": at["alpha"], "change_high": high[at.name]},
                    **{"falls": bool(high[at.name] < 0), "bumps": bool(low > 0)},
                    **{"bump": top["bump"], "bump_alpha": top["alpha"], "bump_low": low},
                }
            )
    return pd.DataFrame(found)
