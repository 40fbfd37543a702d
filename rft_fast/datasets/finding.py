"""A data set by its path: listed, matched with a head, decoded."""

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
class Found:
    """A data set that is listed and matched with a head, of which nothing is decoded yet.

    source: where its images are. chosen: which of them are scored, as what. class_names: of those scored, as
    :class:`Dataset` has them.
    """

    name: str
    source: Source
    chosen: Assignment
    class_names: tuple[str, ...]
    preprocess: Preprocess

    @property
    def count(self) -> int:
        """Images that are scored, if all can be read."""
        return len(self.chosen.images)

    def undecoded(self, cache: pathlib.Path | None = None) -> int:
        """How many images :meth:`load` would have to decode, because they are not in the cache."""
        if self.source.pixels is not None:
            return 0
        if cache is None:
            return self.count
        decoded = caches.decoded(decoding.cached(self.source, self.preprocess), cache)
        return self.count - int(decoded[self.chosen.images.numpy()].sum())

    def load(
        self,
        ood: bool = True,
        progress: Progress | None = None,
        *,
        cache: pathlib.Path | None = None,
        skip_unreadable: bool = False,
    ) -> Dataset:
        """The images, decoded; as :func:`load`, which raises the same."""
        chosen, labels, pixels, skipped = self.chosen.images, self.chosen.labels, self.source.pixels, 0
        if pixels is None:
            where = f"datasets: {self.name!r}"
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
        """Seconds that each image takes to decode, with all threads at work; 0 for an ``.npz``.

        Images from all over the source are decoded for about ``seconds``, without a cache, and dropped.
        Raises ValueError if none of them can be read.
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
                f"datasets: {self.name!r}: no image tried can be read, such as {failure}; "
                "replace or remove them"
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
) -> Found:
    """What :func:`load` with these arguments reads, listed once and not decoded.

    Files are listed, an ``.npz`` is read. Nothing is written. Raises ValueError as ``load`` does, but for
    images that cannot be read.
    """
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
    drawn = choose(len(found.images), samples, seed, where)
    chosen = replace(found, images=found.images[drawn], labels=found.labels[drawn])
    named = () if source.pixels is not None else _names(source, found)
    return Found(name, source, chosen, named, preprocess)


def load(
    name: str,
    path: str | PathLike[str],
    preprocess: Preprocess,
    samples: int | None = None,
    ood: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    cache: pathlib.Path | None = None,
    skip_unreadable: bool = False,
    kind: Kind | None = None,
    rows: Rows | None = None,
    label_map: LabelMap | pathlib.Path | str | None = None,
) -> Dataset:
    """Read a data set, its images decoded to the bytes that open_clip's evaluation transform makes.

    path: a folder of class folders (:func:`rft_fast.datasets.folders.source`), an ``.npz`` with images of
        the model's size (:mod:`rft_fast.datasets.arrays`), or any other kind that :data:`KINDS` knows.
    preprocess: what the model expects (:func:`rft_fast.clip.architectures.preprocess`).
    samples: score only that many, drawn without replacement by ``seed`` alone from those that are scored,
        in the file's order; a smaller draw is a part of a larger one. None: all.
    progress: called with (images at hand, images in all) while they are read.
    cache: a directory (:func:`rft_fast.datasets.cache.directory`) where decoded images are kept, so that each
        is decoded once as long as its file does not change. A whole set is then mapped from there, not held
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
    found = find(name, path, preprocess, samples, seed, kind=kind, rows=rows, label_map=label_map)
    return found.load(ood, progress, cache=cache, skip_unreadable=skip_unreadable)


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
