"""What is merged, how, and where it goes: the request, which is also the command line's options."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar

from rft_fast.common.fields import Group, described, option
from rft_fast.common.words import suggestion
from rft_fast.names import (
    AGREEING,
    FILL,
    MERGE_DTYPES,
    MERGE_METHODS,
    MERGE_NAMINGS,
    Agreeing,
    Fill,
    MergeDtype,
    MergeMethod,
    MergeNaming,
)
from rft_fast.path.coefficients import read_table

MODELS = Group("models")
METHOD = Group("method", "options that METHOD does not use are refused")
OUTPUT = Group("result")

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

# Method -> its own options, by field.
USED: dict[MergeMethod, frozenset[str]] = {
    "interpolate": frozenset({"alpha", "alpha_table", "lines"}),
    "soup": frozenset(),
    "greedy-soup": frozenset(),
    "fisher": frozenset(),
    "model-stock": frozenset(),
    "task-arithmetic": frozenset({"scale"}),
    "ties": frozenset({"scale", "density", "agreeing"}),
    "dare": frozenset({"scale", "drop", "seed"}),
    "dare-ties": frozenset({"scale", "drop", "seed", "agreeing"}),
    "slerp": frozenset({"alpha", "alpha_table", "least_angle"}),
    "hold": frozenset({"alpha", "layers"}),
    "prune": frozenset({"alpha", "layers", "keep", "fill", "seed"}),
}
# Methods of exactly two models: the zero-shot one and a fine-tuned one.
PAIRS = frozenset[MergeMethod]({"interpolate", "slerp", "hold", "prune"})
# Methods without a zero-shot model.
BASELESS = frozenset[MergeMethod]({"soup", "greedy-soup", "fisher"})
# Methods that measure models on data.
MEASURING = frozenset[MergeMethod]({"greedy-soup", "fisher"})
# Methods that add differences to the zero-shot model, and so take files that are differences.
VECTORS = frozenset[MergeMethod]({"task-arithmetic", "ties", "dare", "dare-ties"})
# Methods of two fine-tuned models or more.
SEVERAL = frozenset[MergeMethod]({"soup", "greedy-soup", "fisher", "model-stock"})
# Methods whose scale is a factor of the merged difference.
ONE_SCALE = frozenset[MergeMethod]({"ties", "dare-ties"})


def position(text: str) -> float | tuple[str, float]:
    """A check: ``0.4``, or ``PATTERN=0.4``."""
    pattern, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (equals and not pattern):
        raise ValueError(f"expected a finite number, or PATTERN=NUMBER with one; got {text!r}")
    return (pattern, value) if equals else value


def _table(text: str) -> tuple[float | tuple[str, float], ...]:
    """A check: a file of alphas, as ``alpha`` has them."""
    return tuple(value if name is None else (name, value) for name, value in read_table(text))


def finite(text: str) -> float:
    """A check: a finite number."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"expected a finite number, got {text}")
    return value


def _in_float32(value: float) -> bool:
    return abs(value) <= (2 - 2**-23) * 2.0**127


def _pair(values: object) -> tuple[float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise ValueError(f"expected two numbers, GAMMA and BETA; got {values!r}")
    return float(values[0]), float(values[1])


@dataclass(frozen=True)
class Request:
    """A merge: which models, how, and where the result goes.

    Attributes:
        method: a key of ``rft_fast.names.MERGE_METHODS``.
        finetuned: checkpoint files; with ``task-arithmetic`` also differences (task vectors).
        out: file to write: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` for one of torch.save.
        zeroshot: checkpoint file; None only for methods without one.
        key: which weights of the fine-tuned files, where they have several, such as ``state_dict_ema``.
        zeroshot_key: which weights of the zero-shot file.
        alpha: position of the result: 0 is zero-shot, 1 is fine-tuned. Numbers, at most one, and pairs of a
            layer (its name, or ``re:`` and a regular expression) and a number; the number alone is for all
            other layers. Empty: 1 for ``hold`` and ``prune``.
        alpha_table: the same, of a TOML file (:func:`rft_fast.path.coefficients.read_table`); instead of
            ``alpha``.
        lines: (gamma, beta) of LiNeS (Wang et al. 2024): alpha of block l of L is
            ``gamma + beta (l - 1) / (L - 1)``; instead of ``alpha``.
        layers: layers that ``hold`` keeps at zero-shot, or that ``prune`` masks; names or patterns.
        scale: factors of the differences: one for all models, or one for each; of ``ties`` and
            ``dare-ties``, one of the merged difference.
        density: part of each difference, by magnitude, that ``ties`` keeps.
        agreeing: what ``ties`` and ``dare-ties`` take of the elements that have the elected sign.
        drop: probability that an element of a difference is dropped by ``dare`` and ``dare-ties``; must be
            given.
        least_angle: degrees; at a smaller angle, and at one as close to 180, ``slerp`` interpolates linearly.
        keep: probability that a weight survives the mask of ``prune``.
        fill: value of a masked weight: ``zero`` or ``zeroshot``.
        seed: of masks.
        format: names in the result; None: those of the first fine-tuned file.
        dtype: of its floating-point tensors; None: that of each tensor in the first fine-tuned file.
        recalibrate: estimate the statistics of BatchNorm anew on data.
        overwrite: replace a result that exists.
        unrelated: accept models of which neither was fine-tuned from the other.

    Raises:
        ValueError: a number is out of range; files do not fit the method; or an option is given that it does
            not use.
    """

    GROUP: ClassVar = METHOD

    method: MergeMethod
    finetuned: tuple[pathlib.Path, ...] = field(
        metadata=described(
            "fine-tuned checkpoints; also task vectors, for the methods that add differences",
            common="fine-tuned checkpoints, or task vectors",
            metavar="FILE",
            check=pathlib.Path,
            many="once",
            paths=True,
            group=MODELS,
        )
    )
    out: pathlib.Path = field(
        metadata=described(
            f"file to write ({', '.join(SUFFIXES)})",
            common="file to write (.safetensors, .pt, .pth, .bin)",
            metavar="FILE",
            check=pathlib.Path,
            group=OUTPUT,
        )
    )
    zeroshot: pathlib.Path | None = option(
        None,
        "zero-shot checkpoint that the others were fine-tuned from",
        common="zero-shot checkpoint",
        metavar="FILE",
        check=pathlib.Path,
        group=MODELS,
    )
    key: str | None = option(
        None,
        "which weights to use if a fine-tuned checkpoint has several, such as state_dict_ema",
        metavar="NAME",
        group=MODELS,
    )
    zeroshot_key: str | None = option(
        None, "which weights to use if the zero-shot checkpoint has several", metavar="NAME", group=MODELS
    )
    unrelated: bool = option(
        False, "accept checkpoints that were not fine-tuned from each other", group=MODELS
    )
    alpha: tuple[float | tuple[str, float], ...] = option(
        (),
        "position: 0 is zero-shot, 1 is fine-tuned; LAYER=X or re:PATTERN=X for some layers, a number alone "
        "for the others",
        common="position: 0 is zero-shot, 1 is fine-tuned",
        metavar="X",
        check=position,
        many="once",
    )
    alpha_table: tuple[float | tuple[str, float], ...] = option(
        (),
        "TOML file with the position of each layer, instead of --alpha: lines such as visual.conv1 = 0.0; "
        "rest = 1.0 is for all layers that no line names",
        metavar="FILE",
        check=_table,
    )
    lines: tuple[float, float] | None = option(
        None,
        "GAMMA and BETA of LiNeS: alpha rises from GAMMA in the first block to GAMMA + BETA in the last",
        metavar="X",
        check=finite,
        many="once",
        whole=_pair,
    )
    layers: tuple[str, ...] = option(
        (),
        "layers that hold keeps at zero-shot, or that prune prunes; names, or re:PATTERN",
        common="layers that hold keeps, or that prune prunes",
        metavar="LAYER",
        many="once",
    )
    scale: tuple[float, ...] = option(
        (1.0,),
        "factor of the differences: one, or one for each model (default: 1)",
        common="factor of the differences (default: 1)",
        metavar="X",
        check=finite,
        many="once",
    )
    density: float = option(
        0.2,
        "fraction of each difference that ties keeps: its largest elements (default: %(default)s)",
        metavar="P",
        check=finite,
    )
    agreeing: Agreeing = option(
        "mean", "how ties combines elements with the elected sign (default: %(default)s)", choices=AGREEING
    )
    drop: float | None = option(
        None,
        "probability that dare drops an element of a difference (required by dare and dare-ties)",
        metavar="P",
        check=finite,
    )
    least_angle: float = option(
        math.degrees(math.acos(0.9995)),
        "angle in degrees below which slerp interpolates linearly (default: 1.81, cosine 0.9995)",
        metavar="X",
        check=finite,
    )
    keep: float = option(
        0.5, "probability that prune keeps a weight (default: %(default)s)", metavar="P", check=finite
    )
    fill: Fill = option("zero", "value of pruned weights (default: %(default)s)", choices=FILL)
    seed: int = option(0, "seed of the random masks (default: %(default)s)", metavar="N", check=int)
    format: MergeNaming | None = option(
        None,
        "naming of the tensors (default: as in the first fine-tuned file)",
        choices=MERGE_NAMINGS,
        group=OUTPUT,
    )
    dtype: MergeDtype | None = option(
        None,
        f"type of floating-point tensors: {', '.join(MERGE_DTYPES)} (default: as in the first fine-tuned "
        "file)",
        common="float32, bfloat16 or float16",
        metavar="NAME",
        choices=MERGE_DTYPES,
        group=OUTPUT,
    )
    recalibrate: bool = option(
        False, "estimate the statistics of BatchNorm again, on the data given after --", group=OUTPUT
    )
    overwrite: bool = option(
        False, "replace --out if it exists", common="replace --out if it exists", group=OUTPUT
    )

    def __post_init__(self) -> None:
        if self.method not in MERGE_METHODS:
            raise ValueError(
                f"merge: there is no method {self.method!r}; {suggestion(self.method, MERGE_METHODS)}"
            )
        defaults = {each.name: each.default for each in fields(self)}
        refuse_unused(self.method, lambda name: getattr(self, name) != defaults[name])
        self._check_files()
        self._check_numbers()

    def _check_files(self) -> None:
        count = len(self.finetuned)
        if self.out.suffix not in SUFFIXES:
            raise ValueError(
                f"merge: the result must be a file with the ending {', '.join(SUFFIXES)}; got "
                f"{str(self.out)!r}"
            )
        if self.method in PAIRS and count != 1:
            raise ValueError(f"merge: {self.method} needs exactly one fine-tuned model, got {count}")
        if self.method in BASELESS:
            if self.zeroshot is not None:
                raise ValueError(
                    f"merge: {self.method} uses no zero-shot model; leave --zeroshot out, or give "
                    f"{self.zeroshot} with --finetuned if it is one of the models"
                )
            if self.zeroshot_key is not None:
                raise ValueError(f"merge: {self.method} has no zero-shot model; leave --zeroshot-key out")
        elif self.zeroshot is None:
            raise ValueError(f"merge: {self.method} needs a zero-shot model; give --zeroshot FILE")
        if self.method in SEVERAL and count < 2:
            raise ValueError(f"merge: {self.method} needs at least two fine-tuned models, got {count}")
        if not count:
            raise ValueError(f"merge: {self.method} needs a fine-tuned model; give --finetuned FILE")

    def _check_numbers(self) -> None:
        plain = [entry for entry in self.alpha if not isinstance(entry, tuple)]
        values = [entry[1] if isinstance(entry, tuple) else entry for entry in self.alphas]
        given = "alpha_table" if self.alpha_table and not self.alpha else "alpha"
        self._need(given, all(map(_in_float32, values)), "finite in float32")
        self._need("alpha", len(plain) <= 1, "at most one number for all layers")
        if self.method in ("interpolate", "slerp"):
            ways = bool(self.alpha) + bool(self.alpha_table) + (self.lines is not None)
            if ways != 1:
                options = "--alpha, --alpha-table or --lines"
                options = options if self.method == "interpolate" else "--alpha or --alpha-table"
                raise ValueError(f"merge: {self.method} needs {options}, and only one of them")
        if self.lines is not None:
            self._need("lines", all(map(_in_float32, (*self.lines, sum(self.lines)))), "finite in float32")
        if self.method in ("hold", "prune") and not self.layers:
            raise ValueError(f"merge: {self.method} needs layers; give --layers LAYER ...")
        if self.method in ONE_SCALE:
            self._need("scale", len(self.scale) == 1, "one number")
        counts = (1, len(self.finetuned))
        self._need("scale", len(self.scale) in counts, "one number, or one for each fine-tuned model")
        self._need("density", 0 < self.density <= 1, "above 0, at most 1")
        self._need("agreeing", self.agreeing in AGREEING, f"one of {', '.join(AGREEING)}")
        if "drop" in USED[self.method]:
            self._need("drop", self.drop is not None, "given (--drop P)")
        self._need("drop", self.drop is None or 0 <= self.drop < 1, "from 0 to below 1")
        self._need("scale", all(map(_in_float32, self.scale)), "finite in float32")
        self._need("least_angle", 0 <= self.least_angle < 90, "an angle from 0 to 90 degrees")
        self._need("keep", 0 <= self.keep <= 1, "a probability")
        self._need("fill", self.fill in FILL, f"one of {', '.join(FILL)}")
        self._need("seed", 0 <= self.seed < 1 << 64, "an integer from 0 to 2**64 - 1")
        self._need("format", self.format in (None, *MERGE_NAMINGS), f"one of {', '.join(MERGE_NAMINGS)}")
        self._need("dtype", self.dtype in (None, *MERGE_DTYPES), f"one of {', '.join(MERGE_DTYPES)}")

    def _need(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"merge: {name} must be {expected}; got {getattr(self, name)!r}")

    @property
    def measures(self) -> bool:
        """Whether it needs data."""
        return self.recalibrate or self.method in MEASURING

    @property
    def alphas(self) -> tuple[float | tuple[str, float], ...]:
        """``alpha``, or what stands for it."""
        return self.alpha or self.alpha_table or (1.0,)

    def scales(self) -> list[float]:
        """The factor of each fine-tuned model."""
        return list(self.scale) if len(self.scale) > 1 else [self.scale[0]] * len(self.finetuned)

    def numbers(self) -> dict[str, object]:
        """The values of the method's own options, as JSON has them."""
        found = {name: getattr(self, name) for name in sorted(USED[self.method] - {"alpha_table"})}
        if "alpha" in found and self.lines is None:
            found["alpha"] = self.alphas
        return {name: value for name, value in found.items() if value not in ((), None)}


def refuse_unused(method: MergeMethod, given: Callable[[str], bool]) -> None:
    """Refuse options that a method does not use.

    Args:
        method: the method.
        given: whether the option of a field was given; in Python, whether it differs from its default.

    Raises:
        ValueError: one was.
    """
    every = frozenset().union(*USED.values())
    if unused := sorted(name for name in every - USED[method] if given(name)):
        users = ", ".join(each for each in USED if unused[0] in USED[each])
        raise ValueError(
            f"merge: {method} does not use --{unused[0].replace('_', '-')} (methods that do: "
            f"{users}); leave it out"
        )
