"""The kernels against common practice: backends and peers x storage types x shapes x operations.

    pytest benchmarks/bench_kernels.py --benchmark-json=out.json && python benchmarks/table.py out.json
    pytest benchmarks/bench_kernels.py --device cuda -k "ViT-L-14 and bfloat16"

For each row, the contender's numbers are checked, then it is timed alone, then in turns with ours. A row has
ns per element, GB/s of the bytes that the operation must move, and the share of the bandwidth that torch's
copy and triad (two reads, one write) reach on as many bytes in the same run.
"""

from __future__ import annotations

import math

import clock
import peers
import pytest
import record
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ("layer", "64M", "256M", "ViT-B-32", "ViT-L-14")
# Twelve tensors of 1 GB each, with the peers' scratch memory: these fit only on a large GPU.
GPU_ONLY = ("256M",)
# Too slow for ViT-L/14: a reference write takes minutes on a CPU, and 160 shapes would be compiled.
ONE_TENSOR_ONLY = ("reference", "torch.compile")
SLOW = (
    "reference",
    "torch.func._random",
    "torch.compile",
    "delta dict (written by us)",
    "state dicts (WiSE-FT)",
)


def rows(device: torch.device) -> list[object]:
    """Return the rows, shape and dtype outermost: rows that share tensors follow each other."""
    timer = pytest.mark.benchmark(timer=clock.clock(device))
    return [
        pytest.param(shape, dtype, operation, name, id=f"{shape}-{dtype}-{operation}-{name}", marks=timer)
        for shape in SHAPES
        for dtype in DTYPES
        for operation, op in peers.OPERATIONS.items()
        for name in peers.contenders(op, device)
        if not (name in ONE_TENSOR_ONLY and shape.startswith("ViT"))
        and not (shape in GPU_ONLY and device.type != "cuda")
    ]


def pytest_generate_tests(metafunc):
    if "operation" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("device"))
        metafunc.parametrize("shape, dtype, operation, name", rows(device))


@pytest.fixture(scope="module")
def cases(device):
    """Keep one case at a time: ViT-L/14 with its peers' scratch memory takes 6 GB."""
    kept: dict[tuple[str, str], peers.Case] = {}

    def get(shape: str, dtype: str) -> peers.Case:
        if (shape, dtype) not in kept:
            kept.clear()
            kept[shape, dtype] = peers.make_case(shape, DTYPES[dtype], device)
        return kept[shape, dtype]

    return get


def test_write(benchmark, cases, device, shape, dtype, operation, name):
    if name == "torch.func._random" and not peers.has_stateless():
        pytest.skip(f"torch.func._random needs torch >= 2.15; this is {torch.__version__}")
    case, op = cases(shape, dtype), peers.OPERATIONS[operation]
    contenders = peers.contenders(op, device)
    for out in case.out:
        out.fill_(math.nan)
    contender = contenders[name](case, op)
    contender.run()
    check_numbers(case, op, contender.drawn)
    rounds = turns_of(name, device)
    # A GPU does thirty of our writes in ten milliseconds.
    most = 200 if device.type == "cuda" and name in ("native", "triton") else rounds
    clock.clock(device).reset()
    benchmark.group = f"{shape}, {dtype}, {operation}"
    benchmark.pedantic(contender.run, rounds=most, warmup_rounds=1)
    if benchmark.disabled:
        return
    turns = []
    if name != "native":
        turns = clock.in_turns(device, contenders["native"](case, op).run, contender.run, rounds)
    seconds = benchmark.stats.stats.median
    moved = op.tensors * DTYPES[dtype].itemsize * case.elements
    shares = {}
    for yardstick, operands in (("copy", 2), ("triad", 3)):
        gb_per_s = clock.bandwidth(device, moved, operands)
        shares |= {
            f"{yardstick}_gb_per_s": gb_per_s,
            f"share_of_{yardstick}": moved / seconds / 1e9 / gb_per_s,
        }
    benchmark.extra_info.update(
        name=name,
        shape=shape,
        dtype=dtype,
        operation=operation,
        elements=case.elements,
        ns_per_element=1e9 * seconds / case.elements,
        gb_per_s=moved / seconds / 1e9,
        **shares,
        times_native=turns,
    )
    stats = {name: getattr(benchmark.stats.stats, name) for name in ("median", "q1", "q3", "rounds")}
    record.row("write", group=benchmark.group, extra_info=benchmark.extra_info, stats=stats)


def turns_of(name: str, device: torch.device) -> int:
    if device.type == "cuda":
        return 3 if name == "reference" else 30  # thousands of launches
    return 3 if name in SLOW else 15


def check_numbers(case: peers.Case, op: peers.Operation, drawn: object) -> None:
    """Check for the same numbers given the same random ones, or for the same distribution without those."""
    if any(out.isnan().any() for out in case.out):
        raise AssertionError("not everything was written")
    a, b, out = (t[0].flatten()[: peers.CHECKED].double() for t in (case.zeroshot, case.finetuned, case.out))
    precision = torch.finfo(case.out[0].dtype).eps
    if drawn is None:
        check_distribution(a, b, out, op)
        return
    numbers = drawn()
    eps = torch.zeros_like(b) if numbers.noise is None else numbers.noise.double()
    kept = torch.ones_like(b) if numbers.kept is None else numbers.kept.double()
    w = b * kept
    expected = torch.lerp(a, w + op.rho * w.abs() * eps, op.alpha)
    # Each pass of a peer rounds to the storage type.
    allowed = 3 * precision * (a.abs() + b.abs()) * (1 + op.rho * eps.abs()) + 1e-7
    wrong = ((out - expected).abs() > allowed).sum()
    if wrong:
        raise AssertionError(
            f"{wrong} of {len(out)} numbers are off by up to {(out - expected).abs().max():.1e}"
        )
    check_distribution(a, b, out, op)


def check_distribution(a, b, out, op: peers.Operation) -> None:
    large = b.abs() > 5e-3  # smaller weights show rounding
    a, b, out = a[large], b[large], out[large]
    kept = torch.ones_like(b, dtype=torch.bool)
    if op.keep < 1:
        kept = (out - (1 - op.alpha) * a).abs() > 0.3 * op.alpha * b.abs()
        error = (kept.double().mean() - op.keep).abs() / math.sqrt(op.keep * (1 - op.keep) / len(kept))
        if error > 6:
            raise AssertionError(f"{kept.double().mean():.4f} of the weights were kept")
    if op.rho > 0:
        plain = torch.lerp(a, b, op.alpha)
        eps = ((out - plain) / (op.alpha * op.rho * b.abs()))[kept]
        if eps.mean().abs() > 6 / math.sqrt(len(eps)) or (eps.var() - 1).abs() > 8 * math.sqrt(2 / len(eps)):
            raise AssertionError(f"noise of mean {eps.mean():.4f}, variance {eps.var():.4f}")
