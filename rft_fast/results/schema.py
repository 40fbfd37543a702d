"""The tables of a run's database: creating them, and refusing others."""

from __future__ import annotations

import json
import pathlib
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from ..studies.rows import COLUMNS
from .database import transaction
from .records import checksum_again, columns, crc, now

FORMAT = 2  # PRAGMA user_version; 1 had no table of image results
APPLICATION = 0x7266745F  # PRAGMA application_id: "rft_"

_SQL = {"string": "TEXT", "float64": "REAL", "Int64": "INTEGER", "boolean": "INTEGER"}
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
CREATE TABLE images (
    measurement INTEGER NOT NULL REFERENCES measurements (id), place INTEGER NOT NULL, crc INTEGER NOT NULL,
    hits BLOB NOT NULL, losses BLOB NOT NULL, predictions BLOB, UNIQUE (measurement, place));
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
"""
_MOST_OBJECTS = 100
_STATISTICS = (
    "sqlite_sequence",
    *(f"sqlite_stat{number}" for number in range(1, 5)),
)  # as ANALYZE makes them


def _made() -> dict[tuple[str, str], re.Pattern[str]]:
    """(type, name) -> pattern of its SQL. Versions differ in the columns of the table of rows."""
    found = {}
    for statement in _SCHEMA.split(";")[:6]:
        sql = " ".join(statement.split())
        _, kind, name, *_ = sql.split()
        pattern = re.escape(sql)
        if name == "rows":
            first = sql[: sql.index(', "')]
            pattern = re.escape(first) + r'(?:, "[a-z_]{1,40}" (?:TEXT|REAL|INTEGER))+\)'
        found[kind.lower(), name] = re.compile(pattern)
    return found


_MADE = _made()


def create(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Create the database of a run in one transaction: after a failure or a kill it does not count as a run.

    Args:
        file: Does not exist, or is empty.
        config: The run's configuration, as JSON values.
    """
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = EXTRA")  # syncs the folder's entry, too
        with transaction(database):
            for statement in _SCHEMA.split(";")[:-1]:
                database.execute(statement)
            text = json.dumps(config, indent=2, ensure_ascii=False)
            begun = now()
            database.execute("INSERT INTO run VALUES (?, ?, ?)", (text, begun, crc(text, begun)))


def upgrade(database: sqlite3.Connection) -> None:
    """Give the tables of a run of an earlier version what this version writes, in one transaction.

    Args:
        database: Opened for writing, verified.
    """
    (made,) = database.execute("PRAGMA user_version").fetchone()
    missing = [name for name in COLUMNS if name not in columns(database)]
    if made == FORMAT and not missing:
        return
    with transaction(database):
        for name in missing:
            database.execute(f'ALTER TABLE rows ADD COLUMN "{name}" {_SQL[COLUMNS[name]]}')
        if missing:
            checksum_again(database)
        if made < FORMAT:
            database.execute(_SCHEMA.split(";")[5])
            database.execute(f"PRAGMA user_version = {FORMAT}")


def check(database: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError for anything but the tables of a run as rft_fast makes them.

    Views, triggers, virtual tables, other indices and generated columns are programs of the file's author,
    which SQLite would run while it reads.
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
                f"it holds the {str(kind)[:20]} {str(name)[:80]!r}, which is not of a run"
            )
