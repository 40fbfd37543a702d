"""A data set ready for scoring: decoded images, their labels, and the rows of the head to score among."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rft_fast.common.words import many, some


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images and their labels.

    Args:
        name: name of the data set.
        images: uint8 [n, 3, h, w] on the CPU, n at least 1.
        labels: int64 [n] on the CPU, each a row of the head.
        mean: per channel; the model sees ``(images / 255 - mean) / std``.
        std: per channel, above 0.
        classes: int64 [k], distinct rows of the head to score among; None: all. Labels are rows of the whole
            head and must be among ``classes``.
        ood: whether the data set is out of distribution for the fine-tuned models.
        class_names: names of the scored classes, in the order of ``classes`` (of the rows, if that is None);
            empty if unknown, or if a class has several rows.
        skipped: number of images that could not be read and are missing here.
        groups: int64 [k], for each of ``classes`` the row that it counts as, if several rows of the head are
            right for a class; None: each row counts as itself. Labels are such rows. An image is correct if
            the row of its largest logit counts as its label; its loss is -log of the summed probability of
            the rows that do.

    Raises:
        TypeError: a field has a wrong type.
        ValueError: a field has a wrong shape, dtype or value.
    """

    name: str
    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Tensor | None = None
    ood: bool = True
    class_names: tuple[str, ...] = ()
    skipped: int = 0
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        where = f"Dataset {self.name!r}"
        _tensor(self.images, torch.uint8, 4, f"{where}: images")
        _tensor(self.labels, torch.int64, 1, f"{where}: labels")
        count, channels = self.images.shape[:2]
        if 0 in self.images.shape:
            raise ValueError(f"{where}: there are no images: the shape is {tuple(self.images.shape)}")
        if channels != 3:
            raise ValueError(f"{where}: images must be [n, 3, h, w], got {tuple(self.images.shape)}")
        if len(self.labels) != count:
            raise ValueError(f"{where}: {many(count, 'image')} but {many(len(self.labels), 'label')}")
        if self.labels.min() < 0:
            raise ValueError(f"{where}: labels must not be negative, got {int(self.labels.min())}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"{where}: expected 3 means and 3 positive stds, got {self.mean}, {self.std}")
        if isinstance(self.skipped, bool) or not isinstance(self.skipped, int) or self.skipped < 0:
            raise ValueError(f"{where}: skipped must be a number of images, got {self.skipped!r}")
        if self.classes is not None:
            _tensor(self.classes, torch.int64, 1, f"{where}: classes")
            classes = self.classes.tolist()
            if len(set(classes)) != len(classes) or min(classes, default=0) < 0:
                raise ValueError(f"{where}: classes must be distinct and not negative")
            if unknown := sorted(set(self.labels.tolist()) - set(classes)):
                raise ValueError(f"{where}: labels {some(unknown)} are not among its classes")
        if self.groups is not None:
            self._check_groups(where)

    def _check_groups(self, where: str) -> None:
        if self.classes is None:
            raise ValueError(f"{where}: groups need classes, and one group for each class")
        _tensor(self.groups, torch.int64, 1, f"{where}: groups")
        groups = [] if self.groups is None else self.groups.tolist()
        if len(groups) != len(self.classes):
            raise ValueError(f"{where}: {len(self.classes)} classes but {len(groups)} groups")
        counts_as = dict(zip(self.classes.tolist(), groups, strict=True))
        if wrong := sorted({row for row in groups if counts_as.get(row) != row}):
            raise ValueError(f"{where}: groups {some(wrong)} must be classes that are their own group")
        if unknown := sorted(set(self.labels.tolist()) - set(groups)):
            raise ValueError(f"{where}: labels {some(unknown)} are not among its groups")


def subset(dataset: Dataset, samples: int, seed: int = 0) -> Dataset:
    """Draw a random subset of a data set: of a whole data set, the one that ``load`` would have drawn.

    All of its images are readable; ``skipped`` remains the number of images that the data set lacks.

    Raises:
        ValueError: ``samples`` is below 1 or exceeds the number of images.
    """
    chosen = choose(len(dataset.labels), samples, seed, f"datasets: {dataset.name!r}")
    return replace(dataset, images=dataset.images[chosen], labels=dataset.labels[chosen])


def choose(count: int, samples: int | None, seed: int, where: str) -> Tensor:
    """Draw positions from ``range(count)`` without replacement: int64 [samples], ascending; None: all."""
    if samples is None:
        return torch.arange(count)
    if samples < 1:
        raise ValueError(f"{where}: samples must be at least 1, got {samples}")
    if samples > count:
        raise ValueError(
            f"{where}: {samples} samples requested, but it has only {count} images; request at "
            f"most {count} of every data set, or all (leave samples out)"
        )
    # RandomState's stream is frozen, so a seed selects the same images everywhere.
    return torch.from_numpy(np.sort(np.random.RandomState(seed).permutation(count)[:samples]))


def _tensor(value: object, dtype: torch.dtype, ndim: int, where: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype or value.ndim != ndim or value.device.type != "cpu":
        raise ValueError(
            f"{where} must be {dtype} with {ndim} dimensions on the CPU, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )
