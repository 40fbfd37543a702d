"""Atomic writes, file locks, and checks of paths before anything is written.

Nothing here follows a link or writes to anything but a regular file: a directory may come from someone else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

_PART = 8  # random bytes in the name of a temporary file
# Bytes of a name that can be written: its temporary file (.NAME.16 digits.part) has more, and may have 255.
LONGEST_NAME = 255 - len("...part") - 2 * _PART
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
    """Check the paths that a process is about to write, before it writes any.

    Args:
        files: files that will be replaced.
        in_place: files that will be changed in place, so that a hard link elsewhere would change with them.
        folders: directories that files will be written to.

    Raises:
        ValueError: a path is a link, a FIFO, a device, or a directory where a file belongs; or a file of
            ``in_place`` has hard links.
    """
    alone = {*in_place}
    for file in (*files, *alone, *(inside := {*folders})):
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.lstat(file)
            if (actual := kind(status)) and not (file in inside and stat.S_ISDIR(status.st_mode)):
                where = f" to {os.readlink(file)}" if stat.S_ISLNK(status.st_mode) else ""
                expected = "a directory" if file in inside else "a file"
                raise ValueError(
                    f"{file} is {actual}{where}; expected {expected} or nothing, because rft_fast writes "
                    "there. If the directory comes from someone else, remove it or choose another one"
                )
            if file in alone and status.st_nlink > 1:
                raise ValueError(
                    f"{file} is a hard link: writing to it would change the same file under another name; "
                    "make a copy (cp FILE COPY, mv COPY FILE), or choose another directory"
                )


def check_outside(out: pathlib.Path, data: Mapping[str, pathlib.Path], where: str) -> None:
    """Check that a directory for results is not in a folder of images, where its files would become a class.

    Args:
        out: the directory, which need not exist.
        data: name -> path of each data set.
        where: the beginning of the message.

    Raises:
        ValueError: it is one of these folders, or lies in one.
    """
    target = out.resolve()
    for name, path in data.items():
        if path.is_dir() and target.is_relative_to(path.resolve()):
            raise ValueError(
                f"{where}: {out} is in the folder of the data set {name} ({path}), and what is written there "
                "would be read as images of another class; choose a directory outside of it"
            )


def open_plain(file: pathlib.Path, flags: int) -> int:
    """Open a regular file without following links or waiting for FIFOs.

    Args:
        file: path to open; character devices such as ``/dev/null`` are accepted.
        flags: as for :func:`os.open`.

    Returns:
        A file descriptor, which the caller closes.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    try:
        handle = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and file.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed", str(file)) from None
        raise
    status = os.fstat(handle)
    # Character devices such as /dev/null are accepted: only root can create them.
    if (actual := kind(status)) and not stat.S_ISCHR(status.st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"{actual}, expected a file", str(file))
    return handle


def read_plain(file: pathlib.Path, most: int) -> bytes:
    """Read a regular file, without following links or waiting for FIFOs.

    Args:
        file: path of the file.
        most: bytes to read, at most.

    Raises:
        OSError: as :func:`open_plain`.
    """
    with os.fdopen(open_plain(file, os.O_RDONLY), "rb") as stream:
        return stream.read(most)


@contextmanager
def replacing(file: pathlib.Path, empty: bool = False) -> Iterator[pathlib.Path]:
    """Yield a temporary path; on exit, fsync it and rename it over ``file`` atomically.

    The temporary file lies beside ``file`` under an unpredictable name. Temporary files of killed processes
    are removed.

    Args:
        file: path that is replaced.
        empty: whether an empty file is accepted.

    Yields:
        Path of an empty temporary file to write to.

    Raises:
        FileNotFoundError: nothing was written, and ``empty`` is false.
        OSError: the file cannot be written.
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
    """Create a temporary file that stays locked while its descriptor is open."""
    while True:
        part = file.with_name(f".{file.name}.{secrets.token_hex(_PART)}.part")
        handle = open_plain(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with suppress(OSError):  # no locks on this file system, so nothing is removed either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another process removed it before it was locked
            return handle, part
        os.close(handle)


def _remove_left(file: pathlib.Path) -> None:
    """Remove temporary files of a file that no process holds."""
    prefix = f".{file.name}."
    names = [n for n in os.listdir(file.parent) if n.startswith(prefix) and n.endswith(".part")]
    for part in (file.with_name(n) for n in names if len(n) == len(prefix) + 2 * _PART + len(".part")):
        with suppress(OSError):
            handle = open_plain(part, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(handle)


def replace(file: pathlib.Path, content: bytes) -> None:
    """Replace a file's content atomically, as :func:`replacing` does.

    Args:
        file: path that is replaced.
        content: bytes of the new file; may be empty.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(file, empty=not content) as temporary:
        temporary.write_bytes(content)


def sync_folder(folder: pathlib.Path) -> None:
    """Flush the names in a directory to disk, where the file system supports it.

    Args:
        folder: an existing directory.

    Raises:
        OSError: the directory cannot be opened, or flushing fails.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(file: pathlib.Path, wait: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file while the context is open; the file is removed on exit.

    The lock of a process that is killed is released. On file systems without locks, every process gets it.

    Args:
        file: path of the lock file, created if missing.
        wait: wait for the lock instead of giving up.

    Yields:
        Whether this process holds the lock; False if another one does.

    Raises:
        OSError: the lock file cannot be opened.
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
        # The previous owner removed the file, and a third process may have created it again.
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == file.stat().st_ino:
                break
        os.close(handle)
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
