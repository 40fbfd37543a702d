"""The database of a run: what the run is, measurements with their rows, and scores that these share."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pathlib
import re
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ..common import disk, files
from ..evaluate import Scores
from ..studies.rows import COLUMNS, STUDIES, Row, complete

FILE = "rows.sqlite"
FORMAT = 1  # PRAGMA user_version
APPLICATION = 0x7266745F  # PRAGMA application_id: "rft_"

LOCK = ".lock"  # beside it, held by the process that writes
LOG, JOURNAL = "-wal", "-journal"  # beside the database: what is not in it yet, or not for good
BESIDE = (LOG, JOURNAL, "-shm")

# Kinds of file systems that begin so are shared between machines, or may be.
_NETWORK = (
    *("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.", "glusterfs", "afs"),
    *("orangefs", "panfs", "wekafs", "virtiofs", "vboxsf"),
)
_KEPT = {"string": (str,), "float64": (float, int), "Int64": (int,), "boolean": (int,)}  # types in SQLite
_SQL = {"string": "TEXT", "float64": "REAL", "Int64": "INTEGER", "boolean": "INTEGER"}
_PYTHON = {"string": str, "float64": float, "Int64": int, "boolean": bool}
NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
INSERT_ROW = f"INSERT INTO rows VALUES (?{', ?' * len(COLUMNS)})"
_SCHEMA = f"""
CREATE TABLE run (config TEXT NOT NULL, begun TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY, study TEXT NOT NULL, model TEXT NOT NULL, number INTEGER NOT NULL,
    finished TEXT NOT NULL, crc INTEGER NOT NULL, UNIQUE (study, model, number));
CREATE TABLE rows (
    measurement INTEGER NOT NULL REFERENCES measurements (id),
    {", ".join(f'"{name}" {_SQL[kind]}' for name, kind in COLUMNS.items())});
CREATE INDEX rows_of_measurements ON rows (measurement);
CREATE TABLE scores (
    "of" TEXT NOT NULL, dataset TEXT NOT NULL, alpha REAL NOT NULL, losses BLOB NOT NULL,
    correct BLOB NOT NULL, crc INTEGER NOT NULL, UNIQUE ("of", dataset, alpha));
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
"""
_LIMIT_LENGTH = 0  # SQLite's number of it
_MOST_OBJECTS = 100
_STATISTICS = (
    "sqlite_sequence",
    *(f"sqlite_stat{number}" for number in range(1, 5)),
)  # as ANALYZE makes them


def _made() -> dict[tuple[str, str], re.Pattern[str]]:
    """(type, name) -> how its SQL is written. Earlier versions had fewer columns in the table of rows."""
    found = {}
    for statement in _SCHEMA.split(";")[:5]:
        sql = " ".join(statement.split())
        _, kind, name, *_ = sql.split()
        pattern = re.escape(sql)
        if name == "rows":
            first = sql[: sql.index(', "')]
            pattern = re.escape(first) + r'(?:, "[a-z_]{1,40}" (?:TEXT|REAL|INTEGER))+\)'
        found[kind.lower(), name] = re.compile(pattern)
    return found


_MADE = _made()


def connect(file: pathlib.Path, how: str = "mode=rw", bounded: bool = False) -> sqlite3.Connection:
    """Opens a database that is there, which may come from somebody else.

    bounded: to read it. Values larger than the file, and work that a file of its size cannot need, are
        errors: pages in a circle have no end.

    Raises ValueError where it, or what SQLite keeps beside it, is no plain file.
    """
    _refuse_others(file)
    address = f"{file.absolute().as_uri()}?{how}"
    database = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
    try:
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA cell_size_check = ON")
        if bounded:
            size = sum(path.stat().st_size for path in (file, beside(file, LOG)) if path.exists())
            if (limit := getattr(database, "setlimit", None)) is not None:  # from Python 3.11 on
                limit(_LIMIT_LENGTH, min(max(size, 1 << 20), 1_000_000_000))
            # Of an honest file a byte takes some two of SQLite's steps.
            steps = iter(range(20 + size // 50_000))
            database.set_progress_handler(lambda: next(steps, None) is None, 1_000_000)
    except BaseException:
        database.close()
        raise
    return database


def _refuse_others(file: pathlib.Path) -> None:
    for path in (file, *(beside(file, end) for end in BESIDE)):
        if kind := files.special(path) or (path != file and path.is_symlink() and "a link"):
            raise ValueError(f"results: {path} is {kind}, expected a file of SQLite")


@contextmanager
def reading(file: pathlib.Path) -> Iterator[sqlite3.Connection]:
    """Opens a database to read it as it is at this moment, also while somebody writes, and where nobody may.

    Nothing is written there, neither to the database nor beside it: what a killed process left is put right
    in a copy. (Of a database that a process writes, readers share SQLite's index of the log.)
    """
    with ExitStack() as stack:
        database = None
        _refuse_others(file)
        if not _is_left(file):
            try:
                database = _snapshot(file, "immutable=1" if has_stray_log(file) else "mode=ro")
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    raise
        if database is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            database = _snapshot(copy(file, pathlib.Path(folder, file.name)), "mode=rw")
        with closing(database):
            yield database


def _is_left(file: pathlib.Path) -> bool:
    """Whether a process that is gone left logs beside a database."""
    if not any(beside(file, end).exists() for end in (LOG, JOURNAL)) or has_stray_log(file):
        return False
    with suppress(FileNotFoundError):
        handle = disk.open_plain(file.with_name(LOCK), os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False  # somebody writes, or may do so
        finally:
            os.close(handle)
    return True


def _snapshot(file: pathlib.Path, how: str) -> sqlite3.Connection:
    database = connect(file, how, bounded=True)
    try:
        database.execute("BEGIN")
        database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def copy(file: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copies a database with what is not in the file yet; returns the target."""
    shutil.copyfile(file, target)
    for end in (JOURNAL,) if has_stray_log(file) else (JOURNAL, LOG):
        with suppress(FileNotFoundError):
            shutil.copyfile(beside(file, end), beside(target, end))
    return target


def beside(file: pathlib.Path, end: str) -> pathlib.Path:
    """The name of a file that SQLite keeps beside a database."""
    return file.with_name(file.name + end)


def has_stray_log(file: pathlib.Path) -> bool:
    """Whether the write-ahead log beside a database belongs to another, which the file was moved over.

    SQLite would write it into this one. A database says itself whether it has a log.
    """
    log = beside(file, LOG)
    if not log.exists():
        return False
    with file.open("rb") as stream:
        head = stream.read(20)
    return head.startswith(b"SQLite format 3") and head[18:20] == b"\x01\x01" and log.exists()


def start_writing(database: sqlite3.Connection, file: pathlib.Path) -> None:
    """From here on, what is said to be written is on the disk.

    By a write-ahead log, which waits for the disk once for each commit rather than four times and lets others
    read meanwhile; but on network file systems, which have no memory that machines share, by a rollback
    journal.
    """
    mode = "DELETE" if on_network(file) else "WAL"
    (mode,) = database.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    database.execute(f"PRAGMA synchronous = {'FULL' if mode == 'wal' else 'EXTRA'}")


def stop_writing(database: sqlite3.Connection) -> None:
    """All is in one file again, which can be copied, unless somebody reads just now."""
    with suppress(sqlite3.OperationalError):
        database.execute("PRAGMA journal_mode = DELETE")


def on_network(file: pathlib.Path, mounts: pathlib.Path = pathlib.Path("/proc/self/mounts")) -> bool:
    """Whether a file lies on a file system that other machines share; where the system does not tell: no."""
    try:
        lines = [line.split() for line in mounts.read_text(errors="replace").splitlines()]
    except OSError:
        return False
    place = file.absolute().resolve()
    # A later mount hides an earlier one. Spaces in names are written as \040.
    kinds = {pathlib.Path(re.sub(r"\\(\d{3})", _character, where)): kind for _, where, kind, *_ in lines}
    held = max((where for where in kinds if where in place.parents), key=lambda p: len(p.parts), default=None)
    return held is not None and kinds[held].startswith(_NETWORK)


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))


def create(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Begins a run: all of it is there afterwards; if this fails or is killed, nothing that counts as one."""
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = EXTRA")  # on the disk, the folder's entry included
        with transaction(database):
            for statement in _SCHEMA.split(";")[:-1]:
                database.execute(statement)
            text = json.dumps(config, indent=2, ensure_ascii=False)
            begun = _now()
            database.execute("INSERT INTO run VALUES (?, ?, ?)", (text, begun, crc(text, begun)))


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of it, or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def check_schema(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError for anything but the tables of a run, as rft_fast makes them.

    Views, triggers, virtual tables, other indices and generated columns are programs of whoever made the
    file, which SQLite would run while it reads.
    """
    found = database.execute("SELECT type, name, sql FROM sqlite_master").fetchmany(_MOST_OBJECTS + 1)
    if len(found) > _MOST_OBJECTS:
        raise sqlite3.DatabaseError("it holds more tables than a run has")
    for kind, name, sql in found:
        if sql is None and kind == "index" and str(name).startswith("sqlite_autoindex_"):
            continue
        if kind == "table" and str(name) in _STATISTICS:
            continue
        if (made := _MADE.get((kind, name))) is None or not made.fullmatch(" ".join(str(sql).split())):
            raise sqlite3.DatabaseError(
                f"it holds the {str(kind)[:20]} {str(name)[:80]!r}, which rft_fast does not make so"
            )


def is_empty(database: sqlite3.Connection) -> bool:
    """Whether there is nothing in a database. A kill while it was made leaves one like that."""
    return database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None


def config(database: sqlite3.Connection) -> dict[str, Any]:
    """What the run is."""
    text, *more, kept = database.execute("SELECT config, begun, crc FROM run").fetchone() or (None, None)
    if not isinstance(text, str) or crc(text, *more) != kept:
        raise sqlite3.DatabaseError("what it says of the run is not what was written")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"what it says of the run is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise sqlite3.DatabaseError("what it says of the run is no table of entries")
    return found


def add(
    database: sqlite3.Connection, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]
) -> None:
    """One measurement, in a transaction that is on disk on return.

    Raises sqlite3.IntegrityError for one that is there.
    """
    stored = [tuple(_stored(name, value) for name, value in complete(row).items()) for row in rows]
    measured = (str(study), str(model), int(number), _now())
    with transaction(database):
        identity = database.execute(
            "INSERT INTO measurements (study, model, number, finished, crc) VALUES (?, ?, ?, ?, ?)",
            (*measured, crc(*measured, *stored)),
        ).lastrowid
        database.executemany(INSERT_ROW, [(identity, *values) for values in stored])


def remove(
    database: sqlite3.Connection,
    study: str,
    model: str,
    numbers: Iterable[int],
    scores: Iterable[tuple[str, str, float]],
) -> None:
    """Removes measurements of a study of a model, and scores by (of, data set, alpha): all, or none."""
    one = "(SELECT id FROM measurements WHERE study = ? AND model = ? AND number = ?)"
    with transaction(database):
        for number in numbers:
            database.execute(f"DELETE FROM rows WHERE measurement = {one}", (study, model, number))
            database.execute(f"DELETE FROM measurements WHERE id = {one}", (study, model, number))
        database.executemany(
            'DELETE FROM scores WHERE "of" = ? AND dataset = ? AND alpha = ?',
            [(of, dataset, alpha + 0.0) for of, dataset, alpha in scores],
        )


def rows(database: sqlite3.Connection, models: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """All rows as they are stored, whatever order they were added in: by study, by model in this order, by
    number. Models that are not named come last, as they appeared.

    Raises sqlite3.DatabaseError for a measurement that is not what was written.
    """
    places: dict[str, int] = {study: place for place, study in enumerate(STUDIES)}
    order = {model: place for place, model in enumerate(models)}
    query = "SELECT id, study, model, number, finished, crc FROM measurements ORDER BY id"
    found = []
    kinds: set[tuple[type, ...]] = set()
    for identity, study, model, number, *more in database.execute(query).fetchall():
        if not (isinstance(number, int) and isinstance(study, str) and isinstance(model, str)):
            raise sqlite3.DatabaseError(f"{study!r}, {model!r}, {number!r} is no measurement")
        place = places.setdefault(study, len(places))
        found.append((place, order.setdefault(model, len(order)), number, study, model, identity, *more))
    for _, _, number, study, model, identity, finished, kept in sorted(found, key=itemgetter(0, 1, 2)):
        own = rows_of(database, identity)
        if crc(study, model, number, finished, *own) != kept:
            raise sqlite3.DatabaseError(
                f"measurement {number} of {study} of {model!r} is not what was written"
            )
        for row in own:
            _check_kinds(row, kinds)
        yield from own


def _check_kinds(row: tuple[Any, ...], known: set[tuple[type, ...]]) -> None:
    """Raises sqlite3.DatabaseError for a row of other types than its columns. known: types that are right."""
    if (types := tuple(map(type, row))) in known:
        return
    for (name, kind), value in zip(COLUMNS.items(), row, strict=True):
        if (
            value is not None
            and type(value) not in _KEPT[kind]
            and not (kind == "float64" and value == "nan")
        ):
            raise sqlite3.DatabaseError(f"the column {name} holds a {type(value).__name__}, not {kind}")
    if str not in (
        type(value) for value, kind in zip(row, COLUMNS.values(), strict=True) if kind == "float64"
    ):
        known.add(types)


def rows_of(database: sqlite3.Connection, identity: int) -> list[tuple[Any, ...]]:
    """The rows of one measurement as they are stored, as they were added."""
    query = f"SELECT {NAMES} FROM rows WHERE measurement = ? ORDER BY rowid"
    return database.execute(query, (identity,)).fetchall()


def values(row: Sequence[Any]) -> Row:
    """A stored row as it was added."""
    return {
        name: value if value is None else _PYTHON[kind](value)
        for (name, kind), value in zip(COLUMNS.items(), row, strict=True)
    }


def put_scores(database: sqlite3.Connection, of: str, key: tuple[str, float], scores: Scores) -> None:
    """Keeps scores, in the place of earlier ones of that key."""
    losses = scores.losses.numpy().astype("<f4", copy=False).tobytes()
    hits = scores.correct.numpy().astype(np.uint8).tobytes()
    with transaction(database):
        dataset, alpha = key
        values = (str(of), str(dataset), float(alpha) + 0.0, losses, hits)
        database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)", (*values, crc(*values)))


def get_scores(database: sqlite3.Connection, of: str, key: tuple[str, float]) -> Scores | None:
    """Scores as they were kept, bit for bit."""
    query = 'SELECT losses, correct FROM scores WHERE "of" = ? AND dataset = ? AND alpha = ?'
    found = database.execute(query, (of, *key)).fetchone()
    if found is None:
        return None
    if not all(isinstance(part, bytes) for part in found) or len(found[0]) != 4 * len(found[1]):
        raise sqlite3.DatabaseError(f"scores of {of} are not what was written")
    losses, hits = np.frombuffer(found[0], "<f4").astype("f4"), np.frombuffer(found[1], np.uint8).astype(bool)
    return Scores(torch.from_numpy(losses), torch.from_numpy(hits))


def check_pages(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where tables and their indices do not fit together."""
    (answer,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(str(answer).removeprefix("*** in database main ***\n"))


def verify(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where measurements or scores were damaged since they were written: SQLite
    alone would not notice a changed number."""
    check_pages(database)
    count = sum(1 for _ in rows(database, ()))
    if count != database.execute("SELECT count(*) FROM rows").fetchone()[0]:
        raise sqlite3.DatabaseError("it holds rows of no measurement")
    for *scores, kept in database.execute('SELECT "of", dataset, alpha, losses, correct, crc FROM scores'):
        if crc(*scores) != kept:
            raise sqlite3.DatabaseError(f"scores of {scores[0]} are not what was written")


def crc(*values: object) -> int:
    """Of values as SQLite keeps them: numbers, text, bytes, None, and tuples of these."""
    found = 0
    for value in values:
        found = zlib.crc32(value if isinstance(value, bytes) else ascii(value).encode(), found)
    return found


def _stored(name: str, value: object) -> object:
    """A value as SQLite gives it back. It turns NaN into NULL, so NaN goes in as text; and -0.0 into 0.0."""
    if value is None:
        return None
    try:
        found: Any = _PYTHON[COLUMNS[name]](value)
        # Nothing is rounded or cut: SQLite's integers have 64 bits.
        fits = not isinstance(found, int) or (found == value and -(2**63) <= found < 2**63)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"results: expected {COLUMNS[name]} in the column {name}, got {value!r}")
    if isinstance(found, float):
        return "nan" if math.isnan(found) else found + 0.0
    return int(found) if isinstance(found, bool) else found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
