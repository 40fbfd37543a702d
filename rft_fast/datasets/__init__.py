"""Labelled images, decoded once to the bytes that a model's normalisation expects."""

from typing import TYPE_CHECKING

from rft_fast.common import lazy
from rft_fast.names import ORDER

if TYPE_CHECKING:
    from .dataset import Dataset, subset
    from .decoding import Progress, pixel_transform
    from .evidence import Rows
    from .finding import Listed, find, load
    from .kinds import KINDS, detect, open_source
    from .labels import Assignment, assign
    from .maps import LabelMap
    from .source import Source
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        dataset="Dataset subset",
        decoding="Progress pixel_transform",
        evidence="Rows",
        finding="Listed find load",
        kinds="KINDS detect open_source",
        labels="Assignment assign",
        maps="LabelMap",
        source="Source",
    )

__all__ = [
    "KINDS",
    "ORDER",
    "Assignment",
    "Dataset",
    "LabelMap",
    "Listed",
    "Progress",
    "Rows",
    "Source",
    "assign",
    "detect",
    "find",
    "load",
    "open_source",
    "pixel_transform",
    "subset",
]
