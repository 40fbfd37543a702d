"""Weights that differ between images, signs by signs, and the operations that read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Signs = tuple[Tensor, ...]
# (input of the operation, base perturbation, signs of the image) -> shift of the operation's result.
Shift = Callable[[Tensor, Tensor, Signs], Tensor]


COPIES = 16
"""Base perturbations of a weight with a sign for every element: image n takes number n mod 16.

Such weights are small and their noise costs nothing, and images with the same base share its magnitudes.
"""


class NoRule(Exception):
    """Why weights cannot differ between images."""


@dataclass(frozen=True)
class Layout:
    """How the signs of an image cover a weight.

    Attributes:
        rows: Signs r along the first dimension; without columns, signs of all elements.
        columns: Signs s along the others, for D o (r s^T); see the rule of convolutions.
    """

    rows: int
    columns: int = 0

    @property
    def count(self) -> int:
        """Signs per image."""
        return self.rows + self.columns

    def split(self, signs: Tensor, base: Tensor, images: Tensor) -> Signs:
        """Signs [n, count] as the rules take them; of all elements, with the base perturbation of each image.

        Args:
            signs: [n, count].
            base: base perturbation; of all elements, ``COPIES`` of them.
            images: [n]: numbers of the images.
        """
        if not self.columns:
            return (signs.view(len(signs), *base.shape[1:]) * base[images % COPIES],)
        return signs[:, : self.rows], signs[:, self.rows :]


SHARED = Layout(0)
"""No signs: the images share the noise of a weight, as no rule is known for what reads it."""


@dataclass(eq=False)
class Flipped:
    """A perturbed weight.

    Attributes:
        live: The model's tensor.
        name: What messages call it.
        block: Philox block at which its noise starts.
        layout: Layout of its signs; None: not known yet.
    """

    live: Tensor
    name: str
    block: int
    layout: Layout | None = None

    @property
    def by_element(self) -> Layout:
        """A sign for every element."""
        return Layout(self.live.numel())


@dataclass(frozen=True)
class Site:
    """An operation that reads a perturbed weight, in a single image's run of a stage.

    Attributes:
        weight: Number of the weight among the perturbed ones.
        shift: See :data:`Shift`.
        shape: Shape of the shift.
        input: Input of the operation; None where the weight itself is shifted.
    """

    weight: int
    shift: Shift
    shape: torch.Size
    input: Tensor | None


class Conflict(Exception):
    """A weight that two operations read needs a sign for every element."""
