"""Reading a checkpoint file: its tensors under canonical names, its format, and notes."""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from ..common import files
from ..common.pickles import Unreadable
from ..common.words import some, suggestion, visible
from ..names import FORMATS, Format
from . import adapters, folders, layouts, sharded
from .activation import Activation, Evidence, Tensors, beside, notes_of
from .canonical import HEAD, HEAD_BIAS, HEAD_WEIGHT
from .entries import Entry
from .stored import PROVENANCE, ContainerKind, Maker


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        file: its path; of a sharded checkpoint its index.
        format: a key of ``FORMATS``.
        tensors: by canonical name, in the file's order, with dtypes and shapes as stored, on the CPU;
            ``tensors.activation`` has the activations that the file, or a configuration beside it, shows.
        notes: what was left out, and what else to know, in words.
        doubts: notes on computations of the model that are not reproduced here; :func:`load` and
            :func:`load_head` warn of them.
    """

    file: pathlib.Path
    format: Format
    tensors: Tensors
    notes: tuple[str, ...]
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Opened:
    """A checkpoint of which each tensor is read when it is asked for (:func:`opened`).

    Attributes:
        file: as of :class:`Checkpoint`.
        format: as of :class:`Checkpoint`.
        container: kind of the file.
        entries: canonical name -> the tensors of the file that it is made of: shape, dtype, names in the
            file, and ``split``, by which a new value is written back under these.
        path: keys of the dicts that hold the tensors, outermost first; empty if the file is the state dict.
        metadata: of a safetensors header, or what rft_fast.merge added to an archive of torch.save.
        activation: as of ``Checkpoint.tensors``.
        notes: as of :class:`Checkpoint`.
        doubts: as of :class:`Checkpoint`.
    """

    file: pathlib.Path
    format: Format
    container: ContainerKind
    entries: Mapping[str, Entry]
    path: tuple[str, ...]
    metadata: Mapping[str, str]
    activation: Mapping[str, Activation]
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    _size: int

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Args:
            name: canonical name, a key of ``entries``.

        Raises:
            ValueError: it is damaged.
        """
        try:
            return self.entries[name].make(Maker(self._size, keep=False))
        except (Unreadable, OSError) as error:
            raise ValueError(f"read: {self.file} {error}") from error


@contextmanager
def opened(
    path: str | PathLike[str],
    format: Format | None = None,
    key: str | None = None,
    *,
    operation: str = "read",
) -> Iterator[Opened]:
    """Open a checkpoint without reading its tensors.

    Args:
        path: as for :func:`read`.
        format: as for :func:`read`.
        key: as for :func:`read`.
        operation: what the messages of errors begin with.

    Yields:
        The open checkpoint.

    Raises:
        ValueError: as :func:`read`.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"{operation}: there is no format {format!r}; {suggestion(format, FORMATS)}")
    file = folders.located(path, operation)
    evidence = Evidence()
    with ExitStack() as stack:
        try:
            content = stack.enter_context(sharded.opened(file))
            layout = layouts.layout(content, format, evidence, key)
            named = folders.conventional(folders.parts(file))
        except (Unreadable, OSError) as error:
            raise ValueError(f"{operation}: {file} {error}") from error
        evidence.add_all(beside(named, layout.format == "huggingface"))
        activation, contradictions = evidence.judged()
        notes = [*layout.notes, *notes_of(activation), *contradictions]
        if adapters.is_adapter(file):
            notes.append(
                "a LoRA adapter of peft, which needs base weights: base=, --base FILE; in a sweep, "
                "the zero-shot model"
            )
        if integers := [name for name, e in layout.entries.items() if not e.dtype.is_floating_point]:
            notes.append(
                f"copied instead of interpolated, because they are not floating-point: {some(integers, 3)}"
            )
        notes += _merged_from(content.metadata)
        yield Opened(
            file,
            layout.format,
            content.kind,
            layout.entries,
            layout.path,
            content.metadata,
            activation,
            (*layout.doubts, *notes),
            tuple(layout.doubts),
            content.size,
        )


def _merged_from(metadata: Mapping[str, str]) -> list[str]:
    """Describe what a file of rft_fast.merge was made of."""
    try:
        origin = json.loads(metadata[PROVENANCE])
        names = some([pathlib.PurePath(source["file"]).name for source in origin["sources"]])
        numbers = "".join(f", {name} {json.dumps(value)}" for name, value in origin["numbers"].items())
        return [visible(f"written by rft_fast.merge: {origin['method']}{numbers}, of {names}")]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return []  # of something else


def read(
    path: str | PathLike[str],
    format: Format | None = None,
    key: str | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Read a checkpoint.

    Of a training checkpoint, the one dict of tensors (or pickled module) is taken. Components of names that
    wrappers add (``module``, ``_orig_mod``, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``) are
    dropped at any place, and so is what precedes the model: ``model.``, ``image_encoder.model.``, and, with a
    note, any other prefix of the image tower. Names of Hugging Face become open_clip's (q, k and v joined,
    projections transposed): image tower ``visual.*``, head ``classification_head.weight`` and ``.bias``, text
    tower without a prefix.

    Nothing in the file is executed: pickles are read by :mod:`.pickled_tensors`, which builds tensors, plain
    values and inert shells of modules, and refuses all calls except those that tensors need.

    Args:
        path: a file in one of the ``FORMATS``, whose content decides, not its name; the index of a sharded
            checkpoint; or a folder with either, as ``save_pretrained`` writes it.
        format: the required format; None: any.
        key: which weights, if the file has several: the keys of its dicts, or the first components of names,
            joined by dots (the last key alone if that is unique), such as ``state_dict_ema`` or ``teacher``.
        base: of a LoRA adapter of peft (:func:`is_adapter`): the weights that it is added to, by canonical
            name; None: its factors are read as they are. Other checkpoints take none.

    Returns:
        Its content. Tensors are dense, contiguous, without gradients, and in memory of their own: neither
        writing to them nor to the file changes the other. Integer tensors are kept (a Path copies them);
        ``logit_scale`` is 0-d or 1-d as stored.

    Raises:
        ValueError: the file is missing, empty, damaged or in an unknown format; calls code; holds anything
            but tensors where the weights are; has several sets of weights and no key chooses; is one shard of
            several; has two names that become one; or is not in the required format.
    """
    return _read(path, format, key, "read", base=base)


def load(
    path: str | PathLike[str],
    device: str | torch.device = "cpu",
    format: Format | None = None,
    key: str | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint.

    Args:
        path: as for :func:`read`.
        device: where the tensors are put; ``"meta"``: dtypes and shapes only, without reading the bytes of
            tensors.
        format: as for :func:`read`.
        key: as for :func:`read`.
        base: as for :func:`read`.

    Returns:
        Canonical name -> tensor; its attribute ``activation`` has the activations that the file shows, by
        which :class:`rft_fast.clip.Ends` checks the architecture.

    Raises:
        ValueError: as :func:`read`.
    """
    target = torch.device(device)
    tensors = _read(path, format, key, "load", target.type == "meta", base).tensors
    return Tensors({name: tensor.to(target) for name, tensor in tensors.items()}, tensors.activation)


def load_head(path: str | PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """Load a classification head.

    Args:
        path: a file with a head alone (``weight`` and ``bias``, or a pickled ClassificationHead, as WiSE-FT
            and task vectors write it), or a checkpoint with a head.
        key: as for :func:`read`.

    Returns:
        ``classification_head.weight`` [classes, features] and, if present, ``classification_head.bias``
        [classes].

    Raises:
        ValueError: as :func:`read`; or the file has no head, or one of other shapes.
    """
    tensors = _read(path, None, key, "load_head").tensors
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    if not head and set(tensors) <= {"weight", "bias"}:
        head = {HEAD + name: tensor for name, tensor in tensors.items()}
    weight, bias = head.get(HEAD_WEIGHT), head.get(HEAD_BIAS)
    if weight is None:
        raise ValueError(
            f"load_head: {path} has no head: expected {HEAD_WEIGHT!r}, or a single 'weight'; got "
            f"{len(tensors)} tensors, the first is {next(iter(tensors))!r}"
        )
    if weight.ndim != 2 or 0 in weight.shape or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in head.items())
        raise ValueError(
            f"load_head: {path} must have a head [classes, features] with bias [classes], got {shapes}"
        )
    return head


def sha256(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a checkpoint as 64 hexadecimal digits; it identifies the weights of a run.

    Args:
        path: a file; or an index or a folder, as for :func:`read`.

    Returns:
        That of the file; of several files that of the lines that ``sha256sum`` prints for them, the index
        first.

    Raises:
        ValueError: it is missing, or is not a regular file.
    """
    folders.located(path, "sha256")
    return folders.digest({file: files.sha256(file) for file in folders.parts(path)})


def _read(
    path: str | PathLike[str],
    format: Format | None,
    key: str | None,
    operation: str,
    meta: bool = False,
    base: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    if base is not None or format == "lora":
        return _adapted(path, format, key, base, operation)
    with opened(path, format, key, operation=operation) as found:
        maker = Maker(found._size, meta)
        try:
            tensors = {name: entry.make(maker) for name, entry in found.entries.items()}
        except (Unreadable, OSError) as error:
            raise ValueError(f"{operation}: {found.file} {error}") from error
    if operation != "read":
        for doubt in found.doubts:
            warnings.warn(
                f"{found.file}: {doubt}, so its accuracy may differ from that in its own code", stacklevel=3
            )
    return Checkpoint(found.file, found.format, Tensors(tensors, found.activation), found.notes, found.doubts)


def _adapted(
    path: str | PathLike[str],
    format: Format | None,
    key: str | None,
    base: Mapping[str, Tensor] | None,
    operation: str,
) -> Checkpoint:
    """Add an adapter to its base."""
    file = folders.located(path, operation)
    if not adapters.is_adapter(file):
        raise ValueError(
            f"{operation}: {file} is not an adapter of peft (adapter_model.safetensors or .bin "
            "with adapter_config.json beside it), so leave base out"
        )
    if base is None or format not in (None, "lora"):
        raise ValueError(f"{operation}: {file} is an adapter of peft: it needs base, and the format 'lora'")
    if key is not None:
        raise ValueError(
            f"{operation}: {file} is an adapter of peft, from which key {key!r} cannot select; leave key out"
        )
    try:
        tensors, notes = adapters.merged(file, base)
    except (Unreadable, OSError) as error:
        raise ValueError(f"{operation}: {file} {error}") from error
    return Checkpoint(file, "lora", tensors, tuple(notes))
