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
    """

    GROUP: ClassVar = Group("what is measured", place=("settings", "along"))

    alphas: tuple[float, ...] = option(
        ALPHAS,
        "positions, as numbers or start:stop:count (default: 0:1:11)",
        metavar="ALPHA",
        check=spaced,
        many="once",
        whole=_alphas,
    )
    samples: int | None = option(
        None, "images of each data set, drawn at random (default: all)", metavar="N", check=positive
    )
    seed: int = option(
        0,
        "chooses the images of --samples and the noise (default: 0)",
        metavar="N",
        check=whole(0, 2**32 - 1),
    )
    xi: float = option(
        names.XI,
        "gain in accuracy that counts as high, as a fraction (default: %(default)s)",
        metavar="X",
        check=fraction,
    )
    paper: bool = option(
        False,
        "the paper's choices in place of the defaults: its data, estimator, draws, definitions (table: "
        "docs/paper.md); an option given beside it wins",
        compared=False,
    )


@dataclass(frozen=True)
class Layers:
    """Settings of the studies that go layer by layer.

    Attributes:
        granularity: how parameters form layers: ``module``, ``block``, ``tensor`` or ``re:PATTERN``.
        layers: names or ``re:PATTERN`` of the layers to study; None: all.
        models: names of the models to study; None: each study's own choice.
        data: names of the data sets of ``layers`` and ``prune``; None: the first out-of-distribution one.
        samples: largest number of images of each.
        alphas: positions of layer-wise interpolation.
        others: position of the other layers, ``"zeroshot"`` or ``"finetuned"``.
        reference: what instability is measured from: the mean loss of the layer's own ends, ``"own"``, or
            that of the two original models, ``"models"`` (Def. 1.1).
        straggler_margin: instability above which a layer is a straggler, in nats (Def. 1.2).
    """

    GROUP: ClassVar = Group("layer by layer (layers, layer-sharpness, prune)", place=("settings", "layers"))

    granularity: str = option(
        "module",
        "module, block, tensor, or re:PATTERN (default: module)",
        metavar="HOW",
        check=_granularity,
    )
    layers: tuple[str, ...] | None = _names(
        "only these layers; re:PATTERN matches whole names (default: all)", whole=tuple
    )
    models: tuple[str, ...] | None = _names(
        "fine-tuned models of layers, prune and layer-sharpness, and of figures (default: those with the "
        "highest and lowest gain in mean accuracy out of distribution, two for layers and prune, four for "
        "layer-sharpness; all for what correlation and claim need); other studies measure all models"
    )
    data: tuple[str, ...] | None = _names(
        "data sets of layers and prune (default: the first out-of-distribution one)",
        "layer-data",
        compared=False,
    )
    samples: int = option(
        1024,
        "images of each, at most (default: 1024)",
        name="layer-samples",
        metavar="N",
        check=positive,
        compared=False,
    )
    alphas: tuple[float, ...] = option(
        ALPHAS,
        "positions of layers (default: as --alphas)",
        name="layer-alphas",
        metavar="ALPHA",
        check=spaced,
        many="once",
        whole=_alphas,
        follows="alphas",
    )
    others: Others = option(
        "zeroshot",
        "where the other layers are in layers (default: zeroshot)",
        choices=tuple(names.OTHERS),
    )
    reference: Reference = option(
        "own",
        "what instability is measured from: the mean loss of the layer's own two ends (own, the default), or "
        "that of the two original models (models), as the paper words it",
        choices=tuple(names.REFERENCES),
    )
    straggler_margin: float = option(
        names.STRAGGLER_MARGIN,
        "instability beyond which a layer is a straggler (default: %(default)s)",
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
        "noise in units of |w| (default: 1.0, the paper's); or auto: the rho at which the median model's "
        "sharpness at the highest alpha is .1 nats, which a pilot finds",
        metavar="RHO",
        check=_rho,
        many="once",
        whole=_rhos,
        none="auto",
    )
    draws: int = option(20, "draws of noise (default: 20)", metavar="N", check=positive)
    layer_draws: int = option(
        20,
        "draws of noise for each layer (default: as --draws)",
        metavar="N",
        check=positive,
        follows="draws",
    )
    alphas: tuple[float, ...] = option(
        ALPHAS,
        "positions, some of --alphas (default: as --alphas)",
        name="sharpness-alphas",
        metavar="ALPHA",
        check=spaced,
        many="once",
        whole=_ascending,
        follows="alphas",
    )
    data: tuple[str, ...] | None = _names(
        "data sets (default: the first in-distribution one, else the first)",
        "sharpness-data",
        compared=False,
    )
    samples: int = option(
        1024,
        "images of each, at most (default: 1024)",
        name="sharpness-samples",
        metavar="N",
        check=positive,
        compared=False,
    )
    estimator: EstimatorChoice = option(
        "auto",
        "plain: draws that the images of a noise batch share, the published protocol; gradient: minus their "
        "linear term; per-image, per-image-antithetic, per-image-gradient: separate noise for each image, "
        "so that one pass replaces several plain draws; auto, the default: per-image, minus the linear term "
        "where the first draws show that it pays; hessian: the limit for small rho; apgd-l2, apgd-linf: the "
        "worst case, also by the published loop (apgd-l2-published, apgd-linf-published)",
        metavar="NAME",
        choices=names.ESTIMATOR_CHOICES,
    )
    on: On | None = option(
        None,
        "which weights are perturbed (default: interpolated, layer by layer finetuned)",
        choices=names.ON,
    )
    noise: Noise = option("normal", "distribution of the noise (default: normal)", choices=names.NOISE)
    adaptive: bool = option(True, "noise of the same size for every weight, not in units of |w|")
    noise_batch: int | None = option(
        names.NOISE_BATCH,
        "images that share a draw of noise (default: %(default)s, as in published code), or all",
        metavar="N",
        check=_noise_batch,
        none="all",
    )
    restarts: int = option(
        1,
        "starts of each search of apgd-..., the first at the clean weights, others random; the highest loss "
        "counts (default: 1)",
        metavar="N",
        check=positive,
    )
    exclude: tuple[str, ...] | None = _names(
        "layers without noise in the study sharpness (all weights); re:PATTERN matches whole names "
        "(default: none)",
        whole=tuple,
    )
    normalize_logits: bool = option(False, "centre the logits and divide them by their norm before the loss")
    goal_se: float | None = option(
        None,
        "standard error to reach: a pilot of --draws, in all noise batches together, decides on how many "
        "draws are made",
        metavar="NATS",
        check=above_zero,
    )
    max_draws: int = option(1000, "most draws for --goal-se (default: 1000)", metavar="N", check=positive)
    zero_margin: float = option(
        names.ZERO_MARGIN,
        "layer-wise sharpness within which a layer is flat (default: %(default)s)",
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
        "how the layers to prune are found: sharpness (flat layers, Algorithm 1), instability (stragglers; "
        "default: both)",
        choices=names.CRITERIA,
        many="once",
        whole=different,
    )
    layers: tuple[str, ...] | None = _names(
        "prune these layers instead (re:PATTERN, too)", "prune-layers", whole=tuple
    )
    keep: float = option(
        0.5, "fraction of the weights that survives (default: 0.5)", metavar="P", check=_keep
    )
    methods: tuple[Method, ...] = option(
        ("zero",),
        "what pruned weights become: zero (default), zeroshot, rescale (zeroshot, and the rest moves "
        "further: DARE); magnitude: zero, for the smallest",
        choices=names.METHODS,
        many="once",
        whole=different,
    )
    mask_seeds: int = option(3, "number of random masks (default: 3)", metavar="N", check=positive)
    control: bool = option(True, "do not prune as many layers at random beside them")
