"""Tensors that are not weights but factors of weights: adapters, parametrisations, masks."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MERGE = (
    "merge them into their layers in both models first (peft: model.merge_and_unload()), and use the "
    "merged weights"
)
# (Problem and remedy, pattern of a component of a dotted name.)
_COMPONENTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "unmerged low-rank adapters (LoRA): interpolating both factors is not a straight line in "
        f"weight space; {_MERGE}",
        re.compile(r"(?:.*_)?(?:lora|Lora|LoRA)(?:_.*|[A-Z0-9].*)?"),
    ),
    (
        "unmerged adapters of peft: interpolating their factors is not a straight line in weight "
        f"space; {_MERGE}",
        re.compile(
            r"(?:ia3_l|hada_[wt]\d?|lokr_[wt]\d?|(?:oft|boft)_[rRs]|vera_lambda|vera_[AB]|fourierft)(?:_.*)?"
        ),
    ),
    (
        "parametrised weights: interpolating their parameters is not a straight line in "
        'weight space; run remove_parametrizations(module, "weight") of '
        "torch.nn.utils.parametrize in both models first",
        re.compile(r"parametrizations"),
    ),
)
# (Problem and remedy, suffixes of the two tensors by which an older torch function replaces a weight.)
_PAIRS: tuple[tuple[str, tuple[str, str]], ...] = (
    (
        "factors of weight_norm: interpolating them is not a straight line in weight space; "
        "run torch.nn.utils.remove_weight_norm(module) in both models first",
        ("_g", "_v"),
    ),
    (
        (
            "pruned weights and their masks: run torch.nn.utils.prune.remove(module, name) in "
            "both models first"
        ),
        ("_orig", "_mask"),
    ),
    (
        "factors of spectral_norm: interpolating them is not a straight line in weight "
        "space; run torch.nn.utils.remove_spectral_norm(module) in both models first",
        ("_orig", "_u"),
    ),
)
_WEIGHT = re.compile(r"(?:.*\.)?(?:weight|bias)\w*")


def factors(names: Iterable[str]) -> dict[str, list[str]]:
    """Find tensors that are factors of weights, by their names.

    Args:
        names: dotted names of parameters and buffers.

    Returns:
        Problem and remedy -> the names that show it; empty if all are weights.
    """
    known = dict.fromkeys(names)
    problems: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for what, pattern in _COMPONENTS:
            if any(map(pattern.fullmatch, parts)):
                problems.setdefault(what, []).append(name)
                break
    for what, (first, second) in _PAIRS:
        for name in known:
            stem = name.removesuffix(first)
            if stem != name and _WEIGHT.fullmatch(stem) and stem + second in known:
                problems.setdefault(what, []).extend((name, stem + second))
    return problems
