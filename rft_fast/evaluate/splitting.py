"""Which products of a model are split, see :mod:`rft_fast.evaluate.split`.

Split are the products with weights: linear layers, the projections of attention, convolutions whose patches
do not overlap, ``x @ W`` with a matrix W. The others stay float32: convolutions whose patches overlap, and
attention's own products, Q K^T and P V. Split, these would make the error of a layer-wise sharpness three
times as large (docs/speed.md), and torch's kernels never hold the matrix of attention, which that needs.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .split import product
from .stages.tokens import attend

_STATE = threading.local()


def is_splitting() -> bool:
    """Whether products are split in this thread."""
    return getattr(_STATE, "on", False)


@contextmanager
def splitting(on: bool = True) -> Iterator[None]:
    """Context manager: products with weights are split products, in this thread. on: False: none are."""
    before = is_splitting()
    _STATE.on = on
    try:
        if on and not before:
            with _Splitting():
                yield
        else:
            yield
    finally:
        _STATE.on = before


class _Splitting(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_splitting() and (rule := _RULES.get(func)) is not None:
            found = rule(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim != 2 or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    found = product(x, weight.mT) if x.ndim > 1 else product(x[None], weight.mT)[0]
    return found if bias is None else found + bias


def _matmul(x: Tensor, other: Tensor) -> Any:
    if other.ndim != 2 or x.ndim < 2 or x.dtype != torch.float32:
        return NotImplemented
    return product(x, other)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Patches that do not overlap, as rows of a matrix."""
    high, wide = weight.shape[2:]
    patches = (
        groups == 1
        and _pair(stride) == (high, wide)
        and padding in (0, (0, 0), "valid")
        and _pair(dilation) == (1, 1)
    )
    if not patches or x.ndim != 4 or x.dtype != torch.float32:
        return NotImplemented
    rows, columns = x.shape[2] // high, x.shape[3] // wide
    x = x[:, :, : rows * high, : columns * wide]
    x = x.reshape(x.shape[0], x.shape[1], rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
    found = _linear(x.flatten(3), weight.flatten(1), bias)
    return found.permute(0, 3, 1, 2).contiguous()


_ARGUMENTS = {
    name: p.default for name, p in inspect.signature(F.multi_head_attention_forward).parameters.items()
}
_UNUSUAL = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")


def _attention(*args: Any, **kwargs: Any) -> Any:
    """F.multi_head_attention_forward of tokens [length, batch, width], as encoders of CLIP call it."""
    of = _ARGUMENTS | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    query, heads, mask = of["query"], of["num_heads"], of["attn_mask"]
    if of["add_zero_attn"] or of["need_weights"] or any(of[name] is not None for name in _UNUSUAL):
        return NotImplemented
    if query.ndim != 3 or (of["is_causal"] and mask is None) or (of["training"] and of["dropout_p"]):
        return NotImplemented
    inputs = (query, of["key"], of["value"])
    bias = of["in_proj_bias"]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    q, k, v = _projected(inputs, of, bias, biases)
    length, batch, width = q.shape
    q, k, v = (x.reshape(x.shape[0], batch, heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask  # true: where nothing is read
        mask = mask.view(batch, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
    mixed = F.scaled_dot_product_attention(q, k, v, mask)
    mixed = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
    return _linear(mixed, of["out_proj_weight"], of["out_proj_bias"]), None


def _projected(
    inputs: Sequence[Tensor], of: Mapping[str, Any], bias: Tensor | None, biases: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Queries, keys and values."""
    if of["use_separate_proj_weight"]:
        weights = [of[f"{name}_proj_weight"] for name in "qkv"]
    elif inputs[0] is inputs[1] is inputs[2]:
        return _linear(inputs[0], of["in_proj_weight"], bias).chunk(3, -1)
    else:
        weights = of["in_proj_weight"].chunk(3)
    return [_linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _attend(
    query: Tensor,
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
) -> Tensor:
    """:func:`rft_fast.evaluate.stages.tokens.attend`: its weights are applied to a vector per head."""
    wq, wk, wv = in_weight.view(3, heads, -1, in_weight.shape[1])  # [heads, e, d]
    bq, bk, bv = in_weight.new_zeros(3, 1, 1) if in_bias is None else in_bias.view(3, heads, 1, -1)
    one = query.squeeze(1)
    q = product(one.expand(heads, *one.shape), wq.mT) + bq  # [heads, n, e]
    scores = product(q, wk).transpose(0, 1) @ x.mT + (q * bk).sum(-1, keepdim=True).transpose(0, 1)
    mean = (scores * q.shape[-1] ** -0.5).softmax(-1) @ x  # [n, heads, d]
    values = product(mean.transpose(0, 1), wv.mT) + bv
    return _linear(values.transpose(0, 1).flatten(1).unsqueeze(1), out_weight, out_bias)


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.multi_head_attention_forward: _attention,
    attend: _attend,
}
