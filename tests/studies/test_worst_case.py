"""The worst case against closed forms, random guesses, and both climbs written out in float64."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from support.wording import refused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.kernels import noise_like
from rft_fast.names import WORST_CASE
from rft_fast.path import Path
from rft_fast.run import cost
from rft_fast.studies import Protocol
from rft_fast.studies.estimators import Estimate, Target, estimate
from rft_fast.studies.estimators.climbs import CLIMBS, copies

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ALPHA = 0.7
Loss = Callable[[Tensor], tuple[float, Tensor]]  # of all weights in a row, with its gradient


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """A path of a small model, and the same model in float64 as a function of its weights in a row.

    Args:
        hidden: units between the two layers; 0: one layer.
        zeros: number of weights of the first layer that are 0 at both ends.
    """

    def __init__(self, n: int = 24, classes: int = 3, hidden: int = 3, zeros: int = 0) -> None:
        layers = [nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, classes)] if hidden else []
        self.model = nn.Sequential(nn.Flatten(), *(layers or [nn.Linear(3, classes)]))
        generator = torch.Generator().manual_seed(1)
        ends = []
        for _ in range(2):
            end = {k: torch.randn(t.shape, generator=generator) for k, t in self.model.state_dict().items()}
            end["1.weight"].flatten()[:zeros] = 0.0
            ends.append(end)
        self.zero, self.one = ends
        self.path = Path(self.model, *ends)
        images = torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8, generator=generator)
        self.data = Dataset("set", images, torch.randint(0, classes, (n,), generator=generator), MEAN, STD)
        self.evaluator = Evaluator(self.model, [self.data], 64)
        self._double = copy.deepcopy(self.model).double()
        mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (MEAN, STD))
        self._inputs = (images.double() / 255 - mean) / std

    def row(self, state: dict[str, Tensor]) -> Tensor:
        return torch.cat([state[name].double().flatten() for name in self.zero])

    def split(self, row: Tensor) -> list[Tensor]:
        sizes = [t.numel() for t in self.zero.values()]
        return [p.view_as(t) for p, t in zip(row.split(sizes), self.zero.values(), strict=True)]

    def clean(self, alpha: float = ALPHA) -> Tensor:
        return (1 - alpha) * self.row(self.zero) + alpha * self.row(self.one)

    def scale(self, on: str, adaptive: bool, alpha: float = ALPHA, layer: str | None = None) -> Tensor:
        """c: how far u of 1 moves each weight; 0 outside of the layer."""
        own = self.clean(alpha) if on == "interpolated" else self.row(self.one)
        size = own.abs() if adaptive else torch.ones_like(own)
        inside = [
            torch.full(t.shape, float(layer is None or n.startswith(f"{layer}.")))
            for n, t in self.zero.items()
        ]
        return size * torch.cat([i.flatten() for i in inside]) * (1.0 if on == "interpolated" else alpha)

    def logits(self, row: Tensor, images: slice = slice(None)) -> Tensor:
        weights = dict(zip(self.zero, self.split(row), strict=True))
        found: Tensor = torch.func.functional_call(self._double, weights, (self._inputs[images],))
        return found

    def loss(self, images: slice = slice(None)) -> Loss:
        def of(row: Tensor) -> tuple[float, Tensor]:
            row = row.detach().requires_grad_()
            loss = nn.functional.cross_entropy(self.logits(row, images), self.data.labels[images])
            return loss.item(), torch.autograd.grad(loss, row)[0]

        return of

    def estimate(self, rho: float, steps: int, layer: str | None = None, **how: Any) -> Estimate:
        protocol = Protocol(**{"on": "interpolated", "noise_batch": None, **how})
        parts = self.evaluator.parts(protocol.noise_batch, "set")
        span = (
            (0, self.evaluator.stations - 1)
            if layer is None
            else self.evaluator.span(self.path.tensors(layer))
        )
        target = Target(layer, *span)
        (results,) = estimate(self.path, parts, how.get("alpha", ALPHA), [target], [rho], steps, protocol)
        return results[target, rho]

    def climbed(
        self, start: Tensor, rho: float, steps: int, estimator: Any, noise_batch: int | None, **how: Any
    ) -> list[float]:
        """The rise of the loss on each part, from a given u."""
        protocol = Protocol(estimator, noise_batch=noise_batch, **{"on": "interpolated", **how})
        u, found = [part.float() for part in self.split(start)], []
        with self.path.at(ALPHA):
            for part in self.evaluator.parts(noise_batch, "set"):
                clean = part.scores()["set"].loss
                with self.path.borrowed() as weights:
                    climb = CLIMBS[estimator](weights, ALPHA, rho, WORST_CASE[estimator], protocol)
                    climb.run(part, clean, steps, [u])
                    found.append(part.scores()["set"].loss - clean)
        return found


def batches(n: int, size: int | None) -> list[slice]:
    return [slice(at, min(at + (size or n), n)) for at in range(0, n, size or n)]


# --- both climbs, written out from their definitions ------------------------------------------------


def auto_pgd(loss: Loss, clean: Tensor, c: Tensor, rho: float, steps: int, norm: str, u: Tensor) -> float:
    """The highest loss that Auto-PGD meets (Croce & Hein 2020, Algorithm 1).

    Momentum starts anew wherever the search does.
    """

    def look(u: Tensor) -> tuple[float, Tensor]:
        value, slope = loss(clean + c * u)
        return value, slope * c

    def project(u: Tensor) -> Tensor:
        return u.clamp(-rho, rho) if norm == "linf" else u * min(1.0, rho / max(float(u.norm()), 1e-30))

    checks, p = [0.0, 0.22], 0.22
    while p < 1:
        p = p + max(checks[-1] - checks[-2] - 0.03, 0.06)
        checks.append(p)
    at = {math.ceil(p * steps) for p in checks[1:] if p < 1}

    x = last = u
    f, slope = look(x)
    best, f_best, slope_best = x, f, slope
    step, improved, since, halved, f_best_then = 2 * rho, 0, 0, False, f
    for k in range(1, steps + 1):
        ascent = slope.sign() if norm == "linf" else slope / slope.norm()
        z = project(x + step * ascent)
        new = z if k == 1 else project(x + 0.75 * (z - x) + 0.25 * (x - last))
        last, x, f_last = x, new, f
        f, slope = look(x)
        improved, since = improved + (f > f_last), since + 1
        if f > f_best:
            best, f_best, slope_best = x, f, slope
        if k in at:
            halved = improved < 0.75 * since or (not halved and f_best == f_best_then)
            if halved:
                step, x, last, f, slope = step / 2, best, best, f_best, slope_best
            improved, since, f_best_then = 0, 0, f_best
    return f_best


def published(
    loss: Loss,
    clean: Tensor,
    size: Tensor,
    rho: float,
    steps: int,
    norm: str,
    delta: Tensor,
    zero_over_zero: bool = False,
) -> float:
    """The number of the published code for one batch and one start, in delta.

    Args:
        size: |w| if adaptive, else 1.
        delta: the start.
        zero_over_zero: whether a weight of 0 makes the norm NaN, which then no comparison finds too large.
    """

    def shrunk(delta: Tensor, m: float) -> Tensor:
        """The point that minimises the distance to delta plus m |u|^2 / 2 ... in the weights."""
        return torch.where(size > 0, delta / (1 + m / size.square()), 0.0)

    def length(delta: Tensor) -> float:
        ratio = delta / size
        return float((ratio if zero_over_zero else torch.where(size > 0, ratio, 0.0)).norm())

    def project(delta: Tensor) -> Tensor:
        if norm == "linf":
            return torch.minimum(torch.maximum(delta, -rho * size), rho * size)
        if not length(delta) > rho:
            return delta
        m = brentq(lambda m: length(shrunk(delta, m)) - rho, 0.0, 1e6, xtol=1e-14, rtol=1e-14)
        return shrunk(delta, m)

    marks = [0.0, 0.22]
    checks = [math.ceil(0.22 * steps)]
    while checks[-1] < steps and checks[-1] not in checks[:-1]:
        marks.append(marks[-1] + max(marks[-1] - marks[-2] - 0.03, 0.06))
        checks.append(math.ceil(marks[-1] * steps))

    highest = loss(clean)[0]  # the loss of the start is not looked at
    highest_weights = clean + delta
    weights, previous = clean + delta, delta
    step, step_before, highest_before, ups, checked = 2 * rho, 2 * rho, highest, 0, 0
    for i in range(steps):
        slope = loss(weights)[1]
        ascent = slope.sign() if norm == "linf" else slope / slope.norm()
        stepped = project(delta + step * size * ascent)
        delta, previous = 0.75 * stepped + 0.25 * previous, delta
        weights = clean + delta
        value = loss(weights)[0]
        if value > highest:
            highest, highest_weights, ups = value, weights, ups + 1
        if i in checks:
            too_few = ups < 0.75 * (i - checked)
            nothing_new = step == step_before and highest == highest_before
            step_before, highest_before, checked, ups = step, highest, i, 0
            if too_few or nothing_new:
                step, weights = step / 2, highest_weights  # delta stays where it is
    return highest


def start_in_ball(c: Tensor, rho: float, norm: str, seed: int) -> Tensor:
    """A random u, 0.8 of the way to the edge."""
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        return 0.8 * rho * (2 * torch.rand(c.shape, generator=generator) - 1).double()
    u = torch.randn(c.shape, generator=generator).double() * (c > 0)
    return 0.8 * rho * u / u.norm()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("started", [False, True])
def test_the_published_number_on_a_given_start(norm: str, adaptive: bool, steps: int, started: bool) -> None:
    """Batch by batch, on interpolated weights."""
    case, c = Case(), Case().scale("interpolated", adaptive)
    for rho in (0.3, 1.5) if norm == "l2" else (0.05, 0.5):
        u = start_in_ball(c, rho, norm, 3) if started else torch.zeros_like(c)
        expected = []
        for images in batches(24, 10):
            loss = case.loss(images)
            highest = published(loss, case.clean(), c, rho, steps, norm, c * u)
            expected.append(highest - loss(case.clean())[0])
        got = case.climbed(u, rho, steps, f"apgd-{norm}-published", 10, adaptive=adaptive)
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-6) and max(got) > 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("rho", [0.5, 0.9, 2.0])
@pytest.mark.parametrize("steps", [2, 12])
@pytest.mark.parametrize("started", [False, True])
def test_auto_pgd_on_a_given_start(norm: str, rho: float, steps: int, started: bool) -> None:
    """In balls so wide that steps overshoot: sizes are halved, the best is returned to."""
    case, c = Case(), Case().scale("interpolated", True)
    u = start_in_ball(c, rho, norm, 4) if started else torch.zeros_like(c)
    expected = []
    for images in batches(24, 10):
        loss = case.loss(images)
        highest = auto_pgd(loss, case.clean(), c, rho, steps, norm, u)
        expected.append(highest - loss(case.clean())[0])
    got = case.climbed(u, rho, steps, f"apgd-{norm}", 10)
    assert got == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_a_weight_of_zero_does_not_end_the_projection() -> None:
    """The published code divides 0 by 0 there, and then projects nothing."""
    case = Case(zeros=2)
    c, loss, rho = case.scale("interpolated", True), case.loss(), 0.3
    assert int((c == 0).sum()) == 2
    none = torch.zeros_like(c)
    clean = loss(case.clean())[0]
    right = published(loss, case.clean(), c, rho, 20, "l2", none) - clean
    wrong = published(loss, case.clean(), c, rho, 20, "l2", none, zero_over_zero=True) - clean
    (got,) = case.climbed(none, rho, 20, "apgd-l2-published", None)
    assert got == pytest.approx(right, rel=1e-3)
    assert wrong > 3 * right  # far outside of the ball


def test_the_published_projection_is_the_nearest_point_over_many_sizes_of_weights() -> None:
    """Optimality conditions of min |d - e|^2 with |d / c| <= rho: (e - d) c^2 / d is the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    sizes = 10 ** (8 * torch.rand(40, 40, generator=generator) - 7)
    path = Path(model, {"weight": sizes}, {"weight": sizes.clone()})
    u = torch.randn(40, 40, generator=generator)
    with path.at(1.0), path.borrowed() as weights:
        for rho in (1e-3, 1.0, 0.9 * float(u.norm())):
            climb = CLIMBS["apgd-l2-published"](weights, 1.0, rho, 2.0, Protocol("apgd-l2-published"))
            (found,) = climb.project([u.clone()])
            assert float(found.double().norm()) == pytest.approx(rho, rel=1e-5)
            # In u: u / found - 1 = m / c^2.
            m = (u.double() / found.double() - 1) * sizes.double() ** 2
            moved = (found / u).abs() < 0.9  # elsewhere the difference is rounding
            assert float(m[moved].std() / m[moved].mean()) < 1e-4


# --- in the ball, at the maximum -------------------------------------------------------------------------


class Watch:
    """Records how far the live weights are from where they were, in units of c, at every look."""

    def __init__(self, case: Case, c: Tensor) -> None:
        self.looks: list[tuple[float, float, float]] = []  # l2, linf, loss
        gradient = Evaluator.gradient

        def spied(evaluator: Evaluator, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
            delta = case.row(dict(case.model.named_parameters())).detach() - case.clean()
            assert delta[c == 0].abs().sum() < 1e-5, "weights outside moved"
            u = delta[c > 0] / c[c > 0]
            found = gradient(evaluator, weights)
            self.looks.append((float(u.norm()), float(u.abs().max()), found[0]))
            return found

        self.spied = spied


@pytest.mark.parametrize("estimator", WORST_CASE)
@pytest.mark.parametrize("on", ["interpolated", "finetuned"])
@pytest.mark.parametrize("layer", [None, "1"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_worst_case_stays_in_the_ball_and_beats_a_hundred_guesses(
    estimator: str, on: str, layer: str | None, adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, euclidean = Case(), "l2" in estimator
    rho = (0.8 if euclidean else 0.2) * (1 if adaptive else 0.5)
    how: dict[str, Any] = {"estimator": estimator, "on": on, "adaptive": adaptive}
    c, loss = case.scale(on, adaptive, layer=layer), case.loss()
    watch = Watch(case, c)
    with monkeypatch.context() as m:
        m.setattr(Evaluator, "gradient", watch.spied)
        got = case.estimate(rho, 12, layer, **how, restarts=3)
    assert len(watch.looks) == 3 * 13
    lengths = [look[0 if euclidean else 1] for look in watch.looks]
    assert max(lengths) <= rho * (1 + 1e-4) and max(lengths) > 0.9 * rho
    clean = loss(case.clean())[0]
    assert got.loss == pytest.approx(clean, abs=1e-5) and watch.looks[0][0] < 1e-5
    # It is the highest loss seen; the published loop does not count those of the random starts.
    counted = [
        look[2] for n, look in enumerate(watch.looks) if "published" not in estimator or n % 13 or not n
    ]
    assert got.sharpness.value == pytest.approx(max(counted) - clean, abs=1e-5) and got.sharpness.value > 0
    assert math.isnan(got.sharpness.se) and math.isnan(got.sharpness.df)
    assert got.draws == 12 and got.reached is None

    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        u = torch.randn(c.shape, generator=generator).double() * (c != 0)
        u = rho * u / u.norm() if euclidean else rho * u.sign()
        assert loss(case.clean() + c * u)[0] - clean <= got.sharpness.value + 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("on", ["interpolated", "finetuned"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_worst_case_of_logistic_regression_is_known(norm: str, on: str, adaptive: bool) -> None:
    """One image: the loss falls with the margin, which is linear, so its lowest is at the ball's edge."""
    case, rho = Case(1, classes=2, hidden=0), 0.4
    w = case.clean().requires_grad_()
    logits, label = case.logits(w)[0], int(case.data.labels[0])
    margin = logits[label] - logits[1 - label]
    slope = torch.autograd.grad(margin, w)[0]
    c, margin = case.scale(on, adaptive), margin.detach()
    reach = slope * c
    lowest = float(margin) - rho * float(reach.norm() if norm == "l2" else reach.abs().sum())
    highest = math.log1p(math.exp(-lowest)) - math.log1p(math.exp(-float(margin)))
    how: dict[str, Any] = {"on": on, "adaptive": adaptive}
    got = case.estimate(rho, 20, estimator=f"apgd-{norm}", **how)
    assert got.sharpness.value == pytest.approx(highest, rel=1e-5)
    assert got.accuracy.value == float(lowest > 0)
    # A step is as long as the ball is wide: one reaches the edge, and being linear, the maximum.
    one = case.estimate(rho, 1, estimator=f"apgd-{norm}", **how)
    assert one.sharpness.value == pytest.approx(highest, rel=1e-5)
    # The published loop gets there, but where the projection is not that of the step: there u ends at
    # c^2 times the slope, not at c times it.
    theirs = case.estimate(rho, 30, estimator=f"apgd-{norm}-published", **how).sharpness.value
    if norm == "l2" and adaptive:
        end = slope * c**2
        lower = float(margin) - rho * float(reach @ end / end.norm())
        end_at = math.log1p(math.exp(-lower)) - math.log1p(math.exp(-float(margin)))
        assert theirs < 0.999 * highest
        assert theirs >= end_at * (1 - 1e-4)
    else:
        assert theirs == pytest.approx(highest, rel=1e-5)


# --- restarts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", WORST_CASE)
@pytest.mark.parametrize("layer", [None, "3"])
def test_restarts_take_the_highest_loss_of_each_batch(estimator: str, layer: str | None) -> None:
    """Start r of part p of P has the noise of draw r P + p, as it is in the whole model."""
    case, rho, seed = Case(), 0.5, 11
    c = case.scale("interpolated", True, layer=layer)
    norm = "l2" if "l2" in estimator else "linf"
    got = case.estimate(rho, 5, layer, estimator=estimator, noise_batch=9, restarts=3, seed=seed)
    each = np.zeros((3, 3))
    for restart in range(3):
        for part, images in enumerate(batches(24, 9)):
            noise = noise_like(
                list(case.zero.values()), seed, restart * 3 + part, "normal" if norm == "l2" else "uniform"
            )
            u = torch.cat([n.double().flatten() for n in noise]) * (c > 0)
            u = rho * (u if norm == "linf" else u / u.norm()) * (restart > 0)
            loss = case.loss(images)
            climb = published if "published" in estimator else auto_pgd
            given = c * u if "published" in estimator else u
            if "published" in estimator and layer is not None:
                inside = loss

                def loss(row: Tensor, inside: Loss = inside) -> tuple[float, Tensor]:
                    value, slope = inside(row)
                    return value, slope * (c > 0)

            each[restart, part] = climb(loss, case.clean(), c, rho, 5, norm, given) - loss(case.clean())[0]
    assert got.values[0] == pytest.approx(each.max(0), rel=2e-3)
    assert len(set(each.argmax(0))) > 1 or each.std(0).max() > 0  # starts differ
    assert got.sharpness.value == pytest.approx(got.values[0] @ [9 / 24, 9 / 24, 6 / 24], rel=1e-12)
    one = case.estimate(rho, 5, layer, estimator=estimator, noise_batch=9)
    assert (one.values <= got.values + 1e-7).all()


@pytest.mark.parametrize("estimator", WORST_CASE)
def test_without_restarts_there_is_no_chance(estimator: str) -> None:
    case = Case()
    first, other = (
        case.estimate(0.5, 6, estimator=estimator, noise_batch=9, seed=seed, noise=noise)
        for seed, noise in ((0, "normal"), (9, "uniform"))
    )
    assert np.array_equal(first.values, other.values)
    many = [
        case.estimate(0.5, 2, estimator=estimator, noise_batch=9, seed=s, restarts=2).values
        for s in (0, 0, 1)
    ]
    assert np.array_equal(many[0], many[1])


def test_starts_are_spread_over_the_ball() -> None:
    """Uniform in it (linf), or of norm rho (l2), 0 where weights cannot move."""
    from scipy.stats import kstest

    generator = torch.Generator().manual_seed(0)
    end = {"weight": torch.randn(60, 60, generator=generator)}
    end["weight"][0] = 0.0
    path = Path(nn.Linear(60, 60, bias=False), end, end)
    for estimator, norm in WORST_CASE.items():
        kind = "normal" if norm == 2 else "uniform"
        with path.at(1.0), path.borrowed() as weights:
            climb = CLIMBS[estimator](weights, 1.0, 0.3, norm, Protocol(estimator))
            (u,) = climb.inside(noise_like([weights[0].live], 5, 2, kind))
        if norm == 2:
            assert float(u.norm()) == pytest.approx(0.3, rel=1e-6) and not u[0].any()
            assert kstest(u[1:].flatten().numpy() / (0.3 / 3540**0.5), "norm").pvalue > 1e-3
        else:
            assert kstest(u.flatten().numpy() / 0.3, "uniform", args=(-1, 2)).pvalue > 1e-3


# --- the error over batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", WORST_CASE)
def test_the_error_over_batches(estimator: str) -> None:
    case = Case()
    equal = case.estimate(0.5, 4, estimator=estimator, noise_batch=6)
    values = equal.values[0]
    assert len(values) == 4 and values.std() > 0
    assert equal.sharpness.value == pytest.approx(values.mean(), rel=1e-12)
    assert equal.sharpness.se == pytest.approx(values.std(ddof=1) / 2, rel=1e-12)
    assert equal.sharpness.df == 3
    # Batches of 9, 9 and 6: the same by images, each of which has its batch's value, clustered by batch.
    uneven = case.estimate(0.5, 4, estimator=estimator, noise_batch=9)
    by_image = np.repeat(uneven.values[0], [9, 9, 6])
    mean = by_image.mean()
    clusters = [(by_image[images] - mean).sum() for images in batches(24, 9)]
    assert uneven.sharpness.value == pytest.approx(mean, rel=1e-12)
    assert uneven.sharpness.se == pytest.approx(math.sqrt(3 / 2 * np.square(clusters).sum()) / 24, rel=1e-12)
    assert uneven.sharpness.df == 2
    # One batch is no sample.
    for size in (None, 24, 100):
        one = case.estimate(0.5, 4, estimator=estimator, noise_batch=size).sharpness
        assert math.isnan(one.se) and math.isnan(one.df) and math.isfinite(one.value)


# --- cost, rows, and what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["apgd-linf", "apgd-l2-published"])
@pytest.mark.parametrize(("noise_batch", "parts"), [(9, 3), (None, 1)])
def test_the_plan_counts_a_gradient_for_each_start_and_step(
    estimator: Any, noise_batch: int | None, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, made = Case(), 0
    protocol = Protocol(estimator, noise_batch=noise_batch, restarts=5)

    def study(path: Path, evaluator: Evaluator) -> object:
        return studies.sharpness(path, evaluator, [0.5, 1.0], [0.1, 0.5], 3, protocol=protocol)

    work = cost.count(study, case.path, case.evaluator, {"set": (24, False)})
    expected = 2 * 2 * 5 * (3 + 1)  # alphas, rhos, starts, steps and the start itself
    assert (sum(work.gradients), work.batches) == (expected * 24, expected * parts)
    gradient = Evaluator.gradient

    def counted(evaluator: Evaluator, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        nonlocal made
        made += 1
        return gradient(evaluator, weights)

    monkeypatch.setattr(Evaluator, "gradient", counted)
    study(case.path, case.evaluator)
    assert made == expected * parts


class Held(TorchDispatchMode):
    """The most bytes of tensors, made while it is entered, that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if made._cdata not in self._known and made._cdata not in given:
                self._known.add(made._cdata)
                self.now += made.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(made, self._freed, made._cdata, made.nbytes())
        return out

    def _freed(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.now -= size


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("estimator", WORST_CASE)
def test_the_plan_has_the_memory_of_a_search(estimator: Any, restarts: int) -> None:
    """One large weight: everything that a search holds is a multiple of it."""
    torch.manual_seed(0)  # of what a search holds, one or two copies depend on where it goes
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 16, bias=False))
    ends = [{"1.weight": torch.randn(16, 3 * 64 * 64)} for _ in range(2)]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    evaluator = Evaluator(model, [Dataset("set", images, torch.tensor([0, 1]), MEAN, STD)], 64)
    path = Path(model, *ends)
    protocol = Protocol(estimator, noise_batch=None, restarts=restarts)

    def study(path: Path, evaluator: Evaluator) -> None:
        studies.sharpness(path, evaluator, [1.0], [0.1], 8, protocol=protocol)

    work = cost.count(study, path, evaluator, {"set": (2, False)})
    size = 4 * 16 * 3 * 64 * 64
    planned = cost.memory(work, evaluator, path, 2, copies(estimator, restarts)).copies / size
    with Held() as held:
        study(path, evaluator)
    most = held.most / size  # with images and activations, an eighth of the weight each
    assert most - 0.5 <= planned <= most + 2.5


def test_rows_tell_restarts_and_the_seed_of_random_starts() -> None:
    case = Case()
    for restarts, seed in ((1, None), (2, 5)):
        protocol = Protocol("apgd-l2", noise_batch=9, restarts=restarts, seed=5)
        rows = studies.sharpness(case.path, case.evaluator, [0.5], [0.2], 3, protocol=protocol)
        row = rows.iloc[0]
        assert (row["restarts"], row["draws"], row["sharpness_df"]) == (restarts, 3, 2)
        assert rows["seed"].isna().all() if seed is None else row["seed"] == seed
        assert rows["noise"].isna().all()
    drawn = studies.sharpness(case.path, case.evaluator, [0.5], [0.2], 3, protocol=Protocol("plain"))
    assert drawn["restarts"].isna().all()


@pytest.mark.parametrize(
    ("how", "facts"),
    [
        ({"goal": 0.1, "estimator": "apgd-l2"}, "apgd-l2"),
        ({"goal": 0.1, "estimator": "apgd-linf-published"}, "apgd-linf-published"),
        ({"restarts": 0, "estimator": "apgd-l2"}, "restarts 0"),
        ({"restarts": 2.0, "estimator": "apgd-l2"}, "restarts 2.0"),
        ({"restarts": True, "estimator": "apgd-l2"}, "restarts True"),
        ({"restarts": 2, "estimator": "plain"}, "restarts --restarts 2 'plain' apgd-l2"),
        ({"restarts": 2}, "restarts --restarts 2 'auto' apgd-l2"),
    ],
)
def test_protocols_of_the_worst_case_that_cannot_be(how: dict[str, Any], facts: str) -> None:
    with refused(ValueError, *facts.split()):
        Protocol(**how)
