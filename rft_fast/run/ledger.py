"""``Ledger``: measurements and costs of a run, written to its directory as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from .. import catalogue, results, studies
from ..common import disk, words
from ..common.program import Stop
from ..studies.images import ImageScores
from ..studies.rows import Row
from .pieces import Piece
from .progress import Progress


class Ledger:
    """Stores measurements as they are made, and the cost of each study, including earlier processes.

    A :class:`rft_fast.run.executor.Listener`.

    Attributes:
        models: study -> how many models it takes.
    """

    _COLUMNS = ("study", "models", "seconds", "peak_memory")

    def __init__(self, run: results.Run, progress: Progress, stop: Stop, classes: Mapping[str, int]) -> None:
        self._run, self._progress, self._stop, self._classes = run, progress, stop, classes
        self._noticed: set[str] = set()
        self.models: dict[str, int] = {}
        self._costs: dict[str, tuple[float, int]] = {}
        file = run.table("cost")
        if run.resumed and file.is_file():
            try:
                for row in pd.read_csv(file).to_dict("records"):
                    seconds, peak = float(row["seconds"]), int(row["peak_memory"])
                    if not 0 <= seconds < math.inf:
                        raise ValueError(f"{seconds} seconds")
                    self._costs[row["study"]] = (seconds, peak)
            except (ValueError, KeyError, OverflowError) as error:
                self._costs.clear()
                progress.notice(
                    f"{file} cannot be read ({error}): it will lack the costs of earlier processes"
                )

    def begun(self, piece: Piece) -> None:
        self._progress.begin(piece.study, piece.model)

    def measured(self, piece: Piece, number: int, rows: list[Row], images: Sequence[ImageScores]) -> None:
        self._run.add(piece.study, piece.model, number, rows, images)
        self._progress.measured(piece.study, piece.model, number, rows, piece.cost_of[number])
        if catalogue.study(piece.study).phase == 0:
            self._compare_with_chance(rows)
        self._stop.check()

    def _compare_with_chance(self, rows: list[Row]) -> None:
        """Notices, once, a zero-shot end that is no better than guessing."""
        for row in rows:
            if row["alpha"] == 0 and (classes := self._classes.get(str(row["dataset"]))):
                text = studies.against_chance(row, classes).text
                if text and text not in self._noticed:
                    self._noticed.add(text)
                    self._progress.notice(text)

    def spent(self, piece: Piece, seconds: float, peak: int) -> None:
        before, most = self._costs.get(piece.study, (0.0, 0))
        self._costs[piece.study] = (before + seconds, max(most, peak))
        table = pd.DataFrame(self.rows(), columns=list(self._COLUMNS))
        with disk.replacing(self._run.table("cost")) as temporary:
            table.map(words.cell).to_csv(temporary, index=False)

    def withdrawn(self, piece: Piece) -> None:
        count = self._run.withdraw(piece.study, piece.model)
        self._progress.notice(
            f"{count} measurements of {piece.study} of {piece.model} are removed, because its file changed"
        )

    def rows(self) -> list[dict[str, object]]:
        return [
            dict(zip(self._COLUMNS, (study, count, *self._costs.get(study, (0.0, 0))), strict=True))
            for study, count in self.models.items()
        ]
