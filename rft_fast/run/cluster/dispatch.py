"""``Dispatch``: sends pieces to workers and collects their answers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rft_fast.run.bench import Shared, shares
from rft_fast.run.executor import Listener
from rft_fast.run.pieces import Piece

from .actor import POLL, Answer
from .connection import client
from .workers import Failed, Workers


class Dispatch:
    """Deals pieces to workers and collects their answers, once each piece is measured."""

    def __init__(
        self, workers: Workers, waiting: Sequence[Piece], shared: Shared, listener: Listener
    ) -> None:
        self._workers, self._waiting = workers, deque(waiting)
        self._shared, self._listener = shared, listener
        self._running: dict[Any, tuple[Any, Piece]] = {}  # reference to an answer -> worker and piece

    def run(self) -> None:
        try:
            while self._waiting or self._running:
                self._assign()
                self._take()
        except Exception:  # not KeyboardInterrupt, which is to end it now
            self._stop()
            raise

    def _assign(self) -> None:
        workers, busy = self._workers, len(self._running)
        wanted = min(workers.size, busy + len(self._waiting))
        workers.start_up_to(wanted - busy)
        if workers.loading:
            workers.admit(wait=not (self._running or workers.ready))
        while self._waiting and workers.ready:
            worker = workers.ready.popleft()
            piece = self._next(workers.models.get(id(worker)))
            workers.models[id(worker)] = piece.model
            self._listener.begun(piece)
            needed = shares(workers.request, piece.study, piece.model)
            known = {of: dict(self._shared.scores(of)) for of in needed}
            self._running[worker.begin.remote(piece, known)] = (worker, piece)

    def _next(self, model: str | None) -> Piece:
        """The most expensive piece, or one of half its cost or more of the model that is loaded."""
        for place, piece in enumerate(self._waiting):
            if piece.cost < self._waiting[0].cost / 2:
                break
            if piece.model == model:
                del self._waiting[place]
                return piece
        return self._waiting.popleft()

    def _take(self) -> None:
        ray = client()
        if not self._running:
            return
        answered, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL)
        for reference in answered:
            worker, piece = self._running.pop(reference)
            try:
                answer: Answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._again(piece, error)
                continue
            # It goes on while this process writes.
            if answer.problem is None and answer.spent is None:
                self._running[worker.more.remote()] = (worker, piece)
            else:
                self._workers.ready.append(worker)
            self._keep(answer, piece, worker)

    def _keep(self, answer: Answer, piece: Piece, worker: Any) -> None:
        for text in answer.notices:
            warnings.warn(text, stacklevel=2)
        for of, scores in answer.known.items():
            table = self._shared.scores(of)
            for key, score in scores.items():
                if key not in table:
                    table[key] = score
        done = {number for number, *_ in answer.measured}
        for reference, (busy, at) in self._running.items():
            if busy is worker:
                # Nothing may be left, although the worker has not said yet that it is done.
                left = at.without(done) or replace(at, numbers=(), costs=())
                self._running[reference] = (busy, left)
        self._tell(answer, piece)
        if answer.problem is not None:
            if answer.problem.changed:
                self._listener.withdrawn(piece)
            raise Failed(f"cluster: {answer.problem.text}")
        if answer.spent is not None:
            self._listener.spent(piece, *answer.spent)

    def _tell(self, answer: Answer, piece: Piece) -> None:
        """Passes on all measurements, also where the listener raises after the first."""
        stopped: Exception | None = None
        for number, rows, images in answer.measured:
            try:
                self._listener.measured(piece, number, rows, images)
            except Exception as error:
                stopped = stopped or error
        if stopped is not None:
            raise stopped

    def _again(self, piece: Piece, error: Exception) -> None:
        """Returns the piece of a dead worker to the front of the queue."""
        place = "after its last measurement"
        if piece.numbers:
            self._waiting.appendleft(piece)
            place = f"measurement {piece.numbers[0]}"
        self._workers.record_death(f"{piece.study} of {piece.model}, {place}", error)

    def _stop(self) -> None:
        """Lets each worker finish the measurement in flight, and keeps it where possible."""
        with suppress(Exception):  # what is reported is what stopped the run
            ray = client()
            for worker, _ in self._running.values():
                worker.stop.remote()
            while self._running:
                answered, _ = ray.wait(list(self._running), num_returns=1)
                for reference in answered:
                    worker, piece = self._running.pop(reference)
                    with suppress(ray.exceptions.RayError):
                        answer = ray.get(reference)
                        if answer.spent is None and answer.problem is None:
                            self._running[worker.more.remote()] = (worker, piece)
                        else:
                            self._workers.ready.append(worker)
                        with suppress(Exception):
                            self._tell(answer, piece)
                        if answer.problem is not None and answer.problem.changed:
                            self._listener.withdrawn(piece)
                        if answer.spent is not None:
                            self._listener.spent(piece, *answer.spent)
