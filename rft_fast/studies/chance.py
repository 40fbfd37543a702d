"""Is the zero-shot end better than guessing? Where it is not, labels or architecture are seldom right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from scipy.special import betaincinv

from ..common.words import some
from .rows import of_study

Verdict = Literal["above", "near", "below", "unknown"]

AMONG = "scored among"  # an entry of a run's configuration: data set -> how many classes it is scored among


@dataclass(frozen=True)
class Chance:
    """The accuracy of a zero-shot end on a data set, against that of guessing.

    dataset: its name. models: those whose path begins there; empty where it is that of all. accuracy: a
    fraction of the ``samples`` images. classes: how many they are scored among. low, high: the exact
    (Clopper-Pearson) 95 % interval of the accuracy.
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
        """The accuracy of guessing among the classes, a fraction."""
        return 1 / self.classes

    @property
    def verdict(self) -> Verdict:
        """Where the interval lies; "unknown": one image, or one class, of which nothing can be concluded."""
        if self.samples == 1 or self.classes == 1:
            return "unknown"
        return "below" if self.high < self.chance else "near" if self.low <= self.chance else "above"

    @property
    def text(self) -> str:
        """What to say of it; empty where the end is better than guessing."""
        if self.verdict == "above":
            return ""
        of = f" of {some(self.models, 3)}" if self.models else ""
        if self.verdict == "unknown":
            what = "only one image is scored" if self.samples == 1 else "it is scored among one class"
            return f"On {self.dataset}, {what}: nothing can be concluded from its accuracies."
        accuracy, low, high = (f"{100 * value:.1f}" for value in (self.accuracy, self.low, self.high))
        return (
            f"On {self.dataset}, the zero-shot end{of} is {self.verdict} chance: {accuracy} % of "
            f"{self.samples:,} images [95 % interval {low}, {high}]; chance is {100 * self.chance:.3g} % "
            f"({self.classes:,} classes). Are labels in the head's order, is the architecture right?"
        )


def among(config: Mapping[str, Any]) -> dict[str, int]:
    """Data set -> how many classes it is scored among, as far as a run's configuration says so.

    Those of earlier versions do where these are not all of the head's.
    """
    known = {name: data.get("classes") for name, data in config.get("data", {}).items()}
    return {name: count for name, count in {**known, **config.get(AMONG, {})}.items() if count is not None}


def against_chance(row: Mapping[str, Any], classes: int, models: tuple[str, ...] = ()) -> Chance:
    """A row of the interpolation at alpha = 0, against guessing.

    Args:
        row: with ``dataset``, ``accuracy`` and ``samples``.
        classes: how many the data set is scored among.
        models: those that it is of; empty for all.
    """
    accuracy, samples = float(row["accuracy"]), int(row["samples"])
    right = round(accuracy * samples)
    low = float(betaincinv(right, samples - right + 1, 0.025)) if right else 0.0
    high = float(betaincinv(right + 1, samples - right, 0.975)) if right < samples else 1.0
    return Chance(str(row["dataset"]), models, accuracy, samples, classes, low, high)


def zeroshot_chances(rows: pd.DataFrame, classes: Mapping[str, int]) -> list[Chance]:
    """The zero-shot end on each data set, against guessing.

    Args:
        rows: of :func:`rft_fast.studies.interpolation`; rows of other studies among them are left aside.
        classes: data set -> how many classes it is scored among; sets that are not in it are left out.

    Returns:
        One for each data set; where models have zero-shot ends of their own, one for each accuracy.

    Raises:
        TypeError, ValueError: no table of rows, or none of an interpolation.
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
