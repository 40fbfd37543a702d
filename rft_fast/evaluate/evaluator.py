"""``Evaluator``: scores a live model on data sets; only what a change affects is computed again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import torch
from torch import Tensor, nn

from ..common.threads import threads_of_a_batch
from ..datasets import Dataset
from ..names import Precision
from . import precision as formats
from .batches import is_out_of_memory, too_large
from .budget import Budget
from .computing import Computing
from .executor import Executor
from .feed import Images, total
from .flipped import Flipped
from .flow import Flow
from .runtime import Runtime
from .scores import Scores
from .stages import Stages
from .staging import Staged, check_weights, device_of, staged
from .walk import Walk


class Evaluator:
    """Scores a live model on data sets.

    One image of each data set goes through the model when the evaluator is created, so that errors are raised
    then. Logits are normalised and scored in float32. While scoring, global switches of torch that allow less
    exact products are off, and they are restored afterwards; so score from one thread at a time.

    Args:
        model: Maps images [n, 3, h, w] to logits [n, classes]; on one device. Its weights have the dtype of
            the precision (see :func:`rft_fast.evaluate.precision.cast`) or float32. They may change between
            calls, as a :class:`rft_fast.Path` does it.
        datasets: Data sets with distinct names. Their images move to the model's device as uint8 if they fit;
            otherwise batches are copied to it while the previous batch is computed.
        batch_size: Images per forward pass; the last batch of a set may be smaller. None: 512; on the CPU
            128, whose activations stay in the caches, or 64 for sets of fewer than 512 images, so that there
            are batches for several cores; fewer if the memory limit requires it. A batch that does not fit in
            memory is halved, with a warning, and so are all later ones.
        precision: "fp32"; "ieee", the same with attention by plain float32 products (see
            :mod:`rft_fast.evaluate.precision`); "tf32" (NVIDIA GPUs only); "bf16x3", with each product as
            three of bfloat16; "bf16" or "fp16", for activations and weights.
        normalize_logits: Center the logits of each image and divide them by their l2 norm (at least 1e-10)
            before the loss, which makes the loss independent of the scale of the logits.
        memory_limit: Bytes for images, held activations and batches. None: 80 % of the free memory of a GPU,
            half of the free memory of the CPU, at the time of creation.
        graphs: On a CUDA device, record the kernel launches of stages as CUDA graphs and replay them.
        compile: Run the stages through ``torch.compile``: takes minutes for large models, and changes the
            last digits.

    Attributes:
        runtime: The model in stages; shared by all evaluators of this model.
        executor: Carries out what the evaluator and its walks decide, see
            :class:`rft_fast.evaluate.executor.Executor`.
        feeds: The data sets, as inputs of the model.
        boundary: Bytes of held activations per image, at most.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range; the precision does not fit the weights or the device; images do
            not fit the model; labels or classes exceed its logits; a data set has another number of classes.
        MemoryError: One image does not fit in memory.
        RuntimeError: The stages do not compute what the model computes.
    """

    runtime: Runtime
    executor: Executor
    feeds: list[Images]
    boundary: int

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
        if compile and precision == "bf16x3":
            raise ValueError(
                "Evaluator: compile=True cannot be combined with precision 'bf16x3', whose products "
                "torch.compile does not see; leave one of them out"
            )
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
        """Device of the model."""
        return self.runtime.device

    @property
    def precision(self) -> Precision:
        return self.runtime.precision

    @property
    def batch_size(self) -> int | None:
        """Images per forward pass, as passed by the caller."""
        return self.runtime.batch_size

    @property
    def memory_limit(self) -> int:
        """Memory limit in bytes."""
        return self.runtime.budget.limit

    @property
    def stages(self) -> Stages:
        """The model in stages, compiled if requested."""
        return self.runtime.stages

    @property
    def stations(self) -> int:
        """Number of stations: positions where a :class:`Walk` can stand."""
        return self.runtime.stations

    @property
    def datasets(self) -> list[Dataset]:
        """The data sets."""
        return [feed.dataset for feed in self.feeds]

    @property
    def normalize_logits(self) -> bool:
        return self.feeds[0].normalize

    @property
    def threads_of_a_batch(self) -> int | None:
        """CPU threads per batch, which the last bits of results depend on; None on other devices."""
        if self.device.type != "cpu":
            return None
        return threads_of_a_batch() if self.runtime.images.side_by_side else torch.get_num_threads()

    def on(self, datasets: Sequence[Dataset], normalize_logits: bool = False) -> Evaluator:
        """Return an evaluator of the same model on other data sets, with the same settings.

        The stages and needs of the model are reused.

        Args:
            datasets: As for :class:`Evaluator`.
            normalize_logits: As for :class:`Evaluator`.

        Raises:
            TypeError, ValueError, MemoryError, RuntimeError: As :class:`Evaluator` does.
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
        """Return an evaluator of the same model on other feeds, which must fit the model.

        Args:
            feeds: The images.
            executor: The executor; None: that of this evaluator.
        """
        other = copy(self)
        other.feeds = list(feeds)
        other.executor = executor or self.executor
        return other

    # --- what a change leaves as it was ---------------------------------------------------------

    def scores(self) -> dict[str, Scores]:
        """Score the model with its present weights on all data sets.

        Runs in eval mode without gradients, and restores the training flag of every module. Results are
        copied to the CPU at the end; nothing waits for the device before.

        Returns:
            Data set name -> per-image losses and hits.
        """
        return self.walk().scores()

    def walk(self) -> Walk:
        """Return a walk that stands before the first stage."""
        self._check_device()
        return Walk(self.runtime, self.feeds, self.executor, self._room())

    def span(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        """Return the first and the last station whose stages read one of these tensors of the model.

        See :class:`Walk` for stations. (0, last station) for tensors of both towers, or if no stage is known
        to read one of them.
        """
        return self.runtime.span(tensors)

    def stage_of(self, tensors: Iterable[Tensor]) -> int:
        """Return the first station whose stage reads one of these tensors of the model."""
        return self.span(tensors)[0]

    # --- parts of the data ----------------------------------------------------------------------

    def parts(self, size: int | None, name: str) -> list[Evaluator]:
        """Return one evaluator for every ``size`` images of a data set, in order; None: one for all of them.

        They share the model and the images' memory. The last one may be smaller.
        """
        (feed,) = (feed for feed in self.feeds if feed.name == name)
        return [self.of([part]) for part in feed.parts(size or len(feed))]

    def among(self, names: Iterable[str]) -> Evaluator:
        """Return an evaluator of the data sets with these names, in this order; it shares their images."""
        feeds = {feed.name: feed for feed in self.feeds}
        return self.of([feeds[name] for name in names])

    def noting(self) -> Evaluator:
        """Return this evaluator, whose :meth:`scores` also have the entropies of predictions."""
        return self.of([feed.noting() for feed in self.feeds])

    def pieces(self, each: int = 0) -> list[Evaluator]:
        """Return evaluators of consecutive images, such that the activations that a walk holds fit in memory.

        Usually this one only. A layer-wise study walks through one piece after the other.

        Args:
            each: Bytes of one image that are held besides, in memory of their own.
        """
        room = self._room(each)
        if total(self.feeds) <= room:
            return [self]
        return [self.of([part]) for feed in self.feeds for part in feed.parts(room)]

    def holds(self, images: int, each: int = 0) -> bool:
        """Whether activations of so many images, and ``each`` bytes besides, may be held between stages."""
        return images <= self._room(each)

    def _room(self, each: int = 0) -> int:
        """Return how many images may be held between stages."""
        return self.runtime.budget.held(max(self.boundary, each))

    def recorded(self, weights: Sequence[Flipped], first: int, last: int) -> int:
        """Return the bytes of one image that :meth:`.Walk.record` holds.

        Args:
            weights: As there.
            first: The station of the walk.
            last: As there.

        Raises:
            NoRule: As there.
        """
        begin, end = self.runtime.image_stages(first, last)
        flow = Flow(self.stages.image, self.feeds[0], begin)
        return self.executor.recorded(flow, weights, end)

    # --- derivatives ----------------------------------------------------------------------------

    def gradient(self, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Compute the mean loss over all images and its gradient.

        Training flags, ``.grad`` and ``requires_grad`` are restored. Takes the memory of one more copy of the
        weights.

        Args:
            weights: Weights of the model.

        Returns:
            The mean loss, and for each weight its gradient in float32; zero where a weight cannot change the
                loss.
        """
        self._check_device()
        return self.executor.gradient(self.feeds, weights)

    def curvature(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """Compute v_i . (H v)_i for each weight i, with the Hessian H of the mean loss over all images.

        H couples all ``weights``: for random signs v, the expectation of entry i is the trace of block i of
        H.

        Args:
            weights: Weights of the model.
            directions: v, with the shapes of the weights.

        Returns:
            float64 [number of weights], on the device.
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
    """Return data sets as inputs of the model, on its device if they fit, and the model in stages."""
    _check_datasets(datasets)
    resident = budget.keep(sum(data.images.nbytes for data in datasets))
    dtype = formats.PRECISIONS[precision]
    try:
        feeds = [Images(data, device, dtype, resident, normalize_logits) for data in datasets]
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
        raise ValueError("Evaluator: expected at least one data set, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"Evaluator: expected data sets with different names, got {', '.join(names)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
