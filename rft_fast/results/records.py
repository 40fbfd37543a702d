"""The contents of a run's database: configuration, measurements with rows and image results, and scores."""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ..evaluate import Scores
from ..names import STUDIES
from ..studies.images import ImageScores
from ..studies.rows import COLUMNS, Row, complete
from .database import check_pages, transaction
from .packed import Packed, pack, unpack

_KEPT = {"string": (str,), "float64": (float, int), "Int64": (int,), "boolean": (int,)}  # types in SQLite
_PYTHON = {"string": str, "float64": float, "Int64": int, "boolean": bool}
NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
INSERT_ROW = f"INSERT INTO rows VALUES (?{', ?' * len(COLUMNS)})"  # with the columns in any order
_IMAGES = "crc, place, hits, losses, predictions"
INSERT_IMAGES = "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)"


def config(database: sqlite3.Connection) -> dict[str, Any]:
    """Return the configuration of the run.

    Raises:
        sqlite3.DatabaseError: It is missing, or not what was written.
    """
    text, *more, kept = database.execute("SELECT config, begun, crc FROM run").fetchone() or (None, None)
    if not isinstance(text, str) or crc(text, *more) != kept:
        raise sqlite3.DatabaseError("the run's configuration differs from what was written")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"the run's configuration is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise sqlite3.DatabaseError("the run's configuration is not a table")
    return found


def columns(database: sqlite3.Connection) -> tuple[str, ...]:
    """Return the columns of the table of rows, in its order. A run of an earlier version may lack some."""
    return tuple(str(name) for _, name, *_ in database.execute("PRAGMA table_info(rows)"))[1:]


def arrange(row: Sequence[Any], own: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of a row in the order of :data:`COLUMNS`; None for columns that are missing.

    Args:
        row: A row as stored.
        own: The columns of its table, from :func:`columns`.
    """
    found = dict(zip(own, row, strict=True))
    return tuple(map(found.get, COLUMNS))


def add(
    database: sqlite3.Connection,
    study: str,
    model: str,
    number: int,
    rows: Sequence[Mapping[str, object]],
    images: Sequence[ImageScores] = (),
) -> None:
    """Add one measurement in a transaction that is on disk on return.

    Args:
        database: Opened for writing.
        study, model: What was measured.
        number: The measurement's number in its study.
        rows: Its rows: column -> value.
        images: The results of the images of each row; empty: not kept.

    Raises:
        ValueError: A name is not a column, or a value does not fit its column.
        sqlite3.IntegrityError: The measurement exists.
    """
    own = columns(database)
    stored = [tuple(_stored(name, row[name]) for name in own) for row in map(complete, rows)]
    measured = (str(study), str(model), int(number), now())
    packed = [pack(each) for each in images]
    checksums = [crc(place, *each) for place, each in enumerate(packed)]
    with transaction(database):
        identity = database.execute(
            "INSERT INTO measurements (study, model, number, finished, crc) VALUES (?, ?, ?, ?, ?)",
            (*measured, crc(*measured, *stored, *checksums)),
        ).lastrowid
        database.executemany(INSERT_ROW, [(identity, *values) for values in stored])
        for place, (each, checksum) in enumerate(zip(packed, checksums, strict=True)):
            database.execute(INSERT_IMAGES, (identity, place, checksum, *each))


def remove(
    database: sqlite3.Connection,
    study: str,
    model: str,
    numbers: Iterable[int],
    scores: Iterable[tuple[str, str, float]],
) -> None:
    """Remove measurements of a study of a model, and scores, in one transaction.

    Args:
        database: Opened for writing.
        study, model: What was measured.
        numbers: The measurements.
        scores: (of, data set, alpha) of the scores.
    """
    one = "(SELECT id FROM measurements WHERE study = ? AND model = ? AND number = ?)"
    with transaction(database):
        for number in numbers:
            for table in ("images", "rows"):
                database.execute(f"DELETE FROM {table} WHERE measurement = {one}", (study, model, number))
            database.execute(f"DELETE FROM measurements WHERE id = {one}", (study, model, number))
        database.executemany(
            'DELETE FROM scores WHERE "of" = ? AND dataset = ? AND alpha = ?',
            [(of, dataset, alpha + 0.0) for of, dataset, alpha in scores],
        )


def rows(
    database: sqlite3.Connection, models: Sequence[str], studies: Sequence[str] = ()
) -> Iterator[tuple[Any, ...]]:
    """Yield all rows as stored, sorted by study, model and number.

    Args:
        database: The database of a run.
        models: The models in order.
        studies: Studies that follow those of the paper, in order.

    Studies and models that are not named come last, in order of appearance.

    Raises:
        sqlite3.DatabaseError: A measurement is not what was written.
    """
    for _, own in measurements(database, models, studies):
        yield from own


def measurements(
    database: sqlite3.Connection,
    models: Sequence[str],
    studies: Sequence[str] = (),
    only: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    """Yield the identity and the rows of each measurement, as :func:`rows` does.

    Args:
        database, models, studies: As for :func:`rows`.
        only: Column of the table of measurements -> value of those to yield; None: all.
    """
    places: dict[str, int] = {}
    for study in (*STUDIES, *studies):
        places.setdefault(study, len(places))
    order = {model: place for place, model in enumerate(models)}
    conditions = " AND ".join(f"{name} = ?" for name in only or ()) or "1"
    query = f"SELECT id, study, model, number, finished, crc FROM measurements WHERE {conditions} ORDER BY id"
    found, names, images = [], columns(database), has_images(database)
    kinds: set[tuple[type, ...]] = set()
    for identity, study, model, number, *more in database.execute(
        query, list((only or {}).values())
    ).fetchall():
        if not (isinstance(number, int) and isinstance(study, str) and isinstance(model, str)):
            raise sqlite3.DatabaseError(f"{study!r}, {model!r}, {number!r} is not a measurement")
        place = places.setdefault(study, len(places))
        found.append((place, order.setdefault(model, len(order)), number, study, model, identity, *more))
    for _, _, number, study, model, identity, finished, kept in sorted(found, key=itemgetter(0, 1, 2)):
        own = rows_of(database, identity, names)
        if (
            crc(study, model, number, finished, *own, *(_checksums(database, identity) if images else ()))
            != kept
        ):
            raise sqlite3.DatabaseError(
                f"measurement {number} of {study} of {model!r} differs from what was written"
            )
        if names != tuple(COLUMNS):
            own = [arrange(row, names) for row in own]
        for row in own:
            _check_kinds(row, kinds)
        yield identity, own


def _check_kinds(row: tuple[Any, ...], known: set[tuple[type, ...]]) -> None:
    """Raise sqlite3.DatabaseError for a row whose types do not fit its columns. known: types that fit."""
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


def rows_of(
    database: sqlite3.Connection, identity: int, names: Iterable[str] = tuple(COLUMNS)
) -> list[tuple[Any, ...]]:
    """Return the rows of one measurement as stored, in the order in which they were added.

    Args:
        database: The database of a run.
        identity: The measurement.
        names: Columns of its table, in the order of the values.
    """
    listed = ", ".join(f'"{name}"' for name in names)
    query = f"SELECT {listed} FROM rows WHERE measurement = ? ORDER BY rowid"
    return database.execute(query, (identity,)).fetchall()


def has_images(database: sqlite3.Connection) -> bool:
    """Whether there is a table of image results. Runs of earlier versions have none."""
    return database.execute("SELECT 1 FROM sqlite_master WHERE name = 'images'").fetchone() is not None


def images_of(database: sqlite3.Connection, identity: int) -> list[ImageScores]:
    """Return the image results of the rows of one measurement, in their order; empty: not kept.

    Raises:
        sqlite3.DatabaseError: They are not what was written.
    """
    if not has_images(database):
        return []
    query = f"SELECT {_IMAGES} FROM images WHERE measurement = ? ORDER BY place"
    return [unpack(*_intact(*found)) for found in database.execute(query, (identity,))]


def _checksums(database: sqlite3.Connection, identity: int) -> list[int]:
    query = "SELECT crc FROM images WHERE measurement = ? ORDER BY place"
    return [kept for (kept,) in database.execute(query, (identity,))]


def _intact(kept: int, place: int, *packed: Any) -> Packed:
    """Return hits, losses and predictions if their checksum fits."""
    if crc(place, *packed) != kept:
        raise sqlite3.DatabaseError("results of single images differ from what was written")
    return packed


def checksum_again(database: sqlite3.Connection) -> None:
    """Compute the checksums of all measurements anew, for rows whose table has got other columns."""
    names, images = columns(database), has_images(database)
    query = "SELECT id, study, model, number, finished FROM measurements"
    for identity, *measured in database.execute(query).fetchall():
        own = rows_of(database, identity, names)
        checksums = _checksums(database, identity) if images else []
        new = crc(*measured, *own, *checksums)
        database.execute("UPDATE measurements SET crc = ? WHERE id = ?", (new, identity))


def values(row: Sequence[Any]) -> Row:
    """Return a stored row as it was added: column -> value."""
    return {
        name: value if value is None else _PYTHON[kind](value)
        for (name, kind), value in zip(COLUMNS.items(), row, strict=True)
    }


def put_scores(database: sqlite3.Connection, of: str, key: tuple[str, float], scores: Scores) -> None:
    """Store scores under a key, replacing earlier ones.

    Args:
        database: Opened for writing.
        of: What the scores are of.
        key: Data set and alpha.
        scores: Loss (float32), correctness and, if known, prediction and entropy of each image.
    """
    losses = scores.losses.numpy().astype("<f4", copy=False).tobytes()
    hits = scores.correct.numpy().astype(np.uint8).tobytes()
    if scores.predictions is not None:  # behind the hits: 4 bytes more for each image
        hits += scores.predictions.numpy().astype("<i4", copy=False).tobytes()
        if scores.entropies is not None:  # behind the predictions, likewise
            hits += scores.entropies.numpy().astype("<f4", copy=False).tobytes()
    with transaction(database):
        dataset, alpha = key
        values = (str(of), str(dataset), float(alpha) + 0.0, losses, hits)
        database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)", (*values, crc(*values)))


def get_scores(database: sqlite3.Connection, of: str, key: tuple[str, float]) -> Scores | None:
    """Return stored scores, bit for bit; None where there are none.

    Raises:
        sqlite3.DatabaseError: They are not what was written.
    """
    query = 'SELECT losses, correct FROM scores WHERE "of" = ? AND dataset = ? AND alpha = ?'
    found = database.execute(query, (of, *key)).fetchone()
    if found is None:
        return None
    first, second = found
    count = len(first) // 4
    bytewise = isinstance(first, bytes) and isinstance(second, bytes)
    if not bytewise or len(first) != 4 * count or len(second) not in (count, 5 * count, 9 * count):
        raise sqlite3.DatabaseError(f"scores of {of} differ from what was written")
    losses = torch.from_numpy(np.frombuffer(first, "<f4").astype("f4"))
    hits = torch.from_numpy(np.frombuffer(second, np.uint8, count).astype(bool))
    if len(second) == count:  # of an earlier version
        return Scores(losses, hits)
    predictions = torch.from_numpy(np.frombuffer(second, "<i4", count, count).astype("i4"))
    if len(second) == 5 * count:  # without entropies
        return Scores(losses, hits, predictions)
    entropies = torch.from_numpy(np.frombuffer(second, "<f4", offset=5 * count).astype("f4"))
    return Scores(losses, hits, predictions, entropies)


def verify(database: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError where measurements or scores changed after they were written.

    SQLite alone does not notice a changed number.
    """
    check_pages(database)
    count = sum(1 for _ in rows(database, ()))
    if count != database.execute("SELECT count(*) FROM rows").fetchone()[0]:
        raise sqlite3.DatabaseError("it holds rows without a measurement")
    if has_images(database):
        for found in database.execute(f"SELECT {_IMAGES} FROM images"):
            _intact(*found)
        others = "SELECT count(*) FROM images WHERE measurement NOT IN (SELECT id FROM measurements)"
        if database.execute(others).fetchone()[0]:
            raise sqlite3.DatabaseError("it holds results of images without a measurement")
    for *scores, kept in database.execute('SELECT "of", dataset, alpha, losses, correct, crc FROM scores'):
        if crc(*scores) != kept:
            raise sqlite3.DatabaseError(f"scores of {scores[0]} are not what was written")


def crc(*values: object) -> int:
    """CRC-32 of values as SQLite keeps them: numbers, text, bytes, None, and tuples of these."""
    found = 0
    for value in values:
        found = zlib.crc32(value if isinstance(value, bytes) else ascii(value).encode(), found)
    return found


def _stored(name: str, value: object) -> object:
    """Return a value as SQLite gives it back: NaN, which SQLite turns into NULL, as text, and -0.0 as 0.0."""
    if value is None:
        return None
    try:
        found: Any = _PYTHON[COLUMNS[name]](value)
        # Refuse what would be rounded or cut: SQLite's integers have 64 bits.
        fits = not isinstance(found, int) or (found == value and -(2**63) <= found < 2**63)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"results: expected {COLUMNS[name]} in the column {name}, got {value!r}")
    if isinstance(found, float):
        return "nan" if math.isnan(found) else found + 0.0
    return int(found) if isinstance(found, bool) else found


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
