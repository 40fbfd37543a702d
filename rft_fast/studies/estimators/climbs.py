"""Two searches for the worst case in a ball around the weights: Auto-PGD, and the published code's loop.

Both work in units of the scale c, u = delta / c, and look for the highest loss within ||u|| <= rho.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.threads import few_threads
from ...names import WORST_CASE, Estimator
from .estimates import spread
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Weight

_MOMENTUM = 0.75  # share of the new step
_ENOUGH = 0.75  # share of the steps between two checkpoints that have to go up


class Climb(ABC):
    """A search for the highest loss.

    Args:
        weights: What is perturbed. The live weights are clean, and change until the search ends.
        alpha: Position on the path.
        rho: Radius of the ball, in units of c.
        norm: 2 or infinity.
        protocol: What c is.
    """

    def __init__(
        self, weights: Sequence[Weight], alpha: float, rho: float, norm: float, protocol: Protocol
    ) -> None:
        self._rho, self._norm = rho, norm
        self._live = [weight.live for weight in weights]
        self._clean = [weight.live.detach().clone() for weight in weights]
        self._scale = [spread(weight, alpha, protocol) for weight in weights]
        self._uniform = not protocol.adaptive
        self._powers: tuple[int, ...] = ()  # of two, near the last multiplier

    def run(self, part: Evaluator, clean: float, steps: int, starts: Iterable[list[Tensor] | None]) -> None:
        """Leave the live weights at the highest loss found from any start.

        Args:
            part: A part of the data.
            clean: Its loss with the clean weights.
            steps: Steps from each start.
            starts: u at each start, one float32 tensor for each weight; None: 0, the clean weights.
        """
        self._part = part
        best: tuple[float, list[Tensor]] | None = None
        for start in starts:
            found = self._search(self._zero() if start is None else start, clean, steps)
            if best is None or found[0] > best[0]:
                best = found
            del found  # memory: a copy of the weights
        if best is not None:
            self._move(best[1])

    def _zero(self) -> list[Tensor]:
        """u of the clean weights."""
        return [torch.zeros_like(scale) for scale in self._scale]

    def inside(self, noise: Sequence[Tensor]) -> list[Tensor]:
        """A start from noise: uniform in the ball (linf; noise on (-1, 1)), or on its sphere (l2; normal)."""
        if self._norm == math.inf:
            return [part * self._rho for part in noise]
        u = self._stopped([part.clone() for part in noise])
        size = self._rho / max(_norm(u), 1e-30)
        return [part.mul_(size) for part in u]

    @abstractmethod
    def _search(self, u: list[Tensor], clean: float, steps: int) -> tuple[float, list[Tensor]]:
        """Return the highest loss found from the start ``u``, and its u. clean: loss of the clean weights."""

    @torch.no_grad()
    def _move(self, u: Sequence[Tensor]) -> None:
        for live, clean, scale, part in zip(self._live, self._clean, self._scale, u, strict=True):
            live.copy_(clean + scale * part)

    def _look(self, u: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the loss at u and its gradient in the weights."""
        self._move(u)
        return self._part.gradient(self._live)

    def _stopped(self, u: list[Tensor]) -> list[Tensor]:
        """Set u to 0, in place, for weights that cannot move: those with c = 0."""
        return [part.mul_(scale != 0) for part, scale in zip(u, self._scale, strict=True)]

    def _stepped(self, u: Sequence[Tensor], step: float, slope: Sequence[Tensor]) -> list[Tensor]:
        """u moved by a step in the direction of ``slope``: its signs (linf), or the slope itself (l2)."""
        if self._norm == math.inf:
            return [a + step * b.sign() for a, b in zip(u, slope, strict=True)]
        size = step / max(_norm(slope), 1e-30)
        return [a + size * b for a, b in zip(u, slope, strict=True)]

    def project(self, u: list[Tensor]) -> list[Tensor]:
        """Move u, in place, to the nearest point of the ball."""
        if self._norm == math.inf:
            return [part.clamp_(-self._rho, self._rho) for part in u]
        norm = _norm(u)
        return u if norm <= self._rho else [part.mul_(self._rho / norm) for part in u]


class AutoPgd(Climb):
    """Auto-PGD (Croce & Hein, ICML 2020, arXiv 2003.01690, Algorithm 1) on the loss as a function of u."""

    def _search(self, u: list[Tensor], clean: float, steps: int) -> tuple[float, list[Tensor]]:
        before = u
        loss, slope = self._look(u)
        best, best_loss, best_slope = u, loss, slope
        step = 2 * self._rho
        checks = _checkpoints(steps)
        rises, since, best_then, step_then = 0, 0, best_loss, step
        for k in range(1, steps + 1):
            z = self.project(self._stepped(u, step, slope))
            # Momentum: three quarters of the new step, one quarter of the last move; none in the first step.
            keep = 1.0 if k == 1 else _MOMENTUM
            for a, b, c in zip(u, before, z, strict=True):
                c.sub_(a).mul_(keep).add_(a).add_(a - b, alpha=1 - keep)
            before, u, last = u, self.project(z), loss
            loss, slope = self._look(u)
            rises, since = rises + (loss > last), since + 1
            if loss > best_loss:
                best, best_loss, best_slope = u, loss, slope
            if k in checks:
                # Too few steps went up, or neither step nor best loss changed: halve the step, restart at
                # the best.
                stuck = step == step_then and best_loss == best_then
                step_then, best_then = step, best_loss
                if rises < _ENOUGH * since or stuck:
                    step /= 2
                    before = u = best
                    loss, slope = best_loss, best_slope
                rises, since = 0, 0
        return best_loss, best

    def _look(self, u: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the loss at u and its gradient in u."""
        loss, gradients = super()._look(u)
        for gradient, scale in zip(gradients, self._scale, strict=True):
            gradient.mul_(scale)
        return loss, gradients


class Published(Climb):
    """The loop of ``eval_APGD_sharpness`` of the published code (Andriushchenko et al., ICML 2023).

    It is close to Auto-PGD, but not the same:

    - the gradient is that in the weights, also where it moves u. The projection (l2) is the nearest point in
      the weights, not in u. For adaptive l2, where these differ, such steps do not end at a maximum;
    - momentum averages the projected step with the position before the last, in the first step, too;
    - a step counts as a rise if its loss is the highest so far;
    - after halving, the next gradient is that of the best weights, but u moves on from where it was;
    - the loss of the start does not count, that of the clean weights does;
    - checkpoints are counted from 0 and end where two coincide.

    Where c = 0 the published code divides 0 by 0, and then projects nothing. Here such weights do not move.
    """

    def _search(self, u: list[Tensor], clean: float, steps: int) -> tuple[float, list[Tensor]]:
        before = u
        self._powers = ()
        best, best_loss = self._zero(), clean
        _, slope = self._look(u)
        best_slope = slope
        step = 2 * self._rho
        checks = _checkpoints(steps, distinct=True)
        rises, checked, best_then, step_then = 0, 0, best_loss, step
        for k in range(steps):
            z = self.project(self._stepped(u, step, slope))
            for a, b in zip(z, before, strict=True):
                a.mul_(_MOMENTUM).add_(b, alpha=1 - _MOMENTUM)
            before, u = u, z
            loss, slope = self._look(u)
            if loss > best_loss:
                best, best_loss, best_slope = u, loss, slope
                rises += 1
            if k in checks:
                stuck = step == step_then and best_loss == best_then
                few = rises < _ENOUGH * (k - checked)
                rises, checked, best_then, step_then = 0, k, best_loss, step
                if few or stuck:
                    step /= 2
                    slope = best_slope
        return best_loss, best

    def project(self, u: list[Tensor]) -> list[Tensor]:
        """Move u, in place, to the point of the ball that is nearest in the weights.

        For l2 that is u c^2 / (c^2 + m), with m such that its norm is rho.
        """
        if self._norm == math.inf or self._uniform:
            return super().project(u)
        u = self._stopped(u)
        if not _norm(u) > self._rho:
            return u
        m = self._multiplier(u)
        return [part.mul_(_shrinking(scale, m)) for part, scale in zip(u, self._scale, strict=True)]

    def _multiplier(self, u: Sequence[Tensor]) -> float:
        """m of the projection: the root of a function that falls, from below."""

        def sums(m: float) -> tuple[float, float]:
            """Squared norm at m, and its derivative by m, times -1/2."""
            total = torch.zeros(2, dtype=torch.float64, device=u[0].device)
            for part, scale in zip(u, self._scale, strict=True):
                square = (part * _shrinking(scale, m)).double().square()
                width = (scale.double().square() + m).masked_fill(scale == 0, 1.0)
                total += torch.stack([square.sum(), (square / width).sum()])
            square, slope = total.tolist()
            return square, slope

        with few_threads():
            # The last power of two below the root, among those that float32 numbers c call for ...
            low, high = -150, 80
            while high - low > 1:
                middle = next((p for p in self._powers if low < p < high), (low + high) // 2)
                low, high = (middle, high) if sums(2.0**middle)[0] > self._rho**2 else (low, middle)
            self._powers = (low, low + 1, low - 1, low + 2)  # the next root is often near
            m = 2.0**low
            # ... then Newton's method on 1 / norm, which is concave: it never passes the root.
            for _ in range(100):
                square, slope = sums(m)
                excess = math.sqrt(square) / self._rho - 1
                if not excess > 1e-7:
                    break
                m += square * excess / slope
        return m


CLIMBS: dict[Estimator, type[Climb]] = {
    name: Published if name.endswith("-published") else AutoPgd for name in WORST_CASE
}


def copies(estimator: Estimator, restarts: int) -> int:
    """Return how many float32 copies of the weights a search holds at most, beside their gradients.

    Among these are temporary ones in float64, which count twice. For one large weight; with many weights the
    temporary ones are smaller. Most searches hold one or two fewer: at the worst, the best position is
    neither the present one nor the one before, and so is its gradient.
    """
    once = 9 if WORST_CASE[estimator] == math.inf else 14 if CLIMBS[estimator] is Published else 12
    return once + 2 * (restarts > 1)


def _shrinking(scale: Tensor, m: float) -> Tensor:
    """c^2 / (c^2 + m), float32; 0 where c = 0."""
    square = scale.double().square()
    return (square / (square + m)).masked_fill_(scale == 0, 0.0).float()


def _norm(parts: Sequence[Tensor]) -> float:
    with few_threads():
        return float(torch.stack([part.double().square().sum() for part in parts]).sum().sqrt())


def _checkpoints(steps: int, distinct: bool = False) -> set[int]:
    """Steps at which a climb looks back: after 22 % of them, then after ever shorter intervals.

    distinct: whether the first one that is there already is the last.
    """
    found: set[int] = set()
    last, now = 0.0, 0.22
    while now < 1 and not (distinct and math.ceil(now * steps) in found):
        found.add(math.ceil(now * steps))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return found
