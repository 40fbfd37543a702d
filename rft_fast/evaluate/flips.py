"""Weights of its own for each image, y_n = W x_n + r_n o (D (s_n o x_n)), by rules for torch's operations.

One base perturbation D of a weight W serves all images: image n has W + D o (r_n s_n^T), with random signs
r_n and s_n (flipout; Wen et al., ICLR 2018). Stages run on one image under ``torch.vmap``, where a
:class:`torch.overrides.TorchFunctionMode` sees every operation that reads a perturbed weight and adds the
shift of its result. So rules know single images, and no layout of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .flipped import SHARED, Conflict, Flipped, Layout, NoRule, Shift, Signs, Site
from .stages.tokens import attend

LARGEST = 1 << 20
"""Elements of the largest weight that is made for each image where its operation has no rule.

Images share the noise of a larger one.
"""


class Rules(TorchFunctionMode):
    """Shifts the results of operations that read perturbed weights, while it is active.

    Args:
        weights: The perturbed weights. Their layouts become known here.
        shift: Called at every :class:`Site`, in the same order in every run; returns what is added there.
    """

    def __init__(self, weights: Sequence[Flipped], shift: Callable[[Site], Tensor]) -> None:
        super().__init__()
        self._weights = weights
        self._numbers = {id(weight.live): number for number, weight in enumerate(weights)}
        self._shift = shift

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (rule := _RULES.get(func)) is not None:
            found = rule(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        if not any(map(self._reads, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func in _SAME or getattr(func, "__name__", "") == "__get__":
            # A shape, say, or no conversion at all.
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor) or found is args[0]:
                return found
        return func(*map(self._own, args), **{name: self._own(value) for name, value in kwargs.items()})

    def _number(self, value: Any) -> int | None:
        return self._numbers.get(id(value))

    def _reads(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._reads, value))
        return id(value) in self._numbers

    def _own(self, value: Any) -> Any:
        """A weight as the image has it; anything else as it is."""
        if isinstance(value, (list, tuple)) and self._reads(value):
            return type(value)(map(self._own, value))
        number = self._number(value)
        if number is None:
            return value
        if value.numel() > LARGEST:
            self._lay(number, SHARED)
            return self._add(value, Site(number, _whole, value.shape, None))
        self._lay(number, self._weights[number].by_element)
        return self._add(value, Site(number, _element, value.shape, None))

    def _lay(self, number: int, layout: Layout) -> None:
        weight = self._weights[number]
        if weight.layout not in (None, layout):
            weight.layout = SHARED if weight.live.numel() > LARGEST else weight.by_element
            raise Conflict
        weight.layout = layout

    def _fits(self, number: int | None, layout: Layout) -> bool:
        """Whether the weight has, or may have, this layout."""
        if number is None:
            return False
        known = self._weights[number].layout
        if known != layout and known in (SHARED, self._weights[number].by_element):
            return False
        self._lay(number, layout)
        return True

    def _add(self, result: Tensor, site: Site) -> Tensor:
        return result + self._shift(site)

    # --- matrix products ------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear: r along the outputs, s along the inputs."""
        x, number = self._own(x), self._number(weight)
        if weight.ndim != 2 or not self._fits(number, Layout(*weight.shape)):
            return F.linear(x, self._own(weight), self._own(bias))
        return self._product(x, number, F.linear(x, weight), _linear, bias)

    def _product(
        self, x: Tensor, number: int | None, result: Tensor, shift: Shift, bias: Tensor | None
    ) -> Tensor:
        if number is None:
            raise NoRule("a product without a perturbed weight")
        result = self._add(result, Site(number, shift, result.shape, x))
        return result if bias is None else result + self._own(bias)

    def matmul(self, x: Tensor, other: Tensor) -> Any:
        """x @ W: the first dimension of W are the inputs."""
        number = self._number(other)
        if self._reads(x) or number is None or other.ndim != 2:
            return NotImplemented
        if not self._fits(number, Layout(*other.shape)):
            return NotImplemented
        return self._product(x, number, x @ other, _matmul, None)

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        """Signs by channel; where patches do not overlap, a product of matrices with signs by input."""
        x, number, how = self._own(x), self._number(weight), (stride, padding, dilation, groups)
        patches = (
            groups == 1
            and _pair(stride) == tuple(weight.shape[2:])
            and padding in (0, (0, 0), "valid")
            and _pair(dilation) == (1, 1)
        )
        columns = weight[0].numel() if patches else weight.shape[1] * groups
        if not self._fits(number, Layout(len(weight), columns)):
            return F.conv2d(x, self._own(weight), self._own(bias), *how)
        kernel = tuple(weight.shape[2:])

        def shift(x: Tensor, base: Tensor, signs: Signs) -> Tensor:
            rows, inputs = signs
            if patches:
                tile = inputs.view(-1, *kernel)
                times = [-(-size // k) for size, k in zip(x.shape[-2:], kernel, strict=True)]
                inputs = tile.repeat(1, *times)[:, : x.shape[-2], : x.shape[-1]]
            else:
                inputs = inputs.view(-1, 1, 1)
            return rows.view(-1, 1, 1) * F.conv2d(inputs * x, base, None, *how)

        channels = None if bias is None else self._own(bias).view(-1, 1, 1)
        return self._product(x, number, F.conv2d(x, weight, None, *how), shift, channels)

    # --- attention ------------------------------------------------------------------------------

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        heads: int,
        in_weight: Tensor | None,
        in_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        zero: bool,
        dropout: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """F.multi_head_attention_forward of tokens [length, batch, width], as image encoders call it."""
        unusual = (bias_k, bias_v, key_padding_mask, static_k, static_v)
        if zero or need_weights or any(value is not None for value in unusual) or query.ndim != 3:
            return NotImplemented
        if training and dropout:
            return NotImplemented
        bias = None if in_bias is None else self._own(in_bias)
        if use_separate_proj_weight:
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (
                self.linear(x, w, b)  # type: ignore[arg-type]
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        elif in_weight is not None:
            q, k, v = self._projected((query, key, value), in_weight, bias)
        mixed = _attention(_heads(q, heads), _heads(k, heads), _heads(v, heads), attn_mask)
        mixed = mixed.transpose(0, 1).reshape(query.shape[0], query.shape[1], -1)
        return self.linear(mixed, out_weight, out_bias), None

    def _projected(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Sequence[Tensor]:
        """Queries, keys and values by one matrix for the three."""
        if inputs[0] is inputs[1] is inputs[2]:
            return self.linear(inputs[0], weight, bias).chunk(3, -1)
        number = self._number(weight)
        own = weight if self._fits(number, Layout(*weight.shape)) else self._own(weight)
        size = len(weight) // 3
        found = []
        for third, x in enumerate(inputs):
            rows = slice(third * size, (third + 1) * size)
            y = F.linear(x, own[rows])
            if own is weight and number is not None:
                y = self._add(y, Site(number, _rows(rows), y.shape, x))
            found.append(y if bias is None else y + bias[rows])
        return found

    def attend(
        self,
        query: Tensor,
        x: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        heads: int,
    ) -> Tensor:
        """Self-attention for one token, see :func:`rft_fast.evaluate.stages.tokens.attend`."""
        q, k = query.transpose(0, 1), x.transpose(0, 1)
        none = (None, None, False, 0.0)
        found, _ = self.attention(
            q, k, k, 0, heads, in_weight, in_bias, *none, out_weight, out_bias, False, need_weights=False
        )
        mixed: Tensor = found.transpose(0, 1)
        return mixed

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Reads no weight, but the kernels of torch would be called image by image."""
        if dropout_p or is_causal or enable_gqa:
            return NotImplemented
        return _attention(query, key, value, attn_mask, scale)

    # --- normalisation --------------------------------------------------------------------------

    def layer_norm(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        """Scale and bias of their own for each image."""
        if not self._reads((weight, bias)):
            return NotImplemented
        return self._affine(F.layer_norm(self._own(x), shape, None, None, eps), weight, bias)

    def batch_norm(
        self,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        """The same, by channel."""
        if training or not self._reads((weight, bias)):
            return NotImplemented
        normal = F.batch_norm(self._own(x), mean, variance, None, None, False, momentum, eps)
        return self._affine(normal, weight, bias, (-1, *[1] * (x.ndim - 2)))

    def _affine(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        if weight is not None:
            scale = self._own(weight)
            x = x * (scale if shape is None else scale.view(shape))
        if bias is not None:
            shift = self._own(bias)
            x = x + (shift if shape is None else shift.view(shape))
        return x


def _element(x: Tensor, base: Tensor, signs: Signs) -> Tensor:
    return signs[0]  # with the base


def _whole(x: Tensor, base: Tensor, signs: Signs) -> Tensor:
    return base


def _linear(x: Tensor, base: Tensor, signs: Signs) -> Tensor:
    rows, inputs = signs
    return rows * F.linear(inputs * x, base)


def _rows(rows: slice) -> Shift:
    return lambda x, base, signs: signs[0][rows] * F.linear(signs[1] * x, base[rows])


def _matmul(x: Tensor, base: Tensor, signs: Signs) -> Tensor:
    inputs, columns = signs
    return columns * ((inputs * x) @ base)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Tokens [length, batch, width] as [batch * heads, length, width / heads]."""
    return x.reshape(x.shape[0], x.shape[1] * heads, -1).transpose(0, 1)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


# Operations that may give a weight back as it is.
_SAME = {Tensor.to, Tensor.type, Tensor.float, Tensor.contiguous, Tensor.detach, Tensor.size, Tensor.dim}

_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: Rules.linear,
    torch.matmul: Rules.matmul,
    torch.mm: Rules.matmul,
    Tensor.matmul: Rules.matmul,
    Tensor.__matmul__: Rules.matmul,
    Tensor.mm: Rules.matmul,
    torch.conv2d: Rules.conv2d,
    F.conv2d: Rules.conv2d,
    F.multi_head_attention_forward: Rules.attention,
    attend: Rules.attend,
    F.scaled_dot_product_attention: Rules.scaled_dot_product_attention,
    F.layer_norm: Rules.layer_norm,
    F.batch_norm: Rules.batch_norm,
}
