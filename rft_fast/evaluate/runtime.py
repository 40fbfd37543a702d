"""``Runtime``: a model in stages on its device, and how its batches are cut."""

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
from .flipped import NoRule
from .flipping import Flips
from .replays import Replays
from .stages import Stage, Stages
from .stages.cutting import run
from .staging import Staged


class Runtime:
    """What all evaluators of a model share: its stages, batches, recordings and memory budget.

    Refers to no data set and no evaluator, so it keeps none of them alive.

    Args:
        model: On one device, with weights in the dtype of the precision or float32.
        precision: As for :class:`rft_fast.evaluate.Evaluator`.
        device: Device of the model.
        budget: Shares of its memory.
        staged: The model in stages.
        pixels: Shape of an image, [3, h, w].
        batch_size: Images per forward pass; None: as :class:`rft_fast.evaluate.batches.Batches` selects.
        graphs: Record stages as CUDA graphs, on a CUDA device.
        compile: Run stages through ``torch.compile``.

    Attributes:
        traced: The model in stages, not compiled.
        stages: The model in stages, compiled if requested.
        stations: Number of stations, see :class:`rft_fast.evaluate.Walk`.
        holds_prompts: Whether the activations of all prompts fit in memory.
        graphs: Recordings of stages; None: stages are not recorded.
        example: Number of images -> input of that shape, uninitialised.
        images: How images are cut into batches, for the image chain.
        prompts: How prompts are cut into batches, for the text chain.
        slopes: How images are cut into batches for the gradient.
        curvatures: How images are cut into batches for products with the Hessian.
        flips: How stages read weights that differ between images, by what has been requested.
        replays: Recordings of such stages, and of those after them.
    """

    traced: Stages
    stages: Stages
    stations: int
    holds_prompts: bool
    graphs: recordings.Graphs | None
    example: Callable[[int], Tensor]
    images: Batches
    prompts: Batches
    slopes: Batches
    curvatures: Batches
    flips: dict[tuple[int, ...], Flips]
    replays: Replays

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
        capture = recordings.on(device) if graphs and device.type == "cuda" else None
        self.graphs = None if capture is None else recordings.Graphs(capture)
        self.flips, self.replays = {}, Replays(capture)

        # The functions below do not refer to the runtime: a reference cycle would keep its memory until the
        # next garbage collection.
        dtype, recorded, replays = formats.PRECISIONS[precision], self.graphs, self.replays

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
                replays.clear()
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()

        def batches(side: int, need: Callable[[], Need], sample: str = "image") -> Batches:
            return Batches(device, batch_size, side, budget.for_batches, need, relieve, sample)

        # Traced stages keep no state, and neither do our own classifiers, so batches may run side by side.
        pooled = len(chains.image) > 1 or isinstance(model, (ImageClassifier, ZeroShotClassifier))
        side = sys.maxsize if pooled else 1
        few = min(side, 4)  # since each batch has its own gradients
        self.example = images
        self.images = batches(1 if compile else side, lambda: forward(chains.image, images))
        self.prompts = batches(1 if compile else side, lambda: forward(chains.text, prompts), "prompt")
        self.slopes = batches(few, lambda: derivative(1))
        self.curvatures = batches(few, lambda: derivative(2))

    def scoring(self) -> AbstractContextManager[None]:
        """Context manager: eval mode and exact products, without gradients."""
        return modes.scoring(self.model, self.precision)

    def span(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """Return the first and the last station that read some tensors, see
        :meth:`rft_fast.evaluate.Evaluator.span`.
        """
        numbers = {station for tensor in tensors for station in self._owners.get(id(tensor), [-1])}
        text, last = len(self.stages.text), self.stations - 1
        towers = {station <= text for station in numbers if station < last}
        if not numbers or -1 in numbers or (text and len(towers) > 1):
            return 0, last
        return min(numbers), max(numbers)

    def image_stages(self, first: int, last: int) -> tuple[int, int]:
        """Return the image stage at station ``first``, and the one after station ``last``.

        Raises:
            NoRule: One of the stations is not in the image tower.
        """
        before = len(self.stages.text) + 1 if self.stages.text else 0
        if first < before or last >= before + len(self.stages.image):
            raise NoRule("the images share the head that the text tower makes")
        return first - before, last + 1 - before

    @cached_property
    def _owners(self) -> dict[int, list[int]]:
        """id of a tensor -> stations whose stages read it."""
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
    # The compiler's patterns would replace plain attention by the kernel that "ieee" avoids.
    options: dict[str, Any] | None = {"pattern_matcher": False} if precision == "ieee" else None

    def compiled(chain: tuple[Stage, ...]) -> tuple[Stage, ...]:
        return tuple(replace(stage, run=torch.compile(stage.run, options=options)) for stage in chain)

    return replace(chains, image=compiled(chains.image), text=compiled(chains.text))
