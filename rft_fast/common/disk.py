"""Files that are whole or not there, on disk when that is said, and locks that a killed process loses.

Nothing here writes through a link, or into what is no plain file: a folder may come from somebody else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

_KINDS = {
    stat.S_IFREG: "",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def kind(status: os.stat_result) -> str:
    """Name what a status is of, such as ``a FIFO``; empty for a regular file."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "a device")


def check_targets(
    files: Iterable[pathlib.Path], in_place: Iterable[pathlib.Path] = (), folders: Iterable[pathlib.Path] = ()
) -> None:
    """Checks the names that a process is about to write, before it writes any.

    Args:
        files: names that new files replace.
        in_place: names of files that are changed where they are, so that a second name of one, elsewhere,
            would change with it.
        folders: names of directories that files are written into.

    Raises:
        ValueError: at one of the names is a link, a FIFO, a device, or a directory where a file belongs; for
            ``in_place`` also a file with hard links.
    """
    alone = {*in_place}
    for file in (*files, *alone, *(inside := {*folders})):
        with suppress(FileNotFoundError, NotADirectoryError):
            found = os.lstat(file)
            if (found_kind := kind(found)) and not (file in inside and stat.S_ISDIR(found.st_mode)):
                where = f" to {os.readlink(file)}" if stat.S_ISLNK(found.st_mode) else ""
                wanted = "a directory" if file in inside else "a file"
                raise ValueError(
                    f"{file} is {found_kind}{where}; expected {wanted} or nothing, as rft_fast writes there. "
                    "Is the directory from somebody else? Remove it, or choose another directory"
                )
            if file in alone and found.st_nlink > 1:
                raise ValueError(
                    f"{file} is a hard link, so that writing to it would change the same file under another "
                    "name; copy it (cp FILE COPY, mv COPY FILE), or choose another directory"
                )


def open_plain(file: pathlib.Path, flags: int) -> int:
    """A descriptor of a plain file, as of :func:`os.open`; links are not followed, FIFOs not waited for.

    Raises OSError, also for what is no plain file.
    """
    try:
        handle = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and file.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed", str(file)) from None
        raise
    found = os.fstat(handle)
    if (other := kind(found)) and not stat.S_ISCHR(found.st_mode):  # as /dev/null, which nobody can plant
        os.close(handle)
        raise OSError(errno.EINVAL, f"{other}, expected a file", str(file))
    return handle


@contextmanager
def replacing(file: pathlib.Path, empty: bool = False) -> Iterator[pathlib.Path]:
    """A name to write to; what is there at the end takes the file's place, on disk and whole, at once.

    The name is a new empty file beside it, which nobody can foresee. What killed processes left of theirs is
    removed. Raises FileNotFoundError where nothing was written, unless the file may be ``empty``.
    """
    _remove_left(file)
    handle, temporary = _new_part(file)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            if not (empty or os.fstat(stream.fileno()).st_size):
                raise FileNotFoundError(errno.ENOENT, "nothing was written", str(temporary))
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)
    sync_folder(file.parent)


def _new_part(file: pathlib.Path) -> tuple[int, pathlib.Path]:
    """A new file, locked as long as its descriptor is open."""
    while True:
        part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")
        handle = open_plain(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with suppress(OSError):  # a file system without locks, where nothing that is left is removed
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else taken for one that is left, before it was locked
            return handle, part
        os.close(handle)


def _remove_left(file: pathlib.Path) -> None:
    """Removes parts of a file that no process holds."""
    prefix = f".{file.name}."
    names = [n for n in os.listdir(file.parent) if n.startswith(prefix) and n.endswith(".part")]
    for part in (file.with_name(n) for n in names if len(n) == len(prefix) + 16 + len(".part")):
        with suppress(OSError):
            handle = open_plain(part, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(handle)


def replace(file: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(file, empty=not content) as temporary:
        temporary.write_bytes(content)


def sync_folder(folder: pathlib.Path) -> None:
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
def locked(file: pathlib.Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone has the lock, a file that is gone at the end; False where another has it.

    A process that is killed loses its lock. On file systems without locks everyone gets it.
    """
    while True:
        handle = open_plain(file, os.O_RDWR | os.O_CREAT)
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
