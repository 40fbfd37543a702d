"""``Work``: how much a study does, in numbers of each thing that takes time or memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ...evaluate import Evaluator

_MAXIMA = ("held", "differentiated", "borrowed")


@dataclass
class Work:
    """How much is done. ``+`` joins, ``*`` repeats; numbers of what is held at once become the larger one.

    Stages are numbered along the text chain, then the image chain, then the join, if there is a text
    chain; else along the image chain.
    """

    images: list[float]
    """Images that go through each stage; through a stage of the text chain 0, its cost is per run."""
    runs: list[float]
    """How often each stage runs on a batch; a stage of the text chain on all of its prompts."""
    scorings: float = 0
    """Settings of the weights that are scored."""
    gradients: list[float] = field(default_factory=list)
    """Images whose loss is differentiated, by the first stage whose weights are asked for."""
    curvatures: float = 0
    """Images whose loss is differentiated twice."""
    batches: float = 0
    """Batches of either."""
    writes: float = 0
    """Writes of weights."""
    written: float = 0
    """Weights written without noise or mask."""
    noisy: float = 0
    """Weights written with noise or a mask."""
    touches: float = 0
    """Operations of torch on weights and gradients, such as the products of the control variate."""
    touched: float = 0
    """Weights that they read."""
    held: float = 0
    """Images whose activations are held at once."""
    differentiated: float = 0
    """Weights whose gradient is held at once."""
    borrowed: float = 0
    """Weights that a study works on with copies of its own, at once."""

    @classmethod
    def none(cls, evaluator: Evaluator) -> Work:
        """No work yet, for an evaluator with these stages."""
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
