"""Reader of IDX files, plain or in gzip: MNIST, Fashion-MNIST, KMNIST and EMNIST as published."""

from __future__ import annotations

import gzip
import math
import os
import pathlib
import re
import zlib
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from rft_fast.common import files as on_disk
from rft_fast.common.words import some

from .source import Source, numbered, reading

_IMAGES = re.compile(r"(?P<stem>.*)images(?P<rest>[-.]idx3-ubyte)(?P<gz>\.gz)?")
_GZIP = b"\x1f\x8b"
_UBYTE = 0x08  # the code of unsigned bytes, third byte of a file; the fourth is the number of dimensions
_TYPES = {0x08: "unsigned bytes", 0x09: "signed bytes", 0x0B: "16-bit integers", 0x0C: "32-bit integers"}
_TYPES |= {0x0D: "32-bit floats", 0x0E: "64-bit floats"}
MOST_UNPACKED = 2 << 30  # bytes that a gzip file may unpack to: four times the largest of the published sets
_AGAIN = "download it again"

_Array = np.ndarray[Any, Any]


def matches(path: pathlib.Path) -> bool:
    """Whether the path is a file of images, a folder with some, or torchvision's, with some in ``raw``."""
    return bool(_found(path))


def source(path: pathlib.Path, where: str) -> Source:
    """Read the images of an IDX file, and their labels from the file beside it.

    ``train-images-idx3-ubyte`` has unsigned bytes [n, h, w], ``train-labels-idx1-ubyte`` unsigned bytes [n];
    a dot may stand before ``idx``, and ``.gz`` at the end. Whether a file is compressed is read from its
    content; where a file is there in both forms, the uncompressed one is read. The names of the classes are
    their numbers.

    Args:
        path: a file of images; or a folder with one such file that is not of training images, by its name.
        where: prefix of error messages.

    Raises:
        ValueError: a file is missing, is no IDX file of such bytes, is cut short, has another size than its
            header says, or unpacks to more than :data:`MOST_UNPACKED` bytes; or the counts of images and
            labels differ. The message names it.
    """
    file = _one(path, where)
    stored = on_disk.Inputs()
    with reading(stored, file, f"{where}: {file} is not an image file in IDX format"):
        images = _read(file, 3)
    labels_file = _labels_file(file, where)
    with reading(stored, labels_file, f"{where}: {labels_file} is not a label file in IDX format"):
        labels = _read(labels_file, 1)
    if len(labels) != len(images):
        raise ValueError(
            f"{where}: {file} has {len(images)} images, but {labels_file.name} has {len(labels)} "
            "labels; use files of the same split, or download both again"
        )
    first, last = int(labels.min()), int(labels.max())
    return Source(
        kind="idx",
        path=path if path.is_file() else file,
        files=numbered(file, len(images)),
        labels=torch.from_numpy(labels.astype(np.int64)) - first,
        class_names=tuple(map(str, range(first, last + 1))),
        open=lambda index: Image.fromarray(images[index]),
        notes=(f"IDX: {file.name}, {labels_file.name}",),
        stored=stored,
    )


def _found(path: pathlib.Path) -> list[pathlib.Path]:
    """Files of images at a path; of a file that is there in both forms, the uncompressed one."""
    if path.is_file():
        return [path] if _IMAGES.fullmatch(path.name) else []
    for folder in (path, path / "raw"):
        try:
            names = sorted(name for name in os.listdir(folder) if _IMAGES.fullmatch(name))
        except OSError:
            continue
        files = [
            folder / name for name in names if name.removesuffix(".gz") == name or name[:-3] not in names
        ]
        if files := [file for file in files if file.is_file()]:
            return files
    return []


def _one(path: pathlib.Path, where: str) -> pathlib.Path:
    """The file of images to read."""
    found = _found(path)
    chosen = found if path.is_file() else [file for file in found if "train" not in file.name.lower()]
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        raise ValueError(
            f"{where}: expected a file such as t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz, or a "
            f"folder with one; {path} is neither"
        )
    names = [file.name for file in found]
    what = "only training images" if not chosen else "several files of images"
    raise ValueError(f"{where}: {path} has {what}, {some(names)}; give the path of one of them")


def _labels_file(images: pathlib.Path, where: str) -> pathlib.Path:
    name = _IMAGES.fullmatch(images.name)
    if name is None:  # _found gives no others
        raise ValueError(f"{where}: the name of {images} is not that of an image file")
    usual = f"{name['stem']}labels-idx1-ubyte"
    for other in (usual, f"{name['stem']}labels.idx1-ubyte"):
        for file in (images.with_name(other), images.with_name(f"{other}.gz")):
            if file.is_file():
                return file
    raise ValueError(
        f"{where}: {images} has no labels: expected {usual} or {usual}.gz beside it; download it"
    )


def _read(file: pathlib.Path, dimensions: int) -> _Array:
    """Read the unsigned bytes of an IDX file, none of whose dimensions is 0."""
    header = 4 + 4 * dimensions
    with on_disk.opened(file) as stream:
        packed = stream.read(2) == _GZIP
        stream.seek(0)
        if packed:
            data = _unpacked(stream, header, dimensions)
        else:
            data = _part(stream, header)
            _check_size(data, dimensions, os.fstat(stream.fileno()).st_size)
            data += stream.read()
    _check_size(data, dimensions, len(data), " unpacked" if packed else "")
    return np.frombuffer(data, np.uint8, offset=header).reshape(_shape(data, dimensions))


def _unpacked(stream: IO[bytes], header: int, dimensions: int) -> bytes:
    """Unpack a gzip file, and no more than one byte beyond what its header says."""
    try:
        with gzip.GzipFile(fileobj=stream) as archive:
            data = bytearray(_part(archive, header))
            most = header + _size(data, dimensions) + 1
            if most > MOST_UNPACKED:
                raise ValueError(
                    f"its header says {most - 1:,} bytes, but a gzip file may unpack to at most "
                    f"{MOST_UNPACKED:,}; if you trust it, unpack it with gunzip"
                )
            data += _part(archive, most - len(data))
    except EOFError as error:
        raise ValueError(f"it is a truncated gzip file; {_AGAIN}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"it is a damaged gzip file; {_AGAIN}") from error
    return bytes(data)


def _part(stream: IO[bytes] | gzip.GzipFile, count: int) -> bytes:
    """Read so many bytes, or all that there are, in pieces: memory is taken only for what is there."""
    parts = []
    while count > 0 and (piece := stream.read(min(count, 1 << 20))):
        parts.append(piece)
        count -= len(piece)
    return b"".join(parts)


def _shape(data: bytes | bytearray, dimensions: int) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, 4 + 4 * dimensions, 4))


def _size(data: bytes | bytearray, dimensions: int) -> int:
    """Bytes that follow the header, which is checked."""
    if len(data) >= 4 and data[:4] != bytes((0, 0, _UBYTE, dimensions)):
        raise ValueError(
            f"it begins with {data[:4].hex()}{_meaning(data)}, expected "
            f"0000{_UBYTE:02x}{dimensions:02x} (unsigned bytes, {_counted(dimensions)}); "
            f"{_AGAIN}, or check its name"
        )
    if len(data) < 4 + 4 * dimensions:
        raise ValueError(
            f"it has {len(data)} bytes, fewer than the {4 + 4 * dimensions} bytes of its header; {_AGAIN}"
        )
    shape = _shape(data, dimensions)
    if 0 in shape:
        raise ValueError(f"it is empty: its header says {' x '.join(map(str, shape))}; {_AGAIN}")
    return math.prod(shape)


def _check_size(data: bytes, dimensions: int, held: int, how: str = "") -> None:
    """Refuse a file of another size than its header says. held: its bytes."""
    size = 4 + 4 * dimensions + _size(data, dimensions)
    if held != size:
        shape = " x ".join(map(str, _shape(data, dimensions)))
        raise ValueError(
            f"its header says {shape}, which is {size:,} bytes, but there are {held:,}{how}; {_AGAIN}"
        )


def _meaning(data: bytes | bytearray) -> str:
    """What the first bytes of another IDX file say."""
    if data[:2] != b"\0\0" or data[2] not in _TYPES:
        return ""
    return f" ({_TYPES[data[2]]}, {_counted(data[3])})"


def _counted(dimensions: int) -> str:
    return "1 dimension" if dimensions == 1 else f"{dimensions} dimensions"
