"""``Work``: how much a study does, as counts of everything that takes time or memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ...evaluate import Evaluator

_MAXIMA = ("held", "recorded", "differentiated", "borrowed", "combined")


@dataclass
class Work:
    """How much is done. ``+`` joins two pieces of work, ``*`` repeats one; counts of things held at once are
    maxima.

    Stages are numbered along the text chain, the image chain, and the join if there is a text chain.

    Attributes:
        images: Images that go through each stage; 0 for stages of the text chain, whose cost is per run.
        runs: How often each stage runs on a batch; a stage of the text chain, on all prompts.
        scorings: Number of settings of the weights that are scored.
        gradients: Images whose gradient is computed, by the first stage of which weights are differentiated.
        curvatures: Images for which products with the Hessian are computed.
        batches: Batches of these two.
        writes: Writes of weights.
        written: Weights written without noise or mask.
        noisy: Weights written with noise or a mask.
        touches: Operations of torch on weights and gradients, for example for the control variate.
        touched: Weights that these read.
        held: Most images whose activations are held at once.
        recorded: Most images of which control variates hold inputs and gradients at once, as far as they go
            through the stages: an image counts as the share of these stages.
        differentiated: Most weights whose gradients, or perturbations and their scales, are held at once.
        borrowed: Most weights that a study borrows at once.
        loads: How often another model is loaded.
        combined: Most numbers in float32 that other models and their sums take at once.
    """

    images: list[float]
    runs: list[float]
    scorings: float = 0
    gradients: list[float] = field(default_factory=list)
    curvatures: float = 0
    batches: float = 0
    writes: float = 0
    written: float = 0
    noisy: float = 0
    touches: float = 0
    touched: float = 0
    held: float = 0
    recorded: float = 0
    differentiated: float = 0
    borrowed: float = 0
    loads: float = 0
    combined: float = 0

    @classmethod
    def none(cls, evaluator: Evaluator) -> Work:
        """Return no work, for an evaluator with these stages."""
        stages = len(evaluator.stages.text) + len(evaluator.stages.image) + bool(evaluator.stages.text)
        return cls([0.0] * stages, [0.0] * stages, gradients=[0.0] * stages)

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: _joined(f.name, self, other) for f in fields(self)})

    def __mul__(self, times: float) -> Work:
        found = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _MAXIMA:
                value = [times * v for v in value] if isinstance(value, list) else times * value
            found[f.name] = value
        return Work(**found)


def _joined(name: str, one: Work, other: Work) -> Any:
    a, b = getattr(one, name), getattr(other, name)
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return max(a, b) if name in _MAXIMA else a + b
