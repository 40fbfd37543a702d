"""Work units: the estimated cost of each measurement, and batches of measurements for one worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from .. import catalogue
from .. import path as paths
from ..catalogue import Chosen
from ..config.request import Request
from ..config.settings import Running
from ..evaluate import Evaluator
from ..results import packed
from ..studies.rows import Row
from . import bench, cost
from .wiring import Counts


@dataclass(frozen=True)
class Measurement:
    """One measurement of a study of a model, with its estimated work.

    Attributes:
        number: within its study and model.
        what: (data set, layer, alpha) of each of its rows. Two models with equal ones measure the same thing.
        zero: whether all rows are at alpha = 0, where models fine-tuned from one zero-shot model are equal.
        work: what it takes.
        stored: bytes of the results of its images; 0 where they are not kept.
    """

    number: int
    what: tuple[tuple[object, ...], ...]
    zero: bool
    work: cost.Work
    stored: int


@dataclass(frozen=True)
class Piece:
    """Measurements of a study of a model that one worker makes, in this order.

    Attributes:
        study, model: their names.
        numbers: of the measurements.
        costs: FLOPs of each.
        chosen: layers that the study picked from earlier rows.
        ahead: whether other pieces need its scores.
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
        """The piece without these measurements; None where none is left."""
        left = [(n, c) for n, c in zip(self.numbers, self.costs, strict=True) if n not in numbers]
        if not left:
            return None
        kept, costs = zip(*left, strict=True)
        return replace(self, numbers=kept, costs=costs)


def split(piece: Piece, most: float) -> list[Piece]:
    """The piece in consecutive parts that cost at most ``most`` each, or are a single measurement."""
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
    """Counts the work of a request's measurements, on stand-ins that compute nothing (:mod:`.cost`).

    Args:
        request: the request.
        evaluator: a real one of the model; its images do not matter.
        whole: the data sets and their sizes.
    """

    def __init__(self, request: Request, evaluator: Evaluator, whole: Counts) -> None:
        self._request, self._evaluator = request, evaluator
        self._sizes = bench.sizes(request, whole)
        self._shared = bench.InMemory()

    def count(
        self, study: str, path: paths.Path, chosen: Chosen | None = None, model: str = ""
    ) -> list[Measurement]:
        """The measurements of a study of a model. The first model counted makes the scores that all share.

        Scores at the fine-tuned end are shared by the studies of one ``model`` only.
        """
        work = cost.Work.none(self._evaluator)
        counted = cost.counted_path(path, work)
        evaluators = {
            images: cost.counted_evaluator(self._evaluator, sizes, work)
            for images, sizes in self._sizes.items()
        }
        keeps = catalogue.study(study).keeps_images and self._request.of(Running).image_results
        found: list[Measurement] = []
        before = work * 1

        def sink(number: int, rows: Sequence[Row]) -> None:
            nonlocal before
            what = tuple((row["dataset"], row["layer"], row["alpha"]) for row in rows)
            zero = all(alpha == 0 for *_, alpha in what)
            stored = sum(packed.size(cast(int, row["samples"])) for row in rows) if keeps else 0
            found.append(Measurement(number, what, zero, work + before * -1, stored))
            before = work * 1

        others = cost.CountedOthers(self._request.zoo.finetuned, path, work)
        bench.Bench(self._request, evaluators).run(
            study, counted, chosen, self._shared, others, model=model, sink=sink
        )
        return found


def total(works: Sequence[Measurement], evaluator: Evaluator) -> cost.Work:
    """The work of all measurements together."""
    return sum((m.work for m in works), cost.Work.none(evaluator))
