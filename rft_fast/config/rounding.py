"""Refuses studies that the rounding of ``--precision bf16x3`` spoils, unless they are asked for twice.

The rule: in the median, its error must be at most 0.3 standard errors of a layer-wise sharpness, and 0.05 of
general sharpness. The error is about 3e-7 nats, at any rho and for any number of images and draws. Standard
errors fall with rho, and with the square root of the number of independent draws of noise. So the rule is a
least rho, as measured on the digits zoo (docs/speed.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.fields import Tree
from ..names import WORST_CASE
from ..settings import Along, Sharpness
from .conflicts import named
from .settings import Computed


@dataclass(frozen=True)
class _Least:
    """The least rho that bf16x3 is good enough for.

    Attributes:
        rho: Least rho up to ``count`` independent draws of noise.
        count: How many draws.
        power: With more of them, the least rho grows by this power of their number.
    """

    rho: float
    count: int
    power: float

    def of(self, count: int) -> float:
        """Return the least rho for so many draws, rounded up to two digits."""
        rho = self.rho * max(1.0, count / self.count) ** self.power
        unit = 10.0 ** (math.floor(math.log10(rho)) - 1)
        return float(f"{math.ceil(rho / unit - 1e-9) * unit:.2g}")


@dataclass(frozen=True)
class _Rule:
    """What bf16x3 may measure in a study.

    Attributes:
        share: How many standard errors the error may have.
        goal: Least standard error, in nats.
        plain, image: Means of rises of the loss, whose standard error falls as rho: with noise that images
            share, and with noise per image.
        control, image_control: The same with a control variate or in pairs, where it falls as rho squared.
    """

    share: float
    goal: float
    plain: _Least
    image: _Least
    control: _Least
    image_control: _Least


_RULES = {
    "sharpness": _Rule(
        0.05,
        1e-5,
        plain=_Least(0.0001, 10, 0.5),
        image=_Least(0.0001, 400, 0.5),
        control=_Least(0.005, 70, 0.25),
        image_control=_Least(0.005, 1200, 0.25),
    ),
    "layer-sharpness": _Rule(
        0.3,
        1e-6,
        plain=_Least(0.0002, 15, 0.5),
        image=_Least(0.0002, 3000, 0.5),
        control=_Least(0.02, 15, 0.25),
        image_control=_Least(0.02, 1400, 0.25),
    ),
}
_WORST = 0.005  # least rho of the worst case, from which on the error is below 1 % of it


def check_rounding(tree: Tree, measured: Sequence[str], zoo: str) -> None:
    """Refuse what bf16x3 cannot measure.

    Args:
        tree: The settings.
        measured: The studies that are measured.
        zoo: Name of the zoo.

    Raises:
        ValueError: The precision is bf16x3, and a study needs a finer one, or the model is compiled.
    """
    computed, own = tree.of(Computed), tree.of(Sharpness)
    if computed.precision != "bf16x3":
        return
    if computed.compile:
        raise ValueError(
            f"{named(tree, 'compile', zoo)}: cannot be combined with --precision bf16x3, whose products "
            "torch.compile does not see; leave one of them out"
        )
    # A Hessian product is no difference of two losses, so it is as exact at any rho. Without adaptive noise
    # rho is not in units of the weights, and nothing is known.
    if computed.despite_rounding or not own.adaptive or own.estimator == "hessian":
        return
    for study in measured:
        if study in _RULES:
            _check(tree, study, _RULES[study], zoo)


def slower(tree: Tree, device: str) -> Iterator[str]:
    """Say where bf16x3 is slower than fp32. device: the type of the device."""
    if tree.of(Computed).precision == "bf16x3" and device == "cpu":
        yield "--precision bf16x3 is for GPUs; a CPU multiplies the same numbers, slower than fp32"


def _check(tree: Tree, study: str, rule: _Rule, zoo: str) -> None:
    own, (rho, size) = tree.of(Sharpness), _least(tree, study, rule)
    again = "use --precision fp32, or add --despite-rounding to measure it anyway (docs/speed.md)"
    if low := [value for value in own.rhos if value < rho]:
        raise ValueError(
            f"{named(tree, 'rhos', zoo)}: {study} at rho = {', '.join(f'{value:g}' for value in low)} with "
            f"--precision bf16x3: below rho = {rho:g} its rounding may exceed {size}; {again}"
        )
    if own.goal_se is not None and own.goal_se < rule.goal:
        raise ValueError(
            f"{named(tree, 'goal-se', zoo)}: {study} to {own.goal_se:g} with --precision bf16x3: below "
            f"{rule.goal:g} its rounding may exceed {rule.share:g} standard errors; {again}"
        )


def _least(tree: Tree, study: str, rule: _Rule) -> tuple[float, str]:
    """Return the least rho of a study, and what the error may not exceed, in words."""
    own, most = tree.of(Sharpness), tree.of(Along).samples
    if own.estimator in WORST_CASE:
        return _WORST, "1 % of the worst case"
    draws = own.layer_draws if study == "layer-sharpness" else own.draws
    images = own.samples if most is None else min(own.samples, most)
    parts = math.ceil(images / (own.noise_batch or images))
    if own.estimator in ("plain", "gradient"):
        least, count = rule.plain if own.estimator == "plain" else rule.control, draws * parts
    else:
        least, count = rule.image if own.estimator == "per-image" else rule.image_control, draws * images
    return least.of(count), f"{rule.share:g} standard errors of estimator {own.estimator}"
