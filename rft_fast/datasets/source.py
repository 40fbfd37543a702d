"""What a data set is on disk, whatever the format: files, labels, class names, and how to open one."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import IO

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rft_fast.common import files as on_disk
from rft_fast.datasets import cache as caches
from rft_fast.names import TREES, Kind

PART = "the images are those of"  # begins the note that of a folder only a part is taken

MOST_ROWS = 1 << 24  # what is larger is no row of a head

# What images are decoded from, by their content, whatever their names. Pillow knows others, of which one is a
# program: EPS is handed to Ghostscript, which runs it.
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "AVIF")


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a data set as they are stored. Nothing is decoded to list them.

    kind: the format, a key of :data:`rft_fast.datasets.KINDS`. path: where it lies.
    files: one for each image, names unique: relative to a folder, ``shard.tar/member`` in an archive (with
        the archive's size and time where a member has none of its own).
    labels: int64 [n], the class of each image: rows of ``class_names``, or of the head where there are none.
    class_names: as the format tells them, empty where it does not.
    open: image number -> the image as it is stored; may be called from many threads. Raises anything for
        an image that is damaged.
    notes: what a reader of the listing should know.
    trim: pixels to be cut from each border before anything else (ObjectNet: 2).
    pixels: uint8 [n, 3, h, w] where the format holds images of the model's size (``.npz``), else None.
    classes: int64 [k], distinct rows of the head to score among, where the format says so.
    imagenet: rows of an ImageNet head that are right for each class, where the format says so (ObjectNet);
        classes that it leaves out are not scored.
    stored: the files that hold the images, where an image is not a file of its own; they must not change
        until the images are read.
    """

    kind: Kind
    path: pathlib.Path
    files: list[caches.File]
    labels: Tensor
    class_names: tuple[str, ...]
    open: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()
    trim: int = 0
    pixels: Tensor | None = None
    classes: Tensor | None = None
    imagenet: Mapping[str, tuple[int, ...]] | None = None
    stored: on_disk.Inputs = field(default_factory=on_disk.Inputs)

    def place(self, index: int) -> str:
        """Where an image lies, in words."""
        name = self.files[index].name
        return str(self.path / name) if self.path.is_dir() else f"{name} of {self.path}"

    def mode_and_size(self, index: int) -> tuple[str, tuple[int, int]]:
        """Of an image as it is stored, (width, height); a file is read no further than tells them."""
        if self.kind not in TREES:
            with self.open(index) as image:
                return image.mode, image.size
        with on_disk.opened(self.path / self.files[index].name) as stream, open_image(stream) as image:
            return image.mode, image.size


def numbered(file: pathlib.Path, count: int) -> list[caches.File]:
    """Entries for the images inside one file, which have no name, size or time of their own."""
    status = file.stat()
    size, time = status.st_size, status.st_mtime_ns
    return [caches.File(f"{file.name}/{index}", size, time) for index in range(count)]


@contextmanager
def reading(stored: on_disk.Inputs, file: pathlib.Path, failure: str) -> Iterator[None]:
    """Add a file to those that must not change, and read it in the block.

    Raises:
        ValueError: begins with ``failure``; for any error in the block, as damage surfaces as almost any.
        files.Changed: the file changed meanwhile.
    """
    try:
        stored.add(file)
        with stored.unchanged(file):
            yield
    except on_disk.Changed:
        raise
    except Exception as error:
        raise ValueError(f"{failure}: {error}") from error


def open_image(file: IO[bytes]) -> Image.Image:
    """An image in one of :data:`FORMATS`. Raises anything for what is none, or damaged."""
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:  # which would name the object in memory
        raise UnidentifiedImageError(f"no image in one of the formats {', '.join(_formats())}") from None


def open_file(path: pathlib.Path, listed: caches.File | None = None) -> Image.Image:
    """An image file, read into memory: Pillow maps some, and would die by a signal of one that is cut short.

    Raises files.Changed where it is not as it was listed, and else as :func:`open_image` does.
    """
    try:
        with on_disk.opened(path) as stream:
            data = stream.read()
            status = os.fstat(stream.fileno())
    except FileNotFoundError:
        if listed is None:
            raise
        raise on_disk.Changed(f"{path} changed while it was in use: it is no longer there") from None
    if listed is not None and (status.st_size, status.st_mtime_ns) != (listed.size, listed.time):
        raise on_disk.Changed(f"{path} changed while it was in use: it is not as it was listed; start again")
    return open_image(io.BytesIO(data))


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
