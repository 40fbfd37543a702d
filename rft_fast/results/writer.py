"""A run's directory open for writing: a run is created, resumed, or refused."""

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
from ..config.recorded import upgraded
from ..evaluate import Scores
from ..studies.images import ImageScores
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

    A run with the same configuration is resumed. A lock keeps other processes from writing. On exit, also
    through an exception, the rows so far are written to ``rows.csv``.

    Args:
        directory: Created with its parents if missing.
        config: The configuration, as JSON values; written to ``config.json``. The keys of a table
            ``config["finetuned"]`` give the order of the models.
        overwrite: Replace an existing run; only its own files are removed.

    Attributes:
        directory: The directory.
        config: The configuration of the run.
        resumed: Number of measurements that it had before.

    Raises:
        InUse, Mismatch, ValueError, PermissionError: As :func:`check`, which finds them out early.
        Damaged: The database cannot be read; what can be saved is in a new file, ``rows.recovered.sqlite``,
            which the message names.
        OSError: The disk fails.
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
        self._added: dict[
            tuple[str, str], list[int]
        ] = {}  # (study, model) -> numbers that this process added
        self._put: set[tuple[str, str, float]] = set()  # keys of scores that this process stored
        requested = upgraded(plain(config))
        try:
            check(self.directory, overwrite)
            self.directory.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._lock = lock.hold(self.directory)
                stack.callback(lock.release, self._lock)
                refuse_links(self.directory, requested)
                self._open(requested, overwrite, stack)
                self._close = stack.pop_all()
        except Damaged as error:
            raise Damaged(f"{error}; {recover(self.directory)}") from error

    def _open(self, requested: dict[str, Any], overwrite: bool, stack: ExitStack) -> None:
        if overwrite and is_begun(self.directory):
            self._remove_earlier(requested)
        if not is_begun(self.directory):
            with explained(self.directory):
                schema.create(self._file, requested)
            disk.sync_folder(self.directory)
        elif database.has_stray_log(self._file):
            database.beside(self._file, database.LOG).unlink()
        with opened(self.directory) as base:
            check_version(self.directory, base)
            records.verify(base)
            self.config = upgraded(records.config(base))
        if unlike := differences(self.config, requested):
            raise mismatch(self.directory, unlike, self.config)
        with explained(self.directory):
            self._database = stack.enter_context(closing(database.connect(self._file)))
            database.start_writing(self._database, self._file)
            schema.upgrade(self._database)
            (self.resumed,) = self._database.execute("SELECT count(*) FROM measurements").fetchone()
        (self.directory / FIGURES).mkdir(exist_ok=True)
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        disk.replace(self.directory / CONFIG, text.encode())
        files = [self._file, database.beside(self._file, database.LOG)]
        self._places = {file: file.stat().st_ino for file in files if file.exists()}

    # --- measurements ---------------------------------------------------------------------------------

    def done(self, study: str, model: str) -> set[int]:
        """Return the numbers of the measurements that exist."""
        query = "SELECT number FROM measurements WHERE study = ? AND model = ?"
        with self._reading() as base:
            return {number for (number,) in base.execute(query, (study, model))}

    def add(
        self,
        study: str,
        model: str,
        number: int,
        rows: Sequence[Mapping[str, object]],
        images: Sequence[ImageScores] = (),
    ) -> None:
        """Write the rows of one measurement and the results of their images; on return they are on disk.

        Args:
            study, model: What was measured.
            number: The measurement's number in its study.
            rows: Its rows: column -> value.
            images: The results of the images of each row; empty: not kept.

        Raises:
            ValueError: A name is not a column, a row is of another study or model, there are image results of
                some rows only, or the measurement exists.
            OSError: The disk refuses it (full, gone); earlier measurements are kept.
        """
        if others := [row for row in rows if (row.get("study"), row.get("model")) != (study, model)]:
            raise ValueError(
                f"results: expected rows of {study} of {model!r}, got one of {others[0].get('study')} of "
                f"{others[0].get('model')!r}"
            )
        if images and len(images) != len(rows):
            raise ValueError(
                f"results: expected image results of each of the {len(rows)} rows of {study} of {model!r}, "
                f"or of none; got {len(images)}"
            )
        try:
            with self._writing() as base:
                records.add(base, study, model, number, rows, images)
        except sqlite3.IntegrityError as error:
            raise ValueError(
                f"results: measurement {number} of {study} of {model!r} already exists"
            ) from error
        self._added.setdefault((study, model), []).append(int(number))

    def withdraw(self, study: str, model: str) -> int:
        """Remove what this process measured in a study of a model, and all shared scores it stored.

        For measurements that turn out to be of other weights than the configuration names. What earlier
        processes measured is kept, like everything else.

        Returns:
            The number of measurements removed.

        Raises:
            OSError: The disk refuses it.
        """
        with self._writing() as base:
            numbers = self._added.pop((study, model), [])
            records.remove(base, study, model, numbers, self._put)
        self._put.clear()
        return len(numbers)

    def measurement(self, study: str, model: str, number: int) -> list[Row]:
        """Return the rows of a measurement as they were added.

        Raises:
            ValueError: It does not exist.
        """
        with self._reading() as base:
            identity = self._identity(base, study, model, number)
            return [records.values(row) for row in records.rows_of(base, identity)]

    def images(self, study: str, model: str, number: int) -> list[ImageScores]:
        """Return the image results of the rows of a measurement, in their order; empty: not kept.

        Raises:
            ValueError: It does not exist.
        """
        with self._reading() as base:
            return records.images_of(base, self._identity(base, study, model, number))

    def _identity(self, base: sqlite3.Connection, study: str, model: str, number: int) -> int:
        query = "SELECT id FROM measurements WHERE study = ? AND model = ? AND number = ?"
        found = base.execute(query, (study, model, number)).fetchone()
        if found is None:
            raise ValueError(f"results: measurement {number} of {study} of {model!r} does not exist")
        return int(found[0])

    def rows(self) -> pd.DataFrame:
        """Return all rows so far, as :func:`load` does."""
        with self._reading() as base:
            return frame(records.rows(base, *order(self.config)))

    def scores(self, of: str) -> MutableMapping[tuple[str, float], Scores]:
        """Return a mapping (data set, alpha) -> scores, kept in the database; setting an entry commits it.

        Args:
            of: What the scores are of.
        """
        return _Scores(of, self._reading, self._writing, self._put)

    # --- files ----------------------------------------------------------------------------------------

    def figure(self, study: str) -> pathlib.Path:
        """The file of a study's figure."""
        return figure_file(self.directory, study)

    def table(self, study: str) -> pathlib.Path:
        """The file of a table that is computed from the rows."""
        return table_file(self.directory, study)

    def close(self) -> None:
        """Write ``rows.csv``, close the database and release the lock. Later calls do nothing."""
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
            if error is None:  # otherwise report that one: the disk may be gone or full
                raise

    def _check_place(self) -> None:
        """Raise OSError where the database was moved: SQLite would keep writing to a file nobody can find."""
        with suppress(OSError):
            if all(file.stat().st_ino == place for file, place in self._places.items()):
                return
        raise OSError(f"results: {self._file} was moved, removed or replaced during the run")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yield the database; SQLite's errors become OSError."""
        try:
            yield self._database
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise OSError(
                f"results: {self._file} can no longer be used: {error}; earlier measurements are kept"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Yield the database after checking that it is still in its place."""
        self._check_place()
        with self._reading() as base:
            yield base

    def _remove_earlier(self, config: Mapping[str, Any]) -> None:
        """Remove the files of an earlier run.

        The database comes last, and only its content is removed, at once: a kill meanwhile leaves no part of
        a run, nor files that seem to belong to none.
        """
        for file in [*replaced(self.directory, config), *map(self.directory.joinpath, (LOG, *REPORTS))]:
            file.unlink(missing_ok=True)
        disk.replace(self._file, b"")
        for end in database.BESIDE:  # SQLite, too, removes those of an empty database
            database.beside(self._file, end).unlink(missing_ok=True)


class _Scores(MutableMapping[tuple[str, float], Scores]):
    """Scores of one model in a run's database."""

    def __init__(self, of: str, reading: _Access, writing: _Access, put: set[tuple[str, str, float]]) -> None:
        """reading, writing: give access to the database. put: receives the key of everything that is set."""
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
        raise TypeError("results: scores of a run cannot be deleted")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        query = 'SELECT dataset, alpha FROM scores WHERE "of" = ? ORDER BY rowid'
        with self._reading() as base:
            found = base.execute(query, (self._of,)).fetchall()
        yield from found

    def __len__(self) -> int:
        query = 'SELECT count(*) FROM scores WHERE "of" = ?'
        with self._reading() as base:
            return int(base.execute(query, (self._of,)).fetchone()[0])
