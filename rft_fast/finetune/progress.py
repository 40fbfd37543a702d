"""Progress within a training: a bar on a terminal, and a line from time to time elsewhere."""

from __future__ import annotations

import time

from tqdm import tqdm

from rft_fast.common.words import duration

EVERY = 30.0  # seconds between two lines
FEW = 5  # steps before the first one


class Progress:
    """Shows how far a training is; a context manager.

    Args:
        label: What is trained.
        steps: Optimizer steps in all.
        first: Steps that were taken before.
        per_epoch: Optimizer steps of an epoch.
    """

    def __init__(self, label: str, steps: int, first: int, per_epoch: int) -> None:
        self._label, self._steps, self._step, self._per_epoch = label, steps, first, per_epoch
        self._bar = tqdm(total=steps, initial=first, desc=label, disable=None, leave=False)
        self._first, self._start = first, time.monotonic()
        self._said, self._images = self._start, 0  # time of the last line, and images since

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, loss: float, images: int) -> None:
        """Count a step on so many images, with this loss."""
        self._step += 1
        self._images += images
        self._bar.update()
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        now = time.monotonic()
        done = self._step - self._first
        left = (now - self._start) / done * (self._steps - self._step)
        due = now - self._said >= EVERY or (done == FEW and left >= EVERY)
        # The end of an epoch has a line of its own.
        if not self._bar.disable or not due or self._step % self._per_epoch == 0:
            return
        rate = self._images / max(now - self._said, 1e-9)
        self._said, self._images = now, 0
        epochs, epoch = self._steps // self._per_epoch, self._step // self._per_epoch + 1
        tqdm.write(
            f"{self._label}: epoch {epoch} of {epochs}, step {self._step} of {self._steps}, loss {loss:.4f}, "
            f"{rate:.3g} images/s, {duration(left)} left"
        )
