"""Labelled images, decoded once into the bytes that a model's normalisation expects."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from rft_fast import cache as caches
from rft_fast.architectures import Preprocess

from . import decoding
from .dataset import Dataset, choose, subset
from .decoding import Progress, pixel_transform
from .kinds import KINDS, detect, open_source
from .labels import Assignment, LabelMap, Rows, assign
from .source import Source

__all__ = [
    "KINDS",
    "Assignment",
    "Dataset",
    "LabelMap",
    "Progress",
    "Rows",
    "Scan",
    "Source",
    "assign",
    "detect",
    "load",
    "open_source",
    "pixel_transform",
    "scan",
    "subset",
    "time_decoding",
]


@dataclass(frozen=True)
class Scan:
    """What :func:`load` would read.

    count: images that would be scored, were all readable. undecoded: how many of them it would have to
    decode, because they are not in the cache. classes: that the source names, None where it names none.
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
    kind: str | None = None,
    rows: Rows | None = None,
    label_map: LabelMap | Path | None = None,
) -> Dataset:
    """Read a data set, its images decoded to the bytes that open_clip's evaluation transform makes.

    path: a folder of class folders (:func:`rft_fast.datasets.folders.source`), an ``.npz`` with images of
        the model's size (:mod:`rft_fast.datasets.arrays`), or any other kind that :data:`KINDS` knows.
    preprocess: what the model expects (:func:`rft_fast.architectures.preprocess`).
    samples: score only that many, drawn without replacement by ``seed`` alone from those that are scored,
        in the file's order; a smaller draw is a part of a larger one. None: all.
    progress: called with (images at hand, images in all) while they are read.
    cache: a directory (:func:`rft_fast.cache.directory`) where decoded images are kept, so that each is
        decoded once as long as its file does not change. A whole set is then mapped from there, not held
        in memory. Trouble with it is a warning and stops nothing. None: no cache.
    skip_unreadable: leave out images that cannot be read, named in a warning and counted in ``skipped``,
        so that as many fewer are scored; otherwise they are refused.
    kind: what the path holds, a key of :data:`KINDS`; None: detected.
    rows, label_map: the head's rows, and which of them the classes are (:func:`assign`).

    Raises ValueError, naming the set and the path, for anything that would silently score wrong: empty
    class folders, images outside of any class, files that are no images, unreadable or truncated images,
    modes that RGB bytes cannot hold, gaps in numbered folders, classes that are not the head's, sizes that
    do not fit, more samples than images.
    """
    where = f"datasets: {name!r}"
    source, found, names = _find(name, path, preprocess, samples, seed, kind, rows, label_map)
    chosen = found.images
    mean, std = preprocess.mean, preprocess.std
    if source.pixels is not None:
        images = source.pixels if len(chosen) == len(source.pixels) else source.pixels[chosen]
        return Dataset(name, images, found.labels, mean, std, found.classes, ood, groups=found.groups)
    arguments = (chosen.tolist(), preprocess, cache, progress, skip_unreadable, where)
    images, readable = decoding.read(source, *arguments)
    labels, skipped = found.labels[readable], len(chosen) - len(readable)
    return Dataset(name, images, labels, mean, std, found.classes, ood, names, skipped, found.groups)


def scan(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    seed: int = 0,
    *,
    cache: Path | None = None,
    kind: str | None = None,
    rows: Rows | None = None,
    label_map: LabelMap | Path | None = None,
) -> Scan:
    """What :func:`load` with these arguments would read, without decoding an image.

    Files are listed, an ``.npz`` is read. Nothing is written. Raises ValueError as ``load`` does, but for
    images that cannot be read.
    """
    source, found, _ = _find(name, path, preprocess, samples, seed, kind, rows, label_map)
    count = len(found.images)
    classes = len(source.class_names) or None
    if source.pixels is not None:
        return Scan(name, count, 0, classes)
    undecoded = count
    if cache is not None:
        undecoded -= int(
            caches.decoded(decoding.cached(source, preprocess), cache)[found.images.numpy()].sum()
        )
    return Scan(name, count, undecoded, classes)


def time_decoding(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    seconds: float = 2.0,
    *,
    kind: str | None = None,
) -> float:
    """Seconds that each image takes to decode, with all threads at work; 0 for an ``.npz``.

    Images from all over the set are decoded for about ``seconds``, without a cache, and dropped. Raises
    ValueError as :func:`load` does, and if none of them can be read.
    """
    source = open_source(name, path, kind)
    if source.pixels is not None:
        return 0.0
    order = np.random.RandomState(0).permutation(len(source.files)).tolist()
    decoded, failure, start = 0, "", time.perf_counter()

    def until() -> Iterator[int]:
        for index in order:
            yield index
            if time.perf_counter() - start >= seconds:
                return

    decode = partial(decoding.decode, source, pixel_transform(preprocess))
    with decoding.threads() as pool, decoding.whole_images_only():
        for result in decoding.ahead(pool, decode, until(), 2 * (os.cpu_count() or 1)):
            if isinstance(result, str):
                failure = result
            else:
                decoded += 1
    if not decoded:
        raise ValueError(
            f"datasets: {name!r}: no image tried can be read, such as {failure}; replace or remove them"
        )
    return (time.perf_counter() - start) / decoded


def _find(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None,
    seed: int,
    kind: str | None,
    rows: Rows | None,
    label_map: LabelMap | Path | None,
) -> tuple[Source, Assignment, tuple[str, ...]]:
    """What lies at a path, which of its images are chosen, as what, and the names of the classes."""
    where = f"datasets: {name!r}"
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise TypeError(f"{where}: samples must be an int or None, got {type(samples).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed must be an int in [0, 2**32), got {seed!r}")
    source = open_source(name, path, kind)
    if source.pixels is not None and tuple(source.pixels.shape[2:]) != preprocess.size:
        raise ValueError(
            f"{where}: the model takes {preprocess.size} images, {path} has "
            f"{tuple(source.pixels.shape[2:])}; resize them, or give the images as a "
            "folder, which is resized while it is read"
        )
    try:
        found = assign(source, rows, label_map)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    chosen = choose(len(found.images), samples, seed, where)
    drawn = replace(found, images=found.images[chosen], labels=found.labels[chosen])
    return source, drawn, _names(source, found)


def _names(source: Source, found: Assignment) -> tuple[str, ...]:
    """The names of the classes scored, in the order of their rows; empty where there are none to tell."""
    if not source.class_names or found.groups is not None:
        return ()
    rows = source.labels[found.images]
    name_of = dict(zip(found.labels.tolist(), rows.tolist(), strict=True))
    if found.classes is None and name_of == {row: row for row in name_of}:
        return source.class_names
    order = sorted(name_of) if found.classes is None else found.classes.tolist()
    if len(name_of) != len(order):
        return ()
    return tuple(source.class_names[name_of[row]] for row in order)
