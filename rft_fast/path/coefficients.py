"""A number for every layer: tables of names and patterns, their files, and LiNeS."""

from __future__ import annotations

import math
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rft_fast.common import files
from rft_fast.common.words import some
from rft_fast.path.layers import select

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table: TypeAlias = Mapping[str, float] | Mapping[str | None, float]
"""Name or ``re:`` pattern of layers -> their number; None -> that of all others."""

Alpha: TypeAlias = float | Table
"""One position for all layers, or those of layers."""

Entries: TypeAlias = tuple[tuple[str | None, float], ...]
"""A table as pairs, in the order in which they were given."""

REST = "rest"
_BLOCK = re.compile(r"(.*?(?:^|\.)(?:resblocks|blocks|layers?))\.(\d+)(?![^.])")
_STAGES = re.compile(r"(?:^|\.)(?:stages|blocks|layers)\.\d+\.(?:.*\.)?blocks\.\d+(?![^.])")
_BEFORE = re.compile(
    r"(?:^|\.)(?:conv1|class_embedding|positional_embedding|token_embedding|ln_pre|patch_embed|cls_token|"
    r"pos_embed)(?:\.|$)"
)
_IMAGE = "visual."  # how names of the image tower begin


def spread(
    entries: Iterable[tuple[str | None, float]], layers: Sequence[str], operation: str, rest: str
) -> dict[str, float]:
    """Give every layer its number.

    Args:
        entries: Pairs of a pattern (a layer's name, or ``re:`` and a regular expression for whole names) and
            a number; at most one pair of None and the number of the layers that no pattern names.
        layers: Names of layers.
        operation: Start of the error messages.
        rest: What they call the pair of None.

    Returns:
        Layer -> number, in the order of ``layers``.

    Raises:
        TypeError: A pattern is no string.
        ValueError: A pattern names no layer, two name the same one, or a layer has no number.
    """
    found: dict[str, float] = {}
    by: dict[str, str] = {}
    others: list[float] = []
    for pattern, value in entries:
        if pattern is None:
            others.append(value)
            continue
        for layer in select(layers, [pattern], operation=operation):
            if layer in found:
                raise ValueError(
                    f"{operation} of {layer} is given twice, by {by[layer]!r} and {pattern!r}; each layer "
                    "needs one"
                )
            found[layer], by[layer] = value, pattern
    if len(others) > 1:
        raise ValueError(f"{operation} has {len(others)} numbers for all other layers, expected one")
    missing = [layer for layer in layers if layer not in found]
    if missing and not others:
        raise ValueError(
            f"{operation} has no value for {len(missing)} layers ({some(missing, 3)}); add {rest} for all "
            "layers that no pattern matches"
        )
    return {layer: found.get(layer, *others) for layer in layers}


def read_table(file: str | pathlib.Path) -> Entries:
    """Read a table from a TOML file: names or ``re:`` patterns of layers, each with a number::

        rest = 1.0
        visual.conv1 = 0.0
        're:visual\\.transformer\\.resblocks\\.[01]\\..*' = 0.5

    ``rest`` is the number of all layers that no other line matches (a layer of that name: ``re:rest``). Names
    may be quoted or not: TOML's tables stand for the parts of a name between dots.

    Raises:
        ValueError: The file does not exist, is not valid TOML, names no layer, or has a value that is not a
            finite number.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: the file does not exist")
    try:
        table = tomllib.loads(files.read_text(file, "utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file}: is not valid TOML: {error}") from None
    found = [(REST if parts == [REST] else ".".join(parts), value) for parts, value in _leaves(table)]
    for name, value in found:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{file}: {name}: expected a finite number, got {value!r}")
    entries = tuple((None if name == REST else name, float(value)) for name, value in found)
    if all(name is None for name, _ in entries):
        raise ValueError(
            f"{file}: names no layer; add lines such as visual.conv1 = 0.0, names or patterns of layers with "
            "their numbers"
        )
    return entries


def _leaves(table: Mapping[str, Any], above: Sequence[str] = ()) -> Iterable[tuple[list[str], Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, [*above, name])
        else:
            yield [*above, name], value


def lines(layers: Sequence[str], gamma: float, beta: float, operation: str, instead: str) -> dict[str, float]:
    """Give every layer the alpha of LiNeS (Wang et al. 2024, Layer-Increasing Network Scaling).

    Block l of the L blocks of a tower (``...resblocks.l-1``) gets ``gamma + beta (l - 1) / (L - 1)``. What is
    before the blocks (convolution, embeddings, ``ln_pre``) gets the first block's value, everything else the
    last one's.

    Args:
        layers: Names of layers, in any order.
        gamma: Alpha of the first block.
        beta: What the last block has more.
        operation: Start of the error messages.
        instead: What they advise to use.

    Returns:
        Layer -> alpha.

    Raises:
        ValueError: No layer of the image tower is in a block, a tower has only one block, or its blocks are
            in several stages.
    """
    blocks: dict[str, int] = {}
    for layer in layers:
        if match := _BLOCK.match(layer):
            blocks[match[1]] = max(blocks.get(match[1], 0), int(match[2]) + 1)
    if not blocks:
        raise ValueError(
            f"{operation}: LiNeS needs numbered blocks ('resblocks.0'), but no layer is in one "
            f"({some(layers, 3)}); use {instead} instead"
        )
    if stages := [layer for layer in layers if _STAGES.search(layer)]:
        raise ValueError(
            f"{operation}: LiNeS needs one sequence of blocks in a tower, but {stages[0]} is in one of "
            f"several stages; use {instead} instead"
        )
    image = [layer for layer in layers if layer.startswith(_IMAGE)]
    if image and not any(name.startswith(_IMAGE) for name in blocks):
        raise ValueError(
            f"{operation}: LiNeS needs numbered blocks, but no layer of the image tower is in one "
            f"({image[0]} ...); use {instead} instead"
        )
    if short := [name for name, count in blocks.items() if count < 2]:
        raise ValueError(f"{operation}: LiNeS needs at least two blocks, but {short[0]} has one")
    found = {}
    for layer in layers:
        if match := _BLOCK.match(layer):
            found[layer] = gamma + beta * int(match[2]) / (blocks[match[1]] - 1)
        else:
            found[layer] = gamma if _BEFORE.search(layer) else gamma + beta
    return found
