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
from collections.abc import Collection, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.threads import few_threads
from ...evaluate.flipped import COPIES, SHARED, Flipped, NoRule
from ...evaluate.flipping import Perturbation
from ...kernels import Plan
from ...kernels.contract import BLOCK
from ...kernels.places import first_blocks
from ..rows import AT_ONCE, chunks, only_one, walk_to
from .estimates import Results, Target, draws_for, shares_of, spread
from .groups import Groups
from .protocol import Protocol
from .tally import Asked, Tally, View

if TYPE_CHECKING:
    from ...evaluate import Evaluator, Scores
    from ...evaluate.flipping import Record
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
    study = _Study(path, parts, alpha, targets, protocol)
    targets = sorted(targets, key=study.place)
    images = sum(len(data.labels) for part in parts for data in part.datasets)
    # One walk through all images serves the targets one after another, where they are held together.
    study.keeps = parts[0].holds(images, study.recorded)
    # Targets of a group are measured view by view where not all that they share is held. A second round of
    # draws would begin behind the walk then.
    rolling = study.keeps or (parts[0].holds(images) and protocol.goal is None)
    views = list(study.views()) if rolling else None
    for chunk in study.chunks(targets):
        keys = [(target, rho) for target in chunk for rho in rhos]
        first = range(draws)
        if protocol.goal is not None:
            first = range(protocol.pilot(draws, len(parts)))
        found = study.measure(views, {key: Asked(first, protocol.control) for key in keys})
        if protocol.goal is not None:
            pilots = {key: tally.estimate() for key, tally in found.items()}
            more: dict[_Key, Asked] = {}
            reached: dict[_Key, bool] = {}
            for key, pilot in pilots.items():
                size = len(first) // len(pilot.values)  # draws of a pair, or 1
                wanted, room = draws_for(pilot, protocol.goal), (protocol.most - len(first)) // size
                last = len(first) + size * min(wanted, room)
                more[key] = Asked(range(len(first), last), found[key].control)
                reached[key] = wanted <= room and math.isfinite(pilot.sharpness.se)
            found = study.measure(views, more)
            for key, tally in found.items():
                tally.reached = reached[key]
                tally.seconds += pilots[key].seconds
        for target in chunk:
            yield {(target, rho): found[target, rho].estimate() for rho in rhos}


class _Study:
    """What all targets at a position share.

    Attributes:
        keeps: Whether what control variates take of the unperturbed model is held for all images at once.
    """

    keeps = False

    def __init__(
        self,
        path: Path,
        parts: Sequence[Evaluator],
        alpha: float,
        targets: Sequence[Target],
        protocol: Protocol,
    ) -> None:
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
        self.groups = None
        if protocol.per_image and protocol.control is not False:
            self.groups = Groups(path, parts[0], self.flipped, targets)

    @property
    def recorded(self) -> int:
        """Bytes of an image that control variates take of the unperturbed model."""
        return 0 if self.groups is None else self.groups.recorded

    def place(self, target: Target) -> tuple[int, bool]:
        """What targets are ordered by: the station at which their draws begin, those of no group first."""
        shares = self.groups is not None and self.groups.of(target).shared
        return self.start(target), shares

    def start(self, target: Target) -> int:
        """The station at which the draws of a target begin."""
        if self.groups is None or (group := self.groups.of(target)).shared:
            return target.stage
        return group.first

    def chunks(self, targets: Sequence[Target]) -> Sequence[Sequence[Target]]:
        """Targets that are measured together."""
        if self.keeps:
            return chunks(targets, 1)
        return chunks(targets, AT_ONCE) if self.groups is None else self.groups.chunks(targets)

    def views(self) -> Iterator[View]:
        """The images of all parts, before the first stage."""
        for index, part in enumerate(self.parts):
            pieces = part.pieces(self.recorded)  # unlike parts, these share their noise
            for portion, piece in zip(shares_of(pieces), pieces, strict=True):
                walk = piece.walk()
                yield View(index, portion, piece, walk, only_one(walk.scores()))

    def measure(self, views: Sequence[View] | None, asked: Mapping[_Key, Asked]) -> dict[_Key, Tally]:
        """Make draws on all images."""
        tallies = {
            (target, rho): Tally(self.protocol, wanted.draws, self.shares, wanted.control, self._cost(target))
            for (target, rho), wanted in asked.items()
        }
        for view in views or self.views():
            for tally in tallies.values():
                if view.part >= tally.pilot:
                    tally.decide(tally.pilot)
            controlled = {target for (target, _), tally in tallies.items() if tally.control is not False}
            for target in dict.fromkeys(target for target, _ in asked):
                own = {rho: tally for (of, rho), tally in tallies.items() if of == target}
                start = perf_counter()
                self._record_group(view, target, controlled)
                for tally in own.values():
                    tally.seconds += (perf_counter() - start) / len(own)
                walk_to(view.walk, self.start(target))
                for control in (True, False):
                    some = {
                        rho: tally for rho, tally in own.items() if (tally.control is not False) == control
                    }
                    if some:
                        self._draw(view, target, some, control)
            if not self.keeps:
                view.record = None
        return tallies

    def _record_group(self, view: View, target: Target, controlled: Collection[Target]) -> None:
        """Record what the group of a target shares, when its first target is measured."""
        if self.groups is None or not (group := self.groups.of(target)).shared:
            return
        if view.record is not None and view.record[0] is group:
            return
        # Where targets are measured one by one, later ones of the group may need it.
        if self.keeps or any(self.groups.of(other) is group for other in controlled):
            view.record = None  # frees memory first
            walk_to(view.walk, group.first)
            view.record = group, view.walk.record(group.weights, group.last)

    def _cost(self, target: Target) -> float:
        """Cost of a pass with control, in passes without: the products of perturbed stages once more."""
        flipped, rest = target.last - target.stage + 1, self.parts[0].stations - target.stage
        return 1 + flipped / (rest + flipped)

    def _draw(self, view: View, target: Target, tallies: Mapping[float, Tally], control: bool) -> None:
        """Add the draws of one target on some images to the tallies by rho."""
        start = perf_counter()
        draws = [(rho, draw) for rho, tally in tallies.items() for draw in tally.draws]
        found = noise = None
        if self.protocol.per_image and target not in self.alike:
            noise = _Base(self, target, draws, view.part)
            try:
                record = self._record(view, target, noise.weights) if control else None
                found = view.walk.flipped(noise.weights, target.last, noise.perturb, len(draws), record)
            except NoRule as reason:
                self.alike.add(target)
                self._say_alike(target.layer or "the model", str(reason))
            if noise.alike:
                self._say_alike(", ".join(noise.alike), "no rule is known for what reads it")
        shared = found is None
        results = _shared(self, view, target, draws, control) if found is None else found
        seconds = (perf_counter() - start) / len(tallies)
        for number, tally in enumerate(tallies.values()):
            tally.shared = shared
            tally.alike = () if noise is None else noise.alike
            before = sum(len(other.draws) for other in list(tallies.values())[:number])
            own = results[before : before + len(tally.draws)]
            tally.add(view, [score for score, _ in own], [by_image.numpy() for _, by_image in own], seconds)

    def _say_alike(self, what: str, reason: str) -> None:
        self.path.warn(f"sharpness: images share each draw of the noise of {what}: {reason}")

    def _record(self, view: View, target: Target, weights: Sequence[Flipped]) -> Record:
        """What the control variate of a target takes of the unperturbed model."""
        group = None if self.groups is None else self.groups.of(target)
        if view.record is not None and view.record[0] is group:
            return view.record[1]
        return view.walk.record(weights, target.last)


def _shared(
    study: _Study, view: View, target: Target, draws: Sequence[tuple[float, int]], control: bool
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
        self.alike: tuple[str, ...] = ()  # names of those without signs, known at the first perturbation

    def perturb(self, k: int, weights: Sequence[Flipped]) -> Perturbation:
        """The k-th one, in the memory of the one before."""
        study, protocol = self._study, self._study.protocol
        if self._plan is None:
            self._plan = self._make_room(weights)
            self.alike = tuple(weight.name for weight in weights if weight.layout == SHARED)
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
        return Plan(
            pieces, pieces, pieces, self._study.path.impl, offsets=[BLOCK * block for block in blocks]
        )
