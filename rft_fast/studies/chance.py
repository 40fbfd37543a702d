"""Zero-shot accuracy compared with chance: near chance, labels or architecture are usually wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from scipy.special import betaincinv

from ..common.words import some
from .rows import of_study

Verdict = Literal["above", "near", "below", "unknown"]

AMONG = "scored among"  # key in a run's configuration: data set -> number of classes it is scored among


@dataclass(frozen=True)
class Chance:
    """The accuracy of a zero-shot end on one data set, compared with chance.

    Attributes:
        dataset: name of the data set.
        models: models whose path begins at this end; empty if all do.
        accuracy: fraction of ``samples`` that is correct.
        samples: number of images.
        classes: number of classes among which the images are scored.
        low: lower end of the exact (Clopper-Pearson) 95 % interval of the accuracy.
        high: upper end of that interval.
    """

    dataset: str
    models: tuple[str, ...]
    accuracy: float
    samples: int
    classes: int
    low: float
    high: float

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the classes, a fraction."""
        return 1 / self.classes

    @property
    def verdict(self) -> Verdict:
        """Position of the interval relative to chance; "unknown" for a single image or a single class."""
        if self.samples == 1 or self.classes == 1:
            return "unknown"
        return "below" if self.high < self.chance else "near" if self.low <= self.chance else "above"

    @property
    def text(self) -> str:
        """A warning in words; empty if the accuracy is above chance."""
        if self.verdict == "above":
            return ""
        of = f" of {some(self.models, 3)}" if self.models else ""
        if self.verdict == "unknown":
            what = "only one image is scored" if self.samples == 1 else "it is scored among one class"
            return f"On {self.dataset}, {what}: its accuracies support no conclusion."
        accuracy, low, high = (f"{100 * value:.1f}" for value in (self.accuracy, self.low, self.high))
        return (
            f"On {self.dataset}, the zero-shot end{of} is {self.verdict} chance: {accuracy} % of "
            f"{self.samples:,} images [95 % interval {low}, {high}]; chance is {100 * self.chance:.3g} % "
            f"({self.classes:,} classes). Are labels in the head's order, is the architecture right?"
        )


def among(config: Mapping[str, Any]) -> dict[str, int]:
    """Read from a run's configuration how many classes each data set is scored among.

    Earlier versions recorded the number only where it was not that of all the head's classes.

    Returns:
        Data set -> number of classes, as far as the configuration records it.
    """
    known = {name: data.get("classes") for name, data in config.get("data", {}).items()}
    return {name: count for name, count in {**known, **config.get(AMONG, {})}.items() if count is not None}


def against_chance(row: Mapping[str, Any], classes: int, models: tuple[str, ...] = ()) -> Chance:
    """Compare one row of an interpolation at alpha = 0 with chance.

    Args:
        row: a mapping with ``dataset``, ``accuracy`` (a fraction) and ``samples``.
        classes: number of classes among which the data set is scored.
        models: models that the row belongs to; empty for all.
    """
    accuracy, samples = float(row["accuracy"]), int(row["samples"])
    right = round(accuracy * samples)
    low = float(betaincinv(right, samples - right + 1, 0.025)) if right else 0.0
    high = float(betaincinv(right + 1, samples - right, 0.975)) if right < samples else 1.0
    return Chance(str(row["dataset"]), models, accuracy, samples, classes, low, high)


def zeroshot_chances(rows: pd.DataFrame, classes: Mapping[str, int]) -> list[Chance]:
    """Compare the zero-shot end with chance on each data set.

    Args:
        rows: rows of :func:`rft_fast.studies.interpolation`; rows of other studies are ignored.
        classes: data set -> number of classes among which it is scored; other data sets are left out.

    Returns:
        One :class:`Chance` per data set, or one per distinct accuracy where models have different zero-shot
        ends.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: ``rows`` has none of an interpolation.
    """
    part = of_study(rows, "interpolation", "zeroshot_chances")
    part = part[(part["alpha"] == 0) & part["dataset"].isin(list(classes))]
    found = []
    for dataset, group in part.groupby("dataset", sort=False):
        ends = list(group.groupby(["accuracy", "samples"], sort=False))
        for _, end in ends:
            models = tuple(end["model"]) if len(ends) > 1 else ()
            found.append(against_chance(end.iloc[0].to_dict(), classes[str(dataset)], models))
    return found
