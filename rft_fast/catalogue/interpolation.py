"""Figure 1: accuracy and loss along the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import settings
from .study import Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from .. import settings
    from ..common.fields import Tree
    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts


class Interpolation(Study):
    """The whole model on the path: gain, barrier, bump, instability and mode (Eq. 1, Eq. 2, Def. 1)."""

    name = "interpolation"
    help = "accuracy and loss along the path: gain, barrier (Figure 1)"
    phase = 0
    zeroshot_first = True
    reaches_ends = True
    keeps_images = True

    def needs(self, tree: Tree) -> tuple[str, ...]:
        return ()

    def measure(self, task: Task) -> None:
        from .. import studies
        from .known import ByDataset

        studies.interpolation(
            task.path,
            task.evaluator,
            task.request.of(settings.Along).alphas,
            model=task.model,
            zeroshot=ByDataset(task.zeroshot),
            finetuned=ByDataset(task.own, 1.0),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.interpolation(facts, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import summary

        return summary.interpolation(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.path(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.path(facts)
