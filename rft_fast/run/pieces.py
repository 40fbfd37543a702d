"""A run in pieces: what each measurement takes, told before it is made, and some of them as one job."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .. import path as paths
from ..catalogue import Chosen
from ..config.request import Request
from ..evaluate import Evaluator
from ..studies.rows import Row
from . import bench, cost
from .wiring import Counts


@dataclass(frozen=True)
class Measurement:
    """One measurement of a study of a model.

    what: (data set, layer, alpha) of each of its rows: equal ones of two models are of the same thing.
    zero: whether all of it is at alpha = 0, where models fine-tuned from one are the same.
    """

    number: int
    what: tuple[tuple[object, ...], ...]
    zero: bool
    work: cost.Work


@dataclass(frozen=True)
class Piece:
    """Some measurements of a study of a model, to be made in this order by one worker.

    costs: FLOPs of each. chosen: layers that the study takes by earlier rows. ahead: whether other pieces
        need what it finds.
    """

    study: str
    model: str
    numbers: tuple[int, ...]
    costs: tuple[float, ...]
    chosen: Chosen | None = None
    ahead: bool = False

    @property
    def cost(self) -> float:
        return sum(self.costs)

    @cached_property
    def cost_of(self) -> dict[int, float]:
        """Number -> FLOPs."""
        return dict(zip(self.numbers, self.costs, strict=True))

    def without(self, numbers: Collection[int]) -> Piece | None:
        """What is left of it; None where nothing is."""
        left = [(n, c) for n, c in zip(self.numbers, self.costs, strict=True) if n not in numbers]
        if not left:
            return None
        kept, costs = zip(*left, strict=True)
        return replace(self, numbers=kept, costs=costs)


def split(piece: Piece, most: float) -> list[Piece]:
    """The piece in consecutive parts that cost no more than ``most`` each, single measurements apart."""
    parts: list[list[int]] = []
    total = most
    for place, spent in enumerate(piece.costs):
        if total + spent > most or not parts:
            parts.append([])
            total = 0.0
        parts[-1].append(place)
        total += spent
    return [
        replace(
            piece,
            numbers=tuple(piece.numbers[place] for place in part),
            costs=tuple(piece.costs[place] for place in part),
        )
        for part in parts
    ]


class Counter:
    """Counts what the measurements of a request take, on stand-ins that compute nothing (:mod:`.cost`).

    evaluator: a real one of the model; its images do not matter. whole: the data sets and their sizes.
    """

    def __init__(self, request: Request, evaluator: Evaluator, whole: Counts) -> None:
        self._request, self._evaluator = request, evaluator
        self._sizes = bench.sizes(request, whole)
        self._shared = bench.InMemory()

    def count(self, study: str, path: paths.Path, chosen: Chosen | None = None) -> list[Measurement]:
        """The measurements of a study of a model. The first that is asked for makes what all models share."""
        work = cost.Work.none(self._evaluator)
        counted = cost.counted_path(path, work)
        evaluators = {
            images: cost.counted_evaluator(self._evaluator, sizes, work)
            for images, sizes in self._sizes.items()
        }
        found: list[Measurement] = []
        before = work * 1

        def sink(number: int, rows: Sequence[Row]) -> None:
            nonlocal before
            what = tuple((row["dataset"], row["layer"], row["alpha"]) for row in rows)
            zero = all(alpha == 0 for *_, alpha in what)
            found.append(Measurement(number, what, zero, work + before * -1))
            before = work * 1

        bench.Bench(self._request, evaluators).run(study, counted, chosen, self._shared, sink=sink)
        return found


def total(works: Sequence[Measurement], evaluator: Evaluator) -> cost.Work:
    """What measurements take together."""
    return sum((m.work for m in works), cost.Work.none(evaluator))
