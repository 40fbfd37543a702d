"""``Actor``: a worker of a cluster. It measures in a thread of its own and answers questions meanwhile."""

from __future__ import annotations

import os
import queue
import socket
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, Literal

import torch

from rft_fast.common.files import Changed
from rft_fast.config.request import Request
from rft_fast.evaluate import Scores
from rft_fast.names import never
from rft_fast.run.pieces import Piece
from rft_fast.run.worker import Worker
from rft_fast.studies.images import ImageScores
from rft_fast.studies.rows import Row

POLL = 1.0  # seconds that a worker waits for a measurement before it answers that there is none

Known = dict[str, dict[tuple[str, float], Scores]]


class Problem:
    """The failure of a worker as text: not every exception can be pickled.

    Attributes:
        text: machine, class and message.
        changed: a file of the model has changed, so that measurements of the piece are invalid.
    """

    def __init__(self, error: BaseException) -> None:
        self.changed = isinstance(error, Changed)
        self.text = f"worker on {socket.gethostname()}: {type(error).__name__}: {error}"


class Answer:
    """What a worker produced since its last answer."""

    def __init__(self) -> None:
        self.measured: list[tuple[int, list[Row], Sequence[ImageScores]]] = []
        self.known: Known = {}
        self.notices: list[str] = []
        self.spent: tuple[float, int] | None = None  # the piece is done, or was stopped
        self.problem: Problem | None = None


class _Stopped(Exception):
    pass


class _Table(dict[tuple[str, float], Scores]):
    """A dictionary of scores that reports each addition."""

    def __init__(self, known: Mapping[tuple[str, float], Scores], tell: Callable[..., object]) -> None:
        super().__init__(known)
        self._tell = tell

    def __setitem__(self, key: tuple[str, float], scores: Scores) -> None:
        super().__setitem__(key, scores)
        self._tell(key, scores)


_Note = Literal["measured", "known", "notice", "spent", "problem"]


class Actor:
    """A worker process, as Ray runs it."""

    def __init__(self, request: Request, folder: str, threads: int | None) -> None:
        self._problem: Problem | None = None
        self._found: queue.SimpleQueue[tuple[_Note, Any]] = queue.SimpleQueue()
        self._tables: dict[str, _Table] = {}
        self._stopping = threading.Event()
        if threads is not None:
            torch.set_num_threads(threads)
        warnings.showwarning = lambda message, *_, **__: self._found.put(("notice", str(message)))
        try:
            os.chdir(folder)  # where the paths of the request begin
            self._worker = Worker(request)
        except Exception as error:
            self._problem = Problem(error)

    def describe(self) -> Any:
        """The configuration of this worker, or why it could not load."""
        return self._problem or self._worker.config

    def ask(self, question: str, *arguments: Any) -> Any:
        """Calls a method of the worker and returns its result."""
        try:
            return getattr(self._worker, question)(*arguments)
        except Exception as error:
            return Problem(error)

    def scores(self, of: str) -> _Table:
        """As :class:`rft_fast.run.wiring.Shared`."""
        if of not in self._tables:
            self._tables[of] = _Table({}, lambda key, found: self._found.put(("known", (of, key, found))))
        return self._tables[of]

    def begin(self, piece: Piece, known: Known) -> Answer:
        """Begins a piece and returns its first answer."""
        self._stopping.clear()
        for of, scores in known.items():
            dict.update(self.scores(of), scores)
        threading.Thread(target=self._measure, args=(piece,), daemon=True).start()
        return self.more()

    def stop(self) -> None:
        """Ends the piece after the measurement in flight."""
        self._stopping.set()

    def more(self) -> Answer:
        """What the worker produced since; waits up to :data:`POLL` seconds for something."""
        answer = Answer()
        with suppress(queue.Empty):
            self._note(answer, *self._found.get(timeout=POLL))
            while True:
                self._note(answer, *self._found.get_nowait())
        return answer

    def _note(self, answer: Answer, kind: _Note, found: Any) -> None:
        if kind == "measured":
            answer.measured.append(found)
        elif kind == "known":
            of, key, scores = found
            answer.known.setdefault(of, {})[key] = scores
        elif kind == "notice":
            answer.notices.append(found)
        elif kind == "spent":
            answer.spent = found
        elif kind == "problem":
            answer.problem = found
        else:
            never(kind)

    def _measure(self, piece: Piece) -> None:
        def sink(number: int, rows: list[Row], images: Sequence[ImageScores]) -> None:
            self._found.put(("measured", (number, rows, images)))
            if self._stopping.is_set():
                raise _Stopped

        start = perf_counter()
        try:
            self._found.put(("spent", self._worker.measure(piece, self, sink)))
        except _Stopped:
            self._found.put(("spent", (perf_counter() - start, 0)))
        except Exception as error:
            self._found.put(("problem", Problem(error)))
