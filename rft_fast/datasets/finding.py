"""Loads a data set from a path: listed, matched with a head, decoded."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike

import numpy as np

from rft_fast.clip.architectures import Preprocess
from rft_fast.datasets import cache as caches
from rft_fast.names import Kind

from . import decoding
from .dataset import Dataset, choose
from .decoding import Progress, pixel_transform
from .evidence import Rows
from .kinds import open_source
from .labels import Assignment, assign
from .maps import LabelMap
from .source import Source


@dataclass(frozen=True, eq=False)
class Listed:
    """A data set that is listed and matched with a head, but not decoded.

    Attributes:
        name: name of the data set.
        source: its images on disk.
        chosen: the images to score, and their labels.
        class_names: names of the scored classes, as in :class:`Dataset`.
        preprocess: what the model expects.
    """

    name: str
    source: Source
    chosen: Assignment
    class_names: tuple[str, ...]
    preprocess: Preprocess

    @property
    def count(self) -> int:
        """Number of images to score, if all can be read."""
        return len(self.chosen.images)

    def undecoded(self, cache: str | PathLike[str] | None = None) -> int:
        """Number of images that :meth:`load` has to decode because the cache lacks them."""
        if self.source.pixels is not None:
            return 0
        if cache is None:
            return self.count
        decoded = caches.decoded(decoding.cached(self.source, self.preprocess), pathlib.Path(cache))
        return self.count - int(decoded[self.chosen.images.numpy()].sum())

    def load(
        self,
        ood: bool = True,
        progress: Progress | None = None,
        *,
        cache: str | PathLike[str] | None = None,
        skip_unreadable: bool = False,
    ) -> Dataset:
        """Decode the images; arguments and errors as in :func:`load`."""
        chosen, labels, pixels, skipped = self.chosen.images, self.chosen.labels, self.source.pixels, 0
        if pixels is None:
            where = f"datasets: {self.name!r}"
            cache = None if cache is None else pathlib.Path(cache)
            arguments = (chosen.tolist(), self.preprocess, cache, progress, skip_unreadable, where)
            with self.source.stored.unchanged():
                images, readable = decoding.read(self.source, *arguments)
            labels, skipped = labels[readable], len(chosen) - len(readable)
        else:
            self.source.stored.check()
            images = pixels if len(chosen) == len(pixels) else pixels[chosen]
        return Dataset(
            self.name,
            images,
            labels,
            self.preprocess.mean,
            self.preprocess.std,
            self.chosen.classes,
            ood,
            self.class_names,
            skipped,
            self.chosen.groups,
        )

    def time_decoding(self, seconds: float = 2.0) -> float:
        """Measure the seconds per image that decoding takes on all threads; 0 for an ``.npz``.

        Images from all over the source are decoded, without a cache, for about ``seconds``.

        Raises:
            ValueError: none of them can be read.
        """
        if self.source.pixels is not None:
            return 0.0
        order = np.random.RandomState(0).permutation(len(self.source.files)).tolist()
        decoded, failure, start = 0, "", time.perf_counter()

        def until() -> Iterator[int]:
            for index in order:
                yield index
                if time.perf_counter() - start >= seconds:
                    return

        decode = partial(decoding.decode, self.source, pixel_transform(self.preprocess))
        with decoding.threads() as pool, decoding.whole_images_only():
            for result in decoding.ahead(pool, decode, until(), 2 * (os.cpu_count() or 1)):
                if isinstance(result, str):
                    failure = result
                else:
                    decoded += 1
        if not decoded:
            raise ValueError(
                f"datasets: {self.name!r}: none of the images that were tried can be read, such as "
                f"{failure}; replace or remove them"
            )
        return (time.perf_counter() - start) / decoded


def find(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    seed: int = 0,
    *,
    kind: Kind | None = None,
    rows: Rows | None = None,
    label_map: LabelMap | pathlib.Path | str | None = None,
    at_most: bool = False,
) -> Listed:
    """List a data set and match it with a head, without decoding; arguments as in :func:`load`.

    An ``.npz`` is read whole. Nothing is written. at_most: whether a data set of fewer images than
    ``samples`` is taken whole, not refused.

    Raises:
        TypeError: as :func:`load`.
        ValueError: as :func:`load`, except for images that cannot be read.
    """
    where = f"datasets: {name!r}"
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise TypeError(f"{where}: samples must be an int or None, got {type(samples).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed must be an int in [0, 2**32), got {seed!r}")
    source = open_source(name, path, kind)
    if source.pixels is not None and tuple(source.pixels.shape[2:]) != preprocess.size:
        raise ValueError(
            f"{where}: the model needs images of size {preprocess.size}, but {path} has "
            f"{tuple(source.pixels.shape[2:])}; resize them, or give a folder of images, which "
            "are resized when they are read"
        )
    try:
        found = assign(source, rows, label_map)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if at_most and samples is not None:
        samples = min(samples, len(found.images))
    drawn = choose(len(found.images), samples, seed, where)
    chosen = replace(found, images=found.images[drawn], labels=found.labels[drawn])
    named = () if source.pixels is not None else _names(source, found)
    return Listed(name, source, chosen, named, preprocess)


def load(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    ood: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    cache: str | PathLike[str] | None = None,
    skip_unreadable: bool = False,
    kind: Kind | None = None,
    rows: Rows | None = None,
    label_map: LabelMap | pathlib.Path | str | None = None,
) -> Dataset:
    """Load a data set, with images decoded to the bytes of open_clip's evaluation transform.

    Args:
        name: name of the data set.
        path: a folder of class folders (:func:`rft_fast.datasets.folders.source`), an ``.npz`` with images
            of the model's size (:mod:`rft_fast.datasets.arrays`), or another of :data:`KINDS`.
        preprocess: what the model expects (:func:`rft_fast.clip.architectures.preprocess`).
        samples: number of images to score, drawn without replacement by ``seed`` from those that can be
            scored, kept in their order; a smaller draw is a subset of a larger one. None: all.
        ood: whether the data set is out of distribution for the fine-tuned models.
        seed: seed of the draw, in [0, 2**32).
        progress: called with (images available, images in all) while they are read.
        cache: directory of decoded images (:func:`rft_fast.datasets.cache.directory`): each image is decoded
            once as long as its file does not change, and a whole data set is mapped, not held in memory.
            Problems
            with the cache are warnings. None: no cache.
        skip_unreadable: leave out images that cannot be read, with a warning, and count them in ``skipped``;
            otherwise they are an error.
        kind: format of the data set, one of :data:`KINDS`; None: detected.
        rows: rows of the head.
        label_map: rows of the classes (:func:`assign`).

    Raises:
        TypeError: ``samples`` is not an int.
        ValueError: anything that would silently give wrong scores: empty class folders, images outside of
            class folders, other files, unreadable images, image modes that RGB bytes cannot hold, gaps in
            numbered
            folders, classes that do not match the head, wrong sizes, more samples than images. The message
            names the data set and the path.
    """
    found = find(name, path, preprocess, samples, seed, kind=kind, rows=rows, label_map=label_map)
    return found.load(ood, progress, cache=cache, skip_unreadable=skip_unreadable)


def _names(source: Source, found: Assignment) -> tuple[str, ...]:
    """Names of the scored classes, in the order of their rows; empty if unknown."""
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
