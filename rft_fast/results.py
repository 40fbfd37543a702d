"""One table of rows on disk: the directory that a run leaves behind.

===================  ===============================================================
``rows.sqlite``      every row, committed as it was measured
``rows.csv``         the same rows, written when the run ends or is interrupted
``correlation.csv``  the table of that study, which is made of the rows
``cost.csv``         what each study took: time, peak memory in bytes
``config.json``      the complete request: arguments, versions, content hashes, date
``figures/``         one picture per study, ``<study>.png``
``report.html``      the page that :mod:`rft_fast.report` makes of all this
===================  ===============================================================
"""

from __future__ import annotations

import csv
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType

import pandas as pd

from .studies.rows import COLUMNS, STUDIES, complete, frame

__all__ = ["COLUMNS", "Run", "check", "load"]

_DATABASE, _TABLE, _CONFIG, _FIGURES = "rows.sqlite", "rows.csv", "config.json", "figures"
_REPORTS = ("report.html", "comparison.html")  # as rft_fast.report names them, made of the rows
_SQL = {"string": "TEXT", "float64": "REAL", "Int64": "INTEGER", "boolean": "INTEGER"}
_PYTHON = {"string": str, "float64": float, "Int64": int, "boolean": bool}


def check(directory: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuses a directory that a run must not or cannot write into; changes nothing.

    Raises:
        ValueError: it is no directory, holds rows and ``overwrite`` is false, or holds files under
            our names that are not ours.
        PermissionError: it cannot be written to.
    """
    directory = Path(directory)
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
    if (directory / _DATABASE).exists():
        count = len(load(directory))
        if count and not overwrite:
            raise ValueError(
                f"results: {directory} already holds {count} rows of another run; "
                "choose another directory, or replace them (--overwrite, overwrite=True)"
            )
        return
    strangers = [name for name in (_TABLE, _CONFIG, _FIGURES) if (directory / name).exists()]
    if strangers:
        raise ValueError(
            f"results: {directory} holds {', '.join(strangers)} but no {_DATABASE}, so they are "
            "not from a run; choose another directory"
        )


def load(directory: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows of a run, also of one that is still running or was interrupted.

    Returns:
        The columns and types of :data:`COLUMNS`, in the order of measurement.

    Raises:
        FileNotFoundError: the directory holds no ``rows.sqlite``.
        ValueError: ``rows.sqlite`` is not a table of rows.
    """
    file = Path(directory) / _DATABASE
    if not file.is_file():
        raise FileNotFoundError(f"results: expected a run's directory, got no {file}")
    try:
        with closing(sqlite3.connect(file)) as database:
            return frame(_rows(database))
    except sqlite3.Error as error:
        raise ValueError(f"results: {file} is not a readable table of rows: {error}") from error


class Run:
    """A run's directory, open for adding rows; use it in a ``with`` statement.

    Entering a directory with an earlier run's rows (``overwrite=True``) removes that run's files
    and only those. On exit, also through an exception, the rows so far are written to ``rows.csv``.

    Args:
        directory: created with its parents when missing.
        config: the complete request, as JSON values; written to ``config.json``.
        overwrite: replace the rows of an earlier run.

    Raises:
        ValueError, PermissionError: as :func:`check`, which also serves to find out early.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> None:
        self.directory = Path(directory)
        request = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        check(self.directory, overwrite)
        if (self.directory / _DATABASE).exists():
            self._remove_earlier()
        (self.directory / _FIGURES).mkdir(parents=True, exist_ok=True)
        # A rollback journal rather than a write-ahead log: between commits there is one complete
        # file, which can be copied and also read on network file systems.
        self._database = sqlite3.connect(self.directory / _DATABASE)
        with self._database:
            columns = ", ".join(f'"{name}" {_SQL[kind]}' for name, kind in COLUMNS.items())
            self._database.execute(f"CREATE TABLE rows ({columns})")
        _replace(self.directory / _CONFIG, request)

    def add(self, row: Mapping[str, object]) -> None:
        """Writes one row to the disk; on return it is there to stay.

        Raises:
            ValueError: a name that is no column.
            OSError: the disk refuses it (full, gone); the rows before it are kept.
        """
        values = [_stored(name, value) for name, value in complete(row).items()]
        try:
            with self._database:
                marks = ", ".join("?" * len(values))
                self._database.execute(f"INSERT INTO rows VALUES ({marks})", values)
        except sqlite3.OperationalError as error:
            raise OSError(f"results: cannot write to {self.directory}: {error}") from error

    def rows(self) -> pd.DataFrame:
        """All rows so far, as :func:`load` gives them."""
        return frame(_rows(self._database))

    def figure(self, study: str) -> Path:
        """Where the picture of a study belongs."""
        return self.directory / _FIGURES / f"{study}.png"

    def table(self, study: str) -> Path:
        """Where a table that is made of the rows belongs."""
        return self.directory / f"{study}.csv"

    def close(self) -> None:
        """Writes ``rows.csv`` and closes the database."""
        temporary = self.directory / (_TABLE + ".part")
        with closing(self._database), temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(COLUMNS)
            table.writerows(row.values() for row in _rows(self._database))
        os.replace(temporary, self.directory / _TABLE)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remove_earlier(self) -> None:
        load(self.directory)  # refuses what is no table of rows
        named = [make(name) for name in (*STUDIES, "cost") for make in (self.figure, self.table)]
        for file in [*named, *map(self.directory.joinpath, (_TABLE, _CONFIG, *_REPORTS))]:
            file.unlink(missing_ok=True)
        (self.directory / _DATABASE).unlink()


def _stored(name: str, value: object) -> object:
    """A value as SQLite keeps it. SQLite turns NaN into NULL, so NaN goes in as text."""
    if value is None:
        return None
    value = _PYTHON[COLUMNS[name]](value)
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def _rows(database: sqlite3.Connection) -> Iterator[dict[str, object]]:
    names = ", ".join(f'"{name}"' for name in COLUMNS)
    for values in database.execute(f"SELECT {names} FROM rows ORDER BY rowid"):
        yield {
            name: value if value is None else _PYTHON[kind](value)
            for (name, kind), value in zip(COLUMNS.items(), values, strict=True)
        }


def _replace(file: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
