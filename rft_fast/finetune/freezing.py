"""Which parameters of a classifier are trained."""

from __future__ import annotations

import re

from torch import nn

from rft_fast.names import Names

# Parameters of the blocks of image towers, and of what comes before the first block.
_BLOCKS = re.compile(
    r"visual\.(?:transformer\.resblocks\.|trunk\.(?:blocks|stages)\.|layer)(?P<number>\d+)\..+"
)
_STEM = re.compile(
    r"visual\.(?:class_embedding|positional_embedding|ln_pre\..+|conv\d\..+|bn\d\..+|"
    r"trunk\.(?:patch_embed|stem|cls_token|reg_token|pos_embed|norm_pre)(?:\..+)?)"
)


def freeze(model: nn.Module, patterns: Names = (), blocks: int = 0) -> list[str]:
    """Freeze parameters of a classifier, and make all others trainable.

    Args:
        model: The classifier.
        patterns: Regular expressions that match whole parameter names, such as ``visual\\.ln_pre\\..*``.
        blocks: Number of blocks of the image tower to freeze, from the first on, with everything before them.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: A pattern is invalid or matches nothing, there are fewer blocks, the tower's blocks are
            unknown, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"freeze: {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise ValueError(
                f"freeze: {pattern!r} matches the whole name of no parameter; names look like {names[0]!r}"
            )
        frozen |= found
    if blocks:
        block_of = {name: int(match["number"]) for name in names if (match := _BLOCKS.fullmatch(name))}
        numbers = sorted(set(block_of.values()))
        if not 0 < blocks <= len(numbers):
            raise ValueError(
                f"freeze: expected 0 to {len(numbers)} blocks, as many as the image tower has, got {blocks}; "
                "freeze by names instead"
            )
        frozen |= {name for name, number in block_of.items() if number in numbers[:blocks]}
        frozen |= {name for name in names if _STEM.fullmatch(name)}
    if len(frozen) == len(names):
        raise ValueError("freeze: every parameter is frozen, so there is nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return [name for name in names if name in frozen]
