"""Saturation: a perturbed model that answers at chance has a sharpness that says nothing about flatness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

_NUMBERS = ("accuracy", "loss", "sharpness", "samples", "draws")


def saturated(row: Mapping[str, Any], classes: int | None) -> bool | None:
    """Decide whether the perturbed model of one row answers at chance; for the arguments, see :func:`flags`.

    Returns:
        None if it is unknown.
    """
    if (stated := row.get("saturated")) is not None:
        return bool(stated)
    numbers = [math.nan if row.get(name) is None else float(row[name]) for name in _NUMBERS]
    among = math.nan if classes is None else float(classes)
    found, unknown = _decided([np.asarray(x) for x in numbers], np.asarray(among))
    return None if unknown or row.get("estimator") == "hessian" else bool(found)


def flags(rows: pd.DataFrame, classes: Mapping[str, int]) -> pd.Series:
    """Decide whether the perturbed models of rows of sharpness answer at chance.

    One does if its accuracy lies within two standard errors of 1 / classes (binomial, over the images), or if
    its loss is at least ln(classes) and that of the clean model, ``loss - sharpness``, is below. Few images
    cannot show chance: within two standard errors of its own accuracy, a model halfway between chance and 1
    would answer as often right. There only the loss decides.

    Args:
        rows: rows of a sharpness. What they say in ``saturated`` is taken as it is; the others (of earlier
            versions) are decided by ``estimator``, ``draws``, ``samples``, ``accuracy``, ``loss`` and
            ``sharpness``.
        classes: data set -> number of classes that its images are scored among, as far as known.

    Returns:
        Truth values, with the index of the rows: missing where it is unknown, as without the number of
        classes, where few images show no chance, and for the Hessian estimator, which perturbs no model;
        false where nothing is perturbed.
    """
    among = rows["dataset"].map(dict(classes)).to_numpy(dtype=float, na_value=np.nan)
    numbers = (rows[name].to_numpy(dtype=float, na_value=np.nan) for name in _NUMBERS)
    found, unknown = _decided(list(numbers), among)
    unknown |= (rows["estimator"] == "hessian").to_numpy(dtype=bool, na_value=False)
    decided = pd.Series(found, index=rows.index, dtype="boolean").mask(unknown)
    return rows["saturated"].astype("boolean").fillna(decided) if "saturated" in rows else decided


def _decided(numbers: Sequence[np.ndarray], among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each model answers at chance, and where that is unknown. among: numbers of classes."""
    accuracy, loss, sharpness, samples, draws = numbers
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = 1 / among
        error = np.sqrt(chance * (1 - chance) / samples)
        least = np.log(among)
        guesses = np.abs(accuracy - chance) <= 2 * error
        lost = (loss >= least) & (loss - sharpness < least)
        useful = (1 + chance) / 2
        few = chance + 2 * error >= useful - 2 * np.sqrt(useful * (1 - useful) / samples)
    unknown = np.isnan([accuracy, loss, sharpness, samples, among]).any(0) | (among < 2)
    unknown |= guesses & few & ~lost & (draws != 0)
    return (guesses | lost) & (draws != 0), unknown
