"""A greedy search of coefficients of layers, by the loss on images in distribution."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from time import perf_counter
from typing import TYPE_CHECKING

import pandas as pd

from ..common.numeric import as_number
from ..names import Names
from .interpolate import check_evaluator
from .rows import Measured, Row, Sink, only_one, scored, walk_to

if TYPE_CHECKING:
    from ..evaluate import Evaluator
    from ..path import Path

STUDY = "search"
VALUES = (0.0, 0.25, 0.5, 0.75, 1.0)


def search_coefficients(
    path: Path,
    evaluator: Evaluator,
    values: Iterable[float] = VALUES,
    layers: Names | None = None,
    *,
    model: str = "",
    only: Collection[int] | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame:
    """Choose a coefficient for each layer, one layer after the other, by the mean loss of the model there.

    The search begins at the fine-tuned model, with coefficient 1 for all layers. In the order of execution,
    each layer gets the value of lowest loss, the highest of equal ones, while the layers before it have
    theirs and those after it have 1. So no step raises the loss, and stages before a layer run once for all
    of its values. The result is fitted to these images: judge it on others. On return, and on any error, the
    live model is restored bit for bit.

    Args:
        path, model, only, sink: as for :func:`rft_fast.studies.layerwise_interpolation`; the search is one
            measurement.
        evaluator: scores the live model of ``path`` on one data set.
        values: coefficients to choose from, in [0, 1], including 1.
        layers: names or ``re:`` patterns of the layers to search; None: all. The others have coefficient 1.

    Returns:
        One row per layer, in the order of the search, with the columns of :data:`rft_fast.studies.COLUMNS`:
        its coefficient in ``coefficients``, the scores of the model with it, and ``rise``, the change of the
        loss by this step.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the evaluator has several data sets or belongs to another model, a value is out of range,
            1 is missing, or a layer is unknown or inert.
    """
    check_evaluator(path, evaluator, STUDY)
    others = sorted({as_number("search: values", value) for value in values}, reverse=True)
    if not others or others.pop(0) != 1 or not all(0 <= value < 1 for value in others):
        raise ValueError(f"search: values must lie in [0, 1], and 1 must be among them; got {values!r}")
    if len(evaluator.datasets) != 1:
        names = ", ".join(data.name for data in evaluator.datasets)
        raise ValueError(f"search: expected an evaluator of one data set, got {names}; use evaluator.among")
    spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.select(layers)}
    record = Measured(STUDY, 1, only, sink)
    if not record.wants(0):
        return record.frame()
    rows: list[Row] = []
    pieces, name = evaluator.pieces(), evaluator.datasets[0].name
    with path.at(1.0):
        current = only_one(evaluator.scores())
        walks = [piece.walk() for piece in pieces] if len(pieces) == 1 else []
        for layer in sorted(spans, key=spans.__getitem__):
            start, (first, last) = perf_counter(), spans[layer]
            tried, best = [current], 0
            if layer not in path.unchanged:
                parts = []
                for walk in walks or (piece.walk() for piece in pieces):
                    walk_to(walk, first)

                    def write(k: int, layer: str = layer) -> None:
                        path.write(others[k], layers=[layer])

                    parts.append([only_one(one) for one in walk.variants(write, len(others), last)])
                    path.write(1.0, layers=[layer])
                for part in zip(*parts, strict=True):
                    whole = part[0]
                    for more in part[1:]:
                        whole = whole.then(more)
                    tried.append(whole)
                losses = [score.loss if math.isfinite(score.loss) else math.inf for score in tried]
                best = losses.index(min(losses))
                path.write([1.0, *others][best], layers=[layer])
            row = scored(STUDY, evaluator, name, {name: tried[best]}, perf_counter() - start)
            row |= {"model": model, "layer": layer, "alpha": 1.0, "rho": 0.0, "keep": 1.0}
            row |= {"coefficients": f"{[1.0, *others][best]:g}"}
            row["rise"], row["rise_se"] = tried[best].rise_over(current)
            rows.append(row)
            current = tried[best]
    record.add(0, rows)
    return record.frame()
