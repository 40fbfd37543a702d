"""The arithmetic of each method, on runs of elements of one tensor.

Every formula computes in float32, or in float64 where an input is float64, and rounds once to the result's
dtype.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rft_fast.kernels as kernels
from rft_fast.names import Agreeing, Fill, MergeMethod

KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_POLE = 0.01  # least denominator of t of Model Stock
_CHUNK = 1 << 20  # elements whose float64 copies are made at a time


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive elements of one tensor.

    Attributes:
        name: canonical name of the tensor.
        out: result, one-dimensional; written.
        zeroshot: the same elements of the zero-shot model; None for methods without one.
        models: those of the fine-tuned models.
    """

    name: str
    out: Tensor
    zeroshot: Tensor | None
    models: Sequence[Tensor]


Formula = Callable[[Run], None]
# Methods whose formula needs a whole tensor instead of any run of its elements.
WHOLE = frozenset[MergeMethod]({"fisher", "model-stock", "ties", "dare", "dare-ties", "slerp", "prune"})


def interpolate(alphas: Mapping[str, float]) -> Formula:
    """``(1 - alpha) w0 + alpha w1``, exact at both ends.

    Args:
        alphas: name of a tensor -> alpha.
    """

    def formula(run: Run) -> None:
        _lerp(run.out, _base(run), run.models[0], alphas[run.name])

    return formula


def soup() -> Formula:
    """Mean of the models (Wortsman et al. 2022)."""

    def formula(run: Run) -> None:
        total = run.models[0].to(_wide(run), copy=True)
        for model in run.models[1:]:
            total += model
        run.out.copy_(total / len(run.models))

    return formula


def fisher(information: Sequence[Mapping[str, Tensor]]) -> Formula:
    """``sum of F_k w_k / sum of F_k`` (Matena & Raffel 2022, Eq. 5), the mean where all F_k are 0.

    Args:
        information: of each model, name of a tensor -> F_k; a tensor that is missing has F_k = 0.
    """

    def formula(run: Run) -> None:
        wide = torch.float64
        for place, (out, *models) in enumerate(chunks(run.out, *run.models)):
            part = slice(place * _CHUNK, (place + 1) * _CHUNK)
            shares = [
                each[run.name].reshape(-1)[part].to(wide)
                if run.name in each
                else torch.zeros(len(out)).to(wide)
                for each in information
            ]
            total = torch.stack(shares).sum(0)
            mean = torch.stack([model.to(wide) for model in models]).mean(0)
            weighted = torch.zeros_like(mean)
            for share, model in zip(shares, models, strict=True):
                weighted += share * model.to(wide)
            out.copy_(torch.where(total == 0, mean, weighted / total))

    return formula


def task_arithmetic(scales: Sequence[float], differences: Sequence[bool]) -> Formula:
    """``w0 + sum of scale_k (w_k - w0)`` (Ilharco et al. 2023, Sec. 2).

    Args:
        scales: factor of each model.
        differences: whether each is ``w_k - w0`` already.
    """

    def formula(run: Run) -> None:
        base = _base(run).to(_wide(run))
        total = base.clone()
        for vector, scale in zip(vectors(run, base, differences), scales, strict=True):
            total.add_(vector, alpha=scale)
        run.out.copy_(total)

    return formula


def model_stock() -> Formula:
    """``w0 + t (mean - w0)`` (Jang et al. 2024, Eq. 6): ``t = K cos / (1 + (K - 1) cos)``.

    cos is the mean cosine between the differences of two models to w0, tensor by tensor; that of a difference
    which is zero counts as 0.
    """

    def formula(run: Run) -> None:
        base = _base(run).to(_wide(run))
        found = vectors(run, base, [False] * len(run.models))
        count = len(found)
        norms = [math.sqrt(dot(each, each)) for each in found]
        cosines = [
            dot(found[i], found[j]) / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0
            for i, j in itertools.combinations(range(count), 2)
        ]
        cosine = math.fsum(cosines) / len(cosines)
        t = stock_ratio(cosine, count)
        if t is None:
            raise ValueError(
                f"merge: model-stock has no result for {run.name}: the mean cosine between the "
                f"differences is {cosine:.3g}, but must be above {(_POLE - 1) / (count - 1):.3g}"
            )
        total = found[0].clone()
        for vector in found[1:]:
            total += vector
        run.out.copy_(base.add(total, alpha=t / count))

    return formula


def ties(scale: float, density: float, agreeing: Agreeing, differences: Sequence[bool]) -> Formula:
    """Trim, elect sign, merge (Yadav et al. 2023, Alg. 1).

    Args:
        scale: factor of the merged difference.
        density: part of each difference that is kept, by magnitude: ``int(density n)`` of n elements, at
            least one.
        agreeing: what is taken of the elements that have the elected sign, which is that of the sum.
        differences: whether each model is a difference already.
    """

    def formula(run: Run) -> None:
        base = _base(run).to(_wide(run))
        kept = [_trimmed(each, density) for each in vectors(run, base, differences)]
        run.out.copy_(base.add(_elected(kept, agreeing), alpha=scale))

    return formula


def dare(scales: Sequence[float], drop: float, seed: int, differences: Sequence[bool]) -> Formula:
    """``w0 + sum of scale_k m_k (w_k - w0) / (1 - drop)`` with Bernoulli masks m_k (Yu et al. 2024, Sec. 3).

    Args:
        scales: factor of each model.
        drop: probability that an element of a mask is 0.
        seed: of the masks (:func:`seed_of`).
        differences: whether each model is a difference already.
    """

    def formula(run: Run) -> None:
        base = _base(run).to(_wide(run))
        total = base.clone()
        for vector, scale in zip(_dropped(run, base, drop, seed, differences), scales, strict=True):
            total.add_(vector, alpha=scale)
        run.out.copy_(total)

    return formula


def dare_ties(
    scale: float, drop: float, seed: int, agreeing: Agreeing, differences: Sequence[bool]
) -> Formula:
    """The differences of :func:`dare`, merged by the signs of :func:`ties`; arguments as of these."""

    def formula(run: Run) -> None:
        base = _base(run).to(_wide(run))
        kept = _dropped(run, base, drop, seed, differences)
        run.out.copy_(base.add(_elected(kept, agreeing), alpha=scale))

    return formula


def slerp(alphas: Mapping[str, float], least_angle: float) -> Formula:
    """Spherical interpolation (Shoemake 1985) of whole tensors, which keep their own norms.

    ``sin((1 - alpha) t) / sin(t) w0 + sin(alpha t) / sin(t) w1``, with t the angle between the two; linear
    where t is below ``least_angle`` or above 180 degrees minus it, or a tensor is zero.

    Args:
        alphas: name of a tensor -> alpha.
        least_angle: in degrees.
    """
    most = math.cos(math.radians(least_angle))

    def formula(run: Run) -> None:
        a, b, alpha = _base(run), run.models[0], alphas[run.name]
        norms = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
        cosine = max(-1.0, min(1.0, dot(a, b) / norms)) if norms else 1.0
        if abs(cosine) > most or alpha in (0, 1):
            _lerp(run.out, a, b, alpha)
            return
        angle = math.acos(cosine)
        factors = [math.sin(part * angle) / math.sin(angle) for part in (1 - alpha, alpha)]
        wide = _wide(run)
        for out, one, other in chunks(run.out, a, b):
            out.copy_(one.to(wide) * factors[0] + other.to(wide) * factors[1])

    return formula


def prune(alphas: Mapping[str, float], pruned: frozenset[str], keep: float, fill: Fill, seed: int) -> Formula:
    """Algorithm 1's model: a Bernoulli mask on fine-tuned weights, then interpolation.

    Args:
        alphas: name of a tensor -> alpha.
        pruned: names of the tensors that are masked.
        keep: probability that a weight is kept.
        fill: what a masked weight becomes, ``zero`` or ``zeroshot``.
        seed: of the masks; each tensor has its own, by its name (:func:`seed_of`).
    """

    def formula(run: Run) -> None:
        base, model, alpha = _base(run), run.models[0], alphas[run.name]
        if run.name not in pruned:
            _lerp(run.out, base, model, alpha)
            return
        mask = kernels.keep_mask_like(model, keep, seed_of(seed, run.name))
        filled = torch.where(mask, model, torch.zeros_like(model) if fill == "zero" else base)
        _lerp(run.out, base, filled, alpha)

    return formula


def stock_ratio(cosine: float, count: int) -> float | None:
    """Return t of Model Stock for a mean cosine of the differences of some models; None: no result.

    At a mean cosine of ``-1 / (count - 1)``, t is infinite. Close to it, the rounding of stored weights
    decides t, so there is no result either.
    """
    if 1 + (count - 1) * cosine <= _POLE:  # NaN goes on, into the result, which is refused
        return None
    return count * cosine / (1 + (count - 1) * cosine)


# --- parts --------------------------------------------------------------------------------------------


def seed_of(seed: int, name: str, model: int = 0) -> int:
    """Return the Philox key of the mask of a tensor: 64 bits of the SHA-256 of ``seed/model/name``.

    So equally shaped tensors have different masks, which do not depend on the order of tensors in a file.

    Args:
        seed: of the merge.
        name: canonical name of the tensor.
        model: number of the model.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()[:8], "little")


def vectors(run: Run, base: Tensor, differences: Sequence[bool]) -> list[Tensor]:
    """Return the differences of the models to the zero-shot one, in its dtype and memory of their own."""
    return [
        model.to(base.dtype, copy=True) if is_difference else model.to(base.dtype) - base
        for model, is_difference in zip(run.models, differences, strict=True)
    ]


def _trimmed(vector: Tensor, density: float) -> Tensor:
    """Set all elements but the largest ones to 0, in place."""
    count = max(1, int(density * len(vector))) if len(vector) else 0
    if count < len(vector):
        kept = torch.topk(vector.abs(), count, sorted=False).indices
        values = vector[kept]
        vector.zero_()[kept] = values
    return vector


def _dropped(run: Run, base: Tensor, drop: float, seed: int, differences: Sequence[bool]) -> list[Tensor]:
    found = vectors(run, base, differences)
    for model, vector in enumerate(found):
        vector *= kernels.keep_mask_like(vector, 1 - drop, seed_of(seed, run.name, model))
        vector /= 1 - drop
    return found


def _elected(vectors: Sequence[Tensor], agreeing: Agreeing) -> Tensor:
    """Return the mean or sum of the elements whose sign is that of the sum over vectors (0: positive)."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    sign = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    count = torch.zeros_like(total)
    total.zero_()
    for vector in vectors:
        agrees = vector.sign() == sign
        total += vector * agrees
        count += agrees
    return total / count.clamp_(min=1) if agreeing == "mean" else total


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two tensors, computed in float64."""
    return math.fsum(float(one.double() @ other.double()) for one, other in chunks(a, b))


def chunks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Split one-dimensional tensors into short runs."""
    return zip(*(torch.split(tensor, _CHUNK) for tensor in tensors), strict=True)


def _base(run: Run) -> Tensor:
    if run.zeroshot is None:
        raise ValueError("merge: this method needs a zero-shot model")
    return run.zeroshot


def _wide(run: Run) -> torch.dtype:
    inputs = [*run.models] if run.zeroshot is None else [run.zeroshot, *run.models]
    return torch.float64 if any(each.dtype == torch.float64 for each in inputs) else torch.float32


def _lerp(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    if {out.dtype, a.dtype, b.dtype} <= KERNEL_DTYPES:
        kernels.interpolate_(out, a, b, alpha)
    elif alpha in (0, 1):
        out.copy_(b if alpha else a)
    else:
        out.copy_((1 - alpha) * a.double() + alpha * b.double())
