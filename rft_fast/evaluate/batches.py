"""Batches: how many samples go through a model at once, how many of those side by side, and what fits."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeVar

import torch

from ..common import meter
from ..common.threads import SIDE_BY_SIDE, few_threads, threads_of_a_batch

T = TypeVar("T")
S = TypeVar("S", bound="Source")


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int: ...

    def ahead(self, batch: slice) -> None:
        """Begins to fetch a batch that will be needed next."""


@dataclass(frozen=True)
class Need:
    """Bytes that a batch takes at the worst moment of its way: ``fixed``, and ``each`` for every sample."""

    fixed: int = 0
    each: int = 0

    @staticmethod
    def of(run: Callable[[int], object]) -> Need:
        """Of ``run(samples)``, by the meter; nothing where it cannot tell."""
        try:
            some, twice = (meter.measure(lambda n=n: run(n)).peak for n in (64, 128))  # type: ignore[misc]
        except RuntimeError:
            return Need()
        # Of few samples, the worst moment may be another one: when the gradients of all weights are there.
        each = max(0, (twice - some) // 64)
        return Need(max(0, some - 64 * each), each)


class Batches:
    """Cuts samples into batches, and maps over them.

    stated: samples per batch; None: 512, but on the CPU 128, whose activations stay in its caches, and 64
        for sources of fewer than 512 samples, so that there are batches for several cores; less where
        ``room`` asks for it.
    side: so many batches at most run side by side, on the CPU. Only for work that keeps no state.
    room: bytes for all batches in work.
    need: finds out what a batch takes of it; called once, when it is first asked.
    relieve: gives memory back that could be done without; called when a batch did not fit.
    sample: what one sample is called.

    A batch that does not fit is halved, with a warning, and no later one is larger.
    """

    def __init__(
        self,
        device: torch.device,
        stated: int | None,
        side: int,
        room: int,
        need: Callable[[], Need],
        relieve: Callable[[], object],
        sample: str = "image",
    ) -> None:
        self._device, self._stated, self._side = device, stated, side if device.type == "cpu" else 1
        self._room, self._find, self.relieve, self._sample = room, need, relieve, sample
        self._most = sys.maxsize  # as was found out the hard way

    @property
    def side_by_side(self) -> bool:
        """Whether batches may run beside each other."""
        return self._side > 1

    def size(self, samples: int) -> int:
        """Samples per batch of a source of so many. It does not depend on the number of threads."""
        if self._stated is not None:
            return min(self._most, self._stated)
        size = 512 if self._device.type != "cpu" else 128 if samples >= 512 else 64
        return max(1, min(self._most, self._fitting(), size))

    def enough(self, samples: int) -> int:
        """So many samples of sources of that size keep the device busy, whatever its number of cores."""
        return self.size(samples) * min(self._side, SIDE_BY_SIDE)

    def workers(self, items: int, size: int) -> int:
        """How many of so many batches of that size run side by side."""
        workers = min(torch.get_num_threads() // threads_of_a_batch(), items, self._side)
        if workers > 1:
            workers = min(workers, self._room // max(1, self.need.fixed + size * self.need.each))
        return max(1, workers)

    def count(self, samples: int) -> int:
        """How many batches a source of so many samples makes."""
        return -(-samples // self.size(samples))

    def full(self) -> tuple[int, int]:
        """Samples of a full batch, and how many full batches run side by side."""
        size = self.size(sys.maxsize)
        return size, self.workers(sys.maxsize, size)

    @cached_property
    def need(self) -> Need:
        """What a batch takes; found out when it is first asked for."""
        return self._find()

    def _fitting(self) -> int:
        return (self._room - self.need.fixed) // self.need.each if self.need.each else sys.maxsize

    def map(
        self,
        sources: Iterable[S],
        work: Callable[[S, slice], T],
        take: Callable[[S, slice, T], object],
    ) -> None:
        """Calls work(source, batch) for all batches, and take(source, batch, result), that one here in turn.

        On the CPU several batches run side by side: small operations gain little from several threads, and
        lose all of it when other programs are running. Each has
        :func:`threads_of_a_batch`, however many run:
        torch's products of a few rows come out otherwise by the last bit on another number of threads. All
        threads have come to rest when this returns or raises.

        Raises MemoryError where one sample does not fit, or what ``take`` keeps.
        """
        pending: deque[tuple[S, slice]] = deque()
        largest = 1
        for source in sources:
            size = self.size(len(source))
            pending += [(source, batch) for batch in _slices(0, len(source), size)]
            largest = max(largest, min(size, len(source)))
        workers = self.workers(len(pending), largest)
        if workers > 1:
            self._side_by_side(pending, work, take, workers)
        elif self._side > 1:
            with few_threads():
                self._in_turn(pending, work, take)
        else:
            self._in_turn(pending, work, take)

    def _in_turn(
        self, pending: deque[tuple[S, slice]], work: Callable[..., T], take: Callable[..., Any]
    ) -> None:
        while pending:
            item = self._next(pending)
            result = self._try(work, *item)
            if result is None:
                pending.extendleft(reversed(self._halves(*item)))
                continue
            if pending:  # the device is computing now
                source, batch = self._next(pending)
                source.ahead(batch)
                pending.appendleft((source, batch))
            self._keep(take, *item, result[0])

    def _side_by_side(
        self, pending: deque[tuple[S, slice]], work: Callable[..., T], take: Callable[..., Any], workers: int
    ) -> None:
        threads, share = torch.get_num_threads(), threads_of_a_batch()
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def alone(source: S, batch: slice) -> tuple[T] | None:
            if batch.stop - batch.start > self._most:
                return None
            torch.set_num_threads(share)  # of this thread
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return self._try(work, source, batch)

        running: deque[tuple[tuple[S, slice], Future[tuple[T] | None]]] = deque()
        torch.set_num_threads(share)  # of libraries that count for the whole process
        try:
            while pending or running:
                # Two for each: none waits for this thread, and few results wait here.
                while pending and len(running) < 2 * workers:
                    item = self._next(pending)
                    running.append((item, _pool(workers).submit(alone, *item)))
                item, future = running[0]
                result = future.result()
                running.popleft()
                if result is None:
                    pending.extendleft(reversed(self._halves(*item)))
                else:
                    self._keep(take, *item, result[0])
        finally:
            # What still runs after an error would see the model change under its hands.
            for _, future in running:
                future.cancel()
            wait([future for _, future in running])
            torch.set_num_threads(threads)

    def _next(self, pending: deque[tuple[S, slice]]) -> tuple[S, slice]:
        source, batch = pending.popleft()
        first, *rest = _slices(batch.start, batch.stop, self._most)
        pending.extendleft((source, part) for part in reversed(rest))
        return source, first

    def _try(self, work: Callable[[S, slice], T], source: S, batch: slice) -> tuple[T] | None:
        """What comes of a batch; None: it does not fit in memory."""
        try:
            return (work(source, batch),)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch.stop - batch.start == 1:
                raise MemoryError(too_large(self._device, error, self._sample)) from error
        return None

    def _keep(self, take: Callable[[S, slice, T], object], source: S, batch: slice, result: T) -> None:
        try:
            take(source, batch, result)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"Evaluator: the memory of {self._device} does not hold what is kept between stages: "
                f"{_first_line(error)}; give a smaller memory_limit"
            ) from error

    def _halves(self, source: S, batch: slice) -> list[tuple[S, slice]]:
        """A batch that does not fit, in parts; and from now on batches are no larger than these."""
        samples = batch.stop - batch.start
        size = min((samples + 1) // 2, self._most)
        if size < self._most:
            self._most = size
            hint = (
                "; give --batch-size (batch_size=) to begin with so many" if self._sample == "image" else ""
            )
            warnings.warn(
                f"Evaluator: {samples} {self._sample}s at once do not fit in the memory of {self._device}; "
                f"going on with {size}{hint}",
                stacklevel=2,
            )
        self.relieve()
        return [(source, part) for part in _slices(batch.start, batch.stop, size)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory; CPUs, and CUDA's libraries, have no type of their own for that."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def too_large(device: torch.device, error: BaseException, sample: str = "image") -> str:
    """What to say where a single sample does not fit."""
    return (
        f"Evaluator: not even one {sample} fits in the memory of {device} beside the weights: "
        f"{_first_line(error)}; use a smaller model, a precision of two bytes (bf16), or another device"
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(stop, at + size)) for at in range(start, stop, size)]


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "rft_fast")
