"""Numbers, rows and errors as text and as JSON values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from tqdm.utils import disp_len, disp_trim

from ...common.words import duration, visible


def percent(fraction: float | None) -> str:
    """Format a fraction, rounded down (up to rounding errors), so that 100 % means complete."""
    return "? %" if fraction is None else f"{math.floor(100 * fraction + 1e-9)} %"


def time_left(seconds: float | None) -> str:
    """Format a remaining time."""
    return "? left" if seconds is None else f"{duration(seconds)} left"


def counted(count: int, what: str) -> str:
    """Format a count with its noun, in the plural if need be."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def one_line(study: str, model: str, rest: str, width: int | None = None) -> str:
    """Join the parts in one line, shortening the middle of the model's name to fit ``width`` columns."""

    def joined(model: str) -> str:
        return plain("  ".join(part for part in (study, model, rest) if part))

    short, kept = model, len(model)
    while width is not None and disp_len(joined(short)) > width and short:
        kept -= 1
        short = f"{model[: (kept + 1) // 2]}...{model[len(model) - kept // 2 :]}" if kept > 0 else ""
    line = joined(short)
    return line if width is None else str(disp_trim(line, width))


def plain(text: str) -> str:
    """Return the text as one line without control characters."""
    return visible(re.sub(r"[^\S ]+", " ", text.strip()))


def rounded(seconds: float | None) -> float | None:
    """Round to milliseconds."""
    return None if seconds is None else round(seconds, 3)


def described(error: BaseException) -> str:
    """Format an error with its class."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def outcome_of(error: BaseException | None) -> str:
    """Return the outcome of a run that ended with this error, or without one."""
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {described(error)}"


def json_row(row: Mapping[str, object]) -> dict[str, object]:
    """Convert a row to strict JSON: without missing values, and with text for numbers that are not finite."""
    return {
        name: _json_value(value) for name, value in row.items() if value is not None and value is not pd.NA
    }


def _json_value(value: Any) -> object:
    if hasattr(value, "item"):  # numpy's and torch's numbers
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if isinstance(value, bool | int | str) else str(value)
