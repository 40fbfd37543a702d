"""Functions of tensors as flat lists of torch's operations, recorded once for each shape and then replayed.

A replay has the operations of the function and so its bits. It has no ``torch.vmap``, no modes, no modules
and no layers of Python around them: with small batches these cost as much as the operations, and hold the
interpreter's lock against batches that run side by side.

On a CUDA device, short recordings become CUDA graphs. What differs from draw to draw (activations, base
perturbations, signs) is an argument of the function and copied into the graph's buffers, so a graph is valid
for every draw.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .graphs import SHORT, WARM, Body, Capture
from .stages import TOLERANCE

MOST = 4096
"""Recordings that are kept, those made last; each takes some 20 KiB, and no memory of tensors."""

LARGEST = 8 << 20
"""Bytes of the largest argument of what is recorded: larger ones take far longer than the Python around them,
and a recording holds all that is computed in between while it is made.
"""

Function = Callable[..., Tensor]

# One recording at a time: torch keeps in flags of the whole process whether a mode is active. Two modes that
# overlap would leave them set, and the kernels would take every later call for a traced one.
_RECORDING = threading.Lock()


class Replays:
    """Runs functions; from the third run with the same shapes on by a recording of the second.

    Weights are read where they are, so a recording sees what is written into them. A tensor that replaces a
    weight in the module is not seen: Path.check refuses it, an Evaluator alone does not. Several threads may
    use it at once, unless it makes CUDA graphs.

    Args:
        capture: Makes CUDA graphs, see :func:`rft_fast.evaluate.graphs.on`; None: recordings stay Python.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        # True: it has run once. None: it cannot be recorded.
        self._known: OrderedDict[tuple[object, ...], Function | bool | None] = OrderedDict()

    def run(self, key: object, function: Function, args: Sequence[Tensor], reads: Sequence[Tensor]) -> Tensor:
        """Return ``function(*args)``, the same bits.

        Args:
            key: What names the function.
            function: Changes none of its arguments.
            args: Distinct tensors.
            reads: The model's tensors that it reads besides.
        """
        if max(x.nbytes for x in args) > LARGEST:
            return function(*args)
        full = (key, *((x.shape, x.stride(), x.dtype) for x in args))
        known = self._known.get(full, False)
        if known is True:
            with _RECORDING:
                known = self._known.get(full)  # another thread may have recorded it meanwhile
                if known is True:
                    found, recorded = _record(function, args, reads)
                    if recorded is not None and self._capture is not None:
                        recorded = _Graph(recorded, self._capture, self._buffer)
                    self._known[full] = recorded
                    return found
        if callable(known):
            return known(*args)
        if known is False:
            self._known[full] = True
            while len(self._known) > MOST:
                self._known.popitem(last=False)
        return function(*args)

    def clear(self) -> None:
        """Drop all recordings and free the memory of their graphs."""
        self._known.clear()
        self._buffers.clear()

    def _buffer(self, role: object, like: Tensor) -> Tensor:
        """One for all graphs: each copies its arguments in and its result out."""
        key = (role, like.shape, like.stride(), like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
        return self._buffers[key]

    def __len__(self) -> int:
        return sum(map(callable, self._known.values()))


class _Graph:
    """A recording that becomes a CUDA graph on its third run, if its tensors are small.

    Args:
        function: The recording.
        capture: Makes CUDA graphs.
        buffer: (role, a tensor) -> a buffer of its shape, strides and dtype for that role.
    """

    def __init__(
        self, function: Function, capture: Capture, buffer: Callable[[object, Tensor], Tensor]
    ) -> None:
        self._function, self._capture, self._buffer = function, capture, buffer
        self._runs, self._short = 0, False
        self._replay: Body | None = None
        self._args: list[Tensor] = []
        self._result: Tensor | None = None

    def __call__(self, *args: Tensor) -> Tensor:
        self._runs += 1
        if self._replay is None and self._short and self._runs > WARM:
            self._record(args)
        if self._replay is None or self._result is None:
            found = self._function(*args)
            # An expanded tensor has no memory of its own to copy to.
            apart = all(
                step or size == 1
                for x in (*args, found)
                for size, step in zip(x.shape, x.stride(), strict=True)
            )
            self._short = apart and sum(x.nbytes for x in (*args, found)) <= SHORT
            return found
        for buffer, x in zip(self._args, args, strict=True):
            buffer.copy_(x)
        self._replay()
        return self._result.clone()

    def _record(self, args: Sequence[Tensor]) -> None:
        self._args = [self._buffer(place, x) for place, x in enumerate(args)]
        for buffer, x in zip(self._args, args, strict=True):
            buffer.copy_(x)
        result = self._buffer("result", self._function(*self._args))

        def body() -> None:
            result.copy_(self._function(*self._args))

        try:
            self._replay = self._capture(body)
        except RuntimeError as error:
            self._runs = -sys.maxsize  # never again
            reason = str(error).partition("\n")[0]
            warnings.warn(f"Evaluator: a stage runs without a CUDA graph: {reason}", stacklevel=2)
        else:
            self._result = result


class _Unknown(Exception):
    """Why a function cannot be recorded."""


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down, as Python, the operations that run while it is active.

    Args:
        args: Tensors that differ from run to run.
    """

    def __init__(self, args: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(x): f"x{number}" for number, x in enumerate(args)}
        self._kept: list[Tensor] = list(args)  # so that no other tensor gets the id of one
        self._lines: list[tuple[list[str], str, list[str]]] = []  # results, call, what it reads
        self._known: dict[str, Any] = {}
        self.constants: dict[int, Tensor] = {}
        self.reason: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reads: list[str] = []
        given = [self._text(value, reads) for value in args]
        given += [f"{name}={self._text(value, reads)}" for name, value in kwargs.items()]
        results = [self._result(value) for value in (out if isinstance(out, (tuple, list)) else (out,))]
        changed = func._schema.is_mutable or any(name != "y_" for name in results)
        if changed and torch.Tag.nondeterministic_seeded in func.tags:  # dropout in eval mode changes nothing
            self.reason = "it draws random numbers"
        call = f"{self._constant(func)}({', '.join(given)})"
        left = ", ".join(results) + ("," if isinstance(out, (tuple, list)) else "")
        self._lines.append((results, f"{left} = {call}", reads))
        return out

    def _text(self, value: Any, reads: list[str]) -> str:
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self._text(each, reads)}, " for each in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, Tensor):
            if (name := self._names.get(id(value))) is None:
                name = self._constant(value)
                self._names[id(value)], self.constants[id(value)] = name, value
            reads.append(name)
            return name
        return repr(value) if value is None or type(value) in (bool, int) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._known)}"
        self._known[name] = value
        return name

    def _result(self, value: Any) -> str:
        if not isinstance(value, Tensor):
            if value is not None:
                self.reason = "it looks at numbers"
            return "y_"
        if id(value) in self._names:  # changed in place, or given back as it is
            return "y_"
        self._names[id(value)] = f"y{len(self._kept)}"
        self._kept.append(value)
        return self._names[id(value)]

    def function(self, count: int, result: Tensor) -> Function:
        """Return what was recorded as a function of ``count`` tensors. Frees each when it was used last.

        Raises:
            _Unknown: the result is none of a recorded operation.
        """
        if self.reason is not None or not (name := self._names.get(id(result), "")).startswith("y"):
            raise _Unknown(self.reason or "what it returns is not computed here")
        lines = [f"    return {name}"]
        later = {name}
        for results, line, reads in reversed(self._lines):
            freed = {x for x in (*results, *reads) if x[0] in "xy"} - later
            lines += [f"    del {', '.join(sorted(freed))}"] if freed else []
            lines.append(f"    {line}")
            later |= freed
        head = f"def replay({', '.join(f'x{number}' for number in range(count))}):"
        names = dict(self._known)
        exec("\n".join([head, *reversed(lines)]), names)
        found: Function = names["replay"]
        return found


def _record(
    function: Function, args: Sequence[Tensor], reads: Sequence[Tensor]
) -> tuple[Tensor, Function | None]:
    """Run a function. Returns its result, and its recording; None if that computes anything else."""
    if len({id(x) for x in args}) < len(args):
        return function(*args), None
    tape = _Tape(args)
    with tape:
        expected = function(*args)
    try:
        if not _refers(tape.constants.values(), reads):
            return expected, None
        recorded = tape.function(len(args), expected)
        del tape
        found = recorded(*args)
    except (_Unknown, RuntimeError):  # the function has run: only the shortcut is lost
        return expected, None
    return expected, recorded if _same(found, expected) else None


def _refers(constants: Any, reads: Sequence[Tensor]) -> bool:
    """Whether a recording reads the function's tensors where they are, and no others.

    A tensor whose numbers the function has looked at is missing. One that it has made of them is foreign.
    """
    found = {x.data_ptr() for x in constants}
    wanted = {x.data_ptr() for x in reads if x.is_floating_point()}
    return wanted <= found <= {x.data_ptr() for x in reads}


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    # Libraries of a GPU may round the same product differently.
    close = 0.0 if expected.device.type == "cpu" else TOLERANCE
    return torch.allclose(found, expected, rtol=close, atol=close, equal_nan=True)
