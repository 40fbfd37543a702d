"""Noisy weight averaging: gradients at perturbed weights, and the mean of the weights on the way.

The gradient is taken at w + rho |w| eps, with new noise in each step (similar to LPF-SGD, Bisla et al.
2022), and the optimizer steps from w. The result is the running mean of w (stochastic weight averaging,
Izmailov et al. 2018).
"""

import torch
from torch import nn

import rft_fast as rft


def noisy_step(model, optimizer, loss, before, average, step, rho=0.02, seed=0):
    """Take step number 0, 1, ... before, average: tensors like the parameters, allocated once."""
    params = list(model.parameters())
    rft.interpolate_(before, params, params, 0)  # a copy of w
    rft.perturb_(params, rho, seed=seed, draw=step)
    optimizer.zero_grad()
    loss(model).backward()
    rft.interpolate_(params, before, before, 0)  # w again, bit for bit
    optimizer.step()
    rft.interpolate_(average, average, params, 1 / (step + 1))  # the mean of step + 1 weights


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    images = torch.randn(512, 20)
    labels = (images @ torch.randn(20, 3)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [torch.empty_like(p) for p in model.parameters()]
    average = [torch.zeros_like(p) for p in model.parameters()]

    def loss(model):
        return nn.functional.cross_entropy(model(images), labels)

    losses = [loss(model).item()]
    for step in range(100):
        noisy_step(model, optimizer, loss, before, average, step)
    rft.interpolate_(model, average, average, 0)  # the result
    losses.append(loss(model).item())
    print(f"loss {losses[0]:.3f} -> {losses[1]:.3f}")
    return losses


if __name__ == "__main__":
    result = main()
