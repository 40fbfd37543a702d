"""The mean over draws of noise: shared by the images of a part, or of its own for each image.

Noise per image: all images of a part share one base perturbation D; image n is perturbed by D o (r_n s_n^T)
with random signs r_n and s_n of its own, which has the same distribution. So one pass over the images is
worth many draws that all images share.

Numbering: draw d of part p of P has the noise of draw d P + p. The signs of an image depend on d and on its
number in the data set, see :mod:`rft_fast.kernels.signs`. Antithetic pairs share noise and signs. A weight
that has a sign for every element (biases, LayerNorms, embeddings) has ``COPIES`` base perturbations; image n
takes number n mod ``COPIES``, and copy c of a weight at block b has the noise of block b + c B, where B is
the number of blocks of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...common.threads import few_threads
from ...evaluate.flipped import COPIES, Flipped, NoRule
from ...evaluate.flipping import Perturbation
from ...kernels import Plan
from ...kernels.contract import first_blocks
from ...names import Estimator
from ..rows import AT_ONCE, chunks, only_one, walk_to
from .estimates import PILOT, Estimate, Results, Target, draws_for, mean, shares_of, spread
from .protocol import Protocol

if TYPE_CHECKING:
    from ...evaluate import Evaluator, Scores, Walk
    from ...path import Path, Weight

_Key = tuple[Target, float]  # target and rho


def sample(
    path: Path,
    parts: Sequence[Evaluator],
    alpha: float,
    targets: Sequence[Target],
    rhos: Sequence[float],
    draws: int,
    protocol: Protocol,
) -> Iterator[Results]:
    """Yield the results of one target after another, in the order of stages.

    With a goal, a pilot decides on the number of draws, and further draws make the result.
    """
    study = _Study(path, parts, alpha, protocol)
    targets = sorted(targets, key=lambda target: target.stage)
    # One walk through all images serves the targets one after another, where they are held together.
    rolling = parts[0].holds(sum(len(data.labels) for part in parts for data in part.datasets))
    views = list(study.views()) if rolling else None
    for chunk in chunks(targets, 1 if rolling else AT_ONCE):
        keys = [(target, rho) for target in chunk for rho in rhos]
        first = range(draws)
        if protocol.goal is not None:
            first = range(protocol.pilot(draws, len(parts)))
        found = study.measure(views, {key: _Asked(first, protocol.control) for key in keys})
        if protocol.goal is not None:
            pilots = {key: tally.estimate() for key, tally in found.items()}
            more: dict[_Key, _Asked] = {}
            reached: dict[_Key, bool] = {}
            for key, pilot in pilots.items():
                size = len(first) // len(pilot.values)  # draws of a pair, or 1
                wanted, room = draws_for(pilot, protocol.goal), (protocol.most - len(first)) // size
                last = len(first) + size * min(wanted, room)
                more[key] = _Asked(range(len(first), last), found[key].control)
                reached[key] = wanted <= room and math.isfinite(pilot.sharpness.se)
            found = study.measure(views, more)
            for key, tally in found.items():
                tally.reached = reached[key]
                tally.seconds += pilots[key].seconds
        for target in chunk:
            yield {(target, rho): found[target, rho].estimate() for rho in rhos}


@dataclass(frozen=True)
class _Asked:
    """Draws that are to be made, and whether with the control variate; None: the first parts decide."""

    draws: range
    control: bool | None


@dataclass
class _Tally:
    """Results of one target and rho."""

    protocol: Protocol
    draws: range
    shares: np.ndarray  # [parts]
    control: bool | None
    cost: float  # of a pass with control, in passes without
    values: np.ndarray = field(init=False)  # [draws, parts]: mean losses less those of the clean model
    controls: np.ndarray = field(init=False)  # [draws, parts]: <gradient, perturbation>
    accuracies: np.ndarray = field(init=False)  # [draws, parts]
    # float64 [n] of each view: sums over draws of losses less those of the clean model, and of controls
    images: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    clean: float = 0.0  # mean loss of the clean model
    nonfinite: int = 0
    seconds: float = 0.0
    reached: bool | None = None
    shared: bool = False  # the images of a part share their noise

    def __post_init__(self) -> None:
        shape = len(self.draws), len(self.shares)
        self.values, self.controls, self.accuracies = (np.zeros(shape) for _ in range(3))

    @property
    def pilot(self) -> int:
        """Parts whose draws decide on the control."""
        return min(len(self.shares), math.ceil(PILOT / len(self.draws)))

    def decide(self, parts: int) -> None:
        """Choose the lower product of variance and cost, by the draws of the first parts."""
        if self.control is None:
            values, controls, shares = self.values[:, :parts], self.controls[:, :parts], self.shares[:parts]
            plain, less = (mean(rises, shares).se for rises in (values, values - controls))
            cost = 1.0 if self.shared else self.cost
            if math.isfinite(plain) or math.isfinite(less):
                self.control = math.isfinite(less) and not plain**2 < cost * less**2
            else:  # a single draw
                self.control = bool(np.isfinite(controls).all())

    def add(
        self, view: _View, scores: Sequence[Scores], controls: Sequence[np.ndarray], seconds: float
    ) -> None:
        """Add the scores of all draws on some images. controls: [n] each, or one number."""
        losses = np.sum([score.losses.double().numpy() for score in scores], 0)
        rises = losses - len(scores) * view.clean.losses.double().numpy()
        self.images.append((rises, np.zeros(1) if self.shared else np.sum(controls, 0)))
        for draw, (score, control) in enumerate(zip(scores, controls, strict=True)):
            self.values[draw, view.part] += view.share * score.rise_over(view.clean)[0]
            self.controls[draw, view.part] += view.share * float(control.mean())
            self.accuracies[draw, view.part] += view.share * score.accuracy
            self.nonfinite += score.nonfinite
        self.clean += self.shares[view.part] * view.share * view.clean.loss
        self.seconds += seconds

    def estimate(self) -> Estimate:
        self.decide(len(self.shares))
        values, accuracies = self.values - self.controls if self.control else self.values, self.accuracies
        if self.protocol.antithetic and not self.shared:
            values, accuracies = (x.reshape(-1, 2, x.shape[1]).mean(1) for x in (values, accuracies))
        sharpness = mean(values, self.shares)
        images = np.concatenate([rises - less if self.control else rises for rises, less in self.images])
        images /= len(self.draws)
        with np.errstate(invalid="ignore"):  # infinite losses
            error = float(images.std(ddof=1)) / math.sqrt(len(images)) if len(images) > 1 else math.nan
        return Estimate(
            sharpness,
            error,
            self.clean,
            mean(accuracies, self.shares),
            len(self.draws),
            self.nonfinite,
            self.reached,
            self.seconds,
            self.estimator,
            values,
            self.shares,
        )

    @property
    def estimator(self) -> Estimator:
        """What was done."""
        if self.shared:
            return "gradient" if self.control else "plain"
        if self.protocol.antithetic:
            return "per-image-antithetic"
        return "per-image-gradient" if self.control else "per-image"


@dataclass
class _View:
    """Some images of a part on their way through the stages, with the weights at the position."""

    part: int
    share: float  # of the part's images
    evaluator: Evaluator
    walk: Walk
    clean: Scores


class _Study:
    """What all targets at a position share."""

    def __init__(self, path: Path, parts: Sequence[Evaluator], alpha: float, protocol: Protocol) -> None:
        self.path, self.parts, self.alpha, self.protocol = path, parts, alpha, protocol
        self.shares = shares_of(parts)
        self.alike: set[Target] = set()  # whose noise images share, as no rule exists
        slots = (slot for slot in path.slots if slot.is_float and slot.is_parameter)
        lives = sorted(slots, key=lambda slot: slot.row)
        *starts, self.blocks = first_blocks([*(slot.tensor for slot in lives), torch.empty(0)])
        self.flipped = {
            slot.name: Flipped(slot.tensor, slot.name, start)
            for slot, start in zip(lives, starts, strict=True)
        }

    def views(self) -> Iterator[_View]:
        """The images of all parts, before the first stage."""
        for index, part in enumerate(self.parts):
            pieces = part.pieces()  # unlike parts, these share their noise
            for portion, piece in zip(shares_of(pieces), pieces, strict=True):
                walk = piece.walk()
                yield _View(index, portion, piece, walk, only_one(walk.scores()))

    def measure(self, views: Sequence[_View] | None, asked: Mapping[_Key, _Asked]) -> dict[_Key, _Tally]:
        """Make draws on all images."""
        tallies = {
            (target, rho): _Tally(
                self.protocol, wanted.draws, self.shares, wanted.control, self._cost(target)
            )
            for (target, rho), wanted in asked.items()
        }
        for view in views or self.views():
            for target in dict.fromkeys(target for target, _ in asked):
                walk_to(view.walk, target.stage)
                own = {rho: tally for (of, rho), tally in tallies.items() if of == target}
                for tally in own.values():
                    if view.part >= tally.pilot:
                        tally.decide(tally.pilot)
                for control in (True, False):
                    some = {
                        rho: tally for rho, tally in own.items() if (tally.control is not False) == control
                    }
                    if some:
                        self._draw(view, target, some, control)
        return tallies

    def _cost(self, target: Target) -> float:
        """Cost of a pass with control, in passes without: the products of perturbed stages once more."""
        flipped, rest = target.last - target.stage + 1, self.parts[0].stations - target.stage
        return 1 + flipped / (rest + flipped)

    def _draw(self, view: _View, target: Target, tallies: Mapping[float, _Tally], control: bool) -> None:
        """Add the draws of one target on some images to the tallies by rho."""
        start = perf_counter()
        draws = [(rho, draw) for rho, tally in tallies.items() for draw in tally.draws]
        found = None
        if self.protocol.per_image and target not in self.alike:
            noise = _Base(self, target, draws, view.part)
            try:
                found = view.walk.flipped(noise.weights, target.last, noise.perturb, len(draws), control)
            except NoRule as reason:
                self.alike.add(target)
                what = target.layer or "the model"
                self.path.warn(f"sharpness: images share each draw of the noise of {what}: {reason}")
        shared = found is None
        results = _shared(self, view, target, draws, control) if found is None else found
        seconds = (perf_counter() - start) / len(tallies)
        for number, tally in enumerate(tallies.values()):
            tally.shared = shared
            before = sum(len(other.draws) for other in list(tallies.values())[:number])
            own = results[before : before + len(tally.draws)]
            tally.add(view, [score for score, _ in own], [by_image.numpy() for _, by_image in own], seconds)


def _shared(
    study: _Study, view: _View, target: Target, draws: Sequence[tuple[float, int]], control: bool
) -> list[tuple[Scores, Tensor]]:
    """Scores under noise that the images of a part share, and <gradient, perturbation>, a number each."""
    path, protocol = study.path, study.protocol
    slope = _Slope(path, view.evaluator, target) if control else None
    along: list[Tensor] = []

    def write(k: int) -> None:
        rho, draw = draws[k]
        path.write(
            study.alpha,
            rho,
            target.layers,
            seed=protocol.seed,
            draw=draw * len(study.parts) + view.part,
            on=protocol.where,
            noise=protocol.noise,
            adaptive=protocol.adaptive,
        )
        if slope is not None:
            along.append(slope.along())

    scores = [only_one(found) for found in view.walk.variants(write, len(draws), target.last)]
    path.write(study.alpha, layers=target.layers)
    controls = torch.stack(along).cpu() if along else torch.zeros(len(draws), dtype=torch.float64)
    return list(zip(scores, controls, strict=True))


class _Slope:
    """The gradient of the loss of some images, and its product with a perturbation."""

    def __init__(self, path: Path, images: Evaluator, target: Target) -> None:
        lives = [weight.live for weight in path.weights(target.layers)]
        self._pairs = list(zip(images.gradient(lives)[1], lives, strict=True))
        self._clean = self._dot()

    def along(self) -> Tensor:
        """<gradient, delta> of the current perturbation: float64, 0-d, on the weights' device.

        The difference of two products in float64: delta itself is never stored, and roundings of the live
        weights are included.
        """
        return self._dot() - self._clean

    def _dot(self) -> Tensor:
        with torch.no_grad(), few_threads():
            sums = [torch.dot(g.double().flatten(), w.double().flatten()) for g, w in self._pairs]
            return torch.stack(sums).sum()


class _Base:
    """Base perturbations D of one target for one part of the data, one after another."""

    def __init__(self, study: _Study, target: Target, draws: Sequence[tuple[float, int]], part: int) -> None:
        self._study, self._draws, self._part = study, draws, part
        self._own: list[Weight] = study.path.weights(target.layers)
        self.weights = [study.flipped[weight.name] for weight in self._own]
        self._plan: Plan | None = None

    def perturb(self, k: int, weights: Sequence[Flipped]) -> Perturbation:
        """The k-th one, in the memory of the one before."""
        study, protocol = self._study, self._study.protocol
        if self._plan is None:
            self._plan = self._make_room(weights)
        (rho, draw), sign = self._draws[k], 1
        if protocol.antithetic:
            draw, sign = draw // 2, 1 - 2 * (draw % 2)
        with torch.no_grad():
            torch._foreach_zero_(self._bases)
            self._plan.write(
                1.0,
                rho=rho,
                noise=protocol.noise,
                adaptive=False,
                seed=protocol.seed,
                draw=draw * len(study.parts) + self._part,
                sign=sign,
            )
            torch._foreach_mul_(self._bases, self._scales)
        bases = [base.to(w.live.dtype) for base, w in zip(self._bases, weights, strict=True)]
        return Perturbation(bases, protocol.seed, draw)

    def _make_room(self, weights: Sequence[Flipped]) -> Plan:
        """Make memory for D; return its plan. Copies have the noise of blocks behind the whole model."""
        pieces, blocks = [], []
        self._bases, self._scales = [], []
        for weight, own in zip(weights, self._own, strict=True):
            copies = (COPIES,) if weight.layout == weight.by_element else ()
            base = torch.empty((*copies, *own.live.shape), device=own.live.device)
            pieces += list(base) if copies else [base]
            blocks += [weight.block + copy * self._study.blocks for copy in range(*copies or (1,))]
            self._bases.append(base)
            self._scales.append(spread(own, self._study.alpha, self._study.protocol).expand(base.shape))
        return Plan(pieces, pieces, pieces, self._study.path.impl, blocks=blocks)
