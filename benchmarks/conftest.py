"""What every benchmark row shares: the machine, the versions, and the copy bandwidth of this run."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from rft_fast import env
from rft_fast.kernels import native


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """GB/s of out.copy_(source) on 64 M float32, bytes read plus bytes written, median of 25."""
    source, out = torch.randn(64 * 2**20), torch.empty(64 * 2**20)
    times = []
    for _ in range(26):
        start = time.perf_counter()
        out.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * 4 * source.numel() / statistics.median(times[1:]) / 1e9


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["versions"] = env.versions()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = (native.isas() or ["none"])[-1]
