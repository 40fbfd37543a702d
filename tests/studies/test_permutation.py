"""Permutation tests against every permutation written out, SciPy, and simulations of the null hypothesis."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import kendalltau
from support.wording import refused

from rft_fast.studies.permutation import EXACT, least, max_t, orders, partial, signs, spread, tau


def product(x: np.ndarray, y: np.ndarray) -> float:
    """Sum over pairs of the products of two sign matrices."""
    return sum(float(x[i, j]) * float(y[i, j]) for i in range(len(x)) for j in range(i))


def permuted(y: np.ndarray) -> list[np.ndarray]:
    return [y[np.ix_(order, order)] for order in permutations(range(len(y)))]


def random_signs(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """Of values with some equal, and some within their errors."""
    return signs(rng.integers(0, 6, (count, n)).astype(float), rng.uniform(0, 0.8, (count, n)))


@pytest.mark.parametrize("seed", range(3))
def test_every_permutation_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = random_signs(rng, 6, 5), random_signs(rng, 2, 5)
    which, family = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    found = max_t(x, y, which, family, np.ones(6, dtype=int))
    everywhere = np.array([[product(a, b) for b in permuted(y[k])] for a, k in zip(x, which, strict=True)])
    deviations = everywhere.std(axis=1)
    np.testing.assert_allclose(spread(x, y[which]), deviations)
    scaled = np.abs(everywhere) / deviations[:, None]
    observed = scaled[:, :1]  # the first permutation changes nothing
    np.testing.assert_allclose(found.p, (scaled >= observed - 1e-9).mean(1))
    for f in (0, 1):
        own = family == f
        largest = scaled[own].max(0)
        np.testing.assert_allclose(found.p_max[own], [(largest >= o - 1e-9).mean() for o in observed[own, 0]])
        enough = [v for v in largest if (largest >= v - 1e-9).mean() <= 0.05]
        sizes = [math.sqrt((a.astype(float) ** 2).sum() * (y[k].astype(float) ** 2).sum()) / 2
                 for a, k in zip(x[own], which[own], strict=True)]  # fmt: skip
        needed = np.array([min(enough) if enough else math.nan]) * deviations[own] / sizes
        np.testing.assert_allclose(found.needed[own], needed, rtol=1e-4)


@pytest.mark.parametrize("n", [4, 7])
def test_scipy_has_the_same_exact_p(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(5):
        x, y = rng.normal(size=(2, n))
        one = np.zeros(1, dtype=int)
        found = max_t(signs(x)[None], signs(y)[None], one, one, one + 1)
        expected = kendalltau(x, y, method="exact")
        assert tau(signs(x), signs(y)) == pytest.approx(expected.statistic)
        assert found.p[0] == found.p_max[0] == pytest.approx(expected.pvalue)


def test_many_models_have_random_permutations() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 14))
    y += 0.5 * x
    one = np.zeros(1, dtype=int)
    call = (signs(x)[None], signs(y)[None], one, one, one + 1)
    found, again, other = max_t(*call), max_t(*call), max_t(*call, seed=1)
    expected = kendalltau(x, y, method="exact").pvalue
    assert found == again and found.p != other.p
    for p in (found.p[0], other.p[0]):
        assert p == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))
    assert len(orders(EXACT)) == math.factorial(EXACT) and len({*map(tuple, orders(4))}) == 24
    perfect = max_t(signs(x)[None], signs(x)[None], one, one, one + 1)
    assert perfect.p[0] == 1 / 20_001  # never 0


def test_ties_and_partial_correlations() -> None:
    found = signs(np.array([0.0, 0.28, 0.5, 0.5]), np.array([0.1, 0.1, math.nan, math.nan]))
    assert found[0, 1] == 0  # 0.28 is below 2 * 0.1414
    assert (
        found[0, 2] == -1 and found[2, 0] == 1 and found[2, 3] == 0
    )  # without an error, only equal values are tied
    assert signs(np.array([0.0, 0.285]), np.array([0.1, 0.1]))[1, 0] == 1
    # Of x, y and z = x + noise: worked out from three taus, and undefined where z orders x.
    assert partial(0.6, 0.5, 0.4) == pytest.approx((0.6 - 0.2) / math.sqrt(0.75 * 0.84))
    assert math.isnan(partial(0.6, 1.0, 0.6))


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7])
def test_what_so_few_models_can_show(n: int) -> None:
    y = signs(np.arange(n).astype(float))
    sizes = np.abs([product(y, b) for b in permuted(y)]) / (n * (n - 1) / 2)
    enough = [size for size in sizes if (sizes >= size - 1e-9).mean() <= 0.05]
    expected = min(enough) if enough else math.nan
    assert least(n) == pytest.approx(expected, nan_ok=True)


def test_published_critical_values() -> None:
    """Kendall's table, two-sided 5 %: .643, .556 and .511 for eight to ten; about .23 for 36 models."""
    assert (least(8), least(9), least(10)) == pytest.approx((0.643, 0.556, 0.511), abs=5e-4)
    assert 0.22 < least(36) < 0.24


@pytest.mark.slow(but="^6-")
@pytest.mark.parametrize(("n", "trials"), [(6, 600), (11, 150)])
def test_a_family_without_any_association_is_seldom_significant(n: int, trials: int) -> None:
    """Twenty measures with a common part, two outcomes with one: in 5 % of the families, at most."""
    rng = np.random.default_rng(n)
    which, family = np.tile([0, 1], 10), np.zeros(20, dtype=int)
    wrong = alone = 0
    for _ in range(trials):
        x = rng.normal(size=(20, n)) + rng.normal(size=n)
        y = rng.normal(size=(2, n)) + rng.normal(size=n)
        found = max_t(signs(x, np.full_like(x, 0.1)), signs(y), which, family, family + 1)
        wrong += (found.p_max <= 0.05).any()
        alone += (found.p <= 0.05).any()
    assert wrong / trials <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)
    assert alone / trials > 0.12  # what the correction is for


def test_families_in_several_sets_of_models_and_too_few_models() -> None:
    rng = np.random.default_rng(3)
    x, y = random_signs(rng, 1, 5), random_signs(rng, 1, 5)
    one = np.zeros(1, dtype=int)
    once, twice = (max_t(x, y, one, one, one + parts) for parts in (1, 2))
    assert twice.p_max[0] == min(1, 2 * once.p_max[0]) and twice.p == once.p
    with refused(ValueError, "3", "2"):
        max_t(x[:, :2, :2], y[:, :2, :2], one, one, one + 1)
