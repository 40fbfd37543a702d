"""What tests of data set formats share: pictures, and what a source must make of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rft_fast import datasets
from rft_fast.clip.architectures import Preprocess
from rft_fast.datasets.source import Source
from support.wording import refused

RNG = np.random.default_rng(0)
PREPROCESS = Preprocess((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def pictures(count: int, height: int = 9, width: int = 7) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def holds(source: Source, pixels: np.ndarray, labels: list[int]) -> None:
    """The source's images and labels, read by several threads, are these exactly."""
    assert source.labels.dtype == torch.int64 and source.labels.tolist() == labels
    assert len(source.files) == len({file.name for file in source.files}) == len(pixels)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda index: np.asarray(source.open(index)), [*range(len(pixels))] * 3))
    for image, truth in zip(opened, [*pixels] * 3, strict=True):
        np.testing.assert_array_equal(image, truth)


def unreadable(read: Callable[[Path, str], Source], path: Path, *facts: str) -> None:
    with refused(ValueError, "set", *facts):
        read(path, "data: 'set'")


def scored(path: Path, kind: str, pixels: np.ndarray, labels: list[int]) -> None:
    """datasets.load finds the kind and resizes as it does with the same images in class folders."""
    assert datasets.detect(path) == kind
    got = datasets.load("set", path, PREPROCESS)
    transform = datasets.pixel_transform(PREPROCESS)
    assert got.labels.tolist() == labels
    for image, truth in zip(got.images, pixels, strict=True):
        resized = np.asarray(transform(Image.fromarray(truth)))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), resized)
