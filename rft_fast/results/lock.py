"""The lock of a run's directory: one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
from contextlib import suppress
from datetime import datetime
from typing import IO

from ..common import disk
from .database import LOCK
from .errors import InUse


def hold(directory: pathlib.Path) -> IO[str]:
    """Take the lock, until the stream is closed or the process ends, however it ends.

    Raises:
        InUse: Another process holds it.
    """
    handle = disk.open_plain(directory / LOCK, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    stream = os.fdopen(handle, "a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            stream.close()
            raise InUse(_in_use(directory)) from None
        # On a file system without locks, SQLite's own and one place per measurement must suffice.
    stream.seek(0)
    stream.truncate()
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    stream.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    stream.flush()
    return stream


def release(stream: IO[str]) -> None:
    """Give the lock back and empty its file."""
    with suppress(OSError):
        stream.truncate(0)
    stream.close()


def refuse_in_use(directory: pathlib.Path) -> None:
    """Raise InUse while another process holds the lock."""
    file = directory / LOCK
    if not file.is_file():
        return
    with os.fdopen(disk.open_plain(file, os.O_RDWR), "r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise InUse(_in_use(directory)) from None


def _in_use(directory: pathlib.Path) -> str:
    by = (directory / LOCK).read_text(encoding="utf-8").strip() or "another process"
    return (
        f"results: {directory} is being written to by {by}; wait for it or stop it, or choose "
        "another directory (--workers uses several GPUs for one run)"
    )
