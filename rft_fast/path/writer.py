"""Writers: what carries out the writes that a Path decides on.

A :class:`rft_fast.Path` decides which layers are written, with which numbers, and which layers must be
restored. :class:`InPlace` writes them; :class:`rft_fast.run.cost.CountingWriter` counts them. So the cost of
a study is counted by the code that decides on its writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

from rft_fast.kernels import Plan, Write
from rft_fast.names import Impl
from rft_fast.path.requests import Groups
from rft_fast.path.slots import Part, Slot, Weight


class Writer(Protocol):
    """Carries out the writes that a :class:`rft_fast.Path` decides on."""

    def check(self, parts: Sequence[Part]) -> None:
        """Raise RuntimeError unless these parts of the live model and its ends can be written."""

    def write(self, groups: Groups, buffers: bool) -> list[str]:
        """Write some of the live tensors from their ends, all in one launch of the kernel.

        Args:
            groups: Numbers, and the tensors that are written with them. Buffers are interpolated only.
            buffers: False leaves buffers unchanged.

        Returns:
            Names of the tensors whose dtype cannot represent the result; empty if it is finite everywhere.
        """

    def weights(self, slots: Sequence[Slot]) -> list[Weight]:
        """Return these float parameters, for reading."""

    def borrowed(self, slots: Sequence[Slot]) -> list[Weight]:
        """Return these float parameters, which the caller changes before the path restores them."""

    def warn(self, text: str) -> None:
        """Issue a UserWarning on behalf of the caller of a study, each text once."""


class InPlace:
    """Writes the live tensors in place, with one plan of the parameters and one of the buffers.

    Args:
        slots: All tensors of the live model, with their ends. Their ``row`` is set.
        impl: The kernel backend, see :class:`rft_fast.Plan`.

    Attributes:
        parameters: Plan of the float parameters.
        buffers: Plan of the float buffers.
        impl: Name of the backend in use.
    """

    def __init__(self, slots: Sequence[Slot], impl: Impl) -> None:
        self.parameters = _plan([s for s in slots if s.is_float and s.is_parameter], impl)
        self.buffers = _plan([s for s in slots if s.is_float and not s.is_parameter], impl)
        self.impl: Impl = self.parameters.impl
        self._said: set[str] = set()

    def check(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.check()

    def write(self, groups: Groups, buffers: bool) -> list[str]:
        _submit(self.parameters, [(request, rows.parameters) for request, rows in groups])
        if buffers and any(rows.buffers for _, rows in groups):
            _submit(self.buffers, [(Write(request.alpha), rows.buffers) for request, rows in groups])
        lost = []
        for request, rows in groups:
            for slot in rows.integers:
                if buffers or slot.is_parameter:
                    slot.tensor.copy_(slot.ends[0 if request.alpha < 0.5 else 1])
            lost += rows.not_finite() if rows.may_overflow(request) else []
        return lost

    def weights(self, slots: Sequence[Slot]) -> list[Weight]:
        return [Weight(slot.name, slot.tensor, *slot.ends) for slot in slots]

    borrowed = weights

    def warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=4)


def _submit(plan: Plan, groups: Sequence[tuple[Write, list[tuple[int, int]]]]) -> None:
    """Write runs of a plan, each with its numbers, in one launch."""
    if len(groups) == 1:
        plan.submit(*groups[0])
        return
    each = [groups[0][0]] * len(plan)
    for request, runs in groups:
        for first, last in runs:
            each[first:last] = [request] * (last - first)
    plan.submit(each, [run for _, runs in groups for run in runs])


def _plan(slots: Sequence[Slot], impl: Impl) -> Plan:
    for row, slot in enumerate(slots):
        slot.row = row
    zeroshot, finetuned = ([slot.ends[end] for slot in slots] for end in (0, 1))
    return Plan([s.tensor for s in slots], zeroshot, finetuned, impl, [s.name for s in slots])
