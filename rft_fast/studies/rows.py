"""The one table that every study fills: its columns, and rows as a DataFrame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores

Sink = Callable[[dict[str, object]], object]
Progress = Callable[[int], object]

STUDIES = ("interpolation", "layers", "sharpness", "layer-sharpness", "prune", "correlation")

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
