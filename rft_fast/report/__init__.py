"""A run as one HTML page that opens anywhere: ``python -m rft_fast.report DIRECTORY``.

Data flows one way: a run's directory (:mod:`.runs`) -> tables and charts, which are plain values
(:mod:`.tables`, :mod:`.charts`, :mod:`.layer_charts`) -> sections (:mod:`.sections`, :mod:`.comparison`) ->
the page (:mod:`.page`), which alone produces and escapes HTML.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .output import compare, write
else:
    __getattr__, __dir__ = lazy.face(__name__, output="compare write")

__all__ = ["compare", "write"]
