"""Errors that programs distinguish; each is a ValueError."""

from __future__ import annotations


class Damaged(ValueError):
    """A run's database that cannot be read."""


class InUse(ValueError):
    """A directory that another process is writing to."""


class Mismatch(ValueError):
    """A directory that holds a run with other settings."""
