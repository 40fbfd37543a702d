"""Connections to a run's database: how it is opened, read while it is written, and committed to disk."""

from __future__ import annotations

import fcntl
import os
import pathlib
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

from ..common import disk, files

FILE = "rows.sqlite"
LOCK = ".lock"  # beside it, held by the process that writes
LOG, JOURNAL = "-wal", "-journal"  # beside the database: what is not in it yet, or not for good
BESIDE = (LOG, JOURNAL, "-shm")

# Kinds of file systems that begin so are shared between machines, or may be.
_NETWORK = (
    *("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.", "glusterfs", "afs"),
    *("orangefs", "panfs", "wekafs", "virtiofs", "vboxsf"),
)
_LIMIT_LENGTH = 0  # SQLite's number of it


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


def is_empty(database: sqlite3.Connection) -> bool:
    """Whether there is nothing in a database. A kill while it was made leaves one like that."""
    return database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None


def check_pages(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError where tables and their indices do not fit together."""
    (answer,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(str(answer).removeprefix("*** in database main ***\n"))
