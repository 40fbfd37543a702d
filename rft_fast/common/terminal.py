"""What leaves for the terminal: text that moves no cursor, hides nothing and reverses nothing.

Names of models, classes and files come from other people, and reach messages, tables and warnings. So the two
standard streams escape control characters, whoever writes to them: :func:`escaped`, which every command is
given by :func:`rft_fast.common.program.command`.
"""

from __future__ import annotations

import functools
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TextIO, TypeVar

from .words import visible

_P = ParamSpec("_P")
_R = TypeVar("_R")
# What tqdm writes: up and down between its bars; to the start of the line before a text; the line wiped.
_MOVES = re.compile(r"(?:\n|\x1b\[A)+")
_LINE = re.compile(r"(\r?)(.*?)((?<= )\r|)", re.DOTALL)


class Escaping:
    """A text stream that escapes control characters, but line ends, tabs and the moves of progress bars."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not _MOVES.fullmatch(text) and (found := _LINE.fullmatch(text)):
            text = found[1] + visible(found[2], lines=True) + found[3]
        return self._stream.write(text)

    def writelines(self, texts: Any) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def escaped(main: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes standard output and standard error escape while a function runs, and a traceback that ends it."""

    @functools.wraps(main)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        before = sys.stdout, sys.stderr
        # Either is None where the process has none.
        ours: list[Any] = [s if s is None or isinstance(s, Escaping) else Escaping(s) for s in before]
        sys.stdout, sys.stderr = ours
        try:
            return main(*args, **kwargs)
        except Exception:
            if sys.excepthook is sys.__excepthook__:
                sys.excepthook = _print_exception
            raise
        finally:
            for name, stream, own in zip(("stdout", "stderr"), before, ours, strict=True):
                if getattr(sys, name) is own:  # else somebody has put another in its place since
                    setattr(sys, name, stream)

    return run


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if sys.stderr is not None:
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace)), lines=True))
