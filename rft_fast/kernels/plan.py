"""The dispatcher: ``Plan`` for tensors that are written again and again, functions for single calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NoReturn, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from rft_fast.kernels import library, registry
from rft_fast.kernels.contract import WRITE_ARGUMENTS, Write, as_list, check_runs, device_of, make_rows
from rft_fast.names import Fill, Impl, Names, Noise, On

Tensors = Tensor | Iterable[Tensor]

P = ParamSpec("P")
R = TypeVar("R")


class Plan:
    """A table of (output, zero-shot, fine-tuned) tensors, checked once and written many times.

    out, zeroshot, finetuned: tensors, or equally many in any iterable; the three of a row have
    equal shapes and each any of float32, bfloat16, float16; all are contiguous and on one device. An
    output may be its own source (in place) and may overlap nothing else.
    impl: "auto", "native", "triton" or "reference"; ``plan.impl`` tells which one was picked.
    names: what error messages call the rows.

    The plan keeps the tensors' memory alive and writes to the memory that it was made for: after
    re-binding a parameter's ``.data``, make a new plan. A write does not look whether the memory is still
    there, so resize no storage under a plan, as FSDP does (a ``Path`` does look). One plan may be written
    from several threads as long as their runs do not touch the same rows; two plans never share state.

    Best written outside of code that torch.compile compiles: the weights stay where they are, so a compiled
    model sees the new ones. Inside, a write is one operator of the graph with the same result, but makes
    its table anew each time, and every new alpha or rho is compiled anew (a new seed or draw is not).

    Raises TypeError, ValueError (tensors), RuntimeError (a backend that does not work here).
    """

    def __init__(
        self,
        out: Tensors,
        zeroshot: Tensors,
        finetuned: Tensors,
        impl: Impl = "auto",
        names: Names | None = None,
    ) -> None:
        rows = make_rows(out, zeroshot, finetuned, None if names is None else list(names))
        backend = registry.pick(impl, device_of(rows))
        self.impl = backend.name
        self._rows = rows
        self._outs = [row.out for row in rows]
        self._table = backend.table(rows)

    def __len__(self) -> int:
        return len(self._outs)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Plan: it writes to the memory that it was made for, so it cannot be copied or pickled; "
            "make a new Plan of the copied tensors"
        )

    def write(
        self,
        alpha: float,
        *,
        tensors: Iterable[tuple[int, int]] | None = None,
        rho: float = 0.0,
        on: On = "finetuned",
        keep: float = 1.0,
        fill: Fill = "zero",
        noise: Noise = "normal",
        adaptive: bool = True,
        seed: int = 0,
        draw: int = 0,
        sign: int = 1,
    ) -> None:
        """Writes the rows in ``tensors``, half-open (first, last) runs of the table; None: all.

        Runs may come in any order, and may not overlap.
        The other arguments are those of :class:`~rft_fast.kernels.contract.Write`. A row's noise and
        mask depend on (seed, draw) and its place in the table only, not on which rows are written.
        """
        numbers: library.Numbers = (alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
        if library.is_tracing():
            self._write_traced(tensors, numbers)
        else:
            self.submit(Write(*numbers), tensors)

    def submit(self, write: Write, tensors: Iterable[tuple[int, int]] | None = None) -> None:
        """As ``write``, with arguments that were validated before."""
        if library.is_tracing():
            self._write_traced(tensors, tuple(getattr(write, name) for name in WRITE_ARGUMENTS))
            return
        rows = len(self._outs)
        runs = [(0, rows)] if tensors is None else check_runs(tensors, rows)
        self._table.write(runs, write)
        # Autograd must notice that saved tensors have changed, as after any in-place operation.
        for first, last in runs:
            torch.autograd.graph.increment_version(self._outs[first:last])

    def _write_traced(self, tensors: Iterable[tuple[int, int]] | None, numbers: library.Numbers) -> None:
        runs = [(0, len(self._rows))] if tensors is None else check_runs(tensors, len(self._rows))
        rows = [row for first, last in runs for row in self._rows[first:last]]
        library.write_(
            [row.out for row in rows],
            [row.zeroshot for row in rows],
            [row.finetuned for row in rows],
            numbers,
            self.impl,
            [row.first_block for row in rows],
        )


def _says_its_name(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose errors begin with its own name instead of the contract's ``write``."""

    @functools.wraps(function)
    def named(*arguments: P.args, **others: P.kwargs) -> R:
        try:
            return function(*arguments, **others)
        except (TypeError, ValueError, RuntimeError) as error:
            if str(error).startswith("write: "):
                error.args = (str(error).replace("write", function.__name__, 1),)
            raise

    return named


def write_(
    out: Tensors,
    zeroshot: Tensors,
    finetuned: Tensors,
    alpha: float,
    rho: float = 0.0,
    on: On = "finetuned",
    keep: float = 1.0,
    fill: Fill = "zero",
    noise: Noise = "normal",
    adaptive: bool = True,
    seed: int = 0,
    draw: int = 0,
    sign: int = 1,
    impl: Impl = "auto",
) -> None:
    """Interpolates, perturbs and masks in one pass, in place into ``out``.

    Tensors as for :class:`Plan`, numbers as for :class:`~rft_fast.kernels.contract.Write`. Tensor t of a
    list draws its noise from position t, so a list and its tensors one by one differ. For tensors that
    are written repeatedly, a ``Plan`` saves the checks and the table. On a GPU the call is in order with the
    current stream and waits for nothing. Differentiates nothing: the outputs' history is that of a write
    under ``torch.no_grad``.
    """
    numbers: library.Numbers = (alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
    tensors = as_list("out", out), as_list("zeroshot", zeroshot), as_list("finetuned", finetuned)
    if library.is_traced(tensors[0]):
        library.write_(*tensors, numbers, impl)
        return
    request = Write(*numbers)  # refused before anything is made
    rows = make_rows(*tensors)
    registry.pick(impl, device_of(rows)).write(rows, request)
    torch.autograd.graph.increment_version([row.out for row in rows])


@_says_its_name
def interpolate_(
    out: Tensors, zeroshot: Tensors, finetuned: Tensors, alpha: float, impl: Impl = "auto"
) -> None:
    """out = (1 - alpha) * zeroshot + alpha * finetuned, exact at alpha = 0 and 1.

    The paper's formulas write the mirrored alpha; its figures, WiSE-FT's code and this package agree.
    """
    write_(out, zeroshot, finetuned, alpha, impl=impl)


@_says_its_name
def perturb_(
    params: Tensors,
    rho: float,
    seed: int = 0,
    draw: int = 0,
    adaptive: bool = True,
    noise: Noise = "normal",
    sign: int = 1,
    impl: Impl = "auto",
) -> None:
    """params += sign * rho * (|params| if adaptive else 1) * eps, in place (Eq. 3's delta).

    There is no inverse: floating-point addition loses bits, so keep the weights and write them again
    (``Plan``, ``Path``) instead of subtracting.
    """
    tensors = as_list("params", params)  # once: a generator gives them only once
    write_(
        tensors,
        tensors,
        tensors,
        1.0,
        rho,
        noise=noise,
        adaptive=adaptive,
        seed=seed,
        draw=draw,
        sign=sign,
        impl=impl,
    )


@overload
def noise_like(
    params: Tensor, seed: int = 0, draw: int = 0, noise: Noise = "normal", impl: Impl = "auto"
) -> Tensor: ...
@overload
def noise_like(
    params: Iterable[Tensor],
    seed: int = 0,
    draw: int = 0,
    noise: Noise = "normal",
    impl: Impl = "auto",
) -> list[Tensor]: ...
@_says_its_name
def noise_like(
    params: Tensors, seed: int = 0, draw: int = 0, noise: Noise = "normal", impl: Impl = "auto"
) -> Tensor | list[Tensor]:
    """The noise eps that the kernels use for these tensors: float32, same shapes and device."""
    like = _float32_like(params, torch.zeros_like)
    write_(like, like, like, 1.0, 1.0, noise=noise, adaptive=False, seed=seed, draw=draw, impl=impl)
    return like[0] if isinstance(params, Tensor) else like


@overload
def keep_mask_like(params: Tensor, keep: float, seed: int = 0, impl: Impl = "auto") -> Tensor: ...
@overload
def keep_mask_like(
    params: Iterable[Tensor], keep: float, seed: int = 0, impl: Impl = "auto"
) -> list[Tensor]: ...
@_says_its_name
def keep_mask_like(params: Tensors, keep: float, seed: int = 0, impl: Impl = "auto") -> Tensor | list[Tensor]:
    """The mask that the kernels use for these tensors: bool, True where the weight is kept."""
    like = _float32_like(params, torch.ones_like)
    write_(like, like, like, 1.0, keep=keep, seed=seed, impl=impl)
    masks = [tensor.bool() for tensor in like]
    return masks[0] if isinstance(params, Tensor) else masks


def _float32_like(params: Tensors, make: Callable[..., Tensor]) -> list[Tensor]:
    return [
        make(p, dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False)
        for p in as_list("params", params)
    ]
