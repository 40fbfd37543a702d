"""CUDA graphs of stages: the launches of a stage recorded once, and replayed after every write.

Weights are written in place, so a recorded stage reads the new ones. (A tensor that takes a weight's place in
the module is not seen by a recording; Path.check refuses it, an Evaluator alone does not.)
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
Capture = Callable[[Body], Body]  # a callable that is recorded without taking effect -> what replays it

# A stage runs as it is the first times: libraries choose their algorithms then, and a shape that does not
# come back is not worth a recording.
WARM = 2

SHORT = 8 << 20
"""Bytes of a stage's activations, those before and those after it together, up to which it is recorded.

A recording saves the host some 5 us a launch, and costs one more copy of these activations: they are read
and written, 3.5 us at most at an H200's 4.8 TB/s, less than one launch. Stages with more are left as they
are: an MLP of ViT-L/14 in bfloat16 with 8 MiB (2,048 tokens) computes for some 60 us, and its six launches
take 30, so that the host is ahead without recordings; it would lose the copy's share, some 4 %. Small
models stay below: a batch of 512 of the digits zoo has 4.3 MiB. Chosen for an H200 by calculation; not
measured.
"""


@dataclass
class _Recorded:
    runs: int = 0
    short: bool = False  # as its last run was
    replay: Body | None = None
    source: Tensor | None = None
    result: Tensor | None = None


class Graphs:
    """Runs chains of stages; short ones are recorded from the third time on that they meet a shape.

    capture: makes the recordings, see :func:`on`.

    Results lie in buffers that the next run overwrites. Between stages there are two such buffers of each
    shape and type, taken in turns. One thread and one stream of a device at a time, whoever's recordings they
    are: what they need for the moment lies in the same memory.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def run(
        self, stages: tuple[Stage, ...], first: int, last: int, x: Tensor, inputs: Tensor | None
    ) -> Tensor:
        """Stages ``first`` to before ``last`` on x [n, ...]; as running them one by one, to the bit."""
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
                # One that looks at the chain's input would need that in place, too.
                record.short = not stage.reads_inputs and before + x.nbytes <= SHORT
                continue
            _put(record.source, x)
            record.replay()
            x = record.result
        return x

    def clear(self) -> None:
        """Forgets all recordings, and gives their memory back."""
        self._recorded.clear()
        self._buffers.clear()

    def _record(self, record: _Recorded, stage: Stage, index: int, x: Tensor) -> Tensor:
        """Returns x where it now lies: in the buffer, of whose memory it may have been a view until now."""
        source = self._buffer(index % 2, x)
        _put(source, x)
        # What the stage returns dies with the recording, so that later ones use its memory again. Its shape
        # comes from one more run, on the very memory that is recorded with.
        result = self._buffer(1 - index % 2, stage.run(source, source))

        def body() -> None:
            result.copy_(stage.run(source, source))

        try:
            record.replay = self._capture(body)
        except RuntimeError as error:
            record.runs = -sys.maxsize  # not tried again
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
    """Copies x to a buffer, where it may lie already; maybe as another view."""
    if x.data_ptr() == buffer.data_ptr() and x.stride() == buffer.stride():
        return
    shared = x.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    buffer.copy_(x.clone() if shared else x)


@cache
def on(device: torch.device) -> Capture:
    """Recordings on this CUDA device; all of them share one pool of memory for what is temporary.

    One stream and one pool for all evaluators: torch keeps a workspace of cuBLAS for each stream, which lies
    in the pool that was in use when it was made.
    """
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    living: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # of this pool
    pool: Any = None

    def record(body: Body) -> Body:
        nonlocal pool, living
        if pool is None or not living:  # torch refuses a pool that no graph uses any more
            pool, living = torch.cuda.graph_pool_handle(), WeakSet()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                body()
                graph.capture_end()
            except BaseException:
                # Some versions of torch leave it to us to end what a failed capture has begun. What of it has
                # ended by itself says so.
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
                # The error is gone, and with it what the attempt held. A capture can use nothing that torch
                # keeps for others.
                torch.cuda.empty_cache()
                return record(body)
            finally:
                torch.cuda.current_stream().wait_stream(side)

    return capture


def _refuse_waiting(body: Body) -> None:
    """Runs it once. Raises RuntimeError where the host waits for the device, which would spoil a capture."""
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
    """No dead cycle is collected within: freeing memory of CUDA's own ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
