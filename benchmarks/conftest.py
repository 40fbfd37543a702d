"""Shared by all benchmarks: the device, and the description of the machine."""

from __future__ import annotations

import machine
import pytest
import torch

from rft_fast import env


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="what to measure on: cpu, cuda, cuda:1, ...")


def pytest_configure(config):
    device = torch.device(config.getoption("device"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose stream the clock's events are on


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark's own
def pytest_sessionfinish(session):
    """Drop a row that was interrupted: with a row of no rounds, pytest-benchmark writes no file at all."""
    measured = getattr(session.config, "_benchmarksession", None)
    if measured is not None:
        measured.benchmarks = [row for row in measured.benchmarks if row.stats.data]
    return (yield)


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    return torch.device(pytestconfig.getoption("device"))


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device(config.getoption("device"))
    processor = machine_info["cpu"].get("brand_raw", machine_info["machine"])
    machine_info.update(versions=env.versions(), device=machine.name(device, processor))
    if device.type == "cuda":
        machine_info["cuda"] = torch.version.cuda
