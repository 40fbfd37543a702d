"""One process that lists the working backends, runs every kernel, and measures the host's time of a write.

Rows have sizes around the kernels' tiles, aligned and not, in all storage types, in place and out of place,
in several forms of the write. Results are compared with the CPU's bit for bit, except normals.
compute-sanitizer runs it, too. Each backend, form and time is a row (record.py) as soon as it is known.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import record
import torch

from rft_fast import env
from rft_fast.kernels import Plan, add_
from rft_fast.kernels.registry import BACKENDS

SIZES = (0, 1, 3, 4, 5, 255, 1024, 2047, 2048, 2049, 4101)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For both backends; Triton compiles a variant for each.
FORMS = [
    {"alpha": 0.3},
    {"alpha": 0.7, "rho": 0.1, "noise": "normal", "seed": 5},
    {"alpha": 1.0, "rho": 0.1, "noise": "uniform", "keep": 0.5},
    {"alpha": 0.4, "rho": 0.1, "noise": "rademacher", "on": "interpolated", "adaptive": False},
    {"alpha": 0.4, "rho": 0.1, "noise": "normal", "keep": 0.9, "fill": "zeroshot", "draw": 2},
    {"scale": 0.3, "weight": "square"},
    {"alpha": [0.3, 0.0, 1.0], "rho": [0.1, 0.0], "keep": [0.5, 1.0, 1.0, 0.0], "noise": "uniform"},
    {"alpha": 0.3, "rho": 0.1, "noise": "uniform", "keep": 0.5, "permuted": True},
]
# These run every kernel of csrc/cuda.cu: the usual forms with or without noise and mask, and the others.
MORE_FORMS = [
    *(
        {"alpha": alpha, "rho": rho, "keep": keep}
        for alpha in (0.3, 0.7, 1.0)
        for rho in (0.0, 0.1)
        for keep in (1.0, 0.5)
    ),
    {"alpha": 0.0},
    {"alpha": 0.3, "keep": 0.5, "fill": "zeroshot"},
    {"alpha": 0.3, "rho": 0.1, "on": "interpolated"},
    {"alpha": 0.3, "rho": 0.1, "noise": "uniform"},
    {"alpha": 0.3, "rho": 0.1, "noise": "rademacher", "keep": 0.5},
    {"scale": 0.3},
    # Numbers of each row; rows whose noise is not in the order of memory.
    *(
        {"alpha": [0.3, 0.0, 1.0, 0.7], "rho": rho, "keep": keep, "noise": noise}
        for noise, rho in (("normal", 0.0), ("normal", 0.1), ("uniform", [0.1, 0.0]), ("rademacher", 0.2))
        for keep in (1.0, [0.5, 1.0, 0.0])
    ),
    *(
        {"alpha": 0.3, "rho": 0.1, "keep": keep, "noise": noise, "permuted": True}
        for noise in ("normal", "uniform", "rademacher")
        for keep in (1.0, 0.5)
    ),
    {"alpha": 0.3, "keep": 0.5, "permuted": True},
    {"scale": [0.5, 0.0, -1.0], "weight": "abs", "permuted": True},
]


def tensors(device: torch.device) -> list[list[torch.Tensor]]:
    """Return out, zeroshot and finetuned: each size in each storage type, aligned and one element off.

    A few further rows have several types, or are aligned to eight bytes only.
    """
    generator = torch.Generator().manual_seed(0)
    roles: list[list[torch.Tensor]] = [[], [], []]
    for size, dtype, offset in itertools.product(SIZES, DTYPES, (0, 1)):
        for role in roles:
            # The view ends where its memory ends, so that an access one element too far is found.
            role.append(torch.randn(size + offset, generator=generator).to(device, dtype)[offset:])
    roles[0][::3] = roles[1][::3]  # in place
    for role, dtype in zip(roles, DTYPES):
        role.append(torch.randn(4101, generator=generator).to(device, dtype))
        role.append(torch.randn(4101, generator=generator).to(device, torch.bfloat16)[4:])
    return roles


def permuted(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a matrix whose columns come first, where the size allows."""
    return tensor.view(-1, 3).T if tensor.numel() % 3 == 0 else tensor


def written(impl: str, device: torch.device, form: dict) -> list[torch.Tensor]:
    """Return what one form writes. A list of numbers is repeated, one for each row."""
    roles = tensors(device)
    if form.get("permuted"):
        roles = [[permuted(t) for t in role] for role in roles]
    out, zeroshot, finetuned = roles
    numbers = {name: value for name, value in form.items() if name != "permuted"}
    for name, value in numbers.items():
        if isinstance(value, list):
            numbers[name] = [value[i % len(value)] for i in range(len(out))]
    if "scale" in numbers:
        add_(out, finetuned, zeroshot, **numbers, impl=impl)
    else:
        Plan(out, zeroshot, finetuned, impl).write(**numbers, tensors=[(0, 10), (12, len(out))])
    return [t.cpu() for t in out]


def check(impl: str, device: torch.device) -> int:
    """Return the number of wrong forms of the write. Each form is a row."""
    forms = FORMS if impl == "triton" else FORMS + MORE_FORMS
    wrong = most = 0
    for number, form in enumerate(forms):
        what = ", ".join(f"{name} {value}" for name, value in form.items())
        if record.time_is_up():
            record.left_out(f"{impl}: {len(forms) - number} of {len(forms)} forms, from {what} on")
            break
        try:
            rows, why = compare(impl, device, form), ""
        except (AssertionError, RuntimeError) as error:
            rows, why = 0, str(error).strip()
            wrong += 1
            print(f"{impl} on {device}: {what}: {why}")
        most = max(most, rows)
        record.row("form", impl=impl, form=what, right=not why, why=why[:300], rows=rows)
    else:
        print(f"{impl} on {device}: {len(forms) - wrong} of {len(forms)} forms of {most} rows are right")
    return wrong


def compare(impl: str, device: torch.device, form: dict) -> int:
    """Return the number of rows one form wrote; AssertionError if one differs from the reference."""
    expected = written("reference", torch.device("cpu"), form)
    for got, wanted in zip(written(impl, device, form), expected):
        close = {"rtol": 1e-2, "atol": 1e-6} if got.element_size() == 2 else {"rtol": 1e-5, "atol": 1e-6}
        if not form.get("rho") or form.get("noise", "normal") != "normal":
            close = {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got, wanted, **close)
    return len(expected)


def host_time(impl: str, device: torch.device) -> None:
    """Measure a caller's cost of one Plan.write of 296 tensors so small that writing them takes no time."""
    tensors = [torch.zeros(8, device=device) for _ in range(296)]
    plan = Plan(tensors, [t.clone() for t in tensors], [t.clone() for t in tensors], impl)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # otherwise waking threads for 296 x 8 elements would dominate
    try:
        for what, runs in (("whole model", None), ("two tensors", [(100, 102)])):
            times = timed(lambda runs=runs: plan.write(0.3, rho=0.1, tensors=runs, draw=5))
            q1, median, q3 = (1e6 * q for q in statistics.quantiles(times, n=4))
            record.row("host", impl=impl, what=what, us=median, q1=q1, q3=q3, rounds=len(times))
            print(f"{impl} on {device}: Plan.write, {what}: {median:.1f} us ({q1:.1f} to {q3:.1f})")
    finally:
        torch.set_num_threads(threads)


def timed(run: Callable[[], object], rounds: int = 50, iterations: int = 20) -> list[float]:
    """Return seconds of one call per round. Between rounds a GPU catches up, so that no call waits for it."""
    times = []
    for number in range(rounds + 3):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(iterations):
            run()
        if number >= 3:  # the first ones warm up
            times.append((time.perf_counter() - begun) / iterations)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--host", action="store_true", help="measure the host's time of a write, too")
    options = parser.parse_args()
    record.start()
    device = torch.empty(0, device=options.device).device
    # On the CPU Triton is interpreted, for tests.
    impls = ("native",) if device.type == "cpu" else ("native", "triton")
    print(env.report())
    versions = {name: str(version) for name, version in env.versions().items()}
    record.row("about", **versions, cuda=torch.version.cuda, threads=torch.get_num_threads())
    faults = 0
    for impl in impls:
        why = BACKENDS[impl].why_not(device)
        record.row("backend", impl=impl, device=str(device), works=not why, why=why or "")
        faults += bool(why)
        if not why and options.host:
            host_time(impl, device)
    # The check takes longest, and compute-sanitizer repeats it.
    return faults + sum(check(impl, device) for impl in impls if not BACKENDS[impl].why_not(device))


if __name__ == "__main__":
    sys.exit(bool(main()))
