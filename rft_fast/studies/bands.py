"""The gain of a path without the winner's curse: bounds for all positions at once, and held-out gains.

The gain (Eq. 2) is the best of many positions, chosen and measured on the same images, so its pointwise
interval excludes 0 too often. Here are pure functions of arrays, which know nothing of rows or runs.

Bounds are one-sided: lower bounds hold for all positions at once with 95 % probability, and so do upper
bounds. Both together hold with at least 90 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit
from scipy.stats import qmc

Z95 = NormalDist().inv_cdf(0.975)
LEVEL = 0.95
FOLDS = 5
_POINTS = 16  # log2 of the number of quasi-random points of a quantile

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bounds:
    """Gains in accuracy over alpha = 0, with bounds that hold for all positions at once.

    Attributes:
        gain: A(alpha) - A(0), a fraction, float64 [positions].
        low: Lower bounds, likewise.
        high: Upper bounds, likewise.
        critical: Number of standard errors from a gain to its bounds.
    """

    gain: Array
    low: Array
    high: Array
    critical: float


def max_t(correlation: ArrayLike, level: float = LEVEL) -> float:
    """Return a quantile of the largest of several correlated standard normals.

    Computed with a fixed quasi-random sequence (Sobol) along the principal axes, so the same for the same
    correlations, and right to about 0.01.

    Args:
        correlation: Their correlations, [k, k]; may be singular.
        level: Probability, in (0, 1).

    Raises:
        ValueError: The correlations are not a finite symmetric matrix.
    """
    matrix = np.asarray(correlation, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T):
        raise ValueError(f"max_t: expected a finite symmetric matrix, got one of shape {matrix.shape}")
    variances, axes = np.linalg.eigh(matrix)
    order = np.argsort(variances)[::-1]  # the first coordinates of the sequence are its most even ones
    scale = np.sqrt(np.clip(variances[order], 0, None))
    even = qmc.Sobol(len(matrix), scramble=False).random_base2(_POINTS) + 0.5 / 2**_POINTS
    largest = ((ndtri(even) * scale) @ axes[:, order].T).max(axis=1)
    return float(np.quantile(largest, level))


def simultaneous(hits: ArrayLike, zero: int = 0, level: float = LEVEL) -> Bounds:
    """Bound the gains over alpha = 0 at all other positions at once, by max-T.

    The critical value is the quantile of the largest of correlated normals with the empirical correlation of
    the paired differences. Their variances count one more image that changes sides: accuracy changes in
    steps of one image, and no change on these images is no proof of none.

    Args:
        hits: Whether each image is classified correctly, [positions, n] of the same n images.
        zero: Index of alpha = 0.
        level: Probability with which the lower bounds hold, and with which the upper ones do.

    Returns:
        Bounds by position; exactly 0 at alpha = 0. NaN for a single image.

    Raises:
        ValueError: ``hits`` is not such an array, or ``zero`` is no position of it.
    """
    table = _checked("simultaneous", hits, zero)
    positions, images = table.shape
    differences = table - table[zero]
    gain = differences.mean(axis=1)
    others = np.arange(positions) != zero
    if images < 2 or positions < 2:
        return _unknown(gain, zero)
    centred = differences[others] - gain[others, None]
    products = centred @ centred.T
    sizes = np.sqrt(np.diag(products))
    moving = sizes > 0  # others have no correlation with any
    correlation = np.eye(len(sizes))
    within = np.ix_(moving, moving)
    correlation[within] = products[within] / np.outer(sizes[moving], sizes[moving])
    critical = max_t(correlation, level)
    errors = np.zeros(positions)
    errors[others] = with_one_more(sizes / np.sqrt((images - 1) * images), images)
    return Bounds(gain, gain - critical * errors, gain + critical * errors, critical)


def bonferroni(gain: ArrayLike, error: ArrayLike, images: int, zero: int = 0, level: float = LEVEL) -> Bounds:
    """Bound gains at several positions at once where only their standard errors are known.

    By Student's t, corrected by Bonferroni for the number of positions: wider than :func:`simultaneous`,
    which knows the correlations.

    Args:
        gain: A(alpha) - A(0), fractions, [positions].
        error: Their paired standard errors, likewise.
        images: Number of images n.
        zero: Index of alpha = 0.
        level: As for :func:`simultaneous`.

    Returns:
        As :func:`simultaneous` does.
    """
    value = np.asarray(gain, dtype=np.float64)
    if images < 2 or len(value) < 2:
        return _unknown(value, zero)
    critical = float(stdtrit(images - 1, 1 - (1 - level) / (len(value) - 1)))
    half = critical * with_one_more(np.asarray(error, dtype=np.float64), images)
    half[zero] = 0.0
    return Bounds(value, value - half, value + half, critical)


def _unknown(gain: Array, zero: int) -> Bounds:
    """Return the bounds of a single image, which are not known, except at alpha = 0."""
    nothing = np.where(np.arange(len(gain)) == zero, 0.0, np.nan)
    return Bounds(gain, nothing, nothing, np.nan)


def with_one_more(error: Array, images: int) -> Array:
    """Return standard errors of paired differences of hits as if one more of n images changed sides."""
    return np.sqrt(error**2 + 1 / (images * (images - 1)))


def best(accuracy: ArrayLike) -> int:
    """Return the index of the highest accuracy, the first of equal ones."""
    return int(np.argmax(np.asarray(accuracy)))


def held_out(hits: ArrayLike, zero: int = 0, folds: int = FOLDS) -> tuple[float, float]:
    """Measure the gain of a position on images that did not choose it.

    The images are dealt at random, always in the same way, to folds. The position of highest accuracy on all
    other folds, alpha = 0 among them, is measured on each fold.

    Args:
        hits: As for :func:`simultaneous`; positions in ascending order of alpha.
        zero: Index of alpha = 0.
        folds: Number of folds, at least 2.

    Returns:
        Mean over the images of the difference to alpha = 0, a fraction, and its standard error, which does
        not count that folds share most of the images that choose.

    Raises:
        ValueError: As for :func:`simultaneous`, or there are fewer images than folds, or than 2 folds.
    """
    table = _checked("held_out", hits, zero)
    images = table.shape[1]
    if folds < 2 or images < folds:
        raise ValueError(
            f"held_out: expected at least 2 folds and as many images as folds, got {folds} folds and "
            f"{images} images; use more images or fewer folds"
        )
    fold = dealt(images, folds)
    total = table.sum(axis=1)
    differences = np.empty(images)
    for number in range(folds):
        own = fold == number
        chosen = best(total - table[:, own].sum(axis=1))
        differences[own] = table[chosen, own] - table[zero, own]
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(images))


def dealt(images: int, folds: int = FOLDS) -> NDArray[np.intp]:
    """Return the fold of each image, [images]: at random, always in the same way."""
    fold = np.empty(images, dtype=np.intp)
    fold[np.random.RandomState(0).permutation(images)] = np.arange(images) % folds  # a frozen stream
    return fold


def _checked(caller: str, hits: ArrayLike, zero: int) -> Array:
    table = np.asarray(hits)
    if table.ndim != 2 or not table.size or not np.isin(table, (0, 1)).all():
        raise ValueError(
            f"{caller}: expected hits as an array [positions, images] of 0 and 1, got {table.dtype} of shape "
            f"{table.shape}"
        )
    if not 0 <= zero < len(table):
        raise ValueError(f"{caller}: alpha = 0 must be one of {len(table)} positions, got number {zero}")
    return table.astype(np.float64)
