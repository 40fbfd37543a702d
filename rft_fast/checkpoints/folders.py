"""Where the files of a checkpoint are: folders of ``save_pretrained``, indices of sharded checkpoints."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from os import PathLike

from ..common import files
from ..common.pickles import Unreadable
from ..common.words import some

# Weights in a folder, in order of preference: open_clip's, those of transformers, an adapter of peft.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.(safetensors|bin)")
_LARGEST = 64 << 20  # bytes of an index; usual are 100 KiB
_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors")
ADAPTER_CONFIG = "adapter_config.json"


def located(path: str | PathLike[str], operation: str = "") -> pathlib.Path:
    """Return the file of a checkpoint.

    Args:
        path: a file, or a folder with weights under a name of ``WEIGHTS``.
        operation: what the message of an error begins with; empty: nothing.

    Raises:
        ValueError: there is no such file, it is no regular file, or the folder has no weights under these
            names; the message says what the folder is, or which files it has.
    """
    file, begin = pathlib.Path(path), f"{operation}: " if operation else ""
    if file.is_dir():
        inside = next((file / name for name in WEIGHTS if (file / name).is_file()), None)
        if inside is None:
            raise ValueError(f"{begin}{file} is a directory{_of_folder(file)}")
        return inside
    if kind := files.special(file):
        raise ValueError(f"{begin}{file} is {kind}, expected a checkpoint file")
    if not file.is_file():
        raise ValueError(f"{begin}there is no file {file}")
    return file


def _of_folder(folder: pathlib.Path) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        names = []
    if any(name.endswith(".distcp") for name in names):
        return (
            " of torch.distributed.checkpoint. Convert it to one file: python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    if "zero_to_fp32.py" in names:
        return " of DeepSpeed. Convert it to one file, in that folder: python zero_to_fp32.py . FILE"
    if shards := [match for name in names if (match := _SHARD.fullmatch(name))]:
        return (
            " with shards of a checkpoint, but without their index; download "
            f"{shards[0][1]}.{shards[0][2]}.index.json as well"
        )
    if inside := [name for name in names if name.endswith(_ENDINGS)]:
        return f", expected a checkpoint file in it, such as {some(inside, 3)}"
    return ", expected a checkpoint file in it, but there is none"


def parts(path: str | PathLike[str]) -> tuple[pathlib.Path, ...]:
    """Return all files that a checkpoint consists of.

    Args:
        path: a file, the index of a sharded checkpoint, or a folder.

    Returns:
        The file; of a sharded checkpoint its index and its shards; of an adapter its configuration as well.

    Raises:
        ValueError: a file is missing; as :func:`located`.
    """
    file = located(path, "parts")
    config = file.parent / ADAPTER_CONFIG
    if file.name.startswith("adapter_model.") and config.is_file():
        return file, config
    try:
        return file, *dict.fromkeys((index(file) or {}).values())
    except (Unreadable, OSError) as error:
        raise ValueError(f"parts: {file} {error}") from error


def digest(hashes: Mapping[pathlib.Path, str]) -> str:
    """Return the SHA-256 that identifies a checkpoint.

    Args:
        hashes: its files (:func:`parts`) -> the SHA-256 of each, as 64 hexadecimal digits.

    Returns:
        That of its only file; of several the SHA-256 of the lines that ``sha256sum`` prints for them.
    """
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = (f"{sha}  {file.name}\n" for file, sha in hashes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def index(file: pathlib.Path) -> dict[str, pathlib.Path] | None:
    """Read the index of a sharded checkpoint.

    Args:
        file: any file.

    Returns:
        Name of a tensor -> the shard that holds it; None if the file is no index.

    Raises:
        Unreadable: a shard is missing, or lies in another folder.
    """
    with files.opened(file) as stream:
        if not stream.read(64).lstrip().startswith(b"{") or file.stat().st_size > _LARGEST:
            return None
        stream.seek(0)
        try:
            content = json.loads(stream.read())
        except (ValueError, RecursionError):
            return None
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        return None
    shards = {}
    for name, shard in content["weight_map"].items():
        if not isinstance(shard, str) or not shard.isprintable() or shard in ("", ".", ".."):
            raise Unreadable("is a damaged index of a sharded checkpoint: a shard has no name")
        if "/" in shard or "\\" in shard:
            raise Unreadable(
                f"is the index of a sharded checkpoint with a shard in another folder: {shard!r}"
            )
        shards[name] = file.parent / shard
    distinct = sorted({shard.name for shard in shards.values()})
    if missing := [name for name in distinct if not (file.parent / name).is_file()]:
        raise Unreadable(
            f"is the index of a sharded checkpoint, but {len(missing)} of its {len(distinct)} "
            f"shards are missing beside it: {some(missing, 3)}. Download them as well"
        )
    if not shards:
        raise Unreadable("is the index of a sharded checkpoint, but lists no shards")
    return shards


def conventional(parts: Sequence[pathlib.Path]) -> pathlib.Path:
    """Return the file by whose name the configuration beside it is found: of a sharded one, a shard."""
    return parts[1] if len(parts) > 1 and parts[0].suffix == ".json" else parts[0]
