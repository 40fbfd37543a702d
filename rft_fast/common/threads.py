"""Number of CPU threads per computation, so that results do not depend on the number of cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Batches computed concurrently, whatever the number of cores, which must not change results.
SIDE_BY_SIDE = 8


def threads_of_a_batch() -> int:
    """Return the number of threads of each batch that runs beside others; 1 on fewer than 16 cores."""
    return max(1, torch.get_num_threads() // SIDE_BY_SIDE)


@contextmanager
def few_threads() -> Iterator[None]:
    """Use as many threads as one batch has: for sums whose last bits depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_of_a_batch())
    try:
        yield
    finally:
        torch.set_num_threads(threads)
