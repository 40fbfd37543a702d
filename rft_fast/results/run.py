"""A run's directory: begun, gone on with, or refused; read, also while it is written to."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from itertools import islice
from types import TracebackType
from typing import IO, Any

import pandas as pd
from packaging.version import InvalidVersion, Version

from .. import __version__
from ..common import disk, words
from ..evaluate import Scores
from ..studies.rows import COLUMNS, STUDIES, Row
from . import database, salvage

TABLE, CONFIG, FIGURES, LOG, LOCK = "rows.csv", "config.json", "figures", "run.log", database.LOCK
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

    return words.differences(_plain(there), _plain(now), aside)


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
    _refuse_links(directory)
    _refuse_in_use(directory)
    if not _is_begun(directory):
        # A kill while a run begins, or replaces one, leaves an empty database, and that folder.
        ours = [directory / FIGURES] if (directory / database.FILE).exists() else []
        written = dict.fromkeys([*_replaced(directory), *(directory / name for name in (FIGURES, LOG))])
        if names := [f.relative_to(directory) for f in written if f not in ours and f.exists()]:
            raise ValueError(
                f"results: {directory} holds {', '.join(map(str, names))} but no {database.FILE} with a run, "
                "so they are not from one; choose another directory"
            )
        return
    if overwrite:
        with _reading(directory) as base:
            _refuse_stranger(directory, base)
        return
    there = recorded(directory)
    if there is not None and config is not None:
        asked = {name: there[name] for name in config if name in there}
        if unlike := differences(asked, config):
            raise ValueError(_other(directory, unlike))


def recorded(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The configuration of the run in a directory; None where there is none.

    Raises ValueError for a run of a newer version, and for one that is damaged.
    """
    directory = pathlib.Path(directory)
    if not _is_begun(directory):
        return None
    with _reading(directory) as base:
        _check_version(directory, base)
        return database.config(base)


def load(directory: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows of a run, also of one that is still running or was interrupted.

    Returns:
        The columns and types of :data:`COLUMNS`, by study, by model in the order of the request, and by the
        place of each measurement in its study: whoever measured them when.

    Raises:
        FileNotFoundError: the directory holds no ``rows.sqlite``.
        ValueError: that is not a run's database, of a newer version, or damaged.
    """
    directory = pathlib.Path(directory)
    if not (directory / database.FILE).is_file():
        raise FileNotFoundError(f"results: expected a run's directory, got no {directory / database.FILE}")
    return frame(_stored(directory))


def write_csv(directory: str | os.PathLike[str], file: pathlib.Path) -> None:
    """Writes the rows that :func:`load` reads as ``rows.csv`` has them. Raises as that does."""
    with disk.replacing(file) as temporary:
        _write_csv(temporary, _stored(pathlib.Path(directory)))


def write_parquet(directory: str | os.PathLike[str], file: pathlib.Path) -> None:
    """Writes the rows that :func:`load` reads as Parquet, with their types; a measured NaN stays one.

    Raises ModuleNotFoundError without pyarrow, else as :func:`load` does.
    """
    import pyarrow  # only some have it
    import pyarrow.parquet

    # pandas would write NaN as missing: it takes only the types from there.
    schema = pyarrow.Schema.from_pandas(frame(()), preserve_index=False)
    with disk.replacing(file) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for some in _batches(_stored(pathlib.Path(directory)), 50_000):
            rows = [database.values(row) for row in some]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _stored(directory: pathlib.Path) -> Iterator[tuple[Any, ...]]:
    """The rows of the run in a directory, if there is one."""
    try:
        if not _is_begun(directory):
            return
        with _reading(directory) as base:
            _check_version(directory, base)
            database.check_pages(base)
            yield from database.rows(base, _models(database.config(base)))
    except Damaged as error:
        remedy = f"python -m rft_fast.results {shlex.quote(str(directory))} --recover"
        raise Damaged(f"{error}; to save what can still be read: {remedy}") from error


def recover(directory: str | os.PathLike[str]) -> str:
    """Saves what can be read of a damaged ``rows.sqlite`` to ``rows.recovered.sqlite``, or a name like it.

    Returns what was saved, in words. The damaged file is left as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a process is writing to it.
        OSError: the disk refuses the new one.
    """
    file = pathlib.Path(directory) / database.FILE
    if not file.is_file():
        raise FileNotFoundError(f"results: expected a run's directory, got no {file}")
    _refuse_in_use(pathlib.Path(directory))
    with _explained(pathlib.Path(directory)):
        return salvage.save(file)


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
        asked = _plain(config)
        try:
            check(self.directory, overwrite)
            self.directory.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._lock = _lock(self.directory)
                stack.callback(_unlock, self._lock)
                _refuse_links(self.directory)
                self._open(asked, overwrite, stack)
                self._close = stack.pop_all()
        except Damaged as error:
            raise ValueError(f"{error}; {recover(self.directory)}") from error

    def _open(self, asked: dict[str, Any], overwrite: bool, stack: ExitStack) -> None:
        if overwrite and _is_begun(self.directory):
            self._remove_earlier()
        if not _is_begun(self.directory):
            with _explained(self.directory):
                database.create(self._file, asked)
            disk.sync_folder(self.directory)
        elif database.has_stray_log(self._file):
            database.beside(self._file, database.LOG).unlink()
        with _reading(self.directory) as base:
            _check_version(self.directory, base)
            database.verify(base)
            self.config = database.config(base)
        if unlike := differences(self.config, asked):
            raise ValueError(_other(self.directory, unlike))
        with _explained(self.directory):
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
        with self._told():
            return {number for (number,) in self._database.execute(query, (study, model))}

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
        self._check_place()
        try:
            with self._told():
                database.add(self._database, study, model, number, rows)
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
        self._check_place()
        numbers = self._added.pop((study, model), [])
        with self._told():
            database.remove(self._database, study, model, numbers, self._put)
        self._put.clear()
        return len(numbers)

    def measurement(self, study: str, model: str, number: int) -> list[Row]:
        """The rows of a measurement, as they were added. Raises ValueError where it is not there."""
        query = "SELECT id FROM measurements WHERE study = ? AND model = ? AND number = ?"
        with self._told():
            found = self._database.execute(query, (study, model, number)).fetchone()
            if found is None:
                raise ValueError(f"results: there is no measurement {number} of {study} of {model!r}")
            return [database.values(row) for row in database.rows_of(self._database, found[0])]

    def rows(self) -> pd.DataFrame:
        """All rows so far, as :func:`load` gives them."""
        with self._told():
            return frame(database.rows(self._database, _models(self.config)))

    def scores(self, of: str) -> MutableMapping[tuple[str, float], Scores]:
        """(data set, alpha) -> scores that several measurements need, kept in the database; setting commits.

        of: what they are of.
        """
        return _Scores(self, of)

    # --- files ----------------------------------------------------------------------------------------

    def figure(self, study: str) -> pathlib.Path:
        """Where the picture of a study belongs."""
        return _figure(self.directory, study)

    def table(self, study: str) -> pathlib.Path:
        """Where a table that is made of the rows belongs."""
        return _table(self.directory, study)

    def close(self) -> None:
        """Writes ``rows.csv``, closes the database and lets go of the lock. Once; later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        with self._told(), self._close:
            self._check_place()
            with disk.replacing(self.directory / TABLE) as temporary:
                _write_csv(temporary, database.rows(self._database, _models(self.config)))
            database.stop_writing(self._database)

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
    def _told(self) -> Iterator[None]:
        """What SQLite says of the disk, as OSError."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise OSError(
                f"results: cannot use {self._file} any more: {error}; what was measured before is kept"
            ) from error

    def _remove_earlier(self) -> None:
        """The database last, all of it at once, and not its name: a kill meanwhile leaves no part of a run,
        nor files that seem to be of nobody."""
        for file in [*_replaced(self.directory), *map(self.directory.joinpath, (LOG, *REPORTS))]:
            file.unlink(missing_ok=True)
        disk.replace(self._file, b"")
        for end in database.BESIDE:  # of an empty database, SQLite removes them, too
            database.beside(self._file, end).unlink(missing_ok=True)


class _Scores(MutableMapping[tuple[str, float], Scores]):
    """Scores in the database of a run."""

    def __init__(self, run: Run, of: str) -> None:
        self._run, self._of = run, of

    def __getitem__(self, key: tuple[str, float]) -> Scores:
        with self._run._told():
            found = database.get_scores(self._run._database, self._of, key)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(self, key: tuple[str, float], scores: Scores) -> None:
        self._run._check_place()
        with self._run._told():
            database.put_scores(self._run._database, self._of, key, scores)
        self._run._put.add((self._of, *key))

    def __delitem__(self, key: tuple[str, float]) -> None:
        raise TypeError("results: scores of a run are kept")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        query = 'SELECT dataset, alpha FROM scores WHERE "of" = ? ORDER BY rowid'
        with self._run._told():
            found = self._run._database.execute(query, (self._of,)).fetchall()
        yield from found

    def __len__(self) -> int:
        query = 'SELECT count(*) FROM scores WHERE "of" = ?'
        with self._run._told():
            return int(self._run._database.execute(query, (self._of,)).fetchone()[0])


def frame(rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Stored rows, with the columns and types of :data:`COLUMNS`."""
    columns: list[list[Any]] = [[] for _ in COLUMNS]
    for some in _batches(rows):
        for column, values in zip(columns, zip(*some, strict=True), strict=True):
            column.extend(values)
    return pd.DataFrame(
        {
            name: pd.Series(column, dtype="Int64" if kind == "boolean" else kind).astype(kind)
            for (name, kind), column in zip(COLUMNS.items(), columns, strict=True)
        }
    )


def _batches(rows: Iterable[Sequence[Any]], size: int = 1000) -> Iterator[list[Sequence[Any]]]:
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some


def _write_csv(file: pathlib.Path, rows: Iterable[Sequence[Any]]) -> None:
    """Stored rows as CSV: a missing value is empty, a NaN is ``nan``. No text is a formula."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(map(words.cell, database.values(row).values()) for row in rows)


def _models(config: Mapping[str, Any]) -> list[str]:
    found = config.get("finetuned")
    return list(found) if isinstance(found, Mapping) else []


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found


# --- what is refused ------------------------------------------------------------------------------------


def _figure(directory: pathlib.Path, study: str) -> pathlib.Path:
    return directory / FIGURES / f"{study}.png"


def _table(directory: pathlib.Path, study: str) -> pathlib.Path:
    return directory / f"{study}.csv"


def _replaced(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files of a run that new ones replace."""
    named = [make(directory, name) for name in (*STUDIES, "cost") for make in (_figure, _table)]
    return [*named, directory / TABLE, directory / CONFIG]


def _refuse_links(directory: pathlib.Path) -> None:
    """Refuses a directory in which a name that a run writes is a link, or no plain file."""
    base = directory / database.FILE
    in_place = [base, *(database.beside(base, end) for end in database.BESIDE)]
    in_place += [directory / LOCK, directory / LOG]
    try:
        disk.refuse_others(_replaced(directory), in_place, [directory / FIGURES])
    except ValueError as error:
        raise ValueError(f"results: {error}") from None


class Damaged(ValueError):
    """A run's database that cannot be read."""


def _other(directory: pathlib.Path, unlike: Sequence[str]) -> str:
    return (
        f"results: the run in {directory} was asked for something else ({'; '.join(unlike)}); ask for the "
        "same to go on with it, choose another directory, or replace it (--overwrite, overwrite=True)"
    )


# What SQLite says where not the file is to blame, but the place where it lies, or who has it open.
_PLACE = ("unable to open", "locked", "readonly", "disk I/O", "is full", "permission", "locking protocol")


@contextmanager
def _explained(directory: pathlib.Path) -> Iterator[None]:
    """What SQLite cannot read, as Damaged; what the disk refuses, as OSError."""
    try:
        yield
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.OperationalError) and any(words in str(error) for words in _PLACE):
            raise OSError(f"results: {directory} cannot be used: {error}") from error
        raise Damaged(
            f"results: {directory / database.FILE} is not a readable table of rows: {error}"
        ) from error


@contextmanager
def _reading(directory: pathlib.Path) -> Iterator[sqlite3.Connection]:
    with _explained(directory), database.reading(directory / database.FILE) as base:
        yield base


def _is_begun(directory: pathlib.Path) -> bool:
    """Whether there is a database with anything in it."""
    file = directory / database.FILE
    if not file.is_file() or not file.stat().st_size:
        return False
    with _reading(directory) as base:
        return not database.is_empty(base)


def _refuse_stranger(directory: pathlib.Path, base: sqlite3.Connection) -> None:
    """Refuses a database that is not of a run; earlier versions kept rows alone."""
    if base.execute("PRAGMA application_id").fetchone()[0] == database.APPLICATION:
        if base.execute("PRAGMA user_version").fetchone()[0] <= database.FORMAT:  # else as that has it
            database.check_schema(base)
        return
    kinds = [kind for (kind,) in base.execute("SELECT type FROM sqlite_master WHERE name = 'rows'")]
    columns = {column for _, column, *_ in base.execute("PRAGMA table_info(rows)")}
    if kinds != ["table"] or not {"study", "model", "dataset", "alpha", "loss"} <= columns:
        raise ValueError(
            f"results: {directory / database.FILE} is a database of another program (no table of rows with "
            "study, model, dataset, alpha and loss); choose another directory"
        )


def _check_version(directory: pathlib.Path, base: sqlite3.Connection) -> None:
    _refuse_stranger(directory, base)
    made = base.execute("PRAGMA user_version").fetchone()[0]
    if made == 0:
        if not base.execute("SELECT count(*) FROM sqlite_master WHERE name = 'run'").fetchone()[0]:
            raise ValueError(
                f"results: the run in {directory} is of a version that could not go on with runs; replace it "
                "(--overwrite), or choose another directory"
            )
        raise sqlite3.DatabaseError("it does not say its version")
    newer, by = made > database.FORMAT, "of a later version"
    if not newer:
        versions = database.config(base).get("versions")
        by = versions.get("rft_fast", "") if isinstance(versions, Mapping) else ""
        with suppress(InvalidVersion, TypeError):
            newer = Version(by) > Version(__version__)
    if newer:
        raise ValueError(
            f"results: the run in {directory} was made by rft_fast {by}, this is {__version__}; upgrade to "
            "read it, or choose another directory"
        )


# --- one process at a time --------------------------------------------------------------------------------


def _lock(directory: pathlib.Path) -> IO[str]:
    """Holds the lock until it is closed, or the process ends, however it does."""
    handle = disk.open_plain(directory / LOCK, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    stream = os.fdopen(handle, "a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            stream.close()
            raise ValueError(_in_use(directory)) from None
        # A file system without locks: SQLite's own, and one place for each measurement, have to do.
    stream.seek(0)
    stream.truncate()
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    stream.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    stream.flush()
    return stream


def _unlock(stream: IO[str]) -> None:
    with suppress(OSError):
        stream.truncate(0)
    stream.close()


def _refuse_in_use(directory: pathlib.Path) -> None:
    file = directory / LOCK
    if not file.is_file():
        return
    with os.fdopen(disk.open_plain(file, os.O_RDWR), "r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise ValueError(_in_use(directory)) from None


def _in_use(directory: pathlib.Path) -> str:
    by = (directory / LOCK).read_text(encoding="utf-8").strip() or "another process"
    return (
        f"results: {directory} is being written to by {by}; wait for it or stop it, or choose another "
        "directory (for several GPUs on one run, see --workers)"
    )
