"""Files of Hugging Face data sets: folders of ``save_to_disk``, and the Hub's Parquet."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from rft_fast.common import files as on_disk
from rft_fast.common.words import many, some

_PART = re.compile(r"(.+?)-\d{5}-of-(\d{5})(-[0-9a-f]+)?")


def is_saved(path: pathlib.Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def has_parquet(path: pathlib.Path) -> bool:
    """Whether the path is a folder of Parquet files, or a split of one."""
    return bool(_splits(path))


def saved(path: pathlib.Path, where: str) -> list[pathlib.Path]:
    """Return the Arrow files of a ``Dataset`` folder, or of the only split of a ``DatasetDict`` folder.

    Raises:
        ValueError: there are several splits, or files are missing.
    """
    folder = path if (path / "state.json").is_file() else _split_folder(path, where)
    state = _json(folder / "state.json", where)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(
            f"{where}: {folder} is a selection by indices, from an old version of datasets; load "
            "it and save it again"
        )
    entries = state.get("_data_files")
    names = [str(entry.get("filename")) for entry in entries or () if isinstance(entry, dict)]
    if not names or any(name != pathlib.Path(name).name for name in names):
        raise ValueError(f"{where}: {folder / 'state.json'} does not list the files of the data set")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{where}: {folder} lacks {some(missing)}, of {many(len(names), 'file')}")
    return [folder / name for name in names]


def parquet(path: pathlib.Path, where: str) -> list[pathlib.Path]:
    """Return a Parquet file, or those of the only split of a folder.

    Raises:
        ValueError: there are several splits, or files are missing.
    """
    if path.is_file():
        return [path]
    splits = _splits(path)
    if not splits:
        raise ValueError(
            f"{where}: {path} is neither a folder of save_to_disk (state.json, dataset_dict.json) nor of "
            "Parquet files"
        )
    files = splits[_only(list(splits), path, where)]
    if (part := _PART.fullmatch(files[0].stem)) and int(part[2]) != len(files):
        raise ValueError(f"{where}: {path} has only {len(files)} of the {int(part[2])} files of {part[1]!r}")
    return files


def _split_folder(path: pathlib.Path, where: str) -> pathlib.Path:
    splits = _json(path / "dataset_dict.json", where).get("splits")
    if not isinstance(splits, list) or any(str(name) != pathlib.Path(str(name)).name for name in splits):
        raise ValueError(f"{where}: {path / 'dataset_dict.json'} does not list splits")
    return path / _only(splits, path, where)


def _json(file: pathlib.Path, where: str) -> dict[str, Any]:
    try:
        held = json.loads(on_disk.read_bytes(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {file} cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{where}: {file} holds a {type(held).__name__}, expected an object")
    return held


def _splits(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Parquet files by split, in a folder or its subfolder ``data``; for ``folder/split``, that one alone."""
    for folder in (path, path / "data"):
        splits: dict[str, list[pathlib.Path]] = {}
        for file in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
            part = _PART.fullmatch(file.stem)
            splits.setdefault(part[1] if part else file.stem, []).append(file)
        if splits:
            return splits
    if not path.exists() and path.parent.is_dir():
        return {name: files for name, files in _splits(path.parent).items() if name == path.name}
    return {}


def _only(splits: Sequence[str], path: pathlib.Path, where: str) -> str:
    if len(splits) != 1:
        raise ValueError(
            f"{where}: {path} has the splits {some(splits, 20)}; append one to the path: {path}/test"
        )
    return splits[0]
