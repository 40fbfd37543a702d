"""Connections to a run's database: opened safely, read while others write, committed to disk."""

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
LOCK = ".lock"  # beside it, locked by the process that writes
LOG, JOURNAL = "-wal", "-journal"  # beside the database: changes not in it yet, or not final
BESIDE = (LOG, JOURNAL, "-shm")

# Types of file systems that are, or may be, shared between machines begin with these.
_NETWORK = (
    *("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.", "glusterfs", "afs"),
    *("orangefs", "panfs", "wekafs", "virtiofs", "vboxsf"),
)
_LIMIT_LENGTH = 0  # SQLITE_LIMIT_LENGTH


def connect(file: pathlib.Path, how: str = "mode=rw", bounded: bool = False) -> sqlite3.Connection:
    """Open an existing database, which may come from a stranger.

    Args:
        file: The database.
        how: Query of SQLite's file URI.
        bounded: For reading: refuse values larger than the file, and more work than a file of its size can
            need (pages that form a circle have no end).

    Raises:
        ValueError: The database, or a file that SQLite keeps beside it, is not a plain file.
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
            # An intact file takes some two of SQLite's steps per byte.
            steps = iter(range(20 + size // 50_000))
            database.set_progress_handler(lambda: next(steps, None) is None, 1_000_000)
    except BaseException:
        database.close()
        raise
    return database


def _refuse_others(file: pathlib.Path) -> None:
    for path in (file, *(beside(file, end) for end in BESIDE)):
        if kind := files.special(path) or (path != file and path.is_symlink() and "a link"):
            raise ValueError(f"results: {path} is {kind}, expected a SQLite file")


@contextmanager
def reading(file: pathlib.Path) -> Iterator[sqlite3.Connection]:
    """Open a database as it is at this moment, also while another process writes, or without write access.

    Nothing is written, neither to the database nor beside it: what a killed process left behind is recovered
    in a copy. (While a process writes, readers share SQLite's index of the log.)
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
    """Whether a process that ended left logs beside a database."""
    if not any(beside(file, end).exists() for end in (LOG, JOURNAL)) or has_stray_log(file):
        return False
    with suppress(FileNotFoundError):
        handle = disk.open_plain(file.with_name(LOCK), os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False  # a process writes, or may
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
    """Copy a database and what its logs hold; return the target."""
    shutil.copyfile(file, target)
    for end in (JOURNAL,) if has_stray_log(file) else (JOURNAL, LOG):
        with suppress(FileNotFoundError):
            shutil.copyfile(beside(file, end), beside(target, end))
    return target


def beside(file: pathlib.Path, end: str) -> pathlib.Path:
    """The name of a file that SQLite keeps beside a database."""
    return file.with_name(file.name + end)


def has_stray_log(file: pathlib.Path) -> bool:
    """Whether the write-ahead log beside a database belongs to one that this file has replaced.

    SQLite would write that log into this database. A database's header tells whether it has a log.
    """
    log = beside(file, LOG)
    if not log.exists():
        return False
    with file.open("rb") as stream:
        head = stream.read(20)
    return head.startswith(b"SQLite format 3") and head[18:20] == b"\x01\x01" and log.exists()


def start_writing(database: sqlite3.Connection, file: pathlib.Path) -> None:
    """From now on, a commit returns when it is on disk.

    With a write-ahead log, which syncs once per commit rather than four times and lets others read meanwhile;
    on network file systems, where machines share no memory, with a rollback journal.
    """
    mode = "DELETE" if on_network(file) else "WAL"
    (mode,) = database.execute(f"PRAGMA journal_mode = {mode}").fetchone()
    database.execute(f"PRAGMA synchronous = {'FULL' if mode == 'wal' else 'EXTRA'}")


def stop_writing(database: sqlite3.Connection) -> None:
    """Fold the log into the one file, which can then be copied, unless a reader prevents it."""
    with suppress(sqlite3.OperationalError):
        database.execute("PRAGMA journal_mode = DELETE")


def on_network(file: pathlib.Path, mounts: pathlib.Path = pathlib.Path("/proc/self/mounts")) -> bool:
    """Whether a file lies on a file system shared between machines; False where that is unknown."""
    try:
        lines = [line.split() for line in mounts.read_text(errors="replace").splitlines()]
    except OSError:
        return False
    place = file.absolute().resolve()
    # A later mount hides an earlier one. Spaces in names are escaped as \040.
    kinds = {pathlib.Path(re.sub(r"\\(\d{3})", _character, where)): kind for _, where, kind, *_ in lines}
    held = max((where for where in kinds if where in place.parents), key=lambda p: len(p.parts), default=None)
    return held is not None and kinds[held].startswith(_NETWORK)


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Commit on exit, or roll back on an exception."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def is_empty(database: sqlite3.Connection) -> bool:
    """Whether a database holds nothing, as after a kill while it was created."""
    return database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None


def check_pages(database: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError where tables and their indices are inconsistent."""
    (answer,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(str(answer).removeprefix("*** in database main ***\n"))
