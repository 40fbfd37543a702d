"""The names in a run's directory, and which directories a run may write into."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..common import disk, words
from ..names import STUDIES
from . import database
from .errors import Mismatch
from .loading import is_begun, opened, order, recorded, refuse_stranger
from .lock import refuse_in_use

TABLE, CONFIG, FIGURES, LOG = "rows.csv", "config.json", "figures", "run.log"
REPORTS = ("report.html", "comparison.html")  # as rft_fast.report names them, made of the rows
# Entries of a configuration that the numbers do not depend on.
DERIVED = ("scored among",)  # from others, and not there in runs of earlier versions
ASIDE = {("command",), ("date",), ("platform",), ("threads",), ("versions", "python")}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two configurations differ in what rows depend on, in words.

    Everything counts but command, date, platform, number of threads, version of Python, and where files lie:
    any entry called ``path``, as their hashes count. A model or a data set may have any of these names.
    """

    def aside(names: tuple[str, ...]) -> bool:
        return names in ASIDE or names[0] in DERIVED or names[-1] == "path"

    return words.differences(plain(there), plain(now), aside)


def check(
    directory: str | os.PathLike[str], overwrite: bool = False, config: Mapping[str, Any] | None = None
) -> None:
    """Refuses a directory that a run must not or cannot write into; changes nothing.

    A run that is there can be gone on with, where the configuration does not differ.

    Args:
        overwrite: it shall be replaced instead.
        config: the configuration, as far as it is known; None: not yet.

    Raises:
        ValueError: it is no directory, holds files under our names that are not ours (links and FIFOs among
            them), is in use by another process, or holds a run of another configuration (with the
            differences), of a newer version, or damaged.
        PermissionError: it cannot be written to.
    """
    directory = pathlib.Path(directory)
    if not directory.exists():
        parent = next(p for p in directory.absolute().parents if p.exists())
        if not parent.is_dir():
            raise ValueError(f"results: expected a directory, got the file {parent}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"results: cannot create {directory}: {parent} is not writable")
        return
    if not directory.is_dir():
        raise ValueError(f"results: expected a directory, got the file {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"results: {directory} is not writable")
    refuse_links(directory, config or {})
    refuse_in_use(directory)
    if not is_begun(directory):
        # A kill while a run begins, or replaces one, leaves an empty database, and that folder.
        ours = [directory / FIGURES] if (directory / database.FILE).exists() else []
        written = dict.fromkeys([*replaced(directory, config or {}), directory / FIGURES, directory / LOG])
        if names := [f.relative_to(directory) for f in written if f not in ours and f.exists()]:
            raise ValueError(
                f"results: {directory} holds {', '.join(map(str, names))} but no {database.FILE} with a run, "
                "so they are not from one; choose another directory"
            )
        return
    if overwrite:
        with opened(directory) as base:
            refuse_stranger(directory, base)
        return
    there = recorded(directory)
    if there is not None and config is not None:
        asked = {name: there[name] for name in config if name in there}
        if unlike := differences(asked, config):
            raise mismatch(directory, unlike)


def figure_file(directory: pathlib.Path, study: str) -> pathlib.Path:
    return directory / FIGURES / f"{study}.png"


def table_file(directory: pathlib.Path, study: str) -> pathlib.Path:
    return directory / f"{study}.csv"


def replaced(directory: pathlib.Path, config: Mapping[str, Any]) -> list[pathlib.Path]:
    """The files of a run of this configuration that new ones replace."""
    names = dict.fromkeys([*STUDIES, *order(config)[1], "cost"])
    named = [make(directory, name) for name in names for make in (figure_file, table_file)]
    return [*named, directory / TABLE, directory / CONFIG]


def refuse_links(directory: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses a directory in which a name that a run writes is a link, or no plain file."""
    base = directory / database.FILE
    in_place = [base, *(database.beside(base, end) for end in database.BESIDE)]
    in_place += [directory / database.LOCK, directory / LOG]
    try:
        disk.check_targets(replaced(directory, config), in_place, [directory / FIGURES])
    except ValueError as error:
        raise ValueError(f"results: {error}") from None


def mismatch(directory: pathlib.Path, unlike: Sequence[str]) -> Mismatch:
    return Mismatch(
        f"results: the run in {directory} was asked for something else ({'; '.join(unlike)}); ask for the "
        "same to go on with it, choose another directory, or replace it (--overwrite, overwrite=True)"
    )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found
