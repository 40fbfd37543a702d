"""A run's rows as CSV and Parquet."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from ..common import disk, words
from ..studies.rows import COLUMNS
from . import records
from .loading import batches, frame, stored


def write_csv(directory: str | os.PathLike[str], file: pathlib.Path) -> None:
    """Writes the rows that :func:`load` reads as ``rows.csv`` has them. Raises as that does."""
    with disk.replacing(file) as temporary:
        write_rows(temporary, stored(pathlib.Path(directory)))


def write_parquet(directory: str | os.PathLike[str], file: pathlib.Path) -> None:
    """Writes the rows that :func:`load` reads as Parquet, with their types; a measured NaN stays one.

    Raises ModuleNotFoundError without pyarrow, else as :func:`load` does.
    """
    import pyarrow  # only some have it
    import pyarrow.parquet

    # pandas would write NaN as missing: it takes only the types from there.
    schema = pyarrow.Schema.from_pandas(frame(()), preserve_index=False)
    with disk.replacing(file) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for some in batches(stored(pathlib.Path(directory)), 50_000):
            rows = [records.values(row) for row in some]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def write_rows(file: pathlib.Path, rows: Iterable[Sequence[Any]]) -> None:
    """Stored rows as CSV: a missing value is empty, a NaN is ``nan``. No text is a formula."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(map(words.cell, records.values(row).values()) for row in rows)
