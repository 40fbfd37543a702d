"""Inputs and outputs of the estimators, and what they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...names import Coupling
from ..rows import only_one
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Weight


@dataclass(frozen=True)
class Target:
    """What is perturbed: one layer, or the whole model.

    Attributes:
        layer: name of the layer; None: the whole model.
        stage: first stage of a walk that reads it.
        last: last stage that does.
    """

    layer: str | None
    stage: int
    last: int

    @property
    def layers(self) -> list[str] | None:
        """The layers as :meth:`rft_fast.Path.write` takes them."""
        return None if self.layer is None else [self.layer]


@dataclass(frozen=True)
class Estimate:
    """Sharpness, with mean loss and accuracy of the perturbed model.

    Attributes:
        sharpness: in nats.
        sharpness_se: its standard error over draws, for the given images; NaN for a single draw.
        loss: loss of the clean model plus ``sharpness``, in nats: the mean over draws for ``"plain"`` and
            ``"antithetic"``, the mean less <gradient, delta> for ``"gradient"``.
        loss_se: as ``sharpness_se``.
        accuracy: mean over draws, a fraction; of the clean model for Hessian products.
        accuracy_se: its standard error over draws.
        draws: number of draws, products or steps made.
        nonfinite: number of perturbed losses of single images that were NaN or infinite; for Hessian
            products, number of such products.
        reached: whether the requested standard error was reached; None: none requested.
        seconds: duration.
        coupling: how the noises of different images were coupled: as the protocol says, but ``"shared"``
            where no other noise is possible.
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
    coupling: Coupling = "shared"


Results = dict[tuple[Target, float], Estimate]


def spread(weight: Weight, alpha: float, protocol: Protocol) -> Tensor:
    """Scale c of Eq. 3 in float32: how far noise of size one moves each live value. The model is at alpha."""
    on_path = protocol.where == "interpolated"
    if not protocol.adaptive:
        return torch.full_like(weight.live, 1.0 if on_path else alpha)
    scale = (weight.live if on_path else weight.finetuned).detach().float().abs()
    return scale if on_path else scale * alpha


def draws_for(now: Estimate, protocol: Protocol) -> int:
    """Number of draws expected to reach the requested standard error; even, at most ``protocol.most``."""
    if protocol.goal is None or now.reached or not math.isfinite(now.sharpness_se):
        return now.draws
    wanted = now.draws * min(4.0, 1.1 * (now.sharpness_se / protocol.goal) ** 2)
    wanted = min(protocol.most, max(now.draws + 2, math.ceil(wanted)))
    return wanted - wanted % 2


def shares_of(parts: Sequence[Evaluator]) -> list[float]:
    """Fraction of all images that each part has."""
    counts = [sum(len(data.labels) for data in part.datasets) for part in parts]
    return [count / sum(counts) for count in counts]


def clean_scores(parts: Sequence[Evaluator]) -> tuple[float, float, int]:
    """Loss, accuracy and number of non-finite losses of the model as it is."""
    scores = [only_one(part.scores()) for part in parts]
    shares = shares_of(parts)
    loss = sum(share * score.loss for share, score in zip(shares, scores, strict=True))
    accuracy = sum(share * score.accuracy for share, score in zip(shares, scores, strict=True))
    return loss, accuracy, sum(score.nonfinite for score in scores)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over draws and its standard error, NaN for a single draw."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
