"""Reader of WebDataset: samples in ``.tar`` shards, read in place."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Generator, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import torch

from rft_fast.common import files as on_disk
from rft_fast.common.words import many, some
from rft_fast.datasets import cache as caches

from .source import MOST_ROWS, Source, open_image

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
LABEL_FIELDS = ("label", "cls", "class_id", "target")
NAMES = ("wnids.txt", "wnids", "classnames.txt")
SPLITS = ("test", "train", "val", "validation")
LARGEST_LABEL = 1 << 20  # bytes of a file with a label

_ARCHIVE = re.compile(r".+\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))", re.IGNORECASE)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zX": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22M\x18": "lz4",
}


class Member(NamedTuple):
    """Position of a file's bytes in a shard."""

    name: str
    offset: int
    size: int


class _Shard(NamedTuple):
    path: pathlib.Path
    size: int
    time: int


def matches(path: pathlib.Path) -> bool:
    """Whether the path is a tar archive, a folder of them, or a folder with them in ``test``."""
    try:
        return bool(_ARCHIVE.fullmatch(path.name)) if path.is_file() else bool(_archives(path))
    except OSError:  # no permission to list a folder
        return False


def source(path: pathlib.Path, where: str) -> Source:
    """List the samples of a shard, or of all shards of a folder in the order of their names or numbers.

    As in WebDataset, files with the same name up to the first dot form a sample: one image, and its class as
    the integer in ``.cls``, or in ``.json`` under ``label``, ``cls``, ``class_id`` or ``target``. Class
    names, one per line, are in ``wnids.txt``, ``wnids`` or ``classnames.txt`` beside the shards or above a
    split's folder; without them, classes are rows of the head. ``nshards.txt`` beside the shards is checked.
    Only headers and labels are read here, and images later by their offsets. Nothing is extracted.

    Args:
        path: a ``.tar``, a folder of them, or a folder with them in ``test`` or in its only such subfolder.
        where: prefix of error messages.

    Raises:
        ValueError: a compressed, truncated or concatenated archive; links or sparse files in it; duplicate
            names; a sample without exactly one image and a label; labels beyond the names. The message names
            the shard and the sample.
    """
    archives = [path] if path.is_file() else _archives(path)
    if not archives:
        raise ValueError(
            f"{where}: expected a .tar file, a folder of them, or a folder with them in test/, got {path}"
        )
    _counted(archives, path, where)
    names = _class_names(archives[0].parent, where)
    images: list[tuple[_Shard, Member]] = []
    files: list[caches.File] = []
    labels: list[int] = []
    ignored: list[str] = []
    stored = on_disk.Inputs()
    for archive in archives:
        stored.add(archive)
        samples, others = _samples(archive, f"{where}: {archive}")
        ignored += others
        with on_disk.opened(archive) as stream:
            status = os.fstat(stream.fileno())
            shard = _Shard(archive, status.st_size, status.st_mtime_ns)
            for key, sample in samples.items():
                of = f"{where}: {archive}: sample {_shown(key)!r}"
                image = _image(sample, of)
                labels.append(_label(sample, stream, of))
                images.append((shard, image))
                # A member's own time is often constant, so the shard's time shows a change.
                files.append(caches.File(f"{archive.name}/{_shown(image.name)}", image.size, shard.time))
    if not files:
        raise ValueError(f"{where}: {path} has no samples")
    if len({file.name for file in files}) != len(files):
        raise ValueError(f"{where}: {path} has members whose names differ only in unprintable characters")
    if names and max(labels) >= len(names):
        raise ValueError(
            f"{where}: {path} has labels from {min(labels)} to {max(labels)}, but its "
            f"{len(names)} class names allow 0 to {len(names) - 1}"
        )
    note = (f"ignored, because they belong to no sample: {some(ignored)}",) if ignored else ()
    return Source(
        kind="webdataset",
        path=path,
        files=files,
        labels=torch.tensor(labels),
        class_names=names,
        open=lambda index: open_image(io.BytesIO(_read(*images[index]))),
        notes=(f"{len(archives)} shards", *note),
        stored=stored,
    )


def _archives(folder: pathlib.Path) -> list[pathlib.Path]:
    """The shards of a folder, else of its subfolder ``test``, else of the only subfolder with any."""
    for among in (folder, folder / "test"):
        if found := _shards_in(among):
            return found
    if not folder.is_dir():
        return []
    splits = [found for entry in sorted(folder.iterdir()) if (found := _shards_in(entry))]
    return splits[0] if len(splits) == 1 else []


def _shards_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The archives of a folder without subfolders: archives beside class folders are their origin."""
    if not folder.is_dir():
        return []
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if any(entry.is_dir() for entry in entries):
        return []
    found = [entry for entry in entries if _ARCHIVE.fullmatch(entry.name) and entry.is_file()]
    return sorted(found, key=_in_order)


def _in_order(path: pathlib.Path) -> list[tuple[int, str]]:
    """Sort key with numbers as numbers: 10.tar after 9.tar."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _counted(archives: list[pathlib.Path], path: pathlib.Path, where: str) -> None:
    file = archives[0].parent / "nshards.txt"
    if path.is_file() or not file.is_file():
        return
    text = on_disk.read_bytes(file).decode("utf-8", "replace").strip()
    if text != str(len(archives)):
        raise ValueError(
            f"{where}: {file} says {text[:20]!r} shards, but there are {len(archives)}; download "
            "the others, or give the path of one shard"
        )


def _class_names(folder: pathlib.Path, where: str) -> tuple[str, ...]:
    folders = (folder, folder.parent) if folder.name in SPLITS else (folder,)
    for file in (among / name for name in NAMES for among in folders):
        if file.is_file():
            try:
                names = on_disk.read_text(file, "utf-8-sig").rstrip().split("\n")
            except (OSError, UnicodeError) as error:
                raise ValueError(f"{where}: {file} cannot be read: {error}") from error
            names = [name.strip() for name in names]
            if not all(names):
                raise ValueError(f"{where}: {file} has empty lines; expected one class name per line")
            return tuple(names)
    return ()


def _samples(archive: pathlib.Path, where: str) -> tuple[dict[str, dict[str, Member]], list[str]]:
    """A shard's files by sample and extension, and the names of files that belong to no sample."""
    samples: dict[str, dict[str, Member]] = {}
    others = []
    for member in _members(archive, where):
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot or re.fullmatch(r"__.*__", stem):  # hidden, or metadata of the shard
            others.append(_shown(member.name))
            continue
        sample, extension = samples.setdefault(f"{folder}/{stem}" if folder else stem, {}), extension.lower()
        if extension in sample:
            raise ValueError(
                f"{where}: {_shown(member.name)!r} occurs twice, or differs from another file only in "
                "the case of the extension; rename it"
            )
        sample[extension] = member
    return samples, others


def _members(archive: pathlib.Path, where: str) -> Iterator[Member]:
    """Yield the files of a tar archive, without reading their contents."""
    with on_disk.opened(archive) as stream:
        content = _Content(stream)
        if not len(content):
            raise ValueError(f"{where} is empty; download it again")
        first = bytes(content[:4])
        if kind := next((kind for magic, kind in _COMPRESSED.items() if first.startswith(magic)), None):
            raise ValueError(
                f"{where} is compressed ({kind}), so that single images cannot be read; decompress it"
            )
        end = yield from _listed(content, where)
        # tarfile mistakes damage for the end.
        if len(content) - end < tarfile.BLOCKSIZE:
            raise ValueError(
                f"{where} is truncated: the end-of-archive blocks are missing; download it again"
            )
        for start in range(end, len(content), 1 << 20):
            if bytes(content[start : start + (1 << 20)]).strip(b"\0"):
                raise ValueError(
                    f"{where} continues after its end at byte {end}: it is damaged, or two archives were "
                    "joined"
                )


class _Content(on_disk.Content):
    """A file for tarfile that never returns more than it has, whatever sizes a header states."""

    _place = 0

    def read(self, count: int = -1) -> bytes:
        data = bytes(self[self._place : len(self) if count < 0 else self._place + count])
        self._place += len(data)
        return data

    def seek(self, place: int) -> int:
        self._place = place
        return place

    def tell(self) -> int:
        return self._place


def _listed(content: _Content, where: str) -> Generator[Member, None, int]:
    """Yield the files; return the position where the archive ends."""
    tar = None
    while True:
        try:
            tar = tar or tarfile.open(fileobj=content, mode="r:")  # type: ignore[call-overload]
            info = tar.next()
        except Exception as error:  # tarfile raises almost anything on damaged headers
            raise ValueError(
                f"{where} is truncated or not a tar archive: {error}; download it again"
            ) from error
        if info is None:
            return int(tar.offset)
        name = _shown(info.name)
        if info.size < 0 or info.offset_data + info.size > len(content):
            raise ValueError(
                f"{where} is truncated within {name!r}, of {many(info.size, 'byte')}; download it again"
            )
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise ValueError(
                f"{where}: {name!r} is a link, a sparse file or a special file; store it as a regular file"
            )
        yield Member(info.name, info.offset_data, info.size)


def _image(sample: Mapping[str, Member], where: str) -> Member:
    found = [member for extension, member in sample.items() if extension.rpartition(".")[2] in IMAGES]
    if len(found) != 1:
        raise ValueError(f"{where} has {len(found)} images, expected one; it has {some(list(sample))}")
    return found[0]


def _label(sample: Mapping[str, Member], stream: BinaryIO, where: str) -> int:
    member = sample.get("cls") or sample.get("json")
    if member is None:
        raise ValueError(f"{where} has no label: neither .cls nor .json; it has {some(list(sample))}")
    if member.size > LARGEST_LABEL:
        raise ValueError(f"{where}: {_shown(member.name)} has {member.size} bytes, too many for a label")
    stream.seek(member.offset)
    data = stream.read(member.size)
    if "cls" in sample:
        text = data.decode("ascii", "replace").strip()
        if not re.fullmatch(r"\d{1,7}", text):
            raise ValueError(f"{where}: .cls holds {text[:40]!r}, expected the number of a class")
        return int(text)
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: .json cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{where}: .json holds a {type(entries).__name__}, expected an object with a label")
    labels = {entries[field] for field in LABEL_FIELDS if type(entries.get(field)) is int}
    if len(labels) != 1 or not 0 <= (label := labels.pop()) < MOST_ROWS:
        raise ValueError(
            f"{where}: .json must give one class, as a number, under {', '.join(LABEL_FIELDS)}; "
            f"it has {some([_shown(field) for field in entries], 10)}"
        )
    return int(label)


def _read(shard: _Shard, member: Member) -> bytes:
    # Opened for each image, by any thread: there may be more shards than file descriptors.
    with on_disk.opened(shard.path) as stream:
        stream.seek(member.offset)
        data = stream.read(member.size)
        status = os.fstat(stream.fileno())
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.time):
        raise on_disk.Changed(f"{shard.path} changed while it was in use; run the command again")
    return data


def _shown(name: str) -> str:
    """Escape a name from an archive for the terminal."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
