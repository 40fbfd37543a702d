"""The first layers, or the last ones, together on the path: where along the depth it rises or falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import names, settings
from ..common.fields import Group, option
from .study import Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from ..report.shown import Finding, Section
    from ..studies.facts import Facts


@dataclass(frozen=True)
class Directions:
    """Settings of the cumulative paths.

    Attributes:
        cumulative: from which end layers are counted: ``"first"``, ``"last"`` or both.
    """

    GROUP: ClassVar = Group("cumulative", place=("settings", "cumulative"))

    cumulative: tuple[names.Cumulative, ...] = option(
        ("first",),
        "first: layers 1 to i are at alpha, for every i (default); last: layers i to L; or both",
        choices=tuple(names.CUMULATIVE),
        many="once",
        whole=settings.different,
    )


class Cumulative(Study):
    """Layers 1 to i, or i to L, on the path, the others zero-shot (Adilova et al. 2024)."""

    name = "cumulative"
    help = "the path of the first layers only, or of the last ones"
    images = "images of layers and prune"
    options = Directions
    most = 2
    skips_unchanged = True
    reaches_ends = True
    keeps_images = True
    by_default = False

    def measure(self, task: Task) -> None:
        from .. import studies
        from .known import ByDataset

        own = task.request.of(settings.Layers)
        studies.cumulative_interpolation(
            task.path,
            task.evaluator,
            own.alphas,
            own.layers,
            directions=task.request.of(Directions).cumulative,
            model=task.model,
            zeroshot=ByDataset(task.zeroshot),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: names.Names | None) -> None:
        from .. import figures

        figures.cumulative(facts, file, models=models)

    def say(self, facts: Facts) -> list[str]:
        from ..report import cumulative

        return cumulative.lines(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import cumulative

        return cumulative.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import cumulative

        return cumulative.section(facts)
