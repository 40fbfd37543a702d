"""``Plan``: tensors that are checked once and written many times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from rft_fast.kernels import library, registry
from rft_fast.kernels.containers import Tensors, sources
from rft_fast.kernels.contract import (
    PER_TENSOR,
    WRITE_ARGUMENTS,
    Add,
    Each,
    Requests,
    Write,
    is_list,
    requests,
    spread,
)
from rft_fast.kernels.functions import errors_by_own_name
from rft_fast.kernels.places import Offset, blocks_at
from rft_fast.kernels.rows import ROLES, check_runs, device_of, make_rows, mark_written
from rft_fast.names import Fill, Impl, Names, Noise, On, Weight


class Plan:
    """A table of (output, zero-shot, fine-tuned) tensors, checked once and written many times.

    Args:
        out: Tensors to write into, of any shape: one, any iterable of them, a module (its parameters), named
            tensors (a mapping or pairs), or parameter groups.
        zeroshot: As many tensors of the same shapes and layouts: the weights at alpha = 0. Named tensors are
            matched by name, others by order.
        finetuned: As many tensors of the same shapes and layouts: the weights at alpha = 1.
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".
        names: What error messages call the tensors; None: their names in ``out``, or "tensor 0" ...
        offsets: Where the noise and the mask of each tensor start in those of the whole model, in elements,
            multiples of 4, in a list or by name (:func:`rft_fast.offsets`); or one number, from which the
            tensors follow each other.

    Each tensor may be float32, bfloat16 or float16, whatever the others are, and dense in memory in any order
    of its dimensions; all are on one device. Of a DTensor the local part is written, with the noise of its
    place. An output may be its own source (in place), and may share memory with nothing else.

    The noise of a tensor starts at its position in the table, or at its offset, the same whichever tensors
    are written. The plan keeps the tensors' memory alive and writes to the memory that it was made for: after
    re-binding a parameter's ``.data``, make a new plan. A write does not check that the memory still
    exists, so do not resize storage under a plan, as FSDP does (``Path`` checks it). Several threads may
    write one plan as long as their runs share no tensors; two plans share no state.

    Write outside of code that ``torch.compile`` compiles: weights stay where they are, so that a compiled
    model sees the new values. Inside, a write is one operator of the graph with the same result, but it
    builds its table on every call, and each new alpha or rho recompiles (a new seed or draw does not).

    Attributes:
        impl: Name of the backend in use.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: An offset is no multiple of 4, or noise overlaps; tensors differ in names, shape, layout,
            sharding or device, have gaps in memory, or overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> plan = Plan(live, zeroshot, finetuned)  # three lists of tensors
        >>> plan.write(0.4, rho=0.05, seed=0, draw=3)  # all of them
        >>> plan.write(0.4, tensors=[(2, 4)])  # tensors 2 and 3 again, without noise
    """

    def __init__(
        self,
        out: Tensors,
        zeroshot: Tensors,
        finetuned: Tensors,
        impl: Impl = "auto",
        names: Names | None = None,
        offsets: Offset = 0,
    ) -> None:
        (outs, own), w0, w1 = sources(out, zeroshot, finetuned, ROLES)
        blocks = blocks_at((outs, own), offsets, "offsets")
        rows = make_rows(outs, w0, w1, own if names is None else list(names), blocks)
        backend = registry.pick(impl, device_of(rows))
        self.impl = backend.name
        self._rows = rows
        self._outs = [row.out for row in rows]
        self._sharded = any(row.whole is not None for row in rows)
        self._table = backend.table(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Plan: a Plan writes to the memory of its tensors, so it cannot be copied or pickled; make a "
            "new Plan of the copied tensors"
        )

    def write(
        self,
        alpha: Each,
        *,
        tensors: Iterable[tuple[int, int]] | None = None,
        rho: Each = 0.0,
        on: On = "finetuned",
        keep: Each = 1.0,
        fill: Fill = "zero",
        noise: Noise = "normal",
        adaptive: bool = True,
        seed: int = 0,
        draw: int = 0,
        sign: int = 1,
    ) -> None:
        """Interpolate, perturb and mask tensors of the table, in place, as :func:`rft_fast.write_` does.

        Args:
            alpha: Position on the path: 0 is zero-shot, 1 is fine-tuned. Any finite number; outside [0, 1]
                the write extrapolates. (The paper's formulas write the mirrored alpha, its figures this one.)
            tensors: Half-open (first, last) runs of the table, in any order and without overlap; None: all.
            rho: Noise scale, finite and >= 0; 0 adds no noise (rho of Eq. 3).
            on: Weights that the noise is added to: "finetuned", before they are interpolated (Sec. 3.1), or
                "interpolated", after it (Eq. 3).
            keep: Probability, in [0, 1], that a fine-tuned weight survives the Bernoulli mask of Algorithm 1;
                1 masks nothing.
            fill: Value of a masked fine-tuned weight: "zero", or "zeroshot" for its zero-shot value.
            noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or
                "rademacher" (-1 or 1).
            adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
            seed: Key of the random generator, an integer in [0, 2**64). Decides the noise and the mask.
            draw: Number of the noise draw, an integer in [0, 2**32). All draws of a seed have the same mask.
            sign: 1, or -1 for the opposite noise (antithetic pairs).

        ``alpha``, ``rho`` and ``keep`` may each be a list with one number per tensor of the plan, whichever
        are written: still one launch, and equal numbers give the bits of the single number.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A number is out of range, or a list has another length than the plan; or runs overlap,
                or lie outside the table.
            RuntimeError: A CUDA graph is captured, and this form of write has not run before (Triton), or
                numbers differ from tensor to tensor.
        """
        numbers: library.Numbers = (alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
        if library.is_tracing():
            self._write_traced(tensors, numbers)
        else:
            named = dict(zip(WRITE_ARGUMENTS, numbers, strict=True))
            self._submit(requests(Write, named, PER_TENSOR, len(self)), tensors)

    def submit(
        self, write: Write | Sequence[Write], tensors: Iterable[tuple[int, int]] | None = None
    ) -> None:
        """As :meth:`write`, with numbers that were validated before.

        Args:
            write: The numbers of the write; or those of each tensor of the plan, whichever are written, which
                may differ in alpha, rho and keep.
            tensors: Half-open (first, last) runs of the table, in any order and without overlap; None: all.

        Raises:
            TypeError: ``tensors`` is not a list of pairs of integers.
            ValueError: Runs overlap, or lie outside the table.
        """
        if library.is_tracing():
            each = [write] if isinstance(write, Write) else write
            columns = ([getattr(one, name) for one in each] for name in WRITE_ARGUMENTS)
            listed = [len(each) > 1 and name in PER_TENSOR for name in WRITE_ARGUMENTS]
            self._write_traced(
                tensors, tuple(col if many else col[0] for col, many in zip(columns, listed, strict=True))
            )
        else:
            self._submit(write, tensors)

    @errors_by_own_name
    def add(
        self, scale: Each, weight: Weight = "none", *, tensors: Iterable[tuple[int, int]] | None = None
    ) -> None:
        """Write ``out = finetuned + scale * factor(finetuned) * zeroshot``, as :func:`rft_fast.add_` does.

        That is ``add_(out, w, b, scale, weight)`` of a ``Plan(out, b, w)``, in one launch.

        Args:
            scale: Factor of what is added, finite; 0 copies the fine-tuned weights. Or a list with one number
                per tensor of the plan, whichever are written.
            weight: Further factor: "none", "abs" (``|finetuned|``) or "square".
            tensors: Half-open (first, last) runs of the table, in any order and without overlap; None: all.

        Raises:
            TypeError, ValueError, RuntimeError: As for :meth:`write`.

        Example:
            >>> plan = Plan(params, grads, before)
            >>> plan.add(rho / rft.norm(grads))  # SAM's ascent
        """
        numbers: dict[str, Any] = {"scale": scale, "weight": weight}
        if library.is_tracing():
            (outs, bs, ws), _, names = self._part(tensors, numbers, ("scale",))
            library.add_(outs, ws, bs, **numbers, impl=self.impl, names=names)
        else:
            self._submit(requests(Add, numbers, ("scale",), len(self)), tensors)

    def _submit(self, request: Requests, tensors: Iterable[tuple[int, int]] | None) -> None:
        runs = [(0, len(self))] if tensors is None else check_runs(tensors, len(self))
        self._table.write(runs, request)
        if self._sharded:
            mark_written([row for first, last in runs for row in self._rows[first:last]])
            return
        for first, last in runs:  # the same, in less time
            torch.autograd.graph.increment_version(self._outs[first:last])

    def _write_traced(self, tensors: Iterable[tuple[int, int]] | None, numbers: library.Numbers) -> None:
        named = dict(zip(WRITE_ARGUMENTS, numbers, strict=True))
        (outs, w0, w1), blocks, names = self._part(tensors, named, PER_TENSOR)
        library.write_(outs, w0, w1, tuple(named.values()), self.impl, blocks, names)

    def _part(
        self, tensors: Iterable[tuple[int, int]] | None, numbers: dict[str, Any], listed: Sequence[str]
    ) -> tuple[tuple[list[Tensor], ...], list[int], list[str]]:
        """Return the tensors of runs by role, their first blocks, and their names.

        Args:
            tensors: Runs, as for :meth:`write`.
            numbers: Arguments by name. A list with a number for each tensor of the plan becomes one with
                those of the runs.
            listed: Names of those that may be a list.
        """
        runs = [(0, len(self))] if tensors is None else check_runs(tensors, len(self))
        rows = [row for first, last in runs for row in self._rows[first:last]]
        if any(row.whole is not None for row in rows):
            raise RuntimeError(
                "write: this plan writes DTensors, which compiled code cannot; write outside of the compiled "
                "function, which then sees the new weights"
            )
        for name in listed:
            if is_list(numbers[name]):
                each = spread(name, numbers[name], len(self))
                numbers[name] = [number for first, last in runs for number in each[first:last]]
        parts = [row.out for row in rows], [row.zeroshot for row in rows], [row.finetuned for row in rows]
        return parts, [row.first_block for row in rows], [row.name for row in rows]
