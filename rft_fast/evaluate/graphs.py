"""CUDA graphs of stages: kernel launches of a stage, recorded once and replayed after every write.

Weights are written in place, so a recorded stage reads the new values. A tensor that replaces a weight in the
module is not seen by a recording: Path.check refuses it, an Evaluator alone does not.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .batches import is_out_of_memory
from .stages import Stage

Body = Callable[[], None]
Capture = Callable[[Body], Body]  # records a callable without executing it; returns the replay

# The first runs are not recorded: libraries select algorithms then, and a shape that occurs only once needs
# no recording.
WARM = 2

SHORT = 8 << 20
"""Largest size of a stage's activations, those before and after it together, that is recorded; in bytes.

A recording saves about 5 us of host time per launch, and copies these activations once more: they are read
and written in at most 3.5 us at the 4.8 TB/s of an H200, less than one launch. Larger stages are not
recorded: an MLP of ViT-L/14 in bfloat16 with 8 MiB (2,048 tokens) computes for about 60 us and its six
launches take 30, so the host is ahead without a recording, whose copy would cost some 4 %. Small models are
below the limit: a batch of 512 of the digits zoo has 4.3 MiB. Calculated for an H200, not measured.
"""


@dataclass
class _Recorded:
    runs: int = 0
    short: bool = False  # its last run was
    replay: Body | None = None
    source: Tensor | None = None
    result: Tensor | None = None


class Graphs:
    """Runs chains of stages; a short stage is recorded on its third run with the same shape.

    Results are in buffers that the next run overwrites. Between stages there are two buffers of each shape
    and dtype, used in turns. One thread and one stream per device may use recordings at a time, of whichever
    evaluator: temporary tensors of all recordings share memory.

    Args:
        capture: Makes the recordings, see :func:`on`.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def run(
        self, stages: tuple[Stage, ...], first: int, last: int, x: Tensor, inputs: Tensor | None
    ) -> Tensor:
        """Run some stages of a chain; the same bits as running them one by one.

        Args:
            stages: The chain.
            first: The first stage to run.
            last: The stage after the last one to run.
            x: Activations before stage ``first``, [n, ...].
            inputs: Input of the chain; None: no stage reads it.

        Returns:
            Activations before stage ``last``; overwritten by the next run.
        """
        for index in range(first, last):
            stage = stages[index]
            key = (stage, x.shape, x.dtype)
            record = self._recorded.setdefault(key, _Recorded())
            record.runs += 1
            if record.replay is None and record.short and record.runs > WARM:
                x = self._record(record, stage, index, x)
            if record.replay is None or record.source is None or record.result is None:
                before = x.nbytes
                x = stage.run(x, x if inputs is None else inputs)
                # A stage that reads the chain's input would need that in a buffer, too.
                record.short = not stage.reads_inputs and before + x.nbytes <= SHORT
                continue
            _put(record.source, x)
            record.replay()
            x = record.result
        return x

    def clear(self) -> None:
        """Drop all recordings and free their memory."""
        self._recorded.clear()
        self._buffers.clear()

    def _record(self, record: _Recorded, stage: Stage, index: int, x: Tensor) -> Tensor:
        """Record a stage. Returns x in its buffer; until then x may be a view of that buffer."""
        source = self._buffer(index % 2, x)
        _put(source, x)
        # The result of the recorded stage is freed with the recording, so later ones reuse its memory. Its
        # shape comes from one more run on the memory that is recorded.
        result = self._buffer(1 - index % 2, stage.run(source, source))

        def body() -> None:
            result.copy_(stage.run(source, source))

        try:
            record.replay = self._capture(body)
        except RuntimeError as error:
            record.runs = -sys.maxsize  # never again
            reason = str(error).partition("\n")[0]
            warnings.warn(f"Evaluator: a stage runs without a CUDA graph: {reason}", stacklevel=2)
        else:
            record.source, record.result = source, result
        return source

    def _buffer(self, turn: int, like: Tensor) -> Tensor:
        key = (turn, like.shape, like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self._buffers[key]


def _put(buffer: Tensor, x: Tensor) -> None:
    """Copy x into a buffer, of which it may be a view."""
    if x.data_ptr() == buffer.data_ptr() and x.stride() == buffer.stride():
        return
    shared = x.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    buffer.copy_(x.clone() if shared else x)


@cache
def on(device: torch.device) -> Capture:
    """Return the function that makes recordings on a CUDA device; they share one pool of temporary memory.

    All evaluators share one stream and one pool: torch keeps a cuBLAS workspace for each stream, in the pool
    that was in use when the workspace was created.
    """
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    living: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # graphs of this pool
    pool: Any = None

    def record(body: Body) -> Body:
        nonlocal pool, living
        if pool is None or not living:  # torch refuses a pool without graphs
            pool, living = torch.cuda.graph_pool_handle(), WeakSet()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                body()
                graph.capture_end()
            except BaseException:
                # Some versions of torch do not clean up after a failed capture; the others raise an error
                # here.
                with suppress(RuntimeError):
                    graph.capture_end()
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                pool = None
                raise
        living.add(graph)
        return graph.replay

    def capture(body: Body) -> Body:
        with torch.cuda.device(device), _nothing_collected():
            _refuse_waiting(body)
            side.wait_stream(torch.cuda.current_stream())
            try:
                try:
                    return record(body)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                # The error is gone, and with it the memory of the attempt. A capture cannot use memory that
                # torch caches for other pools.
                torch.cuda.empty_cache()
                return record(body)
            finally:
                torch.cuda.current_stream().wait_stream(side)

    return capture


def _refuse_waiting(body: Body) -> None:
    """Run it once; raise RuntimeError if the host waits for the device, which would break a capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]ynchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            body()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Context manager without garbage collection: freeing CUDA memory ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
