"""Refuses studies that the rounding of ``--precision bf16x3`` spoils, unless they are asked for twice.

The rule: in the median, its error must be at most 0.3 standard errors of a layer-wise sharpness, and 0.05 of
general sharpness. It is about 3e-7 nats at any rho, and standard errors fall with rho, so the rule is a least
rho for each kind of estimator, as measured on the digits zoo (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.fields import Tree
from ..names import WORST_CASE, EstimatorChoice
from ..settings import Sharpness
from .conflicts import named
from .settings import Computed

_DRAWS = 20  # for which the least rho is stated
_PLAIN: tuple[EstimatorChoice, ...] = ("plain", "per-image")  # their standard error falls as rho


@dataclass(frozen=True)
class _Least:
    """What bf16x3 is good enough for: the least rho by estimator, and the least --goal-se in nats.

    Attributes:
        share: How many standard errors the error may have.
        plain: Least rho of means of rises of the loss.
        control: Least rho of estimators whose standard error falls as the square of rho, for 20 draws.
        worst: Least rho of the worst case, from which on its error is below 1 % of it.
        goal: Least standard error.
    """

    share: float
    plain: float
    control: float
    worst: float
    goal: float


_LEAST = {
    "sharpness": _Least(0.05, 0.0001, 0.005, 0.005, 1e-5),
    "layer-sharpness": _Least(0.3, 0.0002, 0.02, 0.005, 1e-6),
}


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
        if study in _LEAST:
            _check(tree, study, _LEAST[study], zoo)


def _check(tree: Tree, study: str, least: _Least, zoo: str) -> None:
    own = tree.of(Sharpness)
    worst = own.estimator in WORST_CASE
    draws = own.layer_draws if study == "layer-sharpness" else own.draws
    control = least.control * max(1.0, draws / _DRAWS) ** 0.25
    rho = least.worst if worst else least.plain if own.estimator in _PLAIN else control
    size = (
        "1 % of the worst case" if worst else f"{least.share:g} standard errors of estimator {own.estimator}"
    )
    again = "use --precision fp32, or add --despite-rounding to measure it anyway (docs/speed.md)"
    if low := [value for value in own.rhos if value < rho]:
        raise ValueError(
            f"{named(tree, 'rhos', zoo)}: {study} at rho = {', '.join(f'{value:g}' for value in low)} with "
            f"--precision bf16x3: below rho = {rho:.2g} its rounding may exceed {size}; {again}"
        )
    if own.goal_se is not None and own.goal_se < least.goal:
        raise ValueError(
            f"{named(tree, 'goal-se', zoo)}: {study} to {own.goal_se:g} with --precision bf16x3: below "
            f"{least.goal:g} its rounding may exceed {least.share:g} standard errors; {again}"
        )
