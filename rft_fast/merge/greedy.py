"""Greedy soups, and what methods need of data."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor


class Measures(Protocol):
    """Measurements of models on held-out data, for ``greedy-soup`` and ``fisher``."""

    @property
    def about(self) -> Mapping[str, object]:
        """What the models are measured on, as JSON has it, for the provenance."""

    def accuracy(self, files: Sequence[pathlib.Path]) -> float:
        """Return the accuracy of the mean of some models."""

    def fisher(self, file: pathlib.Path) -> Mapping[str, Tensor]:
        """Return the diagonal Fisher information of a model: canonical name -> float32, of its shape."""

    def statistics(
        self, file: pathlib.Path, differences: Collection[pathlib.Path] = ()
    ) -> Mapping[str, Tensor]:
        """Return the statistics of BatchNorm of a model on the data: canonical name -> tensor.

        Args:
            file: the model.
            differences: which files of the merge are differences, no models.
        """


_Model = TypeVar("_Model")


@dataclass(frozen=True)
class Greedy(Generic[_Model]):
    """A greedy soup.

    Attributes:
        alone: accuracy of each model, in the order in which they were tried: the best first.
        kept: the models of the soup, in that order.
        accuracy: of the soup.
    """

    alone: Mapping[_Model, float]
    kept: tuple[_Model, ...]
    accuracy: float


def greedy_soup(files: Sequence[_Model], accuracy: Callable[[Sequence[_Model]], float]) -> Greedy[_Model]:
    """Choose models one by one (Wortsman et al. 2022, Recipe 1).

    In the order of their accuracies, each model is kept if the mean of it and those kept before is at least
    as accurate as the mean without it.

    Args:
        files: the models, as files or names; of equally accurate ones the first comes first.
        accuracy: some of the files -> accuracy of the mean of these models, on held-out data.
    """
    alone = {file: accuracy([file]) for file in files}
    order = sorted(files, key=lambda file: -alone[file])
    kept, best = [order[0]], alone[order[0]]
    for file in order[1:]:
        if (found := accuracy([*kept, file])) >= best:
            kept, best = [*kept, file], found
    return Greedy({file: alone[file] for file in order}, tuple(kept), best)
