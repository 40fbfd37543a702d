"""The directory of a run, which holds its rows on disk.

===================  ===============================================================
``rows.sqlite``      every measurement with its rows and the results of its images, committed as soon as it is
                     made; the run's configuration
``rows.csv``         the same rows, written when the run ends or is interrupted
``correlation.csv``  the table of that study, computed from the rows; likewise ``claim.csv``,
                     ``ensemble.csv``, ``choice.csv``, ``pairs.csv``, ``soups.csv``
``cost.csv``         time and peak memory (bytes) of each study
``config.json``      the configuration: arguments, versions, content hashes, date
``run.log``          events, one per line
``figures/``         one picture per study, ``<study>.png``, and its caption, ``<study>.txt``
``report.html``      the page that :mod:`rft_fast.report` makes of these
===================  ===============================================================

``python -m rft_fast.results DIR`` describes and exports a run. See docs/results.md.
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from ..studies.columns import describe
    from ..studies.rows import COLUMNS
    from .directory import check, differences
    from .errors import Damaged, InUse, Mismatch, NoImages
    from .loading import load, recorded
    from .salvage import recover
    from .single_images import Stored, images
    from .writer import Run
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        loading="COLUMNS describe load recorded",
        directory="check differences",
        errors="Damaged InUse Mismatch NoImages",
        single_images="Stored images",
        salvage="recover",
        writer="Run",
    )

__all__ = [
    "COLUMNS",
    "Damaged",
    "InUse",
    "Mismatch",
    "NoImages",
    "Run",
    "Stored",
    "check",
    "describe",
    "differences",
    "images",
    "load",
    "recorded",
    "recover",
]
