"""Tensors as files describe them, before they are made, and torch tensors of these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.files import Content
from ..common.pickles import Global, Opaque, Unreadable, kind_of

ContainerKind = Literal["safetensors", "torch", "old torch", "pickle", "torchscript"]
# Entries that rft_fast.merge adds to a safetensors header, or to an archive of torch.save: what the file was
# merged from, and the activations of its towers.
PROVENANCE = "rft_fast.merge"
ACTIVATIONS = {True: "activation.quick_gelu", False: "activation.gelu"}
OURS = (PROVENANCE, *ACTIVATIONS.values())
MOST_DIMENSIONS = 64  # the limit of torch


@dataclass(frozen=True, eq=False)
class Container:
    """What a file holds.

    Attributes:
        kind: of the container.
        value: safetensors: tensors by name; otherwise the value of the pickle.
        size: of the file, in bytes.
        own: TorchScript: class -> names of its parameters and buffers.
        metadata: of a safetensors header; of an archive of torch.save, its entries among OURS.
        activations: TorchScript: activations in its code, True for QuickGELU and False for GELU.
    """

    kind: ContainerKind
    value: Any
    size: int
    own: Mapping[str, frozenset[str]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    activations: frozenset[bool] = frozenset()


class Special(Opaque):
    """A tensor that is not dense; an error only among a model's weights."""


@dataclass(frozen=True, eq=False)
class Span:
    """A range of bytes in a file, read when a tensor is made of it.

    Attributes:
        content: the file.
        start: first byte.
        stop: end, exclusive.
    """

    content: Content
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self) -> memoryview:
        """Read the bytes into new, writable memory."""
        return self.content[self.start : self.stop]


@dataclass(eq=False)
class Storage:
    """Bytes that tensors share.

    Attributes:
        dtype: of its elements; None for untyped bytes.
        nbytes: size as claimed.
        data: the bytes; None until the container has located them.
    """

    dtype: torch.dtype | None
    nbytes: int
    data: memoryview | Span | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is not made yet.

    Attributes:
        storage: its bytes.
        dtype: of its elements.
        offset: of its first element in the storage, in elements, as claimed.
        size: its shape, as claimed.
        stride: in elements, as claimed.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float16", "float32", "float64", "bfloat16", "half", "float", "double"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "short", "int", "long"),
        *("bool", "complex64", "complex128", "cfloat", "cdouble"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}

# dtypes by their names in safetensors files.
SAFETENSORS = {
    name: getattr(torch, kind)
    for name, kind in {
        **{"BOOL": "bool", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
        **{f"{sign}{bits}": f"{'u' * (sign == 'U')}int{bits}" for sign in "IU" for bits in (8, 16, 32, 64)},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
        "C64": "complex64",
    }.items()
    if hasattr(torch, kind)
}

_STORAGES: dict[str, torch.dtype | None] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": None,
    "_Untyped": None,
}
_STORAGE_NAME = re.compile(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage")


def storage(kind: Any, count: Any) -> Storage:
    """Make a storage.

    Args:
        kind: its class, as the pickle names it.
        count: number of elements, as claimed.

    Raises:
        Unreadable: the class is unknown.
        ValueError: the number is not a size.
    """
    match = _STORAGE_NAME.fullmatch(kind.name) if isinstance(kind, Global) else None
    if match is None or match[1] not in _STORAGES:
        raise Unreadable(f"stores tensors with the unknown type {kind_of(kind)}")
    dtype = _STORAGES[match[1]]
    return Storage(dtype, natural(count) * (1 if dtype is None else dtype.itemsize))


def natural(value: Any) -> int:
    """Return a size or an offset after a check.

    Raises:
        ValueError: it is not an integer from 0 to 2**63 - 1.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a size or offset is not an integer from 0 to 2**63 - 1")
    return value


class Maker:
    """Makes dense, contiguous tensors; equal descriptions give the same tensor.

    Args:
        size: of the file in bytes. Data that cannot be a view of the file's bytes is copied, at most this
            much in all.
        meta: make tensors on the device ``meta``, without reading their bytes.
        keep: whether tensors and the bytes of storages are kept for tensors that share them; otherwise each
            tensor is read alone, and only its bytes.
    """

    def __init__(self, size: int, meta: bool = False, keep: bool = True) -> None:
        self.size, self.budget, self.meta, self.keep = size, size, meta, keep
        self.made: dict[Any, Tensor] = {}

    def tensor(self, stored: Stored) -> Tensor:
        """Make a tensor.

        Args:
            stored: its description.

        Raises:
            Unreadable: it exceeds its storage, has more elements than it, or a shape that torch does not
                support.
        """
        key = (id(stored.storage), stored.dtype, stored.offset, stored.size, stored.stride)
        if key in self.made:
            return self.made[key]
        if not self.keep:
            self.budget = self.size
        try:
            made = self._make(stored)
        except (RuntimeError, OverflowError) as error:
            raise Unreadable("claims a shape that torch cannot create: it is damaged") from error
        if self.keep:
            self.made[key] = made
        return made

    def _make(self, stored: Stored) -> Tensor:
        data = stored.storage.data
        if data is None:
            raise Unreadable("has a storage without bytes: it is damaged")
        count = 1
        for side in stored.size:
            count *= side
            if count >= 1 << 63:
                break
        itemsize = stored.dtype.itemsize
        if len(stored.size) > MOST_DIMENSIONS or count * itemsize > len(data):
            raise Unreadable(
                f"claims shape {stored.size[:8]} but stores only {len(data)} bytes; "
                "save it with .contiguous()"
            )
        if not count:
            return torch.empty(stored.size, dtype=stored.dtype, device="meta" if self.meta else "cpu")
        last = stored.offset + sum(
            (side - 1) * step for side, step in zip(stored.size, stored.stride, strict=True)
        )
        if (last + 1) * itemsize > len(data):
            raise Unreadable(f"extends beyond its storage of {len(data)} bytes: it is damaged")
        if self.meta:
            return torch.empty(stored.size, dtype=stored.dtype, device="meta")
        first, end = stored.offset * itemsize, (last + 1) * itemsize
        if isinstance(data, Span) and not self.keep:
            raw = torch.frombuffer(data.content[data.start + first : data.start + end], dtype=torch.uint8)
        else:
            if isinstance(data, Span):
                data = stored.storage.data = data.read()
            raw = torch.frombuffer(data, dtype=torch.uint8)[first:end]
        if raw.data_ptr() % itemsize:  # in a pickle, tensors are not aligned
            raw = self._charge(raw).clone()
        result = raw.view(stored.dtype).as_strided(stored.size, stored.stride)
        return result if result.is_contiguous() else self._charge(result).contiguous()

    def _charge(self, tensor: Tensor) -> Tensor:
        """Pay for a copy."""
        self.budget -= tensor.nbytes
        if self.budget < 0:
            raise Unreadable("holds tensors that expand to more than the size of the file")
        return tensor
