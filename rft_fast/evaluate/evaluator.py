"""``Evaluator``: scores a live model on data sets, and does not do again what a change left as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..clip.classifier import ImageClassifier, ZeroShotClassifier
from ..common import meter
from ..common.threads import threads_of_a_batch
from ..datasets import Dataset
from ..names import Precision
from . import derivatives, modes
from . import graphs as recordings
from . import precision as formats
from .batches import Batches, Need, is_out_of_memory, too_large
from .feed import Images, total
from .scores import Scores
from .stages import Stage, Stages, stages
from .walk import Walk

# Of the memory limit: for images that stay on the device, for held activations, and for those of the batches
# in work. The rest is for gradients and what libraries take.
RESIDENT, HELD, WORKING = 0.4, 0.3, 0.2


class Evaluator:
    """Scores a live model on data sets.

    model: maps images [n, 3, h, w] to logits [n, classes], on one device, its weights in the type of the
        precision (:func:`rft_fast.evaluate.precision.cast`) or float32; they may change between calls, as
        a :class:`rft_fast.Path` does it.
    datasets: distinct names. They move to the model's device where they fit, as bytes; if not, batches
        are streamed there while the one before is computed.
    batch_size: images per forward; the last batch of a set may be smaller. None: 512, but on the CPU
        128, whose activations stay in its caches, and 64 for sets of fewer than 512 images, so that
        there are batches for several cores; less where the memory limit asks for it. A batch that
        does not fit is halved, with a warning, from then on.
    precision: "fp32"; "ieee", the same with attention by ordinary float32 products (see
        :mod:`rft_fast.evaluate.precision`); "tf32" (NVIDIA GPUs); "bf16" or "fp16", activations and weights
        alike. Logits are normalised and judged in float32. Shortcuts that torch is set to take are off while
        scoring, and as they were afterwards; these switches are global, so score from one thread at a time.
    normalize_logits: centre the logits of each image and divide them by their l2 norm (at least
        1e-10) before the loss, so that it does not change with the scale of the logits.
    memory_limit: bytes for images, held activations and batches; None: 80 % of what is free on a GPU, half of
        what is free on the CPU, when the evaluator is made.
    graphs: on a CUDA device, record the launches of stages as CUDA graphs, and replay them.
    compile: run the stages through ``torch.compile``: minutes of compilation for large models, and numbers
        that differ in the last digits.

    One image of every set goes through the model here, so that what cannot be scored is refused
    now: ValueError for sizes that do not fit the model, labels or classes beyond its logits, and
    folders whose number of classes is another one. MemoryError where one image does not fit.
    """

    datasets: list[Dataset]
    device: torch.device
    stages: Stages
    stations: int  # places where a walk can stand: before each stage

    def __init__(
        self,
        model: nn.Module,
        datasets: Sequence[Dataset],
        batch_size: int | None = None,
        precision: Precision = "fp32",
        normalize_logits: bool = False,
        *,
        memory_limit: int | None = None,
        graphs: bool = True,
        compile: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Evaluator: model must be an nn.Module, got {type(model).__name__}")
        for name, value in (("batch_size", batch_size), ("memory_limit", memory_limit)):
            if value is not None and not _is_count(value):
                raise ValueError(f"Evaluator: {name} must be an int of at least 1, got {value!r}")
        self.device = _device(model)
        formats.check(precision, self.device)
        self.model = model
        self.precision = precision
        self.normalize_logits = normalize_logits
        self.batch_size = batch_size
        self._check_weights()
        if memory_limit is None:
            share = 0.8 if self.device.type == "cuda" else 0.5
            memory_limit = int(share * meter.available(self.device))
        self.memory_limit = memory_limit
        self._resident = [0]  # bytes of images on the device, of all evaluators that share this model
        self._holds_prompts = True
        self._traced: Stages | None = None
        self._traced = self._take(datasets)
        self.stages = self._traced
        self._graphs: recordings.Graphs | None = None
        if graphs and self.device.type == "cuda":
            self._graphs = recordings.Graphs(recordings.on(self.device))
        self._plan_batches(compile)
        if compile:
            self.stages = _compiled(self.stages, precision)
        images, text = len(self.stages.image), len(self.stages.text)
        self.stations = images + text + 2 if text else images

    @property
    def threads_of_a_batch(self) -> int | None:
        """What the last bits of the results depend on, on a CPU; None on other devices."""
        if self.device.type != "cpu":
            return None
        return threads_of_a_batch() if self._images.side_by_side else torch.get_num_threads()

    def on(self, datasets: Sequence[Dataset], normalize_logits: bool = False) -> Evaluator:
        """An evaluator of the same model with the same settings on other data sets.

        What was found out about the model, its stages above all, is not found out again. Raises as making
        an Evaluator does.
        """
        other = copy(self)
        other.normalize_logits = normalize_logits
        other._take(datasets)
        return other

    def _take(self, datasets: Sequence[Dataset]) -> Stages:
        """Takes data sets to score, once they are found fit for the model. Returns its stages."""
        _check_datasets(datasets)
        self.datasets = list(datasets)
        size = sum(data.images.nbytes for data in datasets)
        resident = self.device.type != "cuda" or self._resident[0] + size <= RESIDENT * self.memory_limit
        self._resident[0] += size if resident else 0
        self._feeds: list[Images] = []
        self._boundary = 0  # bytes that a walk holds of an image, at worst
        try:
            for data in self.datasets:
                self._feeds.append(Images(data, self.device, formats.PRECISIONS[self.precision], resident))
            with self._scoring():
                return self._staged(self._traced)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError(too_large(self.device, error)) from error
            raise

    # --- what a change leaves as it was ---------------------------------------------------------

    def scores(self) -> dict[str, Scores]:
        """Data set name -> scores of the model as it is now.

        Runs in eval mode without gradients and leaves every module's training flag as it was. The
        results come to the CPU at the end; nothing waits for the device before that.
        """
        return self.walk().scores()

    def walk(self) -> Walk:
        """The data sets before the first stage, ready to be scored or to go on."""
        self._check_device()
        return Walk(self)

    def span(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """The first and last station (see :class:`Walk`) whose stages read these tensors of the model.

        (0, last of all) for tensors of both towers, or that no stage is known to read.
        """
        numbers = {station for tensor in tensors for station in self._owners.get(id(tensor), [-1])}
        text, last = len(self.stages.text), self.stations - 1
        towers = {station <= text for station in numbers if station < last}
        if not numbers or -1 in numbers or (text and len(towers) > 1):
            return 0, last
        return min(numbers), max(numbers)

    def stage_of(self, tensors: Iterable[Tensor]) -> int:
        """The first station whose stage reads one of these tensors of the model."""
        return self.span(tensors)[0]

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

    # --- parts of the data ----------------------------------------------------------------------

    def parts(self, size: int | None, name: str) -> list[Evaluator]:
        """Evaluators of one data set: for every ``size`` images in order (None: for all at once).

        They share this one's model and memory; the last one may be smaller.
        """
        (feed,) = (feed for feed in self._feeds if feed.name == name)
        n = len(feed)
        return [self._of([feed.cut(slice(at, min(n, at + (size or n))))]) for at in range(0, n, size or n)]

    def among(self, names: Iterable[str]) -> Evaluator:
        """An evaluator of the data sets of these names, in this order; it shares model and memory."""
        feeds = {feed.name: feed for feed in self._feeds}
        return self._of([feeds[name] for name in names])

    def pieces(self) -> list[Evaluator]:
        """Evaluators of consecutive images of all sets, such that what a walk holds fits in memory.

        Usually this one alone. A layer-wise study walks through one piece after the other.
        """
        room = self._room_held()
        if total(self._feeds) <= room:
            return [self]
        pieces = []
        for feed in self._feeds:
            for at in range(0, len(feed), room):
                pieces.append(self._of([feed.cut(slice(at, min(len(feed), at + room)))]))
        return pieces

    def _room_held(self) -> int:
        """So many images may be held between stages."""
        return max(1, int(HELD * self.memory_limit / max(1, self._boundary)))

    def _of(self, feeds: list[Images]) -> Evaluator:
        part = copy(self)
        part._feeds = feeds
        part.datasets = [feed.dataset for feed in feeds]
        return part

    # --- derivatives ----------------------------------------------------------------------------

    def gradient(self, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Mean loss over all images, and its gradient at each of these weights of the model, in float32.

        Gradients are zero where a weight cannot change the loss. Training flags, ``.grad`` and
        ``requires_grad`` stay as they were; one more copy of the weights is held.
        """
        self._check_device()
        return derivatives.gradient(self, weights)

    def curvature(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """For each weight i, v_i . (H v)_i with the Hessian H of the mean loss over all images.

        directions: v, shaped as the weights. Float64 [number of weights], on the device. H couples all
        ``weights``: for random signs v, the expectation of entry i is the trace of H's block i.
        """
        self._check_device()
        return derivatives.curvature(self, weights, directions)

    # --- batches --------------------------------------------------------------------------------

    def _plan_batches(self, compile: bool) -> None:
        # No reference to this evaluator is left behind: parts of it, and later ones, shall not keep it alive.
        model, precision, chains = self.model, self.precision, self.stages
        feed, device, recorded = self._feeds[0], self.device, self._graphs
        pixels, dtype = feed.dataset.images.shape[1:], feed.dtype
        # Stages were traced, so that they can keep no state; our own classifiers are known to.
        pooled = len(chains.image) > 1 or isinstance(model, (ImageClassifier, ZeroShotClassifier))
        side = sys.maxsize if pooled else 1

        def images(count: int) -> Tensor:
            return torch.empty((count, *pixels), dtype=dtype, device=device)

        def prompts(count: int) -> Tensor:
            shape = (0,) if chains.prompts is None else chains.prompts.shape[1:]
            return torch.empty((count, *shape), dtype=torch.int64, device=device)

        def need(chain: tuple[Stage, ...], example: Callable[[int], Tensor]) -> Need:
            with modes.scoring(model, precision):
                return Need.of(lambda count: _through(chain, example(count)))

        def relieve() -> None:
            if recorded is not None:
                recorded.clear()
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()

        def batches(side: int, need: Callable[[], Need], sample: str = "image") -> Batches:
            room = int(WORKING * self.memory_limit)
            return Batches(device, self.batch_size, side, room, need, relieve, sample)

        forward = 1 if compile else side
        self._images = batches(forward, lambda: need(chains.image, images))
        self._prompts = batches(forward, lambda: need(chains.text, prompts), "prompt")
        # Side by side at most four, because each holds gradients of its own.
        few = min(side, 4)
        self._slopes = batches(few, lambda: derivatives.need(model, precision, images, 1))
        self._curvatures = batches(few, lambda: derivatives.need(model, precision, images, 2))

    def _size(self, images: int) -> int:
        """Images per forward of a set of so many."""
        return self._images.size(images)

    def _workers(self, items: int) -> int:
        """How many full batches of images run side by side."""
        return self._images.workers(items, self._size(sys.maxsize))

    # --- the model ------------------------------------------------------------------------------

    def _staged(self, found: Stages | None) -> Stages:
        """The model in stages, if they are not known. Every set is looked at: image sizes may differ."""
        for feed in self._feeds:
            expected = feed.check(self._answer)
            if found is None:
                images = feed.prepare(slice(0, 2))
                with formats.exact("fp32"):  # what is compared there shall differ by no rounding to tf32
                    found = stages(self.model, images if len(images) == 2 else torch.cat([images, images]))
            if len(found.image) > 1 or found.text:
                self._verify(found, feed, expected)
        return found or Stages(())

    def _answer(self, images: Tensor) -> Any:
        """Logits, or what the model gives in their place.

        With two towers those of a single prompt, for all classes: thousands of prompts take a while.
        """
        model = self.model
        if not isinstance(model, ZeroShotClassifier):
            return model(images)
        prompts = model.prompts.flatten(0, 1)
        return model.join(model.visual(images), model.text(prompts[:1]).expand(len(prompts), -1))

    def _verify(self, chains: Stages, feed: Images, expected: Tensor) -> None:
        """Refuses stages that do not compute what the model does, and notes what a walk will hold."""
        image = feed.prepare(slice(0, 1))
        logits, held = _watched(chains.image, image)
        self._boundary = max(self._boundary, held)
        if chains.head is not None and chains.join is not None and chains.prompts is not None:
            features, held = _watched(chains.text, chains.prompts[:1])
            self._holds_prompts = held * len(chains.prompts) <= HELD * self.memory_limit
            logits = chains.join(logits, chains.head(features.expand(len(chains.prompts), -1)))
        error = (logits - expected).float().abs().max()
        tolerance = 1e-3 if self.precision in ("fp32", "ieee") else 0.05
        if error > tolerance * expected.float().abs().max():
            raise RuntimeError(
                f"Evaluator: on {feed.name!r} the model's stages do not compute what its forward pass "
                "computes; please report this"
            )

    def _check_device(self) -> None:
        if (device := _device(self.model)) != self.device:
            raise ValueError(f"scores: the model moved from {self.device} to {device}; make a new Evaluator")

    def _check_weights(self) -> None:
        wanted = formats.PRECISIONS[self.precision]
        dtypes = {tensor.dtype for tensor in _floats(self.model)}
        if wanted not in dtypes or not dtypes <= {wanted, torch.float32}:
            raise ValueError(
                f"Evaluator: precision {self.precision!r} needs a model in {_short(wanted)}, this one has "
                f"{', '.join(sorted(map(_short, dtypes)))}; call rft_fast.evaluate.precision.cast(model, "
                f"{self.precision!r}) before a Path is made of it (the path's ends may stay as they are)"
            )

    def _scoring(self) -> AbstractContextManager[None]:
        return modes.scoring(self.model, self.precision)


# --- small things -------------------------------------------------------------------------------


def _through(stages: tuple[Stage, ...], inputs: Tensor) -> Tensor:
    x = inputs
    for stage in stages:
        x = stage.run(x, inputs)
    return x


def _watched(stages: tuple[Stage, ...], sample: Tensor) -> tuple[Tensor, int]:
    """What becomes of one sample, and the bytes that a walk holds of it at worst.

    On the way from one boundary to another of a different shape, these are both.
    """
    x, sizes = sample, {}
    for stage in stages:
        x = stage.run(x, sample)
        sizes[x.shape, x.dtype] = x.nbytes
    return x, sum(sorted(sizes.values())[-2:])


def _compiled(chains: Stages, precision: Precision) -> Stages:
    # The compiler's patterns would find plain attention, and put the kernel in its place that "ieee" avoids.
    options: dict[str, Any] | None = {"pattern_matcher": False} if precision == "ieee" else None

    def compiled(chain: tuple[Stage, ...]) -> tuple[Stage, ...]:
        return tuple(replace(stage, run=torch.compile(stage.run, options=options)) for stage in chain)

    return replace(chains, image=compiled(chains.image), text=compiled(chains.text))


def _check_datasets(datasets: Sequence[Dataset]) -> None:
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"Evaluator: datasets must hold Datasets, got {type(dataset).__name__}")
    names = [dataset.name for dataset in datasets]
    if not names:
        raise ValueError("Evaluator: no data set to score")
    if len(set(names)) != len(names):
        raise ValueError(f"Evaluator: data sets need distinct names, got {', '.join(names)}")


def _floats(model: nn.Module) -> list[Tensor]:
    return [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]


def _device(model: nn.Module) -> torch.device:
    tensors = _floats(model)
    if not tensors:
        raise ValueError("Evaluator: the model has no weights to score")
    if len(devices := sorted({str(tensor.device) for tensor in tensors})) > 1:
        raise ValueError(f"Evaluator: the model must be on one device, it is on {devices}")
    return tensors[0].device


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
