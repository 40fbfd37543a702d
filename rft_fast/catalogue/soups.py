"""Soups of all fine-tuned models: uniform, greedy, Model Stock, beside zero-shot and single models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import settings
from .study import Request, Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import pandas as pd

    from ..common.fields import Tree
    from ..names import Names
    from ..report.shown import Finding, Section
    from ..studies.facts import Facts
    from .study import Chosen


class Greedy(Study):
    """The search of a greedy soup on images in distribution, which belongs to the best model there."""

    name = "greedy"
    help = "the models of a greedy soup, one after the other"
    hidden = True
    combines = True
    rows_vary = True

    def choose(self, facts: Facts, model: str) -> Chosen:
        from ..studies.soups import id_accuracies

        found = id_accuracies(facts.rows)
        return {name: [repr(value)] for name, value in found.items()} if model == next(iter(found)) else {}

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen:
        everyone = list(request.zoo.finetuned)
        return dict.fromkeys(everyone, ("1",)) if model == everyone[0] else {}

    def measure(self, task: Task) -> None:
        from .. import studies

        if not task.chosen:
            return
        data = task.request.zoo.data
        names = [each.name for each in task.evaluator.datasets if not data[each.name].ood]
        accuracies = {name: float(value) for name, (value,) in task.chosen.items()}
        studies.greedy_search(
            task.path,
            task.evaluator.among(names),
            task.others,
            accuracies,
            model=task.model,
            only=task.only,
            sink=task.sink,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        raise ValueError(f"{self.name}: it has no figure")

    def say(self, facts: Facts) -> list[str]:
        return []

    def section(self, facts: Facts) -> Section:
        raise ValueError(f"{self.name}: it has no section")


class Soups(Study):
    """The paths from zero-shot to soups of all models. Its rows belong to the best model in distribution."""

    name = "soups"
    help = "soups of the fine-tuned models, Model Stock (2 models or more)"
    phase = 2
    pooled = True
    reaches_ends = True
    keeps_images = True
    rows_vary = True  # one model has all of them
    combines = True
    averages = True
    by_default = False

    def needs(self, tree: Tree) -> tuple[str, ...]:
        return ("interpolation", Greedy.name)

    def validate(self, request: Request) -> None:
        zoo = request.zoo
        if len(zoo.finetuned) < 2:
            raise ValueError(
                f"soups: this study averages fine-tuned models, and needs at least 2; got "
                f"{', '.join(zoo.finetuned)}; name more, or leave soups out"
            )
        named = request.of(settings.Layers).models
        if named is not None and len(named) < len(zoo.finetuned):
            raise ValueError(
                f"soups: this study averages all {len(zoo.finetuned)} fine-tuned models, but --models names "
                f"{', '.join(named)}; run soups without --models, or give it these models alone, with "
                "--finetuned or in a zoo of their own"
            )
        if all(data.ood for data in zoo.data.values()):
            raise ValueError(
                "soups: the best model and the greedy soup are chosen on in-distribution data, of which "
                "there are none; name some with --id-data NAME=PATH, or leave soups out"
            )
        if zoo.own_heads:
            raise ValueError(
                "soups: with the head finetuned, each model has a zero-shot end of its own, so that their "
                "soup has none; use --head interpolate or zeroshot, or leave soups out"
            )

    def choose(self, facts: Facts, model: str) -> Chosen:
        from ..studies.soups import GREEDY, KEPT, UNIFORM, id_accuracies

        if model != (best := next(iter(id_accuracies(facts.rows)))):
            return {}
        searched = facts.part(Greedy.name)
        kept = searched.loc[searched["method"] == KEPT, "partners"].unique()
        everyone = list(facts.part("interpolation")["model"].unique())
        return {UNIFORM: everyone, GREEDY: [best, *kept]}

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen:
        from ..studies.soups import GREEDY, UNIFORM

        everyone = list(request.zoo.finetuned)
        return dict.fromkeys((UNIFORM, GREEDY), everyone) if model == everyone[0] else {}

    def assumptions(self, request: Request) -> Iterator[str]:
        yield "Soups: assuming that the greedy soup is of all models; otherwise fewer are loaded."

    def measure(self, task: Task) -> None:
        from .. import studies
        from .known import ByDataset

        if not task.chosen:
            return
        studies.soups(
            task.path,
            task.evaluator,
            task.request.of(settings.Along).alphas,
            task.others,
            task.chosen,
            model=task.model,
            zeroshot=ByDataset(task.zeroshot),
            only=task.only,
            sink=task.sink,
            images=task.images,
        )

    def table(self, facts: Facts) -> pd.DataFrame:
        return facts.soups

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.soups(facts.soups, facts.stock, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import soups

        return soups.lines(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import soups

        return soups.findings(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import soups

        return soups.section(facts)
