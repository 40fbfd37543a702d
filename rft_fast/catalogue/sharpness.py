"""Figures 3 and 4: how much the loss rises when all weights, or those of one layer, are perturbed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .. import settings
from ..names import SAMPLING, WORST_CASE
from .study import Chosen, Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from ..common.fields import Tree
    from ..names import Names, On
    from ..report.shown import Finding, Section
    from ..studies.estimators import Protocol
    from ..studies.facts import Facts
    from ..studies.rows import Row
    from .study import Request


class Sharpness(Study):
    """General sharpness along the path (Eq. 3)."""

    name = "sharpness"
    help = "rise of the loss when all weights are perturbed (Figure 3)"
    images = "images of sharpness"
    same_at_zeroshot = True

    def protocol(self, request: Request) -> Protocol:
        """How it is measured."""
        return self._protocol(request, "interpolated")

    def _protocol(self, request: Request, on: On) -> Protocol:
        """The protocol of the settings. on: the weights that are perturbed, where the settings name none."""
        from ..studies.estimators import Protocol

        own = request.of(settings.Sharpness)
        return Protocol(
            estimator=own.estimator,
            on=own.on or on,
            noise=own.noise,
            adaptive=own.adaptive,
            seed=request.of(settings.Along).seed,
            noise_batch=own.noise_batch,
            goal=own.goal_se,
            most=own.max_draws,
            restarts=own.restarts,
        )

    def needs(self, tree: Tree) -> tuple[str, ...]:
        return ("interpolation", *(() if tree.of(settings.Sharpness).rhos else ("pilot",)))

    def validate(self, request: Request) -> None:
        self.protocol(request)

    def choose(self, facts: Facts, model: str) -> Chosen | None:
        return None if facts.of(settings.Sharpness).rhos else _rho(facts)

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen | None:
        return None if request.of(settings.Sharpness).rhos else {"rho": ("1",)}

    def images_at_once(self, request: Request, images: int) -> int:
        return min(images, self.protocol(request).noise_batch or images)

    def assumptions(self, request: Request) -> Iterator[str]:
        goal = self.protocol(request).goal
        if goal is not None:
            yield (
                f"{self.name}: the pilot of --goal-se and as many draws after it are counted; a goal "
                f"of {goal:g} may need more."
            )

    def measure(self, task: Task) -> None:
        from .. import studies

        request, own = task.request, task.request.of(settings.Sharpness)
        studies.sharpness(
            task.path,
            task.evaluator,
            own.alphas,
            _rhos(task),
            own.draws,
            exclude=own.exclude,
            protocol=self.protocol(request),
            model=task.model,
            zeroshot=task.kept,
            only=task.only,
            sink=task.sink,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.sharpness(facts, file)

    def say(self, facts: Facts) -> list[str]:
        from ..report import summary

        return [*summary.sharpness(facts), *_chosen(facts, self.name)]

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.sharpness(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.sharpness(facts)


_SMALL = 0.05  # largest rho at which the limit of small rho is near


class LayerSharpness(Sharpness):
    """Layer-wise sharpness (Sec. 3.1)."""

    name = "layer-sharpness"
    help = "the same, one layer at a time (Figure 4)"

    def most_models(self, request: Request) -> int:
        if {"correlation", "claim"} & set(request.studies):
            return len(request.zoo.finetuned)
        return 4 if self.name in request.studies else 2

    def protocol(self, request: Request) -> Protocol:
        return self._protocol(request, "finetuned")

    def assumptions(self, request: Request) -> Iterator[str]:
        yield from super().assumptions(request)
        own = request.of(settings.Sharpness)
        if own.rhos and max(own.rhos) <= _SMALL and own.estimator not in ("hessian", *WORST_CASE):
            yield (
                f"Layer-wise sharpness: for rho up to {_SMALL:g}, --estimator hessian estimates the "
                "limit of small rho for all layers at once."
            )

    def measure(self, task: Task) -> None:
        from .. import studies

        request, own = task.request, task.request.of(settings.Sharpness)
        studies.layerwise_sharpness(
            task.path,
            task.evaluator,
            own.alphas,
            _rhos(task),
            own.layer_draws,
            request.of(settings.Layers).layers,
            protocol=self.protocol(request),
            model=task.model,
            only=task.only,
            sink=task.sink,
        )

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        from .. import figures

        figures.layer_sharpness(facts, file, models=models)

    def say(self, facts: Facts) -> list[str]:
        from ..report import summary

        return [*summary.layer_sharpness(facts), *_chosen(facts, self.name)]

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.layer_sharpness(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.layer_sharpness(facts)


_PILOT = 4  # draws of noise; the sharpness itself is measured with --draws


class Pilot(Sharpness):
    """General sharpness at the highest position, at a grid of rhos and then by bisection."""

    name = "pilot"
    help = "which rho makes the median model's sharpness a tenth of a nat"
    phase = 0
    hidden = True
    same_at_zeroshot = False
    rounds = 7

    def needs(self, tree: Tree) -> tuple[str, ...]:
        return ("interpolation",)

    def validate(self, request: Request) -> None:
        pass

    def choose(self, facts: Facts, model: str) -> Chosen:
        return _rho(facts)

    def guess(self, request: Request, layers: Sequence[str], model: str) -> Chosen:
        return {"rho": ("1",)}

    def assumptions(self, request: Request) -> Iterator[str]:
        from ..studies.pilot import GRID, STEPS

        yield (
            f"--rhos auto: a pilot of {len(GRID)} rhos and {STEPS} bisections; if there is no "
            "such rho, the run ends after the grid."
        )

    def notices(self, facts: Facts) -> Iterator[str]:
        from ..report import pilot

        return pilot.notices(facts)

    def measure(self, task: Task) -> None:
        from .. import studies
        from ..studies.pilot import GRID

        own = task.request.of(settings.Sharpness)
        for number in range(self.rounds):
            if task.only is not None and number not in task.only:
                continue
            rows: list[Row] = []
            studies.sharpness(
                task.path,
                task.evaluator,
                [max(own.alphas)],
                GRID if number == 0 else _rhos(task),
                min(own.draws, _PILOT) if own.estimator in ("auto", *SAMPLING) else own.draws,
                exclude=own.exclude,
                protocol=replace(self.protocol(task.request), goal=None),
                model=task.model,
                sink=lambda _, found, rows=rows: rows.extend(found),  # type: ignore[misc]
            )
            if task.sink is not None:
                task.sink(number, [{**row, "study": self.name} for row in rows])

    def draw(self, facts: Facts, file: str | os.PathLike[str], models: Names | None) -> None:
        raise ValueError(f"{self.name}: it has no figure")

    def say(self, facts: Facts) -> list[str]:
        return []

    def section(self, facts: Facts) -> Section:
        raise ValueError(f"{self.name}: it has no section")


def _rhos(task: Task) -> tuple[float, ...]:
    """The rhos of the settings, or the one that was found."""
    rhos = task.request.of(settings.Sharpness).rhos
    return rhos or tuple(map(float, (task.chosen or {})["rho"]))


def _rho(facts: Facts) -> Chosen:
    """The rho of the pilot, or the next one that it measures."""
    from ..studies.pilot import progress

    models = list(facts.part("interpolation")["model"].unique())
    return {"rho": (repr(progress(facts.rows, models).rho),)}


def _chosen(facts: Facts, study: str) -> list[str]:
    """The rho that the pilot chose, in lines of the summary, once."""
    from ..report import pilot
    from ..report.summary import paragraphs

    if study == "layer-sharpness" and not facts.part("sharpness").empty:
        return []
    return [line for text in pilot.notices(facts) for line in paragraphs(facts, text)]
