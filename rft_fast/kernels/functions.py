"""Functions that write tensors in place, for single calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from torch import Tensor

from rft_fast.kernels import library, registry
from rft_fast.kernels.containers import Listed, Tensors, listed, matched, sources
from rft_fast.kernels.contract import PER_TENSOR, WRITE_ARGUMENTS, Add, Each, Requests, Write, requests
from rft_fast.kernels.places import Offset, blocks_at
from rft_fast.kernels.rows import ROLES, check_memory, device_of, lay_out, make_rows, mark_written
from rft_fast.kernels.shards import is_sharded
from rft_fast.names import Fill, Impl, Noise, On, Weight

P = ParamSpec("P")
R = TypeVar("R")


def errors_by_own_name(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that its errors begin with its own name instead of the contract's ``write``."""

    @functools.wraps(function)
    def named(*arguments: P.args, **others: P.kwargs) -> R:
        try:
            return function(*arguments, **others)
        except (TypeError, ValueError, RuntimeError) as error:
            if str(error).startswith("write: "):
                error.args = (str(error).replace("write", function.__name__, 1),)
            elif "'draw'" in str(error) and isinstance(error, TypeError):  # Python's own words
                error.args = (
                    f"{error}: the number of this perturbation, such as the step of a loop; the same number "
                    "gives the same noise again",
                )
            raise

    return named


def write_(
    out: Tensors,
    zeroshot: Tensors,
    finetuned: Tensors,
    alpha: Each,
    rho: Each = 0.0,
    on: On = "finetuned",
    keep: Each = 1.0,
    fill: Fill = "zero",
    noise: Noise = "normal",
    adaptive: bool = True,
    seed: int = 0,
    draw: int = 0,
    sign: int = 1,
    impl: Impl = "auto",
    offset: Offset = 0,
) -> None:
    """Interpolate, perturb and mask tensors in one pass, in place into ``out``.

    Each element is computed in float32, whatever the storage types, and rounded once::

        w1 = finetuned if kept else (0 or zeroshot)
        on="finetuned":     w1 += sign * rho * c(w1) * eps;  out = lerp(zeroshot, w1, alpha)
        on="interpolated":  v = lerp(zeroshot, w1, alpha);  out = v + sign * rho * c(v) * eps

    where ``lerp(a, b, alpha) = (1 - alpha) * a + alpha * b``, exact at both ends, and ``c(w) = |w|`` if
    adaptive, else 1.

    Args:
        out: Tensors to write into, of any shape: one, any iterable of them, a module (its parameters), named
            tensors (a mapping or pairs), or parameter groups. Each tensor, here and below, may be float32,
            bfloat16 or float16; all are on one device. An output may be its own source, and may share memory
            with nothing else.
        zeroshot: As many tensors of the same shapes and layouts: the weights at alpha = 0. Named tensors are
            matched by name, others by order.
        finetuned: As many tensors of the same shapes and layouts: the weights at alpha = 1.
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
        offset: Where the noise and the mask of the first tensor start in those of the whole model, in
            elements, a multiple of 4; or one for each tensor, in a list or by name
            (:func:`rft_fast.offsets`).

    ``alpha``, ``rho`` and ``keep`` may each be a list with one number per tensor: still one launch, and equal
    numbers give the bits of the single number.

    The noise of a tensor depends on its position: the tensors' order, or ``offset``. Within a tensor it
    follows the logical index: not the layout in memory (channels_last and other permutations of contiguous
    memory are written as they are), and not the sharding (of a DTensor with placements Shard and Replicate
    each process writes its part, without communication). On a GPU the call is ordered with the current stream
    and does not wait. Nothing is differentiated, as under ``torch.no_grad``. For repeated writes, a
    :class:`rft_fast.Plan` saves checks and table.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; an offset is no multiple of 4, or noise overlaps; tensors differ
            in names, shape, layout, sharding or device, have gaps in memory, or overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> rft.write_(live, zeroshot, finetuned, alpha=0.4)  # theta(0.4)
        >>> rft.write_(live, zeroshot, finetuned, alpha=0.4, rho=0.05, seed=0, draw=3)  # perturbed (Sec. 3.1)
        >>> rft.write_(live, zeroshot, finetuned, alpha=0.4, keep=0.5)  # half of the weights pruned (Alg. 1)
    """
    numbers: library.Numbers = (alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
    write_listed(*sources(out, zeroshot, finetuned, ROLES), numbers, offset, impl, ROLES)


def write_listed(
    out: Listed,
    zeroshot: list[Tensor],
    finetuned: list[Tensor],
    numbers: library.Numbers,
    offset: Offset,
    impl: Impl,
    roles: tuple[str, str, str],
) -> None:
    """Write tensors that have been taken out of their containers and brought into one order."""
    tensors, names = out
    at_zero = type(offset) is int and offset == 0
    blocks = None if at_zero else blocks_at(out, offset)
    if library.is_traced(tensors):
        library.write_(tensors, zeroshot, finetuned, numbers, impl, blocks, names)
        return
    # Refused before anything is allocated.
    request = requests(Write, dict(zip(WRITE_ARGUMENTS, numbers, strict=True)), PER_TENSOR, len(tensors))
    _submit(request, (tensors, zeroshot, finetuned), names, blocks, impl, roles)


def _submit(
    request: Requests,
    tensors: tuple[list[Tensor], list[Tensor], list[Tensor]],
    names: Sequence[str] | None,
    blocks: Sequence[int] | None,
    impl: Impl,
    roles: tuple[str, str, str],
) -> None:
    rows = make_rows(*tensors, names, blocks, roles)
    registry.pick(impl, device_of(rows)).write(rows, request)
    mark_written(rows)


@errors_by_own_name
def interpolate_(
    out: Tensors, zeroshot: Tensors, finetuned: Tensors, alpha: Each, impl: Impl = "auto"
) -> None:
    """Write ``out = (1 - alpha) * zeroshot + alpha * finetuned``, exact at alpha = 0 and alpha = 1.

    Args:
        out: Tensors to write into, in any container; requirements as for :func:`rft_fast.write_`.
        zeroshot: As many tensors of the same shapes: the weights at alpha = 0.
        finetuned: As many tensors of the same shapes: the weights at alpha = 1.
        alpha: Position on the path: 0 is zero-shot, 1 is fine-tuned. Any finite number; outside [0, 1] the
            write extrapolates. (The paper's formulas write the mirrored alpha, its figures this one.) Or a
            list with one number per tensor.
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; or tensors differ in names, shape, layout, sharding or device,
            have gaps in memory, or overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> rft.interpolate_(live, zeroshot, finetuned, alpha=0.4)
    """
    write_(out, zeroshot, finetuned, alpha, impl=impl)


@errors_by_own_name
def perturb_(
    params: Tensors,
    rho: Each,
    seed: int = 0,
    *,
    draw: int,
    adaptive: bool = True,
    noise: Noise = "normal",
    sign: int = 1,
    impl: Impl = "auto",
    offset: Offset = 0,
) -> None:
    """Add noise in place: ``params += sign * rho * (|params| if adaptive else 1) * eps`` (delta of Eq. 3).

    Perturb, evaluate, restore, each time with another number of the draw::

        before = [p.detach().clone() for p in model.parameters()]
        for draw in range(20):
            rft.perturb_(model, rho=0.05, draw=draw)
            losses.append(evaluate(model))
            rft.interpolate_(model, before, before, 0)  # the old bits again

    The same seed and draw give the same noise: a second call adds it twice. There is no inverse, because
    floating-point addition loses bits: keep the weights and write them again instead of subtracting the noise
    (a :class:`rft_fast.Plan` of ``model, before, before`` does both in one pass).

    The noise of a tensor depends on its position. Call this once for the whole model. One call for each
    tensor gives equally shaped tensors the same noise, unless ``offset`` says where each one is.

    Args:
        params: Tensors of any shape: one, any iterable of them, a module (its parameters), named tensors (a
            mapping or pairs), or parameter groups. Each may be float32, bfloat16 or float16, and a DTensor;
            all are on one device.
        rho: Noise scale, finite and >= 0; 0 adds no noise (rho of Eq. 3). Or a list with one number per
            tensor.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise.
        draw: Number of the noise draw, an integer in [0, 2**32).
        adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        sign: 1, or -1 for the opposite noise (antithetic pairs).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".
        offset: Where the noise of the first tensor starts in that of the whole model, in elements, a multiple
            of 4; or one for each tensor, in a list or by name (:func:`rft_fast.offsets`).

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; an offset is no multiple of 4, or noise overlaps; tensors are on
            several devices, have gaps in memory, or overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Example:
        >>> at = rft.offsets([p for group in optimizer.param_groups for p in group["params"]])
        >>> rft.perturb_(optimizer.param_groups, 0.05, draw=3)  # all groups
        >>> rft.perturb_(first_group, 0.05, draw=3, offset=at[: len(first_group)])  # the same noise, a part
    """
    first = listed("params", params)  # once: a generator can be read only once
    numbers = (1.0, rho, "finetuned", 1.0, "zero", noise, adaptive, seed, draw, sign)
    write_listed(first, first[0], first[0], numbers, offset, impl, ("params",) * 3)


@errors_by_own_name
def add_(
    out: Tensors, w: Tensors, b: Tensors, scale: Each, weight: Weight = "none", impl: Impl = "auto"
) -> None:
    """Write ``out = w + scale * factor(w) * b``, with factor(w) = 1, ``|w|`` or ``w * w``, in one pass.

    Computed in float32 as ``w + ((factor(w) * scale) * b)``, each operation rounded, and rounded once more to
    the type of ``out``. ``scale = 0`` copies w.

    SAM and ASAM (ascent; restore by ``rft.interpolate_(params, before, before, 0)``)::

        rft.add_(params, before, grads, rho / norm(grads))  # SAM
        rft.add_(params, before, grads, rho / norm(|w| * grads), weight="square")  # ASAM, T_w = |w|

    Task arithmetic adds one vector after the other; a zeroth-order step with decay moves along the noise of
    a draw and shrinks the weights::

        rft.add_(params, params, vector, 0.3)
        rft.add_(params, params, rft.noise_like(params, seed, draw), -lr * slope)
        rft.add_(params, params, params, -lr * decay)

    Args:
        out: Tensors to write into, in any container; requirements as for :func:`rft_fast.write_`. May be w or
            b.
        w: As many tensors of the same shapes and layouts.
        b: As many tensors of the same shapes and layouts: what is added.
        scale: Factor of b, finite; 0 copies w. Or a list with one number per tensor.
        weight: Further factor of b: "none", "abs" (``|w|``) or "square" (``w * w``).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference".

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: A number is out of range; or tensors differ in names, shape, layout, sharding or device,
            have gaps in memory, or overlap.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.

    Source: sharpness-aware minimization, Foret et al. 2021, Eq. 2; ASAM, Kwon et al. 2021, Eq. 7.
    """
    # To a table, b is the zero-shot end, from which the "operand" noise is read.
    roles = ("out", "b", "w")
    first, bs, ws = sources(out, b, w, roles)
    if library.is_traced(first[0]):
        library.add_(first[0], ws, bs, scale, weight, impl, first[1])
        return
    request = requests(Add, {"scale": scale, "weight": weight}, ("scale",), len(first[0]))
    _submit(request, (first[0], bs, ws), first[1], None, impl, roles)


@errors_by_own_name
def norm(b: Tensors, w: Tensors | None = None, weight: Weight = "none", impl: Impl = "auto") -> float:
    """Return the Euclidean norm of ``factor(w) * b`` over all tensors, factor(w) = 1, ``|w|`` or ``w * w``.

    One pass without temporaries, computed in float64; of the same bits with any number of threads and on
    every instruction set. It is what the step of SAM (``weight="none"``) or ASAM ("abs") is divided by. Waits
    for the device.

    Args:
        b: Tensors such as gradients, in any container; requirements as for :func:`rft_fast.write_`, but they
            may share memory.
        w: As many tensors of the same shapes and layouts; None with weight "none".
        weight: Factor of b: "none", "abs" (``|w|``) or "square" (``w * w``).
        impl: Backend: "auto" (the fastest that works on the device), "native", "triton" or "reference". On a
            GPU each leaves this to torch.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a dtype that is not offered.
        ValueError: ``w`` is missing, or given without a use; tensors differ in names, shape, layout or
            device, have gaps in memory, or are sharded.
        RuntimeError: The backend does not work here; or it is called in compiled code, or on fake tensors.

    Example:
        >>> rft.add_(params, before, grads, rho / rft.norm(grads, before, "abs"), weight="square")  # ASAM
    """
    Add(0.0, weight)  # checks the name
    if (w is None) != (weight == "none"):
        given = "is missing" if w is None else "has no effect"
        raise ValueError(f"norm: w {given} with weight={weight!r}; call norm(b), or norm(b, w, weight='abs')")
    first = listed("b", b)
    bs, ws = first[0], first[0] if w is None else matched(first, "w", listed("w", w))
    if library.is_traced(bs):
        raise RuntimeError(
            "norm: it returns a number, which is not known in compiled code or of fake tensors; call it "
            "outside of the compiled function, and pass the number to the function"
        )
    for place, tensor in enumerate(bs):
        if is_sharded(tensor):
            raise ValueError(
                f"norm: b[{place}] is a DTensor, of which this process has only a part; sum the squares of "
                "norm(tensor.to_local()) over the processes that share it, or use torch.norm(tensor)"
            )
    roles = ("b", "b", "w")
    rows = lay_out(bs, bs, ws, first[1], None, roles)
    for row in rows:
        check_memory(row, roles)
    return math.sqrt(registry.pick(impl, device_of(rows)).squares(rows, weight))
