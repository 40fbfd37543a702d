"""Reading a checkpoint file: its tensors under canonical names, its format, and notes."""

from __future__ import annotations

import pathlib
import warnings
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from ..common import files
from ..common.pickles import Unreadable
from ..common.words import some, suggestion
from ..names import FORMATS, Format
from . import containers, layouts
from .activation import Evidence, Tensors, beside, notes_of
from .canonical import HEAD, HEAD_BIAS, HEAD_WEIGHT


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        file: its path.
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


def read(path: str | PathLike[str], format: Format | None = None) -> Checkpoint:
    """Read a checkpoint.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``, ``image_encoder.model.``, in any order) are
    dropped, and names of Hugging Face converted to open_clip's (q, k and v joined, projections transposed):
    image tower ``visual.*``, head ``classification_head.weight`` and ``.bias``, text tower without a prefix.

    Nothing in the file is executed: pickles are read by :mod:`.pickled_tensors`, which builds tensors, plain
    values and inert shells of modules, and refuses all calls except those that tensors need.

    Args:
        path: a file in one of the ``FORMATS``; its content decides, not its name.
        format: the required format; None: any.

    Returns:
        Its content. Tensors are dense, contiguous, without gradients, and in memory of their own: neither
        writing to them nor to the file changes the other. Integer tensors are kept (a Path copies them);
        ``logit_scale`` is 0-d or 1-d as stored.

    Raises:
        ValueError: the file is missing, empty, damaged or in an unknown format; calls code; holds anything
            but tensors; has two names that become one; or is not in the required format.
    """
    return _read(path, format, "read")


def load(
    path: str | PathLike[str], device: str | torch.device = "cpu", format: Format | None = None
) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint.

    Args:
        path: as for :func:`read`.
        device: where the tensors are put; ``"meta"``: dtypes and shapes only, without reading the bytes of
            tensors.
        format: as for :func:`read`.

    Returns:
        Canonical name -> tensor; its attribute ``activation`` has the activations that the file shows, by
        which :class:`rft_fast.clip.Ends` checks the architecture.

    Raises:
        ValueError: as :func:`read`.
    """
    target = torch.device(device)
    tensors = _read(path, format, "load", target.type == "meta").tensors
    return Tensors({name: tensor.to(target) for name, tensor in tensors.items()}, tensors.activation)


def load_head(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Load a classification head.

    Args:
        path: a file with a head alone (``weight`` and ``bias``, or a pickled ClassificationHead, as WiSE-FT
            and task vectors write it), or a checkpoint with a head.

    Returns:
        ``classification_head.weight`` [classes, features] and, if present, ``classification_head.bias``
        [classes].

    Raises:
        ValueError: as :func:`read`; or the file has no head, or one of other shapes.
    """
    tensors = _read(path, None, "load_head").tensors
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    if not head and set(tensors) <= {"weight", "bias"}:
        head = {HEAD + name: tensor for name, tensor in tensors.items()}
    weight, bias = head.get(HEAD_WEIGHT), head.get(HEAD_BIAS)
    if weight is None:
        raise ValueError(
            f"load_head: {path} has no head: expected {HEAD_WEIGHT!r}, or 'weight' alone; got "
            f"{len(tensors)} tensors, the first of them {next(iter(tensors))!r}"
        )
    if weight.ndim != 2 or 0 in weight.shape or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in head.items())
        raise ValueError(
            f"load_head: {path} must have a head [classes, features] with bias [classes], got {shapes}"
        )
    return head


def sha256(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a checkpoint file as 64 hexadecimal digits; it identifies the weights of a run.

    Args:
        path: an existing file.

    Raises:
        ValueError: it is missing, or is not a regular file.
    """
    return files.sha256(_existing(path, "sha256"))


def _read(path: str | PathLike[str], format: Format | None, operation: str, meta: bool = False) -> Checkpoint:
    if format is not None and format not in FORMATS:
        raise ValueError(f"{operation}: there is no format {format!r}; {suggestion(format, FORMATS)}")
    file = _existing(path, operation)
    evidence = Evidence()
    try:
        with files.opened(file) as stream:
            content = containers.read(stream, file)
            detected, tensors, notes, doubts = layouts.tensors(content, format, evidence, meta)
    except (Unreadable, OSError) as error:
        raise ValueError(f"{operation}: {file} {error}") from error
    evidence.add_all(beside(file, detected == "huggingface"))
    activation, contradictions = evidence.judged()
    notes += [*notes_of(activation), *contradictions]
    if integers := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        notes.append(f"not floating-point, copied instead of interpolated: {some(integers, 3)}")
    if operation != "read":
        for doubt in doubts:
            warnings.warn(
                f"{file}: {doubt}, so its scores may differ from those of its own code", stacklevel=3
            )
    return Checkpoint(file, detected, Tensors(tensors, activation), (*doubts, *notes), tuple(doubts))


def _existing(path: str | PathLike[str], operation: str) -> pathlib.Path:
    file = pathlib.Path(path)
    if file.is_dir():
        raise ValueError(f"{operation}: {file} is a directory, expected a checkpoint file in it")
    if kind := files.special(file):
        raise ValueError(f"{operation}: {file} is {kind}, expected a checkpoint file")
    if not file.is_file():
        raise ValueError(f"{operation}: there is no file {file}")
    return file
