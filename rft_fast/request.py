"""What a command line of ``python -m rft_fast.sweep`` asks for: its options, read and found valid."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from . import classifier, results, studies, zoo
from .kernels import contract, registry
from .layers import layer_of
from .studies.estimators import ESTIMATORS, Protocol
from .studies.layers import MARGIN as STRAGGLER_MARGIN
from .studies.layers import OTHERS
from .studies.pruning import CRITERIA, METHODS
from .studies.rows import STUDIES
from .studies.sharpness import MARGIN as ZERO_MARGIN

# Study -> the other studies whose rows it, its figure or its choice of models needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "interpolation": (),
    "layers": ("interpolation",),
    "sharpness": ("interpolation",),
    "layer-sharpness": ("interpolation",),
    "prune": ("interpolation",),  # and those of its criteria
    "correlation": ("interpolation", "layers", "sharpness", "layer-sharpness"),
}
CRITERION_NEEDS = {"sharpness": "layer-sharpness", "instability": "layers"}

DESCRIPTION = """\
Walk the straight line in weight space from a zero-shot CLIP model (alpha = 0) to models fine-tuned
from it (alpha = 1), measure what happens on the way, and leave rows and figures in a directory.

studies (none named: all of them; what a study needs of others is measured, too):
  interpolation    accuracy and loss along the path: gain, barrier, instability, mode (Figure 1)
  layers           the same for one layer at a time, the others zero-shot: stragglers (Figure 2)
  sharpness        how the loss rises when all weights are perturbed, along the path (Figure 3)
  layer-sharpness  the same for one layer at a time (Figure 4)
  prune            the path with straggler layers pruned at random, and a control (Figure 5)
  correlation      over the models: does sharpness tell accuracy out of distribution?
"""

EXAMPLES = """\
examples:
  python -m rft_fast.sweep
  python -m rft_fast.sweep interpolation --alphas 0:1:21 --samples 200 --out runs/digits
  python -m rft_fast.sweep layer-sharpness --rhos 0.05 --estimator gradient --models lr4e-3-ep8
  python -m rft_fast.sweep --arch ViT-B-32-quickgelu \\
      --zeroshot zeroshot.pt --finetuned soup/model_*.pt \\
      --id-data imagenet=imagenet/val --data v2=imagenetv2 sketch=sketch --samples 5000
"""


@dataclass(frozen=True)
class Subset:
    """The images that a study is measured on: at most so many of each data set; None: of the default one."""

    names: list[str] | None
    samples: int


@dataclass(frozen=True)
class Request:
    """What the command line asks for, found valid. Nothing is loaded yet."""

    everything: bool  # no study was named: all of them
    studies: list[str]  # those asked for
    measured: list[str]  # these, and what they need, in order
    zoo: zoo.Zoo
    alphas: list[float]
    samples: int | None
    batch_size: int | None
    seed: int
    device: torch.device
    impl: str
    xi: float
    out: Path
    overwrite: bool
    granularity: str
    layers: list[str] | None
    models: list[str] | None
    layer_alphas: list[float]
    layer_images: Subset
    others: str
    straggler_margin: float
    sharpness_alphas: list[float]
    sharpness_images: Subset
    rhos: list[float]
    draws: int
    layer_draws: int
    normalize_logits: bool
    general: Protocol
    layerwise: Protocol
    zero_margin: float
    keep: float
    criteria: list[str]
    prune_layers: list[str] | None
    methods: list[str]
    mask_seeds: list[int]
    control: bool


def parser(studies: bool = True) -> argparse.ArgumentParser:
    """The options of the command line, with or without the names of studies."""
    top = argparse.ArgumentParser(
        prog="python -m rft_fast.sweep",
        usage="python -m rft_fast.sweep [STUDY ...] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if studies:
        top.add_argument("studies", nargs="*", metavar="STUDY", type=_study, help=argparse.SUPPRESS)
    _add_models(top)
    _add_measured(top)
    _add_layers(top)
    _add_sharpness(top)
    _add_pruning(top)
    _add_running(top)
    return top


def _add_models(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group(
        "models and data", "all of these, or none for the digits zoo that comes with rft_fast"
    )
    group.add_argument(
        "--arch", metavar="NAME", help="open_clip model name, or a JSON file in open_clip's format"
    )
    group.add_argument(
        "--zeroshot", metavar="PATH", type=Path, help="zero-shot checkpoint: image encoder and head"
    )
    group.add_argument(
        "--finetuned",
        metavar="PATH",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="checkpoints fine-tuned from it",
    )
    for option, what in (
        ("--data", "out-of-distribution data: a folder of class folders, or an .npz with images and labels"),
        ("--id-data", "in-distribution data, shown beside the others; no mode is given there"),
    ):
        group.add_argument(
            option,
            metavar="NAME=PATH",
            type=_named_path,
            nargs="+",
            action="extend",
            default=[],
            help=what,
        )


def _add_measured(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("what is measured")
    group.add_argument(
        "--alphas",
        metavar="ALPHA",
        type=_range,
        nargs="+",
        default=[_range("0:1:11")],
        help="positions, as numbers or start:stop:count (default: 0:1:11)",
    )
    group.add_argument(
        "--samples",
        metavar="N",
        type=_positive,
        help="images of each data set, drawn at random (default: all)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=0,
        help="chooses the images of --samples and the noise (default: 0)",
    )
    group.add_argument(
        "--xi",
        metavar="X",
        type=_fraction,
        default=studies.XI,
        help="gain in accuracy that counts as high, as a fraction (default: %(default)s)",
    )


def _add_layers(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("layer by layer (layers, layer-sharpness, prune)")
    group.add_argument(
        "--granularity",
        metavar="HOW",
        default="module",
        type=_granularity,
        help="module, block, tensor, or re:PATTERN (default: module)",
    )
    group.add_argument(
        "--layers",
        metavar="NAME",
        nargs="+",
        help="only these layers; re:PATTERN matches whole names (default: all)",
    )
    group.add_argument(
        "--models",
        metavar="NAME",
        nargs="+",
        help="only these fine-tuned models (default: those with the highest and lowest gain in mean accuracy "
        "out of distribution, two for layers and prune, four for layer-sharpness; all for what correlation "
        "needs)",
    )
    group.add_argument(
        "--layer-data",
        metavar="NAME",
        nargs="+",
        help="data sets of layers and prune (default: the first out-of-distribution one)",
    )
    group.add_argument(
        "--layer-samples",
        metavar="N",
        type=_positive,
        default=1024,
        help="images of each, at most (default: 1024)",
    )
    group.add_argument(
        "--layer-alphas",
        metavar="ALPHA",
        type=_range,
        nargs="+",
        help="positions of layers (default: as --alphas)",
    )
    group.add_argument(
        "--others",
        choices=tuple(OTHERS),
        default="zeroshot",
        help="where the other layers are in layers (default: zeroshot)",
    )
    group.add_argument(
        "--straggler-margin",
        metavar="NATS",
        type=_margin,
        default=STRAGGLER_MARGIN,
        help="instability beyond which a layer is a straggler (default: %(default)s)",
    )


def _add_sharpness(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("sharpness (sharpness, layer-sharpness, prune, correlation)")
    group.add_argument(
        "--rhos",
        metavar="RHO",
        type=_margin,
        nargs="+",
        default=[1.0],
        help="noise in units of |w| (default: 1.0, the paper's)",
    )
    group.add_argument("--draws", metavar="N", type=_positive, default=20, help="of noise (default: 20)")
    group.add_argument(
        "--layer-draws", metavar="N", type=_positive, help="of noise for each layer (default: as --draws)"
    )
    group.add_argument(
        "--sharpness-alphas",
        metavar="ALPHA",
        type=_range,
        nargs="+",
        help="positions, some of --alphas (default: as --alphas)",
    )
    group.add_argument(
        "--sharpness-data",
        metavar="NAME",
        nargs="+",
        help="data sets (default: the first in-distribution one, else the first)",
    )
    group.add_argument(
        "--sharpness-samples",
        metavar="N",
        type=_positive,
        default=1024,
        help="images of each, at most (default: 1024)",
    )
    group.add_argument(
        "--estimator",
        choices=("auto", *ESTIMATORS),
        default="auto",
        help="plain draws, antithetic pairs, draws less their linear term (gradient: the fewest draws where "
        "rho or the layer is small), hessian (the limit for small rho), or the worst case (apgd-...); auto, "
        "the default: gradient, but plain for all weights at rho above 0.2, where it gains nothing",
    )
    group.add_argument(
        "--on",
        choices=contract.ON,
        help="which weights are perturbed (default: interpolated, layer by layer finetuned)",
    )
    group.add_argument("--noise", choices=contract.NOISE, default="normal", help="(default: normal)")
    group.add_argument(
        "--no-adaptive", action="store_true", help="noise of the same size for every weight, not of |w|"
    )
    group.add_argument(
        "--noise-batch",
        metavar="N",
        type=_positive,
        help="noise anew for every N images, as in published code (default: one draw for all)",
    )
    group.add_argument(
        "--normalize-logits",
        action="store_true",
        help="centre the logits and divide them by their norm before the loss",
    )
    group.add_argument(
        "--goal-se", metavar="NATS", type=_margin, help="go on drawing until the standard error is this small"
    )
    group.add_argument(
        "--max-draws", metavar="N", type=_positive, default=1000, help="but no further (default: 1000)"
    )
    group.add_argument(
        "--zero-margin",
        metavar="NATS",
        type=_margin,
        default=ZERO_MARGIN,
        help="layer-wise sharpness within which a layer is near zero (default: %(default)s)",
    )


def _add_pruning(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("prune")
    group.add_argument(
        "--criteria",
        nargs="+",
        choices=CRITERIA,
        default=list(CRITERIA),
        help="how stragglers are told: sharpness near zero (Algorithm 1), instability (default: both)",
    )
    group.add_argument(
        "--prune-layers", metavar="NAME", nargs="+", help="prune these layers instead (re:PATTERN, too)"
    )
    group.add_argument(
        "--keep",
        metavar="P",
        type=_fraction,
        default=0.5,
        help="fraction of the weights that survives (default: 0.5)",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["zero"],
        help="what pruned weights become: zero (default), zeroshot, rescale (zeroshot, and the rest moves "
        "further: DARE); magnitude: zero, for the smallest",
    )
    group.add_argument(
        "--mask-seeds", metavar="N", type=_positive, default=3, help="number of random masks (default: 3)"
    )
    group.add_argument(
        "--no-control", action="store_true", help="do not prune as many layers at random beside them"
    )


def _add_running(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("how it runs")
    group.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="directory for rows and figures (default: a new one in rft-runs/)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the rows of an earlier run in DIR")
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    group.add_argument(
        "--impl",
        choices=registry.IMPLS,
        default="auto",
        help="kernels that write the weights (default: auto, the fastest that works)",
    )
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        help="images per forward pass (default: 512, on the CPU 128 or, for small sets, 64)",
    )


# --- single values --------------------------------------------------------------------------------


def _study(text: str) -> str:
    if text not in STUDIES:
        near = difflib.get_close_matches(text, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(STUDIES)}"
        raise argparse.ArgumentTypeError(f"no study is called {text!r}; {hint}")
    return text


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, Path(path)


def _range(text: str) -> list[float]:
    """One number, or start:stop:count evenly spaced ones with both ends."""
    try:
        if ":" not in text:
            return [float(text)]
        start, stop, count = text.split(":")
        if int(count) < 2:
            raise ValueError("a range needs both ends")
        # Rounded, so that tenths are written as people write them.
        return [round(x, 12) for x in np.linspace(float(start), float(stop), int(count)).tolist()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or start:stop:count with a count of at least 2, got {text!r}"
        ) from None


def _granularity(text: str) -> str:
    try:
        layer_of("name", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _positive(text: str) -> int:
    return _integer(text, 1, sys.maxsize)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)


def _integer(text: str, low: int, high: int) -> int:
    if not (text.isdecimal() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a fraction from 0 to below 1 (two points of accuracy are 0.02), got {text!r}"
        )
    return value


def _margin(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# --- the whole ------------------------------------------------------------------------------------


def read(argv: Sequence[str]) -> Request:
    """The request of a command line, checked as far as is possible without loading anything.

    The options of a zoo file stand before those of the command line, which override them.

    Raises ValueError for what argparse cannot check; exits with 2, as argparse does, for the rest.
    """
    options = parser()
    arguments = options.parse_args(argv)
    its_zoo = _zoo(arguments)
    if its_zoo.options:
        of_zoo = parser(studies=False)
        of_zoo.prog = f"options of the zoo {its_zoo.name!r}"
        options.set_defaults(**vars(of_zoo.parse_args(its_zoo.options)))
        arguments = options.parse_args(argv)
    return _request(arguments, its_zoo)


def _request(arguments: argparse.Namespace, its_zoo: zoo.Zoo) -> Request:
    alphas = _checked("--alphas", studies.check_alphas, _flat(arguments.alphas))
    layer_alphas = alphas
    if arguments.layer_alphas is not None:
        layer_alphas = _checked("--layer-alphas", studies.check_alphas, _flat(arguments.layer_alphas))
    sharpness_alphas = alphas
    if arguments.sharpness_alphas is not None:
        sharpness_alphas = sorted(set(_flat(arguments.sharpness_alphas)))
    asked = list(dict.fromkeys(arguments.studies)) or list(STUDIES)
    if arguments.models is not None:
        for name in arguments.models:
            if name not in its_zoo.finetuned:
                names = list(its_zoo.finetuned)
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
                raise ValueError(
                    f"argument --models: there is no fine-tuned model {name!r}; the nearest are "
                    + ", ".join(near)
                )
        _distinct("--models", arguments.models)
    if len(arguments.models or its_zoo.finetuned) < 3 and "correlation" in asked:
        if arguments.studies:
            raise ValueError("correlation: it needs at least 3 fine-tuned models; name more, or leave it out")
        asked.remove("correlation")
    measured = _measured(asked, [] if arguments.prune_layers else arguments.criteria)
    extra = sorted(set(sharpness_alphas) - set(alphas))
    if extra and {"sharpness", "layer-sharpness"} & set(measured):
        raise ValueError(
            f"argument --sharpness-alphas: {extra} are not among --alphas, where accuracies are measured"
        )
    device = _device(arguments.device)
    try:
        registry.pick(arguments.impl, device)
    except RuntimeError as error:
        raise ValueError(f"argument --impl: {error}") from None
    classifier.preprocess(its_zoo.arch)  # refuses an unknown architecture
    auto = ("plain" if max(arguments.rhos) > 0.2 else "gradient", "gradient")
    general, by_layer = (
        Protocol(
            estimator=estimator if arguments.estimator == "auto" else arguments.estimator,
            on=arguments.on or on,
            noise=arguments.noise,
            adaptive=not arguments.no_adaptive,
            seed=arguments.seed,
            noise_batch=arguments.noise_batch,
            goal=arguments.goal_se,
            most=arguments.max_draws,
        )
        for on, estimator in zip(("interpolated", "finetuned"), auto, strict=True)
    )
    layer_draws = arguments.layer_draws or arguments.draws
    general.check_draws(arguments.draws)
    by_layer.check_draws(layer_draws)
    if len(set(arguments.rhos)) < len(arguments.rhos):
        raise ValueError(f"argument --rhos: expected each once, got {arguments.rhos}")
    if not arguments.keep:
        raise ValueError("argument --keep: expected a fraction above 0")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = arguments.out or Path("rft-runs", f"{its_zoo.name}-{stamp}")
    results.check(out, arguments.overwrite)
    return Request(
        everything=not arguments.studies,
        studies=asked,
        measured=measured,
        zoo=its_zoo,
        alphas=alphas,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=device,
        impl=arguments.impl,
        xi=arguments.xi,
        out=out,
        overwrite=arguments.overwrite,
        granularity=arguments.granularity,
        layers=arguments.layers,
        models=arguments.models,
        layer_alphas=layer_alphas,
        layer_images=_subset("--layer-data", arguments.layer_data, arguments.layer_samples, its_zoo),
        others=arguments.others,
        straggler_margin=arguments.straggler_margin,
        sharpness_alphas=sharpness_alphas,
        sharpness_images=_subset(
            "--sharpness-data", arguments.sharpness_data, arguments.sharpness_samples, its_zoo
        ),
        rhos=sorted(arguments.rhos),
        draws=arguments.draws,
        layer_draws=layer_draws,
        normalize_logits=arguments.normalize_logits,
        general=general,
        layerwise=by_layer,
        zero_margin=arguments.zero_margin,
        keep=arguments.keep,
        criteria=list(dict.fromkeys(arguments.criteria)),
        prune_layers=arguments.prune_layers,
        methods=list(dict.fromkeys(arguments.methods)),
        mask_seeds=list(range(arguments.seed, arguments.seed + arguments.mask_seeds)),
        control=not arguments.no_control,
    )


def _measured(asked: Sequence[str], criteria: Sequence[str]) -> list[str]:
    """The studies asked for and those that they need, in order."""
    found = {*asked, *(need for study in asked for need in NEEDS[study])}
    if "prune" in asked:
        found |= {CRITERION_NEEDS[criterion] for criterion in criteria}
    return [study for study in STUDIES if study in found]


def _flat(parts: Sequence[Sequence[float]]) -> list[float]:
    return [number for part in parts for number in part]


def _checked(
    option: str, check: Callable[[Sequence[float]], list[float]], values: Sequence[float]
) -> list[float]:
    try:
        return check(values)
    except ValueError as error:
        raise ValueError(f"argument {option}: {error}") from None


def _subset(option: str, names: list[str] | None, samples: int, its_zoo: zoo.Zoo) -> Subset:
    for name in names or ():
        if name not in its_zoo.data:
            raise ValueError(
                f"argument {option}: there is no data set {name!r}; there are {', '.join(its_zoo.data)}"
            )
    _distinct(option, names or [])
    return Subset(names, samples)


def _zoo(arguments: argparse.Namespace) -> zoo.Zoo:
    given = {
        "--arch": arguments.arch,
        "--zeroshot": arguments.zeroshot,
        "--finetuned": arguments.finetuned,
        "--data or --id-data": arguments.data or arguments.id_data,
    }
    if not any(given.values()):
        return zoo.digits()
    if missing := [option for option, value in given.items() if not value]:
        raise ValueError(
            f"a sweep of your own models needs {', '.join(given)}; missing: {', '.join(missing)} "
            "(leave all of them out for the digits zoo)"
        )
    for file in (arguments.zeroshot, *arguments.finetuned):
        if not file.is_file():
            raise ValueError(f"argument --zeroshot, --finetuned: there is no file {file}")
    sources = [(name, zoo.DataSource(path, ood=False)) for name, path in arguments.id_data]
    sources += [(name, zoo.DataSource(path, ood=True)) for name, path in arguments.data]
    for name, source in sources:
        if not source.path.exists():
            raise ValueError(f"argument --data, --id-data: {name}: there is no {source.path}")
    _distinct("--data, --id-data", [name for name, _ in sources])
    # Stems are the shortest names; files such as */final.pt need their whole paths.
    names = [file.stem for file in arguments.finetuned]
    if len(set(names)) < len(names):
        names = [str(file) for file in arguments.finetuned]
    _distinct("--finetuned", names)
    return zoo.Zoo(
        name=Path(arguments.arch).stem,
        arch=arguments.arch,
        zeroshot=arguments.zeroshot,
        finetuned=dict(zip(names, arguments.finetuned, strict=True)),
        data=dict(sources),
    )


def _distinct(option: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"argument {option}: given more than once: {', '.join(twice)}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # backends differ in how they say no
        reason = str(error).partition("\n")[0]
        raise ValueError(f"argument --device: {name!r} cannot be used: {reason}") from None
    return device
