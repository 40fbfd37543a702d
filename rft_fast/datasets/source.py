"""What a data set is on disk, whatever the format: files, labels, class names, and how to open one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from rft_fast import cache as caches

# The kinds that are a folder of class folders, with images as files.
FOLDERS = ("folder", "imagenet", "imagenet-v2")


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


def some(names: Sequence[object], shown: int = 5) -> str:
    """The first few of a list, in words."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(str(name) for name in names[:shown]) + more
