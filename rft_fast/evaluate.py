"""Loss and accuracy of the live model, per sample, so that differences can be paired."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rft_fast.classifier import ImageClassifier, Stage, stages
from rft_fast.datasets import Dataset

PRECISIONS = ("fp32",)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on one data set.

    losses: cross entropy per sample, float32 [n] on the CPU, in nats, not finite where the model's
    was not; such values are kept and carry into the means. correct: bool [n] on the CPU.
    """

    losses: Tensor
    correct: Tensor

    @property
    def samples(self) -> int:
        """The number of samples n."""
        return len(self.losses)

    @property
    def nonfinite(self) -> int:
        """How many losses are NaN or infinite."""
        return int((~self.losses.isfinite()).sum())

    @property
    def loss(self) -> float:
        """Mean loss."""
        return _mean(self.losses)[0]

    @property
    def loss_se(self) -> float:
        """Standard error of the mean loss; NaN for one sample."""
        return _mean(self.losses)[1]

    @property
    def accuracy(self) -> float:
        """Fraction of samples whose largest logit is their label's."""
        return _mean(self.correct)[0]

    @property
    def accuracy_se(self) -> float:
        """Standard error of the accuracy; NaN for one sample."""
        return _mean(self.correct)[1]

    def gain_over(self, base: Scores) -> tuple[float, float]:
        """Accuracy minus that of ``base`` on the same samples, and its paired standard error."""
        self._check_paired(base, "gain_over")
        return _mean(self.correct.double() - base.correct.double())

    def rise_over(self, base: Scores) -> tuple[float, float]:
        """Loss minus that of ``base`` on the same samples, and its paired standard error."""
        self._check_paired(base, "rise_over")
        return _mean(self.losses.double() - base.losses.double())

    def instability(self, first: Scores, last: Scores) -> tuple[tuple[float, float], tuple[float, float]]:
        """How much worse than the mean of a path's two ends, on the same samples (Def. 1).

        Returns (value, paired standard error) twice: in loss, L - (L(0) + L(1)) / 2, and in accuracy,
        (A(0) + A(1)) / 2 - A.
        """
        self._check_paired(first, "instability")
        self._check_paired(last, "instability")
        losses = self.losses.double() - (first.losses.double() + last.losses.double()) / 2
        misses = (first.correct.double() + last.correct.double()) / 2 - self.correct.double()
        return _mean(losses), _mean(misses)

    def _check_paired(self, base: Scores, operation: str) -> None:
        if self.samples != base.samples:
            raise ValueError(
                f"{operation}: a paired difference needs the same samples, "
                f"got {self.samples} and {base.samples} of them"
            )


class Evaluator:
    """Scores a live model on data sets that it keeps on the model's device as bytes.

    model: maps float32 images [n, 3, h, w] to logits [n, classes], all its weights float32 on one
        device; its weights may change between calls, as a :class:`rft_fast.Path` does.
    datasets: distinct names. Each takes n * 3 * h * w bytes on the device.
    batch_size: images per forward; the last batch of a set may be smaller. None: 512, but on the CPU
        128, whose activations stay in its caches, and 64 for sets of fewer than 512 images, so that
        there are batches for several cores.
    precision: "fp32", the only one so far. TF32 and other shortcuts are off while scoring, and as
        they were afterwards; these switches are global, so score from one thread at a time.
    normalize_logits: centre the logits of each image and divide them by their l2 norm (at least
        1e-10) before the loss, so that it does not change with the scale of the logits.

    One image of every set goes through the model here, so that what cannot be scored is refused
    now: ValueError for sizes that do not fit the model, labels or classes beyond its logits, and
    folders whose number of classes is another one.
    """

    datasets: list[Dataset]
    device: torch.device
    stages: list[Stage]

    def __init__(
        self,
        model: nn.Module,
        datasets: Sequence[Dataset],
        batch_size: int | None = None,
        precision: str = "fp32",
        normalize_logits: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Evaluator: model must be an nn.Module, got {type(model).__name__}")
        if batch_size is not None and not _is_count(batch_size):
            raise ValueError(f"Evaluator: batch_size must be an int of at least 1, got {batch_size!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"Evaluator: precision must be one of {PRECISIONS}, got {precision!r}")
        _check_datasets(datasets)
        self.model = model
        self.datasets = list(datasets)
        self.precision = precision
        self.normalize_logits = normalize_logits
        self.device = _device(model)
        self.batch_size = batch_size
        self.stages = stages(model)
        self._sets = [_Resident(dataset, self.device) for dataset in self.datasets]
        with self._scoring():
            if not all([resident.check(model, self.stages) for resident in self._sets]):
                warnings.warn(
                    f"Evaluator: the stages of this {type(model).__name__} do not compute what its forward "
                    "pass computes, so every score takes a whole forward pass; the numbers are the same",
                    stacklevel=2,
                )
                self.stages = [Stage(model)]

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

    def stage_of(self, tensors: Iterable[Tensor]) -> int:
        """The first of ``self.stages`` that reads one of these tensors of the model."""
        found = [self._owner.get(id(tensor), 0) for tensor in tensors]
        return min(found, default=0)

    @cached_property
    def _owner(self) -> dict[int, int]:
        last_first = reversed(list(enumerate(self.stages)))
        return {id(tensor): index for index, stage in last_first for tensor in stage.tensors}

    def parts(self, size: int | None, name: str) -> list[Evaluator]:
        """Evaluators of one data set: for every ``size`` images in order (None: for all at once).

        They share this one's model and memory; the last one may be smaller.
        """
        (resident,) = (resident for resident in self._sets if resident.dataset.name == name)
        n = len(resident.labels)
        found = []
        for start in range(0, n, size or n):
            part = copy(self)
            part._sets = [resident.cut(slice(start, start + (size or n)))]
            part.datasets = [part._sets[0].dataset]
            found.append(part)
        return found

    def gradient(self, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Mean loss over all images, and its gradient at each of these weights of the model.

        Gradients are zero where a weight cannot change the loss. Training flags, ``.grad`` and
        ``requires_grad`` stay as they were; one more copy of the weights is held.
        """
        total, sums = 0.0, [torch.zeros_like(weight) for weight in weights]

        def slope(loss: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            return loss.detach(), torch.autograd.grad(
                loss, weights, allow_unused=True, materialize_grads=True
            )

        def add(found: tuple[Tensor, Sequence[Tensor]], share: float) -> None:
            nonlocal total
            total += share * found[0].item()
            for s, g in zip(sums, found[1], strict=True):
                s.add_(g, alpha=share)

        self._differentiate(weights, slope, add)
        return total, sums

    def curvature(self, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """For each weight i, v_i . (H v)_i with the Hessian H of the mean loss over all images.

        directions: v, shaped as the weights. Float64 [number of weights], on the device. H couples all
        ``weights``: for random signs v, the expectation of entry i is the trace of H's block i.
        """
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)

        def product(loss: Tensor) -> Tensor:
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            grads = torch.autograd.grad(loss, weights, create_graph=True, **options)
            products = torch.autograd.grad(grads, weights, directions, **options)
            pairs = zip(directions, products, strict=True)
            return torch.stack([(v.double() * h.double()).sum() for v, h in pairs])

        # Only the plain attention kernel can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            self._differentiate(weights, product, lambda found, share: total.add_(found, alpha=share))
        return total

    def _differentiate(
        self,
        weights: Sequence[Tensor],
        of: Callable[[Tensor], T],
        take: Callable[[T, float], object],
    ) -> None:
        """Calls ``of`` with each batch's mean loss; ``take`` with the result and its share of all images."""
        self._check_device()
        images = sum(len(resident.labels) for resident in self._sets)
        before = [weight.requires_grad for weight in weights]

        def work(_: int, resident: _Resident, batch: slice) -> tuple[T, float]:
            logits = self.model(resident.prepare(batch))
            losses, _correct = resident.judge(logits, batch, self.normalize_logits)
            return of(losses.mean()), len(losses) / images

        with _evaluating(self.model), torch.enable_grad(), _exact_float32():
            try:
                for weight in weights:
                    weight.requires_grad_(True)
                # Side by side at most four, because each holds gradients of its own.
                self._map(work, lambda _, found: take(*found), 4)
            finally:
                for weight, flag in zip(weights, before, strict=True):
                    weight.requires_grad_(flag)

    def _map(
        self,
        work: Callable[[int, _Resident, slice], T],
        take: Callable[[int, T], object],
        most: int = sys.maxsize,
    ) -> None:
        """Calls work(place, set, batch) for every batch of every set, and take(place, result) in order.

        On the CPU with up to ``most`` batches side by side, each on its share of torch's threads: small
        operations gain little from several threads, and lose all of it when other programs are running.
        Batches do not depend on the number of threads. Only for our own model, whose forward pass is
        known to keep no state.
        """
        batches = [(r, batch) for r in self._sets for batch in r.batches(self._size(r))]
        threads = torch.get_num_threads()
        workers = min(threads, len(batches), most)
        if workers == 1 or self.device.type != "cpu" or not isinstance(self.model, ImageClassifier):
            for place, batch in enumerate(batches):
                take(place, work(place, *batch))
            return
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def alone(place: int) -> T:
            torch.set_num_threads(threads // workers)  # of this thread
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return work(place, *batches[place])

        torch.set_num_threads(threads // workers)  # of libraries that count for the whole process
        try:
            for place, result in enumerate(_pool(workers).map(alone, range(len(batches)))):
                take(place, result)
        finally:
            torch.set_num_threads(threads)

    def _size(self, resident: _Resident) -> int:
        """Images per forward. It depends on the set alone, so that machines agree on the batches."""
        if self.batch_size is not None:
            return self.batch_size
        if self.device.type != "cpu":
            return 512
        return 128 if len(resident.labels) >= 512 else 64

    def _check_device(self) -> None:
        if (device := _device(self.model)) != self.device:
            raise ValueError(f"scores: the model moved from {self.device} to {device}; make a new Evaluator")

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        with _evaluating(self.model), torch.inference_mode(), _exact_float32():
            yield


class Walk:
    """Data sets on their way through a model's stages: what a change late in the model need not redo.

    Made by :meth:`Evaluator.walk`. Scores are the same, bit for bit, from whatever stage they start, as
    long as the weights of the stages that are behind have not changed since. Held are the activations
    before the present stage, for all images of the evaluator.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.stage = 0
        self._evaluator = evaluator
        self._held: dict[int, Tensor] = {}  # of all batches of all sets; none before the first stage

    def advance(self, stage: int) -> None:
        """On to before this stage, with the weights as they are now.

        Raises ValueError for a stage that is behind: a walk does not turn back.
        """
        if not self.stage <= stage < len(self._evaluator.stages):
            raise ValueError(
                f"Walk.advance: expected a stage from {self.stage} to {len(self._evaluator.stages) - 1}, "
                f"got {stage}"
            )
        if stage == self.stage:
            return
        evaluator = self._evaluator
        with evaluator._scoring():
            # In place of what they came from, so that only one boundary is held at a time.
            evaluator._map(lambda i, data, batch: self._run(i, data, batch, stage), self._held.__setitem__)
        self.stage = stage

    def scores(self) -> dict[str, Scores]:
        """As :meth:`Evaluator.scores`, from the present stage on."""
        evaluator = self._evaluator
        # Made outside of inference mode, so that callers may use the results in any way.
        results = {resident.dataset.name: resident.blank() for resident in evaluator._sets}

        def judge(place: int, resident: _Resident, batch: slice) -> None:
            logits = self._run(place, resident, batch, len(evaluator.stages))
            losses, correct = results[resident.dataset.name]
            losses[batch], correct[batch] = resident.judge(logits, batch, evaluator.normalize_logits)

        with evaluator._scoring():
            evaluator._map(judge, lambda place, result: None)
        return {name: Scores(losses.cpu(), correct.cpu()) for name, (losses, correct) in results.items()}

    def _run(self, place: int, resident: _Resident, batch: slice, last: int) -> Tensor:
        """The activations before stage ``last`` of the batch in this place among all batches."""
        # A copy, because some modules work in place: nn.ReLU(inplace=True).
        x = self._held[place].clone() if self.stage else resident.prepare(batch)
        for stage in self._evaluator.stages[self.stage : last]:
            x = stage.run(x)
        return x


class _Resident:
    """A data set on the device."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.dataset = dataset
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        self.mean = torch.tensor(dataset.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(-1, 1, 1)
        self.classes = None if dataset.classes is None else dataset.classes.to(device)
        # The label's place among the scored logits.
        self.targets = self.labels
        if self.classes is not None:
            ordered, order = self.classes.sort()
            self.targets = order[torch.searchsorted(ordered, self.labels)]

    def blank(self) -> tuple[Tensor, Tensor]:
        """Room for the losses and the correctness of all samples, on the device."""
        losses = torch.empty(len(self.labels), device=self.images.device)
        return losses, torch.empty_like(losses, dtype=torch.bool)

    def cut(self, part: slice) -> _Resident:
        """Some of its images, sharing its memory."""
        found = copy(self)
        found.dataset = replace(
            self.dataset, images=self.dataset.images[part], labels=self.dataset.labels[part]
        )
        found.images, found.labels = self.images[part], self.labels[part]
        found.targets = self.targets[part]
        return found

    def batches(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, len(self.labels), size)]

    def prepare(self, batch: slice) -> Tensor:
        """The model's input: float32 [n, 3, h, w]."""
        # The operations and their order are torchvision's, so the model sees the same bits.
        return self.images[batch].float().div_(255).sub_(self.mean).div_(self.std)

    def judge(self, logits: Tensor, batch: slice, normalize: bool) -> tuple[Tensor, Tensor]:
        """Losses and correctness of a batch, still on the device."""
        logits = logits.float()
        if self.classes is not None:
            logits = logits.index_select(1, self.classes)
        targets = self.targets[batch]
        # argmax takes NaN for the largest; a sample without a loss is not a hit.
        hits = logits.argmax(1) == targets
        if normalize:
            logits = logits - logits.mean(1, keepdim=True)
            logits = logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-10)
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        return losses, hits & ~losses.isnan()

    def check(self, model: nn.Module, stages: Sequence[Stage]) -> bool:
        """Refuses a set that the model cannot score. Returns whether the stages compute its logits."""
        dataset = self.dataset
        where = f"Evaluator: data set {dataset.name!r}"
        try:
            logits = model(self.prepare(slice(0, 1)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            size = "x".join(map(str, dataset.images.shape[1:]))
            raise ValueError(f"{where}: the model cannot take its {size} images: {error}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{where}: the model must return logits [n, classes], for one image it gave {got}"
            )
        classes = logits.shape[1]
        rows = dataset.labels if dataset.classes is None else dataset.classes
        if (highest := int(rows.max())) >= classes:
            raise ValueError(
                f"{where}: class {highest} is beyond the head, which has {classes}; "
                "is it the head for this data set?"
            )
        folders = len(dataset.class_names)
        if dataset.classes is None and folders not in (0, classes):
            raise ValueError(
                f"{where}: {folders} class folders but {classes} classes in the head, so labels "
                "would mean other classes; tell by Dataset.classes which rows of the head they are"
            )
        if len(stages) == 1:
            return True
        x = self.prepare(slice(0, 1))
        try:
            for stage in stages:
                x = stage.run(x)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # stages are made of a model's private parts, which may change
            return False
        return torch.equal(x, logits) or bool(logits.isnan().any())


def _check_datasets(datasets: Sequence[Dataset]) -> None:
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"Evaluator: datasets must hold Datasets, got {type(dataset).__name__}")
    names = [dataset.name for dataset in datasets]
    if not names:
        raise ValueError("Evaluator: no data set to score")
    if len(set(names)) != len(names):
        raise ValueError(f"Evaluator: data sets need distinct names, got {', '.join(names)}")


def _device(model: nn.Module) -> torch.device:
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    if not tensors:
        raise ValueError("Evaluator: the model has no weights to score")
    if len(devices := sorted({str(tensor.device) for tensor in tensors})) > 1:
        raise ValueError(f"Evaluator: the model must be on one device, it is on {devices}")
    if dtypes := sorted({str(t.dtype) for t in tensors if t.dtype != torch.float32}):
        raise ValueError(
            f"Evaluator: precision 'fp32' needs a float32 model, this one has {dtypes}; "
            "call .float() on it (the ends of its path may stay as they are)"
        )
    return tensors[0].device


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "rft_fast")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Full float32: no TF32 on CUDA (the default of cuDNN's convolutions), no bf16 on the CPU."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and newer: one switch per backend and operation
        cuda, cpu = (backends.cuda.matmul, backends.cudnn.conv), backends.mkldnn
        switches = (*cuda, cpu.matmul, cpu.conv)
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
    else:
        matmul, convolution = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = convolution


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, in float64."""
    values = values.double()
    spread = values.std(correction=1).item() if len(values) > 1 else math.nan
    return values.mean().item(), spread / math.sqrt(len(values))
