"""What belongs to the whole process: its warnings, its standard output, its terminal."""

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

_WIDTH = 80  # of a terminal that does not tell


@contextmanager
def held_warnings() -> Iterator[list[str]]:
    """Meanwhile Python's warnings become texts in the list, for a :class:`Progress` that is not there yet.

    Where that never comes, because of an error, they are printed on standard error.
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
    """Sends Python's warnings to ``notice`` until the function that is returned is called."""
    before, process = warnings.showwarning, os.getpid()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Not those that are on their way to a file; not in a forked worker, where our lock may be held
        # by a thread that is not there; not those that tqdm raises while it holds its lock.
        if file is not None or os.getpid() != process or issubclass(category, TqdmWarning):
            before(message, category, filename, lineno, file, line)
        else:
            notice(f"{category.__name__}: {message} ({pathlib.Path(filename).name}, line {lineno})")

    def restore() -> None:
        if warnings.showwarning is show:  # else somebody has put another in its place since
            warnings.showwarning = before

    warnings.showwarning = show
    return restore


def discard(stream: TextIO) -> None:
    """Lets standard output go nowhere. What waits in its buffer would fail again when Python exits."""
    if stream is sys.stdout:
        with suppress(OSError, ValueError):  # no file of the system's
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def columns(terminal: TextIO | None) -> int:
    """What fits on a line of a terminal; not its last column, after which some would wrap."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns if terminal else 0
    except (OSError, ValueError):  # no terminal of the system's
        columns = 0
    return (columns or _WIDTH) - 1
