"""Figures 3 and 4: how much the loss rises when all weights, or those of one layer, are perturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import settings
from ..names import WORST_CASE
from .study import Study, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from ..names import Names, On
    from ..report.shown import Finding, Section
    from ..studies.estimators import Protocol
    from ..studies.facts import Facts
    from .study import Request


class Sharpness(Study):
    """General sharpness along the path (Eq. 3)."""

    name = "sharpness"
    help = "how the loss rises when all weights are perturbed, along the path (Figure 3)"
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

    def validate(self, request: Request) -> None:
        self.protocol(request)

    def images_at_once(self, request: Request, images: int) -> int:
        return min(images, self.protocol(request).noise_batch or images)

    def assumptions(self, request: Request) -> Iterator[str]:
        goal = self.protocol(request).goal
        if goal is not None:
            yield (
                f"{self.name}: counted are the pilot of --goal-se and as many draws after it; a goal of "
                f"{goal:g} may need more."
            )

    def measure(self, task: Task) -> None:
        from .. import studies

        request, own = task.request, task.request.of(settings.Sharpness)
        studies.sharpness(
            task.path,
            task.evaluator,
            own.alphas,
            own.rhos,
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

        return summary.sharpness(facts)

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
    help = "the same for one layer at a time (Figure 4)"

    def most_models(self, request: Request) -> int:
        if {"correlation", "claim"} & set(request.studies):
            return len(request.zoo.finetuned)
        return 4 if self.name in request.studies else 2

    def protocol(self, request: Request) -> Protocol:
        return self._protocol(request, "finetuned")

    def assumptions(self, request: Request) -> Iterator[str]:
        yield from super().assumptions(request)
        own = request.of(settings.Sharpness)
        if max(own.rhos) <= _SMALL and own.estimator not in ("hessian", *WORST_CASE):
            yield (
                f"Layer-wise sharpness: at rho up to {_SMALL:g}, --estimator hessian estimates the limit of "
                "small rho for all layers at once."
            )

    def measure(self, task: Task) -> None:
        from .. import studies

        request, own = task.request, task.request.of(settings.Sharpness)
        studies.layerwise_sharpness(
            task.path,
            task.evaluator,
            own.alphas,
            own.rhos,
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

        return summary.layer_sharpness(facts)

    def findings(self, facts: Facts) -> Iterator[Finding]:
        from ..report import sentences

        return sentences.layer_sharpness(facts)

    def section(self, facts: Facts) -> Section:
        from ..report import sections

        return sections.layer_sharpness(facts)
