"""Sharded tensors: the bits of the full tensor, on any mesh and any sharding."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.wording import refused
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import rft_fast as rft
from rft_fast.kernels.shards import part_of

SHAPES = ((8, 12), (7, 5), (3, 2, 6), (5,), (1, 9), (2,), (13, 4))


@contextlib.contextmanager
def rank(own: int, *mesh: int) -> Iterator[Any]:
    """This process as one of several that never speak: a mesh in which it has the given rank."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = int(torch.tensor(mesh).prod())
    dist.init_process_group("fake", rank=own, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", mesh)
    finally:
        dist.destroy_process_group()


def sharded(full: Tensor, mesh: Any, placements: Any) -> DTensor:
    """As distribute_tensor, without its communication: torch.chunk along each axis of the mesh in turn."""
    local = full
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces = local.chunk(mesh.size(axis), placement.dim)
            here = mesh.get_coordinate()[axis]
            local = pieces[here] if here < len(pieces) else local.narrow(placement.dim, 0, 0)
    local = local.clone(memory_format=torch.contiguous_format)
    size = {"shape": full.shape, "stride": full.stride()}
    return DTensor.from_local(local, mesh, placements, run_check=False, **size)


def models(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def placements_of(tensor: Tensor, axes: int) -> list[Any]:
    one = [Replicate(), *(Shard(dim) for dim in range(tensor.ndim))]
    return list(itertools.product(one, repeat=axes))


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)])
def test_every_part_is_that_part_of_the_whole(mesh_shape: Any) -> None:
    w0, w1, vector = models(0), models(1), models(2)
    at = rft.offsets(w1)
    expected, added = [torch.empty_like(w) for w in w1], [torch.empty_like(w) for w in w1]
    request: dict[str, Any] = {"rho": 0.1, "keep": 0.6, "noise": "uniform", "seed": 5, "draw": 3}
    rft.write_(expected, w0, w1, 0.4, **request)
    rft.add_(added, w1, vector, 0.5, "abs")
    eps, mask = rft.noise_like(w1, seed=2), rft.keep_mask_like(w1, 0.3)
    for own in range(int(torch.tensor(mesh_shape).prod())):
        with rank(own, *mesh_shape) as mesh:
            for i, tensor in enumerate(w1):
                for placements in placements_of(tensor, len(mesh_shape)):
                    a, b, c = (sharded(w[i], mesh, placements) for w in (w0, w1, vector))
                    out = sharded(torch.zeros_like(tensor), mesh, placements)
                    rft.write_(out, a, b, 0.4, offset=at[i], **request)
                    assert torch.equal(out.to_local(), sharded(expected[i], mesh, placements).to_local())
                    rft.add_(out, b, c, 0.5, "abs")
                    assert torch.equal(out.to_local(), sharded(added[i], mesh, placements).to_local())
                    noise = rft.noise_like(b, seed=2, offset=at[i])
                    assert isinstance(noise, DTensor) and noise.placements == tuple(placements)
                    assert torch.equal(noise.to_local(), sharded(eps[i], mesh, placements).to_local())
            rows = [Shard(0)] * len(mesh_shape)
            kept = rft.keep_mask_like([sharded(w, mesh, rows) for w in w1], 0.3)
            for got, full in zip(kept, mask, strict=True):
                assert torch.equal(got.to_local(), sharded(full, mesh, rows).to_local())


def test_placements_that_are_refused() -> None:
    with rank(0, 2) as mesh:
        full = torch.ones(6, 4)
        w = sharded(full, mesh, [Shard(0)])
        with refused(ValueError, "perturb_", "params of tensor 1"):
            rft.perturb_([w, DTensor.from_local(full, mesh, [Partial()], run_check=False)], 0.1, draw=0)
        with refused(ValueError, "zeroshot of tensor 0"):
            rft.interpolate_(w, full[:3], w, 0.5)
        with refused(ValueError, "finetuned of tensor 0"):
            rft.interpolate_(w, w, sharded(full, mesh, [Shard(1)]), 0.5)
        size: dict[str, Any] = {"shape": (6, 4), "stride": (4, 1)}
        odd = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False, **size)
        with refused(ValueError, "(2, 4)", "(3, 4)"):
            rft.perturb_(odd, 0.1, draw=0)
        assert (w.to_local() == 1).all()
        with pytest.raises(Exception, match=r"outside of the compiled|DTensor"):
            torch.compile(lambda x: rft.perturb_(x, 0.1, draw=0), fullgraph=True, backend="eager")(w)


def test_autograd_sees_a_write_of_a_sharded_tensor() -> None:
    with rank(0, 1) as mesh:
        w = nn.Parameter(sharded(torch.ones(6), mesh, [Shard(0)]))
        before = w._version
        rft.perturb_(w, 0.1, draw=0)
        assert w._version > before and not torch.equal(w.to_local(), torch.ones(6))
        plan = rft.Plan(w, w, w)
        before = w._version
        plan.write(1.0, rho=0.1)
        assert w._version > before


def test_a_process_outside_of_the_mesh_has_nothing_to_write() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    with rank(1, 2):
        mesh = DeviceMesh("cpu", [0])
        w = DTensor.from_local(torch.empty(0), mesh, [Shard(0)], run_check=False, shape=(6,), stride=(1,))
        assert part_of(w, "w").local.numel() == 0


PROGRAM = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
import rft_fast as rft

own, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=own, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
mesh = init_device_mesh("cpu", (2,))

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))  # rows do not divide by two

plain = build()
start = {name: p.detach().clone() for name, p in plain.named_parameters()}
eps = rft.noise_like(plain, seed=1, draw=4)
rft.perturb_(plain, 0.1, seed=1, draw=4)

for placement in (Shard(0), Shard(1), Replicate()):
    found = {}
    for name, p in start.items():  # of a copy: a replicated tensor shares its memory
        found[name] = distribute_tensor(p.clone(), mesh, [placement if p.ndim > 1 else Shard(0)])
    rft.perturb_(found, 0.1, seed=1, draw=4)
    for name, p in plain.named_parameters():
        assert torch.equal(found[name].full_tensor(), p), (placement, name)
    noise = rft.noise_like(found, seed=1, draw=4)
    assert all(torch.equal(noise[name].full_tensor(), eps[name]) for name in eps)

model = build()
for layer in (model[0], model[2]):
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
x = torch.randn(4, 5, generator=torch.Generator().manual_seed(own))
model(x).sum().backward()  # gathers, computes, frees and shards again
before = {name: p.detach().clone() for name, p in model.named_parameters()}
assert all(isinstance(p, DTensor) for p in before.values())
rft.perturb_(model, 0.1, seed=1, draw=4)
for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
    assert torch.equal(p.full_tensor(), q), name
with torch.no_grad():
    assert torch.equal(model(x), plain(x))  # the forward pass gathers what was written
model.reshard()
plan = rft.Plan(model, before, before)
plan.write(1.0)
for name, p in model.named_parameters():
    assert torch.equal(p.full_tensor(), start[name]), name
plan.write(1.0, rho=[0.1, 0.0, 0.1, 0.0], seed=1, draw=4)
for i, (name, p) in enumerate(model.named_parameters()):
    whole = dict(plain.named_parameters())[name] if i % 2 == 0 else start[name]
    assert torch.equal(p.full_tensor(), whole), name
grads = {name: p.grad for name, p in model.named_parameters()}
plan.write(1.0)
rft.add_(model, before, grads, 0.5)
for name, p in model.named_parameters():
    assert torch.equal(p.full_tensor(), start[name] + 0.5 * grads[name].full_tensor()), name
whole = build()
fully_shard(whole, mesh=mesh)
whole(x)  # leaves the outermost module gathered
try:
    rft.perturb_(whole, 0.1, draw=0)
    raise SystemExit("a gathered module was written")
except ValueError as error:
    assert "perturb_: " in str(error) and "reshard()" in str(error), error
whole.reshard()
rft.perturb_(whole, 0.1, seed=1, draw=4)
for p, q in zip(whole.parameters(), plain.parameters(), strict=True):
    assert torch.equal(p.full_tensor(), q)
dist.barrier()
dist.destroy_process_group()
print("same bits")
"""


@pytest.mark.slow
def test_two_processes_with_dtensor_and_fsdp2(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(own), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0 and "same bits" in out, error[-3000:]
    finally:
        for process in processes:
            process.kill()
