"""Decoded images on disk, so that every image is decoded once: uint8, memory-mapped, in a file that several
processes may fill at once and any of them may die over.

One file for each folder and pixel transform. Its parts begin on multiples of 4,096 bytes::

    head    magic, length and CRC-32 of what follows; JSON: what the pixels were made from
    table   32 bytes for each image of the folder: digest of its name, its size and time of change
    marks   uint64 for each image: 0, or 2**32 + the CRC-32 of its slot
    slots   uint8 [images, 3, h, w], sparse: what was never asked for takes no space

Head and table are complete before the file gets its name and never change; other pictures mean another
file. A slot's mark is written only when its bytes are safely on disk, so a mark never stands for bytes that
are not there, whenever a process or the power goes away. Processes that fill one file at once write the
same bytes to the same places and need no lock; a lock is held only while a file is made.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import secrets
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
MAGIC = b"RFTpixel"
PAGE = 4096
RECORD = 32  # bytes of the table for each image
MARKED = 1 << 32
CHUNK = 256  # images for each flush to disk: a death costs at most so many, a flush little beside decoding
RESERVE = 256 << 20  # bytes left free on the disk, for results and for others

_OURS = re.compile(r"[\w.-]+-[0-9a-f]{16}\.pixels(\.[0-9a-f]{8}\.part)?")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Marks = np.ndarray[Any, np.dtype[np.uint64]]


class File(NamedTuple):
    """An image file: its path below the folder, its size in bytes, its time of change in ns."""

    name: str
    size: int
    time: int


@dataclass(frozen=True, eq=False)
class Source:
    """What decoded images come from.

    folder: absolute. files: every image of the folder, in order. size: (height, width) of the decoded
    images. transform: what is done to the pixels, in JSON's types. versions: of the libraries that decode
    and resize. Folder, size and transform name the cache; with other files or versions it is made again.
    """

    folder: Path
    files: Sequence[File]
    size: tuple[int, int]
    transform: Mapping[str, Any]
    versions: Mapping[str, str]

    def path(self, directory: Path) -> Path:
        """The cache's file in a directory of caches."""
        name = json.dumps([str(self.folder), *self.size, self.transform], sort_keys=True).encode()
        label = re.sub(r"[^\w-]+", "_", self.folder.name, flags=re.ASCII)[:40] or "images"
        return directory / f"{label}-{blake2b(name, digest_size=8).hexdigest()}.pixels"


def directory() -> Path:
    """Where caches are kept: ``RFT_CACHE``, else ``XDG_CACHE_HOME``/rft_fast, else ~/.cache/rft_fast."""
    if chosen := os.environ.get("RFT_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache").absolute() / "rft_fast"


def decoded(source: Source, directory: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which images, bool [files], need not be decoded again; nothing is made, changed or verified."""
    found = np.zeros(len(source.files), bool)
    try:
        with _opened(source.path(directory)) as fd:
            head = _parse(fd)
            marks = _marks(fd, head)
    except (OSError, _Damaged):
        return found
    if not _made_otherwise(head.about, source):
        for new, old in _same(head.table, _table(source)):
            found[new] = marks[old] != 0
    return found


class Images:
    """The decoded images that a run wants: on disk where it can be, in memory where not. For one thread.

    Whatever the disk does is told as a warning and never stops a run. ``there``, bool [chosen], says which
    images are at hand; the others are to be decoded and handed to :meth:`put`.
    """

    def __init__(
        self,
        source: Source,
        chosen: Sequence[int],
        directory: Path | None,
        each: Callable[[Callable[[int], Pixels | None], Iterable[int]], Iterable[Pixels | None]] = map,
    ) -> None:
        """chosen: positions in ``source.files``. directory: of caches, or None. each: a threaded ``map``."""
        self.source = source
        self.chosen = chosen
        self.there = np.zeros(len(chosen), bool)
        self._memory: Tensor | None = None
        self._file: _CacheFile | None = None
        if directory is not None:
            try:
                self._file = _open(source, directory)
            except OSError as error:
                self._tell(error, "nothing is kept there")
        # Only a whole folder is used where it lies; a part of it has to be brought together.
        self._whole = self._file is not None and len(chosen) == len(source.files)
        if self._file is not None:
            self._recall(self._file, each)

    def put(self, position: int, pixels: Pixels) -> None:
        """Hands over a decoded image: uint8 [3, h, w], contiguous, ``position`` in ``chosen``."""
        if pixels.shape != (3, *self.source.size) or pixels.dtype != np.uint8:
            raise RuntimeError(f"cache: an image of {pixels.dtype} {pixels.shape}, not {self.source.size}")
        if self._file is not None:
            try:
                self._file.write(self.chosen[position], pixels)
            except OSError as error:
                self._give_up(self._file, error)
        if not self._whole:
            self._store(position, pixels)
        self.there[position] = True

    def missing(self) -> list[int]:
        """Positions in ``chosen`` of the images that are not at hand.

        To be asked again when all of them were put: a disk that fails may lose what it had taken.
        """
        if self._file is not None:
            try:
                self._file.commit()
            except OSError as error:
                self._give_up(self._file, error)
        missing: list[int] = np.flatnonzero(~self.there).tolist()
        return missing

    def take(self) -> Tensor:
        """The images, uint8 [chosen, 3, h, w]: mapped from disk, copied on writing, or in memory.

        Only once, when nothing is missing that can be had: missing images hold anything. Raises OSError
        where a disk that cannot be mapped has lost images too.
        """
        if self._file is not None and self._whole:
            try:
                return self._file.map()
            except OSError as error:
                before = self.there.copy()
                self._give_up(self._file, error)
                if (before != self.there).any():
                    raise
            finally:
                self.close()
        self.close()
        return self._in_memory()

    def close(self) -> None:
        """Lets go of the file; tensors that were taken stay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # something failed: keep what was decoded until then
            try:
                self._file.commit()
            except OSError:
                pass  # what failed is told already, and what is marked is whole
        self.close()

    def _recall(self, file: _CacheFile, each: Callable[..., Iterable[Pixels | None]]) -> None:
        marked = np.flatnonzero(file.marks[list(self.chosen)]).tolist()
        damaged = 0
        for position, pixels in zip(marked, each(file.read, (self.chosen[p] for p in marked)), strict=True):
            if pixels is None:
                damaged += 1
                continue
            if not self._whole:
                self._store(position, pixels)
            self.there[position] = True
        if damaged:
            warnings.warn(
                f"cache: {damaged} of {len(marked)} images in {file.path} are damaged; they are decoded "
                "again. If this comes back, the disk is at fault",
                stacklevel=4,
            )
        wanted = int((~self.there).sum()) * file.head.slot
        if not wanted:
            return
        try:
            if not file.writable:
                raise PermissionError(errno.EACCES, "it cannot be written", str(file.path))
            _check_room(file.path.parent, wanted)
        except OSError as error:
            self._give_up(file, error)

    def _give_up(self, file: _CacheFile, error: OSError) -> None:
        """Goes on in memory, with everything that was decoded so far."""
        if self._whole:
            self._whole = False
            for position in np.flatnonzero(self.there).tolist():
                pixels = file.read(self.chosen[position])
                self.there[position] = pixels is not None  # else lost with the disk: decoded again
                if pixels is not None:
                    self._store(position, pixels)
        self._file = None
        removed = file.made and file.remove()
        file.close()
        self._tell(error, f"{file.path} is " + ("removed" if removed else "left as it was"))

    def _tell(self, error: OSError, what: str) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, or name a larger place" if full else "name a place that can be written"
        warnings.warn(
            f"cache: {error}; {what}, and images of {self.source.folder} are decoded for this run alone. To "
            f"decode them once for all runs, {remedy} (--cache, or the environment variable RFT_CACHE)",
            stacklevel=5,
        )

    def _in_memory(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty((len(self.chosen), 3, *self.source.size), dtype=torch.uint8)
        return self._memory

    def _store(self, position: int, pixels: Pixels) -> None:
        self._in_memory().numpy()[position] = pixels


# --- one file ------------------------------------------------------------------------------------


class _Damaged(ValueError):
    """A file that is no cache of this format, or not a whole one."""


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
class _CacheFile:
    """An open cache file. Raises OSError where the disk fails. ``read`` may be called from many threads."""

    path: Path
    fd: int
    head: _Head
    writable: bool
    made: bool  # by this run, so that it may be removed if it cannot be filled
    marks: Marks
    _fresh: list[int] = field(default_factory=list)  # written, not yet safely on disk

    def read(self, index: int) -> Pixels | None:
        """An image, uint8 [3, h, w], or None where its bytes are not those that were written."""
        data = _read_slot(self.fd, self.head, index)
        if zlib.crc32(data) | MARKED != self.marks[index]:
            return None
        return np.frombuffer(data, np.uint8).reshape(3, *self.head.about["size"])

    def write(self, index: int, pixels: Pixels) -> None:
        # Never through a mapping, where a full disk would kill the process.
        data = pixels.data.cast("B")
        _write(self.fd, data, self.head.slots_at + index * self.head.slot)
        self.marks[index] = MARKED | zlib.crc32(data)
        self._fresh.append(index)
        if len(self._fresh) >= CHUNK:
            self.commit()

    def commit(self) -> None:
        """Marks what was written, once it is safely on disk."""
        if not self._fresh:
            return
        _flush(self.fd)
        for index in self._fresh:
            _write(self.fd, struct.pack("<Q", int(self.marks[index])), self.head.marks_at + 8 * index)
        self._fresh.clear()

    def map(self) -> Tensor:
        """All images, uint8 [n, 3, h, w], read from disk as they are used; writing changes a copy."""
        # Without NORESERVE (Python 3.13 names it) a set larger than the memory might be refused.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        mapped = mmap.mmap(self.fd, self.head.bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        pixels = np.frombuffer(mapped, np.uint8, offset=self.head.slots_at)
        return torch.from_numpy(pixels).view(self.head.count, 3, *self.head.about["size"])

    def remove(self) -> bool:
        """Takes the file's name away; processes that have it open keep it until they are done."""
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self.fd)):  # else replaced meanwhile
                self.path.unlink()
            return True
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.fd)


def _open(source: Source, directory: Path) -> _CacheFile:
    """The cache of a source, made where there is none or one from something else."""
    if not hasattr(os, "pwrite"):
        raise OSError(errno.ENOSYS, "caches need a POSIX system")
    path = source.path(directory)
    found, difference = _adopt(path, source)
    if found is not None:
        return found
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        found, difference = _adopt(path, source)  # another may have made it meanwhile
        if found is not None:
            return found
        for left in directory.glob(f"{path.name}.*.part"):  # its maker died: it held the lock
            left.unlink(missing_ok=True)
        made = _make(path, source)
    if difference:
        warnings.warn(f"cache: the decoded images of {source.folder} are renewed: {difference}", stacklevel=5)
    return made


def _adopt(path: Path, source: Source) -> tuple[_CacheFile | None, str]:
    """The file if it is there and made from the same, else None and what differs (nothing: not there)."""
    try:
        fd, writable = _open_if_allowed(path)
    except FileNotFoundError:
        return None, ""
    try:
        head = _parse(fd)
        difference = _difference(head, source)
        if not difference:
            return _CacheFile(path, fd, head, writable, False, _marks(fd, head)), ""
    except _Damaged as error:
        difference = f"{path} is damaged: {error}"
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None, difference


def _make(path: Path, source: Source) -> _CacheFile:
    """A new cache in the place of any other, with those images of the other that did not change."""
    head_bytes, head = _new_head(source)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    made = _CacheFile(path, fd, head, True, True, np.zeros(head.count, np.uint64))
    try:
        os.ftruncate(fd, head.bytes)  # the marks are zeros: nothing there
        _write(fd, head_bytes, 0)
        _write(fd, head.table, head.marks_at - _padded(len(head.table)))
        _take_over(path, source, made)
        _flush(fd)
        os.replace(part, path)
    except BaseException:
        os.close(fd)
        part.unlink(missing_ok=True)
        raise
    return made


def _take_over(path: Path, source: Source, made: _CacheFile) -> None:
    """Copies what did not change, where there is room for both; it is verified when it is read."""
    try:
        with _opened(path) as fd:
            head = _parse(fd)
            if _made_otherwise(head.about, source):
                return
            marks = _marks(fd, head)
            same = [(new, old) for new, old in _same(head.table, made.head.table) if marks[old]]
            try:
                _check_room(path.parent, len(same) * head.slot)
            except OSError:
                return
            for new, old in same:
                _write(made.fd, _read_slot(fd, head, old), made.head.slots_at + new * head.slot)
                made.marks[new] = marks[old]
                made._fresh.append(new)
            made.commit()
    except (FileNotFoundError, _Damaged):
        return


def _new_head(source: Source) -> tuple[bytes, _Head]:
    table = _table(source)
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


def _parse(fd: int) -> _Head:
    start = os.pread(fd, 16, 0)
    if len(start) < 16 or start[:8] != MAGIC:
        raise _Damaged("it does not begin as a cache does")
    length, checksum = struct.unpack("<II", start[8:])
    text = os.pread(fd, min(length, 1 << 20), 16)
    if len(text) != length or zlib.crc32(text) != checksum:
        raise _Damaged("its head is not what was written")
    about = json.loads(text)
    if about.get("format") != FORMAT:
        raise _Damaged(f"its format is {about.get('format')}, not {FORMAT}")
    table_at = _padded(16 + length)
    table = _read(fd, RECORD * about["count"], table_at)
    if zlib.crc32(table) != about["table"]:
        raise _Damaged("its table is not what was written")
    marks_at = table_at + _padded(len(table))
    head = _Head(about, table, marks_at, marks_at + _padded(8 * about["count"]))
    if os.fstat(fd).st_size != head.bytes:
        raise _Damaged(f"it has {os.fstat(fd).st_size:,} bytes, not {head.bytes:,}")
    return head


def _marks(fd: int, head: _Head) -> Marks:
    return np.frombuffer(_read(fd, 8 * head.count, head.marks_at), "<u8").astype(np.uint64)


def _table(source: Source) -> bytes:
    def record(file: File) -> bytes:
        name = blake2b(os.fsencode(file.name), digest_size=16).digest()
        return name + struct.pack("<qq", file.size, file.time)

    return b"".join(map(record, source.files))


def _records(table: bytes) -> list[bytes]:
    return [table[start : start + RECORD] for start in range(0, len(table), RECORD)]


def _same(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """(position in new, position in old) of the images that are in both tables, unchanged."""
    places = {record: index for index, record in enumerate(_records(old))}
    return ((index, places[record]) for index, record in enumerate(_records(new)) if record in places)


def _made_otherwise(about: Mapping[str, Any], source: Source) -> str:
    """What but the files differs, in words; empty if nothing."""
    if [about["folder"], about["size"], about["transform"]] != [
        str(source.folder),
        list(source.size),
        source.transform,
    ]:
        return f"those kept come from {about['folder']} by {about['transform']} (was the file renamed?)"
    before, now = about["versions"], source.versions
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = [f"{name} {before.get(name)} instead of {now.get(name)}" for name in names]
    return f"decoded before with {', '.join(found)}" if found else ""


def _difference(head: _Head, source: Source) -> str:
    """What a cache was made from that the source is not, in words; empty if nothing."""
    if otherwise := _made_otherwise(head.about, source):
        return otherwise
    table = _table(source)
    if table == head.table:
        return ""
    before, now = ({record[:16]: record[16:] for record in _records(each)} for each in (head.table, table))
    counts = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(before[name] != now[name] for name in before.keys() & now.keys()),
    }
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{found or 'put in another order'} since they were decoded (now {len(source.files)} images)"


# --- the disk ------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_if_allowed(path: Path, flags: int = 0) -> tuple[int, bool]:
    """A descriptor for reading and writing or, where it must not be written, for reading; and which."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666), True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Held while a cache is made, so that one process makes it and the others find it made."""
    import fcntl  # not on Windows, where nothing gets here

    fd, _ = _open_if_allowed(directory / ".lock", os.O_CREAT)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: at worst a cache is made twice and the last one stays
        yield
    finally:
        os.close(fd)


def _check_room(directory: Path, wanted: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < wanted + RESERVE:
        raise OSError(
            errno.ENOSPC,
            f"{size(wanted)} and {size(RESERVE)} to spare are needed, {size(free)} are free",
            str(directory),
        )


def _read(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes or, at the end of the file, fewer; one call may give only 2 GB."""
    data = os.pread(fd, length, offset)
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def _read_slot(fd: int, head: _Head, index: int) -> bytes:
    try:
        return _read(fd, head.slot, head.slots_at + index * head.slot)
    except OSError:
        return b""  # a disk that cannot give it back has lost it: no checksum fits


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:  # a disk that is almost full may take a part
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _flush(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _padded(length: int) -> int:
    return -(-length // PAGE) * PAGE


def size(count: float) -> str:
    """Bytes in words: ``1.5 GB``."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


# --- what lies there -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A cache on disk. about: its head, or None for what no run can use; decoded: how many images;
    taken: bytes on disk."""

    path: Path
    about: dict[str, Any] | None
    decoded: int
    taken: int


def entries(directory: Path) -> list[Entry]:
    """Every cache in a directory, and what interrupted runs left of one; other files are passed over."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not _OURS.fullmatch(path.name) or not path.is_file():
            continue
        about, marked = None, 0
        try:
            with _opened(path) as fd:
                head = _parse(fd)
                about, marked = head.about, int(np.count_nonzero(_marks(fd, head)))
        except (OSError, _Damaged):
            pass
        try:
            found.append(Entry(path, about, marked, path.stat().st_blocks * 512))
        except FileNotFoundError:
            continue  # removed meanwhile
    return found
