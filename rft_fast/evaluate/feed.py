"""Inputs of a model: images and prompts, on its device if they fit, else copied there batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets import Dataset
from .batches import is_out_of_memory
from .scores import Scores


class Images:
    """A data set as input of a model.

    Args:
        dataset: The data set.
        device: Device of the model.
        dtype: Dtype of the model's input.
        resident: Whether all images move to the device. If not, each batch is copied when it is needed, from
            pinned memory, one batch ahead of the computation.
        normalize: Whether logits are normalised before the loss, see :class:`rft_fast.evaluate.Evaluator`.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
        normalize: bool = False,
    ) -> None:
        self.dataset, self.normalize = dataset, normalize
        self.first = 0  # number of the first image in the whole data set
        self.device, self.dtype = device, dtype
        self.images = dataset.images.to(device) if resident else dataset.images
        self.labels = dataset.labels.to(device)
        self.mean = torch.tensor(dataset.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(-1, 1, 1)
        self.white = torch.tensor(
            255.0, device=device
        )  # CUDA divides by a number as a product with its reciprocal
        self.classes = None if dataset.classes is None else dataset.classes.to(device)
        # Position of each label among the scored logits.
        self.targets = self.labels
        if self.classes is not None:
            ordered, order = self.classes.sort()
            self.targets = order[torch.searchsorted(ordered, self.labels)]
        self.groups = None if dataset.groups is None else dataset.groups.to(device)
        # Start of a batch -> entropies of its predictions, if they are noted.
        self.entropies: dict[int, Tensor] | None = None
        self.among: int | None = None  # number of classes that images are scored among, known once checked
        self._stream = _Stream(device) if self.images.device != device else None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        return self.dataset.name

    def cut(self, part: slice) -> Images:
        """Return some of the images, with shared memory."""
        found = copy(self)
        found.dataset = replace(
            self.dataset, images=self.dataset.images[part], labels=self.dataset.labels[part]
        )
        found.first = self.first + part.start
        found.images, found.labels = self.images[part], self.labels[part]
        found.targets = self.targets[part]
        found.entropies = None if self.entropies is None else {}
        if self._stream is not None:
            found._stream = _Stream(self.device)
        return found

    def noting(self) -> Images:
        """Return the same images, whose scores also have the entropy of the predictions."""
        found = copy(self)
        found.entropies = {}
        return found

    def parts(self, size: int) -> list[Images]:
        """Return every ``size`` images in order, with shared memory; the last part may be smaller."""
        return [self.cut(slice(at, min(len(self), at + size))) for at in range(0, len(self), size)]

    def numbers(self, batch: slice) -> Tensor:
        """Numbers of a batch's images in the whole data set: int64, on the device."""
        return torch.arange(self.first + batch.start, self.first + batch.stop, device=self.device)

    def ahead(self, batch: slice) -> None:
        """Start to copy a batch to the device, if it is not there and fits."""
        if self._stream is not None:
            try:
                self._stream.start(self.images, batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):  # it is copied, or halved, when it is needed
                    raise

    def prepare(self, batch: slice) -> Tensor:
        """Return the model's input of a batch: [n, 3, h, w]."""
        pixels = self.images[batch] if self._stream is None else self._stream.take(self.images, batch)
        # The operations and their order are torchvision's, in float32, so the model sees the same bits.
        return pixels.float().div_(self.white).sub_(self.mean).div_(self.std).to(self.dtype)

    def judge(self, logits: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
        """Return losses, float32 [n], and predictions, int64 [n], of logits [n, classes], on the device.

        A prediction is right where it equals the label: see :attr:`rft_fast.evaluate.Scores.predictions`.
        """
        logits = logits.float()
        if self.classes is not None:
            logits = logits.index_select(1, self.classes)
        best = logits.argmax(1)
        lost = logits.gather(1, best[:, None])[:, 0].isnan()  # for argmax NaN is the largest
        if self.normalize:
            logits = logits - logits.mean(1, keepdim=True)
            logits = logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-10)
        if self.entropies is not None:
            self.entropies[batch.start] = torch.special.entr(logits.softmax(1)).sum(1)
        if self.groups is None:
            losses = nn.functional.cross_entropy(logits, self.targets[batch], reduction="none")
        else:
            others = self.groups != self.labels[batch, None]
            losses = -logits.log_softmax(1).masked_fill(others, -torch.inf).logsumexp(1)
        rows = self.classes if self.groups is None else self.groups
        return losses, (best if rows is None else rows[best]).masked_fill(lost, -1)

    def scores(self, losses: Tensor, predictions: Tensor) -> Scores:
        """Return scores of all images from losses, float32 [n], and predictions, int32 [n], on the CPU."""
        entropies = None
        if self.entropies:
            entropies = torch.cat([part for _, part in sorted(self.entropies.items())]).cpu()
        return Scores(losses, predictions == self.dataset.labels, predictions, entropies)

    def check(self, model: Callable[[Tensor], Any]) -> Tensor:
        """Check that a model can score this data set, by one image.

        Args:
            model: Maps images to logits.

        Returns:
            The logits of the image, [1, classes].

        Raises:
            ValueError: The images do not fit the model; it does not return logits; labels or classes exceed
                them; or the number of class folders differs.
        """
        dataset = self.dataset
        where = f"Evaluator: data set {dataset.name!r}"
        try:
            logits = model(self.prepare(slice(0, 1)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            size = "x".join(map(str, dataset.images.shape[1:]))
            raise ValueError(f"{where}: the model cannot take its {size} images: {error}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{where}: the model must return logits [n, classes]; for one image it returned {got}"
            )
        classes = logits.shape[1]
        rows = dataset.labels if dataset.classes is None else dataset.classes
        if (highest := int(rows.max())) >= classes:
            raise ValueError(
                f"{where}: its labels go up to {highest}, but the head has {classes} rows (0 to "
                f"{classes - 1}); is it the head for this data set?"
            )
        folders = len(dataset.class_names)
        if dataset.classes is None and folders not in (0, classes):
            raise ValueError(
                f"{where}: {folders} class folders but {classes} classes in the head, so labels would mean "
                "other classes; name the rows of the head that belong to the data set in Dataset.classes"
            )
        self.among = classes if dataset.classes is None else len(dataset.classes)
        if dataset.groups is not None:
            self.among = len(set(dataset.groups.tolist()))
        return logits


class Prompts:
    """Tokens of a text chain, int64 [p, context], on the device."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def ahead(self, batch: slice) -> None:
        """Nothing to do: they are on the device."""

    def prepare(self, batch: slice) -> Tensor:
        return self.tokens[batch]


class _Stream:
    """Copies batches from host memory to a CUDA device, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._coming: tuple[slice, Tensor, torch.cuda.Event] | None = None
        self._taken: deque[torch.cuda.Event] = deque()

    def start(self, images: Tensor, batch: slice) -> None:
        if self._coming is not None and self._coming[0] == batch:
            return
        # The pinned copy returns to torch's allocator, which keeps it until the transfer has ended.
        pinned = images[batch].pin_memory()
        # For a stream on another device than the current one, torch would restore the current one by
        # selecting it, which creates a context there.
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            there = pinned.to(self._device, non_blocking=True)
            self._coming = (batch, there, self._side.record_event())

    def take(self, images: Tensor, batch: slice) -> Tensor:
        self.start(images, batch)
        if self._coming is None:
            raise RuntimeError("Evaluator: a batch did not reach the device; please report this")
        (_, there, arrived), self._coming = self._coming, None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        there.record_stream(current)
        # Otherwise the host would run ahead of a busy device, with one batch in memory per step.
        self._taken.append(current.record_event())
        if len(self._taken) > 2:
            self._taken.popleft().synchronize()
        return there


def total(feeds: Sequence[Images]) -> int:
    """Return the number of images of all sets."""
    return sum(map(len, feeds))
