"""Average sharpness: how much the loss rises under noise on the weights (Andriushchenko et al. 2023).

    S = E[ loss(w + rho |w| eps) ] - loss(w),  eps normal (adaptive: noise in units of each weight)

There is one copy of the weights, and none for each draw of noise.
"""

import torch
from torch import nn

import rft_fast as rft


def average_sharpness(model, loss, rho=0.05, draws=20, seed=0):
    """Return the sharpness and its standard error over the draws."""
    original = [p.detach().clone() for p in model.parameters()]
    plan = rft.Plan(model, original, original)  # once: where to write, and from what
    clean = loss(model)
    rises = []
    for draw in range(draws):
        plan.write(1.0, rho=rho, seed=seed, draw=draw)  # w + rho |w| eps
        rises.append(loss(model) - clean)
    plan.write(1.0)  # the original weights again, bit for bit
    rises = torch.tensor(rises)
    return rises.mean().item(), (rises.std() / draws**0.5).item()


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    images = torch.randn(512, 20)
    labels = model(images).argmax(1)  # the model is right about these

    @torch.no_grad()
    def loss(model):
        return nn.functional.cross_entropy(10 * model(images), labels).item()

    sharpness = {rho: average_sharpness(model, loss, rho) for rho in (0.1, 0.2, 0.4)}
    for rho, (mean, error) in sharpness.items():
        print(f"rho {rho}: {mean:.4f}, standard error {error:.4f}")
    return sharpness


if __name__ == "__main__":
    result = main()
