"""A run from its first measurement to its last: what is still to do, who does it, and how it is stopped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import pandas as pd

from .. import catalogue, results, studies
from ..catalogue import Chosen
from ..common import disk, files, words
from ..common.program import Stop
from ..config.request import Request
from ..studies.chance import among
from ..studies.facts import Facts, Settings
from ..studies.rows import Row
from . import selection
from .bench import Shared
from .pieces import Piece
from .progress import Progress
from .worker import Worker

Copies = Mapping[str, Sequence[tuple[int, str]]]


class Watch(Protocol):
    """Who is told how pieces get on, always in the thread that called :meth:`Pool.measure`."""

    def begun(self, piece: Piece) -> None:
        """Somebody begins with it."""

    def measured(self, piece: Piece, number: int, rows: list[Row]) -> None:
        """One of its measurements is made. What this raises ends the work."""

    def spent(self, piece: Piece, seconds: float, peak: int) -> None:
        """It is done. peak: of memory, in bytes."""

    def withdrawn(self, piece: Piece) -> None:
        """What was measured of this study of the model is not to be kept: a file of it has changed."""


class Pool(Protocol):
    """Who measures: this process (:class:`Alone`), or workers (:mod:`rft_fast.run.cluster`)."""

    config: dict[str, Any]
    size: int  # how many measure at a time

    def pieces(
        self, study: str, models: Sequence[str], chosen: Mapping[str, Chosen]
    ) -> tuple[list[Piece], Copies]:
        """As :meth:`rft_fast.run.worker.Worker.pieces`."""

    def guess(self, study: str, model: str) -> Chosen | None:
        """As :meth:`rft_fast.run.worker.Worker.guess`."""

    def measure(self, pieces: Sequence[Piece], shared: Shared, watch: Watch) -> None:
        """Makes all measurements of the pieces.

        What ``watch`` raises ends it, once nothing is in flight any more.
        """

    def close(self) -> None:
        """Gives back what it holds."""


class Alone:
    """This process measures, one piece after the other."""

    size = 1

    def __init__(self, request: Request) -> None:
        self._worker = Worker(request)
        self.config = self._worker.config
        self.pieces = self._worker.pieces
        self.guess = self._worker.guess

    def measure(self, pieces: Sequence[Piece], shared: Shared, watch: Watch) -> None:
        for piece in pieces:

            def sink(number: int, rows: list[Row], piece: Piece = piece) -> None:
                watch.measured(piece, number, rows)

            watch.begun(piece)
            start = perf_counter()
            try:
                took = self._worker.measure(piece, shared, sink)
            except files.Changed:
                watch.withdrawn(piece)
                raise
            except Exception:
                with suppress(OSError):  # the disk may be what failed
                    watch.spent(piece, perf_counter() - start, 0)
                raise
            watch.spent(piece, *took)

    def close(self) -> None:
        pass


def measure(
    pool: Pool, request: Request, run: results.Run, progress: Progress, stop: Stop
) -> list[dict[str, object]]:
    """Makes every measurement of the request that the run does not have.

    Each is on disk before the next begins. Returns what each study took, earlier processes of this run
    included: models, seconds (of all workers), peak memory in bytes.

    Raises Interrupted when it was asked to stop; OSError where the disk fails; MemoryError.
    """
    books = _Books(run, progress, stop, among(pool.config))
    takes = {study: list(request.zoo.finetuned) for study in request.measured}
    progress.expect(_foretold(pool, request))
    for phase in catalogue.phases():
        todo: list[Piece] = []
        copies: dict[str, Copies] = {}
        facts = Facts(run.rows(), Settings.of(vars(request)))
        for what in (each for each in phase if each.name in request.measured):
            study, models = what.name, takes[what.name]
            pieces, copies[study] = pool.pieces(study, models, _some(models, partial(what.choose, facts)))
            done = {model: run.done(study, model) for model in models}
            left = [rest for piece in pieces if (rest := piece.without(done[piece.model])) is not None]
            counts = Counter[str]()
            for piece in left:
                counts[piece.model] += len(piece.numbers)
            whole = sum(piece.cost for piece in pieces)
            had = whole - sum(piece.cost for piece in left)
            progress.expect({study: whole}, {study: had}, {study: dict(counts)})
            books.models[study] = len(models)
            todo += left
        pool.measure(todo, run, books)
        for study, copied in copies.items():
            _copy(run, study, copied)
        if phase[0].phase == 0:  # the gains decide
            takes |= selection.choose(request, run.rows())
        stop.check()
    return books.rows()


def _some(models: Sequence[str], choose: Callable[[str], Chosen | None]) -> dict[str, Chosen]:
    """Model -> the layers chosen for it, where any are."""
    found = {model: choose(model) for model in models}
    return {model: chosen for model, chosen in found.items() if chosen is not None}


def _foretold(pool: Pool, request: Request) -> dict[str, float]:
    """Study -> about what it will cost, before it is known which models and layers it takes."""
    found: dict[str, float] = {}
    for study, count in selection.how_many(request).items():
        models = list(request.zoo.finetuned)[:count]
        chosen = _some(models, partial(pool.guess, study))
        found[study] = sum(piece.cost for piece in pool.pieces(study, models, chosen)[0])
    return found


def _copy(run: results.Run, study: str, copies: Copies) -> None:
    """What is the same for several models was measured for one of them."""
    for model, same in copies.items():
        done = run.done(study, model)
        for number, holder in same:
            if number not in done:
                rows = run.measurement(study, holder, number)
                run.add(study, model, number, [{**row, "model": model, "seconds": 0.0} for row in rows])


class _Books:
    """Writes down what is measured, and what each study took: of earlier processes, too."""

    _COLUMNS = ("study", "models", "seconds", "peak_memory")

    def __init__(self, run: results.Run, progress: Progress, stop: Stop, classes: Mapping[str, int]) -> None:
        self._run, self._progress, self._stop, self._classes = run, progress, stop, classes
        self._said: set[str] = set()
        self.models: dict[str, int] = {}
        self._took: dict[str, tuple[float, int]] = {}
        file = run.table("cost")
        if run.resumed and file.is_file():
            try:
                for row in pd.read_csv(file).to_dict("records"):
                    seconds, peak = float(row["seconds"]), int(row["peak_memory"])
                    if not 0 <= seconds < math.inf:
                        raise ValueError(f"{seconds} seconds")
                    self._took[row["study"]] = (seconds, peak)
            except (ValueError, KeyError, OverflowError) as error:
                self._took.clear()
                progress.notice(f"{file} cannot be read ({error}): it will lack what earlier processes took")

    def begun(self, piece: Piece) -> None:
        self._progress.begin(piece.study, piece.model)

    def measured(self, piece: Piece, number: int, rows: list[Row]) -> None:
        self._run.add(piece.study, piece.model, number, rows)
        self._progress.measured(piece.study, piece.model, number, rows, piece.cost_of[number])
        if catalogue.study(piece.study).phase == 0:
            self._compare_with_chance(rows)
        self._stop.check()

    def _compare_with_chance(self, rows: list[Row]) -> None:
        """Says at once where a zero-shot end is no better than guessing."""
        for row in rows:
            if row["alpha"] == 0 and (classes := self._classes.get(str(row["dataset"]))):
                text = studies.against_chance(row, classes).text
                if text and text not in self._said:
                    self._said.add(text)
                    self._progress.notice(text)

    def spent(self, piece: Piece, seconds: float, peak: int) -> None:
        before, most = self._took.get(piece.study, (0.0, 0))
        self._took[piece.study] = (before + seconds, max(most, peak))
        table = pd.DataFrame(self.rows(), columns=list(self._COLUMNS))
        with disk.replacing(self._run.table("cost")) as temporary:
            table.map(words.cell).to_csv(temporary, index=False)

    def withdrawn(self, piece: Piece) -> None:
        count = self._run.withdraw(piece.study, piece.model)
        self._progress.notice(
            f"{count} measurements of {piece.study} of {piece.model} are removed: its file changed meanwhile"
        )

    def rows(self) -> list[dict[str, object]]:
        return [
            dict(zip(self._COLUMNS, (study, count, *self._took.get(study, (0.0, 0))), strict=True))
            for study, count in self.models.items()
        ]
