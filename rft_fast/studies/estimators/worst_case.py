"""The worst case in a ball around the weights, by Auto-PGD (Croce & Hein 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...common.threads import few_threads
from ...names import WORST_CASE, WorstCase
from ..rows import only_one
from .estimates import Estimate, Results, Target, over_parts, shares_of, spread
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Path, Weight


def worst_case(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    steps: int,
    protocol: Protocol,
    estimator: WorstCase,
) -> Iterator[Results]:
    """Yield the results of one target after another: the mean over parts of each part's own worst case.

    Each search starts at the clean weights.
    """
    shares = shares_of(parts)
    clean = np.array([only_one(part.scores()).loss for part in parts])
    for target in targets:
        results: Results = {}
        for rho in rhos:
            start = perf_counter()
            losses, accuracies, nonfinite = np.zeros(len(parts)), np.zeros(len(parts)), 0
            with path.borrowed(target.layers) as weights:
                climb = _Climb(weights, alpha, rho, WORST_CASE[estimator], protocol)
                for index, part in enumerate(parts):
                    climb.run(part, steps)
                    score = only_one(part.scores())
                    losses[index] = score.loss - clean[index]
                    accuracies[index] = score.accuracy
                    nonfinite += score.nonfinite
            results[target, rho] = Estimate(
                over_parts(losses, shares),
                math.nan,
                float(clean @ shares),
                over_parts(accuracies, shares),
                steps,
                nonfinite,
                None,
                perf_counter() - start,
                estimator,
                losses[None],
                shares,
            )
        yield results


class _Climb:
    """Auto-PGD (Croce & Hein 2020) on the loss, in units of c: u = delta / c within a ball of radius rho.

    Starts at u = 0, the clean weights, so that the same call gives the same answer.
    """

    def __init__(
        self, weights: Sequence[Weight], alpha: float, rho: float, norm: float, protocol: Protocol
    ) -> None:
        self._rho, self._norm = rho, norm
        self._live = [weight.live for weight in weights]
        self._clean = [weight.live.detach().clone() for weight in weights]
        self._scale = [spread(weight, alpha, protocol) for weight in weights]

    def run(self, part: Evaluator, steps: int) -> None:
        """Leave the live weights at the highest loss found on a part of the data."""
        self._part = part
        u = [torch.zeros_like(scale) for scale in self._scale]
        before = u
        loss, slope = self._look(u)
        best, best_loss, best_slope = u, loss, slope
        step = 2 * self._rho
        checks = _checkpoints(steps)
        rises, since, best_then, step_then = 0, 0, best_loss, step
        for k in range(1, steps + 1):
            z = self._project([a + step * b for a, b in zip(u, self._direction(slope), strict=True)])
            # Momentum: three quarters of the new step, one quarter of the last move; none in the first step.
            keep = 1.0 if k == 1 else 0.75
            moved = self._project(
                [a + keep * (c - a) + (1 - keep) * (a - b) for a, b, c in zip(u, before, z, strict=True)]
            )
            before, u, last = u, moved, loss
            loss, slope = self._look(u)
            rises, since = rises + (loss > last), since + 1
            if loss > best_loss:
                best, best_loss, best_slope = u, loss, slope
            if k in checks:
                # Too few steps went up, or neither step nor best loss changed: halve the step, restart at
                # the best.
                stuck = step == step_then and best_loss == best_then
                step_then, best_then = step, best_loss
                if rises < 0.75 * since or stuck:
                    step /= 2
                    before = u = best
                    loss, slope = best_loss, best_slope
                rises, since = 0, 0
        self._move(best)

    @torch.no_grad()
    def _move(self, u: Sequence[Tensor]) -> None:
        for live, clean, scale, part in zip(self._live, self._clean, self._scale, u, strict=True):
            live.copy_(clean + scale * part)

    def _look(self, u: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the loss and its gradient in u."""
        self._move(u)
        loss, gradients = self._part.gradient(self._live)
        for gradient, scale in zip(gradients, self._scale, strict=True):
            gradient.mul_(scale)
        return loss, gradients

    def _direction(self, slope: Sequence[Tensor]) -> list[Tensor]:
        if self._norm == math.inf:
            return [part.sign() for part in slope]
        norm = _norm(slope)
        return [part / max(norm, 1e-30) for part in slope]

    def _project(self, u: Sequence[Tensor]) -> list[Tensor]:
        if self._norm == math.inf:
            return [part.clamp(-self._rho, self._rho) for part in u]
        norm = _norm(u)
        return list(u) if norm <= self._rho else [part * (self._rho / norm) for part in u]


def _norm(parts: Sequence[Tensor]) -> float:
    with few_threads():
        return float(torch.stack([part.double().square().sum() for part in parts]).sum().sqrt())


def _checkpoints(steps: int) -> set[int]:
    """Steps at which Auto-PGD looks back: after 22 % of them, then after ever shorter intervals."""
    found, last, now = set(), 0.0, 0.22
    while now < 1:
        found.add(math.ceil(now * steps))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return found
