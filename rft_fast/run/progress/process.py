"""State of the whole process: warnings, standard output, terminal."""

from __future__ import annotations

import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import TqdmWarning

from ...common.words import message

_WIDTH = 80  # columns of a terminal of unknown size


@contextmanager
def held_warnings() -> Iterator[list[str]]:
    """Collect Python's warnings until there is a :class:`Progress` that can report them.

    Yields:
        The list that receives their texts. On an error, they are printed on standard error.
    """
    texts: list[str] = []
    restore = redirect_warnings(texts.append)
    try:
        yield texts
    except BaseException:
        for text in texts:
            print(message(text), file=sys.stderr)
        raise
    finally:
        restore()


def redirect_warnings(notice: Callable[[str], None]) -> Callable[[], None]:
    """Pass Python's warnings to ``notice`` until the returned function is called."""
    before, process = warnings.showwarning, os.getpid()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Except those for a file; those in a forked worker, where a thread that does not exist there may hold
        # the lock; and those that tqdm issues while it holds its own lock.
        if file is not None or os.getpid() != process or issubclass(category, TqdmWarning):
            before(message, category, filename, lineno, file, line)
        else:
            notice(f"{category.__name__}: {message} ({pathlib.Path(filename).name}, line {lineno})")

    def restore() -> None:
        if warnings.showwarning is show:  # otherwise it has been replaced since
            warnings.showwarning = before

    warnings.showwarning = show
    return restore


def discard(stream: TextIO) -> None:
    """Redirect standard output to the null device, or its buffered text would fail again at exit."""
    if stream is sys.stdout:
        with suppress(OSError, ValueError):  # it has no file descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def columns(terminal: TextIO | None) -> int:
    """Return the usable columns of a terminal: all but the last, after which some terminals wrap."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns if terminal else 0
    except (OSError, ValueError):  # not a terminal
        columns = 0
    return (columns or _WIDTH) - 1
