"""Interpolation of two checkpoint files of ViT-L/14's size, against cp, and against torch.

    python benchmarks/merge.py FOLDER [--rounds 5] [--width 1024] [--out FILE]

Three contenders in turns, each in a process of its own, timed behind its imports until its result is on disk:

``cp``     ``cp`` of one of the files, and fsync
``merge``  :func:`rft_fast.merge.run`, which also hashes both files and syncs its result
``torch``  ``torch.load`` of both, a dict of interpolated tensors, ``torch.save``, and fsync

Bandwidth counts the bytes read and written: two files of cp, three of the others. FOLDER decides which
disk is measured, and needs space for seven files; with ``--cold`` the files leave the page cache before each
process. Peak memory is that of the process (of Linux), without what its imports take.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

import torch

ALPHA = 0.4
BLOCKS = 24
CP = """
def work():
    subprocess.run(["cp", first, out], check=True)
    sync()
"""
MERGE = """
import rft_fast.kernels
from rft_fast.merge import Request, run
rft_fast.kernels.interpolate_(torch.zeros(4), torch.zeros(4), torch.zeros(4), 0.5)
def work():
    run(Request("interpolate", (pathlib.Path(second),), pathlib.Path(out), pathlib.Path(first),
                alpha=(ALPHA,), overwrite=True))
"""
TORCH = """
def work():
    zero, one = torch.load(first), torch.load(second)
    torch.save({name: (1 - ALPHA) * zero[name] + ALPHA * one[name] for name in zero}, out)
    sync()
"""
PROGRAM = """
import json, os, pathlib, resource, subprocess, sys, time
import torch
first, second, out, ALPHA = sys.argv[1], sys.argv[2], sys.argv[3], {alpha}
def sync():
    handle = os.open(out, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
def resident(what):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(what))
    return int(line.split()[1]) * 1024
{body}
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, wall, used = resident("VmRSS"), time.perf_counter(), time.process_time()
work()
children = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = time.process_time() - used + children.ru_utime + children.ru_stime
print(json.dumps({{"seconds": time.perf_counter() - wall, "cpu": cpu, "memory": resident("VmHWM") - before}}))
"""
CONTENDERS = {"cp": (CP, ".safetensors"), "merge": (MERGE, ".safetensors"), "torch": (TORCH, ".pt")}
FILES = {"cp": 2, "merge": 3, "torch": 3}  # that are read and written


def state(width: int, seed: int) -> dict[str, torch.Tensor]:
    """An image tower with a head, as of ViT-L/14 at a width of 1024."""
    noise = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (width, 3, 14, 14),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (257, width),
        "visual.proj": (width, 768),
        "classification_head.weight": (1000, 768),
    }
    for block in range(BLOCKS):
        start = f"visual.transformer.resblocks.{block}"
        shapes |= {
            f"{start}.attn.in_proj_weight": (3 * width, width),
            f"{start}.attn.in_proj_bias": (3 * width,),
            f"{start}.attn.out_proj.weight": (width, width),
            f"{start}.attn.out_proj.bias": (width,),
            f"{start}.mlp.c_fc.weight": (4 * width, width),
            f"{start}.mlp.c_fc.bias": (4 * width,),
            f"{start}.mlp.c_proj.weight": (width, 4 * width),
            f"{start}.mlp.c_proj.bias": (width,),
        }
    return {name: 0.02 * torch.randn(shape, generator=noise) for name, shape in shapes.items()}


def write(folder: pathlib.Path, width: int) -> None:
    """Write a pair of models in both formats, and wait until it is on disk."""
    from safetensors.torch import save_file

    zero = state(width, 0)
    one = {
        name: tensor + 0.1 * other for (name, tensor), other in zip(zero.items(), state(width, 1).values())
    }
    for name, tensors in (("zero", zero), ("one", one)):
        save_file(tensors, folder / f"{name}.safetensors")
        torch.save(tensors, folder / f"{name}.pt")
    os.sync()


def check(folder: pathlib.Path) -> None:
    """Compare the results of torch and of the merge."""
    from safetensors.torch import load_file

    ours, theirs = load_file(folder / "merge.safetensors"), torch.load(folder / "torch.pt")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


def measure(folder: pathlib.Path, name: str, cold: bool) -> dict[str, float]:
    """Run one contender in a process of its own."""
    body, suffix = CONTENDERS[name]
    files = [folder / f"{end}{suffix}" for end in ("zero", "one")]
    out = folder / f"{name}{suffix}"
    out.unlink(missing_ok=True)
    os.sync()
    if cold:
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    code = PROGRAM.format(alpha=ALPHA, body=body)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (*files, out))], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    moved = FILES[name] * files[0].stat().st_size
    return {**found, "bandwidth": moved / found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, help="on the disk to measure; files in it are replaced")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024, help="of the tower; smaller for a try")
    parser.add_argument("--cold", action="store_true", help="read the files from the disk")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for all rounds")
    options = parser.parse_args()
    write(options.folder, options.width)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        rounds.append({name: measure(options.folder, name, options.cold) for name in CONTENDERS})
    check(options.folder)

    def median(name: str, what: str) -> float:
        return statistics.median(each[name][what] for each in rounds)

    def ratio(a: str, b: str, what: str) -> str:
        found = sorted(each[a][what] / each[b][what] for each in rounds)
        return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

    size = (options.folder / "zero.safetensors").stat().st_size
    print(f"files of {size / 1e9:.2f} GB; medians of {len(rounds)} rounds in turns")
    for name in CONTENDERS:
        print(
            f"{name:<6} {median(name, 'seconds'):7.2f} s  {median(name, 'cpu'):6.2f} s of CPU  "
            f"{median(name, 'bandwidth') / 1e9:5.2f} GB/s  {median(name, 'memory') / 2**20:7.0f} MiB"
        )
    print(f"bandwidth of merge over that of cp: {ratio('merge', 'cp', 'bandwidth')}")
    print(f"seconds of torch over those of merge: {ratio('torch', 'merge', 'seconds')}")
    print(f"CPU seconds of torch over those of merge: {ratio('torch', 'merge', 'cpu')}")
    if options.out:
        facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        facts |= {"torch": torch.__version__, "bytes": size, "cold": options.cold, "load": os.getloadavg()[0]}
        options.out.write_text(json.dumps({**facts, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
