"""Where the noise of a tensor, or of a part of one, starts in the noise of the whole model.

Positions count elements. Each tensor of a model starts a new Philox block of four, so that tensor i starts at
the sum of the sizes before it, each rounded up to a multiple of four. Within a tensor the position is the
logical (row-major) index in its full shape, whatever its layout in memory and however it is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from rft_fast.kernels.containers import Listed, Tensors, as_given, listed, some
from rft_fast.kernels.contract import BLOCK, BLOCKS, as_list, is_list, whole

# An offset for the first tensor, or one for each: in order, or by name.
Offset: TypeAlias = int | Sequence[int] | Mapping[str, int]
# Dimensions of a place that kernels take, after merging.
DIMENSIONS = 4


class Place(NamedTuple):
    """Positions of elements whose order in memory is not that of their noise.

    The element at (i0, i1, ...), counted in the order of memory, has the position
    ``start + sum(i * stride)`` behind the row's first block.

    Attributes:
        start: Position of the first element.
        sizes: At most DIMENSIONS sizes, the outermost first.
        strides: As many steps in position.
    """

    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def padded(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return sizes and strides of DIMENSIONS dimensions: outer ones of size 1 are added."""
        missing = DIMENSIONS - len(self.sizes)
        return (1,) * missing + self.sizes, (0,) * missing + self.strides


def offsets(params: Tensors) -> dict[str, int] | list[int] | int:
    """Return the place of every tensor in the noise of the whole model.

    ``perturb_(model.parameters(), ...)`` gives tensor i the noise that starts at ``offsets(...)[i]``. So
    parts of a model get the very noise that they have in the whole::

        at = rft.offsets(model)  # name -> offset
        for name, p in model.named_parameters():
            rft.perturb_(p, rho, draw=step, offset=at[name])
        rft.perturb_({"head.weight": model.head.weight}, rho, draw=step, offset=at)  # by name

    Args:
        params: The whole model: tensors of any shape in any container that :func:`rft_fast.perturb_` takes.
            Only shapes are used; of a DTensor, the full shape.

    Returns:
        Offsets in elements, multiples of 4: a dict by name for a module or named tensors, 0 for one tensor,
        else a list.

    Raises:
        TypeError: The argument holds something that is not a tensor.
    """
    tensors, names = listed("params", params)
    found = [block * BLOCK for block in first_blocks(tensors)]
    return as_given(params, found, names)  # type: ignore[arg-type, no-any-return]


def first_blocks(tensors: Sequence[Tensor]) -> list[int]:
    """Return the Philox block at which the noise of each tensor starts: each tensor starts a new block."""
    starts, block = [], 0
    for tensor in tensors:
        starts.append(block)
        block += -(-tensor.numel() // BLOCK)
    return starts


def blocks_at(listed: Listed, offset: Offset, name: str = "offset") -> list[int]:
    """Return the Philox block at which each tensor's noise starts.

    Args:
        listed: The tensors, and their names if they have any.
        offset: Where the first one starts, in elements, the others following; or where each one starts, in
            order or by name.
        name: Name of the argument, for errors.

    Raises:
        TypeError: An offset is not an integer; or they are given by name, and the tensors have none.
        ValueError: An offset is negative, no multiple of 4, or beyond the counter; there are not as many as
            tensors; or a name is missing.
    """
    tensors, names = listed
    if isinstance(offset, Mapping):
        if names is None:
            raise TypeError(
                f"write: {name} is a dict by name, but the tensors have no names; pass the tensors as a "
                "module, named_parameters() or a dict, or the offsets as a list"
            )
        if missing := [each for each in names if each not in offset]:
            raise ValueError(f"write: {name} lacks {some(missing)}; rft.offsets(model) gives them all")
        offset = [offset[each] for each in names]
    if not is_list(offset):
        first = _block(name, offset)
        return [first + block for block in first_blocks(tensors)]
    given = as_list(offset)
    if len(given) != len(tensors):
        raise ValueError(
            f"write: {name} must be one number, or a list with one for each of the {len(tensors)} tensors; "
            f"got {len(given)} (rft.offsets(params) gives such a list)"
        )
    return [_block(f"{name}[{place}]", value) for place, value in enumerate(given)]


def _block(name: str, offset: object) -> int:
    position = whole(name, offset, BLOCK * BLOCKS)
    if position % BLOCK:
        raise ValueError(
            f"write: {name} must be a multiple of {BLOCK}, because random numbers are made for {BLOCK} "
            f"elements at a time; got {position} (rft.offsets(params) gives the offset of each tensor)"
        )
    return position // BLOCK


def check_blocks(starts: Sequence[int], sizes: Sequence[int], labels: Sequence[str]) -> None:
    """Refuse noise that two tensors would share, or beyond the counter.

    Args:
        starts: First block of each tensor.
        sizes: Elements of each tensor.
        labels: What errors call the tensors.

    Raises:
        ValueError: The noise of two tensors overlaps, or exceeds the counter; the message names them.
    """
    spans = sorted(
        (start, start - (-size // BLOCK), label)
        for start, size, label in zip(starts, sizes, labels, strict=True)
        if size
    )
    before, last = 0, ""
    for start, end, label in spans:
        if end > BLOCKS:
            raise ValueError(
                f"write: the noise of {label} starts at {start * BLOCK} and exceeds the counter, which "
                f"ends at 2**{(BLOCK * BLOCKS).bit_length() - 1}; choose a smaller offset"
            )
        if start < before:
            raise ValueError(
                f"write: the noise of {label} starts at {start * BLOCK}, within that of {last}, which ends "
                f"at {before * BLOCK}: both would get the same random numbers; rft.offsets(params) gives "
                "offsets that do not overlap"
            )
        before, last = end, label


def check_layout(tensor: Tensor, what: str) -> None:
    """Raise ValueError for a tensor without strides: sparse, nested or of oneDNN."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(
            f"write: {what} is {layout.lstrip('_')}, expected a dense tensor; pass its dense values "
            "(tensor.values(), .to_dense(), or .unbind() of a nested one)"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def place_of(local: Tensor, shape: Sequence[int], starts: Sequence[int]) -> tuple[int, Place | None]:
    """Return where the noise of a dense tensor lies within that of the full tensor it is a part of.

    Args:
        local: The part in memory.
        shape: Shape of the full tensor.
        starts: Index of the part's first element in the full tensor.

    Returns:
        Blocks to skip, and the rest as a ``Place``; None where the noise follows in the order of memory.
    """
    steps = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    start = sum(step * first for step, first in zip(steps, starts, strict=True))
    axes = [axis for axis, size in enumerate(local.shape) if size != 1]
    axes.sort(key=local.stride, reverse=True)
    merged: list[tuple[int, int]] = []  # size, step
    for axis in axes:
        size, step = local.shape[axis], steps[axis]
        if merged and merged[-1][1] == size * step:
            merged[-1] = merged[-1][0] * size, step
        else:
            merged.append((size, step))
    in_order = not merged or (len(merged) == 1 and merged[0][1] == 1)
    if local.numel() == 0 or (in_order and start % BLOCK == 0):
        return start // BLOCK, None
    sizes, strides = zip(*(merged or [(1, 1)]), strict=True)
    return 0, Place(start, sizes, strides)
