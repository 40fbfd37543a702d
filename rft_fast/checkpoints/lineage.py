"""Two checkpoints side by side: what they share, how far apart they are, and whether a path joins them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..words import some

if TYPE_CHECKING:
    from . import Checkpoint

_CHUNK = 1 << 22  # float64 copies of one chunk at a time: 64 MiB for both sides
_PATH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Lineage:
    """What two checkpoints, a and b, have in common.

    shared: names that both have. differing: of those, the ones whose values differ, bit for bit or in type.
    only_a, only_b: names that one has. other_shape: shared names whose shapes differ.
    distance: l2 norm of b - a over the floating-point tensors of one shape, in float64; 0 if there are none.
    relative: distance divided by the l2 norm of a (nan where that is 0). cosine: of the angle between a and b
        over the same tensors (nan where one is 0).
    identical: same names, types and bits. problems: why they cannot be the ends of one path, in words; none
        when they can.
    """

    shared: tuple[str, ...]
    differing: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shape: tuple[str, ...]
    distance: float
    relative: float
    cosine: float
    identical: bool
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"shared      {len(self.shared)} tensors, {len(self.differing)} of them differ",
            f"only in a   {some(self.only_a) or '-'}",
            f"only in b   {some(self.only_b) or '-'}",
            f"distance    {self.distance:.6g} (l2), {self.relative:.4g} of a's norm",
            f"cosine      {self.cosine:.6f}",
        ]
        if self.identical:
            lines.append("identical   the same weights: nothing changes along the path between them")
        elif self.cosine < 0.5:
            lines.append(
                "unrelated?  fine-tuned weights stay close to where they began; these point elsewhere"
            )
        if self.problems:
            lines.append("they cannot be the ends of one path:")
            return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])
        return "\n".join([*lines, "they can be the ends of one path"])


def compare(a: Checkpoint, b: Checkpoint) -> Lineage:
    """What two checkpoints share, how far apart they are, and why they cannot be ends of one path, if so.

    A text tower that only one of them has is no problem, nor is a head: the other's can be made from prompts.
    """
    shared = [name for name in a.tensors if name in b.tensors]
    only_a = [name for name in a.tensors if name not in b.tensors]
    only_b = [name for name in b.tensors if name not in a.tensors]
    other_shape, other_kind, unfit, not_finite, differing = [], [], [], [], []
    squares = torch.zeros(3, dtype=torch.float64)  # of b - a, a, b
    product = 0.0
    for name in shared:
        x, y = a.tensors[name], b.tensors[name]
        if x.shape != y.shape:
            other_shape.append(name)
            differing.append(name)
            continue
        if not _same_bits(x, y):
            differing.append(name)
        floats = x.is_floating_point() and y.is_floating_point()
        if not floats:
            if x.dtype != y.dtype:
                other_kind.append(name)
            continue
        if not {x.dtype, y.dtype} <= set(_PATH_DTYPES):
            unfit.append(name)
        sums, dot = _sums(x, y)
        if not torch.isfinite(sums).all():
            not_finite.append(name)
        squares += sums
        product += dot
    distance, norm_a, norm_b = squares.sqrt().tolist()
    problems = _problems(a, b, shared, [*only_a, *only_b], other_shape)
    for what, names in (
        ("are numbers of another kind, float against integer or integers of two types", other_kind),
        ("are of a type other than float32, bfloat16 and float16", unfit),
        ("hold NaN or infinity in one of them", not_finite),
    ):
        if names:
            problems.append(f"{len(names)} tensors {what}: {some(names)}")
    return Lineage(
        tuple(shared),
        tuple(differing),
        tuple(only_a),
        tuple(only_b),
        tuple(other_shape),
        distance,
        distance / norm_a if norm_a else math.nan,
        product / (norm_a * norm_b) if norm_a and norm_b else math.nan,
        not (differing or only_a or only_b),
        tuple(problems),
    )


def _problems(
    a: Checkpoint, b: Checkpoint, shared: list[str], alone: list[str], other_shape: list[str]
) -> list[str]:
    if not shared:
        return [f"they share nothing: no name of {a.file.name} is in {b.file.name}"]
    problems = []
    heads = [name for name in other_shape if name.startswith("classification_head.")]
    if heads:
        counts = [len(x.tensors[heads[0]]) if x.tensors[heads[0]].ndim else 0 for x in (a, b)]
        problems.append(
            f"their heads are for {counts[0]} and {counts[1]} classes; one of the heads must serve both ends"
        )
    towers = [
        f"{name} {list(a.tensors[name].shape)} and {list(b.tensors[name].shape)}"
        for name in other_shape
        if name not in heads
    ]
    if towers:
        problems.append(f"{len(towers)} tensors are of other shapes: {some(towers)}")
    if not any(name.startswith("visual.") for name in shared):
        problems.append("they share no image tower ('visual.*')")
    if images := [name for name in alone if name.startswith("visual.")]:
        problems.append(f"{len(images)} tensors of the image tower are in one of them only: {some(images)}")
    return problems


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Sums of squares of y - x, x and y, and of x * y, in float64."""
    sums, product = torch.zeros(3, dtype=torch.float64), 0.0
    for left, right in zip(*(torch.split(t.reshape(-1), _CHUNK) for t in (x, y)), strict=True):
        one, other = left.double().cpu(), right.double().cpu()
        sums += torch.stack([v.square().sum() for v in (other - one, one, other)])
        product += float(one @ other)
    return sums, product


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype:
        return False
    if x.data_ptr() == y.data_ptr() and x.device == y.device:
        return True
    bits = x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)
    return torch.equal(bits[0], bits[1].to(bits[0].device))
