"""Paths between two fine-tuned models: are they in one basin, and is a point between better than both?"""

from __future__ import annotations

from collections.abc import Sequence
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
    from .study import Chosen

PARTNERS = "partners"
"""What the choice of the other models is called."""


class Pairs(Study):
    """The path from each model to each later one of those that it takes."""

    name = "pairs"
    help = "paths between fine-tuned models (2 models or more)"
    most = 5
    reaches_ends = True
    keeps_images = True
    rows_vary = True  # the last model has no later one
    combines = True
    by_default = False

    def lacks(self, models: int, ood: bool) -> str:
        return "" if models > 1 else "at least 2 fine-tuned models"

    def validate(self, request: Request) -> None:
        alphas = request.of(settings.Along).alphas
        if len(alphas) < 3:
            raise ValueError(
                "pairs: a path is compared with its ends at positions between 0 and 1, of which there are "
                f"none in --alphas {' '.join(f'{alpha:g}' for alpha in alphas)}; add some"
            )

    def choose(self, facts: Facts, model: str) -> Chosen:
        from ..studies.interpolate import best_gains, extremes

        everyone = list(facts.part("interpolation")["model"].unique())
        named = facts.of(settings.Layers).models
        count = min(self.most, len(everyone))
        taken = extremes(everyone, best_gains(facts.rows), count) if named is None else list(named)
        return {PARTNERS: taken[taken.index(model) + 1 :]}

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen:
        first = list(request.zoo.finetuned)[: self.models(request)]
        return {PARTNERS: first[first.index(model) + 1 :]}

    def measure(self, task: Task) -> None:
        from .. import studies
        from .known import ByDataset

        studies.pairs(
            task.path,
            task.evaluator,
            task.request.of(settings.Along).alphas,
            task.others,
            (task.chosen or {}).get(PARTNERS, ()),
            model=task.model,
            finetuned=ByDataset(task.own, 1.0),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def table(self, facts: Facts) -> pd.DataFrame:
        return facts.pairs

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.pairs(facts.pairs, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import pairs

        return pairs.lines(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import pairs

        return pairs.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import pairs

        return pairs.section(facts)
