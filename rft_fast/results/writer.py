"""A run's directory, open for measurements: begun, resumed, or refused."""

from __future__ import annotations

import json
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from types import TracebackType
from typing import Any

import pandas as pd

from ..common import disk
from ..evaluate import Scores
from ..studies.rows import Row
from . import database, export, lock, records, schema
from .directory import (
    CONFIG,
    FIGURES,
    LOG,
    REPORTS,
    TABLE,
    check,
    differences,
    figure_file,
    mismatch,
    plain,
    refuse_links,
    replaced,
    table_file,
)
from .errors import Damaged
from .loading import check_version, explained, frame, is_begun, opened, order
from .salvage import recover

_Access = Callable[[], AbstractContextManager[sqlite3.Connection]]


class Run:
    """A run's directory, open for measurements; use it in a ``with`` statement.

    Where a run with the same configuration is, it goes on: ``resumed`` tells how many measurements it has. It
    holds a lock, so that no other process writes. On exit, also through an exception, the rows so far are
    written to ``rows.csv``.

    Args:
        directory: created with its parents when missing.
        config: the complete request, as JSON values; written to ``config.json``. ``config["finetuned"]``, if
            there is such a table, tells the order of the models.
        overwrite: replace a run that is there; its files are removed, and only those.

    Raises:
        ValueError, PermissionError: as :func:`check`, which also serves to find out early. Of a damaged
            database, what can be read is saved to a new file, ``rows.recovered.sqlite``, which the
            message names.
        OSError: the disk fails.
    """

    config: dict[str, Any]
    resumed: int

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> None:
        self.directory = pathlib.Path(directory)
        self._file = self.directory / database.FILE
        self._closed = False
        self._added: dict[tuple[str, str], list[int]] = {}  # (study, model) -> numbers, by this process
        self._put: set[tuple[str, str, float]] = set()  # of which scores, likewise
        asked = plain(config)
        try:
            check(self.directory, overwrite)
            self.directory.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._lock = lock.hold(self.directory)
                stack.callback(lock.release, self._lock)
                refuse_links(self.directory, asked)
                self._open(asked, overwrite, stack)
                self._close = stack.pop_all()
        except Damaged as error:
            raise Damaged(f"{error}; {recover(self.directory)}") from error

    def _open(self, asked: dict[str, Any], overwrite: bool, stack: ExitStack) -> None:
        if overwrite and is_begun(self.directory):
            self._remove_earlier(asked)
        if not is_begun(self.directory):
            with explained(self.directory):
                schema.create(self._file, asked)
            disk.sync_folder(self.directory)
        elif database.has_stray_log(self._file):
            database.beside(self._file, database.LOG).unlink()
        with opened(self.directory) as base:
            check_version(self.directory, base)
            records.verify(base)
            self.config = records.config(base)
        if unlike := differences(self.config, asked):
            raise mismatch(self.directory, unlike)
        with explained(self.directory):
            self._database = stack.enter_context(closing(database.connect(self._file)))
            database.start_writing(self._database, self._file)
            (self.resumed,) = self._database.execute("SELECT count(*) FROM measurements").fetchone()
        (self.directory / FIGURES).mkdir(exist_ok=True)
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        disk.replace(self.directory / CONFIG, text.encode())
        files = [self._file, database.beside(self._file, database.LOG)]
        self._places = {file: file.stat().st_ino for file in files if file.exists()}

    # --- measurements ---------------------------------------------------------------------------------

    def done(self, study: str, model: str) -> set[int]:
        """Numbers of the measurements that are there."""
        query = "SELECT number FROM measurements WHERE study = ? AND model = ?"
        with self._reading() as base:
            return {number for (number,) in base.execute(query, (study, model))}

    def add(self, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes the rows of one measurement to the disk; on return all of it is there to stay.

        Raises:
            ValueError: a name that is no column, rows of another study or model, a measurement that is
                there already.
            OSError: the disk refuses it (full, gone); the measurements before it are kept.
        """
        if others := [row for row in rows if (row.get("study"), row.get("model")) != (study, model)]:
            raise ValueError(
                f"results: expected rows of {study} of {model!r}, got one of {others[0].get('study')} of "
                f"{others[0].get('model')!r}"
            )
        try:
            with self._writing() as base:
                records.add(base, study, model, number, rows)
        except sqlite3.IntegrityError as error:
            raise ValueError(
                f"results: measurement {number} of {study} of {model!r} is there already"
            ) from error
        self._added.setdefault((study, model), []).append(int(number))

    def withdraw(self, study: str, model: str) -> int:
        """Removes what this process has measured in a study of a model, and every set of shared scores.

        For what turns out to be of other weights than the configuration says. What earlier processes
        measured stays, and so does everything else.

        Returns:
            How many measurements that were.

        Raises:
            OSError: the disk refuses it.
        """
        with self._writing() as base:
            numbers = self._added.pop((study, model), [])
            records.remove(base, study, model, numbers, self._put)
        self._put.clear()
        return len(numbers)

    def measurement(self, study: str, model: str, number: int) -> list[Row]:
        """The rows of a measurement, as they were added. Raises ValueError where it is not there."""
        query = "SELECT id FROM measurements WHERE study = ? AND model = ? AND number = ?"
        with self._reading() as base:
            found = base.execute(query, (study, model, number)).fetchone()
            if found is None:
                raise ValueError(f"results: there is no measurement {number} of {study} of {model!r}")
            return [records.values(row) for row in records.rows_of(base, found[0])]

    def rows(self) -> pd.DataFrame:
        """All rows so far, as :func:`load` gives them."""
        with self._reading() as base:
            return frame(records.rows(base, *order(self.config)))

    def scores(self, of: str) -> MutableMapping[tuple[str, float], Scores]:
        """(data set, alpha) -> scores that several measurements need, kept in the database; setting commits.

        of: what they are of.
        """
        return _Scores(of, self._reading, self._writing, self._put)

    # --- files ----------------------------------------------------------------------------------------

    def figure(self, study: str) -> pathlib.Path:
        """Where the picture of a study belongs."""
        return figure_file(self.directory, study)

    def table(self, study: str) -> pathlib.Path:
        """Where a table that is made of the rows belongs."""
        return table_file(self.directory, study)

    def close(self) -> None:
        """Writes ``rows.csv``, closes the database and lets go of the lock. Once; later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        with self._reading() as base, self._close:
            self._check_place()
            with disk.replacing(self.directory / TABLE) as temporary:
                export.write_rows(temporary, records.rows(base, *order(self.config)))
            database.stop_writing(base)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else that is what people are told: the disk may be gone, or full
                raise

    def _check_place(self) -> None:
        """SQLite would go on writing into a file that nobody can find any more."""
        with suppress(OSError):
            if all(file.stat().st_ino == place for file, place in self._places.items()):
                return
        raise OSError(f"results: {self._file} was moved, removed or replaced while the run was writing to it")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The database; what SQLite says of the disk, as OSError."""
        try:
            yield self._database
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise OSError(
                f"results: cannot use {self._file} any more: {error}; what was measured before is kept"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """As ``_reading``, in the place where the run began."""
        self._check_place()
        with self._reading() as base:
            yield base

    def _remove_earlier(self, config: Mapping[str, Any]) -> None:
        """The database last, all of it at once, and not its name: a kill meanwhile leaves no part of a run,
        nor files that seem to be of nobody."""
        for file in [*replaced(self.directory, config), *map(self.directory.joinpath, (LOG, *REPORTS))]:
            file.unlink(missing_ok=True)
        disk.replace(self._file, b"")
        for end in database.BESIDE:  # of an empty database, SQLite removes them, too
            database.beside(self._file, end).unlink(missing_ok=True)


class _Scores(MutableMapping[tuple[str, float], Scores]):
    """Scores of one model in a run's database."""

    def __init__(self, of: str, reading: _Access, writing: _Access, put: set[tuple[str, str, float]]) -> None:
        """reading, writing: give access to the database. put: gets the key of everything that is set."""
        self._of, self._reading, self._writing, self._put = of, reading, writing, put

    def __getitem__(self, key: tuple[str, float]) -> Scores:
        with self._reading() as base:
            found = records.get_scores(base, self._of, key)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(self, key: tuple[str, float], scores: Scores) -> None:
        with self._writing() as base:
            records.put_scores(base, self._of, key, scores)
        self._put.add((self._of, *key))

    def __delitem__(self, key: tuple[str, float]) -> None:
        raise TypeError("results: scores of a run are kept")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        query = 'SELECT dataset, alpha FROM scores WHERE "of" = ? ORDER BY rowid'
        with self._reading() as base:
            found = base.execute(query, (self._of,)).fetchall()
        yield from found

    def __len__(self) -> int:
        query = 'SELECT count(*) FROM scores WHERE "of" = ?'
        with self._reading() as base:
            return int(base.execute(query, (self._of,)).fetchone()[0])
