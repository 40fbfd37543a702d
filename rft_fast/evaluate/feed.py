"""Samples as a model takes them: images (or prompts) on the device where they fit, else streamed there."""

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


class Images:
    """A data set for a model on ``device``, that takes images of this dtype.

    resident: whether the images are moved to the device. If not, each batch goes there as it is needed,
    from pinned memory and one batch ahead of the computation.
    normalize: whether logits are normalised before the loss, see :class:`rft_fast.evaluate.Evaluator`.
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
        self.device, self.dtype = device, dtype
        self.images = dataset.images.to(device) if resident else dataset.images
        self.labels = dataset.labels.to(device)
        self.mean = torch.tensor(dataset.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(-1, 1, 1)
        self.white = torch.tensor(255.0, device=device)  # by a number, CUDA multiplies with its reciprocal
        self.classes = None if dataset.classes is None else dataset.classes.to(device)
        # The label's place among the scored logits.
        self.targets = self.labels
        if self.classes is not None:
            ordered, order = self.classes.sort()
            self.targets = order[torch.searchsorted(ordered, self.labels)]
        self.groups = None if dataset.groups is None else dataset.groups.to(device)
        self._stream = _Stream(device) if self.images.device != device else None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        return self.dataset.name

    def cut(self, part: slice) -> Images:
        """Some of the images, sharing their memory."""
        found = copy(self)
        found.dataset = replace(
            self.dataset, images=self.dataset.images[part], labels=self.dataset.labels[part]
        )
        found.images, found.labels = self.images[part], self.labels[part]
        found.targets = self.targets[part]
        if self._stream is not None:
            found._stream = _Stream(self.device)
        return found

    def parts(self, size: int) -> list[Images]:
        """Every ``size`` images in order, sharing their memory; the last part may be smaller."""
        return [self.cut(slice(at, min(len(self), at + size))) for at in range(0, len(self), size)]

    def ahead(self, batch: slice) -> None:
        """Begins to bring a batch to the device, if it is not there and there is room for it."""
        if self._stream is not None:
            try:
                self._stream.start(self.images, batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):  # it is fetched when it is needed, or halved then
                    raise

    def prepare(self, batch: slice) -> Tensor:
        """The model's input: [n, 3, h, w]."""
        pixels = self.images[batch] if self._stream is None else self._stream.take(self.images, batch)
        # The operations and their order are torchvision's, in float32, so the model sees the same bits.
        return pixels.float().div_(self.white).sub_(self.mean).div_(self.std).to(self.dtype)

    def judge(self, logits: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
        """Losses and correctness of a batch, still on the device."""
        logits = logits.float()
        if self.classes is not None:
            logits = logits.index_select(1, self.classes)
        best = logits.argmax(1)
        lost = logits.gather(1, best[:, None])[:, 0].isnan()  # argmax takes NaN for the largest
        if self.normalize:
            logits = logits - logits.mean(1, keepdim=True)
            logits = logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-10)
        if self.groups is None:
            targets = self.targets[batch]
            hits = best == targets
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        else:
            labels = self.labels[batch]
            hits = self.groups[best] == labels
            others = self.groups != labels[:, None]
            losses = -logits.log_softmax(1).masked_fill(others, -torch.inf).logsumexp(1)
        return losses, hits & ~lost

    def check(self, model: Callable[[Tensor], Any]) -> Tensor:
        """Refuses a set that the model cannot score. Returns the logits of one image."""
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
        return logits


class Prompts:
    """The tokens of a text chain, int64 [p, context] on the device."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def ahead(self, batch: slice) -> None:
        """They are there."""

    def prepare(self, batch: slice) -> Tensor:
        return self.tokens[batch]


class _Stream:
    """Batches on their way from the host's memory to a CUDA device, on a stream of their own."""

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
        # Of a stream on another device than the current one, torch would go back by choosing that one, and so
        # create a context there.
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            there = pinned.to(self._device, non_blocking=True)
            self._coming = (batch, there, self._side.record_event())

    def take(self, images: Tensor, batch: slice) -> Tensor:
        self.start(images, batch)
        if self._coming is None:
            raise RuntimeError("Evaluator: a batch got lost on its way to the device")
        (_, there, arrived), self._coming = self._coming, None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        there.record_stream(current)
        # Without this the host would run ahead of a busy device, with a batch in memory for every step.
        self._taken.append(current.record_event())
        if len(self._taken) > 2:
            self._taken.popleft().synchronize()
        return there


def total(feeds: Sequence[Images]) -> int:
    """Images of all sets."""
    return sum(map(len, feeds))
