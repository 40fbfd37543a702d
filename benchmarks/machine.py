"""The machine that a benchmark runs on, in words."""

from __future__ import annotations

import pathlib
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

import torch

from rft_fast import env
from rft_fast.kernels import native


def about(device: torch.device) -> dict[str, Any]:
    """Return what a record says of the machine: date, versions, threads, device, and of a GPU its driver."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": env.versions(),
        "threads": torch.get_num_threads(),
        "device": name(device, processor()),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = "unknown"
        with suppress(OSError):
            driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
        facts |= {"driver": driver, "cuda": torch.version.cuda}
    return facts


def name(device: torch.device, processor: str) -> str:
    """Name a device, with what its speed depends on. processor: the name of the CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    isa = (native.isas() or ["no compiled kernels"])[-1]
    return f"{processor}, {torch.get_num_threads()} threads, {isa}"


def processor() -> str:
    """Name the CPU."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"
