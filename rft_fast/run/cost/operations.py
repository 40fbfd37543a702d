"""FLOPs of a model's stages and derivatives, measured by fake tensors, and of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...common import meter
from ...evaluate import Evaluator
from ...evaluate.derivatives import trial
from ...evaluate.stages import Stage
from .work import Work


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image through each stage, as :mod:`rft_fast.common.meter` counts them.

    Attributes:
        stages: Of one image through each stage; for a stage of the text chain, of one run on all prompts.
        text: How many of the stages are in the text chain.
        gradient: Of the gradient of one image at all weights, in batches of the evaluator's size; None: not
            measured.
        curvature: Of a product with the Hessian, likewise.
    """

    stages: list[float]
    text: int
    gradient: float | None = None
    curvature: float | None = None

    @property
    def forward(self) -> float:
        """FLOPs of one image through the image chain."""
        return sum(self.stages[self.text :])

    def forwards(self, work: Work) -> float:
        """Return the images through the image chain; parts of it count by their FLOPs."""
        pairs = zip(work.images[self.text :], self.stages[self.text :], strict=True)
        return sum(n * f for n, f in pairs) / self.forward if self.forward else max(work.images)

    def of(self, work: Work) -> float:
        """Return the FLOPs of work. Derivatives that are not measured count as 3 and 9 forward passes."""
        text = zip(work.runs[: self.text], self.stages[: self.text], strict=True)
        total = sum(n * f for n, f in text) + self.forwards(work) * self.forward
        gradient = 3 * self.forward if self.gradient is None else self.gradient
        curvature = 9 * self.forward if self.curvature is None else self.curvature
        for images, share in zip(work.gradients, reached(self.stages), strict=True):
            total += images * (self.forward + max(0.0, gradient - self.forward) * share)
        return total + work.curvatures * curvature


def flops(evaluator: Evaluator, work: Work | None = None) -> Flops:
    """Measure the FLOPs of an evaluator's stages. Runs two images through the model.

    Args:
        evaluator: The evaluator.
        work: The work to estimate; derivatives are measured only if it has any, since they take a while.
            None: measure forward passes only.
    """
    chains, feed = evaluator.stages, evaluator.feeds[0]
    with evaluator.runtime.scoring():
        images = feed.prepare(slice(0, min(2, len(feed))))
        found, x = _chain_flops(chains.image, images)
        per_image = [f / len(images) for f in found]
        text: list[float] = []
        if chains.text and chains.prompts is not None and chains.join and chains.head:
            few = chains.prompts[:2]
            found, features = _chain_flops(chains.text, few)
            text = [f * len(chains.prompts) / len(few) for f in found]
            head, join = (
                chains.head(features.new_ones((len(chains.prompts), *features.shape[1:]))),
                chains.join,
            )
            joined = _measured(lambda: join(x, head))
            per_image.append(joined.flops / len(images) if joined else 0.0)
    return Flops(
        text + per_image,
        len(text),
        _derivative(evaluator, 1) if work and any(work.gradients) else None,
        _derivative(evaluator, 2) if work and work.curvatures else None,
    )


def _chain_flops(chain: Sequence[Stage], inputs: Tensor) -> tuple[list[float], Tensor]:
    found, x = [], inputs
    for stage in chain:
        reading = _measured(lambda stage=stage, x=x: stage.run(x, inputs))  # type: ignore[misc]
        found.append(float(reading.flops) if reading else 0.0)
        x = stage.run(x, inputs)
    return found, x


def _measured(run: Callable[[], object]) -> meter.Reading | None:
    try:
        return meter.measure(run)
    except RuntimeError:
        return None


def _derivative(evaluator: Evaluator, order: int) -> float | None:
    """Return the FLOPs per image of the first or second derivative of a full batch, at all weights."""
    runtime = evaluator.runtime
    size, _ = (runtime.slopes if order == 1 else runtime.curvatures).full()

    def measured(run: Callable[[int], None]) -> meter.Reading | None:
        return _measured(lambda: run(size))

    reading = trial(runtime.model, runtime.precision, runtime.example, order, measured)
    return reading.flops / size if reading else None


def reached(costs: Sequence[float]) -> list[float]:
    """Return, for each stage, the share of the total cost in this and the later stages."""
    whole = sum(costs) or 1.0
    return [sum(costs[stage:]) / whole for stage in range(len(costs))]
