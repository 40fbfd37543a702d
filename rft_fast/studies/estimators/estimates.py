"""What is measured, what comes out, and what all estimators share on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..rows import only_one
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Weight


@dataclass(frozen=True)
class Target:
    """What is perturbed: one layer or, without a name, the whole model.

    stage, last: the first and the last station of a walk whose stages read it.
    """

    layer: str | None
    stage: int
    last: int

    @property
    def layers(self) -> list[str] | None:
        """As :meth:`rft_fast.Path.write` takes it."""
        return None if self.layer is None else [self.layer]


@dataclass(frozen=True)
class Estimate:
    """Sharpness in nats, and the perturbed model's mean loss and accuracy, with standard errors.

    loss is the clean model's plus the sharpness: the mean over draws that are ``"plain"`` or
    ``"antithetic"``; over those of ``"gradient"``, each less <gradient, delta>. The standard errors
    are those of the draws, for the images at hand; NaN for a single draw. draws: how many were
    made. nonfinite: how many perturbed losses of single images were NaN or infinite. Of products with
    the Hessian: accuracy is that of the clean model, nonfinite counts products.
    """

    sharpness: float
    sharpness_se: float
    loss: float
    loss_se: float
    accuracy: float
    accuracy_se: float
    draws: int
    nonfinite: int
    reached: bool | None
    seconds: float


Results = dict[tuple[Target, float], Estimate]


def spread(weight: Weight, alpha: float, protocol: Protocol) -> Tensor:
    """How far noise of size one moves each live value, float32: c of Eq. 3, while the model is at alpha."""
    on_path = protocol.where == "interpolated"
    if not protocol.adaptive:
        return torch.full_like(weight.live, 1.0 if on_path else alpha)
    scale = (weight.live if on_path else weight.finetuned).detach().float().abs()
    return scale if on_path else scale * alpha


def draws_for(now: Estimate, protocol: Protocol) -> int:
    """How many draws promise the wanted standard error; no more than are allowed, and even."""
    if protocol.goal is None or now.reached or not math.isfinite(now.sharpness_se):
        return now.draws
    wanted = now.draws * min(4.0, 1.1 * (now.sharpness_se / protocol.goal) ** 2)
    wanted = min(protocol.most, max(now.draws + 2, math.ceil(wanted)))
    return wanted - wanted % 2


def shares_of(parts: Sequence[Evaluator]) -> list[float]:
    """Which fraction of all images each has."""
    counts = [sum(len(data.labels) for data in part.datasets) for part in parts]
    return [count / sum(counts) for count in counts]


def clean_scores(parts: Sequence[Evaluator]) -> tuple[float, float, int]:
    """Loss, accuracy and the number of losses that are not finite, of the model as it is."""
    scores = [only_one(part.scores()) for part in parts]
    shares = shares_of(parts)
    loss = sum(share * score.loss for share, score in zip(shares, scores, strict=True))
    accuracy = sum(share * score.accuracy for share, score in zip(shares, scores, strict=True))
    return loss, accuracy, sum(score.nonfinite for score in scores)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean over draws and its standard error, NaN for a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
