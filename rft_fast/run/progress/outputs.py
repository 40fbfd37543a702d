"""Where progress is shown: the log file, JSON lines on a stream, the live line on a terminal.

An output that fails (disk full, pipe closed) is dropped, with one notice on the terminal; the run continues.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from threading import Event, Thread
from typing import Any, TextIO

from tqdm import tqdm

from ...common import disk
from ...common.program import broken
from .phrases import plain
from .process import columns, discard

_REDRAWN, _TICK = 0.1, 1.0  # seconds between drawings of the live line, and between its ticks


class Log:
    """A text file with one dated line per event.

    Args:
        file: lines are appended to it; None: nothing is written.
        now: returns the time of day.
        failed: called with a message when the file cannot be written.
    """

    def __init__(
        self, file: pathlib.Path | None, now: Callable[[], datetime], failed: Callable[[str], None]
    ) -> None:
        self._file, self._now, self._failed = file, now, failed

    def write(self, text: str) -> None:
        """Append a line. The file is opened for each, so that it is complete at any time and can be moved."""
        if self._file is None:
            return
        line = f"{self._now():%Y-%m-%d %H:%M:%S}  {plain(text)}\n"
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            with os.fdopen(disk.open_plain(self._file, flags), "a+b") as file:
                # A process that died while writing has left an incomplete line.
                if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    line = "\n" + line
                file.write(line.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._file = None
            self._failed(f"run.log cannot be written, the run continues without it: {error}")


class JsonLines:
    """One JSON object per event.

    Args:
        stream: None: nothing is written.
        now: returns the time of day; without a time zone, it is local.
        failed: called with a message when the stream cannot be written.
    """

    def __init__(
        self, stream: TextIO | None, now: Callable[[], datetime], failed: Callable[[str], None]
    ) -> None:
        self._stream, self._now, self._failed = stream, now, failed

    def __bool__(self) -> bool:
        return self._stream is not None

    def write(self, event: str, **fields: object) -> None:
        """Write an event and flush the stream."""
        if self._stream is None:
            return
        moment = self._now()
        moment = moment if moment.tzinfo else moment.astimezone()
        stamped = {"event": event, "time": moment.isoformat(timespec="milliseconds"), **fields}
        line = json.dumps(stamped, allow_nan=False)
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
            if (error := broken(self._stream)) is not None:
                raise error
        except (OSError, ValueError) as error:  # ValueError: closed in this process
            discard(self._stream)
            self._stream = None
            self._failed(f"JSON lines cannot be written, the run continues without them: {error}")


class Terminal:
    """Notices, with a live line below them while the stream is an interactive terminal.

    Args:
        stream: None: no live line, and notices go to standard error.
        line: returns the text of the live line for a width in columns.
        clock: returns seconds that never decrease.
        lock: held while the line is drawn; acquired before tqdm's own lock, never while that one is held.
    """

    def __init__(
        self,
        stream: TextIO | None,
        line: Callable[[int], str],
        clock: Callable[[], float],
        lock: AbstractContextManager[Any],
    ) -> None:
        self._stream, self._line, self._clock, self._lock = stream, line, clock, lock
        self._bar: Any = None
        self._drawn = -math.inf
        self._ticker: Thread | None = None
        self._stop = Event()

    def write(self, text: str) -> None:
        """Write a line above the live one."""
        with suppress(OSError, ValueError, AttributeError):  # standard error may be None
            tqdm.write(plain(text), file=self._stream or sys.stderr)
            (self._stream or sys.stderr).flush()

    def open(self) -> None:
        """Show the live line, and keep its times current while a measurement takes long."""
        if self._stream is None or not self._stream.isatty() or self._bar is not None or self._stop.is_set():
            return
        # A bar of tqdm, so that its other bars and tqdm.write of any caller do not overwrite the line. Its
        # size does not matter: the text fits already.
        self._bar = tqdm(file=self._stream, bar_format="{desc}", leave=False, ncols=10_000, nrows=20)
        self.draw()
        self._ticker = Thread(target=self._tick, name="progress", daemon=True)
        self._ticker.start()

    def close(self) -> None:
        """Remove the live line for good. The caller does not hold the lock, which the ticker may need."""
        self._stop.set()
        if self._ticker is not None:
            self._ticker.join(10 * _TICK)
        with self._lock:
            bar, self._bar = self._bar, None
            if bar is not None:
                with suppress(OSError, ValueError):
                    bar.close()

    def draw(self, always: bool = True) -> None:
        """Draw the live line; unless ``always``, at most every tenth of a second."""
        now = self._clock()
        if self._bar is None or not (always or now - self._drawn >= _REDRAWN):
            return
        self._drawn = now
        with suppress(OSError, ValueError):  # the terminal is gone
            self._bar.set_description_str(self._line(columns(self._stream)))

    def _tick(self) -> None:
        while not self._stop.wait(_TICK):
            with self._lock:
                self.draw()
