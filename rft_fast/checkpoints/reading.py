"""One file -> its tensors under canonical names, with what to know of them."""

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
    """What a file holds.

    file: where. format: one of ``FORMATS``. tensors: under canonical names, in the file's order, dtypes and
    shapes as stored, on the CPU; ``tensors.activation`` is what the file, or a configuration beside it, says
    of its activations. notes: what was left out, and what to know, in words. doubts: those of them that may
    make its numbers others here; :func:`load` and :func:`load_head` warn of them.
    """

    file: pathlib.Path
    format: Format
    tensors: Tensors
    notes: tuple[str, ...]
    doubts: tuple[str, ...] = ()


def read(path: str | PathLike[str], format: Format | None = None) -> Checkpoint:
    """What a checkpoint holds, under canonical names.

    path: a file in one of the formats in ``FORMATS``; its content decides, not its name.
    format: the format that it must have; None: whichever it is.

    Tensors are dense and contiguous, without gradients; integer ones are kept as they are (a Path copies
    them), and ``logit_scale`` is 0-d or 1-d as stored. They are in memory of their own: writing to them does
    not change the file, nor what is written to the file them.
    Names: the wrappers ``module.``, ``_orig_mod.`` (torch.compile's), ``model.`` and ``image_encoder.model.``
    in front are dropped, in whatever order, and those of Hugging Face become open_clip's (q, k and v joined,
    projections transposed): the image tower is ``visual.*``, the head ``classification_head.weight`` and
    ``.bias``, the text tower's names stand bare.

    Nothing in the file is executed: pickles go through a reader of its own (:mod:`.pickles`), which builds
    tensors, plain values and inert shells of modules, and refuses all calls but those that tensors need.

    Raises ValueError for a file that is missing, empty, damaged or in another format; that asks for
    code to run; that holds anything but tensors; in which two names become one; or that is not in the
    format that is asked for.
    """
    return _read(path, format, "read")


def load(
    path: str | PathLike[str], device: str | torch.device = "cpu", format: Format | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, under canonical names; as :func:`read`, on ``device``.

    The dict has what the file says of its activations (``.activation``), by which
    :class:`rft_fast.clip.endpoints.Ends` judges the architecture.

    device: ``"meta"`` gives types and shapes alone, and reads no more than tells them.
    """
    target = torch.device(device)
    found = _read(path, format, "load", target.type == "meta").tensors
    return Tensors({name: tensor.to(target) for name, tensor in found.items()}, found.activation)


def load_head(path: str | PathLike[str]) -> dict[str, Tensor]:
    """A head: ``classification_head.weight`` [classes, features] and, where it has one, ``.bias`` [classes].

    path: a file that holds a head alone (``weight`` and ``bias`` bare, or a pickled ClassificationHead, as
        WiSE-FT and task vectors write it), or a checkpoint that has one.

    Raises ValueError as :func:`read` does, and for a file without a head or with one of other shapes.
    """
    found = _read(path, None, "load_head").tensors
    head = {name: tensor for name, tensor in found.items() if name.startswith(HEAD)}
    if not head and set(found) <= {"weight", "bias"}:
        head = {HEAD + name: tensor for name, tensor in found.items()}
    weight, bias = head.get(HEAD_WEIGHT), head.get(HEAD_BIAS)
    if weight is None:
        raise ValueError(
            f"load_head: {path} has no head: neither {HEAD_WEIGHT!r} nor 'weight' alone, but "
            f"{len(found)} tensors from {next(iter(found))!r} on"
        )
    if weight.ndim != 2 or 0 in weight.shape or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in head.items())
        raise ValueError(
            f"load_head: {path} must have a head [classes, features] with bias [classes], got {shapes}"
        )
    return head


def sha256(path: str | PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits: tells which weights a run used."""
    return files.sha256(_existing(path, "sha256"))


def _read(path: str | PathLike[str], format: Format | None, operation: str, meta: bool = False) -> Checkpoint:
    if format is not None and format not in FORMATS:
        raise ValueError(f"{operation}: there is no format {format!r}; {suggestion(format, FORMATS)}")
    file = _existing(path, operation)
    evidence = Evidence()
    try:
        with files.opened(file) as stream:
            content = containers.read(stream, file)
            found, tensors, notes, doubts = layouts.tensors(content, format, evidence, meta)
    except (Unreadable, OSError) as error:
        raise ValueError(f"{operation}: {file} {error}") from error
    evidence.add_all(beside(file, found == "huggingface"))
    activation, contradictions = evidence.judged()
    notes += [*notes_of(activation), *contradictions]
    if integers := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        notes.append(f"not floating-point, copied and never interpolated: {some(integers, 3)}")
    if operation != "read":
        for doubt in doubts:
            warnings.warn(f"{file}: {doubt}, so its scores may differ from its own code's", stacklevel=3)
    return Checkpoint(file, found, Tensors(tensors, activation), (*doubts, *notes), tuple(doubts))


def _existing(path: str | PathLike[str], operation: str) -> pathlib.Path:
    file = pathlib.Path(path)
    if file.is_dir():
        raise ValueError(f"{operation}: {file} is a directory, expected a checkpoint file in it")
    if kind := files.special(file):
        raise ValueError(f"{operation}: {file} is {kind}, expected a checkpoint file")
    if not file.is_file():
        raise ValueError(f"{operation}: there is no file {file}")
    return file
