"""A file of decoded images, which several processes may fill at once, and which survives the death of any.

There is one file per folder and pixel transform. Its parts begin at multiples of 4,096 bytes::

    head    magic, length and CRC-32 of the rest; JSON: what the pixels were made from
    table   32 bytes per image of the folder: digest of its name, its size and modification time
    marks   uint64 per image: 0, or 2**32 + the CRC-32 of its slot
    slots   uint8 [images, 3, h, w], sparse: images never requested take no space

Head and table are complete before the file gets its name and never change; other images mean another file.
The mark of a slot is written only after its bytes are safely on disk, so a mark never stands for missing
bytes, whenever a process or the power fails. Processes that fill one file at once write the same bytes to
the same places and need no lock; a lock is held only while a file is created.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import pathlib
import re
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import storage

FORMAT = 1
MAGIC = b"RFTpixel"
PAGE = 4096
RECORD = 32  # bytes of the table per image
MARKED = 1 << 32
CHUNK = 256  # images per flush to disk: the most that a crash loses; a flush costs little beside decoding

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Marks = np.ndarray[Any, np.dtype[np.uint64]]


class File(NamedTuple):
    """An image file.

    Attributes:
        name: path below the folder.
        size: in bytes.
        time: modification time in ns.
    """

    name: str
    size: int
    time: int


@dataclass(frozen=True, eq=False)
class Source:
    """What decoded images are made from.

    Folder, size and transform determine the name of the cache; with other files or versions it is made again.

    Attributes:
        folder: absolute path.
        files: every image of the folder, in order.
        size: (height, width) of the decoded images.
        transform: processing of the pixels, as JSON types.
        versions: versions of the libraries that decode and resize.
    """

    folder: pathlib.Path
    files: Sequence[File]
    size: tuple[int, int]
    transform: Mapping[str, Any]
    versions: Mapping[str, str]

    def path(self, directory: pathlib.Path) -> pathlib.Path:
        """The cache's file in a directory of caches."""
        name = json.dumps([str(self.folder), *self.size, self.transform], sort_keys=True).encode()
        label = re.sub(r"[^\w-]+", "_", self.folder.name, flags=re.ASCII)[:40] or "images"
        return directory / f"{label}-{blake2b(name, digest_size=8).hexdigest()}.pixels"


class Damaged(ValueError):
    """The file is not a complete cache of this format."""


@dataclass(frozen=True, eq=False)
class _Head:
    about: dict[str, Any]
    table: bytes
    marks_at: int
    slots_at: int

    @property
    def count(self) -> int:
        return len(self.table) // RECORD

    @property
    def slot(self) -> int:
        """Bytes of an image."""
        height, width = self.about["size"]
        return 3 * int(height) * int(width)

    @property
    def bytes(self) -> int:
        return self.slots_at + self.count * self.slot


@dataclass(eq=False)
class CacheFile:
    """An open cache file. Methods raise OSError if the disk fails; many threads may call :meth:`read`."""

    path: pathlib.Path
    fd: int
    head: _Head
    writable: bool
    made: bool  # whether this run created it, and so may remove it
    marks: Marks
    _fresh: list[int] = field(default_factory=list)  # written, but not yet marked

    def read(self, index: int) -> Pixels | None:
        """Read an image, uint8 [3, h, w]; None if its bytes do not match their checksum."""
        data = _read_slot(self.fd, self.head, index)
        if zlib.crc32(data) | MARKED != self.marks[index]:
            return None
        return np.frombuffer(data, np.uint8).reshape(3, *self.head.about["size"])

    def write(self, index: int, pixels: Pixels) -> None:
        # Not through a mapping, where a full disk would kill the process.
        data = pixels.data.cast("B")
        self.fill(index, data, MARKED | zlib.crc32(data))
        if len(self._fresh) >= CHUNK:
            self.commit()

    def fill(self, index: int, data: bytes | memoryview, mark: int) -> None:
        """Write the bytes of a slot; :meth:`commit` writes its mark."""
        storage.write(self.fd, data, self.head.slots_at + index * self.head.slot)
        self.marks[index] = mark
        self._fresh.append(index)

    def commit(self) -> None:
        """Write the marks of the images written so far, after their bytes are safely on disk."""
        if not self._fresh:
            return
        storage.flush(self.fd)
        for index in self._fresh:
            storage.write(self.fd, struct.pack("<Q", int(self.marks[index])), self.head.marks_at + 8 * index)
        self._fresh.clear()

    def map(self) -> Tensor:
        """Map all images, uint8 [n, 3, h, w]: read from disk on use, copied on write."""
        # Without NORESERVE (named in Python 3.13), a data set larger than the memory might be refused.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        mapped = mmap.mmap(self.fd, self.head.bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        pixels = np.frombuffer(mapped, np.uint8, offset=self.head.slots_at)
        return torch.from_numpy(pixels).view(self.head.count, 3, *self.head.about["size"])

    def remove(self) -> bool:
        """Remove the file's name; processes that have it open can continue."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self.fd)):  # otherwise replaced meanwhile
                self.path.unlink()
            return True
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.fd)


def open_cache(source: Source, directory: pathlib.Path) -> CacheFile:
    """Open the cache of a source; create it if there is none, or one made from something else."""
    if not hasattr(os, "pwrite"):
        raise OSError(errno.ENOSYS, "caches need a POSIX system")
    path = source.path(directory)
    found, difference = _adopt(path, source)
    if found is not None:
        return found
    directory.mkdir(parents=True, exist_ok=True)
    with storage.lock(directory):
        found, difference = _adopt(path, source)  # another process may have created it meanwhile
        if found is not None:
            return found
        for left in directory.glob(f"{path.name}.*.part"):  # its creator, which held the lock, died
            left.unlink(missing_ok=True)
        made = _make(path, source)
    if difference:
        warnings.warn(f"cache: the images of {source.folder} are decoded again: {difference}", stacklevel=5)
    return made


def _adopt(path: pathlib.Path, source: Source) -> tuple[CacheFile | None, str]:
    """Open the file if it was made from the same source; otherwise return the difference (empty: no file)."""
    try:
        fd, writable = storage.open_if_allowed(path)
    except FileNotFoundError:
        return None, ""
    try:
        head = parse(fd)
        difference = _difference(head, source)
        if not difference:
            return CacheFile(path, fd, head, writable, False, marks_of(fd, head)), ""
    except Damaged as error:
        difference = f"{path} is damaged: {error}"
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None, difference


def _make(path: pathlib.Path, source: Source) -> CacheFile:
    """Create a cache in place of any other, with the unchanged images of that one."""
    head_bytes, head = _new_head(source)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    made = CacheFile(path, fd, head, True, True, np.zeros(head.count, np.uint64))
    try:
        os.ftruncate(fd, head.bytes)  # all marks are zero
        storage.write(fd, head_bytes, 0)
        storage.write(fd, head.table, head.marks_at - _padded(len(head.table)))
        _take_over(path, source, made)
        storage.flush(fd)
        os.replace(part, path)
    except BaseException:
        os.close(fd)
        part.unlink(missing_ok=True)
        raise
    return made


def _take_over(path: pathlib.Path, source: Source, made: CacheFile) -> None:
    """Copy unchanged images, if there is room for both files; they are verified when read."""
    try:
        with storage.opened(path) as fd:
            head = parse(fd)
            if made_otherwise(head.about, source):
                return
            marks = marks_of(fd, head)
            same = [(new, old) for new, old in same_images(head.table, made.head.table) if marks[old]]
            try:
                storage.check_room(path.parent, len(same) * head.slot)
            except OSError:
                return
            for new, old in same:
                made.fill(new, _read_slot(fd, head, old), int(marks[old]))
            made.commit()
    except (FileNotFoundError, Damaged):
        return


def _new_head(source: Source) -> tuple[bytes, _Head]:
    table = table_of(source)
    about = {
        "format": FORMAT,
        "folder": str(source.folder),
        "count": len(source.files),
        "size": list(source.size),
        "transform": dict(source.transform),
        "versions": dict(source.versions),
        "table": zlib.crc32(table),
    }
    text = json.dumps(about).encode()
    data = MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text
    marks_at = _padded(len(data)) + _padded(len(table))
    return data, _Head(about, table, marks_at, marks_at + _padded(8 * len(source.files)))


def parse(fd: int) -> _Head:
    start = os.pread(fd, 16, 0)
    if len(start) < 16 or start[:8] != MAGIC:
        raise Damaged("it does not start like a cache")
    length, checksum = struct.unpack("<II", start[8:])
    text = os.pread(fd, min(length, 1 << 20), 16)
    if len(text) != length or zlib.crc32(text) != checksum:
        raise Damaged("the checksum of its header does not match")
    about = json.loads(text)
    if about.get("format") != FORMAT:
        raise Damaged(f"its format is {about.get('format')}, expected {FORMAT}")
    table_at = _padded(16 + length)
    table = storage.read(fd, RECORD * about["count"], table_at)
    if zlib.crc32(table) != about["table"]:
        raise Damaged("the checksum of its table does not match")
    marks_at = table_at + _padded(len(table))
    head = _Head(about, table, marks_at, marks_at + _padded(8 * about["count"]))
    if os.fstat(fd).st_size != head.bytes:
        raise Damaged(f"it has {os.fstat(fd).st_size:,} bytes, expected {head.bytes:,}")
    return head


def marks_of(fd: int, head: _Head) -> Marks:
    return np.frombuffer(storage.read(fd, 8 * head.count, head.marks_at), "<u8").astype(np.uint64)


def table_of(source: Source) -> bytes:
    def record(file: File) -> bytes:
        name = blake2b(os.fsencode(file.name), digest_size=16).digest()
        return name + struct.pack("<qq", file.size, file.time)

    return b"".join(map(record, source.files))


def _records(table: bytes) -> list[bytes]:
    return [table[start : start + RECORD] for start in range(0, len(table), RECORD)]


def same_images(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """Yield (position in new, position in old) of the images that both tables have, unchanged."""
    places = {record: index for index, record in enumerate(_records(old))}
    return ((index, places[record]) for index, record in enumerate(_records(new)) if record in places)


def made_otherwise(about: Mapping[str, Any], source: Source) -> str:
    """The difference between cache and source other than the files, in words; empty if there is none."""
    if [about["folder"], about["size"], about["transform"]] != [
        str(source.folder),
        list(source.size),
        source.transform,
    ]:
        return f"its images come from {about['folder']} by {about['transform']} (was the file renamed?)"
    before, now = about["versions"], source.versions
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = [f"{name} {before.get(name)} instead of {now.get(name)}" for name in names]
    return f"they were decoded with {', '.join(found)}" if found else ""


def _difference(head: _Head, source: Source) -> str:
    """The difference between cache and source, in words; empty if there is none."""
    if otherwise := made_otherwise(head.about, source):
        return otherwise
    table = table_of(source)
    if table == head.table:
        return ""
    before, now = ({record[:16]: record[16:] for record in _records(each)} for each in (head.table, table))
    counts = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(before[name] != now[name] for name in before.keys() & now.keys()),
    }
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{found or 'reordered'} since they were decoded (now {len(source.files)} images)"


def _read_slot(fd: int, head: _Head, index: int) -> bytes:
    try:
        return storage.read(fd, head.slot, head.slots_at + index * head.slot)
    except OSError:
        return b""  # unreadable: matches no checksum


def _padded(length: int) -> int:
    return -(-length // PAGE) * PAGE
