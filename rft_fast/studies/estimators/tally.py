"""Results of the draws of single targets and rhos, on some images after others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...names import Estimator
from .estimates import PILOT, Estimate, mean
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator, Scores, Walk
    from ...evaluate.flipping import Record
    from .groups import Group


@dataclass(frozen=True)
class Asked:
    """Draws that are to be made, and whether with the control variate; None: the first parts decide."""

    draws: range
    control: bool | None


@dataclass
class Tally:
    """Results of the draws of one target and rho.

    Attributes:
        protocol: What is measured.
        draws: Numbers of the draws.
        shares: Fraction of all images that each part has, [parts].
        control: Whether the gradient is the control variate; None: not decided yet.
        cost: Of a pass with the control, in passes without.
    """

    protocol: Protocol
    draws: range
    shares: np.ndarray
    control: bool | None
    cost: float
    values: np.ndarray = field(init=False)  # [draws, parts]: mean losses less those of the clean model
    controls: np.ndarray = field(init=False)  # [draws, parts]: <gradient, perturbation>
    accuracies: np.ndarray = field(init=False)  # [draws, parts]
    # float64 [n] of each view: sums over draws of losses less those of the clean model, and of controls
    images: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    clean: float = 0.0  # mean loss of the clean model
    nonfinite: int = 0
    seconds: float = 0.0
    reached: bool | None = None
    shared: bool = False  # the images of a part share their noise
    alike: tuple[str, ...] = ()  # names of parameters of which they do, if they do not share all of it

    def __post_init__(self) -> None:
        shape = len(self.draws), len(self.shares)
        self.values, self.controls, self.accuracies = (np.zeros(shape) for _ in range(3))

    @property
    def pilot(self) -> int:
        """Parts whose draws decide on the control."""
        return min(len(self.shares), math.ceil(PILOT / len(self.draws)))

    def decide(self, parts: int) -> None:
        """Choose the lower product of variance and cost, by the draws of the first parts."""
        if self.control is None:
            values, controls, shares = self.values[:, :parts], self.controls[:, :parts], self.shares[:parts]
            plain, less = (mean(rises, shares).se for rises in (values, values - controls))
            cost = 1.0 if self.shared else self.cost
            if math.isfinite(plain) or math.isfinite(less):
                self.control = math.isfinite(less) and not plain**2 < cost * less**2
            else:  # a single draw
                self.control = bool(np.isfinite(controls).all())

    def add(
        self, view: View, scores: Sequence[Scores], controls: Sequence[np.ndarray], seconds: float
    ) -> None:
        """Add the scores of all draws on some images. controls: [n] each, or one number."""
        losses = np.sum([score.losses.double().numpy() for score in scores], 0)
        rises = losses - len(scores) * view.clean.losses.double().numpy()
        self.images.append((rises, np.zeros(1) if self.shared else np.sum(controls, 0)))
        for draw, (score, control) in enumerate(zip(scores, controls, strict=True)):
            self.values[draw, view.part] += view.share * score.rise_over(view.clean)[0]
            self.controls[draw, view.part] += view.share * float(control.mean())
            self.accuracies[draw, view.part] += view.share * score.accuracy
            self.nonfinite += score.nonfinite
        self.clean += self.shares[view.part] * view.share * view.clean.loss
        self.seconds += seconds

    def estimate(self) -> Estimate:
        self.decide(len(self.shares))
        values, accuracies = self.values - self.controls if self.control else self.values, self.accuracies
        if self.protocol.antithetic and not self.shared:
            values, accuracies = (x.reshape(-1, 2, x.shape[1]).mean(1) for x in (values, accuracies))
        sharpness = mean(values, self.shares)
        images = np.concatenate([rises - less if self.control else rises for rises, less in self.images])
        images /= len(self.draws)
        with np.errstate(invalid="ignore"):  # infinite losses
            error = float(images.std(ddof=1)) / math.sqrt(len(images)) if len(images) > 1 else math.nan
        return Estimate(
            sharpness,
            error,
            self.clean,
            mean(accuracies, self.shares),
            len(self.draws),
            self.nonfinite,
            self.reached,
            self.seconds,
            self.estimator,
            values,
            self.shares,
            self.alike,
        )

    @property
    def estimator(self) -> Estimator:
        """What was done."""
        if self.shared:
            return "gradient" if self.control else "plain"
        if self.protocol.antithetic:
            return "per-image-antithetic"
        return "per-image-gradient" if self.control else "per-image"


@dataclass
class View:
    """Some images of a part on their way through the stages, with the weights at the position.

    Attributes:
        part: Number of the part.
        share: Fraction of the part's images.
        evaluator: An evaluator of these images.
        walk: Where they are.
        clean: Their scores without noise.
        record: What the control variates of a group take of the unperturbed model; None: nothing is held.
    """

    part: int
    share: float
    evaluator: Evaluator
    walk: Walk
    clean: Scores
    record: tuple[Group, Record] | None = None
