"""Access to the caches: the decoded images of one run, and the list of all caches."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import storage
from .file import (
    CacheFile,
    Damaged,
    Pixels,
    Source,
    made_otherwise,
    marks_of,
    open_cache,
    parse,
    same_images,
    table_of,
)

_OURS = re.compile(r"[\w.-]+-[0-9a-f]{16}\.pixels(\.[0-9a-f]{8}\.part)?")


def directory() -> pathlib.Path:
    """Directory of the caches: ``RFT_CACHE``, else ``XDG_CACHE_HOME``/rft_fast, else ~/.cache/rft_fast."""
    if chosen := os.environ.get("RFT_CACHE"):
        return pathlib.Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache").absolute() / "rft_fast"


def decoded(source: Source, directory: pathlib.Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which images, bool [files], the cache has. Nothing is created, changed or verified."""
    found = np.zeros(len(source.files), bool)
    try:
        with storage.opened(source.path(directory)) as fd:
            head = parse(fd)
            marks = marks_of(fd, head)
    except (OSError, Damaged):
        return found
    if not made_otherwise(head.about, source):
        for new, old in same_images(head.table, table_of(source)):
            found[new] = marks[old] != 0
    return found


class Images:
    """The decoded images of a run: on disk if possible, otherwise in memory. For one thread.

    A disk error is a warning and never stops a run.

    Args:
        source: what the images are decoded from.
        chosen: positions in ``source.files``.
        directory: directory of caches; None: keep images in memory only.
        each: ``map``, or a threaded version of it.

    Attributes:
        there: bool [chosen], which images are available; the others must be decoded and passed to
            :meth:`put`.
    """

    def __init__(
        self,
        source: Source,
        chosen: Sequence[int],
        directory: pathlib.Path | None,
        each: Callable[[Callable[[int], Pixels | None], Iterable[int]], Iterable[Pixels | None]] = map,
    ) -> None:
        self.source = source
        self.chosen = chosen
        self.there = np.zeros(len(chosen), bool)
        self._memory: Tensor | None = None
        self._file: CacheFile | None = None
        if directory is not None:
            try:
                self._file = open_cache(source, directory)
            except OSError as error:
                self._warn(error, "nothing is stored there")
        # A whole folder is mapped; a part of one must be copied together.
        self._whole = self._file is not None and len(chosen) == len(source.files)
        if self._file is not None:
            self._recall(self._file, each)

    def put(self, position: int, pixels: Pixels) -> None:
        """Store a decoded image: uint8 [3, h, w], contiguous; ``position`` is that in ``chosen``."""
        if pixels.shape != (3, *self.source.size) or pixels.dtype != np.uint8:
            raise RuntimeError(
                f"cache: expected an image of size {self.source.size}, got {pixels.dtype} {pixels.shape}"
            )
        if self._file is not None:
            try:
                self._file.write(self.chosen[position], pixels)
            except OSError as error:
                self._give_up(self._file, error)
        if not self._whole:
            self._store(position, pixels)
        self.there[position] = True

    def missing(self) -> list[int]:
        """Positions in ``chosen`` of the images that are not available.

        Call it again after putting all of them: a failing disk may lose images.
        """
        if self._file is not None:
            try:
                self._file.commit()
            except OSError as error:
                self._give_up(self._file, error)
        missing: list[int] = np.flatnonzero(~self.there).tolist()
        return missing

    def take(self) -> Tensor:
        """Return the images, uint8 [chosen, 3, h, w]: mapped from disk, copied on write, or in memory.

        Call it once, when no image is missing that can be read; the contents of missing images are undefined.

        Raises:
            OSError: the disk cannot be mapped and has lost images.
        """
        if self._file is not None and self._whole:
            try:
                return self._file.map()
            except OSError as error:
                before = self.there.copy()
                self._give_up(self._file, error)
                if (before != self.there).any():
                    raise
            finally:
                self.close()
        self.close()
        return self._in_memory()

    def close(self) -> None:
        """Close the file; tensors that were taken remain valid."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # after an error: keep the images decoded so far
            try:
                self._file.commit()
            except OSError:
                pass  # the error was reported, and marked images are complete
        self.close()

    def _recall(self, file: CacheFile, each: Callable[..., Iterable[Pixels | None]]) -> None:
        marked = np.flatnonzero(file.marks[list(self.chosen)]).tolist()
        damaged = 0
        for position, pixels in zip(marked, each(file.read, (self.chosen[p] for p in marked)), strict=True):
            if pixels is None:
                damaged += 1
                continue
            if not self._whole:
                self._store(position, pixels)
            self.there[position] = True
        if damaged:
            warnings.warn(
                f"cache: {damaged} of {len(marked)} images in {file.path} had to be decoded again, because "
                "the cache is damaged there. If this happens again, check the disk",
                stacklevel=4,
            )
        wanted = int((~self.there).sum()) * file.head.slot
        if not wanted:
            return
        try:
            if not file.writable:
                raise PermissionError(errno.EACCES, "it cannot be written", str(file.path))
            storage.check_room(file.path.parent, wanted)
        except OSError as error:
            self._give_up(file, error)

    def _give_up(self, file: CacheFile, error: OSError) -> None:
        """Continue in memory, with all images decoded so far."""
        if self._whole:
            self._whole = False
            for position in np.flatnonzero(self.there).tolist():
                pixels = file.read(self.chosen[position])
                self.there[position] = pixels is not None  # otherwise decoded again
                if pixels is not None:
                    self._store(position, pixels)
        self._file = None
        removed = file.made and file.remove()
        file.close()
        self._warn(error, f"{file.path} is " + ("removed" if removed else "left unchanged"))

    def _warn(self, error: OSError, what: str) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, or choose a larger directory" if full else "choose a writable directory"
        warnings.warn(
            f"cache: {error}; {what}, so images of {self.source.folder} are decoded for this run "
            f"only. To keep them for all runs, {remedy} (--cache, or the environment variable "
            "RFT_CACHE)",
            stacklevel=5,
        )

    def _in_memory(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty((len(self.chosen), 3, *self.source.size), dtype=torch.uint8)
        return self._memory

    def _store(self, position: int, pixels: Pixels) -> None:
        self._in_memory().numpy()[position] = pixels


@dataclass(frozen=True)
class Entry:
    """A cache on disk.

    Attributes:
        path: its file.
        about: its head; None if no run can use it.
        decoded: number of images.
        taken: bytes on disk.
    """

    path: pathlib.Path
    about: dict[str, Any] | None
    decoded: int
    taken: int


def entries(directory: pathlib.Path) -> list[Entry]:
    """List the caches in a directory, and remains of interrupted runs; other files are ignored."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not _OURS.fullmatch(path.name) or not path.is_file():
            continue
        about, marked = None, 0
        try:
            with storage.opened(path) as fd:
                head = parse(fd)
                about, marked = head.about, int(np.count_nonzero(marks_of(fd, head)))
        except (OSError, Damaged):
            pass
        try:
            found.append(Entry(path, about, marked, path.stat().st_blocks * 512))
        except FileNotFoundError:
            continue  # removed meanwhile
    return found
