"""Results of single images in a run's database, read by SQL and bit by bit."""

from __future__ import annotations

import math
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

Key = tuple[str, str, int, int]  # study, model, measurement, row
Found = tuple[list[bool], list[float], list[int] | None]


def images_of(out: Path) -> dict[Key, Found]:
    """Hits, losses and predictions of each row of a run."""
    query = """SELECT m.study, m.model, number, place, hits, losses, predictions FROM images
        JOIN measurements AS m ON m.id = images.measurement"""
    found: dict[Key, Found] = {}
    with closing(sqlite3.connect(out / "rows.sqlite")) as base:
        for *key, hits, losses, predictions in base.execute(query):
            count = len(losses) // 2
            bits = "".join(f"{byte:08b}" for byte in hits)
            assert len(bits) - count in range(8) and set(bits[count:]) <= {"0"}
            classes = None if predictions is None else list(struct.unpack(f"<{count}H", predictions))
            numbers = list(struct.unpack(f"<{count}e", losses))
            found[tuple(key)] = ([bit == "1" for bit in bits[:count]], numbers, classes)
    return found


def check_images(out: Path) -> dict[Key, Found]:
    """Check that rows of studies that keep them, and no others, are the means of results of images."""
    query = """SELECT m.study, m.model, number, samples, accuracy, loss FROM rows
        JOIN measurements AS m ON m.id = rows.measurement ORDER BY rows.rowid"""
    with closing(sqlite3.connect(out / "rows.sqlite")) as base:
        rows = base.execute(query).fetchall()
    found = images_of(out)
    places: dict[tuple[str, str, int], int] = {}
    for study, model, number, samples, accuracy, loss in rows:
        if study not in ("interpolation", "layers", "prune"):
            continue
        place = places.get((study, model, number), -1) + 1
        places[study, model, number] = place
        hits, losses, predictions = found[study, model, number, place]
        assert len(hits) == samples and sum(hits) / samples == accuracy
        assert abs(math.fsum(losses) / samples - loss) <= abs(loss) * 2**-11 + 2**-25
        assert predictions is not None and len(predictions) == samples
    assert len(found) == sum(place + 1 for place in places.values()) > 0
    return found
