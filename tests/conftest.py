"""What must be chosen before anything is imported, and the tiers of tests (CONTRIBUTING.md, Tests).

Without a GPU, Triton's kernels run in its interpreter. Decoded images are not kept in the user's own cache.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch
from support import tiers, wording

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_CACHE = tempfile.TemporaryDirectory()
os.environ["RFT_CACHE"] = _CACHE.name


# A shell that starts pytest in the background lets it, and the processes that tests start, ignore signals.
for _signal, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accept-wording", action="store_true", help="write tests/wording.txt of what tests get"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(tiers.Guard(), "tiers")
    wording.install(config)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """slow(only=PATTERN) and slow(but=PATTERN) hold for parameters in whose ids it is, or is not, found."""
    for item in items:
        name = item.name.partition("[")[2].removesuffix("]")
        item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "slow" or _holds(mark, name)]


def _holds(mark: pytest.Mark, name: str) -> bool:
    only, but = mark.kwargs.get("only", ""), mark.kwargs.get("but")
    return re.search(only, name) is not None and (but is None or re.search(but, name) is None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Batches one after the other, for tests that count them in order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
