"""Functions that write tensors in place, for single calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from rft_fast.kernels import library, registry
from rft_fast.kernels.contract import Write, as_list, device_of, make_rows
from rft_fast.kernels.plan import Tensors
from rft_fast.names import Fill, Impl, Noise, On

P = ParamSpec("P")
R = TypeVar("R")


def _errors_by_own_name(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that its errors begin with its own name instead of the contract's ``write``."""

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
    """Interpolate, perturb and mask tensors in one pass, in place into ``out``.

    Each element is computed in float32, whatever the storage types, and rounded once::

        w1 = finetuned if kept else (0 or zeroshot)
        on="finetuned":     w1 += sign * rho * c(w1) * eps;  out = lerp(zeroshot, w1, alpha)
        on="interpolated":  v = lerp(zeroshot, w1, alpha);  out = v + sign * rho * c(v) * eps

    where ``lerp(a, b, alpha) = (1 - alpha) * a + alpha * b``, exact at both ends, and ``c(w) = |w|`` if
    adaptive, else 1.

    Args:
        out: Tensor to write into, or any iterable of tensors, of any shape. Each tensor, here and below, may
            be float32, bfloat16 or float16; all are contiguous and on one device. An output may be its own
            source, and may share memory with nothing else.
        zeroshot: As many tensors of the same shapes: the weights at alpha = 0.
        finetuned: As many tensors of the same shapes: the weights at alpha = 1.
        alpha: Position on the path: 0 is zero-shot, 1 is fine-tuned. Any finite number; outside [0, 1] the
            write extrapolates. (The paper's formulas write the mirrored alpha, its figures this one.)
        rho: Noise scale, finite and >= 0; 0 adds no noise (rho of Eq. 3).
        on: Weights that the noise is added to: "finetuned", before they are interpolated (Sec. 3.1), or
            "interpolated", after it (Eq. 3).
        keep: Probability, in [0, 1], that a fine-tuned weight survives the Bernoulli mask of Algorithm 1; 1
            masks nothing.
        fill: Value of a masked fine-tuned weight: "zero", or "zeroshot" for its zero-shot value.
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise and the mask.
        draw: Number of the noise draw, an integer in [0, 2**32). All draws of a seed have the same mask.
        sign: 1, or -1 for the opposite noise (antithetic pairs).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    The noise of a tensor depends on its position in the list, so a list and its tensors one by one differ. On
    a GPU the call is ordered with the current stream and does not wait. Nothing is differentiated, as under
    ``torch.no_grad``. For repeated writes, a :class:`rft_fast.Plan` saves checks and table.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; or tensors differ in shape or device, are not contiguous, or
            overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> rft.write_(live, zeroshot, finetuned, alpha=0.4)  # theta(0.4)
        >>> rft.write_(live, zeroshot, finetuned, alpha=0.4, rho=0.05, seed=0, draw=3)  # perturbed (Sec. 3.1)
        >>> rft.write_(live, zeroshot, finetuned, alpha=0.4, keep=0.5)  # half of the weights pruned (Alg. 1)
    """
    numbers: library.Numbers = (alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
    tensors = as_list("out", out), as_list("zeroshot", zeroshot), as_list("finetuned", finetuned)
    if library.is_traced(tensors[0]):
        library.write_(*tensors, numbers, impl)
        return
    request = Write(*numbers)  # refused before anything is allocated
    rows = make_rows(*tensors)
    registry.pick(impl, device_of(rows)).write(rows, request)
    torch.autograd.graph.increment_version([row.out for row in rows])


@_errors_by_own_name
def interpolate_(
    out: Tensors, zeroshot: Tensors, finetuned: Tensors, alpha: float, impl: Impl = "auto"
) -> None:
    """Write ``out = (1 - alpha) * zeroshot + alpha * finetuned``, exact at alpha = 0 and alpha = 1.

    Args:
        out: Tensor to write into, or any iterable of tensors; requirements as for :func:`rft_fast.write_`.
        zeroshot: As many tensors of the same shapes: the weights at alpha = 0.
        finetuned: As many tensors of the same shapes: the weights at alpha = 1.
        alpha: Position on the path: 0 is zero-shot, 1 is fine-tuned. Any finite number; outside [0, 1] the
            write extrapolates. (The paper's formulas write the mirrored alpha, its figures this one.)
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; or tensors differ in shape or device, are not contiguous, or
            overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> rft.interpolate_(live, zeroshot, finetuned, alpha=0.4)
    """
    write_(out, zeroshot, finetuned, alpha, impl=impl)


@_errors_by_own_name
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
    """Add noise in place: ``params += sign * rho * (|params| if adaptive else 1) * eps`` (delta of Eq. 3).

    There is no inverse, because floating-point addition loses bits: keep the weights and write them again
    (:class:`rft_fast.Plan`, ``Path``) instead of subtracting the noise.

    Args:
        params: Tensor, or any iterable of tensors, of any shape: float32, bfloat16 or float16, contiguous and
            on one device.
        rho: Noise scale, finite and >= 0; 0 adds no noise (rho of Eq. 3).
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise.
        draw: Number of the noise draw, an integer in [0, 2**32).
        adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        sign: 1, or -1 for the opposite noise (antithetic pairs).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; or tensors differ in shape or device, are not contiguous, or
            overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> before = [p.clone() for p in params]
        >>> rft.perturb_(params, rho=0.05, seed=0, draw=3)  # measure here
        >>> rft.interpolate_(params, before, before, 0)  # the old bits again
    """
    tensors = as_list("params", params)  # once: a generator can be read only once
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
@_errors_by_own_name
def noise_like(
    params: Tensors, seed: int = 0, draw: int = 0, noise: Noise = "normal", impl: Impl = "auto"
) -> Tensor | list[Tensor]:
    """Return the noise ``eps`` that the kernels use for these tensors.

    Args:
        params: Tensor, or any iterable of tensors, of any shape, on one device. Only shapes and device are
            used.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise.
        draw: Number of the noise draw, an integer in [0, 2**32).
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    Returns:
        float32 tensors of the same shapes on the same device: one for a tensor, else a list.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range, or the tensors are on several devices.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> eps = rft.noise_like(params, seed=0, draw=3)
        >>> perturbed = [p + 0.05 * p.abs() * e for p, e in zip(params, eps)]  # perturb_(params, 0.05, 0, 3)
    """
    like = _float32_like(params, torch.zeros_like)
    write_(like, like, like, 1.0, 1.0, noise=noise, adaptive=False, seed=seed, draw=draw, impl=impl)
    return like[0] if isinstance(params, Tensor) else like


@overload
def keep_mask_like(params: Tensor, keep: float, seed: int = 0, impl: Impl = "auto") -> Tensor: ...
@overload
def keep_mask_like(
    params: Iterable[Tensor], keep: float, seed: int = 0, impl: Impl = "auto"
) -> list[Tensor]: ...
@_errors_by_own_name
def keep_mask_like(params: Tensors, keep: float, seed: int = 0, impl: Impl = "auto") -> Tensor | list[Tensor]:
    """Return the Bernoulli mask that the kernels use for these tensors (Algorithm 1).

    Args:
        params: Tensor, or any iterable of tensors, of any shape, on one device. Only shapes and device are
            used.
        keep: Probability, in [0, 1], that a weight is kept.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the mask.
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    Returns:
        bool tensors of the same shapes on the same device, True where the weight is kept: one for a tensor,
        else a list.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range, or the tensors are on several devices.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> mask = rft.keep_mask_like(weight, keep=0.5, seed=0)
        >>> pruned = weight * mask  # half of the weights, on average
    """
    like = _float32_like(params, torch.ones_like)
    write_(like, like, like, 1.0, keep=keep, seed=seed, impl=impl)
    masks = [tensor.bool() for tensor in like]
    return masks[0] if isinstance(params, Tensor) else masks


def _float32_like(params: Tensors, make: Callable[..., Tensor]) -> list[Tensor]:
    return [
        make(p, dtype=torch.float32, memory_format=torch.contiguous_format, requires_grad=False)
        for p in as_list("params", params)
    ]
