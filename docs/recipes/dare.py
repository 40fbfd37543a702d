"""DARE: drop most of a task vector at random, rescale the rest (Yu et al. 2024).

    w0 + scale * mask * (w1 - w0) / keep,  mask = 1 with probability keep, else 0

A masked weight takes its zero-shot value, and alpha beyond 1 extrapolates: one write does all of it. For
several task vectors, and for checkpoints on disk, there is `python -m rft_fast.merge`.
"""

import copy

import torch
from torch import nn

import rft_fast as rft


def dare(out, zeroshot, finetuned, keep=0.1, scale=1.0, seed=0):
    """Write the result into the model out. keep: probability that a weight keeps its difference."""
    rft.write_(out, zeroshot, finetuned, alpha=scale / keep, keep=keep, fill="zeroshot", seed=seed)


def main():
    torch.manual_seed(0)
    images = torch.randn(512, 20).repeat(1, 100)  # redundant, as the weights of large models are
    labels = (images @ torch.randn(2000, 3)).argmax(1)
    zeroshot, merged = nn.Linear(2000, 3), nn.Linear(2000, 3)
    finetuned = copy.deepcopy(zeroshot)
    optimizer = torch.optim.SGD(finetuned.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(finetuned(images), labels).backward()
        optimizer.step()

    def accuracy(model):
        return (model(images).argmax(1) == labels).float().mean().item()

    found = {"zeroshot": accuracy(zeroshot), "finetuned": accuracy(finetuned)}
    for keep in (0.9, 0.5, 0.1):
        dare(merged, zeroshot, finetuned, keep)
        found[f"keep {keep}"] = accuracy(merged)
    print(", ".join(f"{name}: {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    result = main()
