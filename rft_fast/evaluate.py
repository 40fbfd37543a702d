"""Loss and accuracy of the live model, per sample, so that differences can be paired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rft_fast.datasets import Dataset

PRECISIONS = ("fp32",)


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
    batch_size: images per forward; the last batch of a set may be smaller.
    precision: "fp32", the only one so far. TF32 and other shortcuts are off while scoring, and as
        they were afterwards; these switches are global, so score from one thread at a time.

    One image of every set goes through the model here, so that what cannot be scored is refused
    now: ValueError for sizes that do not fit the model, labels or classes beyond its logits, and
    folders whose number of classes is another one.
    """

    datasets: list[Dataset]
    device: torch.device

    def __init__(
        self,
        model: nn.Module,
        datasets: Sequence[Dataset],
        batch_size: int = 512,
        precision: str = "fp32",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Evaluator: model must be an nn.Module, got {type(model).__name__}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Evaluator: batch_size must be an int of at least 1, got {batch_size!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"Evaluator: precision must be one of {PRECISIONS}, got {precision!r}")
        _check_datasets(datasets)
        self.model = model
        self.datasets = list(datasets)
        self.batch_size = batch_size
        self.precision = precision
        self.device = _device(model)
        self._sets = [_Resident(dataset, self.device) for dataset in self.datasets]
        with self._scoring():
            for resident in self._sets:
                resident.check(model)

    def scores(self) -> dict[str, Scores]:
        """Data set name -> scores of the model as it is now.

        Runs in eval mode without gradients and leaves every module's training flag as it was. The
        results come to the CPU at the end; nothing waits for the device before that.
        """
        if (device := _device(self.model)) != self.device:
            raise ValueError(f"scores: the model moved from {self.device} to {device}; make a new Evaluator")
        # Made outside of inference mode, so that callers may use the results in any way.
        results = [resident.blank() for resident in self._sets]
        with self._scoring():
            for resident, (losses, correct) in zip(self._sets, results, strict=True):
                for start in range(0, len(losses), self.batch_size):
                    batch = slice(start, start + self.batch_size)
                    losses[batch], correct[batch] = resident.score(self.model, batch)
        return {
            dataset.name: Scores(losses.cpu(), correct.cpu())
            for dataset, (losses, correct) in zip(self.datasets, results, strict=True)
        }

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.inference_mode(), _exact_float32():
                yield
        finally:
            for module in training:
                module.training = True


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

    def forward(self, model: nn.Module, batch: slice) -> Tensor:
        # The operations and their order are torchvision's, so the model sees the same bits.
        images = self.images[batch].float().div_(255).sub_(self.mean).div_(self.std)
        logits: Tensor = model(images)
        return logits

    def score(self, model: nn.Module, batch: slice) -> tuple[Tensor, Tensor]:
        """Losses and correctness of a batch, still on the device."""
        logits = self.forward(model, batch).float()
        if self.classes is not None:
            logits = logits.index_select(1, self.classes)
        targets = self.targets[batch]
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        # argmax takes NaN for the largest; a sample without a loss is not a hit.
        return losses, (logits.argmax(1) == targets) & ~losses.isnan()

    def check(self, model: nn.Module) -> None:
        dataset = self.dataset
        where = f"Evaluator: data set {dataset.name!r}"
        try:
            logits = self.forward(model, slice(0, 1))
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
