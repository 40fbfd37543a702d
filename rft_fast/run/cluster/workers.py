"""``Workers``: the actors of a cluster, from their start to their death."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rft_fast import results
from rft_fast.common import meter
from rft_fast.config.request import Request
from rft_fast.config.settings import Computed, Running

from .actor import Actor, Problem
from .connection import client, is_local, reason

CORES = 8  # of a worker on the CPU, by default: as many batches as run side by side
DEATHS = 3  # workers that may die at one place, or while they load
PATIENCE = 60.0  # seconds without a worker before a notice


class Failed(RuntimeError):
    """The workers cannot go on. What they measured is kept."""


class Workers:
    """The workers of a connected cluster, all with the same configuration.

    Args:
        request: names the workers, and is sent to each.

    Attributes:
        request: what each new worker gets.
        size: how many workers measure at a time.
        ready: idle workers.
        models: id of a worker -> the model that it has loaded last.
        config: configuration of the first worker; the others must agree.

    Raises:
        ValueError: the first worker cannot meet the request, or there are too few GPUs.
        RuntimeError: the first worker died.
    """

    def __init__(self, request: Request) -> None:
        wanted, computed = request.of(Running).workers, request.of(Computed)
        if wanted is None:
            raise ValueError("cluster: the request has no workers")
        self._wanted, self._local = wanted, is_local(wanted)
        self._started: list[Any] = []
        self._threads = CORES
        if not self._local:
            nodes = [node["Resources"].get("CPU", 0) for node in client().nodes() if node["Alive"]]
            self._threads = max(1, min(CORES, int(max(nodes, default=1))))
        self.size = self._count(request)
        if self._local:
            self._threads = max(1, (os.cpu_count() or 1) // self.size)
        if self._local and request.device.type == "cpu" and computed.memory_limit is None:
            # Each would take half of what is free.
            share = int(meter.available("cpu") / 2 / self.size)
            request = request.but(replace(computed, memory_limit=max(1, share)))
        self.request = request
        self.ready: deque[Any] = deque()
        self.models: dict[int, str] = {}
        self._coming: dict[Any, Any] = {}  # reference to a description -> the worker that gives it
        self._deaths: Counter[str] = Counter()  # by place
        try:
            first = self._start()
            self.config: dict[str, Any] = self._first_config(first)
        except BaseException:
            self.kill()
            raise
        # Batches of the same size on each: what is computed together decides the last bits.
        limit = self.config["settings"]["computed"]["memory_limit"]
        self.request = request.but(replace(computed, memory_limit=limit))
        self.ready.append(first)

    def kill(self) -> None:
        """Ends all workers."""
        for worker in self._started:
            with suppress(Exception):  # one that is dead already
                client().kill(worker)

    @property
    def loading(self) -> bool:
        """Whether workers have been started that are not ready."""
        return bool(self._coming)

    def _count(self, request: Request) -> int:
        if self._wanted.isdecimal():
            wanted = int(self._wanted)
            gpus = int(client().cluster_resources().get("GPU", 0))
            if request.device.type == "cuda" and wanted > gpus:
                raise ValueError(
                    f"argument --workers: {wanted} workers need one GPU each, but there are {gpus}; "
                    "request fewer, or use --device cpu"
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
        self._started.append(worker)
        return worker

    def ask(self, question: str, *arguments: object) -> Any:
        """The answer of any worker."""
        ray = client()
        while True:
            worker = self.any()
            try:
                answer = ray.get(worker.ask.remote(question, *arguments))
            except ray.exceptions.RayError as error:
                self.ready.remove(worker)
                self.record_death(question, error)
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

    def record_death(self, where: str, error: Exception) -> None:
        """Counts the death of a worker, whose work another one takes over.

        Raises:
            Failed: several died at the same place.
        """
        self._deaths[where] += 1
        if self._deaths[where] >= DEATHS:
            raise Failed(
                f"cluster: {DEATHS} workers died at the same place ({where}): {reason(error)}; if "
                "their memory ran out, use fewer workers per machine, or a smaller --batch-size or "
                "--memory-limit"
            ) from error
        warnings.warn(f"a worker died ({where}: {reason(error)}); another one takes over", stacklevel=2)

    def any(self) -> Any:
        """A worker that is ready."""
        while not self.ready:
            self.start_up_to(1)
            self.admit(wait=True)
        return self.ready[0]

    def _wait(self, references: Sequence[Any]) -> list[Any]:
        """The first reference that is available. Warns where the cluster takes long to find room."""
        said = False
        while True:
            arrived, _ = client().wait(list(references), num_returns=1, timeout=PATIENCE)
            if arrived:
                return list(arrived)
            if not said:
                warnings.warn(
                    "waiting for a worker: the cluster is busy, still loads, or lacks the requested "
                    "resources",
                    stacklevel=2,
                )
            said = True

    def start_up_to(self, wanted: int) -> None:
        """Starts workers until so many are ready or loading."""
        for _ in range(wanted - len(self.ready) - len(self._coming)):
            worker = self._start()
            self._coming[worker.describe.remote()] = worker

    def admit(self, wait: bool) -> None:
        """Makes workers ready that have loaded. Raises Failed for one that cannot load, or that differs."""
        ray, coming = client(), list(self._coming)
        if wait:
            self._wait(coming)
        arrived, _ = ray.wait(coming, num_returns=len(coming), timeout=0)
        for reference in arrived:
            worker = self._coming.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self.record_death("loading", error)
                continue
            if isinstance(answer, Problem):
                raise Failed(
                    f"cluster: {answer.text}; every machine needs the same files at the same paths, and the "
                    "same packages"
                )
            if unlike := results.differences(self.config, answer, ("on one", "on another")):
                raise Failed(
                    "cluster: the workers differ, so that their numbers could differ: "
                    f"{'; '.join(unlike)}; use machines of one kind, with the same files and versions"
                )
            self.ready.append(worker)
