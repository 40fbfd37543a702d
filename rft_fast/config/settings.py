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

_OF_THE_ZOO = "it belongs to the zoo's other entries (docs/zoo.md), or to the command line; leave it out"


def _yours(what: str) -> str:
    return f"{what} is for the user's own command to say, and no zoo file; leave it out"


# --- models and data --------------------------------------------------------------------------------------


def _entry(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _by_name(values: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    once([name for name, _ in values])
    return tuple(values)


def _sets(help: str) -> Any:
    return option((), help, metavar="[NAME=]PATH", check=named_path, many="each", paths=True)


def _of_sets(help: str, metavar: str) -> Any:
    return option((), help, metavar=metavar, check=_entry, many="each", whole=_by_name)


@dataclass(frozen=True)
class Models:
    """Models and data that the command line names itself, and what it says of those of a zoo.

    data, id_data, data_kind, data_labels: pairs of a data set's name, and its path, kind or labels.
    """

    GROUP: ClassVar = Group(
        "models and data",
        "the first three and some data, or a zoo, or none for the digits zoo",
        own=_OF_THE_ZOO,
    )

    arch: str | None = option(
        None, "open_clip model name, hf-hub:ORG/NAME, or a JSON file in open_clip's format", metavar="NAME"
    )
    zeroshot: str | None = option(
        None,
        "zero-shot checkpoint: a file, a pretrained tag of open_clip such as openai, or hf-hub:ORG/NAME",
        metavar="SOURCE",
    )
    finetuned: tuple[pathlib.Path, ...] = option(
        (),
        "checkpoints fine-tuned from it",
        metavar="PATH",
        check=pathlib.Path,
        many="each",
        paths=True,
    )
    format: Format | None = option(
        None,
        "format of the fine-tuned checkpoints (default: detected; docs/checkpoints.md)",
        choices=tuple(names.FORMATS),
    )
    key: str | None = option(
        None,
        "which weights of the fine-tuned checkpoints, where a file has several, such as state_dict_ema "
        "(docs/checkpoints.md)",
        metavar="NAME",
    )
    zeroshot_key: str | None = option(
        None, "which weights of the zero-shot checkpoint, where its file has several", metavar="NAME"
    )
    resize_positions: bool = option(
        False, "resample the positions of image towers for another image size to that of --arch"
    )
    unrelated: bool = option(
        False,
        "accept weights that were not fine-tuned from the zero-shot ones (docs/checkpoints.md)",
    )
    data: tuple[tuple[str, pathlib.Path], ...] = _sets(
        "out-of-distribution data: a folder of class folders, or another kind (docs/data.md); without NAME, "
        "the name is that of the folder"
    )
    id_data: tuple[tuple[str, pathlib.Path], ...] = _sets(
        "in-distribution data, shown beside the others; paths on them get no verdict (gain, failure)"
    )
    data_kind: tuple[tuple[str, str], ...] = _of_sets(
        f"format of a data set, where it is not detected: {', '.join(names.KINDS)}", "NAME=KIND"
    )
    data_labels: tuple[tuple[str, str], ...] = _of_sets(
        "which rows of the head a data set's classes are, where their names do not show it: a label map "
        "(docs/data.md), or the word order: class i is row i",
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
        "interpolate the head with the rest (default), or keep that of one end",
        choices=names.HEADS,
    )
    towers: Towers | None = option(
        None,
        "image: a linear head (default); both: text tower, too, prompts encoded again at every alpha",
        choices=names.TOWERS,
    )
    class_names: str | None = option(
        None,
        "names of the head's rows: imagenet, cifar10, cifar100, stl10, or a file with one name a line; "
        "data sets go to rows by them, and a checkpoint without a head gets one from its text tower",
        metavar="LIST",
    )
    templates: str | None = option(
        None,
        "prompts around the names: openai (80, the default), simple (7), photo (1), or a file",
        metavar="LIST",
    )
    head_scale: float | None = option(
        None,
        "factor of a head made of prompts (default: the model's own; 100 in model-soups)",
        metavar="X",
        check=_scale,
    )
    zeroshot_head: pathlib.Path | None = option(
        None, "file with the head of a zero-shot checkpoint", metavar="PATH", check=pathlib.Path
    )


# --- how ----------------------------------------------------------------------------------------------

_DEVICES = re.compile(r"(cpu|cuda|xpu|mps|mtia|hpu|xla|maia|meta|privateuseone)(:\d+)?")


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


_WHO = _yours("who computes, and with how much")


@dataclass(frozen=True)
class Computed:
    """What computes, which decides the last bits of numbers.

    memory_limit: in bytes. device: None: a GPU where there is one.
    """

    GROUP: ClassVar = Group("how it is computed", place=("settings", "computed"))

    impl: Impl = option(
        "auto",
        "kernels that write the weights (default: auto, the fastest that works)",
        choices=names.IMPLS,
    )
    batch_size: int | None = option(
        None,
        "images per forward pass (default: 512, on the CPU 128 or, for small sets, 64; fewer where memory "
        "asks for it)",
        metavar="N",
        check=positive,
    )
    precision: Precision = option(
        "fp32",
        "number format of weights and activations of the live model (default: fp32; ieee is fp32 with "
        "attention by plain float32 products, where a GPU's own kernel takes three TF32 products for one; "
        "docs/speed.md has what the others cost in accuracy: bf16 and fp16 spoil sharpness near zero)",
        choices=names.PRECISIONS,
    )
    graphs: bool = option(True, "on a GPU, do not record launches as CUDA graphs")
    skip_unreadable: bool = option(
        False, "leave out images that cannot be read, and count them in the rows, rather than refuse"
    )
    device: str | None = option(
        None,
        "cpu, cuda, cuda:1, ... (default: cuda where there is one)",
        metavar="NAME",
        check=device,
        own=_WHO,
    )
    memory_limit: int | None = option(
        None,
        "memory for images, held activations and batches (default: of what is free, 80 %% on a GPU, half "
        "on the CPU)",
        metavar="GIB",
        check=_gibibytes,
        own=_WHO,
    )
    compile: bool = option(
        False, "run the model through torch.compile: minutes of compilation first", own=_WHO
    )


@dataclass(frozen=True)
class Running:
    """How a run goes, which decides no number."""

    GROUP: ClassVar = Group("how it runs", place=("run",))

    out: pathlib.Path | None = option(
        None,
        "directory for rows and figures; the same command resumes the run in it (default: a new one in "
        "rft-runs/)",
        metavar="DIR",
        check=pathlib.Path,
        own=_yours("where results are written"),
    )
    overwrite: bool = option(
        False,
        "replace the run in DIR instead of resuming it",
        own=_yours("where results are written"),
    )
    cache: pathlib.Path | None = option(
        None,
        "where decoded images are kept (default: $RFT_CACHE, else rft_fast in the user's cache directory)",
        metavar="DIR",
        check=pathlib.Path,
        off="decode images anew, keep nothing",
        own=_yours("which files are kept where"),
    )
    image_results: bool = option(
        True,
        "do not keep the results of single images, which intervals and comparisons need (docs/results.md)",
        own=_yours("what is kept of a run"),
    )
    save_best: bool = option(
        False,
        "write the best point of each model's path to best/ in DIR, as a checkpoint (docs/merge.md)",
        own=_yours("where results are written"),
    )
    best_by: BestBy = option(
        "id",
        "what decides which point is best: mean accuracy in distribution (id, the default), or out of it, "
        "which makes that accuracy no estimate of others",
        choices=names.BEST_BY,
        own=_yours("where results are written"),
    )
    workers: str | None = option(
        None,
        "measure on several GPUs or machines with Ray (docs/cluster.md): a number, auto for one per GPU "
        "(or 8 cores) of this machine, or ray://HOST:PORT of a cluster",
        metavar="N",
        check=_workers,
        own=_WHO,
    )
    fetch: bool = option(
        False,
        "download what a zoo file names and this machine does not have (hf-hub:..., published weights, "
        "tokenizers); what the command line names is downloaded without it, except with --plan",
        own=_yours("what is downloaded"),
    )
    quiet: bool = option(False, "print only errors; run.log has everything", own=_yours("what is printed"))
    json: bool = option(
        False,
        "JSON lines on standard output, for machines (docs/progress.md)",
        own=_yours("what is printed"),
    )
    track: tuple[TrackerName, ...] = option(
        (),
        "also send measurements to these trackers, through their own clients",
        choices=names.TRACKERS,
        many="once",
        whole=different,
        own=_yours("to whom results are sent"),
    )
    plan: bool = option(
        False,
        "measure nothing; print forward passes, FLOPs, bytes, estimated time and memory of this request",
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
        "width of one (3.4 inches) or two columns (7 inches) of a paper; auto (default): as the panels need",
        name="figure-width",
        choices=names.FIGURE_WIDTHS,
    )
    captions: Captions = option(
        "file",
        "captions in text files beside the figures (file, the default), in the figures, or none",
        choices=names.CAPTIONS,
    )
    style: pathlib.Path | None = option(
        None,
        "style file of matplotlib: fonts, sizes, colours, lines; nothing in it is executed",
        metavar="FILE",
        check=pathlib.Path,
        paths=True,
    )


def builder() -> Builder:
    """The options of ``python -m rft_fast.sweep``, those of single studies of the catalogue among them."""
    own = different([study.options for study in catalogue.studies() if study.options is not None])
    return Builder((Models, Head, Along, Layers, Sharpness, Prune, *own, Computed, Running, Figures))
