"""ASAM: SAM in units of each weight (Kwon et al. 2021, Eq. 7, with T_w = |w|).

As sam.py, but each step climbs from w to w + rho w^2 g / norm(|w| g). (The paper's experiments add a constant
eta to |w|. Here eta is 0, as in github.com/davda54/sam.)
"""

import torch
from torch import nn

import rft_fast as rft


def climb(params, spare, rho):
    """Put w + rho w^2 g / norm(|w| g) in place of w, which is in spare then."""
    grads = [p.grad for p in params]
    norm = rft.norm(grads, params, weight="abs")
    rft.add_(spare, params, grads, rho / (norm + 1e-12), weight="square")
    swap(params, spare)


def swap(params, spare):
    for p, other in zip(params, spare, strict=True):
        p.data, other.data = other.data, p.data


def asam_step(model, optimizer, loss, spare, rho=0.5):
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
        asam_step(model, optimizer, loss, spare)
    losses.append(loss(model).item())
    print(f"loss {losses[0]:.3f} -> {losses[1]:.3f}")
    return losses


if __name__ == "__main__":
    result = main()
