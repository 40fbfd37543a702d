"""Errors that programs distinguish. Each is a ValueError."""

from __future__ import annotations


class Damaged(ValueError):
    """The database of a run cannot be read."""


class InUse(ValueError):
    """Another process writes to the directory."""


class NoImages(ValueError):
    """A run has no results of single images where they are needed."""


class Mismatch(ValueError):
    """The directory holds a run with other settings."""
