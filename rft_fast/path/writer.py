"""The seam between what a Path decides and what is done: which layers are written how, and the writing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

from rft_fast.kernels import Plan, Write
from rft_fast.names import Impl
from rft_fast.path.slots import Part, Rows, Slot, Weight


class Writer(Protocol):
    """Carries out what a :class:`rft_fast.Path` decides."""

    def check(self, parts: Sequence[Part]) -> None:
        """Raises RuntimeError unless these parts of the live model and its ends can be written."""

    def write(self, request: Write, rows: Rows, buffers: bool) -> list[str]:
        """Writes some of the live tensors from their ends.

        Args:
            request: the numbers of the write. Buffers are interpolated alone.
            rows: the tensors.
            buffers: False leaves buffers as they are.

        Returns:
            The names of the tensors whose dtype could not hold the result, which is in them none the less.
        """

    def weights(self, slots: Sequence[Slot]) -> list[Weight]:
        """These float parameters, to be read."""

    def borrowed(self, slots: Sequence[Slot]) -> list[Weight]:
        """These float parameters, whose live tensors will be changed until the path restores them."""

    def warn(self, text: str) -> None:
        """Warns the caller of the study that found this out."""


class InPlace:
    """Writes the live model's tensors in place, by one plan of its parameters and one of its buffers.

    Args:
        slots: all of the live model's, with their ends. Each gets its row in the plans.
        impl: the kernel backend, see :class:`rft_fast.Plan`.
    """

    def __init__(self, slots: Sequence[Slot], impl: Impl) -> None:
        self.parameters = _plan([s for s in slots if s.is_float and s.is_parameter], impl)
        self.buffers = _plan([s for s in slots if s.is_float and not s.is_parameter], impl)
        self.impl: Impl = self.parameters.impl

    def check(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.check()

    def write(self, request: Write, rows: Rows, buffers: bool) -> list[str]:
        self.parameters.submit(request, rows.parameters)
        if rows.buffers and buffers:
            self.buffers.submit(Write(request.alpha), rows.buffers)
        for slot in rows.integers:
            if buffers or slot.is_parameter:
                slot.tensor.copy_(slot.ends[0 if request.alpha < 0.5 else 1])
        return rows.not_finite() if rows.may_overflow(request) else []

    def weights(self, slots: Sequence[Slot]) -> list[Weight]:
        return [Weight(slot.name, slot.tensor, *slot.ends) for slot in slots]

    borrowed = weights

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=4)


def _plan(slots: Sequence[Slot], impl: Impl) -> Plan:
    for row, slot in enumerate(slots):
        slot.row = row
    zeroshot, finetuned = ([slot.ends[end] for slot in slots] for end in (0, 1))
    return Plan([s.tensor for s in slots], zeroshot, finetuned, impl, [s.name for s in slots])
