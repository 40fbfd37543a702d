"""One table of rows on disk: the directory that a run leaves behind.

===================  ===============================================================
``rows.sqlite``      every measurement with its rows, committed as it was made; what the run is
``rows.csv``         the same rows, written when the run ends or is interrupted
``correlation.csv``  the table of that study, which is made of the rows
``cost.csv``         what each study took: time, peak memory in bytes
``config.json``      the complete request: arguments, versions, content hashes, date
``run.log``          what happened when, a line each
``figures/``         one picture per study, ``<study>.png``
``report.html``      the page that :mod:`rft_fast.report` makes of all this
===================  ===============================================================

``python -m rft_fast.results DIR`` says what is there, and exports it. docs/results.md
"""

from typing import TYPE_CHECKING

from rft_fast.common import lazy

if TYPE_CHECKING:
    from ..studies.rows import COLUMNS
    from .directory import check, differences
    from .errors import Damaged, InUse, Mismatch
    from .loading import load, recorded
    from .salvage import recover
    from .writer import Run
else:
    __getattr__, __dir__ = lazy.face(
        __name__,
        loading="COLUMNS load recorded",
        directory="check differences",
        errors="Damaged InUse Mismatch",
        salvage="recover",
        writer="Run",
    )

__all__ = [
    "COLUMNS",
    "Damaged",
    "InUse",
    "Mismatch",
    "Run",
    "check",
    "differences",
    "load",
    "recorded",
    "recover",
]
