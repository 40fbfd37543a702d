"""The table that all studies share: its columns, and rows as a DataFrame."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

import pandas as pd

from ..common.numeric import as_number as as_number
from ..common.numeric import ascending as ascending
from ..common.words import some
from .images import ImageScores, Kept

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores, Walk

Row = dict[str, object]
# Called with the number and the rows of each measurement as soon as it is made. The arguments of a study
# alone decide how its measurements are numbered (from 0), so any of them can be made at any time, anywhere,
# and combined.
Sink = Callable[[int, list[Row]], object]

# Column -> pandas dtype. A study fills what it measures; the rest is missing. columns.py describes each.
COLUMNS: dict[str, str] = {
    "study": "string",
    "model": "string",
    "dataset": "string",
    "ood": "boolean",  # whether the data set is out of distribution for the fine-tuned models
    "partners": "string",  # models that it is combined with: the other end of a path, the members of a soup
    # What was written.
    "layer": "string",  # the layer that differs from the others; several: joined by ", "; missing: all layers
    "others": "string",  # end of the other layers: zeroshot or finetuned; missing: at alpha, too
    "cumulative": "string",  # layers that move with it: those before (first) or behind (last); missing: none
    "reference": "string",  # what instability is measured from: own or models; missing: own
    "alpha": "float64",
    "rho": "float64",
    "on": "string",
    "noise": "string",
    "adaptive": "boolean",
    "keep": "float64",
    "method": "string",  # replacement of pruned weights: zero, zeroshot, rescale, magnitude
    "criterion": "string",  # choice of the pruned layers: sharpness, instability, named
    "coefficients": "string",  # name of the table of coefficients; missing: 1 for all layers
    "control": "boolean",  # whether as many other layers, chosen at random, were pruned instead
    # How it was measured.
    "estimator": "string",
    "asked": "string",  # the estimator that was requested, such as auto
    "excluded": "string",  # layers that were not perturbed, joined by ", "
    "noise_alike": "string",  # parameters whose noise images share, though others have noise per image
    "noise_batch": "Int64",  # images per draw of noise; missing: one draw for all images
    "normalized": "boolean",  # whether logits were normalised before the loss
    "seed": "Int64",
    "draws": "Int64",  # draws of noise; for the worst case, steps
    "restarts": "Int64",  # starts of each search for the worst case
    "samples": "Int64",
    "skipped": "Int64",  # unreadable images that were left out
    "nonfinite": "Int64",  # losses that were NaN or infinite; the means include them
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
    "bump": "float64",  # L(alpha) - [(1 - alpha) L(0) + alpha L(1)], paired over samples
    "bump_se": "float64",
    "entropy": "float64",  # of the predictions, mean over images
    "distance": "float64",  # of the weights from zero-shot, Euclidean
    "change": "float64",  # A(pruned) - A(unpruned) at the same alpha, paired over samples
    "change_se": "float64",
    "change_loss": "float64",  # L minus that of the plain path at the same alpha, paired over samples
    "change_loss_se": "float64",
    "sharpness": "float64",
    "sharpness_se": "float64",  # over draws, for these images
    "sharpness_df": "float64",  # degrees of freedom of sharpness_se
    "sharpness_se_images": "float64",  # over images, for these draws
    "sharpness_change": "float64",  # sharpness less that at alpha = 0, paired over draws
    "sharpness_change_se": "float64",
    "sharpness_change_df": "float64",
    "saturated": "boolean",  # whether the perturbed model answers at chance; missing: unknown
    "reached": "boolean",  # whether the draws for the requested standard error were made
    "precision": "string",
    "seconds": "float64",
}

# Upper bound of seeds: integers of the table and the database are signed and have 64 bits.
SEEDS = 2**63


def check_table(rows: object, caller: str) -> None:
    """Raise TypeError unless ``rows`` is a table of rows."""
    if not isinstance(rows, pd.DataFrame) or "study" not in rows:
        raise TypeError(
            f"{caller}: expected a DataFrame with the columns of rft_fast.studies.COLUMNS, as the studies "
            f"and rft_fast.results.load return; got {type(rows).__name__}"
        )


def of_study(rows: pd.DataFrame, study: str, caller: str) -> pd.DataFrame:
    """Select the rows of one study.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no rows of this study.
    """
    check_table(rows, caller)
    rows = rows[rows["study"] == study]
    if rows.empty:
        raise ValueError(f"{caller}: expected rows of the study {study!r}, got none")
    return rows


def asked(rows: pd.DataFrame) -> pd.Series:
    """The estimator that each row was asked for: what keeps the rows of one request together.

    ``auto`` chooses among estimators of the same expectation. Rows of earlier versions name what they used.
    """
    return rows["asked"].fillna(rows["estimator"])


def complete(row: Mapping[str, object]) -> Row:
    """Return the row with every column of :data:`COLUMNS`, in order; ``None`` where it has no value.

    Raises:
        ValueError: a name is not a column.
    """
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"row: expected columns among {list(COLUMNS)}, got {unknown}")
    return {name: row.get(name) for name in COLUMNS}


def frame(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Convert rows to a DataFrame with the columns and dtypes of :data:`COLUMNS`.

    Raises:
        ValueError: a name is not a column.
    """
    table = [complete(row) for row in rows]
    return pd.DataFrame(
        {name: pd.Series([row[name] for row in table], dtype=kind) for name, kind in COLUMNS.items()}
    )


class Measured:
    """The rows of a study, collected while its measurements are made.

    Args:
        study: name of the study, for messages.
        count: number of measurements in the study.
        only: numbers of the measurements to make; None: all.
        sink: called with the number and the rows of each measurement.
        images: receives the results of single images, before the sink is called; None: they are not kept.

    Raises:
        TypeError: ``only`` does not hold integers.
        ValueError: a number outside 0 to ``count - 1``.
    """

    def __init__(
        self,
        study: str,
        count: int,
        only: Collection[int] | None,
        sink: Sink | None,
        images: Kept | None = None,
    ) -> None:
        if isinstance(only, str) or not isinstance(only, Iterable | None):
            raise TypeError(f"{study}: only: expected numbers of measurements, got {only!r}")
        self._only = range(count) if only is None else frozenset(only)
        if wrong := [number for number in self._only if not isinstance(number, Integral)]:
            raise TypeError(f"{study}: only: measurements have whole numbers; got {wrong}")
        if outside := sorted(number for number in self._only if not 0 <= number < count):
            raise ValueError(
                f"{study}: only: measurements are numbered from 0 to {count - 1}; got {some(outside, 4)}"
            )
        self._sink, self._images = sink, images
        self._rows: dict[int, list[Row]] = {}

    def wants(self, number: int) -> bool:
        """Whether this measurement has to be made."""
        return number in self._only

    def add(self, number: int, rows: Iterable[Mapping[str, object]], scores: Iterable[Scores] = ()) -> None:
        """Record a finished measurement and pass it to the sink.

        Args:
            number: its number.
            rows: its rows.
            scores: the scores of each row, for a study that keeps results of single images.
        """
        self._rows[number] = [complete(row) for row in rows]
        if self._images is not None:
            self._images[number] = [ImageScores.of(each) for each in scores]
        if self._sink is not None:
            self._sink(number, self._rows[number])

    def frame(self) -> pd.DataFrame:
        """Return all rows, ordered by measurement number."""
        return frame(row for number in sorted(self._rows) for row in self._rows[number])


T = TypeVar("T")

AT_ONCE = 8  # layers measured together where the images come in several pieces


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split a sequence into pieces of at most ``size`` items."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def walk_to(walk: Walk, stage: int) -> None:
    """Advance a walk to just before ``stage``, through every stage in between.

    Activations kept at a stage may have another memory layout than those passed straight on, and therefore
    round differently. Stopping at every stage makes the bits independent of which layers were measured
    before.
    """
    for station in range(walk.stage + 1, stage + 1):
        walk.advance(station)


def only_one(scores: Mapping[str, Scores]) -> Scores:
    """Return the scores on the only data set."""
    (score,) = scores.values()
    return score


def scored(
    study: str, evaluator: Evaluator, dataset: str, scores: Mapping[str, Scores], seconds: float
) -> dict[str, object]:
    """The columns that every row of scores has.

    ``seconds`` is divided among the data sets of ``scores`` in proportion to their samples.
    """
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
