"""Choosing alpha without labels from elsewhere: which rule, and how much accuracy it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .study import Request, Study

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import pandas as pd

    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts


class Choice(Study):
    """The regret of rules that choose alpha without out-of-distribution labels, made of the path's rows."""

    name = "choice"
    help = "the alpha chosen without OOD labels, and what it costs"
    measures = False
    pooled = True
    by_default = False

    def lacks(self, models: int, ood: bool) -> str:
        return "" if ood else "out-of-distribution data"

    def validate(self, request: Request) -> None:
        if all(data.ood for data in request.zoo.data.values()):
            raise ValueError(
                "choice: alpha is chosen on in-distribution data, of which there are none; name some with "
                "--id-data NAME=PATH, or leave choice out"
            )

    def done(self, facts: Facts) -> bool:
        return self.name in facts.measured

    def check(self, facts: Facts) -> None:
        _ = facts.choice

    def table(self, facts: Facts) -> pd.DataFrame:
        return facts.choice

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.choice(facts.choice, facts.choice_means, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import choice

        return choice.lines(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import choice

        return choice.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import choice

        return choice.section(facts)
