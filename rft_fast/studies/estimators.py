"""How a sharpness is measured: draws of noise, products with the Hessian, or the worst case.

Every estimator takes one data set, a position on the path, targets (the whole model, or layers) and
radii rho, and gives an :class:`Estimate` for each target and rho.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..kernels import noise_like
from ..kernels.contract import NOISE, ON, Write
from ..threads import few_threads
from .rows import AT_ONCE, SEEDS, as_number, chunks, only_one, walk_to

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Walk
    from ..path import Path, Weight

SAMPLING = ("plain", "antithetic", "gradient")
WORST_CASE = {"apgd-l2": 2.0, "apgd-linf": math.inf}
ESTIMATORS = (*SAMPLING, "hessian", *WORST_CASE)
VARIANCE = {"normal": 1.0, "uniform": 1 / 3, "rademacher": 1.0}


@dataclass(frozen=True)
class Protocol:
    """What is measured and how; the same noise serves every alpha, model and data set.

    on: which weights the noise is added to, ``"interpolated"`` (Eq. 3) or ``"finetuned"`` (Sec. 3.1); None:
        where the study's definition has it.
    noise: ``"normal"``, ``"uniform"`` on (-1, 1) or ``"rademacher"``. adaptive: noise in units of |w|.
    seed: of the noise, in [0, 2**63): tables hold no more. Draw number d of seed s is the same noise
        everywhere, forever.
    noise_batch: noise anew for every so many images (m-sharpness: 128 in the published code); None:
        one draw serves the whole data set.
    goal: a wanted standard error in nats. Draws go on until each target has it, or ``most`` are made.
    estimator:

    - ``"plain"``: mean of L(w + delta) - L(w) over draws;
    - ``"antithetic"``: draws in pairs +delta, -delta, so that odd terms cancel;
    - ``"gradient"``: each draw less <gradient, delta>, whose mean is zero: one backward pass serves all
      layers and draws. The strongest where rho is small; it never biases;
    - ``"hessian"``: rho^2 / 2 times the trace of |w| H |w|, the limit for small rho (Prop. A.1), by
      Hutchinson's products with random signs, all layers at once; ``draws`` counts products;
    - ``"apgd-l2"``, ``"apgd-linf"``: not the average but the worst case over ||delta / c|| <= rho, c = |w|
      when adaptive, by Auto-PGD in as many steps as ``draws``: a lower bound, without a standard
      error. Holds five copies of the layer's weights.

    Raises TypeError or ValueError naming the argument.
    """

    estimator: str = "gradient"
    on: str | None = None
    noise: str = "normal"
    adaptive: bool = True
    seed: int = 0
    noise_batch: int | None = None
    goal: float | None = None
    most: int = 1000

    def __post_init__(self) -> None:
        for name, offered in (("estimator", ESTIMATORS), ("on", (None, *ON)), ("noise", NOISE)):
            if getattr(self, name) not in offered:
                raise ValueError(
                    f"sharpness: {name} must be one of {', '.join(filter(None, offered))}; "
                    f"got {getattr(self, name)!r}"
                )
        Write(0.0, adaptive=self.adaptive, seed=self.seed)  # refuses what no write could do
        if self.seed >= SEEDS:
            raise ValueError(
                "sharpness: seed must lie in [0, 2**63), since tables hold signed 64-bit integers; "
                f"got {self.seed}"
            )
        if self.noise_batch is not None and (not _is_int(self.noise_batch) or self.noise_batch < 1):
            raise ValueError(
                f"sharpness: noise_batch must be a number of images or None; got {self.noise_batch!r}"
            )
        if not _is_int(self.most) or self.most < 1:
            raise ValueError(f"sharpness: most must be a number of draws, at least 1; got {self.most!r}")
        if self.goal is not None and not 0 < as_number("sharpness: goal", self.goal) < math.inf:
            raise ValueError(
                f"sharpness: goal must be a standard error above 0, in nats, or None; got {self.goal!r}"
            )
        if self.goal is not None and self.estimator in WORST_CASE:
            raise ValueError(
                f"sharpness: a goal needs a standard error, and {self.estimator!r} has none; leave it out"
            )
        if self.estimator not in SAMPLING and self.noise_batch is not None:
            raise ValueError(
                f"sharpness: {self.estimator!r} draws no such noise; leave noise_batch (--noise-batch) out"
            )

    @property
    def where(self) -> str:
        """``on``, or Eq. 3's where nothing is said."""
        return self.on or "interpolated"

    def check_draws(self, draws: int) -> None:
        """Raises ValueError or TypeError for a number of draws that cannot be made."""
        if not _is_int(draws):
            raise TypeError(f"sharpness: draws must be an integer; got {draws!r}")
        if draws < 1:
            raise ValueError(f"sharpness: at least one draw is needed; got {draws}")
        if self.estimator == "antithetic" and draws % 2:
            raise ValueError(f"sharpness: antithetic draws come in pairs; got {draws}, use {draws + 1}")
        if self.goal is not None and draws < 4:
            raise ValueError(
                f"sharpness: a standard error to compare with the goal needs 4 draws or more; got {draws}"
            )
        if self.goal is not None and self.most < draws:
            raise ValueError(f"sharpness: most must be at least draws; got {self.most} and {draws}")


@dataclass(frozen=True)
class Target:
    """What is perturbed: one layer or, without a name, the whole model.

    stage, last: the first and the last station of a walk whose stages read it.
    """

    layer: str | None
    stage: int
    last: int

    @property
    def layers(self) -> list[str] | None:
        """As :meth:`rft_fast.Path.write` takes it."""
        return None if self.layer is None else [self.layer]


@dataclass(frozen=True)
class Estimate:
    """Sharpness in nats, and the perturbed model's mean loss and accuracy, with standard errors.

    loss is the clean model's plus the sharpness: the mean over draws that are ``"plain"`` or
    ``"antithetic"``; over those of ``"gradient"``, each less <gradient, delta>. The standard errors
    are those of the draws, for the images at hand; NaN for a single draw. draws: how many were
    made. nonfinite: how many perturbed losses of single images were NaN or infinite. Of products with
    the Hessian: accuracy is that of the clean model, nonfinite counts products.
    """

    sharpness: float
    sharpness_se: float
    loss: float
    loss_se: float
    accuracy: float
    accuracy_se: float
    draws: int
    nonfinite: int
    reached: bool | None
    seconds: float


Results = dict[tuple[Target, float], Estimate]


def estimate(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Generator[Results]:
    """Sharpness at ``alpha`` on one data set, which comes in one or more ``parts``.

    Gives the results, for all rhos, of targets that are measured :func:`together` as soon as they are there,
    in the order of the targets' stages. They do not depend on which other targets there are, except those
    that are measured together. Close it if it is not taken to its end: the live model is at alpha meanwhile.

    Noise on the fine-tuned weights does not reach alpha = 0, where sharpness is exactly zero.
    """
    if not targets:
        return
    if not Write(alpha, 1.0, protocol.where).noisy:
        yield from _zeros(path, parts, alpha, targets, rhos, protocol)
        return
    with path.at(alpha):
        if protocol.estimator in SAMPLING:
            yield from _sample(path, parts, alpha, targets, rhos, draws, protocol)
        elif protocol.estimator == "hessian":
            yield _curvature(path, parts, alpha, targets, rhos, draws, protocol)
        else:
            yield from _worst_case(path, parts, alpha, targets, rhos, draws, protocol)


def together(targets: Sequence[Target], protocol: Protocol) -> list[list[Target]]:
    """The targets, those that are measured together in one list: all of them for ``"hessian"``."""
    if protocol.estimator == "hessian":
        return [list(targets)] if targets else []
    return [[target] for target in targets]


def spread(weight: Weight, alpha: float, protocol: Protocol) -> Tensor:
    """How far noise of size one moves each live value, float32: c of Eq. 3, while the model is at alpha."""
    on_path = protocol.where == "interpolated"
    if not protocol.adaptive:
        return torch.full_like(weight.live, 1.0 if on_path else alpha)
    scale = (weight.live if on_path else weight.finetuned).detach().float().abs()
    return scale if on_path else scale * alpha


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
        loss, accuracy, lost = _clean(parts)
    seconds = (perf_counter() - start) / (len(targets) * len(rhos))
    reached = None if protocol.goal is None else True
    found = Estimate(0.0, 0.0, loss, 0.0, accuracy, 0.0, 0, lost, reached, seconds)
    for group in together(targets, protocol):
        yield {(target, rho): found for target in group for rho in rhos}


# --- draws of noise -------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What the draws of one target and rho gave so far, a number for each draw."""

    values: list[float] = field(default_factory=list)  # L(w + delta) - L(w)
    controls: list[float] = field(default_factory=list)  # <gradient, delta>
    accuracies: list[float] = field(default_factory=list)
    nonfinite: int = 0
    seconds: float = 0.0

    def estimate(self, clean: float, protocol: Protocol) -> Estimate:
        draws = len(self.values)
        values, accuracies = np.array(self.values), np.array(self.accuracies)
        values = values - np.array(self.controls)
        if protocol.estimator == "antithetic":
            values, accuracies = (x.reshape(-1, 2).mean(1) for x in (values, accuracies))
        sharpness, error = _mean(values)
        accuracy, accuracy_error = _mean(accuracies)
        reached = None if protocol.goal is None else bool(error <= protocol.goal)
        return Estimate(
            sharpness,
            error,
            clean + sharpness,
            error,
            accuracy,
            accuracy_error,
            draws,
            self.nonfinite,
            reached,
            self.seconds,
        )


@dataclass
class _View:
    """Some of the images on their way through the stages, with the weights at the position."""

    share: float
    """Of all images."""
    part: int
    walk: Walk
    clean: float
    """Their loss."""
    slope: _Slope | None


def _views(
    path: Path, parts: Sequence[Evaluator], targets: Sequence[Target], protocol: Protocol
) -> Iterator[_View]:
    for index, (share, part) in enumerate(zip(_shares(parts), parts, strict=True)):
        slope = _Slope(path, part, targets) if protocol.estimator == "gradient" else None
        pieces = part.pieces()  # with the same noise, unlike parts
        for portion, piece in zip(_shares(pieces), pieces, strict=True):
            walk = piece.walk()
            yield _View(share * portion, index, walk, only_one(walk.scores()).loss, slope)


def _sample(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Iterator[Results]:
    targets = sorted(targets, key=lambda target: target.stage)
    # One walk through all images takes the targets one after the other. Where they come in several, which are
    # not held together, each is taken through a few targets before the next, so that these are finished.
    rolling = len(parts) == 1 and len(parts[0].pieces()) == 1
    walks = list(_views(path, parts, targets, protocol)) if rolling else None
    for chunk in chunks(targets, 1 if rolling else AT_ONCE):
        tallies = {(target, rho): _Tally() for target in chunk for rho in rhos}
        found: Results = {}
        wanted = dict.fromkeys(tallies, range(draws))
        while wanted:
            views = walks or _views(path, parts, list(dict.fromkeys(t for t, _ in wanted)), protocol)
            clean = _draw(path, views, alpha, tallies, wanted, len(parts), protocol)
            found |= {key: tallies[key].estimate(clean, protocol) for key in wanted}
            more = {key: _draws_for(found[key], protocol) for key in wanted}
            wanted = {key: range(found[key].draws, n) for key, n in more.items() if n > found[key].draws}
        for target in chunk:
            yield {(target, rho): found[target, rho] for rho in rhos}


def _draws_for(now: Estimate, protocol: Protocol) -> int:
    """How many draws promise the wanted standard error; no more than are allowed, and even."""
    if protocol.goal is None or now.reached or not math.isfinite(now.sharpness_se):
        return now.draws
    wanted = now.draws * min(4.0, 1.1 * (now.sharpness_se / protocol.goal) ** 2)
    wanted = min(protocol.most, max(now.draws + 2, math.ceil(wanted)))
    return wanted - wanted % 2


def _draw(
    path: Path,
    views: Iterable[_View],
    alpha: float,
    tallies: Mapping[tuple[Target, float], _Tally],
    wanted: Mapping[tuple[Target, float], range],
    parts: int,
    protocol: Protocol,
) -> float:
    """Adds the wanted draws to the tallies. Returns the clean loss."""
    rhos: dict[Target, list[float]] = {}
    for target, rho in wanted:
        rhos.setdefault(target, []).append(rho)
    values = {key: np.zeros((3, len(draws))) for key, draws in wanted.items()}
    clean = 0.0
    for view in views:
        clean += view.share * view.clean
        for target in rhos:
            walk_to(view.walk, target.stage)
            for rho in rhos[target]:
                start = perf_counter()
                draws, tally, found = wanted[target, rho], tallies[target, rho], values[target, rho]
                noise = _Noise(path, alpha, rho, target, draws, view.part, parts, protocol, view.slope)
                scores = [only_one(s) for s in view.walk.variants(noise.write, len(draws), target.last)]
                found[0] += [view.share * (score.loss - view.clean) for score in scores]
                found[1] += view.share * noise.controls()
                found[2] += [view.share * score.accuracy for score in scores]
                tally.nonfinite += sum(score.nonfinite for score in scores)
                tally.seconds += perf_counter() - start
            path.write(alpha, layers=target.layers)
    for key, found in values.items():
        tally = tallies[key]
        for kept, new in zip((tally.values, tally.controls, tally.accuracies), found, strict=True):
            kept.extend(new.tolist())
    return clean


@dataclass
class _Noise:
    """Draws of noise on a target, written one after the other for one part of the data."""

    path: Path
    alpha: float
    rho: float
    target: Target
    draws: range
    part: int
    parts: int
    protocol: Protocol
    slope: _Slope | None
    along: list[Tensor] = field(default_factory=list)

    def write(self, k: int) -> None:
        """Perturbs the target by draw number k of these."""
        draw, sign = self.draws[k], 1
        if self.protocol.estimator == "antithetic":
            draw, sign = draw // 2, 1 - 2 * (draw % 2)
        self.path.write(
            self.alpha,
            self.rho,
            self.target.layers,
            seed=self.protocol.seed,
            draw=draw * self.parts + self.part,
            on=self.protocol.where,
            noise=self.protocol.noise,
            adaptive=self.protocol.adaptive,
            sign=sign,
        )
        if self.slope is not None:
            self.along.append(self.slope.along(self.target))

    def controls(self) -> np.ndarray:
        """<gradient, delta> of each draw; zeros where no gradient is used."""
        if not self.along:
            return np.zeros(len(self.draws))
        found: np.ndarray = torch.stack(self.along).cpu().numpy()
        return found


class _Slope:
    """The gradient of a part's loss, and how much of a perturbation goes along it."""

    def __init__(self, path: Path, part: Evaluator, targets: Iterable[Target]) -> None:
        lives = {target: [w.live for w in path.weights(target.layers)] for target in targets}
        weights = list({id(live): live for group in lives.values() for live in group}.values())
        gradients = dict(zip(map(id, weights), part.gradient(weights)[1], strict=True))
        self._pairs = {
            target: [(gradients[id(live)], live) for live in group] for target, group in lives.items()
        }
        self._clean = {target: self._dot(target) for target in self._pairs}

    def along(self, target: Target) -> Tensor:
        """<gradient, delta> for the delta that the live weights have now: float64, 0-d, on their device.

        As the difference of two products in float64: the delta itself is never stored, and it is what
        the live weights really moved by, roundings included.
        """
        return self._dot(target) - self._clean[target]

    def _dot(self, target: Target) -> Tensor:
        with torch.no_grad(), few_threads():
            sums = [torch.dot(g.double().flatten(), w.double().flatten()) for g, w in self._pairs[target]]
            return torch.stack(sums).sum()


# --- products with the Hessian ----------------------------------------------------------------------


def _curvature(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Results:
    start = perf_counter()
    loss, accuracy, _ = _clean(parts)
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
        sharpness, error = _mean(values)
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
        wanted = max(_draws_for(result(*key, 0.0), protocol) for key in keys)
    seconds = (perf_counter() - start) / len(keys)
    return {key: result(*key, seconds) for key in keys}


# --- the worst case -----------------------------------------------------------------------------


def _worst_case(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    steps: int,
    protocol: Protocol,
) -> Iterator[Results]:
    (part,) = parts
    clean, _, _ = _clean(parts)
    for target in targets:
        results: Results = {}
        for rho in rhos:
            start = perf_counter()
            with path.borrowed(target.layers) as weights:
                climb = _Climb(part, weights, alpha, rho, protocol)
                climb.run(steps)
                score = only_one(part.scores())
            results[target, rho] = Estimate(
                score.loss - clean,
                math.nan,
                score.loss,
                math.nan,
                score.accuracy,
                math.nan,
                steps,
                score.nonfinite,
                None,
                perf_counter() - start,
            )
        yield results


class _Climb:
    """Auto-PGD (Croce & Hein 2020) on the loss, in units of c: u = delta / c within a ball of radius rho.

    Starts at u = 0, the clean weights, so that the same request gives the same answer.
    """

    def __init__(
        self, part: Evaluator, weights: Sequence[Weight], alpha: float, rho: float, protocol: Protocol
    ) -> None:
        self._part, self._rho = part, rho
        self._norm = WORST_CASE[protocol.estimator]
        self._live = [weight.live for weight in weights]
        self._clean = [weight.live.detach().clone() for weight in weights]
        self._scale = [spread(weight, alpha, protocol) for weight in weights]

    def run(self, steps: int) -> None:
        """Leaves the live weights at the highest loss that was met."""
        u = [torch.zeros_like(scale) for scale in self._scale]
        before = u
        loss, slope = self._look(u)
        best, best_loss, best_slope = u, loss, slope
        step = 2 * self._rho
        checks = _checkpoints(steps)
        rises, since, best_then, step_then = 0, 0, best_loss, step
        for k in range(1, steps + 1):
            z = self._project([a + step * b for a, b in zip(u, self._direction(slope), strict=True)])
            # Momentum: three quarters of the new step, one of the last move. None on the first.
            keep = 1.0 if k == 1 else 0.75
            moved = self._project(
                [a + keep * (c - a) + (1 - keep) * (a - b) for a, b, c in zip(u, before, z, strict=True)]
            )
            before, u, last = u, moved, loss
            loss, slope = self._look(u)
            rises, since = rises + (loss > last), since + 1
            if loss > best_loss:
                best, best_loss, best_slope = u, loss, slope
            if k in checks:
                # Too few steps went up, or neither step nor best loss changed: smaller steps, from the best.
                stuck = step == step_then and best_loss == best_then
                step_then, best_then = step, best_loss
                if rises < 0.75 * since or stuck:
                    step /= 2
                    before = u = best
                    loss, slope = best_loss, best_slope
                rises, since = 0, 0
        self._move(best)

    @torch.no_grad()
    def _move(self, u: Sequence[Tensor]) -> None:
        for live, clean, scale, part in zip(self._live, self._clean, self._scale, u, strict=True):
            live.copy_(clean + scale * part)

    def _look(self, u: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Loss and its gradient in u."""
        self._move(u)
        loss, gradients = self._part.gradient(self._live)
        for gradient, scale in zip(gradients, self._scale, strict=True):
            gradient.mul_(scale)
        return loss, gradients

    def _direction(self, slope: Sequence[Tensor]) -> list[Tensor]:
        if self._norm == math.inf:
            return [part.sign() for part in slope]
        norm = _norm(slope)
        return [part / max(norm, 1e-30) for part in slope]

    def _project(self, u: Sequence[Tensor]) -> list[Tensor]:
        if self._norm == math.inf:
            return [part.clamp(-self._rho, self._rho) for part in u]
        norm = _norm(u)
        return list(u) if norm <= self._rho else [part * (self._rho / norm) for part in u]


def _norm(parts: Sequence[Tensor]) -> float:
    with few_threads():
        return float(torch.stack([part.double().square().sum() for part in parts]).sum().sqrt())


def _checkpoints(steps: int) -> set[int]:
    """Where Auto-PGD looks back: after 22 % of the steps, then after ever shorter stretches."""
    found, last, now = set(), 0.0, 0.22
    while now < 1:
        found.add(math.ceil(now * steps))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return found


# --- small things -----------------------------------------------------------------------------------


def _shares(parts: Sequence[Evaluator]) -> list[float]:
    counts = [sum(len(data.labels) for data in part.datasets) for part in parts]
    return [count / sum(counts) for count in counts]


def _clean(parts: Sequence[Evaluator]) -> tuple[float, float, int]:
    """Loss, accuracy and the number of losses that are not finite, of the model as it is."""
    scores = [only_one(part.scores()) for part in parts]
    shares = _shares(parts)
    loss = sum(share * score.loss for share, score in zip(shares, scores, strict=True))
    accuracy = sum(share * score.accuracy for share, score in zip(shares, scores, strict=True))
    return loss, accuracy, sum(score.nonfinite for score in scores)


def _mean(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
