"""The contents of a run's database: configuration, measurements with their rows, and shared scores."""

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
from ..studies.rows import COLUMNS, Row, complete
from .database import check_pages, transaction

_KEPT = {"string": (str,), "float64": (float, int), "Int64": (int,), "boolean": (int,)}  # types in SQLite
_PYTHON = {"string": str, "float64": float, "Int64": int, "boolean": bool}
NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
INSERT_ROW = f"INSERT INTO rows VALUES (?{', ?' * len(COLUMNS)})"


def config(database: sqlite3.Connection) -> dict[str, Any]:
    """Return the configuration of the run.

    Raises:
        sqlite3.DatabaseError: It is missing, or not what was written.
    """
    text, *more, kept = database.execute("SELECT config, begun, crc FROM run").fetchone() or (None, None)
    if not isinstance(text, str) or crc(text, *more) != kept:
        raise sqlite3.DatabaseError("the run's configuration is not what was written")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"the run's configuration is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise sqlite3.DatabaseError("the run's configuration is not a table")
    return found


def add(
    database: sqlite3.Connection, study: str, model: str, number: int, rows: Sequence[Mapping[str, object]]
) -> None:
    """Add one measurement in a transaction that is on disk on return.

    Args:
        database: Opened for writing.
        study, model: What was measured.
        number: The measurement's number in its study.
        rows: Its rows: column -> value.

    Raises:
        ValueError: A name is not a column, or a value does not fit its column.
        sqlite3.IntegrityError: The measurement exists.
    """
    stored = [tuple(_stored(name, value) for name, value in complete(row).items()) for row in rows]
    measured = (str(study), str(model), int(number), now())
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
            database.execute(f"DELETE FROM rows WHERE measurement = {one}", (study, model, number))
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
    places: dict[str, int] = {}
    for study in (*STUDIES, *studies):
        places.setdefault(study, len(places))
    order = {model: place for place, model in enumerate(models)}
    query = "SELECT id, study, model, number, finished, crc FROM measurements ORDER BY id"
    found = []
    kinds: set[tuple[type, ...]] = set()
    for identity, study, model, number, *more in database.execute(query).fetchall():
        if not (isinstance(number, int) and isinstance(study, str) and isinstance(model, str)):
            raise sqlite3.DatabaseError(f"{study!r}, {model!r}, {number!r} is not a measurement")
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


def rows_of(database: sqlite3.Connection, identity: int) -> list[tuple[Any, ...]]:
    """Return the rows of one measurement as stored, in the order in which they were added."""
    query = f"SELECT {NAMES} FROM rows WHERE measurement = ? ORDER BY rowid"
    return database.execute(query, (identity,)).fetchall()


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
        scores: Loss (float32) and correctness of each image.
    """
    losses = scores.losses.numpy().astype("<f4", copy=False).tobytes()
    hits = scores.correct.numpy().astype(np.uint8).tobytes()
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
    if not all(isinstance(part, bytes) for part in found) or len(found[0]) != 4 * len(found[1]):
        raise sqlite3.DatabaseError(f"scores of {of} are not what was written")
    losses, hits = np.frombuffer(found[0], "<f4").astype("f4"), np.frombuffer(found[1], np.uint8).astype(bool)
    return Scores(torch.from_numpy(losses), torch.from_numpy(hits))


def verify(database: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError where measurements or scores changed after they were written.

    SQLite alone does not notice a changed number.
    """
    check_pages(database)
    count = sum(1 for _ in rows(database, ()))
    if count != database.execute("SELECT count(*) FROM rows").fetchone()[0]:
        raise sqlite3.DatabaseError("it holds rows without a measurement")
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
