"""Tensors that are not made yet, as the pickles of checkpoints describe them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..common.files import Content
from ..common.pickles import Global, Opaque, Unreadable, kind_of


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
