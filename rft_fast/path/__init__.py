"""A live model on the straight line between two ends, and its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .path import Path
    from .slots import Weight
else:
    __getattr__, __dir__ = lazy.face(__name__, path="Path", slots="Weight")

__all__ = ["Path", "Weight"]
