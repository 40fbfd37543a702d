"""Peak memory of work, and what it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...common import meter
from ...evaluate import Evaluator
from ...evaluate.batches import Batches
from ...path import Path
from .work import Work

COPIES = 5
"""Of the weights that the worst case climbs with, float32."""


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, and what it is made of."""

    program: int
    """On the CPU: what the process holds already beside the weights, libraries above all."""
    weights: int
    """The live model and its two ends."""
    images: int
    """Those on the device, or the batches on their way to it."""
    held: int
    """Activations before a stage, of all images of a walk."""
    batches: int
    """Activations of the batches in work."""
    copies: int
    """Gradients, and copies of the weights that the worst case works with."""

    @property
    def total(self) -> int:
        return self.program + self.weights + self.images + self.held + self.batches + self.copies


def memory(work: Work, evaluator: Evaluator, path: Path, images: int) -> Memory:
    """Peak memory of the work. ``images``: how many are loaded, those of all evaluators together."""
    runtime, device = evaluator.runtime, evaluator.device
    weights = _bytes(path)
    program = 0 if device.type == "cuda" else max(0, meter.resident() - weights)
    pixels = math.prod(evaluator.datasets[0].images.shape[1:])
    resident = images * pixels
    if device.type == "cuda" and resident > runtime.budget.for_images:
        resident = 2 * runtime.images.full()[0] * pixels
    forward = [runtime.images, runtime.prompts] if runtime.stages.text else [runtime.images]
    activations = max(map(_in_work, forward))
    derived = max(
        _in_work(runtime.slopes) if any(work.gradients) else 0,
        _in_work(runtime.curvatures) if work.curvatures else 0,
    )
    held = int(work.held * evaluator.boundary)
    # Gradients are taken before anything is held, so that only the larger of the two counts.
    if derived > held + activations:
        held, activations = 0, derived
    copies = 4 * int(work.differentiated + COPIES * work.borrowed)
    return Memory(program, weights, resident, held, activations, copies)


def _in_work(batches: Batches) -> int:
    """Bytes of the full batches that are in work at once."""
    size, workers = batches.full()
    return workers * (batches.need.fixed + size * batches.need.each)


def _bytes(path: Path) -> int:
    """Bytes of the live model and its ends, each piece of memory once."""
    tensors = [t for slot in path.slots for t in (slot.tensor, *slot.ends)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
