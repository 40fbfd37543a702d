"""Sharded tensors: which part of the full tensor this process holds.

A DTensor (FSDP2, tensor parallelism) is written through its local part, whose noise is that of its place in
the full tensor: the same bits on any sharding, without communication.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Types that hold their own data; another subclass of Tensor may be anything.
PLAIN = (Tensor, nn.Parameter)


class Part(NamedTuple):
    """The local part of a tensor.

    Attributes:
        local: The memory of this process.
        shape: Shape of the full tensor.
        starts: Index of the part's first element in the full tensor.
        layout: What parts must share to be written together: device mesh and placements; None: not sharded.
    """

    local: Tensor
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    layout: tuple[Any, ...] | None


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Where nothing has imported them, there are none."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def check_sharded(module: nn.Module) -> None:
    """Refuse a module whose parameters FSDP2 has gathered: freeing them would lose what is written.

    Raises:
        ValueError: Part of the module is unsharded; the message names it.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or torch.compiler.is_compiling():
        return
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, kind)]
    for name, part in reversed(parts):  # the inner ones first: each counts its own parameters
        inner = {id(p) for other in part.modules() if other is not part and isinstance(other, kind)
                 for p in other.parameters()}  # fmt: skip
        own = [p for p in part.parameters() if id(p) not in inner]
        if own and not any(is_sharded(p) for p in own):
            raise ValueError(
                f"write: FSDP has gathered the parameters of {name or 'the module'}, as it does for a "
                "forward pass, and would discard what is written to them; call its reshard() first"
            )


def part_of(tensor: Tensor, what: str) -> Part:
    """Return the local part of a tensor; of one that is not sharded, the tensor itself.

    Args:
        tensor: The tensor.
        what: What errors call it.

    Raises:
        ValueError: A placement is neither Shard nor Replicate, or the local part has another shape than
            these give it.
    """
    if not is_sharded(tensor):
        return Part(tensor, tuple(tensor.shape), (0,) * tensor.ndim, None)
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    sizes, starts = list(tensor.shape), [0] * tensor.ndim
    here = mesh.get_coordinate()
    for axis, placement in enumerate(placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:  # a subclass may divide otherwise
            raise ValueError(
                f"write: {what} has the placement {placement}, expected Shard(dim) or Replicate(). "
                "Redistribute it first: tensor.redistribute(placements=[Replicate()])"
            )
        dim, count = placement.dim, mesh.size(axis)
        chunk = -(-sizes[dim] // count)  # as torch.chunk
        first = min(chunk * (here[axis] if here else count), sizes[dim])
        starts[dim] += first
        sizes[dim] = min(chunk, sizes[dim] - first)
    with torch.no_grad():
        local = tensor.to_local().detach()  # type: ignore[attr-defined]
    if here is not None and tuple(local.shape) != tuple(sizes):
        raise ValueError(
            f"write: the local part of {what} has shape {tuple(local.shape)}, but {placements} of "
            f"{tuple(tensor.shape)} gives {tuple(sizes)}; make it with distribute_tensor"
        )
    return Part(local, tuple(tensor.shape), tuple(starts), (mesh, tuple(placements)))


def on_part(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of a tensor; of a DTensor, of its local part, sharded as it is.

    Args:
        tensor: The tensor.
        function: Returns a tensor of the shape of its argument.
    """
    if not is_sharded(tensor):
        return function(tensor)
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        local = function(tensor.to_local())  # type: ignore[attr-defined]
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    strides = torch.empty(tensor.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=strides)
