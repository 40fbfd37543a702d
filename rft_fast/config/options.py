"""The options of ``python -m rft_fast.sweep``: names, defaults, help, and what single values must be."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import catalogue, names
from ..common import program
from ..names import ESTIMATORS
from ..path.layers import layer_of

DESCRIPTION = """\
Walk the straight line in weight space from a zero-shot CLIP model (alpha = 0) to models fine-tuned
from it (alpha = 1), measure what happens on the way, and leave rows and figures in a directory.

studies (none named: all of them; what a study needs of others is measured, too):
{studies}

ZOO is a .toml file that names models and data, or a folder with a zoo.toml (docs/zoo.md); the
options of "models and data" name them here instead; with neither, it is the digits zoo that comes
with rft_fast.
"""

EXAMPLES = """\
examples:
  python -m rft_fast.sweep
  python -m rft_fast.sweep interpolation --alphas 0:1:21 --samples 200 --out runs/digits
  python -m rft_fast.sweep layer-sharpness --rhos 0.05 --estimator gradient --models lr4e-3-ep8
  python -m rft_fast.sweep my-zoo/zoo.toml --samples 2000
  python -m rft_fast.sweep --arch ViT-B-32-quickgelu \\
      --zeroshot zeroshot.pt --finetuned soup/model_*.pt \\
      --id-data imagenet=imagenet/val --data v2=imagenetv2 sketch=sketch --samples 5000
"""


def parser(zoo: bool = True) -> argparse.ArgumentParser:
    """The options of the command line; without ``zoo``, those that a zoo file may have in ``[options]``.

    These say what is measured. Where it is written, who computes, what is fetched and what is printed is for
    the user's own command (:func:`refused_in_zoo`); models, data and head have entries of their own.
    """
    studies = "\n".join(f"  {study.name:<15}  {study.help}" for study in catalogue.studies())
    top = program.parser(
        "sweep",
        version=zoo,
        add_help=zoo,
        usage="python -m rft_fast.sweep [ZOO] [STUDY ...] [options]",
        description=DESCRIPTION.format(studies=studies),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if zoo:
        top.add_argument("words", nargs="*", metavar="STUDY", type=_study_or_zoo, help=argparse.SUPPRESS)
        _add_models(top)
        _add_head(top)
    _add_measured(top)
    _add_layers(top)
    _add_sharpness(top)
    _add_pruning(top)
    _add_numbers(top)
    if zoo:
        _add_running(top)
    return top


_REASONS = {
    "where results are written": "out overwrite",
    "which files are kept where": "cache no-cache",
    "who computes, and with how much": "device workers memory-limit compile",
    "what is downloaded": "fetch",
    "to whom results are sent": "track",
    "what is printed": "quiet json help version",
    "whether anything is measured": "plan",
}


def refused_in_zoo(name: str) -> str:
    """Why an option of the command line may not stand in a zoo file; empty where there is no such option.

    Args:
        name: without dashes.
    """
    if f"--{name}" not in parser()._option_string_actions:
        return ""
    whose = next((what for what, names in _REASONS.items() if name in names.split()), "")
    if whose:
        return f"{whose} is for the user's own command to say, and no zoo file; leave it out"
    return "it belongs to the zoo's other entries (docs/zoo.md), or to the command line; leave it out"


def _add_models(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group(
        "models and data", "the first three and some data, or a zoo, or none for the digits zoo"
    )
    group.add_argument(
        "--arch",
        metavar="NAME",
        help="open_clip model name, hf-hub:ORG/NAME, or a JSON file in open_clip's format",
    )
    group.add_argument(
        "--zeroshot",
        metavar="SOURCE",
        help="zero-shot checkpoint: a file, a pretrained tag of open_clip such as openai, or hf-hub:ORG/NAME",
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
    group.add_argument(
        "--format",
        choices=tuple(names.FORMATS),
        help="format of the fine-tuned checkpoints (default: found out; docs/checkpoints.md)",
    )
    group.add_argument(
        "--resize-positions",
        action="store_true",
        help="resample the positions of image towers for another image size to that of --arch",
    )
    group.add_argument(
        "--unrelated",
        action="store_true",
        help="also walk to weights that were not fine-tuned from the zero-shot ones (docs/checkpoints.md)",
    )
    for option, what in (
        ("--data", "out-of-distribution data: a folder of class folders, or another kind (docs/data.md)"),
        ("--id-data", "in-distribution data, shown beside the others; no mode is given there"),
    ):
        group.add_argument(
            option, metavar="NAME=PATH", type=_named, nargs="+", action="extend", default=[], help=what
        )
    group.add_argument(
        "--data-kind",
        metavar="NAME=KIND",
        type=_named,
        nargs="+",
        action="extend",
        default=[],
        help=f"what a data set is, where that is not found out: {', '.join(names.KINDS)}",
    )
    group.add_argument(
        "--data-labels",
        metavar="NAME=FILE",
        type=_named,
        nargs="+",
        action="extend",
        default=[],
        help="which rows of the head a data set's classes are, where their names do not show it: a label map "
        "(docs/data.md), or the word order: class i is row i",
    )


def _add_head(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("head (docs/endpoints.md)")
    group.add_argument(
        "--head",
        choices=names.HEADS,
        help="interpolate the head with the rest (default), or keep that of one end",
    )
    group.add_argument(
        "--towers",
        choices=names.TOWERS,
        help="image: a linear head (default); both: text tower, too, prompts encoded again at every alpha",
    )
    group.add_argument(
        "--class-names",
        metavar="LIST",
        help="names of the head's rows: imagenet, cifar10, cifar100, stl10, or a file with one name a line; "
        "data sets go to rows by them, and a checkpoint without a head gets one from its text tower",
    )
    group.add_argument(
        "--templates",
        metavar="LIST",
        help="prompts around the names: openai (80, the default), simple (7), photo (1), or a file",
    )
    group.add_argument(
        "--head-scale",
        metavar="X",
        type=_scale,
        help="factor of a head made of prompts (default: the model's own; 100 in model-soups)",
    )
    group.add_argument(
        "--zeroshot-head", metavar="PATH", type=Path, help="file with the head of a zero-shot checkpoint"
    )


def _add_measured(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("what is measured")
    group.add_argument(
        "--alphas",
        metavar="ALPHA",
        type=_range,
        nargs="+",
        action=_Once,
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
        default=names.XI,
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
        action=_Once,
        help="only these layers; re:PATTERN matches whole names (default: all)",
    )
    group.add_argument(
        "--models",
        metavar="NAME",
        nargs="+",
        action=_Once,
        help="only these fine-tuned models (default: those with the highest and lowest gain in mean accuracy "
        "out of distribution, two for layers and prune, four for layer-sharpness; all for what correlation "
        "needs)",
    )
    group.add_argument(
        "--layer-data",
        metavar="NAME",
        nargs="+",
        action=_Once,
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
        action=_Once,
        help="positions of layers (default: as --alphas)",
    )
    group.add_argument(
        "--others",
        choices=tuple(names.OTHERS),
        default="zeroshot",
        help="where the other layers are in layers (default: zeroshot)",
    )
    group.add_argument(
        "--straggler-margin",
        metavar="NATS",
        type=_margin,
        default=names.STRAGGLER_MARGIN,
        help="instability beyond which a layer is a straggler (default: %(default)s)",
    )


def _add_sharpness(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("sharpness (sharpness, layer-sharpness, prune, correlation)")
    group.add_argument(
        "--rhos",
        metavar="RHO",
        type=_margin,
        nargs="+",
        action=_Once,
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
        action=_Once,
        help="positions, some of --alphas (default: as --alphas)",
    )
    group.add_argument(
        "--sharpness-data",
        metavar="NAME",
        nargs="+",
        action=_Once,
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
        "the default: gradient, but plain for all weights where a rho is above 0.2, where it gains nothing",
    )
    group.add_argument(
        "--on",
        choices=names.ON,
        help="which weights are perturbed (default: interpolated, layer by layer finetuned)",
    )
    group.add_argument("--noise", choices=names.NOISE, default="normal", help="(default: normal)")
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
        "--goal-se",
        metavar="NATS",
        type=_margin,
        help="go on drawing until the standard error is this small (from 20 draws or more: docs/studies.md)",
    )
    group.add_argument(
        "--max-draws", metavar="N", type=_positive, default=1000, help="but no further (default: 1000)"
    )
    group.add_argument(
        "--zero-margin",
        metavar="NATS",
        type=_margin,
        default=names.ZERO_MARGIN,
        help="layer-wise sharpness within which a layer is near zero (default: %(default)s)",
    )


def _add_pruning(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("prune")
    group.add_argument(
        "--criteria",
        nargs="+",
        action=_Once,
        choices=names.CRITERIA,
        default=list(names.CRITERIA),
        help="how stragglers are told: sharpness near zero (Algorithm 1), instability (default: both)",
    )
    group.add_argument(
        "--prune-layers",
        metavar="NAME",
        nargs="+",
        action=_Once,
        help="prune these layers instead (re:PATTERN, too)",
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
        action=_Once,
        choices=names.METHODS,
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


def _add_numbers(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("how it is computed")
    group.add_argument(
        "--impl",
        choices=names.IMPLS,
        default="auto",
        help="kernels that write the weights (default: auto, the fastest that works)",
    )
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        help="images per forward pass (default: 512, on the CPU 128 or, for small sets, 64; fewer where "
        "memory asks for it)",
    )
    group.add_argument(
        "--precision",
        choices=names.PRECISIONS,
        default="fp32",
        help="number format of weights and activations of the live model (default: fp32; ieee is fp32 with "
        "attention by plain float32 products, where a GPU's own kernel takes three TF32 products for one; "
        "docs/speed.md has what the others cost in accuracy: bf16 and fp16 spoil sharpness near zero)",
    )
    group.add_argument(
        "--no-graphs", action="store_true", help="on a GPU, do not record launches as CUDA graphs"
    )
    group.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be read, and count them in the rows, rather than refuse",
    )


def _add_running(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("how it runs")
    group.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="directory for rows and figures; the same command goes on with the run that is there "
        "(default: a new one in rft-runs/)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the run in DIR, rather than go on with it"
    )
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    group.add_argument(
        "--memory-limit",
        metavar="GIB",
        type=_margin,
        help="memory for images, held activations and batches (default: of what is free, 80 %% on a GPU, "
        "half on the CPU)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="run the model through torch.compile: minutes of compilation first",
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        help="where decoded images are kept (default: $RFT_CACHE, else rft_fast in the user's "
        "cache directory)",
    )
    group.add_argument("--no-cache", action="store_true", help="decode images anew, keep nothing")
    group.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        help="measure on several GPUs or machines with Ray (docs/cluster.md): a number, auto for one to a "
        "GPU (or 8 cores) of this machine, or ray://HOST:PORT of a cluster",
    )
    group.add_argument(
        "--fetch",
        action="store_true",
        help="download what a zoo file names and this machine has not (hf-hub:..., published weights, "
        "tokenizers); with --plan, anything. What this command line names itself is downloaded without it",
    )
    group.add_argument("--quiet", action="store_true", help="say nothing but errors; run.log has it all")
    group.add_argument(
        "--json", action="store_true", help="JSON lines on standard output, for machines (docs/progress.md)"
    )
    group.add_argument(
        "--track",
        nargs="+",
        action=_Once,
        choices=names.TRACKERS,
        default=[],
        help="also log measurements there, through its own client",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="measure nothing: tell forward passes, FLOPs, bytes, expected time and memory of this request",
    )


class _Once(argparse.Action):
    """All values stand behind one option. Given again, it would silently replace what it was given first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not self.default:
            raise argparse.ArgumentError(self, "given more than once; put all values behind one of it")
        setattr(namespace, self.dest, values)


# --- single values --------------------------------------------------------------------------------


def _study(text: str) -> str:
    if text not in catalogue.names():
        near = difflib.get_close_matches(text, catalogue.names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(catalogue.names())}"
        raise argparse.ArgumentTypeError(f"no study is called {text!r}; {hint}")
    return text


def _study_or_zoo(text: str) -> str | Path:
    if text not in catalogue.names() and (text.endswith(".toml") or Path(text).is_dir()):
        return Path(text)
    return _study(text)


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _workers(text: str) -> str:
    address = text.startswith("ray://") or re.fullmatch(r"[^:/\s]+:\d+", text)
    if text != "auto" and not address and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"expected a number of workers, auto, or ray://HOST:PORT, got {text!r}"
        )
    return text


def _scale(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


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
