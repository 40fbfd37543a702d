"""A position for every layer: tables of patterns, and LiNeS."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rft_fast.checkpoints.canonical import is_visual
from rft_fast.common.words import some
from rft_fast.path import layers as layering

_BLOCK = re.compile(r"(.*?(?:^|\.)(?:resblocks|blocks|layers?))\.(\d+)(?![^.])")
_STAGES = re.compile(r"(?:^|\.)(?:stages|blocks|layers)\.\d+\.(?:.*\.)?blocks\.\d+(?![^.])")


def table(entries: Sequence[float | tuple[str, float]], layers: Sequence[str]) -> dict[str, float]:
    """Give every layer its alpha.

    Args:
        entries: numbers, at most one, for layers that no pattern names; and pairs of a pattern (a layer's
            name, or ``re:`` and a regular expression for whole names) and a number.
        layers: names of layers.

    Returns:
        Layer -> alpha, in the order of ``layers``.

    Raises:
        ValueError: a pattern names no layer, two name the same one, or a layer has no alpha.
    """
    found: dict[str, float] = {}
    by: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, tuple):
            continue
        pattern, value = entry
        for layer in layering.select(layers, [pattern], operation="merge: alpha"):
            if layer in found:
                raise ValueError(
                    f"merge: alpha of {layer} is given twice, by {by[layer]!r} and {pattern!r}; each layer "
                    "needs one"
                )
            found[layer], by[layer] = value, pattern
    rest = [entry for entry in entries if not isinstance(entry, tuple)]
    if len(rest) > 1:
        raise ValueError(f"merge: alpha has {len(rest)} numbers for all other layers, expected one")
    missing = [layer for layer in layers if layer not in found]
    if missing and not rest:
        raise ValueError(
            f"merge: alpha has no value for {len(missing)} layers ({some(missing, 3)}); add a "
            "number for all layers that no pattern matches"
        )
    return {layer: found.get(layer, *rest) for layer in layers}


def lines(layers: Sequence[str], gamma: float, beta: float) -> dict[str, float]:
    """Give every layer the alpha of LiNeS (Wang et al. 2024, Layer-Increasing Network Scaling).

    Block l of the L blocks of a tower (``...resblocks.l-1``) gets ``gamma + beta (l - 1) / (L - 1)``. What is
    before the blocks (convolution, embeddings, ``ln_pre``) gets the first block's value, everything else the
    last one's.

    Args:
        layers: names of layers, in any order.
        gamma: alpha of the first block.
        beta: what the last block has more.

    Returns:
        Layer -> alpha.

    Raises:
        ValueError: no layer of the image tower is in a block, a tower has only one block, or its blocks are
            in several stages.
    """
    blocks: dict[str, int] = {}
    for layer in layers:
        if match := _BLOCK.match(layer):
            blocks[match[1]] = max(blocks.get(match[1], 0), int(match[2]) + 1)
    if not blocks:
        raise ValueError(
            f"merge: LiNeS needs numbered blocks ('resblocks.0'), but none of the {len(layers)} "
            "layers is in one; use --alpha LAYER=X ... instead"
        )
    if stages := [layer for layer in layers if _STAGES.search(layer)]:
        raise ValueError(
            f"merge: LiNeS needs one sequence of blocks in a tower, but {stages[0]} is in one of "
            "several stages; use --alpha LAYER=X ... instead"
        )
    image = [layer for layer in layers if is_visual(layer)]
    if image and not any(map(is_visual, blocks)):
        raise ValueError(
            "merge: LiNeS needs numbered blocks, but no layer of the image tower is in one "
            f"({image[0]} ...); use --alpha LAYER=X ... instead"
        )
    if short := [name for name, count in blocks.items() if count < 2]:
        raise ValueError(f"merge: LiNeS needs at least two blocks, but {short[0]} has one")
    found = {}
    for layer in layers:
        if match := _BLOCK.match(layer):
            found[layer] = gamma + beta * int(match[2]) / (blocks[match[1]] - 1)
        else:
            found[layer] = gamma if _BEFORE.search(layer) else gamma + beta
    return found


_BEFORE = re.compile(
    r"(?:^|\.)(?:conv1|class_embedding|positional_embedding|token_embedding|ln_pre|patch_embed|cls_token|"
    r"pos_embed)(?:\.|$)"
)
