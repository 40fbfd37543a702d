"""A run as one HTML page that opens anywhere: ``python -m rft_fast.report DIRECTORY``.

Data walks one way: a run's directory (:mod:`.runs`) -> tables and charts, plain values with text in them
(:mod:`.tables`, :mod:`.charts`, :mod:`.layers`) -> sections (:mod:`.sections`, :mod:`.comparison`) -> the
page (:mod:`.page`), the only place where HTML is made of texts, and where they are escaped.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from .output import compare, write
else:
    __getattr__, __dir__ = lazy.face(__name__, output="compare write")

__all__ = ["compare", "write"]
