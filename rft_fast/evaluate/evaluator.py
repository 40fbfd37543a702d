"""``Evaluator``: scores a live model on data sets, and does not do again what a change left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from ..common.threads import threads_of_a_batch
from ..datasets import Dataset
from ..names import Precision
from . import modes
from . import precision as formats
from .batches import is_out_of_memory, too_large
from .budget import Budget
from .computing import Computing
from .executor import Executor
from .feed import Images, total
from .runtime import Runtime
from .scores import Scores
from .stages import Stages
from .staging import Staged, check_weights, device_of, staged
from .walk import Walk


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

    runtime: Runtime
    """The model, shared by all evaluators of it."""
    executor: Executor
    """What carries out what this evaluator and its walks decide."""
    feeds: list[Images]
    """The data sets as the model takes them."""
    boundary: int
    """Bytes that a walk holds of one image, at worst."""

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
        device = device_of(model)
        formats.check(precision, device)
        check_weights(model, precision)
        budget = Budget(device, memory_limit)
        self.feeds, found = _load(datasets, model, precision, device, budget, normalize_logits)
        self.boundary = found.image
        pixels = self.feeds[0].dataset.images.shape[1:]
        self.runtime = Runtime(model, precision, device, budget, found, pixels, batch_size, graphs, compile)
        self.executor = Computing(self.runtime)

    @property
    def model(self) -> nn.Module:
        return self.runtime.model

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.runtime.device

    @property
    def precision(self) -> Precision:
        return self.runtime.precision

    @property
    def batch_size(self) -> int | None:
        """As it was given."""
        return self.runtime.batch_size

    @property
    def memory_limit(self) -> int:
        """In bytes."""
        return self.runtime.budget.limit

    @property
    def stages(self) -> Stages:
        """The model in stages."""
        return self.runtime.stages

    @property
    def stations(self) -> int:
        """How many places there are where a walk can stand: before each stage."""
        return self.runtime.stations

    @property
    def datasets(self) -> list[Dataset]:
        """The data sets that are scored."""
        return [feed.dataset for feed in self.feeds]

    @property
    def normalize_logits(self) -> bool:
        return self.feeds[0].normalize

    @property
    def threads_of_a_batch(self) -> int | None:
        """What the last bits of the results depend on, on a CPU; None on other devices."""
        if self.device.type != "cpu":
            return None
        return threads_of_a_batch() if self.runtime.images.side_by_side else torch.get_num_threads()

    def on(self, datasets: Sequence[Dataset], normalize_logits: bool = False) -> Evaluator:
        """An evaluator of the same model with the same settings on other data sets.

        What was found out about the model, its stages above all, is not found out again. Raises as making
        an Evaluator does.
        """
        runtime = self.runtime
        known = runtime.traced
        feeds, found = _load(
            datasets, self.model, self.precision, self.device, runtime.budget, normalize_logits, known
        )
        other = self.of(feeds)
        other.boundary = found.image
        return other

    def of(self, feeds: Sequence[Images], executor: Executor | None = None) -> Evaluator:
        """An evaluator of the same model on these images, which are found fit for it.

        executor: what carries out what it decides; None: what does for this one.
        """
        other = copy(self)
        other.feeds = list(feeds)
        other.executor = executor or self.executor
        return other

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
        return Walk(self.runtime, self.feeds, self.executor, self._room())

    def span(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """The first and last station (see :class:`Walk`) whose stages read these tensors of the model.

        (0, last of all) for tensors of both towers, or that no stage is known to read.
        """
        return self.runtime.span(tensors)

    def stage_of(self, tensors: Iterable[Tensor]) -> int:
        """The first station whose stage reads one of these tensors of the model."""
        return self.span(tensors)[0]

    # --- parts of the data ----------------------------------------------------------------------

    def parts(self, size: int | None, name: str) -> list[Evaluator]:
        """Evaluators of one data set: for every ``size`` images in order (None: for all at once).

        They share this one's model and memory; the last one may be smaller.
        """
        (feed,) = (feed for feed in self.feeds if feed.name == name)
        return [self.of([part]) for part in feed.parts(size or len(feed))]

    def among(self, names: Iterable[str]) -> Evaluator:
        """An evaluator of the data sets of these names, in this order; it shares model and memory."""
        feeds = {feed.name: feed for feed in self.feeds}
        return self.of([feeds[name] for name in names])

    def pieces(self) -> list[Evaluator]:
        """Evaluators of consecutive images of all sets, such that what a walk holds fits in memory.

        Usually this one alone. A layer-wise study walks through one piece after the other.
        """
        room = self._room()
        if total(self.feeds) <= room:
            return [self]
        return [self.of([part]) for feed in self.feeds for part in feed.parts(room)]

    def _room(self) -> int:
        """How many images may be held between stages."""
        return self.runtime.budget.held(self.boundary)

    # --- derivatives ----------------------------------------------------------------------------

    def gradient(self, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Mean loss over all images, and its gradient at each of these weights of the model, in float32.

        Gradients are zero where a weight cannot change the loss. Training flags, ``.grad`` and
        ``requires_grad`` stay as they were; one more copy of the weights is held.
        """
        self._check_device()
        return self.executor.gradient(self.feeds, weights)

    def curvature(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """For each weight i, v_i . (H v)_i with the Hessian H of the mean loss over all images.

        directions: v, shaped as the weights. Float64 [number of weights], on the device. H couples all
        ``weights``: for random signs v, the expectation of entry i is the trace of H's block i.
        """
        self._check_device()
        return self.executor.curvature(self.feeds, weights, directions)

    def _check_device(self) -> None:
        if (device := device_of(self.model)) != self.device:
            raise ValueError(f"scores: the model moved from {self.device} to {device}; make a new Evaluator")


def _load(
    datasets: Sequence[Dataset],
    model: nn.Module,
    precision: Precision,
    device: torch.device,
    budget: Budget,
    normalize_logits: bool,
    known: Stages | None = None,
) -> tuple[list[Images], Staged]:
    """Data sets as the model takes them, on its device where they fit, and the model in stages."""
    _check_datasets(datasets)
    resident = budget.keep(sum(data.images.nbytes for data in datasets))
    dtype = formats.PRECISIONS[precision]
    try:
        feeds = [Images(data, device, dtype, resident, normalize_logits) for data in datasets]
        with modes.scoring(model, precision):
            return feeds, staged(model, precision, feeds, known)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(too_large(device, error)) from error
        raise


def _check_datasets(datasets: Sequence[Dataset]) -> None:
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"Evaluator: datasets must hold Datasets, got {type(dataset).__name__}")
    names = [dataset.name for dataset in datasets]
    if not names:
        raise ValueError("Evaluator: no data set to score")
    if len(set(names)) != len(names):
        raise ValueError(f"Evaluator: data sets need distinct names, got {', '.join(names)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
