"""Safetensors and files of torch.save, written run by run, and complete or not at all."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import torch

from rft_fast.checkpoints.stored import SAFETENSORS
from rft_fast.common import disk

_CODES = {dtype: code for code, dtype in SAFETENSORS.items()}
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_ROOT = "archive/"


@dataclass(frozen=True)
class Entry:
    """A tensor of the result.

    Attributes:
        name: in the file.
        shape: of the tensor.
        dtype: of its elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer(Protocol):
    """Takes the bytes of all tensors, in the order of the entries, and then the metadata."""

    def write(self, data: memoryview) -> None:
        """Append bytes."""

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what remains; metadata are as long as those that the file was begun with."""


@contextmanager
def writing(
    file: pathlib.Path, entries: Sequence[Entry], metadata: Mapping[str, str], overwrite: bool
) -> Iterator[Writer]:
    """Write a file of tensors. It appears under its name when it is complete and on disk.

    Args:
        file: path of the result; its suffix decides the format.
        entries: its tensors. Those of a safetensors file must be sorted by size of their elements, largest
            first, so that they are aligned.
        metadata: as :meth:`Writer.finish` gets them, or others of the same lengths.
        overwrite: replace a file that exists.

    Raises:
        FileExistsError: the file exists, and is not to be replaced.
        ValueError: torch has no storage for a dtype.
        OSError: the disk is full, or the file cannot be written. Nothing is left then.
    """
    make: Callable[..., Any] = _Safetensors if file.suffix == ".safetensors" else _Archive
    with disk.replacing(file) as temporary:
        with temporary.open("r+b", buffering=0) as stream:
            with _named(file):
                _need_space(stream, sum(entry.nbytes for entry in entries))
                writer = _Named(make(stream, entries, metadata), file)
            try:
                yield writer
            finally:
                writer.close()
        if not overwrite and os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, "appeared while the result was computed", str(file))


@contextmanager
def _named(file: pathlib.Path) -> Iterator[None]:
    """Give errors of the disk the name of the result; they have none, or that of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


class _Named:
    """A writer whose errors name the result, not the input that is open as well."""

    def __init__(self, writer: Any, file: pathlib.Path) -> None:
        self._writer, self._file = writer, file

    def write(self, data: memoryview) -> None:
        with _named(self._file):
            self._writer.write(data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        with _named(self._file):
            self._writer.finish(metadata)

    def close(self) -> None:
        self._writer.close()


class _Safetensors:
    def __init__(self, stream: IO[bytes], entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self._stream, self._entries = stream, entries
        self._header = len(self._head(metadata))
        stream.seek(self._header)

    def _head(self, metadata: Mapping[str, str]) -> bytes:
        table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for entry in self._entries:
            start, end = end, end + entry.nbytes
            table[entry.name] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, data: memoryview) -> None:
        _write_all(self._stream, data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        head = self._head(metadata)
        if len(head) != self._header:
            raise ValueError("merge: metadata are longer than the space that was left for them")
        self._stream.seek(0)
        _write_all(self._stream, memoryview(head))

    def close(self) -> None:
        """Nothing is open but the stream."""


class _Archive:
    """An archive as torch.save writes it: a pickle, and the bytes of each tensor in an entry of its own."""

    def __init__(self, stream: IO[bytes], entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        unknown = [entry for entry in entries if entry.dtype not in _STORAGES]
        if unknown:
            raise ValueError(
                f"merge: {unknown[0].name} is {unknown[0].dtype}, which torch files are not written "
                "with; choose a .safetensors file"
            )
        self._zip = zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED)
        self._zip.writestr(_info("data.pkl"), _pickle(entries))
        self._zip.writestr(_info("byteorder"), b"little")
        self._entries = iter(enumerate(entries))
        self._entry: IO[bytes] | None = None
        self._left = 0
        self._next()

    def _next(self) -> None:
        """Open the entry of the next tensor that is not empty."""
        if self._entry is not None:
            self._entry.close()
            self._entry = None
        for number, entry in self._entries:
            info = _info(f"data/{number}")
            info.file_size = self._left = entry.nbytes
            self._entry = self._zip.open(info, "w", force_zip64=entry.nbytes >= 1 << 31)
            if self._left:
                return
            self._entry.close()
            self._entry = None

    def write(self, data: memoryview) -> None:
        while data:
            if self._entry is None:
                raise ValueError("merge: more bytes than the tensors have")
            part = data[: self._left]
            self._entry.write(part)
            data = data[len(part) :]
            self._left -= len(part)
            if not self._left:
                self._next()

    def finish(self, metadata: Mapping[str, str]) -> None:
        for name, text in metadata.items():
            self._zip.writestr(_info(name), text.encode())
        self._zip.writestr(_info("version"), b"3\n")
        self._zip.close()

    def close(self) -> None:
        """Let go of the stream; an archive that is not finished is left as it is."""
        self._zip.fp = None


def _info(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(_ROOT + name)  # with a date that is always the same


def _need_space(stream: IO[bytes], size: int) -> None:
    """Refuse a result that the disk has no space for, before it is computed."""
    system = os.fstatvfs(stream.fileno())
    if (free := system.f_bavail * system.f_frsize) < size:
        raise OSError(errno.ENOSPC, f"the result needs {size:,} bytes, but the disk has {free:,} free")


def _write_all(stream: IO[bytes], data: memoryview) -> None:
    while data:  # one call writes at most 2 GB
        data = data[stream.write(data) :]


class _Storage:
    """Stands for the bytes of a tensor in the pickle."""

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity


class _Tensor:
    """Is pickled as the call that makes a tensor."""

    def __init__(self, number: int, entry: Entry) -> None:
        count = math.prod(entry.shape)
        steps = tuple(math.prod(entry.shape[place + 1 :]) for place in range(len(entry.shape)))
        storage = _Storage(("storage", _STORAGES[entry.dtype], str(number), "cpu", count))
        self.arguments: tuple[Any, ...] = (storage, 0, entry.shape, steps, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return thing.identity if isinstance(thing, _Storage) else None


def _pickle(entries: Sequence[Entry]) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(
        OrderedDict((entry.name, _Tensor(number, entry)) for number, entry in enumerate(entries))
    )
    return stream.getvalue()
