"""Formats of data sets, and their detection."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

from rft_fast import names
from rft_fast.names import TREES

from . import arrays, arrow, cifar, folders, idx, shards
from .source import Source

# Formats that recognize their files; tried before class folders, as some of them are folders, too.
_FORMATS: dict[names.Kind, Any] = {
    "cifar": cifar,
    "idx": idx,
    "webdataset": shards,
    "arrow": arrow,
    "npz": arrays,
}

KINDS: dict[names.Kind, Callable[[pathlib.Path, str], Source]] = {
    kind: partial(folders.source, kind=kind) if kind in TREES else _FORMATS[kind].source
    for kind in names.KINDS
}


def detect(path: str | PathLike[str]) -> names.Kind:
    """Detect the format at a path, a key of :data:`KINDS`.

    Raises:
        ValueError: there is no known format, or it is ambiguous.
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
            f"{path} can be read as {' or as '.join(readings)}; choose a kind, or give the path "
            "of one of them"
        )
    if formats:
        return formats[0]
    state = "is neither" if path.exists() else "does not exist"
    raise ValueError(
        f"expected a folder of class folders, or a file of kind {', '.join(_FORMATS)}; {path} {state}"
    )


def named(path: str | PathLike[str]) -> pathlib.Path:
    """Resolve ``.`` and ``..``, since a folder's name and its neighbours help to detect its format."""
    path = pathlib.Path(path)
    return path.resolve() if path.name in ("", "..") else path


def _known_folders(path: pathlib.Path) -> folders.Place | None:
    """Class folders of a known kind beside files of another format, such as the archive they come from."""
    try:
        place = folders.find(path)
    except ValueError:
        return None
    return None if place.kind == "folder" else place


def open_source(name: str, path: str | PathLike[str], kind: names.Kind | None = None) -> Source:
    """List the images of a data set, without decoding.

    Args:
        name: name of the data set, for messages.
        path: where it is.
        kind: its format, a key of :data:`KINDS`; None: detected.

    Raises:
        ValueError: anything that would silently give wrong scores; see the reader of the format.
    """
    where, path = f"datasets: {name!r}", named(path)
    if kind is None:
        try:
            kind = detect(path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if kind in TREES:  # kind "folder" would mean the path itself, not class folders below it
            return folders.source(path, where)
    elif kind not in KINDS:
        raise ValueError(f"{where}: unknown kind {kind!r}; expected one of {', '.join(sorted(KINDS))}")
    return KINDS[kind](path, where)
