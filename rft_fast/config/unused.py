"""Options of the command line that have no effect on what is requested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from .. import catalogue
from ..common.fields import Tree, entries
from ..names import WORST_CASE
from ..settings import Layers, Prune, Sharpness
from .builder import COMMAND
from .settings import Computed

_ALONE = ("layers", "cumulative")  # without noise or masks
_BY_LAYER = (*_ALONE, "layer-sharpness", "prune")
_SHARPNESS = ("sharpness", "layer-sharpness")

# Settings class -> the studies that use its options; and option -> those that use it, where they differ.
_OF_CLASS: dict[type, Sequence[str]] = {Layers: ("layers",), Sharpness: _SHARPNESS, Prune: ("prune",)}
_OF_OPTION: Mapping[str, Sequence[str]] = {
    "granularity": ("sharpness", *_BY_LAYER),
    "layers": _BY_LAYER,
    "layer-alphas": _ALONE,
    "layer-data": (*_ALONE, "prune"),
    "layer-samples": (*_ALONE, "prune"),
    "layer-draws": ("layer-sharpness",),
    "exclude": ("sharpness",),
    "zero-margin": ("layer-sharpness",),
}
_ALWAYS = {"models"}  # it decides on what the figures of every study show


def _max_draws(tree: Tree) -> str:
    return "it limits the draws of --goal-se" if tree.of(Sharpness).goal_se is None else ""


def _noise(tree: Tree) -> str:
    estimator = tree.of(Sharpness).estimator
    return f"--estimator {estimator} does not average over noise" if estimator in WORST_CASE else ""


def _criteria(tree: Tree) -> str:
    return "" if tree.of(Prune).layers is None else "--prune-layers names the layers"


def _mask_seeds(tree: Tree) -> str:
    own = tree.of(Prune)
    random = own.control or set(own.methods) != {"magnitude"}
    return "" if random else "neither --methods magnitude nor --no-control draws anything"


# Option -> why other options leave it without effect; empty if they do not.
_BESIDE: Mapping[str, Callable[[Tree], str]] = {
    "max-draws": _max_draws,
    "noise": _noise,
    "criteria": _criteria,
    "mask-seeds": _mask_seeds,
}


def unused(tree: Tree, measured: Sequence[str]) -> Iterator[str]:
    """Say which options of the command line have no effect, a sentence for each reason.

    Options of a zoo file are for all its sweeps, and may be of no use to one of them.

    Args:
        tree: The settings.
        measured: The studies that are measured or made of rows, with those that they need.
    """
    reasons: dict[str, list[str]] = {}
    own = {study.options: (study.name,) for study in catalogue.studies() if study.options is not None}
    for kind, studies in (_OF_CLASS | own).items():
        for entry in entries(kind):
            if tree.giver(entry.name) != COMMAND or entry.name in _ALWAYS:
                continue
            users = _OF_OPTION.get(entry.name, studies)
            do = "does" if len(users) == 1 else "do"
            why = f"no requested study uses {{}} ({', '.join(users)} {do})"
            if set(users) & set(measured):
                why = _BESIDE[entry.name](tree) if entry.name in _BESIDE else ""
            if why:
                reasons.setdefault(why, []).append(f"--{entry.name}")
    if tree.giver("despite-rounding") == COMMAND and tree.of(Computed).precision != "bf16x3":
        reasons["only --precision bf16x3 is refused for its rounding"] = ["--despite-rounding"]
    for why, names in reasons.items():
        have, them = ("has", "it") if len(names) == 1 else ("have", "them")
        yield f"{', '.join(names)} {have} no effect: {why.format(them)}"
