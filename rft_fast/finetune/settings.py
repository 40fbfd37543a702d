"""What is fine-tuned on what, and how: a request, a setting, grids of settings, settings at random."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from rft_fast import names
from rft_fast.common.fields import Group, described, entries, named_path, option
from rft_fast.names import SCHEDULES, Kind, Loss, Mixed, Names, Schedule, Stored, as_given

AUGMENT = re.compile(r"none|crop|crop-flip|rand-m(?P<m>\d{1,2})-n(?P<n>\d)")
MAGNITUDES = 30  # of RandAugment, as in its paper
TEMPLATES = "openai"  # of prompts, where none are given
MOST_WARMUP = 500  # steps of warm-up where none are given: model-soups' number


DATA = Group("model and data")
HEAD = Group(
    "classes of the head",
    "the classes of data sets are matched with these names; a checkpoint without a head gets one made from "
    "the names in the templates",
)
GRID = Group("grid: one model for every combination of these values")
RUNNING = Group("how it runs")


def _varied(default: Any, short: str | None, help: str, check: type, **how: Any) -> Any:
    """An option that a grid may vary. short: how names of models call it; None where they always have it."""
    if default is not None:
        help += " (default: %(default)s)"
    how |= {"metavar": "X", "check": check, "group": GRID, "more": {"short": short}}
    return option(default, help, many="last", whole=list, **how)


@dataclass(frozen=True)
class Setting:
    """How a model is fine-tuned: AdamW, weight decay on what has two dimensions or more.

    lr: the learning rate's peak. epochs: passes over the data. warmup: optimizer steps over which it rises
    linearly, after which ``schedule`` holds; None: :meth:`warmup_of`. batch_size: images per optimizer step.
    accumulate: parts that a batch is computed in, for memory; the step is the same but for rounding, and for
    batch norm that is trained, whose statistics are then those of the parts. clip: norm that gradients are
    cut to, None for as they are. label_smoothing: in [0, 1). mixup: parameter of the Beta distribution, 0
    for none. augment: ``none`` (the evaluation's transform), ``crop``, ``crop-flip`` or ``rand-mM-nN``
    (:func:`rft_fast.finetune.augmentation`). probe_epochs: of the head alone, first (LP-FT), with the
    learning rate ``probe_lr``. seed: decides order, crops, mixup and dropout.

    Raises TypeError and ValueError for values that are not so.
    """

    GROUP: ClassVar = Group("training")

    lr: float = _varied(2e-5, None, "peak learning rate", float, common="peak learning rate (default: 2e-05)")
    epochs: int = _varied(
        8, None, "passes over the training data", int, common="passes over the training data (default: 8)"
    )
    weight_decay: float = _varied(0.1, "wd", "weight decay of AdamW, on matrices only", float)
    label_smoothing: float = _varied(0.0, "ls", "probability spread over all classes", float)
    mixup: float = _varied(0.0, "mix", "parameter of mixup's Beta distribution; 0: no mixup", float)
    augment: str = _varied(
        "crop", "", "none (as for evaluation), crop, crop-flip, or rand-mM-nN (RandAugment)", str
    )
    warmup: int | None = _varied(
        None,
        "warm",
        f"steps of linear warm-up (default: a tenth of all steps, at most {MOST_WARMUP})",
        int,
        name="warm-up",
    )
    seed: int = _varied(
        0,
        "seed",
        "seed of the order of images, crops and dropout",
        int,
        common="seed of order, crops and dropout (default: 0)",
    )
    batch_size: int = option(
        256,
        "images per step (default: %(default)s)",
        common="images per step (default: 256)",
        metavar="N",
        check=int,
    )
    accumulate: int = option(
        1,
        "compute each batch in N parts (default: %(default)s): less memory, the same step except for trained "
        "batch norm",
        metavar="N",
        check=int,
    )
    clip: float | None = option(
        1.0,
        "norm to which gradients are clipped (default: %(default)s)",
        metavar="X",
        check=float,
        off="do not clip gradients",
    )
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = option(
        "cosine", "learning rate after the warm-up (default: %(default)s)", choices=SCHEDULES
    )
    probe_epochs: int = option(
        0,
        "epochs of the head alone before all else, on features computed once: LP-FT (default: %(default)s)",
        metavar="N",
        check=int,
    )
    probe_lr: float = option(
        1e-3, "learning rate of --probe-epochs (default: %(default)s)", metavar="X", check=float
    )

    def __post_init__(self) -> None:
        whole = {"epochs": 1, "warmup": 0, "seed": 0, "batch_size": 1, "accumulate": 1, "probe_epochs": 0}
        for name, low in whole.items():
            value = getattr(self, name)
            if value is None and name == "warmup":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Setting: {name} must be an int, got {value!r}")
            self._check(name, value >= low, f"at least {low}")
        for name in ("lr", "weight_decay", "label_smoothing", "mixup", "probe_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Setting: {name} must be a number, got {value!r}")
            if name.endswith("lr"):
                self._check(name, 0 < value < math.inf, "a finite number above 0")
            self._check(name, 0 <= value < math.inf, "a finite number of at least 0")
        self._check("label_smoothing", self.label_smoothing < 1, "below 1")
        self._check("clip", self.clip is None or 0 < self.clip < math.inf, "a finite number above 0, or None")
        fine = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._check("betas", fine, "two numbers of at least 0 and below 1")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("seed", self.seed < 2**32, "below 2**32")
        self._check("accumulate", self.accumulate <= self.batch_size, "at most batch_size")
        found = AUGMENT.fullmatch(self.augment)
        self._check("augment", found is not None, "none, crop, crop-flip or rand-mM-nN such as rand-m9-n2")
        if found is not None and found["m"]:
            magnitude = f"rand-mM-nN with a magnitude M of at most {MAGNITUDES}"
            self._check("augment", int(found["m"]) <= MAGNITUDES, magnitude)

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"Setting: {name} must be {expected}; got {getattr(self, name)!r}")

    def warmup_of(self, steps: int) -> int:
        """Return the steps of warm-up in a training of so many steps: as given, or a tenth, at most 500."""
        return min(MOST_WARMUP, steps // 10) if self.warmup is None else self.warmup

    @property
    def name(self) -> str:
        """``lr1e-5-ep4``, then what differs from the defaults among the options of a grid."""
        parts = [f"lr{compact(self.lr)}", f"ep{self.epochs}"]
        for name, short in SHORT.items():
            value = getattr(self, name)
            if short is not None and value != _DEFAULTS[name]:
                parts.append(value if name == "augment" else f"{short}{compact(value)}")
        return "-".join(parts)


# What a grid may vary -> how a name calls it; None where the name always has it.
SHORT: dict[str, str | None] = {
    entry.field: entry.option.more["short"] for entry in entries(Setting) if entry.group is GRID
}
_DEFAULTS = {field.name: field.default for field in fields(Setting)}


def _by_name(paths: Sequence[tuple[str, pathlib.Path]]) -> dict[str, pathlib.Path]:
    if len(found := dict(paths)) < len(paths):
        raise ValueError("two data sets have the same name; give each one of its own: NAME=PATH")
    return found


def _sets(help: str, common: str) -> dict[Any, Any]:
    how = {"check": named_path, "many": "each", "whole": _by_name, "paths": True}
    return described(help, common=common, metavar="NAME=PATH", **how)


@dataclass(frozen=True)
class Request:
    """What is fine-tuned on what, and where it goes.

    Args:
        arch: architecture: a model name of open_clip, a JSON file, or ``hf-hub:org/name``.
        zeroshot: checkpoint of it: a file, a pretrained tag, or ``hf-hub:org/name``.
        zeroshot_key: which weights of its file, if it has several (:func:`rft_fast.checkpoints.read`).
        train: images that are trained on (:func:`rft_fast.datasets.open_source`).
        out: the directory of the zoo.
        settings: name -> setting.
        val: data sets scored after every epoch; in distribution in the zoo.
        ood: data sets that are only named in the zoo, as out of distribution.
        kind: format of ``train``.
        label_map: rows of the head for the classes of ``train``, ``val`` and those sets of ``ood`` with the
            same classes; the others must show their rows by their names (:func:`rft_fast.datasets.assign`).
            ``"order"``: class i of ``train``, and of sets that do not show their rows, is row i.
        class_names: names of the head's rows (:mod:`rft_fast.clip.prompts`). Classes with these names go to
            those rows. A checkpoint without a head gets one from them, ``templates`` and ``head_scale``.
        loss: ``cross-entropy`` of image tower and head; ``contrastive``: of both towers and the logit scale,
            on pairs of an image and a prompt of its class (FLYP); needs ``class_names``.
        freeze, freeze_blocks: what is not trained (:func:`rft_fast.finetune.freeze`).
        precision, checkpointing: of training.
        store: ``float32`` or ``float16``, of the files.
        keep_every: optimizer steps between two states from which training can resume.
        check_images: whether every image is opened first.
    """

    GROUP: ClassVar = DATA

    arch: str = field(
        metadata=described(
            "open_clip model name, hf-hub:ORG/NAME, or a JSON file in open_clip's format",
            common="open_clip model name",
            metavar="NAME",
        )
    )
    zeroshot: str = field(
        metadata=described(
            "checkpoint to start from: a file, a pretrained tag of open_clip, or hf-hub:ORG/NAME",
            common="checkpoint to start from: a file, or openai, ...",
            metavar="SOURCE",
        )
    )
    train: pathlib.Path = field(
        metadata=described("training images", common="training images", metavar="PATH", check=pathlib.Path)
    )
    out: pathlib.Path = field(
        metadata=described(
            "directory of the zoo; the same command resumes in it",
            common="directory of the zoo, to write or to resume",
            metavar="DIR",
            check=pathlib.Path,
        )
    )
    settings: Mapping[str, Setting]
    val: Mapping[str, pathlib.Path] = field(
        default_factory=dict,
        metadata=_sets(
            "in-distribution data, evaluated after every epoch", "in-distribution data, evaluated every epoch"
        ),
    )
    ood: Mapping[str, pathlib.Path] = field(
        default_factory=dict,
        metadata=_sets(
            "out-of-distribution data: written to the zoo for the sweep, not opened",
            "out-of-distribution data, only noted for the sweep",
        ),
    )
    zeroshot_key: str | None = option(
        None,
        "which weights of the file --zeroshot, if it has several, such as state_dict_ema",
        metavar="NAME",
    )
    kind: Kind | None = option(
        None,
        f"format of --train (default: detected): {', '.join(sorted(names.KINDS))}",
        metavar="KIND",
        choices=tuple(sorted(names.KINDS)),
    )
    label_map: pathlib.Path | str | None = option(
        None,
        "label map from the classes of --train, --val and --ood to rows of the head, if names do not match; "
        "or the word order: class i is row i",
        metavar="FILE",
        check=as_given,
    )
    class_names: str | None = option(
        None,
        "class names of the head's rows: imagenet, cifar10, ..., or a file with one per line",
        common="imagenet, cifar10, ..., or a file of class names",
        metavar="LIST",
        group=HEAD,
    )
    templates: str | None = option(
        None, "prompt templates: openai (default), simple, photo, or a file", metavar="LIST", group=HEAD
    )
    head_scale: float | None = option(
        None,
        "logit scale of the head (default: the model's own; model-soups uses 100)",
        metavar="X",
        check=float,
        group=HEAD,
    )
    loss: Loss = option(
        "cross-entropy",
        "cross-entropy (default): of the head's logits; contrastive: of both towers, on pairs of image and "
        "prompt, as in FLYP",
        choices=names.LOSSES,
        group=Setting.GROUP,
    )
    freeze: Names = option(
        (),
        "do not train these parameters; each REGEX matches whole names",
        metavar="REGEX",
        many="last",
        group=Setting.GROUP,
    )
    freeze_blocks: int = option(
        0,
        "do not train the first N blocks and the layers before them (default: %(default)s)",
        metavar="N",
        check=int,
        group=Setting.GROUP,
    )
    precision: Mixed = option(
        "fp32",
        "precision of training: fp32 (default), tf32; bf16 or fp16: mixed precision",
        common="fp32 (default), tf32, or mixed: bf16, fp16",
        metavar="NAME",
        choices=names.MIXED,
        group=Setting.GROUP,
    )
    checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, more time",
        name="grad-checkpointing",
        group=Setting.GROUP,
    )
    store: Stored = option(
        "float32",
        "type of the weights in the files (default: %(default)s)",
        name="dtype",
        choices=names.STORED,
        group=RUNNING,
    )
    device: str | None = option(
        None,
        "cpu, cuda, cuda:1, ... (default: cuda if there is one)",
        common="cpu, cuda, cuda:1, ... (default: cuda, else cpu)",
        metavar="NAME",
        group=RUNNING,
    )
    workers: int | None = option(
        None, "threads that decode images (default: all cores)", metavar="N", check=int, group=RUNNING
    )
    in_memory: bool = option(False, "decode all training images into memory, once", group=RUNNING)
    check_images: bool = option(
        True, "do not open every training image before the first step", name="no-check", group=RUNNING
    )
    keep_every: int | None = option(
        500,
        "steps between saved states, from which a killed run resumes (default: %(default)s; also one per "
        "epoch)",
        metavar="N",
        check=int,
        group=RUNNING,
    )
    cache: pathlib.Path | None = option(
        None,
        "directory of the decoded images of --val (default: $RFT_CACHE, else rft_fast in the user's cache "
        "directory)",
        metavar="DIR",
        check=pathlib.Path,
        off="decode them again, and keep none",
        group=RUNNING,
    )


@dataclass(frozen=True)
class Invocation:
    """What the command line alone has. random: number of settings; None: a grid."""

    GROUP: ClassVar = GRID

    random: int | None = option(
        None,
        "train N random settings instead of a grid: from the given values; for other options, from the "
        "ranges of the model-soups models",
        metavar="N",
        check=int,
    )
    search_seed: int = option(0, "seed of --random (default: 0)", metavar="N", check=int)
    dry_run: bool = option(
        False,
        "only list the models that would be trained",
        common="only list the models that would be trained",
    )
    deterministic: bool = option(
        False, "use only GPU kernels whose results never vary between runs", group=Setting.GROUP
    )


def grid(choices: Mapping[str, Sequence[Any]], **fixed: Any) -> dict[str, Setting]:
    """The product of the choices, in their order, the last one fastest: name -> setting.

    choices: option of ``SHORT`` -> its values. fixed: the other fields of a setting.
    Raises ValueError for unknown options, no values, and the same setting twice.
    """
    _known(choices)
    products = itertools.product(*choices.values())
    return _named([Setting(**dict(zip(choices, values, strict=True)), **fixed) for values in products])


def at_random(
    count: int, choices: Mapping[str, Sequence[Any]], search_seed: int = 0, **fixed: Any
) -> dict[str, Setting]:
    """Settings drawn at random: name -> setting, the first ``n`` of which do not depend on ``count``.

    An option in ``choices`` is drawn from its values; one that is not there, from the ranges that the
    published settings of model-soups span (its ``hparam_info.json``): lr log-uniform in 1e-6 to 1e-4, weight
    decay in 10**-4.2 to 10**-.2, epochs 4 to 16, label smoothing and mixup 0 or, half of the time, uniform up
    to .25 and .9, augmentation ``crop`` or, half of the time, RandAugment of m 1 to 20 and n 0 to 2. Warm-up
    stays the default. The seed is the draw's number, counted from 0.
    """
    _known(choices)
    if count < 1:
        raise ValueError(f"finetune: at least one random setting must be drawn, got {count}")
    if search_seed < 0:
        raise ValueError(f"finetune: the seed of the search must not be negative, got {search_seed}")
    drawn = []
    for number in range(count):
        rng = np.random.default_rng([search_seed, number])
        values: dict[str, Any] = {
            "lr": _rounded(10 ** -rng.uniform(4, 6)),
            "epochs": int(rng.integers(4, 17)),
            "weight_decay": _rounded(10 ** -rng.uniform(0.2, 4.2)),
            "label_smoothing": _rounded(rng.uniform(0, 0.25)) * int(rng.integers(2)),
            "mixup": _rounded(rng.uniform(0, 0.9)) * int(rng.integers(2)),
            "augment": ("crop", f"rand-m{rng.integers(1, 21)}-n{rng.integers(3)}")[rng.integers(2)],
            "seed": number,
        }
        values |= {option: some[int(rng.integers(len(some)))] for option, some in choices.items()}
        drawn.append(Setting(**values, **fixed))
    return _named(drawn)


def as_json(setting: Setting) -> dict[str, Any]:
    """The setting as JSON gives it back: lists for tuples."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(setting)))
    return content


def _known(choices: Mapping[str, Sequence[Any]]) -> None:
    for name, values in choices.items():
        if name not in SHORT:
            raise ValueError(f"finetune: a grid cannot vary {name!r}; it can vary {', '.join(SHORT)}")
        if not len(values):
            raise ValueError(f"finetune: {name} has no values")


def _named(settings: Sequence[Setting]) -> dict[str, Setting]:
    named: dict[str, Setting] = {}
    for setting in settings:
        if setting.name in named:
            raise ValueError(f"finetune: the setting {setting.name} occurs twice")
        named[setting.name] = setting
    return named


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")  # a name then has the value itself


def compact(value: float) -> str:
    """The shortest text that gives the number back, as people write it: 1e-5, 0.05, 4."""
    if isinstance(value, int):
        return str(value)
    if value == 0 or 0.01 <= value < 1e6:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-", exp_digits=1).replace("+", "")
