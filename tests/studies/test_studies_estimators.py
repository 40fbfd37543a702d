"""Estimators of sharpness against the truth: all sign patterns, the exact Hessian, closed-form maxima."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from support.brute import Brute, first_blocks, moments
from support.wording import refused
from torch import Tensor, nn

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.flipped import COPIES
from rft_fast.kernels import noise_like
from rft_fast.kernels.signs import signs
from rft_fast.names import ESTIMATOR_CHOICES, SAMPLING
from rft_fast.path import Path
from rft_fast.studies import ESTIMATORS, Protocol
from rft_fast.studies.estimators import Estimate, Target, estimate

State = dict[str, Tensor]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_state(model: nn.Module, seed: int, size: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}


def pixels(n: int, classes: int = 2, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8, generator=generator)
    return Dataset("set", images, torch.randint(0, classes, (n,), generator=generator), MEAN, STD)


def inputs(data: Dataset) -> Tensor:
    mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (MEAN, STD))
    return ((data.images.double() / 255 - mean) / std).flatten(1)


class Two(nn.Module):
    """Two layers, and a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.idle = nn.Parameter(torch.zeros(2))
        self.last = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(images.flatten(1))))
        return out


class Setting:
    """A path, its evaluator, and the same model in float64 as a function of its weights."""

    def __init__(
        self, model: nn.Module, n: int = 24, classes: int = 2, size: float = 1.0, batch: int = 64
    ) -> None:
        self.model = model
        self.zero, self.one = random_state(model, 1, size), random_state(model, 2, size)
        self.path = Path(model, self.zero, self.one)
        self.data = pixels(n, classes)
        self.evaluator = Evaluator(model, [self.data], batch)
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = {name: tensor.shape for name, tensor in self.zero.items()}
        self._x = inputs(self.data)

    def estimate(
        self, alpha: float, rho: float, draws: int, layer: str | None = None, **how: Any
    ) -> Estimate:
        protocol = Protocol(**how)
        parts = self.evaluator.parts(protocol.noise_batch, "set")
        whole = (0, self.evaluator.stations - 1)
        span = whole if layer is None else self.evaluator.span(self.path.tensors(layer))
        target = Target(layer, *span)
        (results,) = estimate(self.path, parts, alpha, [target], [rho], draws, protocol)
        return results[target, rho]

    @property
    def brute(self) -> Brute:
        return Brute(self.model, self.zero, self.one, self.data)

    def of(self, images: Sequence[int]) -> Setting:
        """The same with some of the images."""
        other, chosen = copy.copy(self), list(images)
        other.data = Dataset("set", self.data.images[chosen], self.data.labels[chosen], MEAN, STD)
        other._x = self._x[chosen]
        return other

    def at(self, alpha: float) -> State:
        return {n: (1 - alpha) * self.zero[n].double() + alpha * self.one[n].double() for n in self.names}

    def scale(self, alpha: float, on: str, adaptive: bool, layer: str | None = None) -> State:
        """c: by how much noise of size one moves each weight; none outside of the layer."""
        ones = {n: torch.ones_like(self.one[n]).double() for n in self.names}
        of = (self.at(alpha) if on == "interpolated" else self.one) if adaptive else ones
        factor = 1.0 if on == "interpolated" else alpha
        found = {n: factor * w.double().abs() for n, w in of.items()}
        return {n: c if self.inside(n, layer) else 0 * c for n, c in found.items()}

    @staticmethod
    def inside(name: str, layer: str | None) -> bool:
        return layer is None or name.rpartition(".")[0] == layer or name == layer

    def logits(self, w: State) -> Tensor:
        if isinstance(self.model, Two):
            hidden = torch.tanh(self._x @ w["first.weight"].T + w["first.bias"])
            return hidden @ w["last.weight"].T + w["last.bias"]
        return self._x @ w["1.weight"].T + w["1.bias"]

    def loss(self, w: State) -> Tensor:
        logits = self.logits(w)
        return (logits.logsumexp(1) - logits[torch.arange(len(logits)), self.data.labels]).mean()

    def moved(self, alpha: float, scale: State, by: State) -> float:
        w = self.at(alpha)
        return float(self.loss({n: w[n] + scale[n] * by[n] for n in w}))

    def noise(self, seed: int, draw: int, kind: str) -> State:
        eps = noise_like([self.zero[n] for n in self.names], seed, draw, kind, impl="reference")
        return {n: e.double() for n, e in zip(self.names, eps, strict=True)}

    def hessian(self, alpha: float) -> tuple[Tensor, Tensor]:
        """The exact Hessian over all weights in a row, and for each its index among the names."""
        w = self.at(alpha)
        flat = torch.cat([w[n].flatten() for n in self.names])
        owner = torch.cat([torch.full((w[n].numel(),), i) for i, n in enumerate(self.names)])

        def loss(vector: Tensor) -> Tensor:
            pieces = vector.split([w[n].numel() for n in self.names])
            return self.loss({n: p.view(self.shapes[n]) for n, p in zip(self.names, pieces, strict=True)})

        return torch.func.hessian(loss)(flat), owner


def linear(n: int = 24) -> Setting:
    return Setting(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), n)


def two(n: int = 24) -> Setting:
    return Setting(Two(), n, classes=3)


# --- draws of noise: the exact expectation --------------------------------------------------------


PATTERNS = np.array(list(itertools.product((-1.0, 1.0), repeat=8)))  # the last one is -first


def by_image(s: Setting, alpha: float, rho: float, on: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every sign pattern of the eight weights, each as likely as any other, and image: [256, n].

    Returns:
        The rise of the loss, and <gradient, perturbation>.
    """
    scale, rises, along = s.scale(alpha, on, True), [], []
    images = [s.of([image]) for image in range(len(s.data.labels))]
    w = {n: t.requires_grad_() for n, t in s.at(alpha).items()}
    slopes = [torch.autograd.grad(one.loss(w), list(w.values())) for one in images]
    clean = torch.stack([one.loss(w).detach() for one in images])
    for pattern in torch.tensor(PATTERNS):
        by = {"1.weight": pattern[:6].view(2, 3), "1.bias": pattern[6:]}
        delta = {n: rho * scale[n] * by[n] for n in w}
        logits = s.logits({n: w[n].detach() + delta[n] for n in w})
        losses = logits.logsumexp(1) - logits[torch.arange(len(logits)), s.data.labels]
        rises.append(losses - clean)
        along.append(
            [
                sum(float((g * d).sum()) for g, d in zip(slope, delta.values(), strict=True))
                for slope in slopes
            ]
        )
    return torch.stack(rises).numpy(), np.array(along)


def enumerated(s: Setting, alpha: float, rho: float, on: str) -> np.ndarray:
    """L(w + delta) - L(w) for every sign pattern."""
    return by_image(s, alpha, rho, on)[0].mean(1)


def variance_per_image(values: np.ndarray) -> float:
    """Of the mean over images whose perturbations are D o (r s^T), for the weight, and D o b, for the bias.

    All images share D, so a covariance is left: that of their means over r, s and b, given D.
    """
    own = np.array(
        [
            [*np.outer(signs[:2], signs[2:5]).ravel(), *signs[5:]]
            for signs in itertools.product((-1, 1), repeat=7)
        ]
    )
    places = ((PATTERNS[:, None] * own + 1) / 2 @ 2 ** np.arange(7, -1, -1)).astype(int)  # [256, 128]
    given = values[places].mean(1)  # [256, n]
    covariance = given.sum(1).var() - given.var(0).sum()
    return float(values.var(0).sum() + covariance) / values.shape[1] ** 2


SEEDS, DRAWS, RHO = 120, 8, 0.8


@pytest.fixture(scope="module")
def repeated() -> dict[str, list[Estimate]]:
    """One estimate for each of many seeds, by every way of drawing."""
    s = linear()
    how = {"noise": "rademacher", "on": "interpolated"}
    return {
        name: [s.estimate(0.6, RHO, DRAWS, estimator=name, seed=seed, **how) for seed in range(SEEDS)]
        for name in SAMPLING
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLING)
def test_unbiased_for_all_sign_patterns(name: str, repeated: dict[str, list[Estimate]]) -> None:
    truth = enumerated(linear(), 0.6, RHO, "interpolated").mean()
    values = np.array([found.sharpness.value for found in repeated[name]])
    error = values.std(ddof=1) / math.sqrt(SEEDS)
    assert abs(values.mean() - truth) < 4 * error
    assert error < truth / 10  # so that was a test


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLING)
def test_standard_errors_are_those_that_seeds_show(name: str, repeated: dict[str, list[Estimate]]) -> None:
    values = np.array([found.sharpness.value for found in repeated[name]])
    told = np.array([found.sharpness.se for found in repeated[name]])
    # 120 seeds tell a variance to some 13 %; a factor of two would be far outside.
    assert 0.6 < np.mean(told**2) / values.var(ddof=1) < 1.7
    hits = np.array([found.accuracy.value for found in repeated[name]])
    told_hits = np.array([found.accuracy.se for found in repeated[name]])
    assert 0.6 < np.mean(told_hits**2) / hits.var(ddof=1) < 1.7
    # The interval of Student's t with DRAWS - 1 (pairs - 1) degrees of freedom holds the truth in 95 %.
    truth = enumerated(linear(), 0.6, RHO, "interpolated").mean()
    freedom = (DRAWS // 2 if name == "per-image-antithetic" else DRAWS) - 1
    assert {round(found.sharpness.df, 6) for found in repeated[name]} == {freedom}
    t = scipy.stats.t.ppf(0.975, freedom)
    assert 0.89 < np.mean(np.abs(values - truth) < t * told) < 0.995


@pytest.mark.slow
def test_the_variance_falls_as_it_must(repeated: dict[str, list[Estimate]]) -> None:
    rises, along = by_image(linear(), 0.6, RHO, "interpolated")
    exact = {
        "plain": rises.mean(1).var() / DRAWS,
        "gradient": (rises - along).mean(1).var() / DRAWS,
        "per-image": variance_per_image(rises) / DRAWS,
        "per-image-antithetic": variance_per_image((rises + rises[::-1]) / 2) / (DRAWS // 2),
        "per-image-gradient": variance_per_image(rises - along) / DRAWS,
    }
    for name, variance in exact.items():
        got = np.array([found.sharpness.value for found in repeated[name]]).var(ddof=1)
        assert got == pytest.approx(variance, rel=0.35), name
    assert exact["gradient"] < exact["plain"] / 4 and exact["per-image"] < exact["plain"] / 2
    assert exact["per-image-gradient"] < exact["gradient"] / 2


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_unbiased_also_on_the_finetuned_weights_and_with_noise_by_batch(name: str, noise: str) -> None:
    """Against 20,000 draws of torch's own noise on one layer, in float64, all at once."""
    s, rho = two(), 1.0
    got = s.estimate(
        0.7, rho, 200, "first", estimator=name, on="finetuned", noise=noise, noise_batch=9, seed=5
    )
    w, scale = s.at(0.7), s.scale(0.7, "finetuned", True)
    generator = torch.Generator().manual_seed(0)
    values = {}
    for key in ("first.weight", "first.bias"):
        size = (20_000, *scale[key].shape)
        if noise == "normal":
            eps = torch.randn(size, generator=generator, dtype=torch.float64)
        else:
            eps = 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1
        values[key] = w[key] + rho * scale[key] * eps
    hidden = torch.tanh(
        torch.einsum("ni,dji->dnj", inputs(s.data), values["first.weight"]) + values["first.bias"][:, None]
    )
    logits = hidden @ w["last.weight"].T + w["last.bias"]
    losses = (logits.logsumexp(2) - logits[:, torch.arange(24), s.data.labels]).mean(1) - s.loss(w)
    error = math.hypot(got.sharpness.se, float(losses.std()) / math.sqrt(len(losses)))
    assert abs(got.sharpness.value - float(losses.mean())) < 4 * error
    assert abs(losses.mean()) > 6 * error  # not zero for any reason


# --- Prop. A.1: the exact Hessian -----------------------------------------------------------------


@pytest.mark.parametrize("on", ["interpolated", "finetuned"])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("layer", [None, "first", "last", "idle"])
def test_products_are_those_of_the_exact_hessian(on: str, adaptive: bool, layer: str | None) -> None:
    """Draw by draw: rho^2 / 2 * v_i . (H v)_i with v = c * signs, H from torch.func in float64."""
    s, alpha, rho = two(), 0.7, 0.3
    hessian, owner = s.hessian(alpha)
    scale = s.scale(alpha, on, adaptive)
    values = []
    for draw in range(3):
        eps = s.noise(4, draw, "rademacher")
        v = torch.cat([(scale[n] * eps[n]).flatten() for n in s.names])
        mine = torch.tensor([s.inside(s.names[i], layer) for i in owner.tolist()])
        values.append(rho**2 / 2 * float((v * (hessian @ v))[mine].sum()))
    got = s.estimate(alpha, rho, 3, layer, estimator="hessian", on=on, adaptive=adaptive, seed=4)
    assert got.sharpness.value == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)
    assert got.sharpness.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), rel=1e-4, abs=1e-6)
    assert got.loss == pytest.approx(float(s.loss(s.at(alpha))), abs=1e-5)
    assert (got.draws, got.nonfinite, got.reached) == (3, 0, None)
    uniform = s.estimate(
        alpha, rho, 3, layer, estimator="hessian", on=on, adaptive=adaptive, seed=4, noise="uniform"
    )
    assert uniform.sharpness.value == pytest.approx(got.sharpness.value / 3, rel=1e-6)  # its variance is 1/3


def test_excluded_weights_have_no_signs() -> None:
    """v is zero there, so that H couples nothing to them; the others' signs stay."""
    s, rho = two(), 0.3
    hessian, _ = s.hessian(0.7)
    scale, values = s.scale(0.7, "interpolated", True, "last"), []
    for draw in range(3):
        eps = s.noise(4, draw, "rademacher")
        v = torch.cat([(scale[n] * eps[n]).flatten() for n in s.names])
        values.append(rho**2 / 2 * float(v @ hessian @ v))
    protocol = Protocol("hessian", seed=4)
    rows = studies.sharpness(s.path, s.evaluator, [0.7], [rho], 3, exclude=["first"], protocol=protocol)
    assert rows["sharpness"].item() == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)


def products(s: Setting, alpha: float, rho: float, draws: Sequence[int], protocol: Protocol) -> np.ndarray:
    """rho^2 / 2 * v . H v of the exact Hessian of each part, with signs of its own: [draws, parts]."""
    parts = s.brute.parts(protocol.noise_batch)
    hessians = [s.of(part).hessian(alpha)[0] for part in parts]
    scale, values = s.scale(alpha, protocol.where, protocol.adaptive), np.zeros((len(draws), len(parts)))
    for place, draw in enumerate(draws):
        for index, hessian in enumerate(hessians):
            eps = s.noise(protocol.seed, draw * len(parts) + index, "rademacher")
            v = torch.cat([(scale[n] * eps[n]).flatten() for n in s.names])
            values[place, index] = rho**2 / 2 * float(v @ hessian @ v)
    return values


def test_each_part_has_products_with_signs_of_its_own() -> None:
    s, rho = two(), 0.3
    protocol = Protocol("hessian", noise_batch=9, seed=4)
    got = s.estimate(0.7, rho, 4, estimator="hessian", noise_batch=9, seed=4)
    values = products(s, 0.7, rho, range(4), protocol)
    assert got.values == pytest.approx(values, rel=1e-4, abs=1e-6)
    value, error, freedom = moments(values, [9, 9, 6])
    assert got.sharpness.value == pytest.approx(value, rel=1e-4)
    assert got.sharpness.se == pytest.approx(error, rel=1e-3)
    assert got.sharpness.df == pytest.approx(freedom, rel=1e-3)
    assert math.isnan(got.images_se) and math.isnan(got.accuracy.se)


def trace(s: Setting, alpha: float, layer: str | None, on: str = "interpolated") -> float:
    """tr(H * c c^T): the diagonal of the exact Hessian, weighted, over the layer's weights."""
    hessian, _ = s.hessian(alpha)
    scale = s.scale(alpha, on, True, layer)
    c = torch.cat([scale[n].flatten() for n in s.names])
    return float((hessian.diagonal() * c * c).sum())


def test_the_limit_is_the_trace_layer_by_layer_and_adds_up() -> None:
    s, alpha = two(), 0.7
    layers = ["first", "last"]
    exact = {layer: trace(s, alpha, layer) for layer in (None, *layers)}
    assert exact[None] == pytest.approx(exact["first"] + exact["last"])
    for layer in (None, *layers):
        found = s.estimate(alpha, 1.0, 150, layer, estimator="hessian", seed=1)
        assert abs(2 * found.sharpness.value - exact[layer]) < 4 * 2 * found.sharpness.se
        assert found.sharpness.se < abs(exact[layer]) / 10

        errors, distances = [], []
        for rho in (0.4, 0.1, 0.03):
            drawn = s.estimate(alpha, rho, 100, layer, estimator="gradient", seed=2, noise="rademacher")
            errors.append(2 * drawn.sharpness.se / rho**2)
            distances.append(abs(2 * drawn.sharpness.value / rho**2 - exact[layer]))
            # What is left of higher order is of order rho^2, up to the draws' error and float32.
            assert distances[-1] < 4 * errors[-1] + 2 * rho**2 + 1e-7 / rho**2
        assert errors[-1] < abs(exact[layer]) / 10
    whole, *each = (s.estimate(alpha, 1.0, 5, layer, estimator="hessian") for layer in (None, *layers))
    assert whole.sharpness.value == pytest.approx(sum(found.sharpness.value for found in each), rel=1e-5)


@pytest.mark.parametrize("on", ["interpolated", "finetuned"])
def test_the_same_signs_meet_draw_by_draw_as_rho_shrinks(on: str) -> None:
    """For the whole model v.Hv is what both tend to, from the same seed: no chance is left between them."""
    s = two()
    limit = s.estimate(0.7, 1.0, 10, estimator="hessian", on=on, seed=6)
    for rho in (0.4, 0.1, 0.03, 0.01):
        drawn = s.estimate(0.7, rho, 10, estimator="gradient", on=on, seed=6, noise="rademacher")
        float32 = 1e-6 / rho**2
        assert abs(drawn.sharpness.value / rho**2 / limit.sharpness.value - 1) < 0.5 * rho + float32
        assert drawn.sharpness.se / rho**2 == pytest.approx(limit.sharpness.se, rel=3 * rho)


def test_small_rho_converges_to_the_trace() -> None:
    """Without noise in the comparison: every sign pattern of the layer, float64 against the diagonal."""
    s = linear()
    exact = trace(s, 0.6, "1")
    ratios = [2 * enumerated(s, 0.6, rho, "interpolated").mean() / rho**2 / exact for rho in (0.4, 0.2, 0.1)]
    gaps = [abs(ratio - 1) for ratio in ratios]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2)  # of second order
    # The estimator's own numbers converge alike, within their standard errors.
    for rho, ratio in zip((0.4, 0.2, 0.1), ratios, strict=True):
        found = s.estimate(0.6, rho, 200, "1", estimator="per-image-gradient", noise="rademacher", seed=3)
        assert (
            abs(2 * found.sharpness.value / rho**2 / exact - ratio)
            < 4 * 2 * found.sharpness.se / rho**2 / exact
        )


# --- at zero-shot nothing of the fine-tuned weights is left ---------------------------------------


@pytest.mark.parametrize("name", ESTIMATOR_CHOICES)
def test_noise_on_the_finetuned_weights_is_exactly_nothing_at_zero_shot(name: str) -> None:
    s = two()
    s.path.write(0.0, 0.7, seed=1, draw=3)  # the model itself: not one bit differs
    written = {n: t.clone() for n, t in s.model.state_dict().items()}
    assert all(torch.equal(written[n], s.zero[n]) for n in written)
    for layer in (None, "first"):
        for goal in (None,) if name.startswith("apgd") else (None, 1e-9):
            got = s.estimate(0.0, 0.7, 4, layer, estimator=name, on="finetuned", goal=goal)
            assert (got.sharpness.value, got.sharpness.se, got.draws, got.nonfinite) == (0.0, 0.0, 0, 0)
            assert got.images_se == got.accuracy.se == 0.0 and got.values.shape == (0, 1)
            assert got.loss == pytest.approx(float(s.loss(s.at(0.0))), abs=1e-6)
            assert got.reached is (None if goal is None else True)
    on_path = s.estimate(0.0, 0.7, 4, "first", estimator=name, on="interpolated")
    assert on_path.sharpness.value != 0.0 and on_path.draws == 4


# --- draws in two stages --------------------------------------------------------------------------


def by_brute(s: Setting, rho: float, draws: Sequence[int], protocol: Protocol) -> np.ndarray:
    """Sharpness at alpha = 0.7 by draw, or pair, and part."""
    if protocol.estimator == "hessian":
        return products(s, 0.7, rho, draws, protocol)
    return s.brute.draws(0.7, rho, draws, protocol).values


@pytest.mark.parametrize("name", [*SAMPLING, "hessian"])
@pytest.mark.parametrize("noise_batch", [None, 9])
def test_a_pilot_decides_on_the_draws_which_come_after_it(name: str, noise_batch: int | None) -> None:
    """Stein's rule: enough draws for Student's quantile, on the pilot's error, in place of the normal one."""
    s, pairs = two(), 2 if name == "per-image-antithetic" else 1
    how: dict[str, Any] = {"estimator": name, "seed": 2, "noise_batch": noise_batch}
    sizes, draws, first = ([24], 12, 12) if noise_batch is None else ([9, 9, 6], 24, 8)
    pilot = by_brute(s, 0.3, range(first), Protocol(**how))
    _, error, freedom = moments(pilot, sizes)
    goal = error / 1.2
    ratio = scipy.stats.t.ppf(0.975, freedom) / scipy.stats.norm.ppf(0.975) * error / goal
    wanted = len(pilot) * ratio**2
    got = s.estimate(0.7, 0.3, draws, goal=goal, **how)
    assert got.reached is True
    assert got.draws // pairs in (math.ceil(wanted * 0.998), math.ceil(wanted * 1.002))  # float32
    assert first < got.draws and got.draws % pairs == 0 and len(got.values) == got.draws // pairs
    after = by_brute(s, 0.3, range(first, first + got.draws), Protocol(**how))
    value, error, freedom = moments(after, sizes)
    assert got.values == pytest.approx(after, abs=3e-6, rel=1e-4)
    assert got.sharpness.value == pytest.approx(value, abs=3e-6)
    assert got.sharpness.se == pytest.approx(error, abs=3e-6, rel=1e-3)
    assert got.sharpness.df == pytest.approx(freedom, rel=0.01)
    met = s.estimate(0.7, 0.3, draws, goal=100.0, **how)
    assert (met.draws, met.reached) == (first, True)  # never fewer than the pilot's
    assert met.values == pytest.approx(after[: first // pairs], abs=3e-6, rel=1e-4)


@pytest.mark.parametrize("name", [*SAMPLING, "hessian"])
@pytest.mark.parametrize("most", [12, 13, 21])
def test_no_more_draws_than_the_maximum_with_those_of_the_pilot(name: str, most: int) -> None:
    s = two()
    got = s.estimate(0.7, 0.3, 6, estimator=name, goal=1e-9, most=most)
    room = most - 6
    assert got.reached is False and got.draws == room - (room % 2 if name == "per-image-antithetic" else 0)
    after = by_brute(s, 0.3, range(6, 6 + got.draws), Protocol(name))
    assert got.sharpness.value == pytest.approx(after.mean(), abs=3e-6)


@pytest.mark.slow
def test_each_target_and_rho_stops_on_its_own() -> None:
    s = two()
    parts = s.evaluator.parts(None, "set")
    targets, rhos = [Target("first", 0, 1), Target("last", 0, 1)], [0.01, 0.4]
    protocol = Protocol("plain", goal=0.06)
    together = {
        k: v for found in estimate(s.path, parts, 0.7, targets, rhos, 4, protocol) for k, v in found.items()
    }
    assert list(together) == [(target, rho) for target in targets for rho in rhos]
    assert {found.reached for found in together.values()} == {True}
    draws = {found.draws for found in together.values()}
    assert min(draws) == 4 and max(draws) > 20
    for (target, rho), found in together.items():
        (results,) = estimate(s.path, parts, 0.7, [target], [rho], 4, protocol)
        alone = results[target, rho]
        assert (found.sharpness, found.draws) == (alone.sharpness, alone.draws)
        names = [n for n in s.names if n.startswith(str(target.layer))]
        after = s.brute.draws(0.7, rho, range(4, 4 + found.draws), protocol, names)
        assert found.sharpness.value == pytest.approx(after.values.mean(), abs=3e-6)


def test_a_goal_fixes_the_choice_of_auto_by_the_pilot() -> None:
    s = two()
    got = s.estimate(0.7, 0.1, 8, estimator="auto", goal=0.001)
    own = s.estimate(0.7, 0.1, 8, estimator=got.estimator, goal=0.001)
    assert got.draws > 8 and got.estimator == "per-image-gradient"
    assert (got.sharpness, got.draws, got.accuracy) == (own.sharpness, own.draws, own.accuracy)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_results_come_target_by_target_and_the_rest_can_be_left(name: str) -> None:
    s = two()
    s.path.write(0.37, 0.2, seed=8)
    before, parts = s.path.checksum(), s.evaluator.parts(None, "set")
    targets, rhos = [Target("last", 0, 1), Target("first", 0, 1)], [0.1, 0.4]
    for alpha in (0.0, 0.7):
        found = list(estimate(s.path, parts, alpha, targets, rhos, 4, Protocol(name, on="finetuned")))
        keys = [[(target, rho) for target in targets for rho in rhos]]
        if name != "hessian":  # whose products serve all targets
            keys = [keys[0][:2], keys[0][2:]]
        assert [list(results) for results in found] == keys
        left = estimate(s.path, parts, alpha, targets, rhos, 4, Protocol(name, on="finetuned"))
        assert next(left).keys() == found[0].keys()
        left.close()
        assert s.path.checksum() == before and s.path.alpha == 0.37
    assert list(estimate(s.path, parts, 0.7, [], rhos, 4, Protocol(name))) == []


# --- losses that are not finite -------------------------------------------------------------------


class Bursting(nn.Module):
    """exp(gate) leaves float32 where the gate passes 88.72: for some draws, not for the clean weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.mix(images.flatten(1)) * 1e-38 * self.gate.exp()
        return out


def bursting() -> Setting:
    model = Bursting()
    zero, one = random_state(model, 1), random_state(model, 2)
    zero["gate"], one["gate"] = torch.tensor(87.0), torch.tensor(88.0)
    s = Setting(model, 24, classes=3)
    s.zero, s.one, s.path = zero, one, Path(model, zero, one)
    s.evaluator = Evaluator(model, [s.data], batch_size=10)
    return s


@pytest.mark.parametrize("name", [*SAMPLING, "auto"])
@pytest.mark.parametrize("noise_batch", [None, 9])
def test_losses_that_are_not_finite_are_counted_and_never_averaged_away(
    name: str, noise_batch: int | None
) -> None:
    s, rho, draws = bursting(), 0.01, 12
    brute = s.brute
    parts, names = brute.parts(noise_batch), brute.names
    block = first_blocks([s.zero[n].numel() for n in names])[names.index("gate")]
    burst = []  # for each draw: how many images
    for draw in range(draws):
        number, sign = (draw // 2, 1 - 2 * (draw % 2)) if name == "per-image-antithetic" else (draw, 1)
        gates: list[float] = []
        for index, part in enumerate(parts):
            copies = brute.noise(3, number * len(parts) + index, "normal")["gate"]
            images, by = torch.tensor(list(part)), copies[0].expand(len(part))
            if name not in ("plain", "gradient"):
                by = copies[images % COPIES] * signs(3, number, images, block, 1)[:, 0]
            gates += (88.0 * (1 + sign * rho * by)).tolist()
        burst.append(sum(gate > 88.7228 for gate in gates))
    pilot = 12 // len(parts)
    assert 2 < sum(map(bool, burst)) and any(burst[:pilot])
    how: dict[str, Any] = {"estimator": name, "on": "finetuned", "seed": 3, "noise_batch": noise_batch}
    got = s.estimate(1.0, rho, draws, "gate", **how)
    assert got.nonfinite == sum(burst) and got.draws == draws
    assert not math.isfinite(got.sharpness.value) and math.isnan(got.sharpness.se)
    assert math.isnan(got.images_se) and math.isfinite(got.loss)
    assert 0 <= got.accuracy.value < 1  # what has no loss is no hit
    # A wanted standard error is not reached, and no more draws are spent on it than on the pilot.
    got = s.estimate(1.0, rho, draws, "gate", goal=0.1, **how)
    assert (got.draws, got.reached) == (pilot, False)
    calm = s.estimate(1.0, rho, draws, "mix", **how)
    assert calm.nonfinite == 0 and math.isfinite(calm.sharpness.value)


def test_clean_losses_that_are_not_finite_show_everywhere() -> None:
    s = bursting()
    s.one["gate"] = torch.tensor(89.0)
    s.path = Path(s.model, s.zero, s.one)
    for name in ESTIMATOR_CHOICES:
        got = s.estimate(1.0, 0.01, 4, "mix", estimator=name)
        assert got.nonfinite > 0 and not math.isfinite(got.sharpness.value), name
    assert s.estimate(0.0, 0.01, 4, "mix", on="finetuned").nonfinite == 0


# --- weights come back ----------------------------------------------------------------------------


class Failing:
    """A method of the evaluator that fails when it has been called so many times."""

    def __init__(self, times: int, error: type[BaseException], call: Callable[..., Any]) -> None:
        self.left, self.error, self.call = times, error, call

    def bound(self) -> Callable[..., Any]:
        def method(evaluator: Evaluator, *arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error("stop")
            return self.call(evaluator, *arguments)

        return method


def flags(s: Setting) -> list[Any]:
    return [
        *((p.requires_grad, p.grad) for p in s.model.parameters()),
        *(module.training for module in s.model.modules()),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
    ]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("layer", [None, "first"])
def test_weights_come_back_bit_for_bit(name: str, layer: str | None) -> None:
    s = two()
    s.model.last.bias.requires_grad_(False)  # type: ignore[union-attr]
    s.path.write(0.37, 0.2, seed=8)
    s.path.write(0.9, layers=["last"])
    before, flagged = s.path.checksum(), flags(s)
    first = s.estimate(0.7, 0.3, 4, layer, estimator=name)
    assert s.path.checksum() == before and flags(s) == flagged
    assert s.path.alpha is None
    second = s.estimate(0.7, 0.3, 4, layer, estimator=name)
    assert (first.sharpness.value, first.accuracy.value) == (second.sharpness.value, second.accuracy.value)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("times", [0, 3])
def test_weights_come_back_after_a_failure(
    name: str, error: type[BaseException], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = two()
    s.path.write(0.37, 0.2, seed=8)
    before, flagged = s.path.checksum(), flags(s)
    failing = Failing(times, error, nn.Linear.forward)
    for layer in (None, "last"):
        with monkeypatch.context() as m:
            m.setattr(nn.Linear, "forward", failing.bound())
            failing.left = times
            with pytest.raises(error, match="stop"):
                s.estimate(0.7, 0.3, 4, layer, estimator=name)
        assert s.path.checksum() == before and flags(s) == flagged
        assert s.path.alpha == 0.37


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "facts"),
    [
        ({"estimator": "exact"}, "exact"),
        ({"on": "zeroshot"}, "zeroshot"),
        ({"noise": "cauchy"}, "cauchy"),
        ({"seed": -1}, "2**64"),
        ({"seed": 2**63}, "2**63 64-bit"),
        ({"seed": 2**64 - 1}, "2**63 18446744073709551615"),
        ({"noise_batch": 0}, "noise_batch"),
        ({"noise_batch": 2.5}, "noise_batch"),
        ({"goal": 0.0}, ""),
        ({"goal": math.nan}, ""),
        ({"goal": math.inf}, ""),
        ({"most": 0}, ""),
    ],
)
def test_protocols_that_cannot_be(how: dict[str, Any], facts: str) -> None:
    with refused(ValueError, *facts.split()):
        Protocol(**how)


def test_protocols_of_wrong_types() -> None:
    with refused(TypeError):
        Protocol(seed=1.5)  # type: ignore[arg-type]
    with refused(TypeError):
        Protocol(adaptive="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "draws", "facts"),
    [
        ({}, 0, ""),
        ({}, -3, "-3"),
        ({"estimator": "per-image-antithetic"}, 5, "5 6"),
        ({"goal": 0.1}, 3, "4 3"),
        ({"goal": 0.1, "most": 23}, 12, "12 23 24"),
    ],
)
def test_draws_that_cannot_be(how: dict[str, Any], draws: int, facts: str) -> None:
    with refused(ValueError, *facts.split()):
        Protocol(**how).check_draws(draws)


@pytest.mark.parametrize("draws", [2.0, True, None, "20"])
def test_draws_of_wrong_types(draws: Any) -> None:
    with refused(TypeError):
        Protocol().check_draws(draws)


def test_draws_that_can_be() -> None:
    Protocol().check_draws(1)
    Protocol("per-image-antithetic").check_draws(2)
    Protocol(goal=0.1, most=8).check_draws(4)


@pytest.mark.parametrize(
    ("estimator", "draws", "parts", "pilot"),
    [
        ("plain", 20, 1, 20), ("plain", 20, 8, 3), ("plain", 20, 50, 2), ("auto", 4, 3, 2),
        ("per-image-antithetic", 20, 1, 20), ("per-image-antithetic", 20, 3, 8),
        ("per-image-antithetic", 20, 50, 4),
    ],
)  # fmt: skip
def test_draws_of_a_pilot(estimator: Any, draws: int, parts: int, pilot: int) -> None:
    """In all parts together, as many as asked for, but two draws, or pairs, of each part."""
    assert Protocol(estimator).pilot(draws, parts) == pilot
