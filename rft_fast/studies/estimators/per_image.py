"""Noise of its own for each image, by sign flips of one base perturbation (``coupling="image"``).

All images of a part (``noise_batch`` of them) share one draw of noise D; image n is perturbed by D o
(r_n s_n^T) with random signs r_n and s_n of its own, which has the same distribution. So one pass over the
images is worth many draws that all images share. The control variate ("gradient") is taken image by image.

Numbering: draw d of part p of P has the noise of draw d P + p, as with shared noise of ``noise_batch``
images. The signs of an image depend on d and its number in the data set, see :mod:`rft_fast.kernels.signs`.
Antithetic pairs share signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...evaluate.flipped import Flipped, NoRule
from ...evaluate.flipping import Perturbation
from ...kernels import Plan
from ...kernels.contract import first_blocks
from ..rows import AT_ONCE, chunks, only_one, walk_to
from .estimates import Estimate, Results, Target, draws_for, shares_of, spread
from .protocol import Protocol
from .sampling import sample

if TYPE_CHECKING:
    from ...evaluate import Evaluator, Scores, Walk
    from ...path import Path, Weight


@dataclass
class _Tally:
    """Results so far of one target and rho: an array [draws, parts] of means over the part's images each."""

    values: np.ndarray  # losses less those of the clean model, less the control
    accuracies: np.ndarray
    nonfinite: int = 0
    seconds: float = 0.0

    @classmethod
    def none(cls, parts: int) -> _Tally:
        """No results yet."""
        return cls(np.zeros((0, parts)), np.zeros((0, parts)))

    def estimate(self, shares: np.ndarray, clean: float, protocol: Protocol) -> Estimate:
        sharpness, error = _mean_and_error(self.values, shares, protocol)
        accuracy, accuracy_error = _mean_and_error(self.accuracies, shares, protocol)
        reached = None if protocol.goal is None else bool(error <= protocol.goal)
        loss, draws = clean + sharpness, len(self.values)
        return Estimate(
            sharpness,
            error,
            loss,
            error,
            accuracy,
            accuracy_error,
            draws,
            self.nonfinite,
            reached,
            self.seconds,
            "image",
        )


def _mean_and_error(values: np.ndarray, shares: np.ndarray, protocol: Protocol) -> tuple[float, float]:
    """Mean over images, and its standard error from the draws of each part, which are independent."""
    if protocol.estimator == "antithetic":
        values = values.reshape(-1, 2, values.shape[1]).mean(1)
    mean = float(values.mean(0) @ shares)
    if len(values) < 2:
        return mean, math.nan
    with np.errstate(invalid="ignore"):  # infinite losses
        variances = values.var(0, ddof=1) / len(values)
    return mean, float(np.sqrt(variances @ shares**2))


@dataclass
class _View:
    """Some images of a part on their way through the stages, with the weights at the position."""

    part: int
    share: float  # of the part's images
    walk: Walk
    clean: Scores


def per_image(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Iterator[Results]:
    """Draw until each target has reached its goal or its most draws; yield targets in the order of stages.

    Targets whose weights cannot differ between images get noise per part, with a warning.
    """
    study = _Study(path, parts, alpha, rhos, protocol)
    targets = sorted(targets, key=lambda target: target.stage)
    # One walk through all images serves the targets one after another, where they are held together.
    rolling = parts[0].holds(sum(len(data.labels) for part in parts for data in part.datasets))
    views = list(study.views()) if rolling else None
    for chunk in chunks(targets, 1 if rolling else AT_ONCE):
        found: dict[Target, Results] = {}
        wanted = {target: range(draws) for target in chunk}
        tallies = {(target, rho): _Tally.none(len(parts)) for target in chunk for rho in rhos}
        while wanted:
            clean, without = study.draw(views, tallies, wanted)
            for target in wanted:
                if target in without:
                    shared = replace(protocol, coupling="shared")
                    (found[target],) = sample(path, parts, alpha, [target], rhos, draws, shared)
                else:
                    found[target] = {
                        (target, rho): tallies[target, rho].estimate(study.shares, clean, protocol)
                        for rho in rhos
                    }
            more = {
                target: max(draws_for(result, protocol) for result in found[target].values())
                for target in wanted
                if target not in without
            }
            wanted = {
                target: range(wanted[target].stop, n) for target, n in more.items() if n > wanted[target].stop
            }
        for target in chunk:
            yield found[target]


class _Study:
    """What all targets at a position share."""

    def __init__(
        self,
        path: Path,
        parts: Sequence[Evaluator],
        alpha: float,
        rhos: Sequence[float],
        protocol: Protocol,
    ) -> None:
        self.path, self.parts, self.alpha, self.rhos = path, parts, alpha, rhos
        self.protocol = protocol
        self.shares = np.array(shares_of(parts))
        lives = sorted(
            (slot for slot in path.slots if slot.is_float and slot.is_parameter), key=lambda slot: slot.row
        )
        starts = first_blocks([slot.tensor for slot in lives])
        self._flipped = {
            slot.name: Flipped(slot.tensor, slot.name, start)
            for slot, start in zip(lives, starts, strict=True)
        }

    def views(self) -> Iterator[_View]:
        """The images of all parts, before the first stage."""
        for index, part in enumerate(self.parts):
            pieces = part.pieces()
            for portion, piece in zip(shares_of(pieces), pieces, strict=True):
                walk = piece.walk()
                yield _View(index, portion, walk, only_one(walk.scores()))

    def draw(
        self,
        views: Sequence[_View] | None,
        tallies: Mapping[tuple[Target, float], _Tally],
        wanted: Mapping[Target, range],
    ) -> tuple[float, set[Target]]:
        """Add the wanted draws to the tallies; return the clean loss, and the targets without a rule."""
        shape = max(map(len, wanted.values())), len(self.parts)
        values = {(target, rho): np.zeros((2, *shape)) for target in wanted for rho in self.rhos}
        clean, without = 0.0, set[Target]()
        for view in views or self.views():
            clean += self.shares[view.part] * view.share * view.clean.loss
            for target, draws in wanted.items():
                if target in without:
                    continue
                walk_to(view.walk, target.stage)
                start = perf_counter()
                noise = _Noise(self, target, draws, view.part)
                try:
                    scores = view.walk.flipped(
                        noise.weights,
                        target.last,
                        noise.perturb,
                        noise.count,
                        self.protocol.estimator == "gradient",
                    )
                except NoRule as reason:
                    without.add(target)
                    what = target.layer or "the model"
                    self.path.warn(f"sharpness: {what} gets noise per batch, not per image: {reason}")
                    continue
                seconds = (perf_counter() - start) / len(self.rhos)
                for k, (score, control) in enumerate(scores):
                    rho, draw = self.rhos[k // len(draws)], k % len(draws)
                    tally = tallies[target, rho]
                    change = score.rise_over(view.clean)[0] - _mean(control)
                    values[target, rho][0, draw, view.part] += view.share * change
                    values[target, rho][1, draw, view.part] += view.share * score.accuracy
                    tally.nonfinite += score.nonfinite
                for rho in self.rhos:
                    tallies[target, rho].seconds += seconds
        for (target, rho), found in values.items():
            tally, count = tallies[target, rho], len(wanted[target])
            tally.values = np.concatenate([tally.values, found[0, :count]])
            tally.accuracies = np.concatenate([tally.accuracies, found[1, :count]])
        return clean, without


def _mean(control: Tensor) -> float:
    return float(control.numpy().mean())


@dataclass
class _Noise:
    """Draws of noise on one target for one part of the data: all draws of the first rho, then of the next."""

    study: _Study
    target: Target
    draws: range
    part: int
    weights: list[Flipped] = field(init=False)

    def __post_init__(self) -> None:
        names = [weight.name for weight in self.study.path.weights(self.target.layers)]
        self.weights = [self.study._flipped[name] for name in names]
        self._plan: Plan | None = None
        self._scales: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of perturbations."""
        return len(self.draws) * len(self.study.rhos)

    def perturb(self, k: int) -> Perturbation:
        """The k-th base perturbation, in the memory of the one before."""
        study, protocol = self.study, self.study.protocol
        if self._plan is None:
            weights: list[Weight] = study.path.weights(self.target.layers)
            self._bases = [
                torch.empty_like(w.live, dtype=torch.float32, requires_grad=False) for w in weights
            ]
            blocks = [weight.block for weight in self.weights]
            self._plan = Plan(self._bases, self._bases, self._bases, study.path.impl, blocks=blocks)
            self._scales = [spread(weight, study.alpha, protocol) for weight in weights]
        rho, draw, sign = study.rhos[k // len(self.draws)], self.draws[k % len(self.draws)], 1
        if protocol.estimator == "antithetic":
            draw, sign = draw // 2, 1 - 2 * (draw % 2)
        number = draw * len(study.parts) + self.part
        with torch.no_grad():
            torch._foreach_zero_(self._bases)
            self._plan.write(
                1.0,
                rho=rho,
                noise=protocol.noise,
                adaptive=False,
                seed=protocol.seed,
                draw=number,
                sign=sign,
            )
            torch._foreach_mul_(self._bases, self._scales)
        bases = [base.to(w.live.dtype) for base, w in zip(self._bases, self.weights, strict=True)]
        return Perturbation(bases, protocol.seed, draw)
