"""The one table that every study fills: its columns, and rows as a DataFrame."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

import pandas as pd

from ..common.numeric import as_number as as_number
from ..common.numeric import ascending as ascending
from ..common.words import some
from ..names import STUDIES as STUDIES

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores, Walk

Row = dict[str, object]
# What is called with each measurement as soon as it is made: its number, and its rows. A study's
# measurements of a model are numbered from 0 in an order that its arguments alone decide, so that any of
# them can be made at any time, anywhere, and put together.
Sink = Callable[[int, list[Row]], object]

# Column -> pandas type. Every study fills what it measures; the rest is missing. Losses and what is
# made of them are in nats; accuracies and what is made of them are fractions. <name>_se is the
# standard error of <name>.
COLUMNS: dict[str, str] = {
    "study": "string",
    "model": "string",
    "dataset": "string",
    "ood": "boolean",  # is the data set out of distribution for the fine-tuned models?
    # What was written.
    "layer": "string",  # the layer that differs from the rest; several: joined by ", "; missing: all
    "others": "string",  # where the other layers are: zeroshot or finetuned; missing: on the path, too
    "alpha": "float64",
    "rho": "float64",
    "on": "string",
    "noise": "string",
    "adaptive": "boolean",
    "keep": "float64",
    "method": "string",  # what became of pruned weights: zero, zeroshot, rescale, magnitude
    "criterion": "string",  # how the pruned layers were chosen: sharpness, instability, named
    "control": "boolean",  # were they replaced by as many others, at random?
    # How it was measured.
    "estimator": "string",
    "noise_batch": "Int64",  # noise anew for every so many images; missing: one draw for all
    "normalized": "boolean",  # were the logits normalised before the loss?
    "seed": "Int64",
    "draws": "Int64",  # of noise; of the worst case: steps
    "samples": "Int64",
    "skipped": "Int64",  # images that could not be read, and were left out
    "nonfinite": "Int64",  # how many losses were NaN or infinite; they are in the means
    # What came out.
    "loss": "float64",
    "loss_se": "float64",
    "accuracy": "float64",
    "accuracy_se": "float64",
    "gain": "float64",  # A(alpha) - A(0), paired over samples
    "gain_se": "float64",
    "rise": "float64",  # L(alpha) - L(0), paired over samples
    "rise_se": "float64",
    "instability": "float64",  # L(alpha) - (L(0) + L(1)) / 2, paired over samples
    "instability_se": "float64",
    "instability_accuracy": "float64",  # (A(0) + A(1)) / 2 - A(alpha), paired over samples
    "instability_accuracy_se": "float64",
    "change": "float64",  # A(pruned) - A(unpruned) at the same alpha, paired over samples
    "change_se": "float64",
    "sharpness": "float64",
    "sharpness_se": "float64",
    "reached": "boolean",  # was the wanted standard error reached? missing: none was wanted
    "precision": "string",
    "seconds": "float64",
}

# Seeds that rows can hold: integers of the table, and of the database, are signed and have 64 bits.
SEEDS = 2**63


def check_table(rows: object, caller: str) -> None:
    """Raises TypeError for what is no table of rows."""
    if not isinstance(rows, pd.DataFrame) or "study" not in rows:
        raise TypeError(
            f"{caller}: expected a DataFrame with the columns of rft_fast.studies.COLUMNS, as the studies "
            f"and rft_fast.results.load return; got {type(rows).__name__}"
        )


def of_study(rows: pd.DataFrame, study: str, caller: str) -> pd.DataFrame:
    """The rows of one study. Raises TypeError for what is no table of rows, ValueError without any."""
    check_table(rows, caller)
    rows = rows[rows["study"] == study]
    if rows.empty:
        raise ValueError(f"{caller}: expected rows of the study {study!r}, got none")
    return rows


def complete(row: Mapping[str, object]) -> Row:
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


class Measured:
    """The rows of a study, as its measurements are made.

    count: how many measurements there are. only: numbers of those to make; None: all. sink: told of each.

    Raises ValueError for numbers that there are none of.
    """

    def __init__(self, study: str, count: int, only: Collection[int] | None, sink: Sink | None) -> None:
        if isinstance(only, str) or not isinstance(only, Iterable | None):
            raise TypeError(f"{study}: only: expected numbers of measurements, got {only!r}")
        self._only = range(count) if only is None else frozenset(only)
        if wrong := [number for number in self._only if not isinstance(number, Integral)]:
            raise TypeError(f"{study}: only: measurements have whole numbers; got {wrong}")
        if outside := sorted(number for number in self._only if not 0 <= number < count):
            raise ValueError(
                f"{study}: only: measurements are numbered from 0 to {count - 1}; got {some(outside, 4)}"
            )
        self._sink = sink
        self._rows: dict[int, list[Row]] = {}

    def wants(self, number: int) -> bool:
        """Whether this one is to be made."""
        return number in self._only

    def add(self, number: int, rows: Iterable[Mapping[str, object]]) -> None:
        """A measurement that was made."""
        self._rows[number] = [complete(row) for row in rows]
        if self._sink is not None:
            self._sink(number, self._rows[number])

    def frame(self) -> pd.DataFrame:
        """All rows, in the order of the measurements' numbers."""
        return frame(row for number in sorted(self._rows) for row in self._rows[number])


T = TypeVar("T")

AT_ONCE = 8  # layers that are finished together where the images come in several pieces


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items, so many at a time."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def walk_to(walk: Walk, stage: int) -> None:
    """Takes a walk on to before this station, by way of all that lie between.

    What is held there may be laid out in memory otherwise than what goes on at once, and that rounds
    otherwise: without this, the bits would depend on which layers were measured before.
    """
    for station in range(walk.stage + 1, stage + 1):
        walk.advance(station)


def only_one(scores: Mapping[str, Scores]) -> Scores:
    """The scores on the one data set that there is."""
    (score,) = scores.values()
    return score


def scored(
    study: str, evaluator: Evaluator, dataset: str, scores: Mapping[str, Scores], seconds: float
) -> dict[str, object]:
    """What every row says of scores on a data set; its share of the seconds is by samples."""
    score = scores[dataset]
    (data,) = (data for data in evaluator.datasets if data.name == dataset)
    return {
        "study": study,
        "dataset": dataset,
        "ood": data.ood,
        "skipped": data.skipped,
        "normalized": evaluator.normalize_logits,
        "samples": score.samples,
        "nonfinite": score.nonfinite,
        "loss": score.loss,
        "loss_se": score.loss_se,
        "accuracy": score.accuracy,
        "accuracy_se": score.accuracy_se,
        "precision": evaluator.precision,
        "seconds": seconds * score.samples / sum(other.samples for other in scores.values()),
    }
