"""The worst case in a ball around the weights, on each part of the data for itself (m-sharpness)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...kernels import Plan
from ...kernels.contract import BLOCK
from ...kernels.places import first_blocks
from ...names import WORST_CASE, Noise, WorstCase
from ..rows import only_one
from .climbs import CLIMBS, Climb
from .estimates import Estimate, Results, Target, over_parts, shares_of
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

    Of ``protocol.restarts`` searches on each part, the highest loss counts. Search 0 starts at the clean
    weights, search r on part p of P at random: from the noise of draw r P + p.
    """
    shares = shares_of(parts)
    clean = np.array([only_one(part.scores()).loss for part in parts])
    norm = WORST_CASE[estimator]
    for target in targets:
        results: Results = {}
        for rho in rhos:
            start = perf_counter()
            losses, accuracies, nonfinite = np.zeros(len(parts)), np.zeros(len(parts)), 0
            with path.borrowed(target.layers) as weights:
                climb = CLIMBS[estimator](weights, alpha, rho, norm, protocol)
                noise = _Noise(path, weights, "uniform" if norm == math.inf else "normal", protocol.seed)
                for index, part in enumerate(parts):
                    draws = range(len(parts) + index, protocol.restarts * len(parts), len(parts))
                    climb.run(part, float(clean[index]), steps, noise.starts(climb, draws))
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


class _Noise:
    """Noise of some weights, as it is for them in the whole model: where searches start."""

    def __init__(self, path: Path, weights: Sequence[Weight], noise: Noise, seed: int) -> None:
        self._path, self._weights, self._noise, self._seed = path, weights, noise, seed

    def starts(self, climb: Climb, draws: Sequence[int]) -> Iterator[list[Tensor] | None]:
        """The clean weights, then a point of the ball for each draw."""
        yield None
        for draw in draws:
            yield climb.inside(self._draw(draw))

    def _draw(self, draw: int) -> list[Tensor]:
        whole = self._path.weights()
        blocks = dict(zip([w.name for w in whole], first_blocks([w.live for w in whole]), strict=True))
        found = [torch.zeros_like(weight.live, dtype=torch.float32) for weight in self._weights]
        plan = Plan(found, found, found, offsets=[BLOCK * blocks[w.name] for w in self._weights])
        plan.write(1.0, rho=1.0, noise=self._noise, adaptive=False, seed=self._seed, draw=draw)
        return found
