"""MeZO: fine-tuning with forward passes alone (Malladi et al. 2023, Algorithm 1).

Each step measures the loss at w + eps z and at w - eps z, and moves w along z by the slope between the two.
The noise z is made again from its seed and the number of the step, so memory holds the weights and nothing
else.
"""

import torch
from torch import nn

import rft_fast as rft


def mezo_step(model, loss, step, eps=1e-3, lr=1e-2, seed=0):
    z = {"seed": seed, "draw": step, "adaptive": False}  # the same noise in all three calls
    rft.perturb_(model, eps, **z)
    above = loss(model)
    rft.perturb_(model, 2 * eps, sign=-1, **z)
    below = loss(model)
    slope = (above - below) / (2 * eps)
    move = eps - lr * slope  # back to w, and the step, at once
    rft.perturb_(model, abs(move), sign=1 if move > 0 else -1, **z)
    return slope


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    images = torch.randn(512, 20)
    labels = (images @ torch.randn(20, 3)).argmax(1)

    @torch.no_grad()
    def loss(model):
        return nn.functional.cross_entropy(model(images), labels).item()

    losses = [loss(model)]
    for step in range(300):
        mezo_step(model, loss, step)
    losses.append(loss(model))
    print(f"loss {losses[0]:.3f} -> {losses[1]:.3f}")
    return losses


if __name__ == "__main__":
    result = main()
