"""The process that drives a cluster: it deals pieces out, and takes back what comes of them."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rft_fast import results
from rft_fast.catalogue import Chosen
from rft_fast.common import meter
from rft_fast.config.request import Request
from rft_fast.run import pieces
from rft_fast.run.bench import Shared, shares
from rft_fast.run.pieces import Piece
from rft_fast.run.running import Copies, Watch

from .actor import POLL, Actor, Answer, Problem
from .connection import check, client, connect, disconnect, is_local, reason

CORES = 8  # of a worker on the CPU, by default: as many batches as run side by side
EACH = 4  # pieces for each worker, by cost, so that none waits long for the last one
DEATHS = 3  # workers that may die at one place, or while they load
PATIENCE = 60.0  # seconds without a worker before that is said


class Failed(RuntimeError):
    """The workers cannot go on; what they measured is kept."""


class Cluster:
    """Workers of a Ray cluster, or of one that is started on this machine for the time being.

    config: as of :class:`rft_fast.run.worker.Worker`, of the first worker; the others must agree.

    Raises ValueError for whatever of the request the first worker cannot meet; RuntimeError where it dies.
    """

    def __init__(self, request: Request) -> None:
        if request.workers is None:
            raise ValueError("cluster: the request names no workers")
        check()
        self._where = request.workers
        self._local = is_local(request.workers)
        self._workers: list[Any] = []  # all that were ever started
        connect(request.workers)
        try:
            self._threads = CORES
            if not self._local:
                nodes = [node["Resources"].get("CPU", 0) for node in client().nodes() if node["Alive"]]
                self._threads = max(1, min(CORES, int(max(nodes, default=1))))
            self.size = self._count(request)
            if self._local:
                self._threads = max(1, (os.cpu_count() or 1) // self.size)
            if self._local and request.device.type == "cpu" and request.memory_limit is None:
                # Each would take half of what is free.
                share = int(meter.available("cpu") / 2 / self.size)
                request = replace(request, memory_limit=max(1, share))
            self.request = request
            self._ready: deque[Any] = deque()
            self._coming: dict[Any, Any] = {}  # reference to a description -> the worker that gives it
            self._models: dict[int, str] = {}  # id of a worker -> the model that it has loaded last
            self._deaths: Counter[str] = Counter()  # where
            first = self._start()
            self.config: dict[str, Any] = self._first_config(first)
            # Like batches on each: what is computed together decides the last bits.
            self.request = replace(request, memory_limit=self.config["memory_limit"])
            self._ready.append(first)
        except BaseException:
            self.close()
            raise

    def pieces(
        self, study: str, models: Sequence[str], chosen: Mapping[str, Chosen]
    ) -> tuple[list[Piece], Copies]:
        """As :meth:`rft_fast.run.worker.Worker.pieces`, by one of the workers."""
        found: tuple[list[Piece], Copies] = self._ask("pieces", study, list(models), dict(chosen))
        return found

    def guess(self, study: str, model: str) -> Chosen | None:
        """As :meth:`rft_fast.run.worker.Worker.guess`, by one of the workers."""
        found: Chosen | None = self._ask("guess", study, model)
        return found

    def measure(self, todo: Sequence[Piece], shared: Shared, watch: Watch) -> None:
        """As :meth:`rft_fast.run.running.Pool.measure`. Raises Failed where no worker can go on."""
        total = sum(piece.cost for piece in todo)
        if todo:
            self._more(self.size)
        for ahead in (True, False):
            parts = [piece for piece in todo if piece.ahead is ahead]
            # Those that others wait for in as many parts as can be.
            most = 0.0 if ahead else total / (EACH * self.size)
            split = [part for piece in parts for part in pieces.split(piece, most)]
            split.sort(key=lambda piece: -piece.cost)
            _Work(self, deque(split), shared, watch).run()

    def close(self) -> None:
        """Ends the workers, and the cluster where it was started here."""
        ray = client()
        for worker in self._workers:
            with suppress(Exception):  # one that is dead already
                ray.kill(worker)
        disconnect()

    # --- workers ----------------------------------------------------------------------------------

    def _count(self, request: Request) -> int:
        if self._where.isdecimal():
            wanted = int(self._where)
            gpus = int(client().cluster_resources().get("GPU", 0))
            if request.device.type == "cuda" and wanted > gpus:
                raise ValueError(
                    f"argument --workers: {wanted} workers need a GPU each, and there are {gpus}; "
                    "ask for fewer, or for --device cpu"
                )
            return wanted
        have = client().cluster_resources()
        found = have.get("GPU", 0) if request.device.type == "cuda" else have.get("CPU", 0) // self._threads
        return max(1, int(found))

    def _start(self) -> Any:
        ray, gpu = client(), self.request.device.type == "cuda"
        cores: float = self._threads
        if self._local:
            cores = min(cores, (os.cpu_count() or 1) / self.size)
        actor = ray.remote(max_restarts=0, max_task_retries=0)(Actor)
        options = {"num_cpus": 1 if gpu else cores, "num_gpus": 1 if gpu else 0}
        worker = actor.options(**options).remote(self.request, os.getcwd(), None if gpu else self._threads)
        self._workers.append(worker)
        return worker

    def _ask(self, question: str, *arguments: object) -> Any:
        """The answer of any worker."""
        ray = client()
        while True:
            worker = self._any()
            try:
                answer = ray.get(worker.ask.remote(question, *arguments))
            except ray.exceptions.RayError as error:
                self._ready.remove(worker)
                self._mourn(question, error)
                continue
            if isinstance(answer, Problem):
                raise Failed(f"cluster: {answer.text}")
            return answer

    def _first_config(self, worker: Any) -> dict[str, Any]:
        ray, reference = client(), worker.describe.remote()
        self._wait([reference])
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"cluster: a worker died while it loaded: {reason(error)}") from error
        if isinstance(answer, Problem):
            raise ValueError(answer.text)
        found: dict[str, Any] = answer
        return found

    def _mourn(self, where: str, error: Exception) -> None:
        """A worker died; another one is to go on there. Raises Failed where that would not end."""
        self._deaths[where] += 1
        if self._deaths[where] >= DEATHS:
            raise Failed(
                f"cluster: {DEATHS} workers died at the same place ({where}): {reason(error)}; if their "
                "memory ran out, use fewer workers to a machine, or a smaller --batch-size or --memory-limit"
            ) from error
        warnings.warn(f"a worker died ({where}: {reason(error)}); another one goes on", stacklevel=2)

    def _any(self) -> Any:
        while not self._ready:
            self._more(1)
            self._welcome(wait=True)
        return self._ready[0]

    def _wait(self, references: Sequence[Any]) -> list[Any]:
        """The first that is there. It takes as long as the cluster needs to find room, and that is said."""
        said = False
        while True:
            arrived, _ = client().wait(list(references), num_returns=1, timeout=PATIENCE)
            if arrived:
                return list(arrived)
            if not said:
                warnings.warn(
                    "no worker is ready yet: the cluster is busy, lacks what was asked for, or still loads; "
                    "waiting",
                    stacklevel=2,
                )
            said = True

    def _more(self, wanted: int) -> None:
        """Starts workers until so many are there or on the way."""
        for _ in range(wanted - len(self._ready) - len(self._coming)):
            worker = self._start()
            self._coming[worker.describe.remote()] = worker

    def _welcome(self, wait: bool) -> None:
        """Takes in those that have loaded. Raises Failed for one that cannot load, or is of another kind."""
        ray, coming = client(), list(self._coming)
        if wait:
            self._wait(coming)
        arrived, _ = ray.wait(coming, num_returns=len(coming), timeout=0)
        for reference in arrived:
            worker = self._coming.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._mourn("loading", error)
                continue
            if isinstance(answer, Problem):
                raise Failed(
                    f"cluster: {answer.text}; every machine needs the same files at the same paths, and the "
                    "same packages"
                )
            if unlike := results.differences(self.config, answer):
                raise Failed(
                    "cluster: the workers are not alike, so that their numbers could differ: "
                    f"{'; '.join(unlike)}; use machines of one kind, with the same files and versions"
                )
            self._ready.append(worker)


class _Work:
    """Pieces on their way through the workers."""

    def __init__(self, cluster: Cluster, waiting: deque[Piece], shared: Shared, watch: Watch) -> None:
        self._cluster, self._waiting, self._shared, self._watch = cluster, waiting, shared, watch
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
        cluster, busy = self._cluster, len(self._running)
        wanted = min(cluster.size, busy + len(self._waiting))
        cluster._more(wanted - busy)
        if cluster._coming:
            cluster._welcome(wait=not (self._running or cluster._ready))
        while self._waiting and cluster._ready:
            worker = cluster._ready.popleft()
            piece = self._next(cluster._models.get(id(worker)))
            cluster._models[id(worker)] = piece.model
            self._watch.begun(piece)
            needed = shares(cluster.request, piece.study, piece.model)
            known = {of: dict(self._shared.scores(of)) for of in needed}
            self._running[worker.begin.remote(piece, known)] = (worker, piece)

    def _next(self, model: str | None) -> Piece:
        """The dearest piece, or one not much cheaper of the model that the worker has at hand."""
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
                self._cluster._ready.append(worker)
            self._keep(answer, piece, worker)

    def _keep(self, answer: Answer, piece: Piece, worker: Any) -> None:
        for text in answer.notices:
            warnings.warn(text, stacklevel=2)
        for of, scores in answer.known.items():
            table = self._shared.scores(of)
            for key, score in scores.items():
                if key not in table:
                    table[key] = score
        done = {number for number, _ in answer.measured}
        for reference, (busy, at) in self._running.items():
            if busy is worker:
                # Nothing may be left, although the worker has not said yet that it is done.
                left = at.without(done) or replace(at, numbers=(), costs=())
                self._running[reference] = (busy, left)
        self._tell(answer, piece)
        if answer.problem is not None:
            if answer.problem.changed:
                self._watch.withdrawn(piece)
            raise Failed(f"cluster: {answer.problem.text}")
        if answer.spent is not None:
            self._watch.spent(piece, *answer.spent)

    def _tell(self, answer: Answer, piece: Piece) -> None:
        """All of it is kept, also where the run is to stop after the first."""
        stopped: Exception | None = None
        for number, rows in answer.measured:
            try:
                self._watch.measured(piece, number, rows)
            except Exception as error:
                stopped = stopped or error
        if stopped is not None:
            raise stopped

    def _again(self, piece: Piece, error: Exception) -> None:
        """What a dead worker left: to the front, for another one."""
        place = "after its last measurement"
        if piece.numbers:
            self._waiting.appendleft(piece)
            place = f"measurement {piece.numbers[0]}"
        self._cluster._mourn(f"{piece.study} of {piece.model}, {place}", error)

    def _stop(self) -> None:
        """Lets every worker finish what is in flight, and keeps it, where that can still be done."""
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
                            self._cluster._ready.append(worker)
                        with suppress(Exception):
                            self._tell(answer, piece)
                        if answer.problem is not None and answer.problem.changed:
                            self._watch.withdrawn(piece)
                        if answer.spent is not None:
                            self._watch.spent(piece, *answer.spent)
