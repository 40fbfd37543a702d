"""The one table that every study fills: its columns, and rows as a DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

# Column -> pandas type. Every study fills what it measures; the rest is missing.
COLUMNS: dict[str, str] = {
    "study": "string",
    "model": "string",
    "dataset": "string",
    "ood": "boolean",  # is the data set out of distribution for the fine-tuned models?
    "layer": "string",  # missing: the whole model
    "alpha": "float64",
    "rho": "float64",
    "keep": "float64",
    "on": "string",
    "noise": "string",
    "seed": "Int64",
    "draws": "Int64",
    "samples": "Int64",
    "loss": "float64",
    "loss_se": "float64",
    "accuracy": "float64",  # a fraction, as are its standard error and the gain
    "accuracy_se": "float64",
    "gain": "float64",  # A(alpha) - A(0)
    "gain_se": "float64",  # paired over samples
    "rise": "float64",  # L(alpha) - L(0)
    "rise_se": "float64",  # paired over samples
    "sharpness": "float64",
    "sharpness_se": "float64",
    "precision": "string",
    "seconds": "float64",
}


def complete(row: Mapping[str, object]) -> dict[str, object]:
    """The row with every column of :data:`COLUMNS` in order, ``None`` where it has no value.

    Raises:
        ValueError: a name that is no column.
    """
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"row: expected columns among {list(COLUMNS)}, got {unknown}")
    return {name: row.get(name) for name in COLUMNS}


def frame(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Rows as a DataFrame with the columns and types of :data:`COLUMNS`.

    Raises:
        ValueError: a name that is no column.
    """
    table = [complete(row) for row in rows]
    return pd.DataFrame(
        {name: pd.Series([row[name] for row in table], dtype=kind) for name, kind in COLUMNS.items()}
    )
