"""Inputs and outputs of the estimators, and the standard errors that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import stdtrit  # quantiles of Student's t; scipy.stats takes ten times as long to load
from torch import Tensor

from ...names import WORST_CASE, Estimator
from ..rows import only_one
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Weight

PILOT = 20
"""Draws times parts of a pilot, which decides on the estimator (``auto``)."""
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Target:
    """What is perturbed: one layer, or many.

    Attributes:
        layer: name of the layer; None: all layers but the excluded ones.
        stage: first stage of a walk that reads it.
        last: last stage that does.
        excluded: names of layers that stay as they are, if ``layer`` is None.
        others: names of the layers that are perturbed then; None: all.
    """

    layer: str | None
    stage: int
    last: int
    excluded: tuple[str, ...] = ()
    others: tuple[str, ...] | None = None

    @property
    def layers(self) -> list[str] | None:
        """The layers as :meth:`rft_fast.Path.write` takes them."""
        if self.layer is not None:
            return [self.layer]
        return None if self.others is None else list(self.others)


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error.

    Attributes:
        value: the mean.
        se: its standard error; NaN where there is none.
        df: degrees of freedom of ``se``; NaN where there is none.
    """

    value: float
    se: float
    df: float


@dataclass(frozen=True)
class Estimate:
    """Sharpness, with mean loss and accuracy of the perturbed model.

    Attributes:
        sharpness: in nats, with its standard error for the given images: over draws within each part, over
            parts for the worst case.
        images_se: standard error of ``sharpness`` over images, with these draws: of the images' own means
            over draws; NaN for the worst case and for Hessian products.
        loss: of the clean model, in nats.
        accuracy: mean over draws, a fraction; of the clean model for Hessian products.
        draws: number of draws, products or steps.
        nonfinite: number of perturbed losses of single images that were NaN or infinite; for Hessian
            products, number of such products.
        reached: whether as many draws were made as the pilot called for; False, too, if the pilot had no
            finite error; None: no standard error was requested.
        seconds: duration.
        estimator: the one that was used.
        values: float64 [draws, parts]: sharpness by draw (pair of antithetic draws; one row for the worst
            case) and part. Draws of equal number share their noise at all positions and models.
        shares: float64 [parts]: fraction of all images that each part has.
        alike: names of parameters whose noise the images of a part share, though others have noise per image.
    """

    sharpness: Mean
    images_se: float
    loss: float
    accuracy: Mean
    draws: int
    nonfinite: int
    reached: bool | None
    seconds: float
    estimator: Estimator
    values: np.ndarray
    shares: np.ndarray
    alike: tuple[str, ...] = ()

    def change(self, base: Estimate) -> Mean:
        """Sharpness less that of ``base``, paired by draw and part.

        Args:
            base: an estimate with the same protocol and parts, at another position. Draws that only one of
                the two has, as with a goal, count as independent.
        """
        if not base.draws or not self.draws:  # exactly 0 at one of them
            one, sign = (self, 1) if self.draws else (base, -1)
            return Mean(sign * one.sharpness.value, one.sharpness.se, one.sharpness.df)
        here, there = self.values, base.values
        if self.estimator in WORST_CASE:
            return over_parts((here - there)[0], self.shares)
        value = self.sharpness.value - base.sharpness.value
        common = min(len(here), len(there))
        if common < 2:
            return Mean(value, math.nan, math.nan)
        with np.errstate(invalid="ignore"):  # infinite losses
            a, b = (values[:common] - values[:common].mean(0) for values in (here, there))
            shared = (a * b).sum(0) / (common - 1) / max(len(here), len(there))
            each = here.var(0, ddof=1) / len(here) + there.var(0, ddof=1) / len(there) - 2 * shared
            # With unequal numbers of draws the estimate of a part's variance may be below 0.
            return _mean(value, np.maximum(each, 0) * self.shares**2, common)


Results = dict[tuple[Target, float], Estimate]


def mean(values: np.ndarray, shares: np.ndarray) -> Mean:
    """The mean over draws and images, from the draws of each part, which are independent.

    The degrees of freedom are those of Welch and Satterthwaite.

    Args:
        values: [draws, parts].
        shares: [parts]: fraction of all images that each part has.
    """
    found = float(values.mean(0) @ shares)
    draws = len(values)
    if draws < 2:
        return Mean(found, math.nan, math.nan)
    with np.errstate(invalid="ignore"):  # infinite losses
        return _mean(found, values.var(0, ddof=1) / draws * shares**2, draws)


def _mean(value: float, each: np.ndarray, draws: int) -> Mean:
    """A mean with the variances that parts of so many draws contribute, [parts]."""
    total, spread = float(each.sum()), float((each**2).sum()) / (draws - 1)
    df = total**2 / spread if spread > 0 else float(len(each) * (draws - 1))
    return Mean(value, math.sqrt(total) if total >= 0 else math.nan, df)


def over_parts(values: np.ndarray, shares: np.ndarray) -> Mean:
    """The mean over parts and its standard error, NaN for a single part.

    Args:
        values: [parts].
        shares: [parts]: fraction of all images that each part has.
    """
    found, parts = float(values @ shares), len(values)
    if parts < 2:
        return Mean(found, math.nan, math.nan)
    with np.errstate(invalid="ignore"):  # infinite losses
        variance = float((shares**2) @ (values - found) ** 2) * parts / (parts - 1)
    return Mean(found, math.sqrt(variance), float(parts - 1))


def spread(weight: Weight, alpha: float, protocol: Protocol) -> Tensor:
    """Scale c of Eq. 3 in float32: how far noise of size one moves each live value. The model is at alpha."""
    on_path = protocol.where == "interpolated"
    if not protocol.adaptive:
        return torch.full_like(weight.live, 1.0 if on_path else alpha, dtype=torch.float32)
    scale = (weight.live if on_path else weight.finetuned).detach().float().abs()
    return scale if on_path else scale * alpha


def draws_for(pilot: Estimate, goal: float) -> int:
    """Draws that reach a standard error, by Stein's two-stage rule; no fewer than the pilot's.

    The pilot's variance is uncertain, so the rule counts Student's quantile instead of the normal one.

    Args:
        pilot: an estimate whose draws are not used again.
        goal: standard error to reach, in nats.
    """
    least = len(pilot.values)
    if not math.isfinite(pilot.sharpness.se) or not pilot.sharpness.se:
        return least
    ratio = float(stdtrit(pilot.sharpness.df, 0.975)) / _Z95 * pilot.sharpness.se / goal
    return max(least, math.ceil(least * ratio**2))


def shares_of(parts: Sequence[Evaluator]) -> np.ndarray:
    """Fraction of all images that each part has."""
    counts = np.array([sum(len(data.labels) for data in part.datasets) for part in parts], dtype=float)
    shares: np.ndarray = counts / counts.sum()
    return shares


def clean_scores(parts: Sequence[Evaluator]) -> tuple[float, float, int]:
    """Loss, accuracy and number of non-finite losses of the model as it is."""
    scores = [only_one(part.scores()) for part in parts]
    shares = shares_of(parts)
    loss = float(shares @ [score.loss for score in scores])
    accuracy = float(shares @ [score.accuracy for score in scores])
    return loss, accuracy, sum(score.nonfinite for score in scores)
