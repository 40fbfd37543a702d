"""Escaping of control characters on the terminal, and the few colours of our own.

Names of models, classes and files come from other people and appear in messages, tables and warnings. The two
standard streams of every command therefore escape control characters
(:func:`rft_fast.common.program.command`). Colours are marked by a secret of this process, so that no name can
ask for one, and these streams turn the marks into escape codes.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, ParamSpec, TextIO, TypeVar

from .words import visible

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Written by tqdm: moves between its bars; a carriage return before a text; a cleared line.
_MOVES = re.compile(r"(?:\n|\x1b\[A)+")
_LINE = re.compile(r"(\r?)(.*?)((?<= )\r|)", re.DOTALL)

Style = Literal["heading", "error", "warning", "good"]
_CODES: dict[Style, str] = {"heading": "1", "error": "1;31", "warning": "33", "good": "32"}
_SECRET = secrets.token_hex(8)
_MARK = re.compile(rf"\x1b{_SECRET}\[([\d;]+)m")


def colours(stream: TextIO | Escaping | None) -> bool:
    """Return whether a stream shows colours: a terminal does, unless ``NO_COLOR`` or ``TERM=dumb`` is set.

    ``FORCE_COLOR`` makes any stream show them, except with ``NO_COLOR``.
    """
    if stream is None or os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def styled(text: str, style: Style, stream: TextIO | None = None) -> str:
    """Mark a text to be shown in a style, if the stream of a command shows colours.

    Args:
        text: what is shown; it must say by itself what the colour says.
        style: how.
        stream: where it will be written; None: standard output.

    Returns:
        The text; with marks only for a stream that turns them into escape codes.
    """
    stream = sys.stdout if stream is None else stream
    if not text or not isinstance(stream, Escaping) or not colours(stream):
        return text
    return f"\x1b{_SECRET}[{_CODES[style]}m{text}\x1b{_SECRET}[0m"


class Escaping:
    """A text stream that escapes control characters except line ends, tabs and the cursor moves of tqdm.

    Other attributes are those of the underlying stream.

    Args:
        stream: where text is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns the number of characters written."""
        if not _MOVES.fullmatch(text) and (match := _LINE.fullmatch(text)):
            # Every second part is the code of a mark.
            parts = _MARK.split(match[2])
            parts[::2] = [visible(part, lines=True) for part in parts[::2]]
            parts[1::2] = [f"\x1b[{code}m" for code in parts[1::2]]
            text = match[1] + "".join(parts) + match[3]
        return self._stream.write(text)

    def writelines(self, texts: Any) -> None:
        """Write several texts."""
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def escaped(main: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function run with escaping standard streams; a traceback that ends it is escaped, too.

    Args:
        main: any function.

    Returns:
        A function with the same arguments and result.
    """

    @functools.wraps(main)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        before = sys.stdout, sys.stderr
        # A stream is None if the process has none.
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
                if getattr(sys, name) is own:  # else it was replaced meanwhile
                    setattr(sys, name, stream)

    return run


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if sys.stderr is not None:
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace)), lines=True))
