"""Saving what can be read of a damaged database to a new one beside it. The damaged file is left as it is."""

from __future__ import annotations

import json
import os
import pathlib
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

from ..common import disk, files
from . import database, records, schema
from .loading import explained
from .lock import refuse_in_use


@dataclass(frozen=True)
class Saved:
    """What was saved of a damaged database.

    Attributes:
        text: a sentence that says what, where, and how to resume from it.
        file: the new database; None if nothing could be read.
        stale: files of the damaged database beside it, to be removed before the new one replaces it.
        command: the command that began the run; empty if it is not known.
    """

    text: str
    file: pathlib.Path | None = None
    stale: tuple[pathlib.Path, ...] = ()
    command: str = ""


def recover(directory: str | os.PathLike[str]) -> str:
    """Save what can be read of a damaged ``rows.sqlite`` to ``rows.recovered.sqlite``, or a similar new name.

    Args:
        directory: Directory of a run. The damaged file in it is left as it is.

    Returns:
        A sentence that says what was saved and where.

    Raises:
        FileNotFoundError: There is no ``rows.sqlite``.
        InUse: A process writes to it.
        OSError: The disk refuses the new file.
    """
    return saved(directory).text


def saved(directory: str | os.PathLike[str]) -> Saved:
    """Do what :func:`recover` does, and return it in parts; arguments and errors are the same."""
    file = pathlib.Path(directory) / database.FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"results: expected the directory of a run, but {directory} has no {database.FILE}"
        )
    refuse_in_use(pathlib.Path(directory))
    with explained(pathlib.Path(directory)):
        return _save(file)


def _save(file: pathlib.Path) -> Saved:
    """Save the whole measurements of a database and describe the result.

    Works on a copy, so that not even SQLite touches the damaged file.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".recovering-") as folder:
        copy = database.copy(file, pathlib.Path(folder, file.name))
        known = file.with_name("config.json")
        found = _read(copy, known)
        if not found[1]:
            _put_first_page(copy, pathlib.Path(folder, "fresh"))
            found = max(found, _read(copy, known), key=lambda of: len(of[1]))
        config, measurements, scores, missing = found
        if config is None or not (measurements or scores):
            return Saved("none of it could be read; the file is unchanged")
        new = pathlib.Path(folder, "recovered")
        schema.create(new, config)
        with ExitStack() as stack:
            target = stack.enter_context(closing(database.connect(new)))
            base = stack.enter_context(closing(database.connect(copy, bounded=True)))
            stack.enter_context(database.transaction(target))
            for identity, each in enumerate(measurements, start=1):
                measurement = (identity, *each.key, records.crc(*each.key, *each.rows, *each.checksums))
                target.execute("INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?)", measurement)
                target.executemany(records.INSERT_ROW, [(identity, *row) for row in each.rows])
                for position, (number, _) in enumerate(each.images):
                    packed = base.execute(
                        f"SELECT {_IMAGES} FROM images WHERE rowid = ?", (number,)
                    ).fetchone()
                    target.execute(records.INSERT_IMAGES, (identity, position, *packed))
            target.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)", scores)
        place = _free(file.with_name("rows.recovered.sqlite"))
        new.rename(place)
        disk.sync_folder(place.parent)
    others = [database.beside(file, end) for end in database.BESIDE]
    stale = tuple(other for other in others if other.exists())
    remove = "".join(f", remove {other.name}" for other in stale)
    text = (
        f"{len(measurements)} complete measurements were saved to {place} ({missing} known "
        f"ones could not be). To resume from them, move that file over {file.name}{remove}, "
        "and repeat the command"
    )
    return Saved(text, place, stale, str(config.get("command", "")))


PAGE = 4096  # bytes, SQLite's default
_IMAGES = "crc, hits, losses, predictions"


@dataclass(frozen=True)
class _Measured:
    """A whole measurement.

    Attributes:
        key: study, model, number, time.
        rows: its rows, with the columns of this version.
        images: the numbers in their table and the checksums of its image results.
    """

    key: tuple[Any, ...]
    rows: list[tuple[Any, ...]]
    images: list[tuple[int, Any]]

    @property
    def checksums(self) -> list[Any]:
        return [kept for _, kept in self.images]


def _read(
    file: pathlib.Path, beside: pathlib.Path
) -> tuple[dict[str, Any] | None, list[_Measured], list[tuple[Any, ...]], int]:
    with closing(database.connect(file, bounded=True)) as base:
        try:
            schema.check(base)
        except sqlite3.Error:  # damaged, or made by a stranger to run views and the like
            return None, [], [], 0
        size = sum(
            part.stat().st_size for part in (file, database.beside(file, database.LOG)) if part.exists()
        )
        with suppress(sqlite3.Error):  # larger where the file was cut short, but not its log
            size = max(size, base.execute("PRAGMA page_count").fetchone()[0] * PAGE)
        most = size // 32  # upper limit of rows in a file of that size, and of their numbers
        base.text_factory = lambda text: text.decode("utf-8", "replace")  # the checksum shows damage
        names = records.columns(base)
        rows: dict[int, list[tuple[Any, ...]]] = {}
        listed = ", ".join(f'"{name}"' for name in ("measurement", *names))
        for _, identity, *values in _around(base, "rows", listed, most):
            rows.setdefault(identity, []).append(tuple(values))
        images: dict[int, dict[int, tuple[int, Any]]] = {}
        for number, identity, place, kept in _around(
            base, "images", f"measurement, place, {_IMAGES}", most, _without_content
        ):
            if isinstance(place, int):
                images.setdefault(identity, {})[place] = (number, kept)
        found: dict[tuple[Any, ...], _Measured] = {}
        missing = 0
        for identity, *measured, kept in _around(
            base, "measurements", "study, model, number, finished, crc", most
        ):
            own = rows.get(identity, [])
            pictured = [image for _, image in sorted(images.get(identity, {}).items())]
            if records.crc(*measured, *own, *(checksum for _, checksum in pictured)) == kept:
                arranged = [records.arrange(row, names) for row in own]
                found.setdefault(tuple(measured[:3]), _Measured(tuple(measured), arranged, pictured))
            else:
                missing += 1
        columns = '"of", dataset, alpha, losses, correct, crc'
        scores = [
            tuple(s) for _, *s in _around(base, "scores", columns, most) if records.crc(*s[:-1]) == s[-1]
        ]
        return _config(base, beside), list(found.values()), scores, missing


def _without_content(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Image results without what they are, and without a checksum if that does not fit."""
    number, identity, place, kept, *packed = row
    return number, identity, place, kept if records.crc(place, *packed) == kept else None


def _put_first_page(file: pathlib.Path, fresh: pathlib.Path) -> None:
    """Replace the first page, which names the tables and where they begin, and is the same in every run.

    It no longer states the file's size: SQLite does not read a file that is shorter than stated.
    """
    schema.create(fresh, {})
    page = bytearray(fresh.read_bytes()[:PAGE])
    page[24:28], page[92:96] = b"\0\0\0\1", bytes(4)  # marks the stated size as outdated
    with file.open("r+b") as stream:
        stream.write(page)


def _config(base: sqlite3.Connection, beside: pathlib.Path) -> dict[str, Any] | None:
    """Return the configuration; where it is damaged, the copy in config.json."""
    with suppress(sqlite3.Error):
        return records.config(base)
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(files.read_text(beside)))
    return None


def _around(
    base: sqlite3.Connection,
    table: str,
    columns: str,
    most: int,
    of: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple,
) -> list[tuple[Any, ...]]:
    """Return the rows of a table in order, each after its number, skipping what cannot be read.

    Args:
        base: The database.
        table: Name of the table.
        columns: Its columns, as SQL.
        most: Upper limit of their number.
        of: What is kept of a row.
    """
    query = f"SELECT rowid, {columns} FROM {table} NOT INDEXED"
    found: dict[int, tuple[Any, ...]] = {}
    end = most
    for order in ("ASC", "DESC"):
        try:
            for row in base.execute(f"{query} ORDER BY rowid {order}"):
                if order == "DESC" and end == most:
                    end = min(row[0], most)
                if 0 < row[0] <= most:
                    found.setdefault(row[0], of(row))
            break
        except sqlite3.Error as error:
            if "no such" in str(error):  # the table itself is missing
                break
    else:  # between the first damage and the last: each row on its own
        for identity in range(1, end + 1):
            if identity not in found:
                with suppress(sqlite3.Error):
                    if row := base.execute(f"{query} WHERE rowid = ?", (identity,)).fetchone():
                        found[identity] = of(row)
    return [found[identity] for identity in sorted(found)]


def _free(file: pathlib.Path) -> pathlib.Path:
    """Return a name that does not exist, so that nothing is overwritten."""
    found, number = file, 1
    while found.exists():
        number += 1
        found = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return found
