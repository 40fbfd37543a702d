"""A small model for the tests of paths, with weights and buffers of every kind, and its path in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    """Conv, BatchNorm, tied weights, and buffers of every kind."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(11)))
        self.embed: Any = nn.Linear(width, 7, bias=False)
        self.head = nn.Linear(width, 7)
        self.head.weight = self.embed.weight
        self.fixed = nn.BatchNorm1d(7, affine=False)
        self.embed.register_buffer("position_ids", torch.arange(7))
        self.embed.register_buffer("mask", torch.ones(7, dtype=torch.bool))
        self.embed.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x).mean((2, 3))
        out: Tensor = self.fixed(self.head(x) + self.embed(x)) * self.scale
        return out


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random weights everywhere, and other integers for every seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            elif tensor.dtype == torch.bool:
                tensor.fill_(bool(seed % 2))
            else:
                tensor.add_(seed)
    return model


def ends(make: Callable[[], nn.Module] = Net) -> tuple[State, State]:
    return tuple(copy.deepcopy(fill(make(), seed).state_dict()) for seed in (1, 2))  # type: ignore[return-value]


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: State, b: State) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def assert_close(live: nn.Module, expected: State) -> None:
    for name, tensor in live.state_dict().items():
        truth = expected[name]
        torch.testing.assert_close(tensor.to(truth.dtype), truth, rtol=2e-6, atol=2e-6, msg=name)


def between(alpha: float, zeroshot: State, finetuned: State) -> State:
    """Brute force: interpolation in float64, integers from the nearer end."""
    return {
        name: (1 - alpha) * w0.double() + alpha * finetuned[name].double()
        if w0.is_floating_point()
        else (w0 if alpha < 0.5 else finetuned[name])
        for name, w0 in zeroshot.items()
    }


def positive(seed: int) -> State:
    state = copy.deepcopy(fill(Net(), seed).state_dict())
    return {name: tensor.abs() + 0.1 if name.endswith("_var") else tensor for name, tensor in state.items()}
