"""Permutation tests of many rank correlations at once, corrected for their number by max-T.

A rank correlation compares the pairs of models by two antisymmetric matrices: the signs of x_i - x_j and
of y_i - y_j (0 for a tie). Under the null hypothesis that measures and outcomes are independent, every
assignment of the models' outcomes to their measures is equally likely. One permutation is applied to all
correlations of a family, so the distribution of the largest one keeps what measures and outcomes have in
common (Westfall and Young, 1993).
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

EXACT = 9  # models up to which every permutation is taken: 362,880
DRAWN = 20_000  # permutations for more models
LEVEL = 0.05
_AT_ONCE = 400_000  # permuted pairs in memory
_ROUNDING = 1e-4  # of statistics in float32, which differ by far more if they differ


class Tests(NamedTuple):
    """Results of :func:`max_t`, float64 arrays with one value per correlation.

    Attributes:
        p: two-sided permutation p of the correlation alone.
        p_max: p corrected for all correlations of its family.
        needed: the smallest size of this correlation with ``p_max`` of at most 0.05 in its family; NaN if
            none reaches that.
    """

    p: np.ndarray
    p_max: np.ndarray
    needed: np.ndarray


def signs(values: np.ndarray, errors: np.ndarray | None = None) -> np.ndarray:
    """Compare all pairs of values.

    Args:
        values: float [..., n].
        errors: standard errors, [..., n]; pairs that differ by less than two standard errors of their
            difference (errors taken as independent) are tied. None, or NaN: only equal values are.

    Returns:
        int8 [..., n, n]: the sign of values[i] - values[j], 0 for ties.
    """
    difference = values[..., :, None] - values[..., None, :]
    found: np.ndarray = np.sign(difference)
    if errors is not None:
        error = np.hypot(errors[..., :, None], errors[..., None, :])
        found[np.abs(difference) < 2 * error] = 0
    return np.asarray(found, dtype=np.int8)


def tau(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Kendall's tau-b of signs [..., n, n], as float64 [...]; NaN where a side has ties only."""
    x, y = x.astype(float), y.astype(float)
    size = np.sqrt((x * x).sum((-2, -1)) * (y * y).sum((-2, -1)))
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum((-2, -1)) / size)


def partial(xy: float, xz: float, yz: float) -> float:
    """Kendall's partial tau of x and y given z; NaN if x or y is ordered exactly as z."""
    rest = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-9 else math.nan


def spread(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Standard deviation, over all permutations, of the sum over pairs i < j of x_ij y_ij.

    Args:
        x: antisymmetric matrices [..., n, n], n of at least 3.
        y: likewise.

    Source: Daniels (1944), *The relation between measures of correlation in the universe of sample
    permutations*, which allows any ties.
    """
    n = x.shape[-1]
    ones, squares = [], []
    for side in (x.astype(float), y.astype(float)):
        squares.append((side**2).sum((-2, -1)))
        ones.append((side.sum(-1) ** 2).sum(-1) - squares[-1])
    variance = 4 * ones[0] * ones[1] / (n * (n - 1) * (n - 2)) + 2 * squares[0] * squares[1] / (n * (n - 1))
    return np.asarray(np.sqrt(variance) / 2)


@lru_cache(maxsize=2)
def orders(n: int, seed: int = 0) -> np.ndarray:
    """All permutations of n items up to n = 9, else 20,000 random ones: int8 or int64 [count, n]."""
    if n <= EXACT:
        return np.array(list(permutations(range(n))), dtype=np.int8)
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (DRAWN, 1)), axis=1)


def max_t(
    x: np.ndarray, y: np.ndarray, which: np.ndarray, family: np.ndarray, parts: np.ndarray, seed: int = 0
) -> Tests:
    """Test rank correlations over the same n models, alone and corrected for those of their family.

    The statistic is |sum over pairs of x_ij y_ij| over its standard deviation under permutation
    (:func:`spread`); without ties that is |tau| up to a factor. The test is exact for up to 9 models, and
    uses 20,000 seeded permutations for more, where p = (1 + count) / 20,001.

    Args:
        x: signs of each measure, [r, n, n], none of them all ties.
        y: signs of each outcome, [k, n, n], likewise.
        which: for each measure, its outcome, 0 to k - 1: int [r].
        family: for each measure, the number of its family: int [r].
        parts: for each measure, into how many sets of models its family is divided, each of which is a call
            of its own: int [r]. They are combined by Bonferroni's inequality.
        seed: seed of the random permutations.

    Raises:
        ValueError: fewer than 3 models.
    """
    count, n = x.shape[:2]
    if n < 3:
        raise ValueError(f"max_t: expected at least 3 models, got {n}")
    rows, columns = np.triu_indices(n, 1)
    families = np.unique(family, return_inverse=True)[1]
    scale = spread(x, y[which])
    pairs = (x[:, rows, columns] / scale[:, None]).astype(np.float32)
    observed = np.abs((pairs * y[which][:, rows, columns]).sum(1))
    # Measures of one outcome and family stand together, so that maxima are over slices.
    blocks = [
        np.flatnonzero((which == k) & (families == f)) for k, f in set(zip(which, families, strict=True))
    ]
    every = orders(n, seed)
    largest = np.zeros((families.max() + 1, len(every)), dtype=np.float32)
    reached = np.zeros(count)
    flat = y.reshape(len(y), -1).astype(np.float32)
    size = max(1, _AT_ONCE // len(rows))
    for start in range(0, len(every), size):
        order = every[start : start + size].astype(np.intp)
        at = order[:, rows] * n + order[:, columns]
        now = slice(start, start + len(order))
        permuted: dict[int, np.ndarray] = {}
        for block in blocks:
            k = int(which[block[0]])
            if k not in permuted:
                permuted[k] = flat[k][at]
            found = np.abs(pairs[block] @ permuted[k].T)
            reached[block] += (found >= observed[block, None] - _ROUNDING).sum(1)
            most = largest[families[block[0]]]
            np.maximum(most[now], found.max(0), out=most[now])
    added = int(n > EXACT)  # the observed order is one of the permutations
    total = len(every) + added
    p_max, needed = np.empty(count), np.empty(count)
    length = np.sqrt((x.astype(float) ** 2).sum((1, 2)) * (y[which].astype(float) ** 2).sum((1, 2))) / 2
    for f, most in enumerate(largest):
        own = families == f
        most.sort()
        above = len(most) - np.searchsorted(most, observed[own] - _ROUNDING)
        share = int(parts[own][0])
        p_max[own] = np.minimum(1, share * (above + added) / total)
        needed[own] = _critical(most, added, total / share) * scale[own] / length[own]
    return Tests((reached + added) / total, p_max, needed)


def _critical(ordered: np.ndarray, added: int, total: float) -> float:
    """The smallest of these maxima that at most 5 % of the total reach; NaN if there is none."""
    values, first = np.unique(np.round(ordered, 4), return_index=True)
    enough = (len(ordered) - first + added) / total <= LEVEL
    return float(values[enough][0]) if enough.any() else math.nan


@lru_cache
def least(n: int) -> float:
    """The smallest |tau| of n models without ties whose two-sided exact p is at most 0.05; NaN if none is.

    Args:
        n: number of models, at least 2.

    Source: the null distribution of the number of discordant pairs (Kendall, 1938), by its recurrence.
    """
    ways = np.ones(1)
    for k in range(2, n + 1):  # the k-th model adds 0 to k - 1 discordant pairs, all equally likely
        ways = np.convolve(ways, np.ones(k) / k)
    pairs = len(ways) - 1
    tail = np.cumsum(ways)
    enough = np.flatnonzero(2 * tail <= LEVEL)
    return float(1 - 2 * enough[-1] / pairs) if len(enough) else math.nan
