"""Products of float32 matrices as three products of bfloat16 matrices, with float32 sums.

Each operand is split into two bfloat16 numbers, x = hi + lo + rest: hi is x rounded to bfloat16, lo is what
is left, rounded likewise, and abs(rest) <= 2**-16 abs(x). Of (hi + lo) (hi' + lo') the smallest term, lo lo',
is left out, so each product of two elements is off by at most about 3 * 2**-16 of itself (Henry, Tang and
Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH
2019). bfloat16 has the range of float32, so there are no scales. Operands must be finite and below 3.38e38,
where bfloat16 ends.

Both halves stand side by side, so it is one product: [lo hi hi] [hi' lo' hi'].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ATEN: Any = torch.ops.aten


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into two bfloat16 numbers, x = hi + lo + rest with abs(rest) <= 2**-16 abs(x).

    Args:
        x: float32, any shape.

    Returns:
        hi and lo, of the same shape.
    """
    hi = x.bfloat16()
    return hi, (x - hi).bfloat16()  # the difference is float32, and exact


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices like ``a @ b``, by split products where both are float32.

    Can be differentiated, any number of times: derivatives are split products, too. Can run under
    ``torch.vmap``.

    Args:
        a: [..., m, k].
        b: [k, n], or [..., k, n] with the leading dimensions of ``a``.

    Returns:
        [..., m, n].
    """
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        return a @ b
    shape = (*a.shape[:-1], b.shape[-1])
    if b.ndim == 2:
        left, right = a.flatten(0, -2), b
    else:
        left, right = a.flatten(0, -3), b.flatten(0, -3)
    found: Tensor = _Product.apply(left, right)
    return found.reshape(shape)


class _Product(torch.autograd.Function):
    """a b of float32 matrices [m, k], [k, n], or of as many of them, [i, m, k], [i, k, n]."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        (a_hi, a_lo), (b_hi, b_lo) = halves(a), halves(b)
        left, right = torch.cat([a_lo, a_hi, a_hi], -1), torch.cat([b_hi, b_lo, b_hi], -2)
        # Overloads: modes that look for torch.mm, and split it, do not see these.
        multiply = _ATEN.mm if a.ndim == 2 else _ATEN.bmm
        found: Tensor
        if a.device.type == "cuda":
            found = multiply.dtype(left, right, torch.float32)
        else:  # products of two bfloat16 numbers are exact in float32
            found = multiply.default(left.float(), right.float())
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        first = product(gradient, b.mT) if ctx.needs_input_grad[0] else None
        return first, product(a.mT, gradient) if ctx.needs_input_grad[1] else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        in_a, in_b = in_dims
        many: int = info.batch_size
        if in_a is not None:
            a = a.movedim(in_a, 0)
        if in_b is not None:
            b = b.movedim(in_b, 0)
        if in_b is None and b.ndim == 2:  # the same matrix for all
            return product(a, b), 0
        a = a if in_a is not None else a.expand(many, *a.shape)
        b = b if in_b is not None else b.expand(many, *b.shape)
        return product(a, b), 0
