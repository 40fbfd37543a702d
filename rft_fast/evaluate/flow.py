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

    position: the number of that stage.
    copies: how often each sample of the source is held, one variant after the other.
    held: activations [copies * n, ...] before that stage. None: nothing is held, the samples are those of the
        source; or nothing is computed (:class:`rft_fast.run.cost.Counting`).
    """

    stages: tuple[Stage, ...]
    source: Images | Prompts
    position: int = 0
    copies: int = 1
    held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) * self.copies

    def restart(self) -> None:
        """Before the first stage again."""
        self.held, self.position = None, 0

    def inputs(self, batch: slice) -> Tensor:
        """What the chain begins with, of samples that may be of several copies."""
        parts = [self.source.prepare(part) for part in self.parts(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, batch: slice) -> list[slice]:
        """Which samples of the source a batch is: it may reach from one copy into the next."""
        n, at, parts = len(self.source), batch.start, []
        while at < batch.stop:
            stop = min(batch.stop, at - at % n + n)
            parts.append(slice(at % n, at % n + stop - at))
            at = stop
        return parts

    def ahead(self, batch: slice) -> None:
        """Begins to fetch a batch, if nothing is held of it."""
        if self.held is None:
            self.source.ahead(batch)

    def judge(self, logits: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
        """Losses and hits of a batch."""
        if not isinstance(self.source, Images):
            raise TypeError("Evaluator: prompts have no labels")
        parts = self.parts(batch)
        rows = torch.split(logits, [part.stop - part.start for part in parts])
        found = [self.source.judge(row, part) for row, part in zip(rows, parts, strict=True)]
        if len(found) == 1:
            return found[0]
        return torch.cat([losses for losses, _ in found]), torch.cat([hits for _, hits in found])
