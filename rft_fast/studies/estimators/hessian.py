"""Hessian products: sharpness in the limit of small rho, for all layers at once (Prop. A.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ...kernels import noise_like
from .estimates import Estimate, Results, Target, clean_scores, draws_for, mean_and_error, spread
from .protocol import VARIANCE, Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Path


def curvature(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Results:
    """Estimate the trace by Hutchinson's products with random signs, which serve all targets and rhos."""
    start = perf_counter()
    loss, accuracy, _ = clean_scores(parts)
    weights = path.weights()
    lives = [weight.live for weight in weights]
    place = {id(live): index for index, live in enumerate(lives)}
    rows = {target: [place[id(w.live)] for w in path.weights(target.layers)] for target in targets}
    products: list[np.ndarray] = []  # for each draw: v_i . (H v)_i of every weight

    def more(count: int) -> None:
        for draw in range(len(products), count):
            signs = noise_like(lives, protocol.seed, draw, "rademacher")
            for weight, sign in zip(weights, signs, strict=True):
                sign.mul_(spread(weight, alpha, protocol))
            (part,) = parts
            products.append(part.curvature(lives, signs).cpu().numpy())

    def result(target: Target, rho: float, seconds: float) -> Estimate:
        half = rho**2 / 2 * VARIANCE[protocol.noise]
        values = half * np.array([product[rows[target]].sum() for product in products])
        sharpness, error = mean_and_error(values)
        lost = int(np.sum(~np.isfinite(values)))
        reached = None if protocol.goal is None else bool(error <= protocol.goal)
        count = len(products)
        return Estimate(
            sharpness, error, loss + sharpness, error, accuracy, math.nan, count, lost, reached, seconds
        )

    wanted = draws
    keys = [(target, rho) for target in targets for rho in rhos]
    while len(products) < wanted:
        more(wanted)
        wanted = max(draws_for(result(*key, 0.0), protocol) for key in keys)
    seconds = (perf_counter() - start) / len(keys)
    return {key: result(*key, seconds) for key in keys}
