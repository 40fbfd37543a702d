"""How many of a CPU's threads a computation has: what comes out must not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Batches that keep a CPU busy, on however many cores: what is computed must not depend on their number.
SIDE_BY_SIDE = 8


def threads_of_a_batch() -> int:
    """Threads of a batch that others may run beside: the same for all, on CPUs of fewer than 16 cores one."""
    return max(1, torch.get_num_threads() // SIDE_BY_SIDE)


@contextmanager
def few_threads() -> Iterator[None]:
    """As many threads as a batch has: for sums whose last bits must not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_of_a_batch())
    try:
        yield
    finally:
        torch.set_num_threads(threads)
