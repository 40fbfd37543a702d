"""What a file holds -> its format, and where its tensors are, by canonical name (:mod:`.canonical`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..common.parametrised import factors
from ..common.pickles import Unreadable
from ..common.words import some
from ..names import FORMATS, Format
from . import huggingface
from .activation import TOWERS, Evidence, of_metadata
from .canonical import HEAD
from .entries import Entries, Entry
from .selecting import select
from .stored import Container, ContainerKind

_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")


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
    "lora": lambda of: False,  # read with its base, by adapters
    "state-dict": lambda of: of.plain(),
}


@dataclass(frozen=True)
class Layout:
    """What a file holds, by canonical name; no bytes of tensors are read yet.

    Attributes:
        format: a key of ``FORMATS``.
        entries: canonical name -> where its tensor is, in the file's order.
        path: keys of the dicts that hold the tensors, outermost first.
        notes: what was left out.
        doubts: computations of the model that the tensors do not show, so that its results may differ here.
    """

    format: Format
    entries: Entries
    path: tuple[str, ...]
    notes: list[str]
    doubts: list[str]


def layout(container: Container, format: Format | None, evidence: Evidence, key: str | None = None) -> Layout:
    """Determine the format of a file, and where its tensors are, by canonical name.

    Args:
        container: what the file holds.
        format: the required format; None: any.
        evidence: collects evidence of activations.
        key: which of several sets of weights (:func:`.selecting.select`).

    Raises:
        Unreadable: the file holds no tensors of a model, two names become one, or the format does not fit.
    """
    chosen = select(container, key)
    state, notes, doubts = chosen.state, chosen.notes, []
    kind = None
    if chosen.module is not None:
        kind = chosen.module.kind
        doubts = [
            f"{chosen.place(f'{where}.') or where} does not normalise its input "
            "(normalize=False), but rft_fast does"
            for where in chosen.module.unnormalised
        ]
        for name, prefix in chosen.module.classes:
            evidence.add_class(name, chosen.place(prefix))
        if not evidence and len(container.activations) == 1:
            (quick,) = container.activations
            evidence.add_all((tower, quick, "its TorchScript code") for tower in TOWERS)
    evidence.add_all(of_metadata(container.metadata))
    shape = _Layout(container.kind, kind, chosen.path[-1:] == ("state_dict",), frozenset(state))
    detected = next(name for name, fits in _FITS.items() if fits(shape))
    if format is not None and not _FITS[format](shape):
        raise Unreadable(f"has the format {detected!r} ({FORMATS[detected]}), not {format!r}")
    taken = format or detected
    unmerged = [f"holds {what} ({some(names, 3)})" for what, names in factors(state).items()]
    notes += unmerged
    if unmerged and taken == "huggingface":
        raise Unreadable(unmerged[0])
    if taken == "openai" and (dropped := [name for name in _OPENAI_NUMBERS if name in state]):
        notes.append(f"left out, sizes of the model: {', '.join(dropped)}")
        state = {name: value for name, value in state.items() if name not in dropped}
    if taken == "huggingface":
        entries = huggingface.entries(state, chosen.origin, notes)
    else:
        entries = {name: Entry.of(chosen.origin[name], value) for name, value in state.items()}
    if not entries:
        raise Unreadable("holds no tensors")
    return Layout(taken, entries, chosen.path, notes, doubts)
