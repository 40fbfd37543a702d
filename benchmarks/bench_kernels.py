"""The CPU kernels beside what people run today: same ends, same precision, everything preallocated.

    pytest benchmarks/bench_kernels.py --benchmark-json=out.json && python benchmarks/table.py out.json

Each row carries ns per element, GB/s of the bytes that the operation must move (both ends read, the output
written) and that as a share of the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import math
import time

import peers
import pytest
import torch

# A reference write of ViT-L/14 takes minutes and proves nothing; compiling 160 shapes neither.
SLOW = {"reference": ("64M",), "torch.compile": ("64M",)}
SHAPES = ("64M", "ViT-B-32", "ViT-L-14")
GROUPS = {"interpolate": peers.INTERPOLATE, "interpolate+perturb": peers.PERTURB, "other": peers.EXTRA}
ROWS = [
    pytest.param(shape, group, name, id=f"{shape}-{group}-{name}")
    for shape in SHAPES
    for group, members in GROUPS.items()
    for name in members
    if shape in SLOW.get(name, SHAPES) and (group != "other" or shape == "64M")
]


@pytest.fixture(scope="module")
def cases():
    """One case at a time: ViT-L/14 with its peers' scratch takes 6 GB."""
    kept: dict[str, peers.Case] = {}

    def get(name: str) -> peers.Case:
        if name not in kept:
            kept.clear()
            kept[name] = peers.make_case(name)
        return kept[name]

    return get


@pytest.mark.parametrize("shape, group, name", ROWS)
def test_write(benchmark, cases, copy_bandwidth, shape, group, name):
    if name == "torch.func._random" and not peers.has_stateless():
        pytest.fail("torch.func._random needs torch >= 2.15; deselect with -k 'not _random'")
    case = cases(shape)
    for out in case.out:
        out.fill_(math.nan)
    run = GROUPS[group][name](case)
    slow = name in ("reference", "torch.func._random", "torch.compile", "delta dict")
    benchmark.group = f"{shape}, {group}"
    benchmark.pedantic(run, rounds=3 if slow else 15, warmup_rounds=1)
    check_numbers(case, group)
    if benchmark.disabled:
        return
    ours = GROUPS[group].get("native")
    turns = [] if ours is None or name == "native" else in_turns(ours(case), run, 3 if slow else 15)
    bytes_moved = 3 * 4 * case.elements
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        name=name,
        elements=case.elements,
        dtype="float32",
        ns_per_element=1e9 * seconds / case.elements,
        gb_per_s=bytes_moved / seconds / 1e9,
        share_of_copy=bytes_moved / seconds / 1e9 / copy_bandwidth,
        copy_gb_per_s=copy_bandwidth,
        times_native=turns,
    )


def in_turns(ours: peers.Run, peer: peers.Run, rounds: int) -> list[float]:
    """How many times longer the peer took, round by round, ours and the peer's one after the other.

    A shared machine changes its speed by half from one minute to the next: only neighbours compare. Before
    each, the caches are filled with something else, so that neither writes back what the other left there.
    """
    scratch = torch.zeros(2**24), torch.empty(2**24)

    def seconds(run: peers.Run) -> float:
        scratch[1].copy_(scratch[0])
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    pairs = [(seconds(ours), seconds(peer)) for _ in range(rounds)]
    return [theirs / mine for mine, theirs in pairs]


def check_numbers(case: peers.Case, group: str) -> None:
    """Every implementation must have computed the same thing: exactly, or the same distribution."""
    if any(out.isnan().any() for out in case.out):
        raise AssertionError("not everything was written")
    a, b, out = (t[0].flatten()[: 2**20].double() for t in (case.zeroshot, case.finetuned, case.out))
    plain = torch.lerp(a, b, peers.ALPHA)
    if group == "interpolate" and (out - plain).abs().max() > 1e-8:
        raise AssertionError(f"interpolation is off by {(out - plain).abs().max():.1e}")
    if group == "interpolate+perturb":
        eps = (out - plain) / (peers.ALPHA * peers.RHO * b.abs())
        eps = eps[b.abs() > 1e-3]  # below, float32 rounding of the sum shows
        n = len(eps)
        if abs(eps.mean()) > 6 / math.sqrt(n) or abs(eps.var() - 1) > 6 * math.sqrt(2 / n):
            raise AssertionError(f"noise of mean {eps.mean():.4f}, variance {eps.var():.4f}")
