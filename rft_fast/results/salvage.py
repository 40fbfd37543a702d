"""What can still be read of a damaged database, in a new one beside it. The damaged file is left as it is."""

from __future__ import annotations

import json
import os
import pathlib
import sqlite3
import tempfile
from contextlib import closing, suppress
from typing import Any

from ..common import disk, files
from . import database, records, schema
from .loading import explained
from .lock import refuse_in_use


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
    refuse_in_use(pathlib.Path(directory))
    with explained(pathlib.Path(directory)):
        return _save(file)


def _save(file: pathlib.Path) -> str:
    """Saves what can be read of a run's database, and says what and where.

    Whole measurements only. Works on a copy, so that not even SQLite touches the damaged file.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".recovering-") as folder:
        copy = database.copy(file, pathlib.Path(folder, file.name))
        known = file.with_name("config.json")
        found = _read(copy, known)
        if not found[1]:
            _put_first_page(copy, pathlib.Path(folder, "fresh"))
            found = max(found, _read(copy, known), key=lambda of: len(of[1]))
        config, measurements, scores, lost = found
        if config is None or not (measurements or scores):
            return "nothing of it could be read; it is left as it is"
        new = pathlib.Path(folder, "recovered")
        schema.create(new, config)
        with closing(database.connect(new)) as target, database.transaction(target):
            for identity, (measurement, rows) in enumerate(measurements, start=1):
                target.execute("INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?)", (identity, *measurement))
                target.executemany(records.INSERT_ROW, [(identity, *row) for row in rows])
            target.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)", scores)
        place = _free(file.with_name("rows.recovered.sqlite"))
        new.rename(place)
        disk.sync_folder(place.parent)
    others = [database.beside(file, end) for end in database.BESIDE]
    remove = "".join(f", remove {other.name}" for other in others if other.exists())
    return (
        f"{len(measurements)} whole measurements were saved to {place} ({lost} known ones could not be); to "
        f"go on with them, move that file over {file.name}{remove}, and give the same command"
    )


PAGE = 4096  # bytes, if SQLite was not built otherwise
Measured = tuple[tuple[Any, ...], list[tuple[Any, ...]]]  # of the table measurements, and its rows


def _read(
    file: pathlib.Path, beside: pathlib.Path
) -> tuple[dict[str, Any] | None, list[Measured], list[tuple[Any, ...]], int]:
    with closing(database.connect(file, bounded=True)) as base:
        try:
            schema.check(base)
        except sqlite3.Error:  # damaged, or of somebody who would have views and the like run
            return None, [], [], 0
        size = sum(
            part.stat().st_size for part in (file, database.beside(file, database.LOG)) if part.exists()
        )
        with suppress(sqlite3.Error):  # more, where a file was cut short whose log was not
            size = max(size, base.execute("PRAGMA page_count").fetchone()[0] * PAGE)
        most = size // 32  # nothing of that size holds more rows, and none is numbered higher
        base.text_factory = lambda text: text.decode("utf-8", "replace")  # damage shows in the checksum
        rows: dict[int, list[tuple[Any, ...]]] = {}
        for _, identity, *values in _around(base, "rows", f"measurement, {records.NAMES}", most):
            rows.setdefault(identity, []).append(tuple(values))
        found: dict[tuple[Any, ...], Measured] = {}
        lost = 0
        for identity, *measured, kept in _around(
            base, "measurements", "study, model, number, finished, crc", most
        ):
            own = rows.get(identity, [])
            if records.crc(*measured, *own) == kept:
                found.setdefault(tuple(measured[:3]), ((*measured, kept), own))
            else:
                lost += 1
        columns = '"of", dataset, alpha, losses, correct, crc'
        scores = [
            tuple(s) for _, *s in _around(base, "scores", columns, most) if records.crc(*s[:-1]) == s[-1]
        ]
        return _config(base, beside), list(found.values()), scores, lost


def _put_first_page(file: pathlib.Path, fresh: pathlib.Path) -> None:
    """Says anew what tables there are, and where they begin, which is the same in every run.

    And no more how large the file is: SQLite does not read one that was cut short.
    """
    schema.create(fresh, {})
    page = bytearray(fresh.read_bytes()[:PAGE])
    page[24:28], page[92:96] = b"\0\0\0\1", bytes(4)  # changed since the size was noted
    with file.open("r+b") as stream:
        stream.write(page)


def _config(base: sqlite3.Connection, beside: pathlib.Path) -> dict[str, Any] | None:
    """The configuration; where that is damaged, the copy of it in config.json."""
    with suppress(sqlite3.Error):
        return records.config(base)
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(files.read_text(beside)))
    return None


def _around(base: sqlite3.Connection, table: str, columns: str, most: int) -> list[tuple[Any, ...]]:
    """Rows of a table in order, each after its number, around the places that cannot be read."""
    query = f"SELECT rowid, {columns} FROM {table} NOT INDEXED"
    found: dict[int, tuple[Any, ...]] = {}
    end = most
    for order in ("ASC", "DESC"):
        try:
            for row in base.execute(f"{query} ORDER BY rowid {order}"):
                if order == "DESC" and end == most:
                    end = min(row[0], most)
                if 0 < row[0] <= most:
                    found.setdefault(row[0], row)
            break
        except sqlite3.Error as error:
            if "no such" in str(error):  # the table itself is lost
                break
    else:  # between the first damage and the last: each on its own
        for identity in range(1, end + 1):
            if identity not in found:
                with suppress(sqlite3.Error):
                    if row := base.execute(f"{query} WHERE rowid = ?", (identity,)).fetchone():
                        found[identity] = row
    return [found[identity] for identity in sorted(found)]


def _free(file: pathlib.Path) -> pathlib.Path:
    """A name that nothing has, so that nothing is written over."""
    found, number = file, 1
    while found.exists():
        number += 1
        found = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return found
