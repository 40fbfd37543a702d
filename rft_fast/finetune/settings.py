"""What a fine-tuned model is trained with: a setting, its name, grids of settings, settings at random."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from rft_fast.names import SCHEDULES, Schedule

AUGMENT = re.compile(r"none|crop|crop-flip|rand-m(?P<m>\d{1,2})-n(?P<n>\d)")
MAGNITUDES = 30  # of RandAugment, as in its paper


@dataclass(frozen=True)
class Setting:
    """How a model is fine-tuned: AdamW, weight decay on what has two dimensions or more.

    lr: the learning rate's peak. epochs: passes over the data. warmup: optimizer steps over which it rises
    linearly, after which ``schedule`` holds. batch_size: images per optimizer step. accumulate: parts that a
    batch is computed in, for memory; the step is the same but for rounding, and for batch norm that is
    trained, whose statistics are then those of the parts. clip: norm that gradients are cut to, None for as
    they are. label_smoothing: in [0, 1). mixup: parameter of the Beta distribution, 0
    for none. augment: ``none`` (the evaluation's transform), ``crop``, ``crop-flip`` or ``rand-mM-nN``
    (:func:`rft_fast.finetune.augmentation`). probe_epochs: of the head alone, first (LP-FT), with the
    learning rate ``probe_lr``. seed: decides order, crops, mixup and dropout.

    Raises TypeError and ValueError for values that are not so.
    """

    lr: float = 2e-5
    epochs: int = 8
    weight_decay: float = 0.1
    label_smoothing: float = 0.0
    mixup: float = 0.0
    augment: str = "crop"
    warmup: int = 500
    seed: int = 0
    batch_size: int = 256
    accumulate: int = 1
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "cosine"
    probe_epochs: int = 0
    probe_lr: float = 1e-3

    def __post_init__(self) -> None:
        whole = {"epochs": 1, "warmup": 0, "seed": 0, "batch_size": 1, "accumulate": 1, "probe_epochs": 0}
        for name, low in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Setting: {name} must be an int, got {value!r}")
            self._check(name, value >= low, f"at least {low}")
        for name in ("lr", "weight_decay", "label_smoothing", "mixup", "probe_lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Setting: {name} must be a number, got {value!r}")
            self._check(name, 0 <= value < math.inf, "finite and not negative")
        self._check("lr", self.lr > 0, "above 0")
        self._check("probe_lr", self.probe_lr > 0, "above 0")
        self._check("label_smoothing", self.label_smoothing < 1, "below 1")
        self._check("clip", self.clip is None or 0 < self.clip < math.inf, "above 0, or None")
        self._check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two in [0, 1)")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("seed", self.seed < 2**32, "below 2**32")
        self._check("accumulate", self.accumulate <= self.batch_size, "at most batch_size")
        found = AUGMENT.fullmatch(self.augment)
        self._check("augment", found is not None, "none, crop, crop-flip or rand-mM-nN such as rand-m9-n2")
        if found is not None and found["m"]:
            self._check("augment", int(found["m"]) <= MAGNITUDES, f"of a magnitude m up to {MAGNITUDES}")

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"Setting: {name} must be {expected}; got {getattr(self, name)!r}")

    @property
    def name(self) -> str:
        """``lr1e-5-ep4``, then what differs from the defaults among the options of a grid."""
        parts = [f"lr{_number(self.lr)}", f"ep{self.epochs}"]
        for option, short in SHORT.items():
            value = getattr(self, option)
            if short is not None and value != _DEFAULTS[option]:
                parts.append(value if option == "augment" else f"{short}{_number(value)}")
        return "-".join(parts)


# What a grid may vary -> how a name calls it; None where the name always has it.
SHORT: dict[str, str | None] = {
    "lr": None,
    "epochs": None,
    "weight_decay": "wd",
    "label_smoothing": "ls",
    "mixup": "mix",
    "augment": "",
    "warmup": "warm",
    "seed": "seed",
}
_DEFAULTS = {field.name: field.default for field in fields(Setting)}


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
    for option, values in choices.items():
        if option not in SHORT:
            raise ValueError(f"finetune: a grid cannot vary {option!r}; it can vary {', '.join(SHORT)}")
        if not len(values):
            raise ValueError(f"finetune: {option} has no values")


def _named(settings: Sequence[Setting]) -> dict[str, Setting]:
    named: dict[str, Setting] = {}
    for setting in settings:
        if setting.name in named:
            raise ValueError(f"finetune: the setting {setting.name} is asked for twice")
        named[setting.name] = setting
    return named


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")  # a name then has the value itself


def _number(value: float) -> str:
    """The shortest text that gives the number back, as people write it: 1e-5, 0.05, 4."""
    if isinstance(value, int):
        return str(value)
    if value == 0 or 0.01 <= value < 1e6:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-", exp_digits=1).replace("+", "")
