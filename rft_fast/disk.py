"""Files that are whole or not there, on disk when that is said, and locks that a killed process loses."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to; what is there at the end takes the file's place, on disk and whole, at once.

    Always the same name, so that what a killed process leaves is written over: the caller has the lock.
    """
    temporary = file.with_name(f".{file.name}.part")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


def replace(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def sync_folder(folder: Path) -> None:
    """On return the names in a folder are on disk, where the file system can tell it so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network file systems say
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone has the lock, a file that is gone at the end; False where another has it.

    A process that is killed loses its lock. On file systems without locks everyone gets it.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                os.close(handle)
                yield False
                return
        # Whoever had it before has removed the file, and a third may have made it anew.
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == file.stat().st_ino:
                break
        os.close(handle)
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
