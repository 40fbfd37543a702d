"""What a file holds -> its format, and tensors under canonical names (:mod:`.canonical`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..common.parametrised import factors
from ..common.pickles import Global, Shell, Unreadable, kind_of
from ..common.words import some
from ..names import FORMATS, Format
from . import huggingface
from .activation import TOWERS, Evidence, of_metadata
from .canonical import HEAD
from .foreign import SUPPORTED
from .stored import Container, ContainerKind, Maker, Special, Stored

# Allowed beside 'state_dict' in a checkpoint: they describe the training, not the model.
TRAINING_FIELDS = frozenset(
    {"args", "arch", "epoch", "global_step", "name", "optimizer", "scaler", "scheduler", "step"}
)

# Prefixes of DataParallel and torch.compile, in any order and at any level.
_WRAPPED = r"(?:(?:module|_orig_mod)\.)*"
_WRAPPER = re.compile(rf"\A{_WRAPPED}(?:(?:image_encoder\.{_WRAPPED})?model\.{_WRAPPED})?")
_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_TENSORS = (Tensor, Stored, Special)
# Limits far above any model: a module that is shared unfolds at every place.
_DEEPEST = 100
_MOST_ENTRIES = 1_000_000
_LONGEST_NAME = 1_000


@dataclass(frozen=True)
class _Layout:
    """What a file holds, before names become canonical.

    Attributes:
        container: kind of the container.
        kind: class of a pickled module; None for a state dict.
        wrapped: whether the state dict was the entry of a training checkpoint.
        names: of the tensors, without prefixes of wrappers.
    """

    container: ContainerKind
    kind: str | None
    wrapped: bool
    names: frozenset[str]

    def begins(self, *starts: str) -> bool:
        return any(name.startswith(starts) for name in self.names)

    def headed(self) -> bool:
        return self.begins(HEAD)

    def plain(self) -> bool:
        return self.kind is None


def _is_kind(layout: _Layout, name: str) -> bool:
    return layout.kind is not None and layout.kind.rpartition(".")[2] == name


# The first that fits is the format of a file; a requested format must fit as well.
_FITS: Mapping[Format, Callable[[_Layout], bool]] = {
    "openai": lambda of: of.container == "torchscript",
    "wiseft": lambda of: _is_kind(of, "ImageClassifier"),
    "flyp": lambda of: _is_kind(of, "CLIPEncoder"),
    "task-vector": lambda of: of.kind is not None and of.container != "torchscript",
    "huggingface": lambda of: of.plain() and of.begins("vision_model.", "text_model."),
    "open_clip": lambda of: (
        of.plain()
        and of.begins("visual.")
        and (of.wrapped or ("logit_scale" in of.names and not of.headed()))
    ),
    "soup": lambda of: of.plain() and of.begins("visual.") and of.headed(),
    "state-dict": lambda of: of.plain(),
}


@dataclass(frozen=True, eq=False)
class Described:
    """What a file holds, before its tensors are made.

    Attributes:
        format: of the file.
        state: name without prefixes of wrappers -> tensor, in the file's order; of Hugging Face files, under
            their own names.
        origin: the same names -> names in the file.
        notes: what was left out.
        doubts: computations of the model that the tensors do not show, so that its results may differ here.
    """

    format: Format
    state: Mapping[str, Any]
    origin: Mapping[str, str]
    notes: list[str]
    doubts: list[str]


def tensors(
    container: Container, format: Format | None, evidence: Evidence, meta: bool = False
) -> tuple[Format, dict[str, Tensor], list[str], list[str]]:
    """Determine the format of a file, and its tensors under canonical names.

    Args:
        container: what the file holds.
        format: the required format; None: any.
        evidence: collects evidence of activations.
        meta: make tensors on the device ``meta``, without reading their bytes.

    Returns:
        The format; the tensors in the file's order; notes and doubts, as of :class:`Described`.

    Raises:
        Unreadable: the file holds no tensors of a model, two names become one, or the format does not fit.
    """
    found = describe(container, format, evidence)
    maker = Maker(container.size, meta)
    made = {name: _dense(value, found.origin[name], maker) for name, value in found.state.items()}
    if found.format == "huggingface":
        made = huggingface.converted(made, found.notes)
    if not made:
        raise Unreadable("holds no tensors")
    return found.format, made, found.notes, found.doubts


def describe(container: Container, format: Format | None, evidence: Evidence) -> Described:
    """Determine the format of a file and the names of its tensors, without making these.

    Args:
        container: what the file holds.
        format: the required format; None: any.
        evidence: collects evidence of activations.

    Raises:
        Unreadable: as :func:`tensors`.
    """
    notes: list[str] = []
    doubts: list[str] = []
    value, kind, wrapped = container.value, None, False
    state: Mapping[str, Any]
    if isinstance(value, Shell) and not value.items:
        kind, state = _inner_kind(value), _module(value, container, doubts, evidence)
        if not evidence and len(container.activations) == 1:
            (quick,) = container.activations
            evidence.add_all((tower, quick, "its TorchScript code") for tower in TOWERS)
    else:
        state, wrapped = _state_dict(value.items if isinstance(value, Shell) else value, notes)
    evidence.add_all(of_metadata(container.metadata))
    state, origin = _unwrapped(state)
    layout = _Layout(container.kind, kind, wrapped, frozenset(state))
    detected = next(name for name, fits in _FITS.items() if fits(layout))
    if format is not None and not _FITS[format](layout):
        raise Unreadable(f"is not in the format {format!r} but {detected!r} ({FORMATS[detected]})")
    chosen = format or detected
    unmerged = [f"holds {what} ({some(names, 3)})" for what, names in factors(state).items()]
    notes += unmerged
    if unmerged and chosen == "huggingface":
        raise Unreadable(unmerged[0])
    if chosen == "openai":
        state = huggingface.without(state, _OPENAI_NUMBERS, "sizes of the model", notes)
    return Described(chosen, state, origin, notes, doubts)


# --- dicts ----------------------------------------------------------------------------------------


def _state_dict(content: Any, notes: list[str]) -> tuple[Mapping[str, Any], bool]:
    """Return the state dict in a value, and whether it was the entry of a training checkpoint."""
    wrapped = isinstance(content, Mapping) and isinstance(content.get("state_dict"), (Mapping, Shell))
    if wrapped:
        known = TRAINING_FIELDS | {"state_dict"}
        if unknown := [repr(name)[:80] for name in content if name not in known]:
            raise Unreadable(
                f"holds {some(unknown)} beside 'state_dict', so it is unclear which weights to use "
                f"(allowed beside it: {', '.join(sorted(TRAINING_FIELDS))}). Save the state dict "
                "alone"
            )
        if len(content) > 1:
            notes.append(
                "left out, state of the training: "
                f"{', '.join(name for name in content if name != 'state_dict')}"
            )
        content = content["state_dict"]
        content = content.items if isinstance(content, Shell) else content
    if not isinstance(content, Mapping):
        raise Unreadable(f"holds a {_type(content)}. Supported: {SUPPORTED}")
    if not content:
        raise Unreadable("holds no tensors")
    foreign = [
        f"{name!r} ({_type(value)})"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, _TENSORS))
    ]
    if foreign:
        raise Unreadable(
            f"must map names to tensors, but holds {some(foreign)}; save the state dict without them"
        )
    return content, wrapped


def _unwrapped(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Drop prefixes of wrappers; return the tensors, and canonical name -> name in the file."""
    result: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for stored, value in state.items():
        if len(stored) > _LONGEST_NAME or not stored.isprintable():
            raise Unreadable(f"has a tensor with an invalid name: {stored[:40]!r}")
        name = _WRAPPER.sub("", stored)
        if name in result:
            raise Unreadable(
                f"has both {origin[name]!r} and {stored!r}, which are both {name!r} "
                "once the wrapper's prefix is dropped; keep one of them"
            )
        origin[name] = stored
        result[name] = value
    return result, origin


def _dense(value: Any, name: str, maker: Maker) -> Tensor:
    """Make a tensor; refuse other values by name."""
    if isinstance(value, Stored):
        try:
            return maker.tensor(value)
        except Unreadable as error:
            raise Unreadable(f"has {name!r}, which {error}") from error
    raise Unreadable(f"has {name!r}, which must be a dense tensor; it is a {value}")


# --- modules --------------------------------------------------------------------------------------


def _inner_kind(shell: Shell) -> str:
    """Return the class of a module; of a DataParallel, that of the module inside."""
    while str(shell).endswith(("DataParallel", "DistributedDataParallel")):
        inner = shell.state.get("_modules")
        if not isinstance(inner, dict) or not isinstance(inner.get("module"), Shell):
            break
        shell = inner["module"]
    return str(shell)


def _module(root: Shell, container: Container, doubts: list[str], evidence: Evidence) -> dict[str, Any]:
    """Collect the state dict of a module: parameters, persistent buffers, and those of its submodules."""
    script = container.kind == "torchscript"
    result: dict[str, Any] = {}
    entries = 0
    waiting: list[tuple[str, Shell, int]] = [("", root, 0)]
    while waiting:
        prefix, shell, depth = waiting.pop()
        own, children = _script_parts(shell, container.own) if script else _module_parts(shell)
        entries += 1 + len(own) + len(children) + len(shell.state)
        if depth > _DEEPEST or entries > _MOST_ENTRIES or len(prefix) > _LONGEST_NAME:
            raise Unreadable("holds too many nested modules; nothing was executed")
        if shell.state.get("normalize") is False:
            where = prefix.removesuffix(".") or str(shell)
            doubts.append(f"{where} does not normalise its input (normalize=False); rft_fast does")
        where = _WRAPPER.sub("", prefix)
        for named in (shell, *(value for value in shell.state.values() if isinstance(value, Global))):
            evidence.add_class(str(named), where)
        result.update((prefix + name, value) for name, value in own if value is not None)
        # A stack: reversed, so that modules keep their order.
        waiting += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children)]
    return result


def _module_parts(shell: Shell) -> tuple[list[tuple[str, Any]], list[tuple[str, Shell]]]:
    """Return the tensors and the submodules of a pickled module."""
    tables = [shell.state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    parameters, buffers, modules = (table if isinstance(table, dict) else None for table in tables)
    if parameters is None or buffers is None or modules is None:
        raise Unreadable(f"holds a {shell}, which is not a torch module. Supported: {SUPPORTED}")
    passing = shell.state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set) else ()
    own = [*parameters.items(), *((name, value) for name, value in buffers.items() if name not in passing)]
    children = [(name, child) for name, child in modules.items() if child is not None]
    for name, value in own:
        if not isinstance(name, str) or not isinstance(value, (*_TENSORS, type(None))):
            raise Unreadable(f"has {name!r} in a {shell}, which should be a tensor; it is a {_type(value)}")
    for name, child in children:
        if not isinstance(name, str) or not isinstance(child, Shell):
            raise Unreadable(f"has {name!r} in a {shell}, which should be a module; it is a {_type(child)}")
    return own, children


def _script_parts(
    shell: Shell, names: Mapping[str, frozenset[str]]
) -> tuple[list[tuple[str, Any]], list[tuple[str, Shell]]]:
    """Return the tensors and the submodules of a TorchScript module, which keeps all attributes in one table.

    ``names``: class -> its parameters and buffers.
    """
    known = names.get(shell.kind.name)
    named = [(name, value) for name, value in shell.state.items() if isinstance(name, str)]
    own = [
        (name, value)
        for name, value in named
        if isinstance(value, Stored) and (known is None or name in known)
    ]
    return own, [(name, value) for name, value in named if isinstance(value, Shell)]


def _type(value: Any) -> str:
    if isinstance(value, (Stored, Tensor)):
        return "Tensor"
    return kind_of(value)
