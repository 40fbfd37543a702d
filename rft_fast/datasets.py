"""Labelled images, decoded once into the bytes that a model's normalisation expects."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ToTensor

from rft_fast.classifier import Preprocess

# What torchvision's ImageFolder takes for an image.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Progress = Callable[[int, int], object]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images and their labels.

    images: uint8 [n, 3, h, w] on the CPU, n at least 1. labels: int64 [n], each a row of the head.
    mean, std: per channel; the model sees ``(images / 255 - mean) / std``.
    classes: int64 [k], distinct head rows to score among, or None for all of them. Labels stay rows
        of the whole head, and must be among ``classes``.
    ood: whether the set is out of distribution for the fine-tuned models.
    class_names: the name of every class in label order where the source tells, else empty.

    Raises TypeError or ValueError for fields that are not so.
    """

    name: str
    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Tensor | None = None
    ood: bool = True
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"Dataset {self.name!r}"
        _tensor(self.images, torch.uint8, 4, f"{where}: images")
        _tensor(self.labels, torch.int64, 1, f"{where}: labels")
        count, channels = self.images.shape[:2]
        if 0 in self.images.shape:
            raise ValueError(f"{where}: no images, shape {tuple(self.images.shape)}")
        if channels != 3:
            raise ValueError(f"{where}: images must be [n, 3, h, w], got {tuple(self.images.shape)}")
        if len(self.labels) != count:
            raise ValueError(f"{where}: {count} images but {len(self.labels)} labels")
        if self.labels.min() < 0:
            raise ValueError(f"{where}: labels must not be negative, got {int(self.labels.min())}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"{where}: expected 3 means and 3 positive stds, got {self.mean}, {self.std}")
        if self.classes is not None:
            _tensor(self.classes, torch.int64, 1, f"{where}: classes")
            classes = self.classes.tolist()
            if len(set(classes)) != len(classes) or min(classes, default=0) < 0:
                raise ValueError(f"{where}: classes must be distinct and not negative")
            if lost := sorted(set(self.labels.tolist()) - set(classes)):
                raise ValueError(f"{where}: labels {_some(lost)} are not among its classes")


def load(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    ood: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set, its images decoded to the bytes that open_clip's evaluation transform makes.

    path: either an ``.npz`` file, or a folder of class folders.
        ``.npz``: ``images`` uint8 [n, h, w] or [n, h, w, 3] of the model's size exactly, ``labels``
        integers [n], and, if only some of the head's rows are to be scored, ``classes`` integers
        [k]. Folder: one folder per class, images in it at any depth; label i is the i-th folder in
        sorted order, where names that are all numbers sort as numbers (``10`` after ``9``) and must
        be consecutive. Grey images become RGB. Hidden files, and notes beside the class folders,
        are left alone.
    preprocess: what the model expects (:func:`rft_fast.classifier.preprocess`).
    samples: score only that many, drawn without replacement by ``seed`` alone, in the file's order;
        a smaller draw is a part of a larger one. None: all.
    progress: called with (images decoded, images in all) while a folder is decoded.

    Raises ValueError, naming the set and the path, for anything that would silently score wrong:
    empty class folders, images outside of any class, files that are no images, unreadable or
    truncated images, gaps in numbered folders, sizes that do not fit, more samples than images.
    """
    source, where = Path(path), f"datasets: {name!r}"
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise TypeError(f"{where}: samples must be an int or None, got {type(samples).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed must be an int in [0, 2**32), got {seed!r}")
    class_names: tuple[str, ...] = ()
    classes = None
    if source.is_dir():
        files, labels, class_names = _list_folder(source, where)
        chosen = _choose(len(files), samples, seed, where)
        images = _decode([files[i] for i in chosen.tolist()], preprocess, progress, where)
    elif source.suffix == ".npz" and source.is_file():
        images, labels, classes = _read_npz(source, preprocess, where)
        chosen = _choose(len(images), samples, seed, where)
        images = images if samples is None else images[chosen]
    else:
        found = "is neither" if source.exists() else "does not exist"
        raise ValueError(f"{where}: expected a folder of classes or an .npz, {source} {found}")
    return Dataset(name, images, labels[chosen], preprocess.mean, preprocess.std, classes, ood, class_names)


def subset(dataset: Dataset, samples: int, seed: int = 0) -> Dataset:
    """Some of a data set's images at random: of a whole set, those that ``load`` would have drawn.

    Raises ValueError for fewer than one sample, or more than there are images.
    """
    chosen = _choose(len(dataset.labels), samples, seed, f"datasets: {dataset.name!r}")
    return replace(dataset, images=dataset.images[chosen], labels=dataset.labels[chosen])


def _choose(count: int, samples: int | None, seed: int, where: str) -> Tensor:
    if samples is None:
        return torch.arange(count)
    if samples < 1:
        raise ValueError(f"{where}: samples must be at least 1, got {samples}")
    if samples > count:
        raise ValueError(f"{where}: {samples} samples asked for, but it has only {count} images")
    # RandomState's stream is frozen for good, so a seed means the same images everywhere.
    return torch.from_numpy(np.sort(np.random.RandomState(seed).permutation(count)[:samples]))


def _read_npz(file: Path, preprocess: Preprocess, where: str) -> tuple[Tensor, Tensor, Tensor | None]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # a damaged archive surfaces as almost any exception
        raise ValueError(f"{where}: {file} cannot be read as arrays: {error}") from error
    for key in ("images", "labels"):
        if key not in arrays:
            raise ValueError(f"{where}: {file} has no array {key!r}, it has {_some(list(arrays))}")
    if unknown := [key for key in arrays if key not in ("images", "labels", "classes")]:
        raise ValueError(f"{where}: {file} has arrays unknown here: {_some(unknown)}")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise ValueError(
            f"{where}: images must be uint8 [n, h, w] or [n, h, w, 3], "
            f"got {images.dtype} {list(images.shape)} in {file}"
        )
    if images.shape[1:3] != preprocess.size:
        raise ValueError(
            f"{where}: the model takes {preprocess.size} images, {file} has {images.shape[1:3]}; "
            "resize them, or give the images as a folder, which is resized while it is read"
        )
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    labels = _integers(arrays["labels"], f"{where}: labels in {file}")
    if len(labels) != len(pixels):
        raise ValueError(f"{where}: {file} has {len(pixels)} images but {len(labels)} labels")
    if "classes" not in arrays:
        return pixels, labels, None
    return pixels, labels, _integers(arrays["classes"], f"{where}: classes in {file}")


def _integers(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where} must be integers [n], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


def _list_folder(folder: Path, where: str) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Every image of a tree of class folders, its label, and the classes in label order."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    names = [entry.name for entry in entries if entry.is_dir()]
    if not names:
        raise ValueError(f"{where}: {folder} has no class folders")
    if stray := [entry.name for entry in entries if _is_image(entry)]:
        raise ValueError(f"{where}: {folder} has images outside of any class: {_some(sorted(stray))}")
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
        _consecutive([int(name) for name in names], folder, where)
    else:
        names.sort()

    files: list[Path] = []
    labels: list[int] = []
    empty: list[str] = []
    foreign: list[str] = []
    for label, name in enumerate(names):
        members = _files_below(folder / name)
        foreign += [str(file) for file in members if not _is_image(file)]
        empty += [] if members else [name]
        files += members
        labels += [label] * len(members)
    if empty:
        raise ValueError(f"{where}: {folder} has empty class folders: {_some(empty)}")
    if foreign:
        raise ValueError(f"{where}: files that are no images: {_some(foreign)}; move them elsewhere")
    return files, torch.tensor(labels), tuple(names)


def _consecutive(numbers: list[int], folder: Path, where: str) -> None:
    expected = range(numbers[0], numbers[0] + len(numbers))
    if numbers != list(expected):
        lost = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
        what = f"{_some(lost)} missing" if lost else "one number twice"
        raise ValueError(
            f"{where}: numbered folders of {folder} run from {numbers[0]} to {numbers[-1]} with "
            f"{what}, so labels would shift; complete or rename them"
        )


def _files_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in EXTENSIONS


def _decode(files: Sequence[Path], preprocess: Preprocess, progress: Progress | None, where: str) -> Tensor:
    transform = pixel_transform(preprocess)
    images = torch.empty((len(files), 3, *preprocess.size), dtype=torch.uint8)
    unreadable: list[str] = []

    def decode(index: int) -> str | None:
        try:
            with Image.open(files[index]) as image:
                pixels = np.array(transform(image.convert("RGB")))
        except Exception as error:  # Pillow raises almost anything on damaged images
            return f"{files[index]} ({error})"
        images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
        return None

    # Pillow decodes and resizes outside of Python's lock, so threads share the work well.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, failure in enumerate(pool.map(decode, range(len(files))), start=1):
            unreadable += [failure] if failure else []
            if progress is not None:
                progress(done, len(files))
    if unreadable:
        raise ValueError(
            f"{where}: {len(unreadable)} of {len(files)} images cannot be read: "
            f"{_some(unreadable)}; replace or remove them"
        )
    return images


def pixel_transform(preprocess: Preprocess) -> Callable[[Image.Image], Image.Image]:
    """open_clip's evaluation transform up to the point where pixels are still bytes.

    Resize, crop or pad. What follows there is ``/ 255`` and the normalisation, which the evaluator
    does on the device. Takes and returns RGB images.
    """
    whole = open_clip.image_transform(
        preprocess.size,
        is_train=False,
        mean=preprocess.mean,
        std=preprocess.std,
        resize_mode=preprocess.resize_mode,
        interpolation=preprocess.interpolation,
        fill_color=preprocess.fill_color,
    )
    steps = whole.transforms
    cut = next((i for i, step in enumerate(steps) if isinstance(step, ToTensor)), None)
    if cut is None or cut != len(steps) - 2:
        raise RuntimeError(
            f"datasets: open_clip {open_clip.__version__} builds its image transform in another "
            f"way than expected ({whole}); please report this"
        )

    def apply(image: Image.Image) -> Image.Image:
        for step in steps[:cut]:
            image = step(image)
        return image

    return apply


def _tensor(value: object, dtype: torch.dtype, ndim: int, where: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype or value.ndim != ndim or value.device.type != "cpu":
        raise ValueError(
            f"{where} must be {dtype} with {ndim} dimensions on the CPU, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )


def _some(names: Sequence[object], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(str(name) for name in names[:shown]) + more
