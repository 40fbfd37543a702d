"""``Cluster``: the executor that deals pieces of a run to the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rft_fast.catalogue import Chosen
from rft_fast.config.request import Request
from rft_fast.config.settings import Running
from rft_fast.run import pieces
from rft_fast.run.bench import Shared
from rft_fast.run.executor import Copies, Listener
from rft_fast.run.pieces import Piece

from .connection import check, connect, disconnect
from .dispatch import Dispatch
from .workers import Failed as Failed
from .workers import Workers

EACH = 4  # pieces for each worker, by cost, so that none waits long for the last one


class Cluster:
    """Workers of a Ray cluster, or of one that is started on this machine for this run.

    A :class:`rft_fast.run.executor.Executor`.

    Raises:
        ValueError: the first worker cannot meet the request.
        RuntimeError: the first worker died.
    """

    def __init__(self, request: Request) -> None:
        workers = request.of(Running).workers
        if workers is None:
            raise ValueError("cluster: the request has no workers")
        check()
        connect(workers)
        try:
            self._workers = Workers(request)
        except BaseException:
            disconnect()
            raise
        self.config: dict[str, Any] = self._workers.config
        self.size: int = self._workers.size

    def pieces(
        self, study: str, models: Sequence[str], chosen: Mapping[str, Chosen]
    ) -> tuple[list[Piece], Copies]:
        """As :meth:`rft_fast.run.worker.Worker.pieces`, by one of the workers."""
        found: tuple[list[Piece], Copies] = self._workers.ask("pieces", study, list(models), dict(chosen))
        return found

    def guess(self, study: str, model: str) -> Chosen | None:
        """As :meth:`rft_fast.run.worker.Worker.guess`, by one of the workers."""
        found: Chosen | None = self._workers.ask("guess", study, model)
        return found

    def measure(self, todo: Sequence[Piece], shared: Shared, listener: Listener) -> None:
        """As :meth:`rft_fast.run.executor.Executor.measure`. Raises Failed where no worker can go on."""
        total = sum(piece.cost for piece in todo)
        if todo:
            self._workers.start_up_to(self.size)
        for ahead in (True, False):
            parts = [piece for piece in todo if piece.ahead is ahead]
            # Pieces that others wait for are split into single measurements.
            most = 0.0 if ahead else total / (EACH * self.size)
            split = [part for piece in parts for part in pieces.split(piece, most)]
            split.sort(key=lambda piece: -piece.cost)
            Dispatch(self._workers, split, shared, listener).run()

    def close(self) -> None:
        """Ends the workers, and the cluster where it was started here."""
        self._workers.kill()
        disconnect()
