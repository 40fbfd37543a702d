"""``Runtime``: a model in stages on its device, and how much of it runs at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..clip.classifier import ImageClassifier, ZeroShotClassifier
from ..names import Precision
from . import derivatives, modes
from . import graphs as recordings
from . import precision as formats
from .batches import Batches, Need
from .budget import Budget
from .stages import Stage, Stages
from .stages.cutting import run
from .staging import Staged


class Runtime:
    """What all evaluators of a model share: its stages, batches, recordings and memory.

    It refers to no data set and to no evaluator, and so keeps none of them alive.

    Args:
        model: on one device, its weights in the type of the precision or float32.
        precision: as :class:`rft_fast.evaluate.Evaluator` takes it.
        device: the model's.
        budget: of its memory.
        staged: the model in stages.
        pixels: the shape of an image, [3, h, w].
        batch_size: images per forward; None: as :class:`rft_fast.evaluate.batches.Batches` chooses.
        graphs: whether stages are recorded as CUDA graphs on a CUDA device.
        compile: whether stages go through ``torch.compile``.
    """

    traced: Stages
    """The model in stages."""
    stages: Stages
    """The same, compiled where that was asked for."""
    stations: int
    """How many places there are where a walk can stand, see :class:`rft_fast.evaluate.Walk`."""
    holds_prompts: bool
    """Whether the activations of all prompts fit in memory."""
    graphs: recordings.Graphs | None
    """Recordings of stages."""
    example: Callable[[int], Tensor]
    """A number of images -> the model's input of that shape, without values."""
    images: Batches
    """How images go through the image chain."""
    prompts: Batches
    """How prompts go through the text chain."""
    slopes: Batches
    """How images go through the model and back, for the gradient."""
    curvatures: Batches
    """The same for products with the Hessian."""

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        device: torch.device,
        budget: Budget,
        staged: Staged,
        pixels: torch.Size,
        batch_size: int | None,
        graphs: bool,
        compile: bool,
    ) -> None:
        self.model, self.precision, self.device, self.budget = model, precision, device, budget
        self.batch_size = batch_size
        self.traced = chains = staged.chains
        self.stages = _compiled(chains, precision) if compile else chains
        self.stations = len(chains.image) + (len(chains.text) + 2 if chains.text else 0)
        self.holds_prompts = budget.holds(staged.prompts)
        self.graphs = None
        if graphs and device.type == "cuda":
            self.graphs = recordings.Graphs(recordings.on(device))

        # What follows does not refer to the runtime: in a cycle, its memory would be free only when Python
        # looks for cycles.
        dtype, recorded = formats.PRECISIONS[precision], self.graphs

        def images(count: int) -> Tensor:
            return torch.empty((count, *pixels), dtype=dtype, device=device)

        def prompts(count: int) -> Tensor:
            shape = (0,) if chains.prompts is None else chains.prompts.shape[1:]
            return torch.empty((count, *shape), dtype=torch.int64, device=device)

        def forward(chain: tuple[Stage, ...], example: Callable[[int], Tensor]) -> Need:
            with modes.scoring(model, precision):
                return Need.of(lambda count: run(chain, example(count)))

        def derivative(order: int) -> Need:
            return derivatives.trial(model, precision, images, order, Need.of)

        def relieve() -> None:
            if recorded is not None:
                recorded.clear()
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()

        def batches(side: int, need: Callable[[], Need], sample: str = "image") -> Batches:
            return Batches(device, batch_size, side, budget.for_batches, need, relieve, sample)

        # Stages were traced, so that they can keep no state; our own classifiers are known to.
        pooled = len(chains.image) > 1 or isinstance(model, (ImageClassifier, ZeroShotClassifier))
        side = sys.maxsize if pooled else 1
        few = min(side, 4)  # because each batch holds gradients of its own
        self.example = images
        self.images = batches(1 if compile else side, lambda: forward(chains.image, images))
        self.prompts = batches(1 if compile else side, lambda: forward(chains.text, prompts), "prompt")
        self.slopes = batches(few, lambda: derivative(1))
        self.curvatures = batches(few, lambda: derivative(2))

    def scoring(self) -> AbstractContextManager[None]:
        """Eval mode and exact products, without gradients; all is as it was afterwards."""
        return modes.scoring(self.model, self.precision)

    def span(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """As :meth:`rft_fast.evaluate.Evaluator.span`."""
        numbers = {station for tensor in tensors for station in self._owners.get(id(tensor), [-1])}
        text, last = len(self.stages.text), self.stations - 1
        towers = {station <= text for station in numbers if station < last}
        if not numbers or -1 in numbers or (text and len(towers) > 1):
            return 0, last
        return min(numbers), max(numbers)

    @cached_property
    def _owners(self) -> dict[int, list[int]]:
        """id of a tensor -> the stations whose stages read it."""
        owners: dict[int, list[int]] = {}
        text = len(self.stages.text)
        numbered = list(enumerate(self.stages.text, start=1))
        numbered += list(enumerate(self.stages.image, start=1 + text if text else 0))
        for station, stage in numbered:
            for tensor in stage.tensors:
                owners.setdefault(id(tensor), []).append(station)
        for tensor in self.stages.joined:
            owners.setdefault(id(tensor), []).append(self.stations - 1)
        return owners


def _compiled(chains: Stages, precision: Precision) -> Stages:
    # The compiler's patterns would find plain attention, and put the kernel in its place that "ieee" avoids.
    options: dict[str, Any] | None = {"pattern_matcher": False} if precision == "ieee" else None

    def compiled(chain: tuple[Stage, ...]) -> tuple[Stage, ...]:
        return tuple(replace(stage, run=torch.compile(stage.run, options=options)) for stage in chain)

    return replace(chains, image=compiled(chains.image), text=compiled(chains.text))
