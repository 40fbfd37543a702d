"""Command-line programs: parsers, exit statuses, guarded output, and signals that stop the work."""

from __future__ import annotations

import argparse
import copy
import difflib
import errno
import functools
import io
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

from . import cwd, words
from .terminal import escaped, styled

# Command -> what it does; run as ``python -m rft_fast.NAME``.
COMMANDS = {
    "sweep": "measure fine-tuned models along their paths",
    "finetune": "fine-tune a zero-shot CLIP model for the sweep",
    "merge": "merge models: interpolation, soups, task vectors",
    "checkpoints": "describe a checkpoint, or compare two",
    "datasets": "describe a data set and its problems",
    "results": "list and export the rows of a run",
    "figures": "draw the figures of a run again",
    "report": "write a run, or two compared, as an HTML page",
    "cache": "list or remove cached images",
    "env": "print versions and the kernels that work here",
}
INTERRUPTED = 130  # exit status, as shells have it


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors and two forms of help: ``--help`` short, ``--help-all`` complete.

    Args:
        details: text below the description, in the complete help only.
        **more: arguments of argparse.ArgumentParser.

    Attributes:
        brief: options -> their text in the short help; empty: only the complete help shows them. Other
            arguments are the same in both.
        help_group: group of ``--help`` and the like, the last one.
    """

    def __init__(self, details: str = "", **more: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Formatter, **more)
        self.color = False  # Python 3.14 would write escape codes
        self.brief: dict[argparse.Action, str] = {}
        self._details = details
        self.help_group = self.add_argument_group("help")
        self.help_group.add_argument("-h", "--help", action=_Help, help="show this help and exit")

    def format_help(self, all_options: bool = False) -> str:
        """Return the help: the short one, or the complete one with all options."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.add_text(self._details if all_options else None)
        groups = [(group.title, group.description, group._group_actions) for group in self._action_groups]
        if self.brief and not all_options:
            groups = [(title, about, own) for title, about, own in groups if not {*own} & {*self.brief}]
            groups.append(("common options", None, [_with(*each) for each in self.brief.items() if each[1]]))
        for title, about, actions in sorted(groups, key=lambda group: group[0] == self.help_group.title):
            if actions:
                formatter.start_section(title)
                formatter.add_text(about)
                formatter.add_arguments(actions)
                formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def shorten(self, brief: Mapping[argparse.Action, str]) -> None:
        """Set the short texts of options, as in ``brief``, and add ``--help-all``."""
        self.brief |= brief
        text = f"show all {len(self.brief)} options and exit"
        self.help_group.add_argument("--help-all", action=_Help, help=text)

    def error(self, message: str) -> NoReturn:
        """Print one line, and one with a hint; exit with status 2."""
        hint = f"{self.prog} --help lists the options"
        option = message.removeprefix("unrecognized arguments: ").partition("=")[0].partition(" ")[0]
        if message.startswith("unrecognized arguments: --"):
            hint = f"{self.prog} --help-all lists all options" if self.brief else hint
            known = sorted(self._option_string_actions)
            if near := difflib.get_close_matches(option, known, n=1):
                hint = f"did you mean {near[0]}? {hint}"
        self.exit(cwd.REFUSED, f"{failure(self.prog, message)}\n({hint})\n")


def next_step(name: str, *arguments: object) -> str:
    """Return the line that says what to run next, quoted for the shell.

    Args:
        name: a key of COMMANDS, or another command line's beginning, such as ``"pip install"``.
        *arguments: of that command; files as ``Path``, so that none is read as an option.
    """
    command = called(name) if name in COMMANDS else name
    # pathlib shortens ./-x to -x, which would be read as an option
    plain = [
        f"./{one}" if isinstance(one, Path) and str(one).startswith("-") else str(one) for one in arguments
    ]
    return f"{styled('next:', 'heading')} {command} {shlex.join(plain)}".rstrip()


def _with(action: argparse.Action, help: str) -> argparse.Action:
    other = copy.copy(action)
    other.help = help
    return other


class _Help(argparse.Action):
    """Prints the short help, or with ``--help-all`` the complete one, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help(option_string == "--help-all"), end="")
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Help of at most 100 columns; texts of several lines stay as they are; ``X ...`` for several values."""

    def __init__(self, prog: str, **more: Any) -> None:
        width = min(100, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, **{"max_help_position": 27, "width": width} | more)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text.strip():
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+" and action.option_strings:
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)


def failure(prog: str, error: object) -> str:
    """Return the line of an error on standard error, which begins with the command's name.

    Args:
        prog: the command, such as ``"python -m rft_fast.merge"`` or ``"merge"``.
        error: an exception or a text; if it begins with the same name, that is not repeated.
    """
    name = prog.removeprefix("python -m ").removeprefix("rft_fast.")
    text = words.message(error).removeprefix(f"{name}: ")
    return f"{styled(f'{name}: error:', 'error', sys.stderr)} {text}"


def parser(name: str, version: bool = True, **more: Any) -> Parser:
    """Make the argument parser of a command, with ``--help`` and ``--version`` and without abbreviations.

    Args:
        name: a key of COMMANDS, or ``""`` for ``python -m rft_fast`` itself.
        version: whether to add ``--version``.
        **more: arguments of :class:`Parser`.
    """
    from rft_fast import __version__

    result = Parser(prog=called(name), **more)
    if version:
        text = f"rft_fast {__version__}"
        result.help_group.add_argument(
            "--version", action="version", version=text, help="show the version and exit"
        )
    return result


def listed(table: Mapping[Any, str]) -> str:
    """Return names and what they mean, one per line, indented.

    Args:
        table: name -> text.
    """
    width = max(map(len, table))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in table.items())


def called(name: str) -> str:
    """Return the command line that runs a command, without arguments.

    Args:
        name: as for :func:`parser`.
    """
    return f"python -m rft_fast.{name}" if name else "python -m rft_fast"


def command(name: str) -> Callable[[Callable[[Sequence[str]], int]], Callable[..., int]]:
    """Make a ``main(argv)`` a command: ``main()`` without arguments then parses ``sys.argv``.

    Control characters of the output are escaped. Arguments with NUL bytes and a deleted working directory are
    refused with exit status 2. For ``main()`` without arguments also: Ctrl-C ends the command with status
    130, and output that cannot be written ends nothing (:func:`guard_output`).

    Args:
        name: as for :func:`parser`.

    Returns:
        A decorator of functions that take the arguments and return the exit status.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
        shown = escaped(main)

        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            if argv is not None:
                _check(name, argv)
                return shown(list(argv))
            guards = guard_output()
            _check(name, sys.argv[1:])
            try:
                status = shown(sys.argv[1:])
            except KeyboardInterrupt:
                print(f"\n{name or 'rft_fast'}: interrupted", file=sys.stderr)
                status = INTERRUPTED
            for guard in guards:
                guard.flush()
                if (error := broken(guard)) is not None and not _reader_left(error):
                    print(failure(called(name), f"output could not be written: {error}"), file=sys.stderr)
                    status = status or 1
            return status

        return run

    return decorate


def nul(text: str) -> bool:
    """Return whether a text contains a NUL byte, which no file name can."""
    return "\0" in text


def _check(name: str, argv: Sequence[str]) -> None:
    """Refuse NUL bytes in arguments, and a deleted working directory."""
    for argument in argv:
        if nul(argument):
            text = f"argument {argument!r} contains a NUL byte, which file names cannot contain"
            print(failure(called(name), text), file=sys.stderr)
            raise SystemExit(cwd.REFUSED)
    if not cwd.exists():
        print(failure(called(name), cwd.GONE), file=sys.stderr)
        raise SystemExit(cwd.REFUSED)


# --- standard output and standard error -----------------------------------------------------------------


class _Guarded(io.RawIOBase):
    """A file descriptor whose writes always succeed; the first error is kept in ``error``."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and self.error is None:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                self.error = error
        return size


def guard_output() -> list[TextIO]:
    """Replace standard output and standard error by streams whose writes never raise.

    A closed pipe (``| head``) or terminal must neither end a run that is measuring nor make a complete one
    fail. What cannot be written is dropped; :func:`broken` gives the reason.

    Returns:
        The new streams, of those that were the process's own.
    """
    for descriptor in range(3):  # a closed one would be reused by the next open file
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    guarded: list[TextIO] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.flush()
            raw = _Guarded(stream.fileno())
            # No io.BufferedWriter, which is not reentrant in signal handlers; the wrapper has its own buffer.
            # Characters that the encoding lacks must not end a run, either.
            guard = io.TextIOWrapper(
                raw,  # type: ignore[type-var]
                encoding=stream.encoding,
                errors="backslashreplace" if stream.errors == "strict" else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guard)
            guarded.append(guard)
    return guarded


def broken(stream: object) -> OSError | None:
    """Return the error after which a stream drops its output; None if there was none.

    Args:
        stream: one of :func:`guard_output`; for other objects the result is None.
    """
    raw = getattr(stream, "buffer", None)
    return raw.error if isinstance(raw, _Guarded) else None


def _reader_left(error: OSError) -> bool:
    return error.errno in (errno.EPIPE, errno.EIO)  # EIO: a terminal that was closed


# --- signals --------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The work was stopped on request; everything in flight was finished and kept."""


class Stop:
    """Handle Ctrl-C, SIGTERM and SIGHUP: the first stops the work after the step in flight, the next at once.

    A second SIGHUP is ignored: shell and kernel may each send one for the same terminal. A context manager
    for the main thread; in other threads it changes nothing.

    Args:
        notice: called with a sentence for the user at the first signal.
        step: name of the step that is finished first.

    Attributes:
        requested: whether a signal has arrived.
    """

    def __init__(self, notice: Callable[[str], object], step: str = "measurement") -> None:
        self._notice, self._step = notice, step
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # Ignored signals, as in background jobs of a shell or under nohup, stay ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self.requested = True
        what = {
            signal.SIGINT: "press Ctrl-C again to stop at once",
            signal.SIGTERM: "send SIGTERM again to stop at once",
        }
        again = what.get(signal.Signals(number), "after SIGHUP; send SIGTERM to stop at once")
        self._notice(f"stopping after the current {self._step} ({again})")

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.requested:
            raise Interrupted
