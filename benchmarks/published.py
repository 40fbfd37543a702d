"""Published loops over the weights of a model, written out: their operations in their order, none left out.

Forward and backward passes are the caller's: ``evaluate(model)`` stands where the loop measures a loss.
``noise(i, like)`` returns the normal noise of tensor i, so that a check can give a loop the noise of another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Evaluate = Callable[[nn.Module], float]
Noise = Callable[[int, Tensor], Tensor]


def fresh(_index: int, like: Tensor) -> Tensor:
    """Draw noise as the loop of average sharpness does."""
    return torch.randn_like(like)


def average_sharpness(
    model: nn.Module, evaluate: Evaluate, rho: float, draws: int, noise: Noise = fresh
) -> float:
    """Average adaptive sharpness of one batch.

    github.com/tml-epfl/sharpness-vs-generalization at 4a953d39, sharpness.py: eval_average_sharpness with
    norm="l2", adaptive=True. Its own number of draws is 100.
    """
    original = {name: p.clone() for name, p in model.named_parameters()}
    total, elements = 0, 0  # a norm of the weights, which it computes and does not use
    for p in original.values():
        total += p.flatten().norm() ** 2.0 * p.numel()
        elements += p.numel()
    total = (total / elements) ** 0.5
    noisy = copy.deepcopy(model)
    deltas = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        clean, rise = evaluate(model), 0.0
        for _ in range(draws):
            for i, name in enumerate(deltas):
                deltas[name] = noise(i, deltas[name])
            for name in deltas:
                size = original[name].abs()
                deltas[name] *= rho * size
            for name, (_, p) in zip(deltas, noisy.named_parameters()):
                p.data = original[name] + deltas[name]
            rise += evaluate(noisy)
    return rise / draws - clean


def seeded(_index: int, like: Tensor) -> Tensor:
    """Draw noise as MeZO does."""
    return torch.normal(mean=0, std=1, size=like.size(), device=like.device, dtype=like.dtype)


def mezo_perturb(model: nn.Module, scale: float, eps: float, seed: int, noise: Noise = seeded) -> None:
    """Add scale * eps * noise to every parameter.

    github.com/princeton-nlp/MeZO at 6acfd0ba, large_models/trainer.py: zo_perturb_parameters, in place.
    """
    torch.manual_seed(seed)
    for i, (_, p) in enumerate(model.named_parameters()):
        z = noise(i, p.data)
        p.data = p.data + scale * z * eps


def mezo_step(
    model: nn.Module, evaluate: Evaluate, eps: float, lr: float, seed: int, noise: Noise = seeded
) -> None:
    """One step: zo_step and zo_update of the same file, with their default weight decay of 0."""
    decay = 0.0
    mezo_perturb(model, 1, eps, seed, noise)
    above = evaluate(model)
    mezo_perturb(model, -2, eps, seed, noise)
    below = evaluate(model)
    slope = (above - below) / (2 * eps)
    mezo_perturb(model, 1, eps, seed, noise)
    torch.manual_seed(seed)
    for i, (name, p) in enumerate(model.named_parameters()):
        z = noise(i, p.data)
        if "bias" not in name and "layer_norm" not in name and "layernorm" not in name:
            p.data = p.data - lr * (slope * z + decay * p.data)
        else:
            p.data = p.data - lr * (slope * z)


class Sam:
    """The two steps of SAM and ASAM around an optimizer.

    github.com/davda54/sam at 3c3afdbd, sam.py: first_step, second_step, _grad_norm.
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float, adaptive: bool) -> None:
        self.base, self.rho, self.adaptive = base, rho, adaptive
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        norms = [((torch.abs(p) if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.params]
        scale = self.rho / (torch.norm(torch.stack(norms), p=2) + 1e-12)
        for p in self.params:
            self.old[p] = p.data.clone()
            climb = (torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale.to(p)
            p.add_(climb)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.old[p]
        self.base.step()
