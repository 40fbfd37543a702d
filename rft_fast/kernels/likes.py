"""The noise and the masks of a write, as tensors of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from rft_fast.kernels.containers import Listed, Tensors, as_given, listed
from rft_fast.kernels.contract import Each
from rft_fast.kernels.functions import errors_by_own_name, write_listed
from rft_fast.kernels.places import Offset, check_layout
from rft_fast.kernels.shards import on_part
from rft_fast.names import Impl, Noise


@overload
def noise_like(
    params: Tensor,
    seed: int = 0,
    draw: int = 0,
    noise: Noise = "normal",
    impl: Impl = "auto",
    offset: Offset = 0,
) -> Tensor: ...
@overload
def noise_like(
    params: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    seed: int = 0,
    draw: int = 0,
    noise: Noise = "normal",
    impl: Impl = "auto",
    offset: Offset = 0,
) -> dict[str, Tensor]: ...
@overload
def noise_like(
    params: Iterable[Tensor] | Iterable[Mapping[str, Any]],
    seed: int = 0,
    draw: int = 0,
    noise: Noise = "normal",
    impl: Impl = "auto",
    offset: Offset = 0,
) -> list[Tensor]: ...
@errors_by_own_name
def noise_like(
    params: Tensors,
    seed: int = 0,
    draw: int = 0,
    noise: Noise = "normal",
    impl: Impl = "auto",
    offset: Offset = 0,
) -> Tensor | list[Tensor] | dict[str, Tensor]:
    """Return the noise ``eps`` that the kernels use for these tensors.

    Args:
        params: Tensors of any shape, on one device, in any container that :func:`rft_fast.perturb_` takes.
            Only shapes, device and sharding are used.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise.
        draw: Number of the noise draw, an integer in [0, 2**32).
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".
        offset: Where the noise of the first tensor starts in that of the whole model, in elements, a multiple
            of 4; or one for each tensor, in a list or by name (:func:`rft_fast.offsets`).

    Returns:
        float32 tensors of the same shapes on the same device, sharded as the parameters are: one for a
        tensor, a dict by name for a module or named tensors, else a list.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range; an offset is no multiple of 4, or noise overlaps; or the tensors
            are on several devices.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> eps = rft.noise_like(params, seed=0, draw=3)
        >>> perturbed = [p + 0.05 * p.abs() * e for p, e in zip(params, eps)]  # perturb_(params, .05, draw=3)
    """
    like, names = _float32_like(params, torch.zeros_like)
    numbers = (1.0, 1.0, "finetuned", 1.0, "zero", noise, False, seed, draw, 1)
    write_listed((like, names), like, like, numbers, offset, impl, ("params",) * 3)
    return as_given(params, like, names)  # type: ignore[no-any-return]


@overload
def keep_mask_like(
    params: Tensor, keep: float, seed: int = 0, impl: Impl = "auto", offset: Offset = 0
) -> Tensor: ...
@overload
def keep_mask_like(
    params: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    keep: Each,
    seed: int = 0,
    impl: Impl = "auto",
    offset: Offset = 0,
) -> dict[str, Tensor]: ...
@overload
def keep_mask_like(
    params: Iterable[Tensor] | Iterable[Mapping[str, Any]],
    keep: Each,
    seed: int = 0,
    impl: Impl = "auto",
    offset: Offset = 0,
) -> list[Tensor]: ...
@errors_by_own_name
def keep_mask_like(
    params: Tensors, keep: Each, seed: int = 0, impl: Impl = "auto", offset: Offset = 0
) -> Tensor | list[Tensor] | dict[str, Tensor]:
    """Return the Bernoulli mask that the kernels use for these tensors (Algorithm 1).

    Args:
        params: Tensors of any shape, on one device, in any container that :func:`rft_fast.perturb_` takes.
            Only shapes, device and sharding are used.
        keep: Probability, in [0, 1], that a weight is kept. Or a list with one number per tensor.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the mask.
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".
        offset: Where the mask of the first tensor starts in that of the whole model, in elements, a multiple
            of 4; or one for each tensor, in a list or by name (:func:`rft_fast.offsets`).

    Returns:
        bool tensors of the same shapes on the same device, sharded as the parameters are, True where the
        weight is kept: one for a tensor, a dict by name for a module or named tensors, else a list.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range; an offset is no multiple of 4, or masks overlap; or the tensors
            are on several devices.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> mask = rft.keep_mask_like(weight, keep=0.5, seed=0)
        >>> pruned = weight * mask  # half of the weights, on average
    """
    like, names = _float32_like(params, torch.ones_like)
    numbers = (1.0, 0.0, "finetuned", keep, "zero", "normal", True, seed, 0, 1)
    write_listed((like, names), like, like, numbers, offset, impl, ("params",) * 3)
    return as_given(params, [on_part(tensor, Tensor.bool) for tensor in like], names)  # type: ignore[no-any-return]


def _float32_like(params: Tensors, make: Callable[..., Tensor]) -> Listed:
    tensors, names = listed("params", params)
    for place, tensor in enumerate(tensors):
        check_layout(tensor, f"params of {names[place] if names else f'tensor {place}'}")

    def like(part: Tensor) -> Tensor:
        return make(part, dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False)

    return [on_part(tensor, like) for tensor in tensors], names
