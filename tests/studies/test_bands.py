"""Bounds for all positions at once and held-out gains, against closed forms, bootstraps and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq
from support.wording import refused

from rft_fast.studies.bands import bonferroni, held_out, max_t, simultaneous


def paths(images: int, effects: list[float], seed: int = 0, noise: float = 0.6) -> np.ndarray:
    """Hits along a path: images of random margins, which drift more and more as alpha grows."""
    rng = np.random.default_rng(seed)
    margin, drift = rng.normal(size=images), rng.normal(size=images)
    steps = np.linspace(0, noise, len(effects))
    return np.array([margin + s * drift + e > 0 for s, e in zip(steps, effects, strict=True)])


def equal_correlations(k: int, r: float) -> np.ndarray:
    return np.full((k, k), r) + (1 - r) * np.eye(k)


# --- the quantile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 10, 30])
def test_the_largest_of_independent_normals(k: int) -> None:
    assert max_t(np.eye(k)) == pytest.approx(stats.norm.ppf(0.95 ** (1 / k)), abs=0.01)
    assert max_t(np.eye(k), 0.8) == pytest.approx(stats.norm.ppf(0.8 ** (1 / k)), abs=0.01)


@pytest.mark.parametrize(("k", "r"), [(3, 0.5), (10, 0.5), (10, 0.9), (30, 0.7)])
def test_the_largest_of_normals_that_are_correlated_alike(k: int, r: float) -> None:
    def below(q: float) -> float:
        """P(all below q): given their common part, they are independent."""

        def given(z: float) -> float:
            return float(stats.norm.pdf(z) * stats.norm.cdf((q - math.sqrt(r) * z) / math.sqrt(1 - r)) ** k)

        return quad(given, -8, 8)[0] - 0.95

    assert max_t(equal_correlations(k, r)) == pytest.approx(brentq(below, 0, 5), abs=0.012)


def test_the_largest_of_normals_by_their_distribution_function() -> None:
    matrix = np.array([[1, 0.8, 0.1], [0.8, 1, -0.3], [0.1, -0.3, 1]])
    found = max_t(matrix)
    assert stats.multivariate_normal(np.zeros(3), matrix).cdf(np.full(3, found)) == pytest.approx(
        0.95, abs=2e-3
    )
    assert max_t(np.ones((8, 8))) == pytest.approx(stats.norm.ppf(0.95), abs=0.005)  # all the same
    assert max_t(matrix) == found


def test_what_is_no_correlation_is_refused() -> None:
    for wrong in ([[1.0, math.nan], [math.nan, 1.0]], [[1.0, 0.5], [0.1, 1.0]], [1.0, 0.5]):
        with refused(ValueError):
            max_t(wrong)


# --- bounds -------------------------------------------------------------------------------------------


def test_bounds_equal_those_of_a_bootstrap() -> None:
    hits = paths(800, [0.0, 0.05, 0.1, 0.05, -0.1, -0.3])
    found = simultaneous(hits)
    differences = hits[1:].astype(float) - hits[0]
    gain, error = differences.mean(axis=1), differences.std(axis=1, ddof=1) / math.sqrt(800)
    np.testing.assert_allclose(found.gain, [0, *gain])
    # The same images drawn again and again: the largest studentized deviation of any position.
    rng = np.random.default_rng(1)
    largest = []
    for _ in range(4000):
        again = differences[:, rng.integers(0, 800, 800)]
        spread = again.std(axis=1, ddof=1) / math.sqrt(800)
        largest.append(((again.mean(axis=1) - gain) / spread).max())
    assert found.critical == pytest.approx(np.quantile(largest, 0.95), abs=0.1)
    half = found.critical * np.sqrt(error**2 + 1 / (800 * 799))
    np.testing.assert_allclose(found.low, [0, *(gain - half)])
    np.testing.assert_allclose(found.high, [0, *(gain + half)])
    assert stats.norm.ppf(0.95) < found.critical < stats.norm.ppf(1 - 0.05 / 5)


def test_alpha_zero_may_be_anywhere() -> None:
    hits = paths(300, [0.0, 0.1, 0.2, 0.1])
    first, last = simultaneous(hits), simultaneous(np.roll(hits, -1, axis=0), zero=3)
    for name in ("gain", "low", "high"):
        np.testing.assert_allclose(np.roll(getattr(last, name), 1), getattr(first, name), atol=1e-3)


def test_positions_that_change_no_image_are_bounded_and_not_certain() -> None:
    hits = np.tile(np.arange(100) % 2, (3, 1))
    found = simultaneous(hits)
    critical = stats.norm.ppf(0.95**0.5)  # of two independent ones: nothing is known of their correlation
    assert found.critical == pytest.approx(critical, abs=0.01)
    np.testing.assert_allclose(found.high, np.array([0, 1, 1]) * found.critical / math.sqrt(100 * 99))
    np.testing.assert_allclose(found.low, -found.high)


def test_bonferroni_is_students_t_and_wider() -> None:
    hits = paths(200, [0.0, 0.1, 0.2, 0.1, 0.0])
    differences = hits.astype(float) - hits[0]
    gain, error = differences.mean(axis=1), differences.std(axis=1, ddof=1) / math.sqrt(200)
    found, narrow = bonferroni(gain, error, 200), simultaneous(hits)
    assert found.critical == pytest.approx(stats.t.ppf(1 - 0.05 / 4, 199))
    half = found.critical * np.sqrt(error[1:] ** 2 + 1 / (200 * 199))
    np.testing.assert_allclose(found.low[1:], gain[1:] - half)
    np.testing.assert_allclose(found.high[1:], gain[1:] + half)
    assert (found.low[0], found.high[0]) == (0, 0)
    assert (found.low[1:] < narrow.low[1:]).all() and (found.high[1:] > narrow.high[1:]).all()


def test_a_single_image_has_no_bounds() -> None:
    for found in (simultaneous([[1], [0]]), bonferroni([0.0, -1.0], [math.nan, math.nan], 1)):
        assert found.gain.tolist() == [0, -1] and math.isnan(found.critical)
        assert (found.low[0], found.high[0]) == (0, 0)
        assert math.isnan(found.low[1]) and math.isnan(found.high[1])


@pytest.mark.slow
@pytest.mark.parametrize("images", [300, 1000])
def test_false_gains_are_as_rare_as_they_should_be(images: int) -> None:
    """Where nothing is gained, 5 % of paths have a lower bound above 0, and 5 % an upper one below."""
    rng = np.random.default_rng(0)
    low = high = 0
    for seed in range(600):
        hits = paths(images, [0.0] * 9, seed)
        # An image and its opposite are equally likely: no position differs from alpha = 0 in the mean.
        found = simultaneous(hits ^ (rng.random(images) < 0.5))
        low += bool((found.low > 0).any())
        high += bool((found.high < 0).any())
    for count in (low, high):
        assert stats.binomtest(count, 600, 0.05).pvalue > 1e-3, (low, high)


# --- held out -----------------------------------------------------------------------------------------


def test_a_held_out_gain_by_hand() -> None:
    """Ten images, five folds; in each, the best position of the eight other images."""
    hits = np.random.default_rng(0).random((4, 10)) < 0.5
    order = np.random.RandomState(0).permutation(10)
    differences: dict[int, int] = {}
    chosen_by_folds = set()
    for fold in range(5):
        own = {int(order[fold]), int(order[fold + 5])}
        counts = [sum(int(row[i]) for i in range(10) if i not in own) for row in hits]
        chosen = counts.index(max(counts))
        chosen_by_folds.add(chosen)
        differences |= {i: int(hits[chosen][i]) - int(hits[0][i]) for i in own}
    values = [differences[i] for i in range(10)]
    assert len(set(values)) > 1 and len(chosen_by_folds) > 1
    assert held_out(hits) == pytest.approx((np.mean(values), np.std(values, ddof=1) / math.sqrt(10)))


def test_a_held_out_gain_of_a_choice_without_doubt_is_the_gain() -> None:
    hits = np.zeros((4, 500), dtype=bool)
    hits[0, :200], hits[2, :300], hits[3, :100] = True, True, True
    assert held_out(hits)[0] == pytest.approx(0.2)
    assert held_out(hits[[0, 3]]) == (0.0, 0.0)  # alpha = 0 is chosen, which changes nothing


def test_a_held_out_gain_has_no_winners_curse() -> None:
    rng = np.random.default_rng(0)
    naive, honest = [], []
    for seed in range(300):
        hits = paths(200, [0.0] * 8, seed) ^ (rng.random(200) < 0.5)  # nothing is gained anywhere
        naive.append((hits.mean(axis=1) - hits[0].mean()).max())
        honest.append(held_out(hits)[0])
    assert np.mean(naive) > 10 * stats.sem(naive)
    assert abs(np.mean(honest)) < 3.5 * stats.sem(honest)


def test_bad_input_is_refused() -> None:
    hits = paths(4, [0.0, 0.1])
    with refused(ValueError, 5, 4):
        held_out(hits)
    with refused(ValueError, 1, 4):
        held_out(hits, folds=1)
    assert held_out(hits, folds=4)
    for function in (simultaneous, held_out):
        with refused(ValueError, 2):
            function(np.full((2, 9), 2))
        with refused(ValueError, 9):
            function(np.ones(9))
        with refused(ValueError, 7):
            function(np.ones((2, 9)), 7)
