"""The paper's claim as a test: do models whose interpolation fails have more flat layers?"""

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


class Claim(Study):
    """Flat layers of models that fail against those of models that gain, made of the other studies' rows."""

    name = "claim"
    help = "do models that fail have more flat layers? (3 models or more)"
    measures = False
    pooled = True

    def needs(self, tree: Tree) -> tuple[str, ...]:
        return ("interpolation", "layer-sharpness")

    def lacks(self, models: int, ood: bool) -> str:
        if models < 3:
            return "at least 3 fine-tuned models"
        return "" if ood else "out-of-distribution data"

    def done(self, facts: Facts) -> bool:
        return self.name in facts.measured

    def check(self, facts: Facts) -> None:
        _ = facts.claim

    def table(self, facts: Facts) -> pd.DataFrame:
        from ..studies.claim import joined

        return joined(facts.claim, facts.claim_tests)

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.claim(facts.claim, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import claim

        return claim.lines(facts)

    def say_missing(self, facts: Facts) -> list[str]:
        from ..report import claim

        models = facts.part("interpolation")["model"].nunique()
        lacking = self.lacks(models, bool(facts.rows["ood"].fillna(False).any()))
        # A run of an earlier version lacks nothing but the study.
        return claim.left_out(facts, lacking) if lacking else []

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import claim

        return claim.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import claim

        return claim.section(facts)
