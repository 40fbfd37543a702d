"""Checkpoint files -> dicts of tensors under one set of names. Nothing in a file is executed."""

from __future__ import annotations

import hashlib
import pickletools
import re
import zipfile
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUPPORTED = (
    "safetensors files, and files of torch.save (torch 1.6 or newer) that hold a state dict, "
    "bare or under 'state_dict' as open_clip writes it"
)

# What may stand beside 'state_dict' in a checkpoint: it describes the training, not the model.
TRAINING_FIELDS = frozenset(
    {"args", "arch", "epoch", "global_step", "name", "optimizer", "scaler", "scheduler", "step"}
)

# What a pickle of tensors imports; the first import beside these is named to the reader.
_TENSOR_IMPORTS = re.compile(
    r"collections\.OrderedDict|"
    r"torch\.(_utils\._rebuild_\w+|(storage\.)?\w*Storage|Size|device|bool|[a-z]+\d\w*)"
)
_WRAPPER = re.compile(r"\A(?:module\.)?(?:(?:image_encoder\.)?model\.)?")


def load(path: str | PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint, under canonical names.

    path: a file in one of the formats in ``SUPPORTED``; its content decides, not its name.
    device: where the tensors go. On the CPU they are views of the memory-mapped file, read when
        first touched; writing to them never changes the file.

    Returns a dict in the file's order, every dtype and shape as stored (integer tensors included),
    dense and contiguous, without gradients. Names: the wrappers ``module.``, ``model.`` and
    ``image_encoder.model.`` in front are dropped, so that the image tower is ``visual.*``, the head
    ``classification_head.weight`` and ``.bias``, and the text tower's names stand bare, in
    model-soups, WiSE-FT and open_clip files alike.

    Nothing in the file is executed: pickled data goes through torch's ``weights_only`` reader,
    which builds tensors and containers and refuses all else.

    Raises ValueError for a file that is missing, empty, damaged or in another format; that asks for
    code to run; that holds anything but tensors; or in which two names become one.
    """
    file = _existing(path)
    target = torch.device(device)
    with file.open("rb") as stream:
        head = stream.read(9)
    if not head:
        raise ValueError(f"load: {file} is empty; it may be the rest of an interrupted download")
    if head.startswith(b"PK"):
        content = _read_torch(file)
    elif head[8:] == b"{" or file.suffix == ".safetensors":
        content = _read_safetensors(file)
    else:
        raise ValueError(f"load: {file} {_describe_unknown(file, head)}. Supported: {SUPPORTED}")
    return {name: t.to(target) for name, t in _canonical(_state_dict(content, file), file).items()}


def sha256(path: str | PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits: tells which weights a run used."""
    digest = hashlib.sha256()
    with _existing(path, "sha256").open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _existing(path: str | PathLike[str], operation: str = "load") -> Path:
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{operation}: {file} is a directory, expected a checkpoint file in it")
    if not file.is_file():
        raise ValueError(f"{operation}: there is no file {file}")
    return file


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {file} is not a whole safetensors file: {error}") from error


def _read_torch(file: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"load: {file} is a damaged or truncated zip file: {error}") from error
    names = {entry.filename.rpartition("/")[2]: entry for entry in entries}
    if "constants.pkl" in names:
        raise ValueError(
            f"load: {file} is a TorchScript archive, which holds code; nothing was executed. If "
            "you trust its origin, torch.jit.load it yourself and torch.save its state_dict(). "
            f"Supported: {SUPPORTED}"
        )
    if "data.pkl" not in names:
        raise ValueError(f"load: {file} is a zip, but not of torch.save. Supported: {SUPPORTED}")
    # torch.save stores its entries as they are; compressed ones could unfold to any size.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"load: {file} has compressed entries, which torch.save never writes and which cannot "
            "be memory-mapped; save it again with torch.save"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive surfaces as almost any exception
        # torch's own message is left to the traceback: it advises to read the file unsafely.
        name = None
        with suppress(Exception), zipfile.ZipFile(file) as archive:
            name = _foreign_import(archive.open(names["data.pkl"]))
        damaged = "cannot be read as tensors: it is damaged or holds more; nothing was executed"
        raise ValueError(f"load: {file} {damaged if name is None else _asks_for(name)}") from error


def _asks_for(name: str) -> str:
    return (
        f"asks for {name} while it is read: it is a pickle of objects, not of tensors, and reading "
        "it in full could run any code. Nothing was executed. If you trust its origin, open it "
        "where it was made and torch.save(model.state_dict(), ...) from there"
    )


def _describe_unknown(file: Path, head: bytes) -> str:
    if head[0] != 0x80:  # the opcode that opens every binary pickle
        return f"is in no known format (it starts with {head!r})"
    with file.open("rb") as stream:
        name = _foreign_import(stream)
    return "is a bare pickle" if name is None else _asks_for(name)


def _foreign_import(stream: IO[bytes]) -> str | None:
    """The first thing a pickle would import beside tensors; its opcodes are read, not run."""
    pushed: deque[str] = deque(["", ""], maxlen=2)
    memo: dict[Any, str] = {}
    try:
        while True:  # old torch files are several pickles in a row
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    name = str(argument or " ".join(pushed)).replace(" ", ".")
                    if not _TENSOR_IMPORTS.fullmatch(name):
                        return name
                if opcode.name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1]
                elif "PUT" in opcode.name:
                    memo[argument] = pushed[-1]
                elif "GET" in opcode.name:
                    pushed.append(memo[argument])
                else:
                    pushed.append(str(argument))
    except Exception:  # the end of the file, or not a pickle after all
        return None


def _state_dict(content: Any, file: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        known = TRAINING_FIELDS | {"state_dict"}
        if unknown := [str(name) for name in content if name not in known]:
            raise ValueError(
                f"load: {file} holds {_some(unknown)} beside 'state_dict', so which weights are "
                f"meant is unclear (known there: {', '.join(sorted(TRAINING_FIELDS))}). "
                "Save the wanted state dict alone"
            )
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"load: {file} holds a {type(content).__name__}. Supported: {SUPPORTED}")
    if not content:
        raise ValueError(f"load: {file} holds no tensors")
    foreign = [
        f"{name!r} ({type(value).__name__})"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if foreign:
        raise ValueError(
            f"load: {file} should map names to tensors alone, but holds {_some(foreign)}; "
            "save the model's state dict without them"
        )
    return content


def _canonical(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for stored, tensor in state.items():
        name = _WRAPPER.sub("", stored)
        if name in result:
            raise ValueError(
                f"load: {file} has both {origin[name]!r} and {stored!r}, which are both {name!r} "
                "once the wrapper's prefix is dropped; keep one of them"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"load: {file}: {stored!r} must be a dense tensor, it is {kind}")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"load: {file}: {stored!r} claims shape {tuple(tensor.shape)} but stores only "
                f"{tensor.untyped_storage().nbytes()} bytes; save it with .contiguous()"
            )
        origin[name] = stored
        result[name] = tensor.detach().contiguous()
    return result


def _some(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
