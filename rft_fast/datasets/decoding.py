"""Decodes stored images to the bytes of open_clip's evaluation transform, on all threads."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import open_clip
import PIL
import torchvision
from PIL import Image, ImageFile, features
from torch import Tensor
from torchvision.transforms import ToTensor

from rft_fast.clip.architectures import Preprocess
from rft_fast.common import files
from rft_fast.common.words import some
from rft_fast.datasets import cache as caches
from rft_fast.names import FOLDERS

from .source import Source

# Images decoded ahead of the one being written: pauses of the disk do not stop decoding, and a slow disk does
# not fill the memory.
AHEAD = 512

# Modes that convert to RGB bytes, as in ImageFolder. Of others, such as 16-bit grey or floats, only a part
# of the range would remain, and most images would be white.
MODES = frozenset(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])

Progress = Callable[[int, int], object]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def cached(source: Source, preprocess: Preprocess) -> caches.Source:
    """Describe for the cache what the decoded images of a source are made from."""
    transform: dict[str, object] = {
        "resize_mode": preprocess.resize_mode,
        "interpolation": preprocess.interpolation,
        "fill_color": preprocess.fill_color,
    }
    if source.kind not in FOLDERS:  # which are all decoded in the same way
        transform["kind"] = source.kind
    if source.trim:
        transform["trim"] = source.trim
    versions = {
        "Pillow": PIL.__version__,
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg") or "none",
        "torchvision": torchvision.__version__.partition("+")[0],  # the same for any CUDA
        "open_clip": open_clip.__version__,
    }
    return caches.Source(source.path.resolve(), source.files, preprocess.size, transform, versions)


def read(
    source: Source,
    chosen: list[int],
    preprocess: Preprocess,
    cache: pathlib.Path | None,
    progress: Progress | None,
    skip_unreadable: bool,
    where: str,
) -> tuple[Tensor, list[int]]:
    """Decode the chosen images, or take them from the cache.

    Returns:
        The readable images, uint8 [readable, 3, h, w], and their positions in ``chosen``.

    Raises:
        ValueError: an image cannot be read and ``skip_unreadable`` is false, or none can be read.
    """
    transform = pixel_transform(preprocess)
    unreadable: dict[int, str] = {}

    def counted(results: Iterable[_Result], done: int) -> Iterator[_Result]:
        for count, result in enumerate(results, start=done + 1):
            yield result
            if progress is not None:
                progress(count, len(chosen))

    def each(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        return counted(ahead(pool, work, items), 0)

    with (
        threads() as pool,
        whole_images_only(),
        caches.Images(cached(source, preprocess), chosen, cache, each) as images,
    ):
        while todo := [position for position in images.missing() if position not in unreadable]:
            indices = [chosen[position] for position in todo]
            results = ahead(pool, partial(decode, source, transform), indices)
            for position, result in zip(todo, counted(results, len(chosen) - len(todo)), strict=True):
                if isinstance(result, str):
                    unreadable[position] = result
                else:
                    images.put(position, result)
        if unreadable:
            failures = f"{len(unreadable)} of {len(chosen)} images cannot be read: "
            failures += some(list(unreadable.values()))
            if not skip_unreadable or len(unreadable) == len(chosen):
                raise ValueError(f"{where}: {failures}; replace or remove them, or use --skip-unreadable")
            warnings.warn(f"{where}: {failures}; they are left out", stacklevel=4)
        pixels = images.take()
    readable = [position for position in range(len(chosen)) if position not in unreadable]
    for new, old in enumerate(readable):  # in place, as two copies of a large set may not fit
        if new != old:
            pixels[new] = pixels[old]
    return pixels[: len(readable)], readable


def decode(
    source: Source, transform: Callable[[Image.Image], Image.Image], index: int
) -> caches.Pixels | str:
    """Decode an image: uint8 [3, h, w], or the reason why it cannot be decoded."""
    try:
        with source.open(index) as image:
            if image.mode not in MODES:
                return f"{source.place(index)} ({loss(image.mode)})"
            pixels = np.asarray(transform(_trimmed(image, source.trim).convert("RGB")))
    except files.Changed:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged images
        return f"{source.place(index)} ({error})"
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def examine(source: Source, index: int) -> tuple[str, tuple[int, int]] | str:
    """Mode and (width, height) of a stored image if it can be decoded, otherwise the reason."""
    try:
        with source.open(index) as image:
            image.load()
            _trimmed(image, source.trim)
            return image.mode, image.size
    except Exception as error:
        return f"{source.place(index)} ({error})"


def loss(mode: str) -> str:
    """The reason why images of a mode are refused."""
    return f"has mode {mode}, which RGB bytes cannot represent: convert it to 8 bits with the intended scale"


def _trimmed(image: Image.Image, border: int) -> Image.Image:
    if not border:
        return image
    width, height = image.size
    if min(width, height) <= 2 * border:
        raise ValueError(f"{width} x {height} pixels: a border of {border} leaves nothing")
    return image.crop((border, border, width - border, height - border))


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    # Pillow decodes and resizes without holding Python's lock, so threads scale well.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the queue


@contextmanager
def whole_images_only() -> Iterator[None]:
    """Make truncated images an error, whatever another library set in Pillow."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterable[_Item], most: int = AHEAD
) -> Iterator[_Result]:
    """``pool.map`` with at most ``most`` results that wait to be used."""
    queue: deque[Future[_Result]] = deque()
    for item in items:
        queue.append(pool.submit(work, item))
        if len(queue) >= most:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


def pixel_transform(preprocess: Preprocess) -> Callable[[Image.Image], Image.Image]:
    """open_clip's evaluation transform up to the point where pixels are still bytes: resize, crop or pad.

    The rest, ``/ 255`` and normalisation, is done by the evaluator on the device.

    Returns:
        A function from RGB images to RGB images.

    Raises:
        RuntimeError: this version of open_clip builds its transform in another way.
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
            f"datasets: the image transform of open_clip {open_clip.__version__} differs from the "
            f"expected one ({whole}); please report this"
        )

    def apply(image: Image.Image) -> Image.Image:
        for step in steps[:cut]:
            image = step(image)
        return image

    return apply
