"""LiNeS: interpolation by depth (Wang et al. 2024): early layers stay closer to zero-shot than late ones.

    alpha of layer l of L = gamma + beta (l - 1) / (L - 1)

One number for each tensor, in one launch. For checkpoints on disk there is `python -m rft_fast.merge
interpolate` with `--lines`.
"""

import copy

import torch
from torch import nn

import rft_fast as rft


def lines(out, zeroshot, finetuned, layer_of, gamma=0.2, beta=0.8):
    """Write into the model out. layer_of: name of a parameter -> number of its layer, 1 to L."""
    layers = [layer_of(name) for name, _ in out.named_parameters()]
    last = max(max(layers) - 1, 1)
    rft.interpolate_(out, zeroshot, finetuned, [gamma + beta * (layer - 1) / last for layer in layers])


def main():
    torch.manual_seed(0)
    zeroshot = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    finetuned, merged = copy.deepcopy(zeroshot), copy.deepcopy(zeroshot)
    rft.perturb_(finetuned, 0.1, draw=0)

    lines(merged, zeroshot, finetuned, layer_of=lambda name: int(name.partition(".")[0]) + 1)

    moved = []
    for w0, w1, w in zip(zeroshot.parameters(), finetuned.parameters(), merged.parameters(), strict=True):
        moved.append(((w - w0).norm() / (w1 - w0).norm()).item())
    print("share of the way, tensor by tensor:", *(f"{share:.2f}" for share in moved))
    return moved


if __name__ == "__main__":
    result = main()
