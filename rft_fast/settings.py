"""What the paper's studies measure: one frozen dataclass for each group of their options.

A field is an option of the sweep, an entry of a zoo's ``[options]`` and one of ``config.json``: to add an
option, add a field, and use it. Nothing large is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from . import names
from .common.fields import Group, option
from .common.numeric import above_zero, check_alphas, fraction, positive, spaced, whole
from .names import Criterion, EstimatorChoice, Method, Noise, On, Others, Reference
from .path.layers import layer_of

_T = TypeVar("_T")


def once(values: Sequence[_T]) -> tuple[_T, ...]:
    """The values, each of which may be given once. Raises ValueError."""
    if twice := [str(value) for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"given more than once: {', '.join(twice)}")
    return tuple(values)


def different(values: Sequence[_T]) -> tuple[_T, ...]:
    """The values without those that come again."""
    return tuple(dict.fromkeys(values))


def _alphas(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(check_alphas(values))


def _granularity(text: str) -> str:
    layer_of("name", text)
    return text


def _rho(text: str) -> float | str:
    return text if text == "auto" else above_zero(text)


def _rhos(values: Sequence[float | str]) -> tuple[float, ...]:
    if "auto" in values and len(values) > 1:
        raise ValueError(f"auto finds one rho, and stands alone; got {' '.join(map(str, values))}")
    numbers = [value for value in values if not isinstance(value, str)]
    return _distinct(numbers)


def _distinct(values: Sequence[float]) -> tuple[float, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected each once, got {list(values)}")
    return tuple(sorted(values))


def _noise_batch(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return positive(text)
    except ValueError:
        raise ValueError(f"expected a number of images, 1 or more, or all; got {text!r}") from None


def _ascending(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted(set(values)))


def _keep(text: str) -> float:
    if not (value := fraction(text)):
        raise ValueError("expected a fraction above 0")
    return value


def _names(help: str, name: str | None = None, whole: Any = once, **how: Any) -> Any:
    """An option that takes names, of which there are none by default."""
    return option(None, help, name=name, metavar="NAME", many="once", whole=whole, **how)


ALPHAS = tuple(spaced("0:1:11"))


@dataclass(frozen=True)
class Along:
    """Settings of the path as a whole.

    Attributes:
        alphas: positions, ascending, including 0 and 1.
        samples: number of images of each data set, drawn at random; None: all.
        seed: seed of that draw and of the noise.
        xi: gain in accuracy that counts as high, a fraction (Eq. 2).
        paper: whether the paper's choices stand in for the defaults (:mod:`rft_fast.config.paper`).
        quick: whether images, positions and draws are limited (:mod:`rft_fast.config.quick`).
    """

    GROUP: ClassVar = Group("what is measured", place=("settings", "along"))

    alphas: tuple[float, ...] = option(
        ALPHAS,
        "positions on the path: numbers, or start:stop:count (default: 0:1:11)",
        common="positions on the path (default: 0:1:11)",
        metavar="ALPHA",
        check=spaced,
        many="once",
        whole=_alphas,
    )
    samples: int | None = option(
        None,
        "images of each data set, drawn at random (default: all)",
        common="random images of each data set (default: all)",
        metavar="N",
        check=positive,
    )
    seed: int = option(
        0,
        "seed of the noise and of the images of --samples (default: 0)",
        common="seed of the noise and of --samples (default: 0)",
        metavar="N",
        check=whole(0, 2**32 - 1),
    )
    xi: float = option(
        names.XI,
        "gain in accuracy that counts as high, a fraction (default: %(default)s)",
        metavar="X",
        check=fraction,
    )
    paper: bool = option(
        False,
        "use the paper's data, estimator, draws and definitions as defaults (docs/paper.md)",
        common="use the paper's data, estimator and draws",
        compared=False,
    )
    quick: bool = option(
        False,
        "measure at most 200 images of each data set, 6 positions, 4 draws and 2 masks, for a first look; an "
        "option given beside it wins",
        common="a first look: fewer images, positions and draws",
        compared=False,
        own="only the command line may ask for a first look; leave it out",
    )


@dataclass(frozen=True)
class Layers:
    """Settings of the studies that go layer by layer.

    Attributes:
        granularity: how parameters form layers: ``module``, ``block``, ``tensor`` or ``re:PATTERN``.
        layers: names or ``re:PATTERN`` of the layers to study; None: all.
        models: names of the models to study; None: each study's own choice.
        data: names of the data sets of ``layers``, ``cumulative`` and ``prune``; None: the first
            out-of-distribution one.
        samples: largest number of images of each.
        alphas: positions of layer-wise interpolation and of cumulative paths.
        others: position of the other layers, ``"zeroshot"`` or ``"finetuned"``.
        reference: what instability is measured from: the mean loss of the layer's own ends, ``"own"``, or
            that of the two original models, ``"models"`` (Def. 1.1).
        straggler_margin: instability above which a layer is a straggler, in nats (Def. 1.2).
    """

    GROUP: ClassVar = Group(
        "layer by layer (layers, cumulative, layer-sharpness, prune)", place=("settings", "layers")
    )

    granularity: str = option(
        "module",
        "what one layer is: module (default), block, tensor, or re:PATTERN",
        metavar="HOW",
        check=_granularity,
    )
    layers: tuple[str, ...] | None = _names(
        "layers to study; re:PATTERN matches whole names (default: all)",
        common="layers to study (default: all)",
        whole=tuple,
    )
    models: tuple[str, ...] | None = _names(
        "models for layers, cumulative, layer-sharpness, prune, coefficients and figures; other studies "
        "measure all (default: those with the highest and lowest mean out-of-distribution gain: four for "
        "layer-sharpness, two for the others; all for correlation and claim)",
        common="models of studies by layer (default: best, worst)",
    )
    data: tuple[str, ...] | None = _names(
        "data sets for layers, cumulative and prune (default: the first out-of-distribution one)",
        "layer-data",
        compared=False,
    )
    samples: int = option(
        1024,
        "images of each of these data sets, at most (default: 1024)",
        name="layer-samples",
        metavar="N",
        check=positive,
        compared=False,
    )
    alphas: tuple[float, ...] = option(
        ALPHAS,
        "positions for layers and cumulative (default: as --alphas)",
        name="layer-alphas",
        metavar="ALPHA",
        check=spaced,
        many="once",
        whole=_alphas,
        follows="alphas",
    )
    others: Others = option(
        "zeroshot",
        "weights of the other layers in the study layers (default: zeroshot)",
        choices=tuple(names.OTHERS),
    )
    reference: Reference = option(
        "own",
        "baseline of instability: the mean loss of the layer's own two ends (own, the default), or of the "
        "two original models (models), as the paper words it",
        choices=tuple(names.REFERENCES),
    )
    straggler_margin: float = option(
        names.STRAGGLER_MARGIN,
        "instability above which a layer is a straggler (default: %(default)s)",
        metavar="NATS",
        check=above_zero,
    )


@dataclass(frozen=True)
class Sharpness:
    """Settings of sharpness, general (Eq. 3) and layer-wise (Sec. 3.1).

    Attributes:
        rhos: scales of the noise, ascending, in units of |w|; none: ``auto``, the one at which the median
            model's general sharpness is a tenth of a nat (:mod:`rft_fast.studies.pilot`).
        draws: draws of noise for all weights together.
        layer_draws: draws of noise for each layer.
        alphas: positions, a subset of the path's.
        data: names of data sets; None: the first in-distribution one, else the first.
        samples: largest number of images of each.
        estimator: see :class:`rft_fast.studies.Protocol`.
        on: weights to perturb; None: interpolated ones in general, fine-tuned ones layer by layer.
        noise, adaptive, noise_batch: see :class:`rft_fast.studies.Protocol`.
        exclude: names or ``re:PATTERN`` of layers that general sharpness leaves as they are; None: none.
        normalize_logits: whether logits are centred and divided by their norm before the loss.
        restarts: starts of each search for the worst case, see :class:`rft_fast.studies.Protocol`.
        goal_se: standard error to reach, in nats; None: a fixed number of draws.
        max_draws: largest number of draws for ``goal_se``, with those of the pilot.
        zero_margin: layer-wise sharpness below which a layer is flat, in nats.
    """

    GROUP: ClassVar = Group(
        "sharpness (sharpness, layer-sharpness, prune, correlation, claim)", place=("settings", "sharpness")
    )

    rhos: tuple[float, ...] = option(
        (1.0,),
        "scale of the noise, in units of |w| (default: 1.0, as in the paper); auto: the rho at which the "
        "median model's sharpness is 0.1 nats",
        common="scale of the noise, or auto (default: 1.0)",
        metavar="RHO",
        check=_rho,
        many="once",
        whole=_rhos,
        none="auto",
    )
    draws: int = option(
        20, "draws of noise (default: 20)", common="draws of noise (default: 20)", metavar="N", check=positive
    )
    layer_draws: int = option(
        20,
        "draws of noise for each layer (default: as --draws)",
        metavar="N",
        check=positive,
        follows="draws",
    )
    alphas: tuple[float, ...] = option(
        ALPHAS,
        "positions for sharpness, a subset of --alphas (default: all of them)",
        name="sharpness-alphas",
        metavar="ALPHA",
        check=spaced,
        many="once",
        whole=_ascending,
        follows="alphas",
    )
    data: tuple[str, ...] | None = _names(
        "data sets for sharpness (default: the first in-distribution one, else the first)",
        "sharpness-data",
        compared=False,
    )
    samples: int = option(
        1024,
        "images of each of these data sets, at most (default: 1024)",
        name="sharpness-samples",
        metavar="N",
        check=positive,
        compared=False,
    )
    estimator: EstimatorChoice = option(
        "auto",
        "plain: all images of a noise batch share a draw, as published; gradient: plain, minus the linear "
        "term; per-image, per-image-antithetic, per-image-gradient: separate noise for each image, so that "
        "one pass replaces several plain draws; auto (default): per-image or per-image-gradient, as the "
        "first draws decide; hessian: the limit of small rho; apgd-l2, apgd-linf: the worst case; "
        "apgd-l2-published, apgd-linf-published: the worst case by the published loop",
        metavar="NAME",
        choices=names.ESTIMATOR_CHOICES,
    )
    on: On | None = option(
        None,
        "weights to perturb (default: interpolated in sharpness, finetuned in layer-sharpness)",
        choices=names.ON,
    )
    noise: Noise = option("normal", "distribution of the noise (default: normal)", choices=names.NOISE)
    adaptive: bool = option(True, "use noise of the same size for every weight, not in units of |w|")
    noise_batch: int | None = option(
        names.NOISE_BATCH,
        "images that share a draw of noise: a number, or all (default: %(default)s, as in published code)",
        metavar="N",
        check=_noise_batch,
        none="all",
    )
    restarts: int = option(
        1,
        "starts of each search by apgd-...: the first at the clean weights, the others random; the highest "
        "loss counts (default: 1)",
        metavar="N",
        check=positive,
    )
    exclude: tuple[str, ...] | None = _names(
        "layers that the study sharpness does not perturb; re:PATTERN matches whole names (default: none)",
        whole=tuple,
    )
    normalize_logits: bool = option(False, "centre the logits and divide them by their norm before the loss")
    goal_se: float | None = option(
        None,
        "standard error to reach; a pilot of --draws, all noise batches together, sets the number of draws",
        metavar="NATS",
        check=above_zero,
    )
    max_draws: int = option(
        1000, "largest number of draws for --goal-se (default: 1000)", metavar="N", check=positive
    )
    zero_margin: float = option(
        names.ZERO_MARGIN,
        "a layer is flat if its layer-wise sharpness is within this of 0 (default: %(default)s)",
        metavar="NATS",
        check=above_zero,
    )


def check_draws(draws: int, estimator: EstimatorChoice, goal: float | None, most: int) -> None:
    """Check a number of draws against estimator and goal.

    Args:
        draws: draws of noise; with a goal, of the pilot.
        estimator: estimator that uses them.
        goal: standard error to reach, in nats; None: no goal.
        most: largest number of draws for the goal.

    Raises:
        ValueError: there is no draw, an odd number for pairs, or too few or too many for the goal.
    """
    if draws < 1:
        raise ValueError(f"sharpness: at least one draw is needed; got {draws}")
    if estimator == "per-image-antithetic" and draws % 2:
        raise ValueError(f"sharpness: antithetic draws come in pairs; got {draws}, use {draws + 1}")
    if goal is not None and draws < 4:
        raise ValueError(f"sharpness: the pilot for a standard error needs 4 draws or more; got {draws}")
    if goal is not None and most < 2 * draws:
        raise ValueError(
            f"sharpness: a pilot of {draws} draws and as many after it need a maximum of at least "
            f"{2 * draws}; got {most}"
        )


@dataclass(frozen=True)
class Prune:
    """Settings of pruning (Algorithm 1).

    Attributes:
        criteria: criteria that pick the layers to prune.
        layers: names or ``re:PATTERN`` of layers to prune instead.
        keep: fraction of the weights that survives.
        methods: what pruned weights become.
        mask_seeds: number of random masks.
        control: whether as many random layers are pruned for comparison.
    """

    GROUP: ClassVar = Group("prune", place=("settings", "prune"))

    criteria: tuple[Criterion, ...] = option(
        names.CRITERIA,
        "how layers to prune are selected (default: both): sharpness: flat layers, as in Algorithm 1; "
        "instability: stragglers",
        choices=names.CRITERIA,
        many="once",
        whole=different,
    )
    layers: tuple[str, ...] | None = _names(
        "layers to prune instead; re:PATTERN matches whole names", "prune-layers", whole=tuple
    )
    keep: float = option(0.5, "fraction of the weights that survive (default: 0.5)", metavar="P", check=_keep)
    methods: tuple[Method, ...] = option(
        ("zero",),
        "value of pruned weights: zero (default); zeroshot; rescale: zeroshot, with the others moved further "
        "(DARE); magnitude: zero, for the smallest weights instead of random ones",
        choices=names.METHODS,
        many="once",
        whole=different,
    )
    mask_seeds: int = option(3, "number of random masks (default: 3)", metavar="N", check=positive)
    control: bool = option(True, "do not prune as many random layers for comparison")
