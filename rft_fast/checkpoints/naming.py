"""Names of tensors without what wrappers add to them and what precedes the CLIP in a larger model."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..common.pickles import Unreadable
from ..common.words import some

# Components of names that wrappers add, at any place.
_WRAPPERS = frozenset(
    "module _orig_mod _fsdp_wrapped_module _fpw_module _checkpoint_wrapped_module _forward_module".split()
)
_START = re.compile(r"\A(?:image_encoder\.)?model\.")
CHOOSE = (
    "Choose one with --key NAME (--zeroshot-key for the zero-shot model; in a zoo: "
    'key = "NAME"; in Python: key="NAME"), or save it as a file of its own'
)
_MOST = 12  # prefixes
ROOT = "."  # as a key: the names without a prefix


def unwrapped(name: str) -> str:
    """Drop the components that wrappers add.

    Args:
        name: dotted; its last component, the tensor's own name, stays.
    """
    *modules, last = name.split(".")
    return ".".join((*(part for part in modules if part not in _WRAPPERS), last))


def under(name: str, key: str) -> str:
    """Return what follows a key in a name; empty if nothing does.

    Args:
        name: without the components of wrappers; the key may follow its usual prefix (``model.``).
        key: first components, without a final dot.
    """
    start = f"{key}."
    return next((n.removeprefix(start) for n in (name, _START.sub("", name)) if n.startswith(start)), "")


def canonical_names(names: Collection[str], notes: list[str]) -> dict[str, str]:
    """Return names -> names without what wrappers add and what precedes the CLIP in a larger model.

    Args:
        names: of tensors.
        notes: takes the prefixes that are dropped.

    Raises:
        Unreadable: they are of several models.
    """
    short = {name: stripped(unwrapped(name)) for name in names}
    dropped = prefixes(list(short.values()), notes)
    return {name: stripped(given, dropped) for name, given in short.items()}


def tower(name: str, towers: Collection[str] = ("visual", "vision_model")) -> str | None:
    """Return what precedes a tower in a name, with a final dot; None if the name is not of the tower.

    Args:
        name: without the components of wrappers.
        towers: components that mean the tower.
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts[:-1]) if part in towers), None)
    return None if place is None else "".join(f"{part}." for part in parts[:place])


def prefixes(names: Collection[str], notes: list[str]) -> tuple[str, ...]:
    """Find the prefixes of the CLIP in a larger model, longest first, which are to be dropped.

    Args:
        names: without the components of wrappers.
        notes: takes the prefixes.

    Raises:
        Unreadable: there are several models, such as a student and a teacher.
    """
    starts = dict.fromkeys(start for name in names if (start := tower(name)) is not None)
    text = (start for name in names if (start := tower(name, ("text_model",))) is not None)
    starts = starts or dict.fromkeys(text)
    if not any(starts):
        return ()
    refuse_many(starts)
    found = tuple(sorted(starts, key=len, reverse=True))
    if len(found) > 1:
        towers = [name for name in names if tower(name) is not None]
        if len({stripped(name, found) for name in towers}) < len(towers):
            raise _several(found)
    notes.append(f"removed, a prefix of names: {some([start for start in found if start])}")
    # A head beside the CLIP has a part of its prefix.
    parents = {start[: at + 1] for start in found for at, letter in enumerate(start) if letter == "."}
    return tuple(sorted(sorted(parents), key=len, reverse=True))


def refuse_many(starts: Collection[str]) -> None:
    """Refuse more prefixes of image towers than the parts of one model have.

    Raises:
        Unreadable: there are more than twelve.
    """
    if len(starts) > _MOST:
        raise _several(starts)


def _several(starts: Collection[str]) -> Unreadable:
    listed = some([repr(start.removesuffix(".") or ROOT) for start in starts], _MOST)
    return Unreadable(
        f"holds several models, which differ in the first part of their names: {listed}. {CHOOSE}"
    )


def stripped(name: str, prefixes: Collection[str] = ()) -> str:
    """Drop the usual prefix of a model, and the first of others that fits.

    Args:
        name: without the components of wrappers.
        prefixes: with a final dot.
    """
    name = _START.sub("", name)
    return next((name.removeprefix(start) for start in prefixes if name.startswith(start)), name)
