"""Figure 5: the path with layers pruned at random, and a control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import settings
from ..names import Criterion
from .study import Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from ..common.fields import Tree
    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts
    from .study import Chosen, Request

DECIDED_BY: dict[Criterion, str] = {"sharpness": "layer-sharpness", "instability": "layers"}


class Prune(Study):
    """Random pruning of the layers that a criterion picks (Algorithm 1)."""

    name = "prune"
    help = "the path with flat layers or stragglers pruned (Figure 5)"
    phase = 2
    images = "images of layers and prune"
    most = 2
    reaches_ends = True
    keeps_images = True
    rows_vary = True  # as many as a model has layers to prune

    def needs(self, tree: Tree) -> list[str]:
        own = tree.of(settings.Prune)
        criteria = () if own.layers else own.criteria
        return ["interpolation", *(DECIDED_BY[criterion] for criterion in criteria)]

    def choose(self, facts: Facts, model: str) -> Chosen:
        return {criterion: layers for criterion, layers in facts.to_prune(model).items() if layers}

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen:
        from ..path.layers import select
        from ..studies.pruning import NAMED

        if (named := request.of(settings.Prune).layers) is not None:
            return {NAMED: select(layers, named)}
        return {criterion: list(layers[:1]) for criterion in request.of(settings.Prune).criteria}

    def assumptions(self, request: Request) -> Iterator[str]:
        if not request.of(settings.Prune).layers:
            yield (
                "Pruning: assuming that each criterion finds a layer in each model; otherwise it costs less."
            )

    def measure(self, task: Task) -> None:
        from .. import studies
        from .known import ByAlpha

        request, own = task.request, task.request.of(settings.Prune)
        seed = request.of(settings.Along).seed
        studies.prune_stragglers(
            task.path,
            task.evaluator,
            request.of(settings.Along).alphas,
            own.keep,
            layers=task.chosen,
            methods=own.methods,
            seeds=range(seed, seed + own.mask_seeds),
            control=own.control,
            model=task.model,
            unpruned=ByAlpha(task.zeroshot, task.own),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.prune(facts, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import summary

        return summary.prune(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.prune(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.prune(facts)
