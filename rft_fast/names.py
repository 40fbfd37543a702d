"""Names that people choose by, and numbers that options start from: in one place that loads nothing.

The command line is parsed with these before torch and the rest are imported. What each name stands for is
defined where it is computed. A closed list of names stands in its ``Literal``, from which the tuple is read:
type checkers, the command line and the checks at run time know the same names.
"""

from __future__ import annotations

import difflib
import math
import pathlib
from collections.abc import Collection
from typing import Literal, NoReturn, TypeAlias, get_args

RUNS = "rft-runs"
"""The folder of runs for which no directory is named."""

# Names where a list of them is expected: a lone string, which is a sequence of strings as well, is none.
Names: TypeAlias = list[str] | tuple[str, ...]


def never(name: NoReturn) -> NoReturn:
    """Where no name is left: mypy sees to it that every one has its branch.

    Raises:
        ValueError: always, for what a program without a type checker gave.
    """
    raise ValueError(f"{name!r} is not one of the names that may stand here")


# --- what is measured ---------------------------------------------------------------------------------

# The paper's studies in its order, which is that of their rows. rft_fast.catalogue has them all, and more.
STUDIES = ("interpolation", "layers", "sharpness", "layer-sharpness", "prune", "correlation")
XI = 0.02  # a gain of two points of accuracy counts as high

Others = Literal["zeroshot", "finetuned"]
# Where the other layers are -> the alpha that they have.
OTHERS: dict[Others, float] = {"zeroshot": 0.0, "finetuned": 1.0}
Reference = Literal["own", "models"]
# What instability is measured from, layer by layer -> in words.
REFERENCES: dict[Reference, str] = {
    "own": "the mean loss of the layer's own two ends",
    "models": "the mean loss of the two original models",
}
Cumulative = Literal["first", "last"]
# The layers that are at alpha together -> in words.
CUMULATIVE: dict[Cumulative, str] = {"first": "the first layers", "last": "the last layers"}
STRAGGLER_MARGIN = 0.1  # nats: instability that makes a straggler

# Means over draws of noise. Without "per-image", all images of a noise batch share each draw.
Sampling = Literal["plain", "gradient", "per-image", "per-image-antithetic", "per-image-gradient"]
WorstCase = Literal["apgd-l2", "apgd-linf", "apgd-l2-published", "apgd-linf-published"]
Estimator = Literal[Sampling, "hessian", WorstCase]
SAMPLING: tuple[Sampling, ...] = get_args(Sampling)
# -> the norm that bounds the perturbation.
WORST_CASE: dict[Estimator, float] = {
    "apgd-l2": 2.0,
    "apgd-linf": math.inf,
    "apgd-l2-published": 2.0,
    "apgd-linf-published": math.inf,
}
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
EstimatorChoice = Literal["auto", Estimator]
ESTIMATOR_CHOICES: tuple[EstimatorChoice, ...] = get_args(EstimatorChoice)
NOISE_BATCH = 128  # images per draw of noise: the published protocol's batch
ZERO_MARGIN = 0.02  # nats: sharpness that counts as zero

Criterion = Literal["sharpness", "instability"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
Method = Literal["zero", "zeroshot", "rescale", "magnitude"]
METHODS: tuple[Method, ...] = get_args(Method)

# --- how weights are written --------------------------------------------------------------------------

On = Literal["finetuned", "interpolated"]
ON: tuple[On, ...] = get_args(On)
ON_WORDS: dict[str, str] = {"finetuned": "fine-tuned"}  # for people
Fill = Literal["zero", "zeroshot"]
FILL: tuple[Fill, ...] = get_args(Fill)
Noise = Literal["normal", "uniform", "rademacher"]
NOISE: tuple[Noise, ...] = get_args(Noise)
Weight = Literal["none", "abs", "square"]
WEIGHT: tuple[Weight, ...] = get_args(Weight)
# The backends in the order in which "auto" prefers them.
Impl = Literal["auto", "native", "triton", "reference"]
IMPLS: tuple[Impl, ...] = get_args(Impl)
Precision = Literal["fp32", "ieee", "tf32", "bf16x3", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# --- models and data ----------------------------------------------------------------------------------

CLASS_LISTS = ("imagenet", "cifar10", "cifar100", "stl10")
TEMPLATE_LISTS = ("openai", "simple", "photo")
HeadChoice = Literal["interpolate", "zeroshot", "finetuned"]
HEADS: tuple[HeadChoice, ...] = get_args(HeadChoice)
Towers = Literal["image", "both"]
TOWERS: tuple[Towers, ...] = get_args(Towers)
Format = Literal[
    "soup", "wiseft", "flyp", "task-vector", "open_clip", "openai", "huggingface", "lora", "state-dict"
]
FORMATS: dict[Format, str] = {
    "soup": "model-soups: a state dict, 'model.*' and 'classification_head.*'",
    "wiseft": "WiSE-FT: a pickled ImageClassifier, image encoder and head",
    "flyp": "FLYP: a pickled CLIPEncoder, both towers, no head",
    "task-vector": "task vectors, patching: any other module pickled whole",
    "open_clip": "open_clip: a CLIP state dict, bare or under 'state_dict' beside the training's state",
    "openai": "OpenAI: a TorchScript archive of CLIP",
    "huggingface": "Hugging Face transformers: CLIP's state dict under its names ('vision_model.*')",
    "lora": "peft: a LoRA adapter, added to the weights of its base",
    "state-dict": "any other dict of tensors by name",
}
Folder = Literal["folder", "imagenet", "imagenet-v2"]  # a folder of class folders, with images as files
Tree = Literal[Folder, "objectnet"]  # all of class folders
Kind = Literal[Tree, "cifar", "idx", "webdataset", "arrow", "npz"]
FOLDERS: tuple[Folder, ...] = get_args(Folder)
TREES: tuple[Tree, ...] = get_args(Tree)
KINDS: tuple[Kind, ...] = get_args(Kind)
ORDER = "order"  # instead of a label map: class i is row i


def as_given(text: str) -> pathlib.Path | str:
    """What stands on a command line for a label map: its file, or the word order."""
    return ORDER if text == ORDER else pathlib.Path(text)


def list_file(what: str, source: str, known: Collection[str]) -> pathlib.Path:
    """The file of a list of names that is none of those that are built in.

    Args:
        what: what is listed, for the error.
        source: what was given.
        known: names of the lists that are built in.

    Raises:
        ValueError: there is no such file; with the nearest of the names.
    """
    if not (file := pathlib.Path(source)).is_file():
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"{what}: {source!r} is neither a known name nor a file; {hint}")
    return file


# --- where results go ---------------------------------------------------------------------------------

TrackerName = Literal["tensorboard", "wandb"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
FigureFormat = Literal["png", "pdf", "svg"]
FIGURE_FORMATS: tuple[FigureFormat, ...] = get_args(FigureFormat)
FigureWidth = Literal["auto", "one", "two"]  # columns of a paper
FIGURE_WIDTHS: tuple[FigureWidth, ...] = get_args(FigureWidth)
Captions = Literal["file", "in", "none"]
CAPTIONS: tuple[Captions, ...] = get_args(Captions)

BestBy = Literal["id", "ood"]  # data sets whose accuracy decides which point of a path is best
BEST_BY: tuple[BestBy, ...] = get_args(BestBy)

# --- fine-tuning --------------------------------------------------------------------------------------

Schedule = Literal["cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Loss = Literal["cross-entropy", "contrastive"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
Mixed = Literal["fp32", "tf32", "bf16", "fp16"]  # precisions of training
MIXED: tuple[Mixed, ...] = get_args(Mixed)
Stored = Literal["float32", "float16"]  # types of the weights in the files
STORED: tuple[Stored, ...] = get_args(Stored)

# --- merging ------------------------------------------------------------------------------------------

Combining = Literal[
    "soup", "greedy-soup", "fisher", "model-stock", "task-arithmetic", "ties", "dare", "dare-ties"
]
MergeMethod = Literal["interpolate", Combining, "slerp", "hold", "prune"]
MERGE_METHODS: dict[MergeMethod, str] = {
    "interpolate": "(1 - alpha) zero-shot + alpha fine-tuned, also by layer",
    "soup": "mean of the fine-tuned models",
    "greedy-soup": "mean of the models that raise its accuracy on held-out data",
    "fisher": "mean weighted by diagonal Fisher information on data",
    "model-stock": "zero-shot + t (mean - zero-shot); t by angles between models",
    "task-arithmetic": "zero-shot + sum of scale_k (fine-tuned_k - zero-shot)",
    "ties": "trimmed differences, elected signs, mean of those that agree",
    "dare": "task-arithmetic with randomly dropped elements, rescaled",
    "dare-ties": "dare's differences with signs elected as in ties",
    "slerp": "spherical interpolation, tensor by tensor",
    "hold": "interpolation with some layers kept at zero-shot",
    "prune": "interpolation after random pruning of layers (Algorithm 1)",
}
Agreeing = Literal["mean", "sum"]  # of the elements that have the elected sign
AGREEING: tuple[Agreeing, ...] = get_args(Agreeing)
MergeNaming = Literal["open_clip", "soup", "huggingface"]  # names that a merged model can be written under
MERGE_NAMINGS: tuple[MergeNaming, ...] = get_args(MergeNaming)
MergeDtype = Literal["float32", "bfloat16", "float16"]
MERGE_DTYPES: tuple[MergeDtype, ...] = get_args(MergeDtype)
