"""Parameter names -> layers.

A layer is the weight and bias of one module together, as the paper (*In Search of the Successful
Interpolation*, Abdollahpoorrostam 2024) counts them; other groupings are a choice away:

=============  =================================================================================
granularity    layer of a parameter
=============  =================================================================================
``module``     its name without a trailing ``.weight``, ``.bias``, ``_weight`` or ``_bias``:
               ``...attn.in_proj``, ``...mlp.c_fc``, ``visual.conv1``, ``visual.class_embedding``
``block``      its name up to the first number, and on through numbers that follow at once or
               after ``blocks`` or ``layers``: ``visual.transformer.resblocks.3``,
               ``visual.layer2.0``, ``visual.trunk.stages.2.blocks.5``. A name without a number
               keeps its ``module`` layer: ``visual.conv1``, ``classification_head``
``tensor``     its name
``re:<...>``   a regular expression, matched from the start of the name to the end of one of its
               dotted components; the layer is the first group (if the pattern has one and it
               took part), else the whole match: ``re:.*\\.(attn|mlp)``. A name that it does not
               match keeps its ``module`` layer
=============  =================================================================================

Names match exactly or not at all: ``resblocks.1`` never stands for ``resblocks.10``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from rft_fast.names import Names

_SUFFIX = re.compile(r"(?<=[^._])[._]+(?:weight|bias)$")
_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?:\.(?:(?:blocks|layers)\.)?\d+)*(?![^.])")


def layer_of(parameter_name: str, granularity: str = "module") -> str:
    """The layer that a parameter belongs to; see the table at the top of this module.

    Raises ValueError for an unknown granularity or an invalid regular expression.
    """
    if granularity == "tensor":
        return parameter_name
    if granularity == "block":
        match = _BLOCK.match(parameter_name)
    elif granularity.startswith("re:"):
        match = _pattern(granularity, ends_component=True).match(parameter_name)
    elif granularity == "module":
        match = None
    else:
        raise ValueError(
            f"layers: granularity must be 'module', 'block', 'tensor' or 're:<pattern>', got {granularity!r}"
        )
    if match is None:
        return _SUFFIX.sub("", parameter_name)
    return (match.group(1) if match.re.groups else None) or match.group()


def group(parameter_names: Sequence[str], granularity: str = "module") -> dict[str, list[int]]:
    """Layers in the order of their first parameter, each with the indices of its parameters.

    Raises ValueError as :func:`layer_of` does, and when a regular expression matches no name.
    """
    if granularity.startswith("re:") and parameter_names:
        pattern = _pattern(granularity, ends_component=True)
        if not any(map(pattern.match, parameter_names)):
            raise ValueError(
                f"layers: granularity {granularity!r} matches none of {len(parameter_names)} "
                f"parameters, such as {parameter_names[0]!r}; it must match from the start of a "
                f"name to the end of a dotted component"
            )
    layers: dict[str, list[int]] = {}
    for index, name in enumerate(parameter_names):
        layers.setdefault(layer_of(name, granularity), []).append(index)
    return layers


def select(names: Iterable[str], patterns: Names, *, operation: str = "layers.select") -> list[str]:
    """Those of ``names`` that ``patterns`` ask for, in the order of ``names``, each once.

    A pattern is an exact name, or ``re:`` and a regular expression that must match a whole name.
    ``operation`` opens the error messages.

    Raises ValueError for a pattern that selects nothing (with the nearest names) or is not a
    valid regular expression, TypeError for anything but a collection of strings.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise TypeError(f"{operation}: expected a list of names, got {patterns!r}")
    names = list(names)
    known, chosen = set(names), set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{operation}: expected names as strings, got {pattern!r}")
        if pattern.startswith("re:"):
            match = _pattern(pattern).fullmatch
            found = {name for name in names if match(name)}
        else:
            found = {pattern} & known
        if not found:
            near = _nearest(pattern, names)
            raise ValueError(f"{operation}: {pattern!r} names nothing here; {near}")
        chosen |= found
    return [name for name in dict.fromkeys(names) if name in chosen]


@lru_cache(maxsize=64)
def _pattern(text: str, ends_component: bool = False) -> re.Pattern[str]:
    body = text.removeprefix("re:")
    try:
        re.compile(body)
    except re.error as error:
        raise ValueError(f"layers: {text!r} is not a valid regular expression: {error}") from None
    return re.compile(f"(?:{body})(?![^.])" if ends_component else body)


def _nearest(wanted: str, names: Sequence[str]) -> str:
    if not names:
        return "there are no names to choose from"
    # Part of a long name scores low in difflib: whole dotted parts come first.
    parts = [name for name in names if f".{wanted}." in f".{name}."]
    near = difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)
    best = list(dict.fromkeys(parts[:4] + near))[:4]
    if best:
        return "the nearest are " + ", ".join(map(repr, best))
    return f"there are {len(names)}, from {names[0]!r} to {names[-1]!r}"
