"""Samples on their way through a chain of stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .feed import Images, Prompts
from .stages import Stage


@dataclass(eq=False)
class Flow:
    """Samples on their way through a chain of stages, held before one of them.

    Attributes:
        stages: The chain.
        source: The samples before the first stage.
        position: Number of the stage before which they are held.
        copies: Number of variants of each sample that are held, one variant after the other.
        held: Activations [copies * n, ...] before that stage. None: before the first stage; or nothing is
            computed (:class:`rft_fast.run.cost.Counting`).
    """

    stages: tuple[Stage, ...]
    source: Images | Prompts
    position: int = 0
    copies: int = 1
    held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) * self.copies

    def restart(self) -> None:
        """Go back to before the first stage."""
        self.held, self.position = None, 0

    @property
    def images(self) -> Images:
        """The source, if it is images.

        Raises:
            TypeError: They are prompts.
        """
        if not isinstance(self.source, Images):
            raise TypeError("Evaluator: prompts have neither labels nor numbers")
        return self.source

    def numbers(self, batch: slice) -> Tensor:
        """Numbers of a batch's images in their data set, of a flow of one copy."""
        return self.images.numbers(batch)

    def inputs(self, batch: slice) -> Tensor:
        """Return the inputs of the chain for a batch."""
        parts = [self.source.prepare(part) for part in self.parts(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, batch: slice) -> list[slice]:
        """Return the samples of the source in a batch, which may extend from one copy into the next."""
        n, at, parts = len(self.source), batch.start, []
        while at < batch.stop:
            stop = min(batch.stop, at - at % n + n)
            parts.append(slice(at % n, at % n + stop - at))
            at = stop
        return parts

    def ahead(self, batch: slice) -> None:
        """Start to fetch a batch, if no activations of it are held."""
        if self.held is None:
            self.source.ahead(batch)

    def judge(self, logits: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
        """Return losses and predictions of a batch of logits, as :meth:`.Images.judge` does."""
        parts = self.parts(batch)
        rows = torch.split(logits, [part.stop - part.start for part in parts])
        found = [self.images.judge(row, part) for row, part in zip(rows, parts, strict=True)]
        if len(found) == 1:
            return found[0]
        return torch.cat([losses for losses, _ in found]), torch.cat([best for _, best in found])
