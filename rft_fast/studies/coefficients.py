"""The path with a coefficient for each layer: LiNeS, tables, and layers that are held at zero-shot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING

import pandas as pd

from ..names import Names
from ..path.coefficients import Table, spread
from .images import Kept
from .interpolate import check_alphas, check_evaluator, end_scores, together
from .pruning import random_layers
from .rows import Measured, Sink, scored

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "coefficients"


@dataclass(frozen=True)
class _Table:
    """Coefficients of layers, of None for what is in no layer. ``name`` None: 1 for all, the plain path."""

    name: str | None
    values: Mapping[str | None, float]
    held: tuple[str, ...] = ()
    seed: int | None = None  # of layers that were chosen at random


def coefficients(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    tables: Mapping[str, Table],
    hold: Mapping[str, Names] | None = None,
    *,
    seeds: Collection[int] = (0, 1, 2),
    model: str = "",
    plain: MutableMapping[tuple[str, float], Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure the path with each layer at ``c * alpha``, c its coefficient by some table, on every data set.

    A measurement takes one forward pass of all images. On return, and on any error, the live model is
    restored bit for bit.

    Args:
        path, evaluator, alphas, model, sink, images: as for :func:`rft_fast.studies.interpolation`.
        tables: name -> coefficients by name or ``re:`` pattern of layers, None: of all others.
        hold: name -> layers with coefficient 0, as names or ``re:`` patterns; the others have 1.
        seeds: of the controls to each of these: as many of the other layers, chosen at random. Layers with
            equal ends do not count, because to hold them changes nothing.
        plain: scores on the plain path by (data set, alpha), if known; missing ones are measured and added.
        only: numbers of the measurements to make; None: all. There is one per (alpha, table), in ascending
            order of alpha and, for each alpha, the plain path first.

    Returns:
        One row per (alpha, table, data set), with the columns of :data:`rft_fast.studies.COLUMNS`;
        ``coefficients`` is missing on the plain path. ``gain`` and ``rise`` are differences to zero-shot,
        ``change`` and ``change_loss`` to the plain path at the same alpha; all are paired over samples.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: as for :func:`rft_fast.studies.interpolation`; or a table names an unknown layer, no
            layer, a layer twice, or not all of them.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    every = list(_tables(path, tables, hold or {}, seeds))
    plain = {} if plain is None else plain
    record = Measured(STUDY, len(grid) * len(every), only, sink, images)
    for number, (alpha, table) in enumerate(product(grid, every)):
        if not record.wants(number):
            continue
        start = perf_counter()
        base, here = (_plain(path, evaluator, at, plain) for at in (0.0, alpha))
        scores = here
        if table.name is not None and alpha:  # at 0 all layers are zero-shot
            start = perf_counter()
            with path.at({layer: c * alpha for layer, c in table.values.items()}):
                parts = [evaluator.among(group).scores() for group in together(evaluator)]
            scores = {name: score for part in parts for name, score in part.items()}
        seconds, rows = perf_counter() - start, []
        for name, score in scores.items():
            row = scored(STUDY, evaluator, name, scores, seconds)
            row |= {"model": model, "coefficients": table.name, "alpha": alpha, "rho": 0.0, "keep": 1.0}
            row["gain"], row["gain_se"] = score.gain_over(base[name])
            row["rise"], row["rise_se"] = score.rise_over(base[name])
            row["change"], row["change_se"] = score.gain_over(here[name])
            row["change_loss"], row["change_loss_se"] = score.rise_over(here[name])
            if table.held:
                row |= {"layer": ", ".join(table.held), "control": table.seed is not None, "seed": table.seed}
            rows.append(row)
        record.add(number, rows, scores.values())
    return record.frame()


def _tables(
    path: Path,
    tables: Mapping[str, Table],
    hold: Mapping[str, Names],
    seeds: Iterable[int],
) -> Iterator[_Table]:
    ones: dict[str | None, float] = dict.fromkeys([None, *path.layers], 1.0)
    yield _Table(None, ones)
    for name, table in tables.items():
        found = spread(table.items(), path.layers, f"coefficients: {name}: the coefficient", "the key None")
        rest = {key: value for key, value in table.items() if key is None}
        yield _Table(name, ones | rest | dict(found.items()))
    for name, layers in hold.items():
        chosen = path.select(layers)
        moving = [layer for layer in path.layers if layer not in path.unchanged]
        others = [layer for layer in moving if layer not in chosen]
        count = len(moving) - len(others)
        if len(others) < count:
            path.warn(f"coefficients: the control to {count} layers has only {len(others)} others")
        draws = [(random_layers(others, count, seed), seed) for seed in seeds if others and count]
        for held, seed in [(tuple(chosen), None), *draws] if chosen else []:
            yield _Table(name, ones | dict.fromkeys(held, 0.0), held, seed)


def _plain(
    path: Path, evaluator: Evaluator, alpha: float, known: MutableMapping[tuple[str, float], Scores]
) -> dict[str, Scores]:
    """Scores on the plain path; missing ones are measured and added to ``known``."""
    found: dict[str, Scores] = {}
    for group in together(evaluator):
        own = {name: known[name, alpha] for name in group if (name, alpha) in known}
        found |= end_scores(path, evaluator, group, own, alpha)
    known.update({(name, alpha): scores for name, scores in found.items()})
    return found
