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
    """Write the rows of a run as CSV, as in ``rows.csv``.

    Args:
        directory: Directory of a run.
        file: Replaced at once, when all rows are written.

    Raises:
        As :func:`rft_fast.results.load`.
    """
    with disk.replacing(file) as temporary:
        write_rows(temporary, stored(pathlib.Path(directory)))


def write_parquet(directory: str | os.PathLike[str], file: pathlib.Path) -> None:
    """Write the rows of a run as Parquet, with their types; a measured NaN stays NaN.

    Args:
        directory: Directory of a run.
        file: Replaced at once, when all rows are written.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        As :func:`rft_fast.results.load`.
    """
    import pyarrow  # optional
    import pyarrow.parquet

    # Only the types come from pandas, which would write NaN as missing.
    schema = pyarrow.Schema.from_pandas(frame(()), preserve_index=False)
    with disk.replacing(file) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for some in batches(stored(pathlib.Path(directory)), 50_000):
            rows = [records.values(row) for row in some]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def write_rows(file: pathlib.Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write stored rows as CSV: missing values are empty, NaN is ``nan``, and no text is a formula."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(map(words.cell, records.values(row).values()) for row in rows)
