"""What files store, as they describe it, and the tensors that are made of that."""

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
MOST_DIMENSIONS = 64  # torch has no tensors of more


@dataclass(frozen=True, eq=False)
class Container:
    """What a file holds. kind: "safetensors", "torch", "old torch", "pickle" or "torchscript".

    value: tensors by name (safetensors), else what the pickle describes, all of classes in values.py.
    own: of the classes of a TorchScript archive, the names of their parameters and buffers. metadata: of a
    safetensors header. activations: whether QuickGELU (True) and GELU (False) are in a TorchScript archive's
    code.
    """

    kind: ContainerKind
    value: Any
    size: int
    own: Mapping[str, frozenset[str]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    activations: frozenset[bool] = frozenset()


class Special(Opaque):
    """A tensor that is not dense: an error only where a model's weights should be."""


@dataclass(frozen=True, eq=False)
class Span:
    """Where bytes lie in a file; read when a tensor is made of them."""

    content: Content
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self) -> memoryview:
        """The bytes, writable."""
        return self.content[self.start : self.stop]


@dataclass(eq=False)
class Storage:
    """Bytes that tensors share. data: None until the container says where they are.

    dtype: None for bytes without a type. nbytes: as claimed until data is there.
    """

    dtype: torch.dtype | None
    nbytes: int
    data: memoryview | Span | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is not made yet. offset, size, stride: as claimed, in elements."""

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

# As files of safetensors name them.
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
    """A storage of a type that the pickle names, with ``count`` elements."""
    match = _STORAGE_NAME.fullmatch(kind.name) if isinstance(kind, Global) else None
    if match is None or match[1] not in _STORAGES:
        raise Unreadable(f"stores tensors as {kind_of(kind)}, which is unknown here")
    dtype = _STORAGES[match[1]]
    return Storage(dtype, natural(count) * (1 if dtype is None else dtype.itemsize))


def natural(value: Any) -> int:
    """A size or offset, if it can be one; ValueError else."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a size or offset is no natural number below 2**63")
    return value


class Maker:
    """Makes tensors of what a file holds: dense, contiguous, each distinct one once.

    size: the file's, in bytes. What cannot be a view of its bytes is copied; all copies together may not take
        more. meta: tensors of the type and shape alone, on the device "meta"; their bytes are not read.
    """

    def __init__(self, size: int, meta: bool = False) -> None:
        self.budget, self.meta = size, meta
        self.made: dict[Any, Tensor] = {}

    def tensor(self, stored: Stored) -> Tensor:
        """Raises Unreadable for a tensor that goes beyond its storage, or has more elements than it."""
        key = (id(stored.storage), stored.dtype, stored.offset, stored.size, stored.stride)
        if key not in self.made:
            try:
                self.made[key] = self._make(stored)
            except (RuntimeError, OverflowError) as error:
                raise Unreadable("claims a shape that torch cannot make: it is damaged") from error
        return self.made[key]

    def _make(self, stored: Stored) -> Tensor:
        data = stored.storage.data
        if data is None:
            raise Unreadable("has a storage whose bytes are nowhere: it is damaged")
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
            raise Unreadable(f"goes beyond its storage of {len(data)} bytes: it is damaged")
        if self.meta:
            return torch.empty(stored.size, dtype=stored.dtype, device="meta")
        if isinstance(data, Span):
            data = stored.storage.data = data.read()
        raw = torch.frombuffer(data, dtype=torch.uint8)
        raw = raw[stored.offset * itemsize : (last + 1) * itemsize]
        if raw.data_ptr() % itemsize:  # in a pickle, tensors begin anywhere
            raw = self._charge(raw).clone()
        result = raw.view(stored.dtype).as_strided(stored.size, stored.stride)
        return result if result.is_contiguous() else self._charge(result).contiguous()

    def _charge(self, tensor: Tensor) -> Tensor:
        self.budget -= tensor.nbytes
        if self.budget < 0:
            raise Unreadable("holds tensors that unfold to more than its size")
        return tensor
