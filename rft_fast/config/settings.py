"""What a sweep is about and how it runs, beside the settings of its studies (:mod:`rft_fast.settings`)."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import catalogue, names
from ..common.fields import Group, named_path, option
from ..common.numeric import above_zero, as_float, positive
from ..names import (
    BestBy,
    Captions,
    FigureFormat,
    FigureWidth,
    Format,
    HeadChoice,
    Impl,
    Precision,
    Towers,
    TrackerName,
)
from ..settings import Along, Layers, Prune, Sharpness, different, once
from .builder import Builder

_OF_THE_ZOO = "other entries of the zoo set it (docs/zoo.md), or the command line; leave it out"


def _yours(what: str) -> str:
    return f"only the command line may set {what}; leave it out"


# --- models and data --------------------------------------------------------------------------------------


def _entry(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _by_name(values: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    once([name for name, _ in values])
    return tuple(values)


def _sets(help: str, common: str) -> Any:
    return option((), help, common=common, metavar="NAME=PATH", check=named_path, many="each", paths=True)


def _of_sets(help: str, metavar: str) -> Any:
    return option((), help, metavar=metavar, check=_entry, many="each", whole=_by_name)


@dataclass(frozen=True)
class Models:
    """Models and data that the command line names itself, and what it says of those of a zoo.

    data, id_data, data_kind, data_labels: pairs of a data set's name, and its path, kind or labels.
    """

    GROUP: ClassVar = Group(
        "models and data",
        "your own models need --arch, --zeroshot, --finetuned and data; a zoo names them itself",
        own=_OF_THE_ZOO,
    )

    arch: str | None = option(
        None,
        "open_clip model name, hf-hub:ORG/NAME, or a JSON file in open_clip's format",
        common="open_clip model name",
        metavar="NAME",
    )
    zeroshot: str | None = option(
        None,
        "zero-shot checkpoint: a file, a pretrained tag of open_clip such as openai, or hf-hub:ORG/NAME",
        common="zero-shot checkpoint: a file, or openai, ...",
        metavar="SOURCE",
    )
    finetuned: tuple[pathlib.Path, ...] = option(
        (),
        "checkpoints fine-tuned from it",
        common="checkpoints fine-tuned from it",
        metavar="PATH",
        check=pathlib.Path,
        many="each",
        paths=True,
    )
    format: Format | None = option(
        None,
        f"format of the fine-tuned checkpoints (default: detected): {', '.join(names.FORMATS)} "
        "(docs/checkpoints.md)",
        metavar="FORMAT",
        choices=tuple(names.FORMATS),
    )
    key: str | None = option(
        None,
        "which weights to use if a fine-tuned checkpoint has several, such as state_dict_ema "
        "(docs/checkpoints.md)",
        metavar="NAME",
    )
    zeroshot_key: str | None = option(
        None, "which weights to use if the zero-shot checkpoint has several", metavar="NAME"
    )
    resize_positions: bool = option(
        False, "resample the position embeddings of image towers trained at another size to that of --arch"
    )
    unrelated: bool = option(
        False,
        "accept checkpoints that were not fine-tuned from the zero-shot one (docs/checkpoints.md)",
    )
    data: tuple[tuple[str, pathlib.Path], ...] = _sets(
        "out-of-distribution data: a folder of class folders, or another kind (docs/data.md); without "
        "NAME=, the folder's name",
        "out-of-distribution data: folders of class folders",
    )
    id_data: tuple[tuple[str, pathlib.Path], ...] = _sets(
        "in-distribution data, shown for comparison, without verdicts (gain, failure)",
        "in-distribution data, for comparison",
    )
    data_kind: tuple[tuple[str, str], ...] = _of_sets(
        f"format of a data set, if it is not detected: {', '.join(names.KINDS)}", "NAME=KIND"
    )
    data_labels: tuple[tuple[str, str], ...] = _of_sets(
        "label map from the classes of a data set to rows of the head, if names do not match (docs/data.md); "
        "or the word order: class i is row i",
        "NAME=FILE",
    )


def _scale(text: str) -> float:
    value = as_float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"expected a positive number, got {text!r}")
    return value


@dataclass(frozen=True)
class Head:
    """What the command line says of the models' head (:class:`rft_fast.config.zoo.Head`); None: nothing."""

    GROUP: ClassVar = Group("head (docs/endpoints.md)", own=_OF_THE_ZOO)

    head: HeadChoice | None = option(
        None,
        "interpolate the head with the rest (default), or keep the head of one end",
        choices=names.HEADS,
    )
    towers: Towers | None = option(
        None,
        "image: a linear head (default); both: the text tower as well, with prompts encoded again at every "
        "alpha",
        choices=names.TOWERS,
    )
    class_names: str | None = option(
        None,
        "class names of the head's rows: imagenet, cifar10, cifar100, stl10, or a file with one per line; a "
        "checkpoint without a head gets one made from them",
        common="imagenet, cifar10, ..., or a file of class names",
        metavar="LIST",
    )
    templates: str | None = option(
        None,
        "prompt templates for the class names: openai (80, the default), simple (7), photo (1), or a file",
        metavar="LIST",
    )
    head_scale: float | None = option(
        None,
        "logit scale of a head made from prompts (default: the model's own; model-soups uses 100)",
        metavar="X",
        check=_scale,
    )
    zeroshot_head: pathlib.Path | None = option(
        None, "file with the head of a zero-shot checkpoint", metavar="PATH", check=pathlib.Path
    )


# --- how ----------------------------------------------------------------------------------------------

_DEVICES = re.compile(r"(cpu|cuda|xpu|mps|mtia|hpu|xla|maia|privateuseone)(:\d+)?")


def device(text: str) -> str:
    """The name of a device that torch may know. Raises ValueError."""
    if not _DEVICES.fullmatch(text):
        raise ValueError(f"{text!r} cannot be used: expected cpu, cuda, cuda:1, ...")
    return text


def _gibibytes(text: str) -> int:
    return int(above_zero(text) * 2**30)


def _workers(text: str) -> str:
    address = text.startswith("ray://") or re.fullmatch(r"[^:/\s]+:\d+", text)
    if text != "auto" and not address and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"expected a number of workers, auto, or ray://HOST:PORT, got {text!r}")
    return text


_WHO = _yours("where and with how much memory to compute")


@dataclass(frozen=True)
class Computed:
    """What computes, which decides the last bits of numbers.

    memory_limit: in bytes. device: None: a GPU where there is one.
    """

    GROUP: ClassVar = Group("how it is computed", place=("settings", "computed"))

    impl: Impl = option(
        "auto",
        "kernels that write the weights (default: auto, the fastest that works here)",
        choices=names.IMPLS,
    )
    batch_size: int | None = option(
        None,
        "images per forward pass (default: 512 on a GPU; 128 on the CPU, 64 for small data sets; fewer if "
        "memory is short)",
        metavar="N",
        check=positive,
    )
    precision: Precision = option(
        "fp32",
        "number format of weights and activations (default: fp32). ieee: fp32, with attention in plain "
        "float32 products instead of a GPU kernel's three TF32 products. bf16x3: fp32, with each product of "
        "weights as three of bfloat16, for GPUs. docs/speed.md has the errors; bf16 and fp16 are too coarse "
        "for sharpness near zero",
        choices=names.PRECISIONS,
    )
    graphs: bool = option(True, "do not record kernel launches as CUDA graphs")
    skip_unreadable: bool = option(
        False, "leave out unreadable images, and count them in the rows, instead of refusing the data set"
    )
    device: str | None = option(
        None,
        "cpu, cuda, cuda:1, ... (default: cuda if there is one)",
        common="cpu, cuda, cuda:1, ... (default: cuda, else cpu)",
        metavar="NAME",
        check=device,
        own=_WHO,
    )
    memory_limit: int | None = option(
        None,
        "memory for images, kept activations and batches (default: 80 %% of the free memory on a GPU, 50 %% "
        "on the CPU)",
        metavar="GIB",
        check=_gibibytes,
        own=_WHO,
    )
    compile: bool = option(
        False, "compile the model with torch.compile, which takes minutes at first", own=_WHO
    )
    despite_rounding: bool = option(
        False, "measure what bf16x3 is too coarse for", compared=False, own=_yours("what is refused")
    )


@dataclass(frozen=True)
class Running:
    """How a run goes, which decides no number."""

    GROUP: ClassVar = Group("how it runs", place=("run",))

    out: pathlib.Path | None = option(
        None,
        "directory of the run (default: a new one in rft-runs/); the same command resumes the run in it",
        common="directory of the run, to write or to resume",
        metavar="DIR",
        check=pathlib.Path,
        own=_yours("where results are written"),
    )
    overwrite: bool = option(
        False,
        "replace the run in --out instead of resuming it",
        own=_yours("where results are written"),
    )
    cache: pathlib.Path | None = option(
        None,
        "directory of decoded images (default: $RFT_CACHE, else rft_fast in the user's cache directory)",
        metavar="DIR",
        check=pathlib.Path,
        off="decode images again, and keep none",
        own=_yours("which files are kept where"),
    )
    image_results: bool = option(
        True,
        "do not keep the results of single images; intervals and comparisons need them (docs/results.md)",
        own=_yours("what a run keeps"),
    )
    save_best: bool = option(
        False,
        "write each model at its best alpha as a checkpoint, to best/ in --out (docs/merge.md)",
        own=_yours("where results are written"),
    )
    best_by: BestBy = option(
        "id",
        "data that decide which alpha is best: in-distribution (id, the default), or ood; the accuracy on "
        "the data that decide is biased upwards",
        choices=names.BEST_BY,
        own=_yours("where results are written"),
    )
    workers: str | None = option(
        None,
        "measure on several GPUs or machines with Ray: a number; auto: one worker per GPU (or per 8 cores) "
        "here; ray://HOST:PORT: a cluster (docs/cluster.md)",
        common="measure on N GPUs, or on ray://HOST:PORT",
        metavar="N",
        check=_workers,
        own=_WHO,
    )
    fetch: bool = option(
        False,
        "download what a zoo file names and is not on this machine (hf-hub:..., published weights, "
        "tokenizers); needed with --plan, too, for what the command line names",
        own=_yours("what is downloaded"),
    )
    quiet: bool = option(False, "print only errors; run.log has all messages", own=_yours("what is printed"))
    json: bool = option(
        False,
        "print JSON lines instead of text, for programs (docs/progress.md)",
        own=_yours("what is printed"),
    )
    track: tuple[TrackerName, ...] = option(
        (),
        "also send measurements to these trackers",
        choices=names.TRACKERS,
        many="once",
        whole=different,
        own=_yours("where results are sent"),
    )
    plan: bool = option(
        False,
        "measure nothing; print the estimated time, memory and computation",
        common="only print the estimated time and memory",
        own=_yours("whether anything is measured"),
    )


def _formats(text: str) -> list[FigureFormat]:
    found = [name for name in names.FIGURE_FORMATS for word in text.split(",") if word == name]
    if len(found) < text.count(",") + 1:
        raise ValueError(f"expected some of {', '.join(names.FIGURE_FORMATS)}, got {text!r}")
    return sorted(found, key=text.index)


@dataclass(frozen=True)
class Figures:
    """How figures are presented, which changes no number.

    Attributes:
        formats: file formats, each of which every figure is written in.
        width: ``"auto"``: as wide as the panels need; or columns of a paper, ``"one"`` or ``"two"``.
        captions: ``"file"``: text file beside each figure; ``"in"``: above its panels; ``"none"``.
        style: style file of matplotlib; None: ours.
    """

    GROUP: ClassVar = Group(
        "figures (docs/figures.md)", place=("run", "figures"), own=_yours("how figures are presented")
    )

    formats: tuple[FigureFormat, ...] = option(
        ("png",),
        "png (default), pdf, svg, or several of them",
        name="figure-format",
        metavar="FORMAT",
        check=_formats,
        many="once",
        whole=different,
    )
    width: FigureWidth = option(
        "auto",
        "one (3.4 inches) or two (7 inches) columns of a paper; auto (default): as wide as the panels need",
        name="figure-width",
        choices=names.FIGURE_WIDTHS,
    )
    captions: Captions = option(
        "file",
        "captions: in text files beside the figures (file, the default), in the figures (in), or none",
        choices=names.CAPTIONS,
    )
    style: pathlib.Path | None = option(
        None,
        "matplotlib style file: fonts, sizes, colours, lines; nothing in it is executed",
        metavar="FILE",
        check=pathlib.Path,
        paths=True,
    )


def builder() -> Builder:
    """The options of ``python -m rft_fast.sweep``, those of single studies of the catalogue among them."""
    own = different([study.options for study in catalogue.studies() if study.options is not None])
    return Builder((Models, Head, Along, Layers, Sharpness, Prune, *own, Computed, Running, Figures))
