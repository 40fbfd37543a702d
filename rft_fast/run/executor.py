"""Who makes the measurements of a run, and who listens: the interfaces, and an executor in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, Protocol

from ..catalogue import Chosen
from ..common import files
from ..config.request import Request
from ..studies.images import ImageScores
from ..studies.rows import Row
from .bench import Shared
from .pieces import Piece
from .worker import Worker

Copies = Mapping[str, Sequence[tuple[int, str]]]
"""Model -> (number, other model): measurements that are the same as the other model's."""


class Listener(Protocol):
    """Receives the progress of an executor, in the thread that called :meth:`Executor.measure`."""

    def begun(self, piece: Piece) -> None:
        """A worker begins the piece."""

    def measured(self, piece: Piece, number: int, rows: list[Row], images: Sequence[ImageScores]) -> None:
        """One measurement of the piece is made. An exception raised here ends the work.

        images: results of the images of each row; none where they are not kept.
        """

    def spent(self, piece: Piece, seconds: float, peak: int) -> None:
        """The piece is done. peak: of memory, in bytes."""

    def withdrawn(self, piece: Piece) -> None:
        """Measurements of this study of the model are invalid: a file of the model has changed."""


class Executor(Protocol):
    """Makes measurements: in this process (:class:`InProcess`), or on workers (:mod:`rft_fast.run.cluster`).

    Attributes:
        config: what the run is, as in ``config.json``, without command and date.
        size: how many measurements are made at a time.
    """

    config: dict[str, Any]
    size: int

    def pieces(
        self, study: str, models: Sequence[str], chosen: Mapping[str, Chosen]
    ) -> tuple[list[Piece], Copies]:
        """As :meth:`rft_fast.run.worker.Worker.pieces`."""

    def guess(self, study: str, model: str) -> Chosen | None:
        """As :meth:`rft_fast.run.worker.Worker.guess`."""

    def measure(self, pieces: Sequence[Piece], shared: Shared, listener: Listener) -> None:
        """Makes all measurements of the pieces.

        An exception of the listener ends it, once no measurement is in flight.
        """

    def close(self) -> None:
        """Frees what it holds."""


class InProcess:
    """Makes measurements in this process, one piece after the other."""

    size = 1

    def __init__(self, request: Request) -> None:
        self._worker = Worker(request)
        self.config = self._worker.config
        self.models = self._worker.models
        self.pieces = self._worker.pieces
        self.guess = self._worker.guess

    def measure(self, pieces: Sequence[Piece], shared: Shared, listener: Listener) -> None:
        for piece in pieces:

            def sink(
                number: int, rows: list[Row], images: Sequence[ImageScores], piece: Piece = piece
            ) -> None:
                listener.measured(piece, number, rows, images)

            listener.begun(piece)
            start = perf_counter()
            try:
                cost = self._worker.measure(piece, shared, sink)
            except files.Changed:
                listener.withdrawn(piece)
                raise
            except Exception:
                with suppress(OSError):  # the disk may be what failed
                    listener.spent(piece, perf_counter() - start, 0)
                raise
            listener.spent(piece, *cost)

    def close(self) -> None:
        pass
