"""A data set on disk, whatever its format: files, labels, class names, and how to open an image."""

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

PART = "the images are the same as in"  # begins the note that only a part of a folder is used

MOST_ROWS = 1 << 24  # upper bound of a head's rows

# Formats of images, by content, whatever their names. Pillow has others, of which one is a program: EPS
# would be executed by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "AVIF")


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a data set as they are stored. Listing them decodes nothing.

    Attributes:
        kind: the format, a key of :data:`rft_fast.datasets.KINDS`.
        path: where it is.
        files: one per image, with unique names: relative to a folder, or ``shard.tar/member`` in an archive
            (with the archive's size and time, if a member has none of its own).
        labels: int64 [n], the class of each image: an index of ``class_names``, or a row of the head if there
            are none.
        class_names: as the format gives them; empty if it does not.
        open: image number -> the stored image; called from many threads. Raises anything for a damaged image.
        notes: remarks for readers of the listing.
        trim: pixels to cut from each border before anything else (ObjectNet: 2).
        pixels: uint8 [n, 3, h, w] if the format has images of the model's size (``.npz``), otherwise None.
        classes: int64 [k], distinct rows of the head to score among, if the format gives them.
        imagenet: for each class the rows of an ImageNet head that are right, if the format gives them
            (ObjectNet); other classes are not scored.
        stored: files that hold several images; they must not change until the images are read.
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
        """Location of an image, in words."""
        name = self.files[index].name
        return str(self.path / name) if self.path.is_dir() else f"{name} of {self.path}"

    def mode_and_size(self, index: int) -> tuple[str, tuple[int, int]]:
        """Mode and (width, height) of a stored image; a file is read only as far as needed."""
        if self.kind not in TREES:
            with self.open(index) as image:
                return image.mode, image.size
        with on_disk.opened(self.path / self.files[index].name) as stream, open_image(stream) as image:
            return image.mode, image.size


def numbered(file: pathlib.Path, count: int) -> list[caches.File]:
    """Entries for the images inside one file, by number, with the file's size and time."""
    status = file.stat()
    size, time = status.st_size, status.st_mtime_ns
    return [caches.File(f"{file.name}/{index}", size, time) for index in range(count)]


@contextmanager
def reading(stored: on_disk.Inputs, file: pathlib.Path, failure: str) -> Iterator[None]:
    """Read a file in the block, and add it to the files that must not change.

    Raises:
        ValueError: any error in the block, since damaged files raise almost anything; begins with
            ``failure``.
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
    """Open an image in one of :data:`FORMATS`. Raises anything for other or damaged files."""
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:  # whose message names the object in memory
        raise UnidentifiedImageError(f"no image in one of the formats {', '.join(_formats())}") from None


def open_file(path: pathlib.Path, listed: caches.File | None = None) -> Image.Image:
    """Open an image file from memory, not mapped: truncating a mapped file would kill the process.

    Raises:
        files.Changed: the file is not as it was listed.
        Exception: as :func:`open_image`.
    """
    try:
        with on_disk.opened(path) as stream:
            data = stream.read()
            status = os.fstat(stream.fileno())
    except FileNotFoundError:
        if listed is None:
            raise
        raise on_disk.Changed(f"{path} changed while it was in use: it no longer exists") from None
    if listed is not None and (status.st_size, status.st_mtime_ns) != (listed.size, listed.time):
        raise on_disk.Changed(
            f"{path} changed while it was in use: it differs from when it was listed; run the command again"
        )
    return open_image(io.BytesIO(data))


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this version of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
