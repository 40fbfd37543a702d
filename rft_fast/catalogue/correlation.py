"""Over three models or more: does sharpness predict accuracy out of distribution?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .study import Study

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import pandas as pd

    from ..common.fields import Tree
    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts


class Correlation(Study):
    """Rank correlation of sharpness with accuracy and gain, made of the other studies' rows."""

    name = "correlation"
    help = "does sharpness predict OOD accuracy? (3 models or more)"
    measures = False
    pooled = True

    def needs(self, tree: Tree) -> tuple[str, ...]:
        return ("interpolation", "layers", "sharpness", "layer-sharpness")

    def lacks(self, models: int, ood: bool) -> str:
        if models < 3:
            return "at least 3 fine-tuned models"
        return "" if ood else "out-of-distribution data"

    def done(self, facts: Facts) -> bool:
        return self.name in facts.measured

    def check(self, facts: Facts) -> None:
        _ = facts.correlation

    def table(self, facts: Facts) -> pd.DataFrame:
        return facts.correlation

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.correlation(facts.correlation, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import summary

        return summary.correlation(facts)

    def say_missing(self, facts: Facts) -> list[str]:
        from ..report import summary

        lacking = self.lacks(3, bool(facts.rows["ood"].fillna(False).any())) or self.lacks(0, True)
        return summary.paragraphs(facts, f"correlation is left out: it needs {lacking}.")

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.correlation(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.correlation(facts)
