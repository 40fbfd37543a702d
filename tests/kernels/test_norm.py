"""``norm``: against float64, and the same bits on every instruction set and number of threads."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from support.wording import refused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rft_fast as rft
from rft_fast.kernels import native
from rft_fast.kernels.contract import DTYPES
from rft_fast.kernels.rows import Row

IMPLS = ["reference", "native"]
WEIGHTS = ("none", "abs", "square")


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (5, 0, 1, 1023, 1025, 70_001)
    found = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    last = torch.randn(3, 4, 5, 7, generator=generator).to(dtype)
    return [*found, last.contiguous(memory_format=torch.channels_last)]


def exact(b: list[Tensor], w: list[Tensor], weight: str) -> float:
    """Correctly rounded sums of products in float64, each within a unit in the last place."""
    factor = {"none": lambda x: 1.0, "abs": abs, "square": lambda x: x * x}[weight]
    squares = []
    for x, y in zip(b, w, strict=True):
        pairs = zip(x.double().flatten().tolist(), y.double().flatten().tolist(), strict=True)
        squares += [(factor(w) * b) ** 2 for b, w in pairs]
    return math.sqrt(math.fsum(squares))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_norm_is_that_of_float64(impl: Any, dtype: torch.dtype, weight: Any) -> None:
    b, w = tensors(1, dtype), tensors(2)
    got = rft.norm(b, None if weight == "none" else w, weight, impl=impl)
    assert got == pytest.approx(exact(b, w, weight), rel=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_beyond_float32_and_of_nothing(impl: Any) -> None:
    """Known answers: products that float32 cannot hold, infinities, NaN, no tensors."""
    large, small = torch.full((3,), 2.0**100), torch.full((4,), 2.0**-140)
    assert rft.norm(large, large, "square", impl=impl) == math.sqrt(3) * 2.0**300
    assert rft.norm(small, small, "abs", impl=impl) == 2.0**-279
    assert Fraction(rft.norm(torch.tensor([3.0, 4.0]), impl=impl)) == 5
    assert rft.norm(torch.tensor([1.0, -math.inf]), impl=impl) == math.inf
    assert math.isnan(rft.norm([torch.ones(9), torch.tensor([math.nan])], impl=impl))
    assert rft.norm([], impl=impl) == 0 and rft.norm(torch.empty(0), impl=impl) == 0


def test_norm_has_the_same_bits_on_any_instruction_set_and_thread_count() -> None:
    b, w = tensors(1), tensors(2)
    rows = [Row(x, x, y, 0, "b") for x, y in zip(b, w, strict=True)]
    assert native._native is not None
    table = native._native.Table([native.as_entry(row) for row in rows])
    for factor in (0, 1, 2):
        assert (
            len({table.squares(factor, threads, isa) for threads in (1, 2, 7) for isa in native.isas()}) == 1
        )


def test_norm_of_containers_and_of_tied_weights() -> None:
    model = nn.Linear(3, 5)
    model(torch.ones(2, 3)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    shuffled = dict(reversed(grads.items()))
    expected = rft.norm(list(grads.values()), model.parameters(), "abs")  # type: ignore[arg-type]
    assert rft.norm(shuffled, model, "abs") == pytest.approx(expected, rel=1e-15)  # type: ignore[arg-type]
    w = torch.ones(4)
    assert rft.norm([w, w]) == math.sqrt(8)
    assert rft.norm(x for x in (w, w)) == math.sqrt(8)


@pytest.mark.parametrize(
    ("arguments", "error", "facts"),
    [
        ({"weight": "cube"}, ValueError, ("weight", "cube")),
        ({"weight": "abs"}, ValueError, ("w", "abs")),
        ({"w": torch.ones(3)}, ValueError, ("w", "none")),
        ({"w": torch.ones(4), "weight": "abs"}, ValueError, ("w", "(4,)")),
        ({"b": [None]}, TypeError, ("b[0]",)),
        ({"b": torch.ones(3).double()}, TypeError, ("float64",)),
        ({"b": torch.ones(6)[::2]}, ValueError, ("b of tensor 0",)),
        ({"impl": "cuda"}, ValueError, ("impl", "cuda")),
    ],
)
def test_what_norm_refuses(arguments: dict[str, Any], error: Any, facts: Any) -> None:
    with refused(error, "norm", *facts):
        rft.norm(**{"b": torch.ones(3), **arguments})


def test_norm_returns_a_number_hence_not_of_fake_tensors() -> None:
    with FakeTensorMode():
        fake = torch.empty(3)
    with refused(RuntimeError, "norm"):
        rft.norm(fake)
