"""What a data set is on disk, whatever the format: files, labels, class names, and how to open one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image
from torch import Tensor

from rft_fast import cache as caches

# The kinds that are a folder of class folders, with images as files.
FOLDERS = ("folder", "imagenet", "imagenet-v2")
TREES = (*FOLDERS, "objectnet")  # all of class folders

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
    """

    kind: str
    path: Path
    files: list[caches.File]
    labels: Tensor
    class_names: tuple[str, ...]
    open: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()
    trim: int = 0
    pixels: Tensor | None = None
    classes: Tensor | None = None
    imagenet: Mapping[str, tuple[int, ...]] | None = None

    def place(self, index: int) -> str:
        """Where an image lies, in words."""
        name = self.files[index].name
        return str(self.path / name) if self.path.is_dir() else f"{name} of {self.path}"


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image in one of :data:`FORMATS`. Raises anything for what is none, or damaged."""
    return Image.open(file, formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
