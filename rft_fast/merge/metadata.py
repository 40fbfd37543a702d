"""What a merged file says of itself: provenance, and activations as the reader of checkpoints finds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import rft_fast
from rft_fast.checkpoints.stored import ACTIVATIONS, PROVENANCE

_CONFIGS = {"image": "vision_cfg", "text": "text_cfg"}  # as open_clip's configurations call the towers

_UNKNOWN: dict[str, dict[str, Any]] = {
    "vision_cfg": {"layers": []}
}  # a tower of which the reader infers no activation


def source(
    file: object, sha256: str, role: str, difference: bool = False, key: str | None = None
) -> dict[str, Any]:
    """Describe a file that a result was made of.

    Args:
        file: its path, or what it was fetched as.
        sha256: of its content.
        role: ``zero-shot`` or ``fine-tuned``.
        difference: whether it was added as a difference.
        key: which weights of the file, where it has several sets.
    """
    found = {"file": str(file), "sha256": sha256, "role": role}
    return {**found, **({"key": key} if key else {}), **({"difference": True} if difference else {})}


def texts(
    method: str,
    numbers: Mapping[str, object],
    sources: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    quick: Mapping[str, bool],
    **more: object,
) -> dict[str, str]:
    """Make the metadata of a file.

    Args:
        method: of the merge.
        numbers: values of its options.
        sources: as of :func:`source`.
        notes: what to know of the result.
        quick: tower -> whether it has QuickGELU, where that is known.
        more: further entries of the provenance.
    """
    origin = {
        "version": rft_fast.__version__,
        "method": method,
        "numbers": numbers,
        "sources": sources,
        "notes": notes,
        **more,
    }
    return _with_activations(origin, quick)


def rewritten(origin: Mapping[str, Any], notes: Sequence[str], quick: Mapping[str, bool]) -> dict[str, str]:
    """Make the metadata of a file that is written again, with other notes; arguments as of :func:`texts`."""
    return _with_activations({**origin, "notes": notes}, quick)


def _with_activations(origin: Mapping[str, Any], quick: Mapping[str, bool]) -> dict[str, str]:
    found = {PROVENANCE: json.dumps(origin)}
    for value in set(quick.values()):
        towers = dict(_UNKNOWN) | {_CONFIGS[tower]: {} for tower, other in quick.items() if other is value}
        found[ACTIVATIONS[value]] = json.dumps({"quick_gelu": value, **towers})
    return found
