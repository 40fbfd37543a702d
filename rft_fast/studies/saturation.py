"""Saturation: a perturbed model that answers at chance has a sharpness that says nothing of flatness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def saturated(row: Mapping[str, Any], classes: int | None) -> bool | None:
    """Decide whether the perturbed model of one row answers at chance; for the arguments, see :func:`flags`.

    Returns:
        None if it is unknown.
    """
    found = flags(
        pd.DataFrame([{"dataset": "", **row}]), {} if classes is None else {row["dataset"]: classes}
    )
    return None if pd.isna(found.iloc[0]) else bool(found.iloc[0])


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
    numbers = (
        rows[name].to_numpy(dtype=float, na_value=np.nan)
        for name in ("accuracy", "loss", "sharpness", "samples", "draws")
    )
    accuracy, loss, sharpness, samples, draws = numbers
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = 1 / among
        error = np.sqrt(chance * (1 - chance) / samples)
        least = np.log(among)
        guesses = np.abs(accuracy - chance) <= 2 * error
        lost = (loss >= least) & (loss - sharpness < least)
        useful = (1 + chance) / 2
        few = chance + 2 * error >= useful - 2 * np.sqrt(useful * (1 - useful) / samples)
    found = guesses | lost
    unknown = np.isnan([accuracy, loss, sharpness, samples, among]).any(0) | (among < 2)
    unknown |= guesses & few & ~lost & (draws != 0)
    unknown |= (rows["estimator"] == "hessian").to_numpy(dtype=bool, na_value=False)
    decided = pd.Series(found & (draws != 0), index=rows.index, dtype="boolean").mask(unknown)
    return rows["saturated"].astype("boolean").fillna(decided) if "saturated" in rows else decided
