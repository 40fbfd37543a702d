"""Reading regular files, without memory mapping, and detecting files that change during a run."""

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

# A file modified less than this before its status was read may change again with the same timestamps: file
# systems have a resolution of up to 2 s (FAT), most of a few milliseconds.
YOUNG = 2_000_000_000  # ns


class Changed(OSError):
    """A file changed after it was first read."""


def special(path: str | PathLike[str]) -> str:
    """Name what is at a path if it exists and is not a regular file.

    Args:
        path: any path; links are followed.

    Returns:
        Such as ``a FIFO`` or ``a directory``; empty for a regular file and for a path that does not exist.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return kind(status)


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file for unbuffered reading; a buffer would hide later writes.

    Args:
        path: file to open; links are followed.

    Yields:
        The open binary stream.

    Raises:
        ValueError: it is a FIFO, a socket, a device or a directory; it is not opened and not waited for.
        OSError: it does not exist or cannot be read.
    """
    _refuse(os.stat(path), path)  # before opening, which has effects on some devices
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(handle, "rb", buffering=0) as stream:
        _refuse(os.fstat(handle), path)
        try:
            yield stream
        except OSError as error:  # a failing disk, for example, gives an error without a name
            if error.errno is not None and error.filename is None:
                error.filename = os.fspath(path)
            raise


def read_bytes(path: str | PathLike[str]) -> bytes:
    """Read the bytes of a regular file.

    Args:
        path: file to read.

    Returns:
        Its content.

    Raises:
        ValueError, OSError: as :func:`opened`.
    """
    with opened(path) as stream:
        return stream.read()


def read_text(path: str | PathLike[str], encoding: str = "utf-8") -> str:
    """Read the text of a regular file.

    Args:
        path: file to read.
        encoding: of its bytes.

    Returns:
        Its text with lines that end in ``\\n``.

    Raises:
        UnicodeDecodeError: its bytes are not in that encoding.
        ValueError, OSError: as :func:`opened`.
    """
    text = read_bytes(path).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Content:
    """The bytes of an open file, read on demand into new memory.

    Not memory-mapped: a process that touches a mapped file after it was truncated is killed by SIGBUS.

    Args:
        stream: unbuffered binary stream of a regular file; must stay open while slices are read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream  # must stay open while slices are read
        self._size = os.fstat(stream.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        """Read bytes ``start`` to ``stop``.

        Args:
            part: a slice without a step.

        Returns:
            A writable view of new memory; shorter at the end of the file.

        Raises:
            Changed: the file has become shorter since it was opened.
        """
        start, stop, _ = part.indices(self._size)
        data = np.empty(max(0, stop - start), np.uint8).data
        self.read_into(start, data)
        return data

    def read_into(self, start: int, data: memoryview) -> None:
        """Read bytes into memory that exists. Threads may read at the same time.

        Args:
            start: the first byte.
            data: writable bytes, all of which are filled.

        Raises:
            Changed: the file has become shorter since it was opened.
        """
        done = 0
        while done < len(data):  # one call reads at most 2 GB
            got = os.preadv(self._stream.fileno(), [data[done:]], start + done)
            if not got:
                raise Changed("became shorter while it was read")
            done += got


@dataclass(frozen=True)
class Stamp:
    """Identity of a file's content, as far as the file system's metadata shows it.

    Attributes:
        identity: device, inode, size in bytes, and the times of the last change of content and of metadata in
            ns.
        young: whether the file is so recent that it may change again without another identity.
    """

    identity: tuple[int, ...]  # device, inode, size, mtime and ctime in ns
    young: bool

    @classmethod
    def of(cls, path: str | PathLike[str]) -> Stamp:
        """Read the stamp of a regular file.

        Args:
            path: an existing file.

        Raises:
            ValueError, OSError: as :func:`opened`.
        """
        now = time.time_ns()
        status = os.stat(path)
        _refuse(status, path)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        identity = (status.st_dev, status.st_ino, status.st_size, *times)
        return cls(identity, abs(now - max(times)) < YOUNG)

    @classmethod
    def again(cls, path: pathlib.Path) -> Stamp:
        """Read the stamp of a file that existed before.

        Args:
            path: a file whose stamp was read earlier.

        Raises:
            Changed: it no longer exists, or is no longer a regular file.
        """
        try:
            return cls.of(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise Changed(f"{path} changed while it was in use: {reason}") from error

    def is_of(self, other: Stamp) -> bool:
        """Return whether the content is certainly that of another stamp."""
        return self.identity == other.identity and not self.young


class Inputs:
    """Files that the results of a run depend on: each is hashed once, and none may change until the run ends.

    A file counts as changed if its content is. One that was touched, moved away and back, or rewritten with
    the same bytes is only hashed again.
    """

    def __init__(self) -> None:
        self._known: dict[pathlib.Path, tuple[Stamp, str | None]] = {}

    def add(self, file: str | PathLike[str]) -> None:
        """Register a file that must not change from now on.

        Args:
            file: path of a regular file.

        Raises:
            ValueError, OSError: as :func:`opened`.
        """
        if (path := pathlib.Path(file)) not in self._known:
            self._known[path] = (Stamp.of(path), None)

    def sha256(self, file: str | PathLike[str]) -> str:
        """Return the SHA-256 of a file as 64 hexadecimal digits; it is computed once.

        Args:
            file: path of a regular file.

        Raises:
            Changed: the file changed after it was registered.
            ValueError, OSError: as :func:`opened`.
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
    def reading(self, *files: str | PathLike[str]) -> Iterator[None]:
        """Check on entry and on exit that files are those that were registered.

        Args:
            *files: paths of the files that are read inside.

        Raises:
            Changed: one is not; this replaces any error that their reader raises.
        """
        for file in files:
            self.add(file)
            if self._known[pathlib.Path(file)][0].young:  # its stamp alone does not identify its content
                self.sha256(file)
        self.check(*files)
        with self.unchanged(*files):
            yield

    @contextmanager
    def unchanged(self, *files: str | PathLike[str]) -> Iterator[None]:
        """Check files on exit; a change replaces any other error.

        Args:
            *files: registered files.

        Raises:
            Changed: one of them changed.
        """
        try:
            yield
        except Exception:
            self.check(*files)
            raise
        self.check(*files)

    def check(self, *files: str | PathLike[str]) -> None:
        """Raise an error if a registered file has changed.

        Args:
            *files: files to check; none: all of them.

        Raises:
            Changed: the first file that changed, by name.
        """
        for path in map(pathlib.Path, files) if files else list(self._known):
            before, known = self._known[path]
            now = Stamp.again(path)
            if before.is_of(now) or (known is None and before.identity == now.identity):
                continue
            if known is None:  # never hashed, so its previous content is unknown
                raise _changed(path, before, now)
            now, digest = _hashed(path)
            if digest != known:
                raise _changed(path, before, now)
            self._known[path] = (now, known)


def _hashed(path: pathlib.Path) -> tuple[Stamp, str]:
    """Hash a file that must not change meanwhile, and return its stamp as well."""
    before = Stamp.again(path)
    digest = sha256(path)
    after = Stamp.again(path)
    if before.identity != after.identity:
        raise _changed(path, before, after)
    return before, digest


def sha256(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a regular file as 64 hexadecimal digits.

    Args:
        path: file to read.

    Raises:
        ValueError, OSError: as :func:`opened`.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 18))  # used again: new memory for each read costs more than the read
    with opened(path) as stream:
        while got := os.readv(stream.fileno(), [buffer]):
            digest.update(buffer[:got])
    return digest.hexdigest()


def _changed(path: pathlib.Path, before: Stamp, now: Stamp) -> Changed:
    size, other = before.identity[2], now.identity[2]
    what = (
        f"from {size:,} to {other:,} bytes" if size != other else f"still {size:,} bytes, but different ones"
    )
    return Changed(
        f"{path} changed while it was in use ({what}), so results would be recorded under the "
        "SHA-256 of another file; restore it, or start a new run when nothing writes to it"
    )


def _refuse(status: os.stat_result, path: str | PathLike[str]) -> None:
    if actual := kind(status):
        raise ValueError(f"{path} is {actual}, expected a regular file")
