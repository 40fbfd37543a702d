"""Losses and hits of one model on one data set, per sample, so that differences can be paired."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on one data set.

    losses: cross entropy per sample, float32 [n] on the CPU, in nats, not finite where the model's
    was not; such values are kept and carry into the means. correct: bool [n] on the CPU.
    """

    losses: Tensor
    correct: Tensor

    @property
    def samples(self) -> int:
        """The number of samples n."""
        return len(self.losses)

    @property
    def nonfinite(self) -> int:
        """How many losses are NaN or infinite."""
        return int((~self.losses.isfinite()).sum())

    @property
    def loss(self) -> float:
        """Mean loss."""
        return _mean(self.losses)[0]

    @property
    def loss_se(self) -> float:
        """Standard error of the mean loss; NaN for one sample."""
        return _mean(self.losses)[1]

    @property
    def accuracy(self) -> float:
        """Fraction of samples whose largest logit, be it infinite, is their label's; of NaN, none is."""
        return _mean(self.correct)[0]

    @property
    def accuracy_se(self) -> float:
        """Standard error of the accuracy; NaN for one sample."""
        return _mean(self.correct)[1]

    def gain_over(self, base: Scores) -> tuple[float, float]:
        """Accuracy minus that of ``base`` on the same samples, and its paired standard error."""
        self._check_paired(base, "gain_over")
        return _mean(self.correct.double() - base.correct.double())

    def rise_over(self, base: Scores) -> tuple[float, float]:
        """Loss minus that of ``base`` on the same samples, and its paired standard error."""
        self._check_paired(base, "rise_over")
        return _mean(self.losses.double() - base.losses.double())

    def instability(self, first: Scores, last: Scores) -> tuple[tuple[float, float], tuple[float, float]]:
        """How much worse than the mean of a path's two ends, on the same samples (Def. 1).

        Returns (value, paired standard error) twice: in loss, L - (L(0) + L(1)) / 2, and in accuracy,
        (A(0) + A(1)) / 2 - A.
        """
        self._check_paired(first, "instability")
        self._check_paired(last, "instability")
        losses = self.losses.double() - (first.losses.double() + last.losses.double()) / 2
        misses = (first.correct.double() + last.correct.double()) / 2 - self.correct.double()
        return _mean(losses), _mean(misses)

    def then(self, more: Scores) -> Scores:
        """These samples, and further ones after them."""
        return Scores(torch.cat([self.losses, more.losses]), torch.cat([self.correct, more.correct]))

    def _check_paired(self, base: Scores, operation: str) -> None:
        if self.samples != base.samples:
            raise ValueError(
                f"{operation}: a paired difference needs the same samples, "
                f"got {self.samples} and {base.samples} of them"
            )


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, in float64. By NumPy: torch's sums depend on the number of threads."""
    numbers = values.double().numpy()
    with np.errstate(invalid="ignore"):  # infinite losses
        spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
        return float(numbers.mean()), spread / math.sqrt(len(numbers))
