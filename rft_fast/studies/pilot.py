"""``--rhos auto``: the rho at which the median model's general sharpness is a tenth of a nat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from .rows import of_study

STUDY = "pilot"
TARGET = 0.1  # nats
GRID = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0)  # what is measured first
STEPS = 6  # bisections of one interval of the grid: to a ratio of 1.02


class NoCrossing(Exception):
    """No rho of the grid lies below the target, or none above it."""


@dataclass(frozen=True)
class Search:
    """State of the search for rho.

    Attributes:
        rho: the next one to measure, or the result.
        found: whether it is the result.
    """

    rho: float
    found: bool = False


def search(medians: Mapping[float, float]) -> Search:
    """Find the next rho to measure by what was measured, or the result.

    The first interval of :data:`GRID` whose ends lie below and not below :data:`TARGET` is bisected on log
    rho, :data:`STEPS` times. The result is the end of the last interval whose sharpness is nearer to the
    target, as a ratio. Each rho has three significant digits.

    Args:
        medians: rho -> median sharpness in nats; of the whole grid, and of later steps.

    Raises:
        NoCrossing: there is no such interval.
    """
    ends = [pair for pair in pairwise(GRID) if medians[pair[0]] < TARGET and not medians[pair[1]] < TARGET]
    if not ends:
        raise NoCrossing(", ".join(f"{medians[rho]:.2g} at rho = {rho:g}" for rho in GRID))
    low, high = ends[0]
    for _ in range(STEPS):
        middle = float(f"{(low * high) ** 0.5:.3g}")
        if middle not in medians:
            return Search(middle)
        low, high = (middle, high) if medians[middle] < TARGET else (low, middle)
    return Search(min((low, high), key=lambda rho: _ratio(medians[rho])), found=True)


def _ratio(value: float) -> float:
    return max(value / TARGET, TARGET / value) if 0 < value < np.inf else np.inf


def by_model(rows: pd.DataFrame, models: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the sharpness of the pilot in nats: models by rhos, means over data sets.

    Args:
        rows: rows of a run.
        models: models that a rho needs; rhos without one of them are left out. None: those of the rows.

    Raises:
        ValueError: there are no rows of the pilot.
    """
    own = of_study(rows, STUDY, STUDY)
    # A mean that is not finite is above any target.
    table = own.assign(sharpness=own["sharpness"].fillna(np.inf)).pivot_table(
        index="model", columns="rho", values="sharpness", aggfunc="mean", sort=False
    )
    table = table.reindex(list(table.index if models is None else models))
    return table.dropna(axis=1).sort_index(axis=1)


def progress(rows: pd.DataFrame, models: Sequence[str]) -> Search:
    """Return the state of the search in the rows of a run; before the grid is complete, its first rho.

    Raises:
        NoCrossing: the median of these models does not cross the target within the grid.
    """
    if not (rows["study"] == STUDY).any():
        return Search(GRID[0])
    table = by_model(rows, models)
    if not set(GRID) <= set(table.columns):
        return Search(GRID[0])
    medians: dict[float, float] = table.median().to_dict()
    try:
        return search(medians)
    except NoCrossing as error:
        first = rows[rows["study"] == STUDY].iloc[0]
        raise NoCrossing(
            f"--rhos auto: expected a rho from {GRID[0]:g} to {GRID[-1]:g} at which the median "
            f"sharpness of {len(models)} models at alpha = {first['alpha']:g} on "
            f"{first['dataset']} exceeds {TARGET:g} nats; the medians are {error}. Name rhos "
            "instead, such as --rhos 0.1 1, or look at the rows of the study pilot"
        ) from None
