"""The mean over draws of noise: plain, in antithetic pairs, or with the gradient as a control variate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...common.threads import few_threads
from ..rows import AT_ONCE, chunks, only_one, walk_to
from .estimates import Estimate, Results, Target, draws_for, mean_and_error, shares_of
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator, Walk
    from ...path import Path


@dataclass
class _Tally:
    """Results so far of one target and rho, one number per draw."""

    values: list[float] = field(default_factory=list)  # L(w + delta) - L(w)
    controls: list[float] = field(default_factory=list)  # <gradient, delta>
    accuracies: list[float] = field(default_factory=list)
    nonfinite: int = 0
    seconds: float = 0.0

    def estimate(self, clean: float, protocol: Protocol) -> Estimate:
        draws = len(self.values)
        values, accuracies = np.array(self.values), np.array(self.accuracies)
        values = values - np.array(self.controls)
        if protocol.estimator == "antithetic":
            values, accuracies = (x.reshape(-1, 2).mean(1) for x in (values, accuracies))
        sharpness, error = mean_and_error(values)
        accuracy, accuracy_error = mean_and_error(accuracies)
        reached = None if protocol.goal is None else bool(error <= protocol.goal)
        return Estimate(
            sharpness,
            error,
            clean + sharpness,
            error,
            accuracy,
            accuracy_error,
            draws,
            self.nonfinite,
            reached,
            self.seconds,
        )


@dataclass
class _View:
    """Some of the images on their way through the stages, with the weights at the position."""

    share: float  # of all images
    part: int
    walk: Walk
    clean: float  # their loss
    slope: _Slope | None


def _views(
    path: Path, parts: Sequence[Evaluator], targets: Sequence[Target], protocol: Protocol
) -> Iterator[_View]:
    for index, (share, part) in enumerate(zip(shares_of(parts), parts, strict=True)):
        slope = _Slope(path, part, targets) if protocol.estimator == "gradient" else None
        pieces = part.pieces()  # unlike parts, these share their noise
        for portion, piece in zip(shares_of(pieces), pieces, strict=True):
            walk = piece.walk()
            yield _View(share * portion, index, walk, only_one(walk.scores()).loss, slope)


def sample(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Iterator[Results]:
    """Draw until each target has reached its goal or its most draws; yield targets in the order of stages."""
    targets = sorted(targets, key=lambda target: target.stage)
    # One walk through all images serves the targets one after another. Where the images come in several
    # pieces, which are not held together, each piece goes through a few targets before the next one.
    rolling = len(parts) == 1 and len(parts[0].pieces()) == 1
    walks = list(_views(path, parts, targets, protocol)) if rolling else None
    for chunk in chunks(targets, 1 if rolling else AT_ONCE):
        tallies = {(target, rho): _Tally() for target in chunk for rho in rhos}
        found: Results = {}
        wanted = dict.fromkeys(tallies, range(draws))
        while wanted:
            views = walks or _views(path, parts, list(dict.fromkeys(t for t, _ in wanted)), protocol)
            clean = _draw(path, views, alpha, tallies, wanted, len(parts), protocol)
            found |= {key: tallies[key].estimate(clean, protocol) for key in wanted}
            more = {key: draws_for(found[key], protocol) for key in wanted}
            wanted = {key: range(found[key].draws, n) for key, n in more.items() if n > found[key].draws}
        for target in chunk:
            yield {(target, rho): found[target, rho] for rho in rhos}


def _draw(
    path: Path,
    views: Iterable[_View],
    alpha: float,
    tallies: Mapping[tuple[Target, float], _Tally],
    wanted: Mapping[tuple[Target, float], range],
    parts: int,
    protocol: Protocol,
) -> float:
    """Add the wanted draws to the tallies; return the clean loss."""
    rhos: dict[Target, list[float]] = {}
    for target, rho in wanted:
        rhos.setdefault(target, []).append(rho)
    values = {key: np.zeros((3, len(draws))) for key, draws in wanted.items()}
    clean = 0.0
    for view in views:
        clean += view.share * view.clean
        for target in rhos:
            walk_to(view.walk, target.stage)
            for rho in rhos[target]:
                start = perf_counter()
                draws, tally, found = wanted[target, rho], tallies[target, rho], values[target, rho]
                noise = _Noise(path, alpha, rho, target, draws, view.part, parts, protocol, view.slope)
                scores = [only_one(s) for s in view.walk.variants(noise.write, len(draws), target.last)]
                found[0] += [view.share * (score.loss - view.clean) for score in scores]
                found[1] += view.share * noise.controls()
                found[2] += [view.share * score.accuracy for score in scores]
                tally.nonfinite += sum(score.nonfinite for score in scores)
                tally.seconds += perf_counter() - start
            path.write(alpha, layers=target.layers)
    for key, found in values.items():
        tally = tallies[key]
        for kept, new in zip((tally.values, tally.controls, tally.accuracies), found, strict=True):
            kept.extend(new.tolist())
    return clean


@dataclass
class _Noise:
    """Draws of noise on one target, written one after another for one part of the data."""

    path: Path
    alpha: float
    rho: float
    target: Target
    draws: range
    part: int
    parts: int
    protocol: Protocol
    slope: _Slope | None
    along: list[Tensor] = field(default_factory=list)

    def write(self, k: int) -> None:
        """Perturb the target by the k-th of these draws."""
        draw, sign = self.draws[k], 1
        if self.protocol.estimator == "antithetic":
            draw, sign = draw // 2, 1 - 2 * (draw % 2)
        self.path.write(
            self.alpha,
            self.rho,
            self.target.layers,
            seed=self.protocol.seed,
            draw=draw * self.parts + self.part,
            on=self.protocol.where,
            noise=self.protocol.noise,
            adaptive=self.protocol.adaptive,
            sign=sign,
        )
        if self.slope is not None:
            self.along.append(self.slope.along(self.target))

    def controls(self) -> np.ndarray:
        """<gradient, delta> of each draw; zeros without a gradient."""
        if not self.along:
            return np.zeros(len(self.draws))
        found: np.ndarray = torch.stack(self.along).cpu().numpy()
        return found


class _Slope:
    """The gradient of a part's loss, and its product with a perturbation."""

    def __init__(self, path: Path, part: Evaluator, targets: Iterable[Target]) -> None:
        lives = {target: [w.live for w in path.weights(target.layers)] for target in targets}
        weights = list({id(live): live for group in lives.values() for live in group}.values())
        gradients = dict(zip(map(id, weights), part.gradient(weights)[1], strict=True))
        self._pairs = {
            target: [(gradients[id(live)], live) for live in group] for target, group in lives.items()
        }
        self._clean = {target: self._dot(target) for target in self._pairs}

    def along(self, target: Target) -> Tensor:
        """<gradient, delta> of the current perturbation: float64, 0-d, on the weights' device.

        The difference of two products in float64: delta itself is never stored, and roundings of the live
        weights are included.
        """
        return self._dot(target) - self._clean[target]

    def _dot(self, target: Target) -> Tensor:
        with torch.no_grad(), few_threads():
            sums = [torch.dot(g.double().flatten(), w.double().flatten()) for g, w in self._pairs[target]]
            return torch.stack(sums).sum()
