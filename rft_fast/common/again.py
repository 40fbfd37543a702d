"""Command lines to run again: the same command without a flag, or in a way that resumes its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def without(argv: Sequence[str], *flags: str) -> list[str]:
    """Return the arguments of a command without flags, which take no value."""
    return [word for word in argv if word not in flags]


def resuming(argv: Sequence[str], directory: Path) -> list[str]:
    """Return the arguments of a sweep that resume its run.

    Args:
        argv: arguments that the run was begun with. ``--overwrite`` would begin it again, and is left out.
        directory: of the run, for a sweep that chose a new one itself.
    """
    words = without(argv, "--overwrite")
    named = any(word == "--out" or word.startswith("--out=") for word in words)
    return words if named else [*words, "--out", str(directory)]
