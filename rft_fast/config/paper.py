"""``--paper``: the choices of the paper, where defaults depart from them and where they do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..settings import ALPHAS
from .builder import COMMAND, PAPER, ZOO, Builder, Given
from .conflicts import said
from .zoo import DataSource, Zoo

IMAGENET_A = 7500  # images
_NAMES = ("a", "ina", "imageneta")  # of ImageNet-A, as sets and their folders are called


@dataclass(frozen=True)
class Choice:
    """What the paper chose for one option.

    Attributes:
        option: name, without dashes.
        value: value of its field.
        where: figures or definitions that it is about.
        paper: the value in words; empty: the value itself.
        here: the default in words, likewise.
    """

    option: str
    value: Any
    where: str
    paper: str = ""
    here: str = ""


_ON = "interpolated in general, fine-tuned layer by layer"
CHOICES = (
    Choice("alphas", ALPHAS, "positions"),
    Choice("samples", None, "images of each data set", "all", "all"),
    Choice("granularity", "module", "layer"),
    Choice("layer-alphas", ALPHAS, "positions, Figure 2"),
    Choice("layer-samples", IMAGENET_A, "images, Figures 2 and 5", "all of ImageNet-A (7500)"),
    Choice("others", "zeroshot", "other layers, Definition 1.1"),
    Choice("reference", "models", "reference of instability, Definition 1.1"),
    Choice("rhos", (1.0,), "noise, Figures 3 and 4"),
    Choice("draws", 20, "draws, Figure 3"),
    Choice("layer-draws", 20, "draws, Figure 4"),
    Choice("goal-se", None, "standard error to reach", "none", "none"),
    Choice("sharpness-alphas", ALPHAS, "positions, Figures 3 and 4"),
    Choice("sharpness-samples", 1024, "images, Figures 3 and 4"),
    Choice("estimator", "plain", "estimator, Equation 3"),
    Choice("on", None, "perturbed weights, Equation 3 and Section 3.1", _ON, _ON),
    Choice("noise", "normal", "noise, Equation 3"),
    Choice("no-adaptive", True, "scale of the noise, Equation 3", "|w|", "|w|"),
    Choice("noise-batch", 128, "images that share a draw"),
    Choice("exclude", None, "layers left out, Figure 3", "none", "none"),
    Choice("normalize-logits", False, "logits", "as they are", "as they are"),
    Choice("criteria", ("sharpness",), "layers to prune, Algorithm 1"),
    Choice("prune-layers", None, "layers to prune, by name", "none", "none"),
    Choice("keep", 0.5, "weights that survive, Algorithm 1"),
    Choice("methods", ("zero",), "pruned weights, Algorithm 1"),
    Choice("mask-seeds", 1, "masks, Algorithm 1"),
    Choice("no-control", False, "control of pruning", "none", "as many other layers at random"),
)
# The sets of the figures depend on what there is: option -> definition, default in words.
_DATA = {
    "layer-data": ("data, Figures 2 and 5", "the first out-of-distribution set"),
    "sharpness-data": ("data, Figures 3 and 4", "the first in-distribution set, else the first"),
}


def sources(options: Builder, zoo: Zoo, given: Given) -> tuple[dict[str, Given], list[str]]:
    """Return the sources of settings in order, those of ``--paper`` among them where it was asked for.

    The command line overrides them; so does the zoo where the zoo itself says ``paper = true``.

    Args:
        options: the sweep's options.
        zoo: models and data, with options of their own.
        given: options of the command line.

    Returns:
        Name of a source -> its options, later ones overriding earlier ones; and a sentence for each choice
        that was replaced.

    Raises:
        ValueError: no out-of-distribution data, which the paper's figures are about.
    """
    own, command = {ZOO: zoo.options}, {COMMAND: given}
    if "paper" not in {**zoo.options, **given}:
        return own | command, []
    by_command = "paper" in given
    beside = given if by_command else {**zoo.options, **given}
    chosen = {each.option: each.value for each in CHOICES}
    data, notices = _data(zoo.data, beside)
    chosen |= data
    for option in list(chosen):
        followed = options.entries[option].option.follows
        if followed is not None and followed in beside and option not in beside:
            chosen[option] = beside[followed]  # as --layer-alphas, which are those of --alphas
    shown = {each.option: each for each in CHOICES}
    for option in (name for name in chosen if name in beside and beside[name] != chosen[name]):
        of = f"the paper's choice ({shown[option].where})" if option in shown else "the paper's choice"
        there = (shown[option].paper if option in shown else "") or said(chosen[option])
        who = f"argument --{option}" if option in given else f"option {option} of the zoo {zoo.name!r}"
        notices.append(f"{who}{_in_words(option, beside[option])} replaces {of}: {there}")
    if not by_command:
        return {PAPER: chosen} | own | command, notices
    gone = [
        f"{name}{_in_words(name, value)}"
        for name, value in zoo.options.items()
        if name in chosen and name not in given and value != chosen[name]
    ]
    if gone:
        notices.append(f"options of the zoo {zoo.name!r} that --paper overrides: {'; '.join(gone)}")
    return own | {PAPER: chosen} | command, notices


def _data(sets: Mapping[str, DataSource], beside: Given) -> tuple[dict[str, Any], list[str]]:
    """Return the sets of Figures 2 to 5 by option, and a sentence where they are not ImageNet-A."""
    far = [name for name, source in sets.items() if source.ood]
    if not far:
        raise ValueError(
            "--paper: its figures are measured out of distribution, on ImageNet-A, but the data "
            f"({', '.join(sets)}) are in distribution; add out-of-distribution data with --data, "
            "or leave --paper out"
        )
    found = [name for name in far if {_plain(name), _plain(sets[name].path.name)} & set(_NAMES)]
    chosen = (found or far)[:1]
    notices = []
    if not found and (left := [option for option in _DATA if option not in beside]):
        notices.append(
            "--paper: no data set is called ImageNet-A; "
            f"{' and '.join(f'--{name}' for name in left)} {'is' if len(left) == 1 else 'are'} "
            f"{chosen[0]}, the first out-of-distribution set"
        )
    return dict.fromkeys(_DATA, tuple(chosen)), notices


def _in_words(option: str, value: Any) -> str:
    """Return a value behind its option, in brackets; nothing for an option without a value."""
    if isinstance(value, bool):
        return ""
    if option == "rhos" and not value:
        return " (auto)"
    return f" ({'all' if option == 'noise-batch' and value is None else said(value)})"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def departures(options: Builder) -> list[tuple[str, str, str, str]]:
    """Return where the defaults depart from the paper: definition, paper, default here, option."""
    found = []
    for each in CHOICES:
        entry = options.entries[each.option]
        if each.value != entry.default:
            option = f"--{each.option}" if entry.flag else f"--{each.option} {said(each.value)}"
            found.append(
                (each.where, each.paper or said(each.value), each.here or said(entry.default), option)
            )
    for name, (where, here) in _DATA.items():
        if options.entries[name].default is None:
            found.append((where, "ImageNet-A", here, f"--{name} NAME"))
    return found
