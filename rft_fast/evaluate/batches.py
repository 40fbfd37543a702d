"""Batches: how many samples go through a model at once, how many batches run side by side, and what fits."""

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
from .splitting import is_splitting, splitting

T = TypeVar("T")
S = TypeVar("S", bound="Source")


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int: ...

    def ahead(self, batch: slice) -> None:
        """Start to fetch a batch that is needed next."""


@dataclass(frozen=True)
class Need:
    """Peak memory of a batch.

    Attributes:
        fixed: Bytes of any batch.
        each: Further bytes for every sample.
    """

    fixed: int = 0
    each: int = 0

    @staticmethod
    def of(run: Callable[[int], object]) -> Need:
        """Measure ``run(samples)`` by fake tensors; zero where that is not possible."""
        try:
            some, twice = (meter.measure(lambda n=n: run(n)).peak for n in (64, 128))  # type: ignore[misc]
        except RuntimeError:
            return Need()
        # With few samples the peak may be elsewhere, where the gradients of all weights exist.
        each = max(0, (twice - some) // 64)
        return Need(max(0, some - 64 * each), each)


class Batches:
    """Cuts samples into batches and maps over them.

    A batch that does not fit in memory is halved, with a warning, and no later batch is larger.

    Args:
        device: Device of the model.
        stated: Samples per batch. None: 512; on the CPU 128, whose activations stay in the caches, or 64 for
            sources of fewer than 512 samples, so that there are batches for several cores; fewer if ``room``
            requires it.
        side: Largest number of batches that run side by side, on the CPU only. More than 1 only for work
            without state.
        room: Bytes for all batches in work.
        need: Measures the memory of a batch; called once, when it is first needed.
        relieve: Frees memory that is not needed; called after a batch did not fit.
        sample: What one sample is called in messages.
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
        self._most = sys.maxsize  # samples that fit, as far as known

    @property
    def side_by_side(self) -> bool:
        """Whether several batches may run side by side."""
        return self._side > 1

    def size(self, samples: int) -> int:
        """Return the samples per batch of a source of so many; independent of the number of threads."""
        if self._stated is not None:
            return min(self._most, self._stated)
        size = 512 if self._device.type != "cpu" else 128 if samples >= 512 else 64
        return max(1, min(self._most, self._fitting(), size))

    def enough(self, samples: int) -> int:
        """Return how many samples keep the device busy, on any number of cores, from sources of that size."""
        return self.size(samples) * min(self._side, SIDE_BY_SIDE)

    def workers(self, items: int, size: int) -> int:
        """Return how many of ``items`` batches of that size run side by side."""
        workers = min(torch.get_num_threads() // threads_of_a_batch(), items, self._side)
        if workers > 1:
            workers = min(workers, self._room // max(1, self.need.fixed + size * self.need.each))
        return max(1, workers)

    def together(self, samples: int, more: int) -> int:
        """Return how many sources of so many samples keep all workers busy: 1 if the batches of one do.

        Args:
            samples: Of each source.
            more: Bytes that a source takes besides the memory of its batches.
        """
        size, batches = self.size(samples), self.count(samples)
        sources = -(-self.workers(sys.maxsize, size) // batches)
        if sources > 1:
            sources = min(sources, self._room // max(1, more + self.need.fixed + size * self.need.each))
        return max(1, sources)

    def count(self, samples: int) -> int:
        """Return the number of batches of a source of so many samples."""
        return -(-samples // self.size(samples))

    def full(self) -> tuple[int, int]:
        """Return the samples of a full batch, and how many full batches run side by side."""
        size = self.size(sys.maxsize)
        return size, self.workers(sys.maxsize, size)

    @cached_property
    def need(self) -> Need:
        """Peak memory of a batch; measured at the first access."""
        return self._find()

    def _fitting(self) -> int:
        return (self._room - self.need.fixed) // self.need.each if self.need.each else sys.maxsize

    def map(
        self,
        sources: Iterable[S],
        work: Callable[[S, slice], T],
        take: Callable[[S, slice, T], object],
    ) -> None:
        """Call ``work`` for all batches, and ``take`` with each result, in order and in this thread.

        On the CPU several batches run side by side: small operations gain little from several threads, and
        lose it when other programs run. Each batch has :func:`threads_of_a_batch` threads, however many
        batches run, because the last bits of products of few rows depend on the number of threads. When this
        returns or raises, no thread is running.

        Args:
            sources: Where samples come from.
            work: (source, batch) -> result.
            take: Called with (source, batch, result).

        Raises:
            MemoryError: One sample does not fit, or the results that ``take`` keeps do not.
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
        split = is_splitting()

        def alone(source: S, batch: slice) -> tuple[T] | None:
            if batch.stop - batch.start > self._most:
                return None
            torch.set_num_threads(share)  # of this thread
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients), splitting(split):
                return self._try(work, source, batch)

        running: deque[tuple[tuple[S, slice], Future[tuple[T] | None]]] = deque()
        torch.set_num_threads(share)  # of libraries that count for the whole process
        try:
            while pending or running:
                # Two for each worker: no worker waits for this thread, and few results wait here.
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
            # After an error the caller may change the model, so no batch may still run.
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
        """Return the result of a batch in a tuple; None: it does not fit in memory."""
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
                f"Evaluator: the memory of {self._device} is too small for the activations that are kept "
                f"between stages: {_first_line(error)}; use a smaller --memory-limit (memory_limit=)"
            ) from error

    def _halves(self, source: S, batch: slice) -> list[tuple[S, slice]]:
        """Split a batch that does not fit; later batches are no larger than these parts."""
        samples = batch.stop - batch.start
        size = min((samples + 1) // 2, self._most)
        if size < self._most:
            self._most = size
            hint = "; --batch-size (batch_size=) starts with this number" if self._sample == "image" else ""
            warnings.warn(
                f"Evaluator: {samples} {self._sample}s at once do not fit in the memory of "
                f"{self._device}; continuing with {size}{hint}",
                stacklevel=2,
            )
        self.relieve()
        return [(source, part) for part in _slices(batch.start, batch.stop, size)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory; CPUs and CUDA's libraries have no exception type for it."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def too_large(device: torch.device, error: BaseException, sample: str = "image") -> str:
    """Return the message for a single sample that does not fit."""
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
