"""Reader of CIFAR-10, CIFAR-100, CIFAR-10.1, CIFAR-10.2 and STL-10, in the files that were published."""

from __future__ import annotations

import io
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from rft_fast.clip import prompts
from rft_fast.common import files as on_disk
from rft_fast.common.words import many, some
from rft_fast.datasets import cache as caches

from . import pickled_arrays
from .source import Source, numbered, reading

Array = np.ndarray[Any, Any]

CIFAR10, STL10 = prompts.CLASS_NAMES["cifar10"], prompts.CLASS_NAMES["stl10"]
CIFAR100 = tuple(name.replace(" ", "_") for name in prompts.CLASS_NAMES["cifar100"])  # as published


@dataclass(frozen=True)
class _Layout:
    """One published form of a data set.

    Attributes:
        title: name of the data set.
        test: pattern of the file with test images.
        train: pattern of the files with training images.
        read: returns a file's images, uint8 [n, h, w, 3], and labels, integers [n].
        names: class names, if no file beside has them.
        meta: the file with class names, and the key if it is a pickle.
        generic: name of the published folder, if file names alone are too general; in other folders, ``meta``
            must exist, too.
        parts: number of training files.
    """

    title: str
    test: str
    train: str
    read: Callable[[pathlib.Path], tuple[Array, Array]]
    names: tuple[str, ...]
    meta: tuple[str, str | None] | None = None
    generic: str | None = None
    parts: int = 1

    def files(self, folder: pathlib.Path, split: str) -> list[pathlib.Path]:
        """Files of a split that exist."""
        pattern = self.test if split == "test" else self.train
        if self.generic and self.meta and folder.name != self.generic:
            if not (folder / self.meta[0]).is_file():
                return []
        found = sorted(name for name in _listed(folder) if re.fullmatch(pattern, name))
        return [folder / name for name in found if (folder / name).is_file()]


def matches(path: pathlib.Path) -> bool:
    """Whether the path is such a folder (or followed by ``/test`` or ``/train``), or one of its files."""
    return bool(_found(path))


def source(path: pathlib.Path, where: str) -> Source:
    """Read the images of such a data set.

    Labels are rows of the class names beside the files, or else of the published ones; CIFAR-100 has its fine
    labels. Pickles are parsed, never executed (:mod:`rft_fast.datasets.pickled_arrays`).

    Args:
        path: a folder (its test split), a folder followed by ``/test`` or ``/train``, or one file of images.
        where: prefix of error messages.

    Raises:
        ValueError: a file is missing, damaged, or of another size than it states. The message names it.
    """
    found = _found(path)
    names = [file.name for _, paths in found for file in paths]
    if len(found) != 1:
        listed = f"has {some(names)}; give the path of one of them" if names else "has none"
        raise ValueError(f"{where}: expected one set of CIFAR or STL-10 images, but {path} {listed}")
    ((layout, paths),) = found
    parts = layout.parts if path.name == "train" and not path.exists() else 1
    if len(paths) != parts:
        noun = "file" if parts == 1 else "files"
        raise ValueError(
            f"{where}: expected {parts} {noun} of {layout.title}, {path} has {some(names)}; "
            "complete them, or give the path of one"
        )
    images: list[Array] = []
    labels: list[Array] = []
    files: list[caches.File] = []
    stored = on_disk.Inputs()
    for file in paths:
        with reading(stored, file, f"{where}: {file} is not a file of {layout.title}"):
            pixels, numbers = layout.read(file)
            _check(pixels, numbers, len(layout.names))
        files += numbered(file, len(pixels))
        images.extend(pixels)
        labels.append(numbers.astype(np.int64))
    return Source(
        kind="cifar",
        path=path,
        files=files,
        labels=torch.from_numpy(np.concatenate(labels)),
        class_names=_class_names(layout, paths[0].parent, where),
        open=lambda index: Image.fromarray(np.ascontiguousarray(images[index])),
        notes=(f"{layout.title}: {', '.join(file.name for file in paths)}",),
        stored=stored,
    )


def _found(path: pathlib.Path) -> list[tuple[_Layout, list[pathlib.Path]]]:
    """Layouts that exist at a path, with their files of images."""
    found = []
    for layout in _LAYOUTS:
        if path.is_dir():
            files = layout.files(path, "test")
        else:
            files = [file for split in ("test", "train") for file in layout.files(path.parent, split)]
            files = [file for file in files if file.name == path.name]
            if not files and path.name in ("test", "train") and not path.exists():
                files = layout.files(path.parent, path.name)
        if files:
            found.append((layout, files))
    return found


def _listed(folder: pathlib.Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _check(pixels: Array, labels: Array, classes: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] not in ((32, 32, 3), (96, 96, 3)):
        raise ValueError(f"images are {pixels.dtype} {list(pixels.shape)}, expected uint8 [n, 32, 32, 3]")
    if labels.dtype.kind not in "iu" or labels.shape != (len(pixels),) or not len(labels):
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)} for {many(len(pixels), 'image')}")
    if wrong := sorted({int(label) for label in labels[(labels < 0) | (labels >= classes)]}):
        raise ValueError(f"labels {some(wrong)} are not among its {classes} classes")


def _class_names(layout: _Layout, folder: pathlib.Path, where: str) -> tuple[str, ...]:
    if layout.meta is None or not (folder / layout.meta[0]).is_file():
        return layout.names
    file, key = folder / layout.meta[0], layout.meta[1]
    try:
        if key is None:
            names = on_disk.read_text(file, "utf-8-sig").split()
        else:
            names = [_text(name) for name in _expect(_read_pickle(file)[key], list)]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: the class names in {file} cannot be read: {error}") from error
    if len(names) != len(layout.names):
        raise ValueError(
            f"{where}: {file} has {len(names)} class names, expected {len(layout.names)} as in {layout.title}"
        )
    return tuple(names)


def _pickled(key: str) -> Callable[[pathlib.Path], tuple[Array, Array]]:
    """Reader of the Python version: a dict with ``data``, uint8 [n, 3072] by planes, and labels."""

    def read(file: pathlib.Path) -> tuple[Array, Array]:
        batch = _read_pickle(file)
        if missing := [name for name in ("data", key) if name not in batch]:
            raise ValueError(f"it has no {' or '.join(missing)}; it has {some(list(batch))}")
        if not isinstance(batch["data"], pickled_arrays.Array):
            raise ValueError(f"its data is {type(batch['data']).__name__}, expected an array")
        data = batch["data"].numpy()
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise ValueError(f"data is {data.dtype} {list(data.shape)}, expected uint8 [n, 3072]")
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), _integers(batch[key])

    return read


def _records(head: int) -> Callable[[pathlib.Path], tuple[Array, Array]]:
    """Reader of the binary version: ``head`` bytes of labels (the last one counts), 3,072 bytes of pixels."""

    def read(file: pathlib.Path) -> tuple[Array, Array]:
        records = _whole_records(file, head + 3072)
        return records[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(records[:, head - 1])

    return read


def _stl10(file: pathlib.Path) -> tuple[Array, Array]:
    """Read STL-10: planes of 96 x 96, column by column; labels from 1 in another file."""
    pixels = _whole_records(file, 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    labels = _beside(file, file.name.replace("_X", "_y"))
    numbers = np.frombuffer(on_disk.read_bytes(labels), np.uint8).astype(np.int64)
    if numbers.size and not (numbers.min() >= 1 and numbers.max() <= len(STL10)):
        raise ValueError(
            f"{labels.name} has labels from {numbers.min()} to {numbers.max()}, expected 1 to 10"
        )
    return pixels, numbers - 1


def _cifar101(file: pathlib.Path) -> tuple[Array, Array]:
    """Read CIFAR-10.1: two ``.npy`` files."""
    labels = _beside(file, file.name.replace("_data", "_labels"))
    return _npy(file), _npy(labels)


def _cifar102(file: pathlib.Path) -> tuple[Array, Array]:
    """Read CIFAR-10.2: an ``.npz``, or as first published a dict in an ``.npy``."""
    if file.suffix == ".npz":
        try:
            with on_disk.opened(file) as stream, zipfile.ZipFile(stream) as archive:
                return _member(archive, "images"), _member(archive, "labels")
        except Exception as error:  # damaged archives raise almost anything
            raise ValueError(f"not an archive of images and labels: {error}") from error
    stream = io.BytesIO(on_disk.read_bytes(file))
    shape, _, dtype = _header(stream)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"it holds {dtype} {list(shape)}, expected a dict of images and labels")
    held = pickled_arrays.read(stream.read())
    if not isinstance(held, pickled_arrays.Array) or not isinstance(held.raw, list) or len(held.raw) != 1:
        raise ValueError("it does not hold one dict of images and labels")
    entries = _entries(held.raw[0])
    if not isinstance(entries.get("images"), pickled_arrays.Array) or "labels" not in entries:
        raise ValueError(f"it holds no images and labels; it holds {some(list(entries))}")
    return entries["images"].numpy(), _integers(entries["labels"])


def _whole_records(file: pathlib.Path, record: int) -> Array:
    data = on_disk.read_bytes(file)
    if not data or len(data) % record:
        raise ValueError(
            f"its {len(data)} bytes are not a whole number of images of {record} bytes; download it again"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, record)


def _npy(file: pathlib.Path) -> Array:
    data = on_disk.read_bytes(file)
    return _array(io.BytesIO(data), file.name, len(data))


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as stream:
        return _array(stream, name, archive.getinfo(f"{name}.npy").file_size)


def _array(stream: IO[bytes], name: str, size: int) -> Array:
    """Read an array in numpy's format from a file of ``size`` bytes."""
    shape, fortran, dtype = _header(stream)
    data = stream.read(_sized(name, shape, dtype, size - stream.tell()))
    _sized(name, shape, dtype, len(data))
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        return readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # numpy raises almost anything on damaged headers
        raise ValueError(f"the header of an array cannot be read: {type(error).__name__}: {error}") from error


def _sized(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], held: int) -> int:
    """Size of an array in bytes; must be positive and equal to ``held``."""
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects, expected numbers")
    size = math.prod(shape) * dtype.itemsize
    if size != held or size == 0:
        raise ValueError(
            f"{name}: {dtype} {list(shape)} needs {size} bytes, but there are {held}; download it again"
        )
    return size


def _read_pickle(file: pathlib.Path) -> dict[str, Any]:
    return _entries(pickled_arrays.read(on_disk.read_bytes(file)))


def _beside(file: pathlib.Path, name: str) -> pathlib.Path:
    other = file.with_name(name)
    if not other.is_file():
        raise ValueError(f"its labels, {name}, are missing beside it")
    return other


def _entries(value: object) -> dict[str, Any]:
    """A dict with text keys, from Python 2 or 3."""
    return {_text(key): entry for key, entry in _expect(value, dict).items()}


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise ValueError(f"it holds a {type(value).__name__}, expected a string")
    return value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _integers(value: object) -> Array:
    if isinstance(value, pickled_arrays.Array):
        return value.numpy()
    if not all(type(entry) is int and abs(entry) < 2**31 for entry in _expect(value, list)):
        raise ValueError("some of its labels are not class numbers")
    return np.array(value, np.int64)


_LAYOUTS = (
    _Layout(
        "CIFAR-10",
        test=r"test_batch",
        train=r"data_batch_\d+",
        read=_pickled("labels"),
        names=CIFAR10,
        meta=("batches.meta", "label_names"),
        parts=5,
    ),
    _Layout(
        "CIFAR-10 (binary)",
        test=r"test_batch\.bin",
        train=r"data_batch_\d+\.bin",
        read=_records(1),
        names=CIFAR10,
        meta=("batches.meta.txt", None),
        parts=5,
    ),
    _Layout(
        "CIFAR-100",
        test=r"test",
        train=r"train",
        read=_pickled("fine_labels"),
        names=CIFAR100,
        meta=("meta", "fine_label_names"),
        generic="cifar-100-python",
    ),
    _Layout(
        "CIFAR-100 (binary)",
        test=r"test\.bin",
        train=r"train\.bin",
        read=_records(2),
        names=CIFAR100,
        meta=("fine_label_names.txt", None),
        generic="cifar-100-binary",
    ),
    _Layout("CIFAR-10.1", test=r"cifar10\.1_v\d+_data\.npy", train="", read=_cifar101, names=CIFAR10),
    _Layout(
        "CIFAR-10.2",
        test=r"cifar102_test\.np[yz]",
        train=r"cifar102_train\.np[yz]",
        read=_cifar102,
        names=CIFAR10,
    ),
    _Layout(
        "STL-10",
        test=r"test_X\.bin",
        train=r"train_X\.bin",
        read=_stl10,
        names=STL10,
        meta=("class_names.txt", None),
    ),
)
