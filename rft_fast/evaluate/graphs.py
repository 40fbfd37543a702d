"""CUDA graphs of stages: the launches of a stage recorded once, and replayed after every write.

Weights are written in place, so a recorded stage reads the new ones.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stages import Stage

Body = Callable[[], None]
Capture = Callable[[Body], Body]  # a callable that is recorded without taking effect -> what replays it

# A stage runs as it is the first times: libraries choose their algorithms then, and a shape that does not
# come back is not worth a recording.
WARM = 2


@dataclass
class _Recorded:
    runs: int = 0
    replay: Body | None = None
    source: Tensor | None = None
    result: Tensor | None = None


class Graphs:
    """Runs chains of stages, recorded from the third time on that a stage meets a shape.

    capture: makes the recordings, see :func:`on`.

    Results lie in buffers that the next run overwrites. Between stages there are two such buffers of each
    shape and type, taken in turns. One thread and one stream at a time.
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
            if record.replay is None and (record.runs <= WARM or stage.reads_inputs):
                x = stage.run(x, x if inputs is None else inputs)
                continue
            if record.replay is None:
                self._record(record, stage, index, x)
            if record.replay is None or record.source is None or record.result is None:
                x = stage.run(x, x if inputs is None else inputs)  # it could not be recorded
                continue
            _put(record.source, x)
            record.replay()
            x = record.result
        return x

    def clear(self) -> None:
        """Forgets all recordings, and gives their memory back."""
        self._recorded.clear()
        self._buffers.clear()

    def _record(self, record: _Recorded, stage: Stage, index: int, x: Tensor) -> None:
        source = self._buffer(index % 2, x)
        # What the stage returns dies with the recording, so that later ones use its memory again. Its shape
        # comes from one more run.
        result = self._buffer(1 - index % 2, stage.run(x, x))

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


def on(device: torch.device) -> Capture:
    """Recordings on this CUDA device; all of them share one pool of memory for what is temporary."""
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(body: Body) -> Body:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    body()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)
        return graph.replay

    return capture
