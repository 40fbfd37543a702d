"""Estimators of sharpness: draws of noise, Hessian products, or the worst case.

Each takes one data set, a position on the path, targets (the whole model, or layers) and noise scales rho,
and yields an :class:`Estimate` per target and rho.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ...kernels.contract import Write
from ...names import ESTIMATORS, WORST_CASE
from .estimates import Estimate, Mean, Results, Target, clean_scores, shares_of
from .hessian import curvature
from .protocol import Protocol
from .worst_case import worst_case

if TYPE_CHECKING:
    from ...evaluate import Evaluator
    from ...path import Path

__all__ = ["ESTIMATORS", "WORST_CASE", "Estimate", "Mean", "Protocol", "Target", "estimate", "together"]


def estimate(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Generator[Results]:
    """Estimate sharpness at ``alpha`` on one data set.

    Noise on the fine-tuned weights has no effect at alpha = 0, where sharpness is exactly zero.

    Args:
        path: the live model between its two ends.
        parts: evaluators of the data set, or of consecutive parts of it, each with noise of its own.
        alpha: position on the path.
        targets: what to perturb, one at a time.
        rhos: noise scales.
        draws: draws of noise, Hessian products or steps per target and rho.
        protocol: estimator, noise and stopping rule.

    Yields:
        The results, at all rhos, of targets measured :func:`together`, as soon as they exist, in the order
        of the targets' stages. They do not depend on targets of other groups. Meanwhile the live model is at
        ``alpha``; close the generator to restore it early.
    """
    if not targets:
        return
    if not Write(alpha, 1.0, protocol.where).noisy:
        yield from _zeros(path, parts, alpha, targets, rhos, protocol)
        return
    with path.at(alpha):
        match protocol.estimator:
            case "hessian":
                yield curvature(path, parts, alpha, targets, rhos, draws, protocol)
            case "apgd-l2" | "apgd-linf" | "apgd-l2-published" | "apgd-linf-published" as name:
                yield from worst_case(path, parts, alpha, targets, rhos, draws, protocol, name)
            case _:
                from .sampling import sample  # loads open_clip, which rows and words do not need

                yield from sample(path, parts, alpha, targets, rhos, draws, protocol)


def together(targets: Sequence[Target], protocol: Protocol) -> list[list[Target]]:
    """Group the targets that are measured together: all of them for ``"hessian"``, otherwise each alone."""
    if protocol.estimator == "hessian":
        return [list(targets)] if targets else []
    return [[target] for target in targets]


def _zeros(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    protocol: Protocol,
) -> Iterator[Results]:
    start = perf_counter()
    with path.at(alpha):
        loss, accuracy, lost = clean_scores(parts)
    seconds = (perf_counter() - start) / (len(targets) * len(rhos))
    reached = None if protocol.goal is None else True
    zero, nothing = Mean(0.0, 0.0, math.nan), np.zeros((0, len(parts)))
    clean, used = Mean(accuracy, 0.0, math.nan), protocol.used
    found = Estimate(zero, 0.0, loss, clean, 0, lost, reached, seconds, used, nothing, shares_of(parts))
    for group in together(targets, protocol):
        yield {(target, rho): found for target in group for rho in rhos}
