"""Replacements of functions that pickles of several kinds of files call."""

from __future__ import annotations

from typing import Any

from .machine import Machine


def encode(machine: Machine, text: str, encoding: str = "latin1") -> bytes:
    """Replace ``_codecs.encode``, which writes bytes for Python 2."""
    machine.spend(len(text))
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are written in an unknown encoding")
    return text.encode("latin1")


def made_set(machine: Machine, values: Any = ()) -> set[Any]:
    """Replace ``set`` and ``frozenset``."""
    machine.spend(len(values))
    return {machine.key(value) for value in values}


def ordered_dict(machine: Machine, pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """Replace ``OrderedDict`` and ``Counter``."""
    result: dict[Any, Any] = {}
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    machine.spend(len(pairs))
    machine.items(result, ((key, value) for key, value in pairs))
    return result
