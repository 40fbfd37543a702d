"""SAM: the gradient at the worst point nearby (Foret et al. 2021, Eq. 2).

Each step climbs from w to w + rho g / norm(g), takes the gradient there, and lets the optimizer step from w
with it.
"""

import torch
from torch import nn

import rft_fast as rft


def sam_step(model, optimizer, loss, before, rho=0.05):
    """Take one step. before: tensors like the parameters, allocated once, which hold w meanwhile."""
    params = list(model.parameters())
    optimizer.zero_grad()
    loss(model).backward()
    grads = [p.grad for p in params]
    norm = torch.stack([g.norm() for g in grads]).norm().item()

    rft.interpolate_(before, params, params, 0)  # a copy of w
    rft.add_(params, before, grads, rho / (norm + 1e-12))  # w + rho g / norm(g)
    optimizer.zero_grad()
    loss(model).backward()
    rft.interpolate_(params, before, before, 0)  # w again, bit for bit
    optimizer.step()


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    images = torch.randn(512, 20)
    labels = (images @ torch.randn(20, 3)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [torch.empty_like(p) for p in model.parameters()]

    def loss(model):
        return nn.functional.cross_entropy(model(images), labels)

    losses = [loss(model).item()]
    for _ in range(50):
        sam_step(model, optimizer, loss, before)
    losses.append(loss(model).item())
    print(f"loss {losses[0]:.3f} -> {losses[1]:.3f}")
    return losses


if __name__ == "__main__":
    result = main()
