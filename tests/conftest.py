"""What must be chosen before anything is imported.

Without a GPU, Triton's kernels run in its interpreter. Decoded images are not kept in the user's own cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_CACHE = tempfile.TemporaryDirectory()
os.environ["RFT_CACHE"] = _CACHE.name


def pytest_configure(config: pytest.Config) -> None:
    """Files in their order, where pytest-xdist deals them out: it would take those of the fewest tests last,
    which are those that take longest, and one process would wait for the other."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Batches one after the other, for tests that count them in order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
