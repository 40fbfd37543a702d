"""Figure 2: one layer at a time on the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import settings
from .study import Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts


class Layers(Study):
    """Layer-wise interpolation and its stragglers (Def. 1.1, Def. 1.2)."""

    name = "layers"
    help = "the same, one layer at a time: stragglers (Figure 2)"
    images = "images of layers and prune"
    most = 2
    skips_unchanged = True
    reaches_ends = True
    keeps_images = True

    def measure(self, task: Task) -> None:
        from .. import studies
        from .known import ByDataset

        own = task.request.of(settings.Layers)
        studies.layerwise_interpolation(
            task.path,
            task.evaluator,
            own.alphas,
            own.layers,
            others=own.others,
            reference=own.reference,
            model=task.model,
            zeroshot=ByDataset(task.zeroshot),
            finetuned=ByDataset(task.own, 1.0),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.layers(facts, file, models=models)

    def say(self, facts: Facts) -> list[str]:
        from ..report import summary

        return summary.layers(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.layers(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.layers(facts)
