"""Files that are read: regular ones alone, never mapped, and the same from the first look to the last."""

from __future__ import annotations

import hashlib
import os
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO

import numpy as np

from .disk import kind

# A file that was written this shortly before it was looked at may be written again without another time:
# file systems count in steps of up to 2 s (FAT), most of some milliseconds.
YOUNG = 2_000_000_000  # ns


class Changed(OSError):
    """A file is no longer what it was when it was first read."""


def special(path: str | PathLike[str]) -> str:
    """What lies at a path, in words, where it exists and is no regular file; else empty."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return kind(status)


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a regular file for reading, without a buffer, which would hide what is written meanwhile.

    Raises:
        ValueError: it is a FIFO, a socket, a device or a folder. None of these is waited for.
        OSError: it does not exist, or must not be read.
    """
    _refuse(os.stat(path), path)  # before it is opened: some devices act on that
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(handle, "rb", buffering=0) as stream:
        _refuse(os.fstat(handle), path)
        try:
            yield stream
        except OSError as error:  # such as of a disk that fails, which names no file
            if error.errno is not None and error.filename is None:
                error.filename = os.fspath(path)
            raise


def read_bytes(path: str | PathLike[str]) -> bytes:
    """The bytes of a regular file; raises as :func:`opened` does."""
    with opened(path) as stream:
        return stream.read()


def read_text(path: str | PathLike[str], encoding: str = "utf-8") -> str:
    """The text of a regular file, lines ended by ``\\n``.

    Raises UnicodeDecodeError, a ValueError, for other bytes, and else as :func:`opened` does.
    """
    text = read_bytes(path).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Content:
    """The bytes of an open file, read when they are asked for, into memory of their own.

    Not mapped: where a mapped file is cut short, the process that touches it dies by SIGBUS.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream  # kept open as long as anything may be read
        self._size = os.fstat(stream.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        """Bytes from start to stop, writable; fewer at the end of the file.

        Raises Changed where the file has become shorter since it was opened.
        """
        start, stop, _ = part.indices(self._size)
        data = np.empty(max(0, stop - start), np.uint8).data
        done = 0
        self._stream.seek(start)
        while done < len(data):  # one call may give only 2 GB
            got = self._stream.readinto(data[done:])  # type: ignore[attr-defined]
            if not got:
                raise Changed("has become shorter while it was read")
            done += got
        return data


@dataclass(frozen=True)
class Stamp:
    """What a file system tells of a file's bytes. young: they may change without another stamp."""

    identity: tuple[int, ...]  # device, inode, size, time of its bytes and of its entry in ns
    young: bool

    @classmethod
    def of(cls, path: str | PathLike[str]) -> Stamp:
        """Raises as :func:`opened` does."""
        now = time.time_ns()
        status = os.stat(path)
        _refuse(status, path)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        identity = (status.st_dev, status.st_ino, status.st_size, *times)
        return cls(identity, abs(now - max(times)) < YOUNG)

    @classmethod
    def again(cls, path: pathlib.Path) -> Stamp:
        """As :meth:`of`, but of a file that was there before; raises Changed where it is no more."""
        try:
            return cls.of(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise Changed(f"{path} changed while it was in use: {reason}") from error

    def is_of(self, other: Stamp) -> bool:
        """Whether the bytes are the same for sure."""
        return self.identity == other.identity and not self.young


class Inputs:
    """Files that the numbers of a run depend on: each hashed once, none changed until the run ends.

    A file counts as changed where its content does: one that was touched, moved away and put back, or
    written anew with the same bytes is hashed again, and that is all.
    """

    def __init__(self) -> None:
        self._known: dict[pathlib.Path, tuple[Stamp, str | None]] = {}

    def add(self, file: str | PathLike[str]) -> None:
        """From now on this file must not change. Raises as :func:`opened` does."""
        if (path := pathlib.Path(file)) not in self._known:
            self._known[path] = (Stamp.of(path), None)

    def sha256(self, file: str | PathLike[str]) -> str:
        """The SHA-256 of a file, read once.

        Raises Changed where the file is not the one that was added.
        """
        self.add(file)
        path = pathlib.Path(file)
        before, known = self._known[path]
        if known is None:
            after, known = _hashed(path)
            if after.identity != before.identity:
                raise _changed(path, before, after)
            self._known[path] = (after, known)
        return known

    @contextmanager
    def reading(self, file: str | PathLike[str]) -> Iterator[None]:
        """What is read of a file in here is of the file that was added or hashed.

        Raises Changed where it is not, instead of what its reader makes of the rest of it.
        """
        self.add(file)
        if self._known[pathlib.Path(file)][0].young:  # its stamp alone says too little
            self.sha256(file)
        self.check(file)
        with self.unchanged(file):
            yield

    @contextmanager
    def unchanged(self, *files: str | PathLike[str]) -> Iterator[None]:
        """Raises Changed at the end, instead of any other error, where one of these files has changed."""
        try:
            yield
        except Exception:
            self.check(*files)
            raise
        self.check(*files)

    def check(self, *files: str | PathLike[str]) -> None:
        """Raises Changed, naming the file, where one of these has changed; none named: one of all."""
        for path in map(pathlib.Path, files) if files else list(self._known):
            before, known = self._known[path]
            now = Stamp.again(path)
            if before.is_of(now) or (known is None and before.identity == now.identity):
                continue
            if known is None:  # what it held is not known
                raise _changed(path, before, now)
            now, found = _hashed(path)
            if found != known:
                raise _changed(path, before, now)
            self._known[path] = (now, known)


def _hashed(path: pathlib.Path) -> tuple[Stamp, str]:
    """The SHA-256 of a file that does not change meanwhile, and its stamp."""
    before = Stamp.again(path)
    found = sha256(path)
    after = Stamp.again(path)
    if before.identity != after.identity:
        raise _changed(path, before, after)
    return before, found


def sha256(path: str | PathLike[str]) -> str:
    """The SHA-256 of a regular file as 64 hexadecimal digits. Raises as :func:`opened` does."""
    digest = hashlib.sha256()
    with opened(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _changed(path: pathlib.Path, before: Stamp, now: Stamp) -> Changed:
    size, other = before.identity[2], now.identity[2]
    what = f"from {size:,} to {other:,} bytes" if size != other else f"its {size:,} bytes are others now"
    return Changed(
        f"{path} changed while it was in use ({what}), so that its results would stand under another "
        "file's SHA-256; restore it, or start a run of its own once nothing writes to it"
    )


def _refuse(status: os.stat_result, path: str | PathLike[str]) -> None:
    if other := kind(status):
        raise ValueError(f"{path} is {other}, expected a regular file")
