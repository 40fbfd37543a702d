"""FSDP2: sharded weights get the noise of their place in the whole model.

Each process writes its shards, without communication, and gets the bits that one process with the whole
model would get. This script starts two processes on the CPU; in your own program, torchrun does.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rft_fast as rft


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 3))


def work(rank, world, file):
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{file}")
    mesh = init_device_mesh("cpu", (world,))
    images = torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))
    model = build()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)

    original = [p.detach().clone() for p in model.parameters()]  # shards
    plan = rft.Plan(model, original, original)
    whole = build()  # for comparison: the model in one piece
    with torch.no_grad():
        for draw in range(3):
            plan.write(1.0, rho=0.1, draw=draw)
            model(images)  # gathers the noisy weights
            model.reshard()  # as FSDP2 may leave the root gathered
            whole.load_state_dict(build().state_dict())
            rft.perturb_(whole, 0.1, draw=draw)
            pairs = zip(model.parameters(), whole.parameters(), strict=True)
            same = all([torch.equal(p.full_tensor(), q) for p, q in pairs])
            if rank == 0:
                print(f"draw {draw}: {'the same bits' if same else 'other bits'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(2, f"{folder}/meeting"), nprocs=2)
