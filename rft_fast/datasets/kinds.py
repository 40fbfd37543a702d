"""The formats that data sets come in, and which of them lies at a path."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

from rft_fast import names
from rft_fast.names import TREES

from . import arrays, arrow, cifar, folders, shards
from .source import Source

# Formats that know their files: before class folders, as some of them are folders, too.
_FORMATS: dict[names.Kind, Any] = {"cifar": cifar, "webdataset": shards, "arrow": arrow, "npz": arrays}

KINDS: dict[names.Kind, Callable[[pathlib.Path, str], Source]] = {
    kind: partial(folders.source, kind=kind) if kind in TREES else _FORMATS[kind].source
    for kind in names.KINDS
}


def detect(path: str | PathLike[str]) -> names.Kind:
    """The kind of what lies at a path, a key of :data:`KINDS`.

    Raises ValueError where there is nothing of a known kind, or no telling which.
    """
    path = named(path)
    formats = [kind for kind, module in _FORMATS.items() if module.matches(path)]
    readings: list[str] = list(formats)
    if path.is_dir():
        if not formats:
            return folders.find(path).kind
        if place := _known_folders(path):
            readings.append(f"{place.kind} in {place.path}")
    if len(readings) > 1 and readings != ["cifar", "npz"]:  # an .npz may be CIFAR's by its name
        raise ValueError(
            f"{path} may be read as {' or as '.join(readings)}; say which kind, or name one of them"
        )
    if formats:
        return formats[0]
    state = "is neither" if path.exists() else "does not exist"
    raise ValueError(f"expected a folder of classes or a file of kind {', '.join(_FORMATS)}; {path} {state}")


def named(path: str | PathLike[str]) -> pathlib.Path:
    """The path, of ``.`` and ``..`` in full: a folder's name and what lies beside it may tell what it is."""
    path = pathlib.Path(path)
    return path.resolve() if path.name in ("", "..") else path


def _known_folders(path: pathlib.Path) -> folders.Place | None:
    """Class folders that are beside files of another format, such as the archive that they come from."""
    try:
        place = folders.find(path)
    except ValueError:
        return None
    return None if place.kind == "folder" else place


def open_source(name: str, path: str | PathLike[str], kind: names.Kind | None = None) -> Source:
    """Lists the images of a data set; decodes nothing.

    name: of the set, for messages. kind: a key of :data:`KINDS`, None: detected. Raises ValueError as the
    kind's own reader does: for everything that would silently score wrong.
    """
    where, path = f"datasets: {name!r}", named(path)
    if kind is None:
        try:
            kind = detect(path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if kind in TREES:  # and not as if it had been said: the path may hold the folder that is meant
            return folders.source(path, where)
    elif kind not in KINDS:
        raise ValueError(f"{where}: unknown kind {kind!r}; there are {', '.join(sorted(KINDS))}")
    return KINDS[kind](path, where)
