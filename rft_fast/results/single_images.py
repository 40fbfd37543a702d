"""Results of single images of a run, read from its directory."""

from __future__ import annotations

import os
import pathlib
import sqlite3
from itertools import chain
from typing import Any

from .. import catalogue
from ..common.words import many, some
from ..studies.images import ImageResults, ImageScores
from ..studies.rows import COLUMNS
from . import database, records
from .errors import NoImages
from .loading import check_version, frame, is_begun, opened, order, refuse_missing, remedied

_DATASET, _SAMPLES = list(COLUMNS).index("dataset"), list(COLUMNS).index("samples")


def images(
    directory: str | os.PathLike[str],
    *,
    study: str = "interpolation",
    model: str | None = None,
    dataset: str | None = None,
) -> ImageResults:
    """Return the results of single images of a study, also of a run in progress.

    Args:
        directory: Directory of a run.
        study: Name of a study that keeps them: interpolation, layers, prune,
            cumulative, ensemble, coefficients, pairs or soups.
        model: Name of a model; None: all of them.
        dataset: Name of a data set; None: the only one of these rows.

    Returns:
        Hits, losses and predictions as arrays [positions, n] of n images, with the table of their rows in the
        order of :func:`rft_fast.results.load`. All rows are of the same images in the same order, so that
        differences can be paired. ``hits.mean(1)`` is the column ``accuracy``, exactly.

    Raises:
        FileNotFoundError: The directory holds no ``rows.sqlite``.
        NoImages: Rows have no such results; the message says why, and what to do.
        Damaged: The database cannot be read.
        TypeError: ``study``, ``model`` or ``dataset`` is not one name.
        ValueError: There are no such rows; there are several data sets; the run is of a newer version.
    """
    for argument, value in (("study", study), ("model", model), ("dataset", dataset)):
        if not isinstance(value, str) and (value is not None or argument == "study"):
            raise TypeError(
                f"results: images: expected {argument} as one name, a str, got {type(value).__name__} "
                f"{value!r}; call it once for each name"
            )
    directory = pathlib.Path(directory)
    refuse_missing(directory)
    keeping = [each.name for each in catalogue.studies() if each.keeps_images]
    if study in catalogue.names() and study not in keeping:
        raise NoImages(f"results: {study} keeps no results of single images; {', '.join(keeping)} do")
    only = {"study": study, **({} if model is None else {"model": model})}
    found = _read(directory, only)
    of = f"{study} of {model}" if model is not None else study
    if not found:
        raise ValueError(f"results: {directory} has no rows of {of}; it has {_contents(directory)}")
    if dataset is None and len(found) > 1:
        raise ValueError(f"results: {of} has rows of several data sets; select one of {some(list(found))}")
    name = next(iter(found)) if dataset is None else dataset
    if name not in found:
        raise ValueError(f"results: {of} has no rows of {name!r}; it has rows of {some(list(found))}")
    rows, scores = found[name]
    whole = [each for each in scores if each is not None]
    if len(whole) < len(rows):
        raise NoImages(_why(directory, f"{len(rows) - len(whole)} of {many(len(rows), 'row')} of {of}"))
    return ImageResults.stack(frame(rows), whole)


class Stored:
    """The image results of a run, each read when it is needed: :class:`rft_fast.studies.images.Images`.

    Args:
        directory: Directory of a run.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = pathlib.Path(directory)
        self._last: tuple[tuple[str, str], _Found] | None = None

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        """Return the results of a study of a model on a data set; None where some row has none."""
        if self._last is None or self._last[0] != (study, model):
            self._last = (study, model), _read(self._directory, {"study": study, "model": model})
        rows, scores = self._last[1].get(dataset, ([], []))
        whole = [each for each in scores if each is not None]
        return ImageResults.stack(frame(rows), whole) if whole and len(whole) == len(rows) else None


_Found = dict[str, tuple[list[tuple[Any, ...]], list[ImageScores | None]]]
"""Data set -> its rows, and the image results of each."""


def _read(directory: pathlib.Path, only: dict[str, str]) -> _Found:
    found: _Found = {}
    with remedied(directory), opened(directory) as base:
        if not database.is_empty(base):
            check_version(directory, base)
            sorting = order(records.config(base))
            for identity, rows in records.measurements(base, *sorting, only):
                scores: list[ImageScores | None] = [*records.images_of(base, identity)] or [None] * len(rows)
                for row, each in zip(rows, scores, strict=True):
                    if each is not None and len(each) != row[_SAMPLES]:
                        raise sqlite3.DatabaseError(
                            "results of single images are of another number of images"
                        )
                    known = found.setdefault(row[_DATASET], ([], []))
                    known[0].append(row)
                    known[1].append(each)
    return found


def count(directory: str | os.PathLike[str]) -> int:
    """Return the number of rows of a run that have results of single images."""
    directory = pathlib.Path(directory)
    with remedied(directory), opened(directory) as base:
        if not records.has_images(base):
            return 0
        return int(base.execute("SELECT count(*) FROM images").fetchone()[0])


def _contents(directory: pathlib.Path) -> str:
    """Name the studies and the models of a run."""
    found: dict[str, list[object]] = {"study": [], "model": []}
    if is_begun(directory):
        with remedied(directory), opened(directory) as base:
            for name, values in found.items():
                values += chain(*base.execute(f"SELECT DISTINCT {name} FROM measurements ORDER BY id"))
    if not found["study"]:
        return "none at all"
    return f"those of {some(found['study'])} of the models {some(found['model'])}"


def _why(directory: pathlib.Path, what: str) -> str:
    """Say why rows have no image results, and what to do."""
    with remedied(directory), opened(directory) as base:
        settings = records.config(base).get("run")
    off = isinstance(settings, dict) and settings.get("image_results") is False
    reason = "the run was made" if off else "they were measured by an earlier version of rft_fast, or"
    return (
        f"results: {directory} has no results of single images for {what}: {reason} with --no-image-results. "
        "To have them, measure without that option, in a new directory or with --overwrite"
    )
