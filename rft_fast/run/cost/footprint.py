"""Peak memory of work, and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...common import meter
from ...evaluate import Evaluator
from ...evaluate.batches import Batches
from ...path import Path
from .work import Work

PRUNING = 4
"""Number of float32 copies of the borrowed weights that pruning by magnitude holds, one weight at a time."""


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes.

    Attributes:
        program: On the CPU: memory of the process beside the weights, mostly libraries.
        weights: The live model and its two ends.
        images: The images on the device, or the batches that are copied to it.
        held: Held activations of all images of a walk.
        batches: Activations of the batches in work.
        copies: Gradients, copies of weights for the worst case, and other models that are combined.
    """

    program: int
    weights: int
    images: int
    held: int
    batches: int
    copies: int

    @property
    def total(self) -> int:
        return self.program + self.weights + self.images + self.held + self.batches + self.copies


def memory(work: Work, evaluator: Evaluator, path: Path, images: int, copies: int = PRUNING) -> Memory:
    """Estimate the peak memory of work.

    Args:
        work: The work.
        evaluator: An evaluator of the model.
        path: The path.
        images: Number of images in memory, for all evaluators together.
        copies: Number of float32 copies of the borrowed weights, beside their gradients: for the worst case,
            :func:`rft_fast.studies.estimators.climbs.copies`.
    """
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
        _in_work(runtime.slopes) if any(work.gradients) or work.recorded else 0,
        _in_work(runtime.curvatures) if work.curvatures else 0,
    )
    held = int(work.held * evaluator.boundary)
    # Gradients are computed before anything is held, so only the larger of the two counts.
    if derived > held + activations:
        held, activations = 0, derived
    if work.recorded:  # besides; an image has about as much there as in a backward pass
        each = runtime.slopes.need.each
        held += int(min(work.recorded, runtime.budget.held(each)) * each)
    copied = 4 * int(work.differentiated + copies * work.borrowed + work.combined)
    return Memory(program, weights, resident, held, activations, copied)


def _in_work(batches: Batches) -> int:
    """Return the bytes of the full batches that are in work at once."""
    size, workers = batches.full()
    return workers * (batches.need.fixed + size * batches.need.each)


def _bytes(path: Path) -> int:
    """Return the bytes of the live model and its ends, each storage counted once."""
    tensors = [t for slot in path.slots for t in (slot.tensor, *slot.ends)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
