"""Layers: which parameters belong together.

A layer is the weight and bias of one module together, as in the paper (*In Search of the Successful
Interpolation*, Abdollahpoorrostam 2024). Other granularities:

=============  =================================================================================
granularity    layer of a parameter
=============  =================================================================================
``module``     its name without a trailing ``.weight``, ``.bias``, ``_weight`` or ``_bias``:
               ``...attn.in_proj``, ``...mlp.c_fc``, ``visual.conv1``, ``visual.class_embedding``
``block``      its name up to the first number, and further numbers that follow directly or
               after ``blocks`` or ``layers``: ``visual.transformer.resblocks.3``,
               ``visual.layer2.0``, ``visual.trunk.stages.2.blocks.5``. A name without a number
               keeps its ``module`` layer: ``visual.conv1``, ``classification_head``
``tensor``     its name
``re:<...>``   a regular expression, matched from the start of the name to the end of one of its
               dotted components. The layer is the first group, if the pattern has one and it
               matched, else the whole match: ``re:.*\\.(attn|mlp)``. A name that does not match
               keeps its ``module`` layer
=============  =================================================================================

Names match exactly: ``resblocks.1`` never matches ``resblocks.10``.
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
    """Return the layer of a parameter.

    Args:
        parameter_name: The full dotted name.
        granularity: See the table at the top of this module.

    Raises:
        ValueError: The granularity is unknown, or its regular expression is invalid.
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
    """Group parameters into layers.

    Args:
        parameter_names: The full dotted names, in the model's order.
        granularity: See the table at the top of this module.

    Returns:
        Layer -> indices of its parameters; layers in the order of their first parameter.

    Raises:
        ValueError: As :func:`layer_of` does; or a regular expression matches no name.
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
    """Select names by exact names and patterns.

    Args:
        names: The names to select from.
        patterns: Exact names, or ``re:`` and a regular expression that matches a whole name.
        operation: Start of the error messages.

    Returns:
        The selected names, in the order of ``names``, each once.

    Raises:
        TypeError: ``patterns`` is not a collection of strings.
        ValueError: A pattern selects nothing (the message lists the nearest names), or is not a valid regular
            expression.
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
            raise ValueError(f"{operation}: {pattern!r} matches no layer; {near}")
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
