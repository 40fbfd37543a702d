"""The rows of a table: the tensors of a write, checked, with the place of their noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from rft_fast.kernels.contract import DTYPES
from rft_fast.kernels.places import (
    DIMENSIONS,
    Place,
    check_blocks,
    check_layout,
    first_blocks,
    is_dense,
    place_of,
)
from rft_fast.kernels.shards import PLAIN, Part, part_of

# What errors call the three tensors of a row.
ROLES = ("out", "zeroshot", "finetuned")


class Row(NamedTuple):
    """One entry of a table.

    Attributes:
        out, zeroshot, finetuned: Three tensors of equal shape and layout.
        first_block: Philox block at which the noise starts.
        name: What errors call it.
        place: Where the noise of each element is; None: it follows in the order of memory.
        whole: The DTensor whose local part ``out`` is; None: there is none.
    """

    out: Tensor
    zeroshot: Tensor
    finetuned: Tensor
    first_block: int
    name: str
    place: Place | None = None
    whole: Tensor | None = None

    @property
    def size(self) -> int:
        return self.out.numel()


def device_of(rows: Sequence[Row]) -> torch.device:
    """Return the device of a table's rows; the CPU for an empty table."""
    return rows[0].out.device if rows else torch.device("cpu")


def mark_written(rows: Sequence[Row]) -> None:
    """Let autograd see that saved tensors have changed, as after any in-place operation."""
    for written in ([row.out for row in rows], [row.whole for row in rows if row.whole is not None]):
        torch.autograd.graph.increment_version(written)


def make_rows(
    out: Sequence[Tensor],
    zeroshot: Sequence[Tensor],
    finetuned: Sequence[Tensor],
    names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    roles: tuple[str, str, str] = ROLES,
) -> list[Row]:
    """Check the tensors of a table and assign their noise.

    Args:
        out, zeroshot, finetuned: Equally many tensors.
        names: What error messages call the tensors; None: "tensor 0", "tensor 1" ...
        blocks: Philox block at which the noise of each tensor starts; None: one tensor after the other from
            0.
        roles: What error messages call the three arguments.

    Raises:
        TypeError: A dtype is not offered.
        ValueError: Tensors differ in shape, layout or device, are not dense, overlap, or have freed memory;
            their noise overlaps or exceeds the counter; or a placement is not offered.
    """
    rows = lay_out(out, zeroshot, finetuned, names, blocks, roles)
    if blocks is not None:
        check_blocks(blocks, [tensor.numel() for tensor in out], [row.name for row in rows])
    for row in rows:
        check_memory(row, roles)
    _check_overlap(rows, roles)
    return rows


def lay_out(
    out: Sequence[Tensor],
    zeroshot: Sequence[Tensor],
    finetuned: Sequence[Tensor],
    names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    roles: tuple[str, str, str] = ROLES,
) -> list[Row]:
    """As :func:`make_rows`, without the checks of memory: for tensors that have no addresses."""
    if not len(out) == len(zeroshot) == len(finetuned):
        raise ValueError(
            f"write: {roles[0]}, {roles[1]} and {roles[2]} must hold equally many tensors; "
            f"got {len(out)}, {len(zeroshot)} and {len(finetuned)}"
        )
    if names is not None and len(names) != len(out):
        raise ValueError(f"write: expected a name for each of the {len(out)} tensors; got {len(names)} names")
    labels = [f"tensor {i}" for i in range(len(out))] if names is None else list(names)
    starts = first_blocks(out) if blocks is None else blocks
    rows: list[Row] = []
    for *tensors, start, label in zip(out, zeroshot, finetuned, starts, labels, strict=True):
        rows.append(_row(tensors, start, label, roles, rows[0].out.device if rows else None))
    return rows


def _row(
    tensors: Sequence[Tensor],
    start: int,
    label: str,
    roles: tuple[str, str, str],
    device: torch.device | None,
) -> Row:
    whole = shape = starts = None
    if any(type(tensor) not in PLAIN for tensor in tensors):
        parts = [part_of(tensor, f"{role} of {label}") for tensor, role in zip(tensors, roles, strict=True)]
        _check_sharding(parts, roles, label)
        if parts[0].layout is not None:
            whole, (_, shape, starts, _) = tensors[0], parts[0]
        tensors = [part.local for part in parts]
    out, zeroshot, finetuned = tensors
    row = Row(out, zeroshot, finetuned, start, label, None, whole)
    device = device or row.out.device
    ordinary = [_check_tensor(tensor, role, row, device) for role, tensor in zip(roles, tensors, strict=True)]
    for role, tensor in zip(roles[1:], tensors[1:], strict=True):
        if tensor.shape != row.out.shape:
            raise ValueError(
                f"write: shapes differ for {label}: {roles[0]} {tuple(row.out.shape)}, "
                f"{role} {tuple(tensor.shape)}"
            )
    if whole is None and all(ordinary):
        return row
    _check_layout(row, roles)
    skipped, place = place_of(row.out, shape or tuple(row.out.shape), starts or (0,) * row.out.ndim)
    if place is not None and len(place.sizes) > DIMENSIONS:
        raise ValueError(
            f"write: {roles[0]} of {label}, shape {tuple(row.out.shape)} and strides {row.out.stride()}, "
            f"needs {len(place.sizes)} strides, at most {DIMENSIONS} are supported. Write to a .contiguous() "
            "copy, and copy the result back"
        )
    return row._replace(first_block=start + skipped, place=place)


def _check_tensor(tensor: Tensor, role: str, row: Row, device: torch.device) -> bool:
    """Return whether a tensor is contiguous; refuse what no backend can write."""
    if tensor.dtype not in DTYPES:
        offered = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(
            f"write: {role} of {row.name} is {tensor.dtype}, expected one of {offered}. "
            "Convert it with .float(), or copy it instead of interpolating it"
        )
    strided = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_neg()
    # A contiguous tensor is dense. (Strides of a tensor whose sizes are not known yet may not be compared.)
    contiguous = strided and tensor.is_contiguous()
    if not contiguous and not (strided and is_dense(tensor)):
        check_layout(tensor, f"{role} of {row.name}")
        if tensor.is_neg():
            raise ValueError(
                f"write: {role} of {row.name} is a negated view, such as the imaginary part of a conjugate "
                "tensor; pass a .resolve_neg() copy, and copy the result of an output back"
            )
        raise ValueError(
            f"write: {role} of {row.name}, shape {tuple(tensor.shape)} and strides {tensor.stride()}, has "
            "gaps or overlaps in memory; pass a .contiguous() copy, and copy the result of an output back "
            "(for a parameter p, once: p.data = p.data.contiguous())"
        )
    if tensor.device != device:
        raise ValueError(
            f"write: all tensors must lie on one device; {role} of {row.name} is on "
            f"{tensor.device}, the first output on {device}"
        )
    return contiguous


def _check_sharding(parts: Sequence[Part], roles: tuple[str, str, str], label: str) -> None:
    for role, part in zip(roles, parts, strict=True):
        if part.layout != parts[0].layout or (part.layout and part.shape != parts[0].shape):
            raise ValueError(
                f"write: {role} of {label}, shape {part.shape}, {_sharding(part)}, but the tensor to write, "
                f"shape {parts[0].shape}, {_sharding(parts[0])}; shard both alike with "
                "distribute_tensor(tensor, device_mesh, placements) or .redistribute(...)"
            )


def _sharding(part: Part) -> str:
    return "is not sharded" if part.layout is None else f"is sharded as {part.layout[1]} on {part.layout[0]}"


def _check_layout(row: Row, roles: tuple[str, str, str]) -> None:
    def strides(tensor: Tensor) -> list[int]:
        return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]

    for role, tensor in zip(roles[1:], (row.zeroshot, row.finetuned), strict=True):
        if strides(tensor) != strides(row.out) and row.size:
            raise ValueError(
                f"write: {role} of {row.name} has strides {tensor.stride()}, {roles[0]} {row.out.stride()}; "
                f"all must have the same layout in memory: convert {role} to that of {roles[0]}, e.g. "
                ".contiguous(memory_format=torch.channels_last)"
            )


def check_memory(row: Row, roles: tuple[str, str, str]) -> None:
    """Raise ValueError for tensors whose memory was freed."""
    for role, tensor in zip(roles, (row.out, row.zeroshot, row.finetuned), strict=True):
        if lacks_memory(tensor):
            raise ValueError(
                f"write: {role} of {row.name}, shape {tuple(tensor.shape)}, does not fit into its storage of "
                f"{tensor.untyped_storage().nbytes()} bytes, which was freed or shrunk (as FSDP does between "
                "uses); gather the full tensor first"
            )


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a dense tensor extends beyond its storage (``untyped_storage().resize_`` shrinks it)."""
    size = tensor.numel()
    end = (tensor.storage_offset() + size) * tensor.element_size()
    return size > 0 and bool(end > tensor.untyped_storage().nbytes())


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype


def _check_overlap(rows: Sequence[Row], roles: tuple[str, str, str]) -> None:
    """Refuse outputs that share memory with anything but their own source, which would be read too late."""
    if rows and rows[0].out.device.type == "meta":
        return
    spans: list[tuple[int, int, bool, str]] = []  # first byte, end, is an output, what
    for row in rows:
        if row.size == 0:
            continue
        spans.append((*_span(row.out), True, f"{roles[0]} of {row.name}"))
        for role, source in zip(roles[1:], (row.zeroshot, row.finetuned), strict=True):
            if not _is_same(source, row.out):
                spans.append((*_span(source), False, f"{role} of {row.name}"))
    spans.sort()
    # Sweep by address: of the earlier spans, only the furthest output and the furthest span matter.
    any_end, any_what, out_start, out_end, out_what = -1, "", -1, -1, ""
    for start, end, is_out, what in spans:
        reach, other = (any_end, any_what) if is_out else (out_end, out_what)
        if is_out and (start, end) == (out_start, out_end):
            raise ValueError(
                f"write: {what} and {out_what} are the same memory (tied weights); name it once: pass the "
                "module, or leave one of them out"
            )
        if start < reach:
            raise ValueError(
                f"write: {what} overlaps {other} in memory; an output may be its own source, but must not "
                "share memory with other tensors. Give it its own storage, e.g. with .clone()"
            )
        if end > any_end:
            any_end, any_what = end, what
        if is_out and end > out_end:
            out_start, out_end, out_what = start, end, what


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def check_runs(runs: Iterable[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """Check half-open (first, last) ranges of table rows and return them in ascending order.

    Args:
        runs: Ranges in any order; empty ones are allowed.
        rows: Rows of the table.

    Raises:
        TypeError: ``runs`` is not a list of pairs of integers.
        ValueError: A range lies outside the table, or two overlap.
    """
    try:
        found = sorted([(index(first), index(last)) for first, last in runs])
    except (TypeError, ValueError):
        raise TypeError(
            f"write: tensors must be a list of runs, each a pair of integers (first, last); got {runs!r}"
        ) from None
    before = (0, 0)
    for first, last in found:
        if not 0 <= first <= last <= rows:
            raise ValueError(f"write: run ({first}, {last}) is outside the table's {rows} tensors")
        if first == last:
            continue
        if first < before[1]:  # the second write of a row in place would start from the first one's
            raise ValueError(f"write: runs {before} and ({first}, {last}) overlap; name each tensor once")
        before = (first, last)
    return found
