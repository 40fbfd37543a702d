"""Labelled images, decoded once into the bytes that a model's normalisation expects."""

from __future__ import annotations

import os
import stat
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import PIL
import torch
import torchvision
from PIL import Image, ImageFile, features
from torch import Tensor
from torchvision.transforms import ToTensor

from rft_fast import cache as caches
from rft_fast.classifier import Preprocess

# What torchvision's ImageFolder takes for an image.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Images that may be decoded ahead of the one that is written: the disk's pauses do not stop decoding, and
# a slow disk does not fill the memory.
AHEAD = 512

Progress = Callable[[int, int], object]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images and their labels.

    images: uint8 [n, 3, h, w] on the CPU, n at least 1. labels: int64 [n], each a row of the head.
    mean, std: per channel; the model sees ``(images / 255 - mean) / std``.
    classes: int64 [k], distinct head rows to score among, or None for all of them. Labels stay rows
        of the whole head, and must be among ``classes``.
    ood: whether the set is out of distribution for the fine-tuned models.
    class_names: the name of every class in label order where the source tells, else empty.
    skipped: how many images could not be read and are therefore missing here.

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
    skipped: int = 0

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
        if isinstance(self.skipped, bool) or not isinstance(self.skipped, int) or self.skipped < 0:
            raise ValueError(f"{where}: skipped must be a number of images, got {self.skipped!r}")
        if self.classes is not None:
            _tensor(self.classes, torch.int64, 1, f"{where}: classes")
            classes = self.classes.tolist()
            if len(set(classes)) != len(classes) or min(classes, default=0) < 0:
                raise ValueError(f"{where}: classes must be distinct and not negative")
            if lost := sorted(set(self.labels.tolist()) - set(classes)):
                raise ValueError(f"{where}: labels {_some(lost)} are not among its classes")


@dataclass(frozen=True)
class Scan:
    """What :func:`load` would read.

    count: images that would be scored, were all readable. undecoded: how many of them it would have to
    decode, because they are not in the cache. classes: class folders, None for an ``.npz``.
    """

    name: str
    count: int
    undecoded: int
    classes: int | None


def load(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    ood: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    skip_unreadable: bool = False,
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
    progress: called with (images at hand, images in all) while a folder is read.
    cache: a directory (:func:`rft_fast.cache.directory`) where a folder's decoded images are kept, so that
        each is decoded once as long as its file does not change. A whole folder is then mapped from
        there, not held in memory. Trouble with it is a warning and stops nothing. None: no cache.
    skip_unreadable: leave out images that cannot be read, named in a warning and counted in ``skipped``,
        so that as many fewer are scored; otherwise they are refused.

    Raises ValueError, naming the set and the path, for anything that would silently score wrong:
    empty class folders, images outside of any class, files that are no images, unreadable or
    truncated images, gaps in numbered folders, sizes that do not fit, more samples than images.
    """
    where = f"datasets: {name!r}"
    found, chosen = _find(path, preprocess, samples, seed, where)
    mean, std = preprocess.mean, preprocess.std
    if isinstance(found, _Arrays):
        images = found.images if samples is None else found.images[chosen]
        return Dataset(name, images, found.labels[chosen], mean, std, found.classes, ood)
    images, readable = _read(found, chosen.tolist(), preprocess, cache, progress, skip_unreadable, where)
    labels, skipped = found.labels[chosen[readable]], len(chosen) - len(readable)
    return Dataset(name, images, labels, mean, std, None, ood, found.class_names, skipped)


def scan(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    seed: int = 0,
    *,
    cache: Path | None = None,
) -> Scan:
    """What :func:`load` with these arguments would read, without decoding an image.

    A folder's files are listed, an ``.npz`` is read. Nothing is written. Raises ValueError as ``load``
    does, but for images that cannot be read.
    """
    found, chosen = _find(path, preprocess, samples, seed, f"datasets: {name!r}")
    if isinstance(found, _Arrays):
        return Scan(name, len(chosen), 0, None)
    undecoded = len(chosen)
    if cache is not None:
        undecoded -= int(caches.decoded(found.source(preprocess), cache)[chosen.numpy()].sum())
    return Scan(name, len(chosen), undecoded, len(found.class_names))


def time_decoding(
    name: str, path: str | PathLike[str], preprocess: Preprocess, seconds: float = 2.0
) -> float:
    """Seconds that each image of a folder takes to decode, with all threads at work; 0 for an ``.npz``.

    Images from all over the folder are decoded for about ``seconds``, without a cache, and dropped.
    Raises ValueError as :func:`load` does, and if none of them can be read.
    """
    where = f"datasets: {name!r}"
    found, chosen = _find(path, preprocess, None, 0, where)
    if isinstance(found, _Arrays):
        return 0.0
    chosen = chosen[torch.from_numpy(np.random.RandomState(0).permutation(len(chosen)))]
    decoded, failure, start = 0, "", time.perf_counter()

    def until() -> Iterator[int]:
        for index in chosen.tolist():
            yield index
            if time.perf_counter() - start >= seconds:
                return

    decode, busy = partial(_decode, found, pixel_transform(preprocess)), 2 * (os.cpu_count() or 1)
    with _threads() as pool, _whole_images_only():
        for result in _ahead(pool, decode, until(), busy):
            if isinstance(result, str):
                failure = result
            else:
                decoded += 1
    if not decoded:
        raise ValueError(f"{where}: no image tried can be read, such as {failure}; replace or remove them")
    return (time.perf_counter() - start) / decoded


def subset(dataset: Dataset, samples: int, seed: int = 0) -> Dataset:
    """Some of a data set's images at random: of a whole set, those that ``load`` would have drawn.

    As many as asked for, all readable; ``skipped`` remains the number of images that the data set lacks,
    which could not be drawn. Raises ValueError for fewer than one sample, or more than there are images.
    """
    chosen = _choose(len(dataset.labels), samples, seed, f"datasets: {dataset.name!r}")
    return replace(dataset, images=dataset.images[chosen], labels=dataset.labels[chosen])


@dataclass(frozen=True, eq=False)
class _Arrays:
    """The contents of an ``.npz``."""

    images: Tensor
    labels: Tensor
    classes: Tensor | None


@dataclass(frozen=True, eq=False)
class _Folder:
    """Every image of a tree of class folders, its label, and the classes in label order."""

    path: Path
    files: list[caches.File]
    labels: Tensor
    class_names: tuple[str, ...]

    def source(self, preprocess: Preprocess) -> caches.Source:
        transform = {
            "resize_mode": preprocess.resize_mode,
            "interpolation": preprocess.interpolation,
            "fill_color": preprocess.fill_color,
        }
        versions = {
            "Pillow": PIL.__version__,
            "libjpeg": features.version("libjpeg_turbo") or features.version("jpg") or "none",
            "torchvision": torchvision.__version__.partition("+")[0],  # the same for any CUDA
            "open_clip": open_clip.__version__,
        }
        return caches.Source(self.path.resolve(), self.files, preprocess.size, transform, versions)


def _find(
    path: str | PathLike[str], preprocess: Preprocess, samples: int | None, seed: int, where: str
) -> tuple[_Arrays | _Folder, Tensor]:
    """What lies at a path, and which of its images are chosen."""
    source = Path(path)
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise TypeError(f"{where}: samples must be an int or None, got {type(samples).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed must be an int in [0, 2**32), got {seed!r}")
    found: _Arrays | _Folder
    if source.is_dir():
        found = _list_folder(source, where)
    elif source.suffix == ".npz" and source.is_file():
        found = _read_npz(source, preprocess, where)
    else:
        state = "is neither" if source.exists() else "does not exist"
        raise ValueError(f"{where}: expected a folder of classes or an .npz, {source} {state}")
    return found, _choose(len(found.labels), samples, seed, where)


def _choose(count: int, samples: int | None, seed: int, where: str) -> Tensor:
    if samples is None:
        return torch.arange(count)
    if samples < 1:
        raise ValueError(f"{where}: samples must be at least 1, got {samples}")
    if samples > count:
        raise ValueError(f"{where}: {samples} samples asked for, but it has only {count} images")
    # RandomState's stream is frozen for good, so a seed means the same images everywhere.
    return torch.from_numpy(np.sort(np.random.RandomState(seed).permutation(count)[:samples]))


def _read_npz(file: Path, preprocess: Preprocess, where: str) -> _Arrays:
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
        return _Arrays(pixels, labels, None)
    return _Arrays(pixels, labels, _integers(arrays["classes"], f"{where}: classes in {file}"))


def _integers(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where} must be integers [n], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


def _list_folder(folder: Path, where: str) -> _Folder:
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

    files: list[caches.File] = []
    labels: list[int] = []
    empty: list[str] = []
    foreign: list[str] = []
    for label, name in enumerate(names):
        before, others = len(files), len(foreign)
        for file in _files_below(folder / name):
            status = _status(file) if file.suffix.lower() in EXTENSIONS else None
            if status is None:
                foreign.append(str(file))
            else:
                files.append(caches.File(str(file.relative_to(folder)), status.st_size, status.st_mtime_ns))
        if before == len(files) and others == len(foreign):
            empty.append(name)
        labels += [label] * (len(files) - before)
    if empty:
        raise ValueError(f"{where}: {folder} has empty class folders: {_some(empty)}")
    if foreign:
        raise ValueError(f"{where}: files that are no images: {_some(foreign)}; move them elsewhere")
    return _Folder(folder, files, torch.tensor(labels), tuple(names))


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
    return file.suffix.lower() in EXTENSIONS and _status(file) is not None


def _status(file: Path) -> os.stat_result | None:
    """Of a regular file, else None."""
    try:
        status = file.stat()
    except OSError:  # such as a link to nowhere
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _read(
    folder: _Folder,
    chosen: list[int],
    preprocess: Preprocess,
    cache: Path | None,
    progress: Progress | None,
    skip_unreadable: bool,
    where: str,
) -> tuple[Tensor, list[int]]:
    """The chosen images, uint8 [readable, 3, h, w], and the positions in ``chosen`` of those."""
    transform = pixel_transform(preprocess)
    unreadable: dict[int, str] = {}

    def counted(results: Iterable[_Result], done: int) -> Iterator[_Result]:
        for count, result in enumerate(results, start=done + 1):
            yield result
            if progress is not None:
                progress(count, len(chosen))

    def each(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        return counted(_ahead(pool, work, items), 0)

    with (
        _threads() as pool,
        _whole_images_only(),
        caches.Images(folder.source(preprocess), chosen, cache, each) as images,
    ):
        while todo := [position for position in images.missing() if position not in unreadable]:
            indices = [chosen[position] for position in todo]
            results = _ahead(pool, partial(_decode, folder, transform), indices)
            for position, result in zip(todo, counted(results, len(chosen) - len(todo)), strict=True):
                if isinstance(result, str):
                    unreadable[position] = result
                else:
                    images.put(position, result)
        if unreadable:
            failures = f"{len(unreadable)} of {len(chosen)} images cannot be read: "
            failures += _some(list(unreadable.values()))
            if not skip_unreadable or len(unreadable) == len(chosen):
                raise ValueError(f"{where}: {failures}; replace or remove them")
            warnings.warn(f"{where}: {failures}; they are left out", stacklevel=3)
        pixels = images.take()
    readable = [position for position in range(len(chosen)) if position not in unreadable]
    for new, old in enumerate(readable):  # closed up in place, as two of a large set may not fit
        if new != old:
            pixels[new] = pixels[old]
    return pixels[: len(readable)], readable


def _decode(
    folder: _Folder, transform: Callable[[Image.Image], Image.Image], index: int
) -> caches.Pixels | str:
    """A decoded image, uint8 [3, h, w], or why there is none."""
    file = folder.path / folder.files[index].name
    try:
        with Image.open(file) as image:
            pixels = np.asarray(transform(image.convert("RGB")))
    except Exception as error:  # Pillow raises almost anything on damaged images
        return f"{file} ({error})"
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    # Pillow decodes and resizes outside of Python's lock, so threads share the work well.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what is queued


@contextmanager
def _whole_images_only() -> Iterator[None]:
    """Truncated images are errors, whatever another library has told Pillow to make of them."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int = AHEAD
) -> Iterator[_Result]:
    """``pool.map``, but with at most ``ahead`` results that wait to be taken."""
    queue: deque[Future[_Result]] = deque()
    for item in items:
        queue.append(pool.submit(work, item))
        if len(queue) >= ahead:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


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
