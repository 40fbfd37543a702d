"""Progress of a run: a live line on the terminal, a log file, JSON lines. See docs/progress.md."""

from .process import held_warnings
from .progress import MODES, Progress

__all__ = ["MODES", "Progress", "held_warnings"]
