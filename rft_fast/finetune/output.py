"""The files of fine-tuning: models with their configuration in the header, states to resume from, the zoo."""

from __future__ import annotations

import csv
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rft_fast import __version__
from rft_fast.checkpoints.canonical import TEXT
from rft_fast.clip.heads import SCALE
from rft_fast.common import disk
from rft_fast.common.words import cell, differences

START = "zeroshot.safetensors"
HEADER = "finetune"  # entry of a file's header: how it was made, as JSON
WRITTEN = "# Written by python -m rft_fast.finetune after every model; copy it before you change it."

Configuration = dict[str, Any]
SIDES = ("in the file", "requested")  # of two configurations that differ


# --- models -------------------------------------------------------------------------------------------


def write_model(
    file: pathlib.Path, state: Mapping[str, Tensor], configuration: Configuration, dtype: torch.dtype
) -> None:
    """Write a model, with the configuration and the versions that made it in the header.

    A classifier has the layout of model-soups: ``model.visual.*``, ``classification_head.*``; a text tower is
    left out, as it has no effect beside a head. Both towers have open_clip's names for their architecture.

    Args:
        file: A safetensors file.
        state: The weights.
        configuration: What the model was made with, as JSON values.
        dtype: Type of the stored floating-point weights.
    """
    if SCALE in state:
        custom = configuration["model"].get("custom_text", False)
        names = {name: name if custom else _standard(name) for name in state}
    else:
        names = {n: n if n.startswith("classification_head.") else f"model.{n}" for n in state}
    stored = {names[name]: _as(tensor, dtype) for name, tensor in state.items()}
    # One entry: safetensors writes several in any order, and equal models must be equal files.
    header = {"configuration": configuration, "rft_fast": __version__, "torch": torch.__version__}
    disk.replace(file, save(stored, metadata={HEADER: json.dumps(header)}))


def _standard(name: str) -> str:
    """Return the name of a live model's tensor in a standard CLIP, whose text tower has no prefix."""
    bare = name.removeprefix("text.")
    return bare if bare.partition(".")[0] in TEXT else name


def rounded(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a state dict as it is read back after storing it in a type: rounded values, floats as float32.

    Raises:
        ValueError: A weight is not finite in that type.
    """
    if name := overflowing(state, dtype):
        raise ValueError(f"finetune: {name} of the zero-shot model is not finite in {dtype}")
    found = {name: _as(tensor, dtype) for name, tensor in state.items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def overflowing(state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Return the name of the first tensor that a type stores as infinity or NaN; empty if there is none."""
    return next((name for name, t in state.items() if not bool(_as(t, dtype).isfinite().all())), "")


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def configuration_of(file: pathlib.Path) -> Configuration | None:
    """Return the configuration in a model's header; None for a file of another origin.

    Raises:
        ValueError: The file is not a whole safetensors file.
    """
    if not file.is_file():
        raise ValueError(f"finetune: {file} is not a regular file")  # such as a FIFO, which would block
    try:
        with safe_open(file, "pt") as archive:
            text = (archive.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"finetune: {file} is not a complete safetensors file: {error}") from error
    try:
        configuration = json.loads(text or "")["configuration"]
    except (ValueError, TypeError, LookupError):
        return None
    return configuration if isinstance(configuration, dict) else None


# --- states to resume from ----------------------------------------------------------------------------


@dataclass(eq=False)
class FileKeeper:
    """A :class:`~rft_fast.finetune.training.Keeper` in one file, which is always whole.

    Args:
        file: Where the state is kept.
        configuration: What the model is made with; a state of another configuration is refused.
        every: Optimizer steps between two states; None: only at the end of an epoch.
    """

    file: pathlib.Path
    configuration: Configuration
    every: int | None = None

    def load(self) -> dict[str, Any] | None:
        """Return the state; None where there is none.

        Raises:
            ValueError: The file is damaged, or of another configuration; the message lists the differences.
        """
        if not self.file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            there = json.loads(state.pop("configuration"))
        except FileNotFoundError:  # another process has just finished the model
            return None
        except Exception as error:  # a damaged file raises almost anything
            # Without torch's message, which advises to run the code in the file.
            reason = f" ({error})" if isinstance(error, OSError) else ": damaged, or of another origin"
            raise ValueError(
                f"finetune: {self.file} cannot be read as a saved training state{reason}; remove it "
                "and the table beside it, to train that model from the start"
            ) from error
        if different := "; ".join(differences(there, self.configuration, sides=SIDES)):
            raise ValueError(
                f"finetune: {self.file} holds a training state of another configuration "
                f"({different}); use the same configuration, remove the file, or choose another --out"
            )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        with disk.replacing(self.file) as temporary:
            try:
                torch.save({**state, "configuration": json.dumps(self.configuration)}, temporary)
            except RuntimeError as error:  # what torch raises for a full disk
                reason = str(error).partition("\n")[0]
                raise OSError(f"{self.file} could not be written; is the disk full? ({reason})") from error


# --- tables -------------------------------------------------------------------------------------------


def write_rows(file: pathlib.Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write one row per epoch as CSV. NaN, for what was not measured, is empty in the file."""
    with disk.replacing(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(map(cell, rows[0]))
        writer.writerows(["" if math.isnan(value) else value for value in row.values()] for row in rows)


def write_zoo(
    folder: pathlib.Path,
    entries: Mapping[str, str],
    finetuned: Sequence[str],
    data: Mapping[str, Mapping[str, object]],
) -> None:
    """Write ``zoo.toml``, as :func:`rft_fast.config.zoo.read` reads it, for the models of a folder.

    Args:
        folder: Folder of the models.
        entries: Further entries of the top level.
        finetuned: Names of the models.
        data: Data set -> its entries.
    """
    lines = [WRITTEN, *_entries({"name": folder.resolve().name, "zeroshot": START, **entries})]
    lines += ["", "[finetuned]", *_entries({name: f"{name}.safetensors" for name in finetuned})]
    for name, table in data.items():
        lines += ["", f"[data.{_key(name)}]", *_entries(table)]
    disk.replace(folder / "zoo.toml", ("\n".join(lines) + "\n").encode())


def write_json(file: pathlib.Path, content: object) -> None:
    disk.replace(file, _json(content))


def check_json(file: pathlib.Path, content: object) -> None:
    """Raise ValueError for an existing file with other content, which would be lost."""
    if file.exists() and file.read_bytes() != _json(content):
        raise ValueError(f"finetune: {file} exists with other content; choose another --out, or move it")


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _entries(table: Mapping[str, object]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _value(key)


def _value(value: object) -> str:
    # JSON's strings and booleans are TOML's, except for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_zoo(folder: pathlib.Path) -> None:
    """Raise ValueError for a ``zoo.toml`` written by hand, which would be lost."""
    file = folder / "zoo.toml"
    if file.exists() and file.read_bytes().partition(b"\n")[0] != WRITTEN.encode():
        raise ValueError(f"finetune: {file} was not written by finetune; choose another --out, or move it")
