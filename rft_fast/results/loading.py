"""Reading a run's directory, also while it is written or after an interruption."""

from __future__ import annotations

import os
import pathlib
import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import pandas as pd
from packaging.version import InvalidVersion, Version

from .. import __version__
from ..config.recorded import upgraded
from ..studies.columns import describe as describe
from ..studies.rows import COLUMNS
from . import database, records, schema
from .errors import Damaged

# In SQLite's messages these blame not the file, but its folder, or a process that has it open.
_PLACE = ("unable to open", "locked", "readonly", "disk I/O", "is full", "permission", "locking protocol")


def recorded(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the configuration of the run in a directory; None where there is none.

    Args:
        directory: Directory of a run.

    Returns:
        The configuration, as ``config.json`` holds it.

    Raises:
        Damaged: The database cannot be read.
        ValueError: The run is of a newer version, or the database of another program.
    """
    directory = pathlib.Path(directory)
    if not is_begun(directory):
        return None
    with opened(directory) as base:
        check_version(directory, base)
        return upgraded(records.config(base))


def load(directory: str | os.PathLike[str]) -> pd.DataFrame:
    """Return the rows of a run, also of one that is running or was interrupted.

    Args:
        directory: Directory of a run.

    Returns:
        The columns and types of :data:`COLUMNS`, sorted by study, by model in the order of the request, and
        by the position of each measurement in its study.

    Raises:
        FileNotFoundError: The directory holds no ``rows.sqlite``.
        Damaged: The database cannot be read.
        ValueError: The run is of a newer version, or the database of another program.
    """
    directory = pathlib.Path(directory)
    refuse_missing(directory)
    return frame(stored(directory))


def refuse_missing(directory: pathlib.Path) -> None:
    """Raise FileNotFoundError for a directory without a database."""
    if not (directory / database.FILE).is_file():
        raise FileNotFoundError(
            f"results: expected the directory of a run, but {directory} has no {database.FILE}"
        )


def stored(directory: pathlib.Path) -> Iterator[tuple[Any, ...]]:
    """Yield the stored rows of the run in a directory, if there is one. Raises as :func:`load`."""
    with remedied(directory):
        if not is_begun(directory):
            return
        with opened(directory) as base:
            check_version(directory, base)
            database.check_pages(base)
            yield from records.rows(base, *order(records.config(base)))


def measured(directory: pathlib.Path) -> dict[tuple[str, str], set[int]] | None:
    """Return (study, model) -> numbers of the measurements of the run in a directory; None: there is no run.

    Everything is checked, as at the start of a run. Raises as :func:`load`.
    """
    with remedied(directory):
        if not is_begun(directory):
            return None
        found: dict[tuple[str, str], set[int]] = {}
        with opened(directory) as base:
            check_version(directory, base)
            records.verify(base)
            for study, model, number in base.execute("SELECT study, model, number FROM measurements"):
                found.setdefault((study, model), set()).add(number)
        return found


@contextmanager
def remedied(directory: pathlib.Path) -> Iterator[None]:
    """Add to Damaged what to do."""
    try:
        yield
    except Damaged as error:
        raise Damaged(f"{error}; {remedy(directory)}") from error


def remedy(directory: pathlib.Path) -> str:
    """Return what to do about a damaged run."""
    command = f"python -m rft_fast.results {shlex.quote(str(directory))} --recover"
    return f"to save what can still be read: {command}"


def frame(rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Return stored rows as a table with the columns and types of :data:`COLUMNS`."""
    columns: list[list[Any]] = [[] for _ in COLUMNS]
    for some in batches(rows):
        for column, values in zip(columns, zip(*some, strict=True), strict=True):
            column.extend(values)
    return pd.DataFrame(
        {
            name: pd.Series(column, dtype="Int64" if kind == "boolean" else kind).astype(kind)
            for (name, kind), column in zip(COLUMNS.items(), columns, strict=True)
        }
    )


def batches(rows: Iterable[Sequence[Any]], size: int = 1000) -> Iterator[list[Sequence[Any]]]:
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some


def order(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The models of a run, and its studies, each in their order."""
    models, studies = config.get("finetuned"), config.get("measured")
    return (
        list(models) if isinstance(models, Mapping) else [],
        [str(name) for name in studies] if isinstance(studies, list) else [],
    )


@contextmanager
def explained(directory: pathlib.Path) -> Iterator[None]:
    """Turn SQLite's errors into Damaged, and into OSError where the disk is to blame."""
    try:
        yield
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.OperationalError) and any(words in str(error) for words in _PLACE):
            raise OSError(f"results: {directory} cannot be used: {error}") from error
        raise Damaged(f"results: {directory / database.FILE} cannot be read: {error}") from error


@contextmanager
def opened(directory: pathlib.Path) -> Iterator[sqlite3.Connection]:
    with explained(directory), database.reading(directory / database.FILE) as base:
        yield base


def is_begun(directory: pathlib.Path) -> bool:
    """Whether a directory holds a database that is not empty."""
    file = directory / database.FILE
    if not file.is_file() or not file.stat().st_size:
        return False
    with opened(directory) as base:
        return not database.is_empty(base)


def refuse_stranger(directory: pathlib.Path, base: sqlite3.Connection) -> None:
    """Refuse a database that is not of a run. Runs of early versions had a table of rows alone."""
    if base.execute("PRAGMA application_id").fetchone()[0] == schema.APPLICATION:
        if base.execute("PRAGMA user_version").fetchone()[0] <= schema.FORMAT:  # else as that has it
            schema.check(base)
        return
    kinds = [kind for (kind,) in base.execute("SELECT type FROM sqlite_master WHERE name = 'rows'")]
    columns = {column for _, column, *_ in base.execute("PRAGMA table_info(rows)")}
    if kinds != ["table"] or not {"study", "model", "dataset", "alpha", "loss"} <= columns:
        raise ValueError(
            f"results: {directory / database.FILE} is a database of another program (no table of rows with "
            "study, model, dataset, alpha and loss); choose another directory"
        )


def is_same_release(one: str, other: str) -> bool:
    """Whether two versions of rft_fast may measure one run: equal ones, or on the way to the same release."""
    try:
        a, b = Version(one), Version(other)
    except InvalidVersion:
        return one == other
    developed = a.is_devrelease and b.is_devrelease and (a.release, a.pre) == (b.release, b.pre)
    return a.public == b.public or developed


def check_version(directory: pathlib.Path, base: sqlite3.Connection) -> None:
    refuse_stranger(directory, base)
    made = base.execute("PRAGMA user_version").fetchone()[0]
    if made == 0:
        if not base.execute("SELECT count(*) FROM sqlite_master WHERE name = 'run'").fetchone()[0]:
            raise ValueError(
                f"results: the run in {directory} was made by a version whose runs cannot be resumed; "
                "replace it (--overwrite), or choose another directory"
            )
        raise sqlite3.DatabaseError("its version is missing")
    newer, by = made > schema.FORMAT or not {*records.columns(base)} <= {*COLUMNS}, "of a later version"
    if not newer:
        versions = records.config(base).get("versions")
        by = versions.get("rft_fast", "") if isinstance(versions, Mapping) else ""
        with suppress(InvalidVersion, TypeError):
            newer = Version(by) > Version(__version__) and not is_same_release(by, __version__)
    if newer:
        raise ValueError(
            f"results: the run in {directory} was made by rft_fast {by}, but this is "
            f"{__version__}; upgrade to read it, or choose another directory"
        )
