"""Measurements that are on disk at once, and the time left to make them.

A program started by ``gpu.py`` finds in its environment where its rows go and when it will be killed:

    ROWS      the file that every measurement is appended to, one JSON object per line
    STEP      the name of the step that the rows belong to
    DEADLINE  seconds since 1970 at which the step is killed

Without them nothing is appended, and there is no limit. ``start`` is called once the imports are done.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

MARGIN = 20.0  # most seconds that are kept free to finish what has begun

_stop = float("inf")


def margin(seconds: float) -> float:
    """Return how many of so many seconds are kept free: a fifth, 20 s at most."""
    return min(MARGIN, max(0.0, seconds) / 5)


def start() -> None:
    """Start the clock, when imports are done and the time left is for measurements."""
    global _stop
    deadline = float(os.environ.get("DEADLINE", "inf"))
    _stop = deadline - margin(deadline - time.time())


def time_is_up() -> bool:
    """Whether no further measurement should begin."""
    return time.time() > _stop


def row(kind: str, **facts: Any) -> None:
    """Append one measurement; on return it is on disk."""
    if file := os.environ.get("ROWS"):
        append(pathlib.Path(file), {"step": os.environ.get("STEP", ""), "kind": kind, **facts})


def append(file: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Append one line in one synced write, so that several processes may append to the same file."""
    line = json.dumps(facts, default=str) + "\n"
    place = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, line.encode())
        os.fsync(place)
    finally:
        os.close(place)


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    """Return all rows of a file. A last line that a kill cut off is left out; another broken line raises."""
    if not file.exists():
        return []
    *lines, _cut_off = file.read_text(errors="replace").split("\n")
    return [json.loads(line) for line in lines if line]


def left_out(what: str) -> None:
    """Report that there was no time to measure something."""
    row("left out", what=what)
    print(f"left out, the time was up: {what}", flush=True)
