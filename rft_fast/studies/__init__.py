"""One file per question of the paper; every study returns tidy rows (:mod:`.rows`)."""

from __future__ import annotations

from .path import XI, check_alphas, interpolation, summarize
from .rows import COLUMNS, frame

__all__ = ["COLUMNS", "XI", "check_alphas", "frame", "interpolation", "summarize"]
