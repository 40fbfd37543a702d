"""Comparison of two checkpoints: shared tensors, distance, and whether they can be ends of one path.

``python -m rft_fast.checkpoints A B`` and the sweep use the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.words import many, some
from .activation import NAMES
from .canonical import HEAD, HEAD_BIAS, HEAD_WEIGHT, INERT, POSITIONS, is_visual

if TYPE_CHECKING:
    from . import Checkpoint

UNRELATED = 0.3
"""Cosine between the matrices of two image towers below which neither counts as fine-tuned from the other.

Matrices only: the gains of LayerNorms start at 1 in every training, so that whole towers of two trainings
have a cosine of .43. Measured on the digits zoo (docs/checkpoints.md): .95 to 1.00 after fine-tuning, .77 at
learning rates that destroy the model, -.04 to .01 for other trainings, random weights and task vectors.
"""

_CHUNK = 1 << 16  # elements; their float64 copies fit into a CPU's cache
_CHUNK_GPU = 1 << 24
_PATH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kinship:
    """How close two sets of weights are.

    Attributes:
        same: whether the values are equal, or one file has rounded them to a coarser dtype.
        cosine: between all tensors of two or more dimensions; nan if there are none.
        ratio: norm of b divided by the norm of a, over the same tensors.
    """

    same: bool
    cosine: float
    ratio: float

    def identical(self) -> str | None:
        """Return the problem if both ends have the same weights; None otherwise."""
        if not self.same:
            return None
        return "the same weights, so nothing changes along the path; is it the right file?"

    def unrelated(self) -> str | None:
        """Return the problem if neither end was fine-tuned from the other; None otherwise."""
        if not self.cosine < UNRELATED:
            if not (self.ratio < 0.5 or self.ratio > 2):
                return None
            return (
                f"matrices with {self.ratio:.2g} times the norm of the zero-shot ones "
                "(expected after fine-tuning: 0.5 to 2). Is it a sum of models instead of their "
                "mean? --unrelated measures the path anyway"
            )
        why = (
            f"unrelated weights: the cosine between the matrices is {self.cosine:.2f}, "
            f"but fine-tuned ones stay close to their start (expected: at least {UNRELATED:g})"
        )
        if not 0.5 <= self.ratio <= 2:
            smaller, share = ("fine-tuned", self.ratio) if self.ratio < 1 else ("zero-shot", 1 / self.ratio)
            return (
                f"{why}; the norm of the {smaller} ones is only {share:.2g} of the others', so they "
                "may be a difference (task vector): add it to its base weights first. --unrelated "
                "measures the path anyway"
            )
        return f"{why}. Was it fine-tuned from another zero-shot model? --unrelated measures the path anyway"


def kinship(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Callable[[str], bool]) -> Kinship:
    """Compare the tensors of two checkpoints.

    Args:
        a: the zero-shot end, by canonical name.
        b: the fine-tuned end.
        names: whether a name is compared.

    Returns:
        Their kinship. Tensors of different shapes, or in one checkpoint only, differ; they do not count for
        the cosine.
    """
    same = True
    sums = torch.zeros(3, dtype=torch.float64)  # of squares of a and b; of a * b
    for name in dict.fromkeys(filter(names, (*a, *b))):
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape:
            same = False
            continue
        y = y.to(x.device)
        same = same and _same_rounded(x, y)
        if x.is_floating_point() and y.is_floating_point() and x.ndim > 1:
            sums += _products(x, y)
    squares_a, squares_b, product = sums.tolist()
    norms = math.sqrt(squares_a) * math.sqrt(squares_b)
    return Kinship(
        same,
        product / norms if norms else 0.0 if squares_a or squares_b else math.nan,
        math.sqrt(squares_b / squares_a) if squares_a else math.inf if squares_b else math.nan,
    )


def moved_rows(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """Detect heads whose rows are in different orders.

    A row of ``b`` counts as moved if its cosine with another row of ``a`` is above .9, and with its own below
    .5; the mean of each head is subtracted first.

    Args:
        a: checkpoint of the zero-shot end, by canonical name.
        b: checkpoint of the fine-tuned end.

    Returns:
        The problem, if at least two rows moved; None otherwise.
    """
    x, y = a.get(HEAD_WEIGHT), b.get(HEAD_WEIGHT)
    if x is None or y is None or x.shape != y.shape or x.ndim != 2:
        return None
    rows = [t.detach().float() - t.detach().float().mean(0) for t in (x, y.to(x.device))]
    rows_a, rows_b = (torch.nn.functional.normalize(t, dim=1) for t in rows)
    moved = []
    for part in torch.split(torch.arange(len(rows_b)), 1024):
        near, best = (rows_b[part] @ rows_a.T).max(1)
        own = (rows_b[part] * rows_a[part]).sum(1)
        moved += [(int(part[i]), int(best[i])) for i in torch.nonzero((near > 0.9) & (own < 0.5)).flatten()]
    if len(moved) < 2:
        return None
    pairs = some([f"row {place} is the zero-shot row {other}" for place, other in moved], 3)
    return (
        f"a head with {len(moved)} of {len(rows_b)} rows in another order than at the "
        f"zero-shot end ({pairs}), so interpolation would mix classes; reorder its rows, or "
        "use one head for both ends (--head zeroshot)"
    )


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Sums of squares of x and y, and of x * y; float32 within a chunk suffices for a cosine."""
    total = torch.zeros(3, dtype=torch.float64, device=x.device)
    for left, right in _chunks(x, y):
        one, other = left.float(), right.float()
        total += torch.stack([one @ one, other @ other, one @ other])
    return total.cpu()


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both tensors in flat chunks, on the device of the first."""
    size = _CHUNK if x.device.type == "cpu" else _CHUNK_GPU
    return zip(*(torch.split(t.detach().to(x.device).reshape(-1), size) for t in (x, y)), strict=True)


def _same_rounded(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal in the coarser of their dtypes."""
    if x.dtype == y.dtype:
        return torch.equal(x, y)
    if not (x.is_floating_point() and y.is_floating_point()):
        return False
    coarser = max(x.dtype, y.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(x.to(coarser), y.to(coarser))


@dataclass(frozen=True)
class Lineage:
    """Comparison of two checkpoints, a and b.

    Attributes:
        shared: names in both.
        differing: shared names whose shapes, dtypes or bits differ.
        only_a: names in a only.
        only_b: names in b only.
        other_shape: shared names whose shapes differ.
        distance: l2 norm of b - a over the floating-point tensors of equal shapes, in float64; 0 if there are
            none.
        relative: distance divided by the l2 norm of a; nan if that is 0.
        cosine: between a and b over the same tensors; nan if one is 0.
        identical: same names, dtypes and bits.
        kinship: of the image towers; ``same`` covers the heads as well, or what makes them.
        problems: why they cannot be the ends of one path; empty if they can.
        inert: shared names of the text side whose shapes or dtypes differ, which a fixed head makes
            irrelevant (``--towers image``).
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
    kinship: Kinship
    problems: tuple[str, ...]
    inert: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"shared      {many(len(self.shared), 'tensor')}, {len(self.differing)} of them differ",
            f"only in a   {some(self.only_a) or '-'}",
            f"only in b   {some(self.only_b) or '-'}",
            f"distance    {self.distance:.6g} (l2), {self.relative:.4g} of a's norm",
            f"cosine      {self.cosine:.6f}; between the matrices of the image towers "
            f"{self.kinship.cosine:.6f}",
        ]
        if self.inert:
            lines.append(f"inert       text tower; shapes or dtypes differ: {some(self.inert)}")
        if self.problems:
            lines.append("they cannot be the ends of one path:")
            return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])
        return "\n".join([*lines, "they can be the ends of one path"])


def compare(a: Checkpoint, b: Checkpoint, unrelated: bool = False) -> Lineage:
    """Compare two checkpoints: what they share, how far apart they are, whether they can be ends of one path.

    A text tower in one of them only, or of other shapes, is no problem, nor is a missing head, which can be
    made from prompts.

    Args:
        a: the zero-shot end.
        b: the fine-tuned end.
        unrelated: accept checkpoints of which neither was fine-tuned from the other, as ``--unrelated``.
    """
    shared = [name for name in a.tensors if name in b.tensors]
    only_a = [name for name in a.tensors if name not in b.tensors]
    only_b = [name for name in b.tensors if name not in a.tensors]
    other_shape, other_kind, unfit, not_finite, differing = [], [], [], [], []
    sums = torch.zeros(4, dtype=torch.float64)  # of squares of b - a, a, b; of a * b
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
        products = _sums(x, y)
        if not torch.isfinite(products).all():
            not_finite.append(name)
        sums += products
    distance, norm_a, norm_b = sums[:3].sqrt().tolist()
    related = kinship(a.tensors, b.tensors, is_visual)
    if related.same:  # a linear probe differs in its head only
        heads = HEAD_WEIGHT in a.tensors and HEAD_WEIGHT in b.tensors
        beside = {HEAD_WEIGHT, HEAD_BIAS}.__contains__ if heads else lambda name: not is_visual(name)
        related = replace(related, same=kinship(a.tensors, b.tensors, beside).same)
    problems = _problems(a, b, shared, [*only_a, *only_b], [name for name in other_shape if _on_path(name)])
    for has, have, what, names in (
        ("is", "are", "float in one and integer in the other, or integers of two dtypes", other_kind),
        ("has", "have", "a dtype other than float32, bfloat16 and float16", unfit),
        ("has", "have", "NaN or infinity in one of them", not_finite),
    ):
        if names := list(filter(_on_path, names)):
            do = many(len(names), f"tensor {has}", f"tensors {have}")
            problems.append(f"{do} {what}: {some(names)}")
    if not problems:
        problem = related.identical() or moved_rows(a.tensors, b.tensors)
        problem = problem or (None if unrelated else related.unrelated())
        problems += [problem] if problem else []
    return Lineage(
        shared=tuple(shared),
        differing=tuple(differing),
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        other_shape=tuple(other_shape),
        distance=distance,
        relative=distance / norm_a if norm_a else math.nan,
        cosine=float(sums[3]) / (norm_a * norm_b) if norm_a and norm_b else math.nan,
        identical=not (differing or only_a or only_b),
        kinship=related,
        problems=tuple(problems),
        inert=tuple(name for name in (*other_shape, *other_kind) if not _on_path(name)),
    )


def _on_path(name: str) -> bool:
    """Return whether a tensor is on the path of an image tower and a head, or of an unknown name."""
    return name.partition(".")[0] not in INERT


def _problems(
    a: Checkpoint, b: Checkpoint, shared: list[str], alone: list[str], other_shape: list[str]
) -> list[str]:
    """List the problems that names, shapes and activations show."""
    if not shared:
        return [f"they have no tensor names in common: no name in {a.file.name} is in {b.file.name}"]
    problems = []
    heads = [name for name in other_shape if name.startswith(HEAD)]
    if heads:
        counts = [len(x.tensors[heads[0]]) if x.tensors[heads[0]].ndim else 0 for x in (a, b)]
        problems.append(
            f"their heads have {counts[0]} and {counts[1]} classes; both ends must use one of the heads"
        )
    towers = [
        f"{name} {list(a.tensors[name].shape)} and {list(b.tensors[name].shape)}"
        for name in other_shape
        if name not in heads
    ]
    if towers:
        have = many(len(towers), "tensor has", "tensors have")
        problems.append(f"{have} different shapes: {some(towers)}")
        if list(filter(is_visual, other_shape)) == [POSITIONS]:
            problems[-1] += " (--resize-positions of the sweep resamples them for one image size)"
    if not any(map(is_visual, shared)):
        problems.append("they have no common image tower ('visual.*')")
    if images := list(filter(is_visual, alone)):
        are = many(len(images), "tensor of the image tower is", "tensors of the image tower are")
        problems.append(f"{are} in one checkpoint only: {some(images)}")
    for checkpoint in (a, b):
        unknown = [n for n in checkpoint.tensors if _on_path(n) and not n.startswith(("visual.", HEAD))]
        if unknown:
            problems.append(
                f"{some(unknown)} of {checkpoint.file.name} belong to no image tower, head or text tower"
            )
    one, other = (x.tensors.activation.get("image") for x in (a, b))
    if one is not None and other is not None and one.quick != other.quick:
        problems.append(
            f"their image towers have different activations: {NAMES[one.quick]} ({one.source}) and "
            f"{NAMES[other.quick]} ({other.source})"
        )
    return problems


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """Sums of squares of y - x, x and y, and of x * y, in float64 on the CPU."""
    total = torch.zeros(4, dtype=torch.float64, device=x.device)
    for left, right in _chunks(x, y):
        one, other = left.double(), right.double()
        change = other - one
        total += torch.stack([change @ change, one @ one, other @ other, one @ other])
    return total.cpu()


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype:
        return False
    if x.data_ptr() == y.data_ptr() and x.device == y.device:
        return True
    bits = x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)
    return torch.equal(bits[0], bits[1].to(bits[0].device))
