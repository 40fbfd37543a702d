"""Hessian products: sharpness in the limit of small rho, for all layers at once (Prop. A.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels import Plan
from ...kernels.contract import BLOCK
from ...kernels.places import first_blocks
from .estimates import Estimate, Mean, Results, Target, clean_scores, draws_for, mean, shares_of, spread
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
    """Estimate the trace by Hutchinson's products with random signs, which serve all targets and rhos.

    Each part of the data has signs of its own: those of draw d P + p, as with noise.
    """
    start = perf_counter()
    loss, accuracy, _ = clean_scores(parts)
    shares = shares_of(parts)
    everything = path.weights()
    # Layers have the same signs whichever are requested, but excluded ones have none.
    excluded = {id(w.live) for target in targets for w in path.weights(list(target.excluded))}
    blocks = first_blocks([weight.live for weight in everything])  # where their signs are in the whole model
    numbered = [(w, block) for w, block in zip(everything, blocks, strict=True) if id(w.live) not in excluded]
    weights = [weight for weight, _ in numbered]
    lives = [weight.live for weight in weights]
    signs = [torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in lives]
    plan = Plan(signs, signs, signs, path.impl, offsets=[BLOCK * block for _, block in numbered])
    place = {id(live): index for index, live in enumerate(lives)}
    rows = {target: [place[id(w.live)] for w in path.weights(target.layers)] for target in targets}
    keys = [(target, rho) for target in targets for rho in rhos]

    def products(numbers: range) -> np.ndarray:
        """v_i . (H v)_i of every weight: [draws, parts, weights]."""
        found = np.empty((len(numbers), len(parts), len(lives)))
        for place, draw in enumerate(numbers):
            for index, part in enumerate(parts):
                number = draw * len(parts) + index
                torch._foreach_zero_(signs)
                plan.write(1.0, rho=1.0, noise="rademacher", adaptive=False, seed=protocol.seed, draw=number)
                for weight, sign in zip(weights, signs, strict=True):
                    sign.mul_(spread(weight, alpha, protocol))
                found[place, index] = part.curvature(lives, signs).cpu().numpy()
        return found

    def results(made: np.ndarray, reached: bool | None = None) -> Results:
        seconds = (perf_counter() - start) / len(keys)
        found: Results = {}
        for target, rho in keys:
            values = rho**2 / 2 * VARIANCE[protocol.noise] * made[:, :, rows[target]].sum(-1)
            found[target, rho] = Estimate(
                mean(values, shares),
                np.nan,
                loss,
                Mean(accuracy, np.nan, np.nan),
                len(made),
                int(np.sum(~np.isfinite(values))),
                reached,
                seconds,
                "hessian",
                values,
                shares,
            )
        return found

    if protocol.goal is None:
        return results(products(range(draws)))
    first = protocol.pilot(draws, len(parts))
    pilots = results(products(range(first))).values()
    wanted, room = max(draws_for(pilot, protocol.goal) for pilot in pilots), protocol.most - first
    finite = all(math.isfinite(pilot.sharpness.se) for pilot in pilots)
    return results(products(range(first, first + min(wanted, room))), wanted <= room and finite)
