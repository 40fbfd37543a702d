"""SAM: the gradient at the worst point nearby (Foret et al. 2021, Eq. 2).

Each step climbs from w to w + rho g / norm(g), takes the gradient there, and lets the optimizer step from w
with it. Parameters and spare tensors change places, so nothing is copied. (Where addresses must stay, as in
CUDA graphs, copy w to spare and write into the parameters.)
"""

import torch
from torch import nn

import rft_fast as rft


def climb(params, spare, rho):
    """Put w + rho g / norm(g) in place of w, which is in spare then."""
    grads = [p.grad for p in params]
    rft.add_(spare, params, grads, rho / (rft.norm(grads) + 1e-12))
    swap(params, spare)


def swap(params, spare):
    for p, other in zip(params, spare, strict=True):
        p.data, other.data = other.data, p.data


def sam_step(model, optimizer, loss, spare, rho=0.05):
    """Take one step. spare: tensors like the parameters, allocated once."""
    params = list(model.parameters())
    optimizer.zero_grad()
    loss(model).backward()
    climb(params, spare, rho)
    optimizer.zero_grad()
    loss(model).backward()
    swap(params, spare)  # w again, bit for bit
    optimizer.step()


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    images = torch.randn(512, 20)
    labels = (images @ torch.randn(20, 3)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    spare = [torch.empty_like(p) for p in model.parameters()]

    def loss(model):
        return nn.functional.cross_entropy(model(images), labels)

    losses = [loss(model).item()]
    for _ in range(50):
        sam_step(model, optimizer, loss, spare)
    losses.append(loss(model).item())
    print(f"loss {losses[0]:.3f} -> {losses[1]:.3f}")
    return losses


if __name__ == "__main__":
    result = main()
