"""Ensembles of the logits of the two ends, the control of averaging weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import settings
from .study import Request, Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import pandas as pd

    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts


class Ensemble(Study):
    """The mean of the two ends' logits at the positions of the path."""

    name = "ensemble"
    help = "the two ends' logits averaged, instead of their weights"
    by_default = False
    reaches_ends = True
    keeps_images = True

    def validate(self, request: Request) -> None:
        alphas = request.of(settings.Along).alphas
        if len(alphas) < 3:
            raise ValueError(
                "ensemble: path and ensembles are compared at positions between 0 and 1, of which there are "
                f"none in --alphas {' '.join(f'{alpha:g}' for alpha in alphas)}; add some"
            )

    def measure(self, task: Task) -> None:
        from .. import studies

        studies.ensemble(
            task.path,
            task.evaluator,
            task.request.of(settings.Along).alphas,
            model=task.model,
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def table(self, facts: Facts) -> pd.DataFrame:
        return facts.ensemble

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        table = facts.ensemble
        figures.ensemble(table if models is None else table[table["model"].isin(models)], file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import ensemble

        return ensemble.lines(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import ensemble

        return ensemble.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import ensemble

        return ensemble.section(facts)
