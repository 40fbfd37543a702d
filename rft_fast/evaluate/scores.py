"""Per-image losses, hits and predictions of one model on one data set, so that differences can be paired."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on one data set.

    Attributes:
        losses: Cross entropy of each image in nats, float32 [n] on the CPU. Losses that are not finite are
            kept, and the means include them.
        correct: Whether the largest logit of each image is that of its label, bool [n] on the CPU.
        predictions: Predicted class of each image, int32 [n] on the CPU: the row of the head with the largest
            logit among the scored ones, or the row that it counts as (``Dataset.groups``); -1 for logits with
            NaN. None: not known.
        entropies: Entropy of the predicted distribution of each image in nats, float32 [n] on the CPU. None:
            not known.
    """

    losses: Tensor
    correct: Tensor
    predictions: Tensor | None = None
    entropies: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of images n."""
        return len(self.losses)

    @property
    def nonfinite(self) -> int:
        """Number of losses that are NaN or infinite."""
        return int((~self.losses.isfinite()).sum())

    @property
    def loss(self) -> float:
        """Mean loss."""
        return _mean(self.losses)[0]

    @property
    def loss_se(self) -> float:
        """Standard error of the mean loss; NaN for one image."""
        return _mean(self.losses)[1]

    @property
    def accuracy(self) -> float:
        """Fraction of images whose largest logit, which may be infinite, is that of their label; NaN never
        counts.
        """
        return _mean(self.correct)[0]

    @property
    def accuracy_se(self) -> float:
        """Standard error of the accuracy; NaN for one image."""
        return _mean(self.correct)[1]

    @property
    def entropy(self) -> float | None:
        """Mean entropy of the predictions; None: not known."""
        return None if self.entropies is None else _mean(self.entropies)[0]

    def gain_over(self, base: Scores) -> tuple[float, float]:
        """Return accuracy minus that of ``base`` on the same images, and its paired standard error.

        Raises:
            ValueError: The numbers of images differ.
        """
        self._check_paired(base, "gain_over")
        return _mean(self.correct.double() - base.correct.double())

    def rise_over(self, base: Scores) -> tuple[float, float]:
        """Return mean loss minus that of ``base`` on the same images, and its paired standard error.

        Raises:
            ValueError: The numbers of images differ.
        """
        self._check_paired(base, "rise_over")
        return _mean(self.losses.double() - base.losses.double())

    def instability(self, first: Scores, last: Scores) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the instability (Def. 1): how much worse this is than the mean of the two ends of a path.

        Args:
            first: Scores at alpha = 0 on the same images.
            last: Scores at alpha = 1 on the same images.

        Returns:
            (value, paired standard error) of the loss, L - (L(0) + L(1)) / 2, and of the accuracy,
            (A(0) + A(1)) / 2 - A.

        Raises:
            ValueError: The numbers of images differ.
        """
        self._check_paired(first, "instability")
        self._check_paired(last, "instability")
        losses = self.losses.double() - (first.losses.double() + last.losses.double()) / 2
        misses = (first.correct.double() + last.correct.double()) / 2 - self.correct.double()
        return _mean(losses), _mean(misses)

    def bump(self, first: Scores, last: Scores, alpha: float) -> tuple[float, float]:
        """Return how far the mean loss at ``alpha`` lies above the straight line between the two ends.

        That is the barrier over the chord of Entezari et al. (2022): the mean over images of
        l - ((1 - alpha) l(0) + alpha l(1)). It is 0 at both ends and negative where a curve sags.

        Args:
            first: Scores at alpha = 0 on the same images.
            last: Scores at alpha = 1 on the same images.
            alpha: Position of these scores, in [0, 1].

        Returns:
            Value in nats and its paired standard error.

        Raises:
            ValueError: The numbers of images differ.
        """
        self._check_paired(first, "bump")
        self._check_paired(last, "bump")
        chord = (1 - alpha) * first.losses.double() + alpha * last.losses.double()
        return _mean(self.losses.double() - chord)

    def then(self, more: Scores) -> Scores:
        """Return these scores followed by those of further images."""
        pairs = (
            (self.losses, more.losses),
            (self.correct, more.correct),
            (self.predictions, more.predictions),
            (self.entropies, more.entropies),
        )
        return Scores(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]

    def _check_paired(self, base: Scores, operation: str) -> None:
        if self.samples != base.samples:
            raise ValueError(
                f"{operation}: a paired difference needs the same samples, "
                f"got {self.samples} and {base.samples} of them"
            )


def _mean(values: Tensor) -> tuple[float, float]:
    """Return mean and standard error in float64. By NumPy: sums of torch depend on the number of threads."""
    numbers = values.double().numpy()
    with np.errstate(invalid="ignore"):  # infinite losses
        spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
        return float(numbers.mean()), spread / math.sqrt(len(numbers))
