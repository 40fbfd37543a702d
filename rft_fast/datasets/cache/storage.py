"""Disk operations of the cache: complete reads and writes, free space, and a lock."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

RESERVE = 256 << 20  # bytes left free on the disk, for results and other programs


@contextmanager
def opened(path: pathlib.Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def open_if_allowed(path: pathlib.Path, flags: int = 0) -> tuple[int, bool]:
    """Open for reading and writing, or else for reading; return the descriptor and whether it can write."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666), True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


@contextmanager
def lock(directory: pathlib.Path) -> Iterator[None]:
    """Lock the directory while a cache is created, so that one process creates it and the others find it."""
    import fcntl  # missing on Windows, where caches are not supported

    fd, _ = open_if_allowed(directory / ".lock", os.O_CREAT)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: at worst a cache is created twice and the last one stays
        yield
    finally:
        os.close(fd)


def check_room(directory: pathlib.Path, wanted: int) -> None:
    """Raise OSError unless this many bytes, and a reserve, are free."""
    free = shutil.disk_usage(directory).free
    if free < wanted + RESERVE:
        raise OSError(
            errno.ENOSPC,
            f"{size(wanted)} are needed, with {size(RESERVE)} to spare, but {size(free)} are free",
            str(directory),
        )


def read(fd: int, length: int, offset: int) -> bytes:
    """Read ``length`` bytes, or fewer at the end of the file; a single call may return only 2 GB."""
    data = os.pread(fd, length, offset)
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes."""
    view = memoryview(data)
    while view:  # an almost full disk may accept only a part
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def flush(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def size(count: float) -> str:
    """Format a number of bytes: ``1.5 GB``."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
