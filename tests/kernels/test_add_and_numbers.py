"""``add_``, and numbers of each tensor: against float64, closed forms and single calls."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_cuda
from support.wording import refused
from torch import Tensor, nn

import rft_fast as rft
from rft_fast.kernels import Plan, native

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMPLS = [
    "reference",
    "native",
    pytest.param("triton", marks=pytest.mark.emulated),
    pytest.param(tiny_cuda.NAME, marks=[pytest.mark.emulated, pytest.mark.slow]),
]
FACTORS = {"none": torch.ones_like, "abs": torch.abs, "square": torch.square}


@pytest.fixture(autouse=True, scope="module")
def cuda_on_cpu() -> Any:
    with tiny_cuda.offered():
        yield


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def tensors(seed: int, dtypes: Any = (F32,), sizes: Any = (5, 0, 1025, 33, 4100)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = itertools.cycle(dtypes)
    return [torch.randn(n, generator=generator).to(next(kinds)) for n in sizes]


# ---------------------------------------------------------------- add_


def rounded(w: Tensor, b: Tensor, scale: float, weight: str, dtype: torch.dtype) -> Tensor:
    """The definition: every operation rounded to float32, by float64, in which each is exact enough."""

    def once(x: Tensor) -> Tensor:
        return x.float().double()

    w, b = w.double(), b.double()
    scaled = once(once(FACTORS[weight](w)) * torch.tensor(scale).double())
    return (w + once(scaled * b)).float().to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight", FACTORS)
def test_add_is_its_definition(impl: Any, weight: Any) -> None:
    for dtypes in ((F32, F32, F32), (BF16, F32, F16), (F16, F16, F16), (BF16, BF16, BF16)):
        out, w, b = (tensors(i, (dtype,)) for i, dtype in enumerate(dtypes))
        rft.add_(out, w, b, -0.3, weight, impl=impl)
        expected = [rounded(x, y, -0.3, weight, dtypes[0]) for x, y in zip(w, b, strict=True)]
        assert all(torch.equal(a, e) for a, e in zip(out, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_add_in_place_and_with_scale_zero(impl: Any) -> None:
    w, b = tensors(1), tensors(2)
    expected = [x + 0.5 * y for x, y in zip(w, b, strict=True)]
    into_b = [y.clone() for y in b]
    rft.add_(into_b, w, into_b, 0.5, impl=impl)
    same_bits(into_b, expected)
    into_w = [x.clone() for x in w]
    rft.add_(into_w, into_w, b, 0.5, impl=impl)
    same_bits(into_w, expected)
    both = [x.clone() for x in w]
    rft.add_(both, both, both, 0.5, impl=impl)
    same_bits(both, [x + 0.5 * x for x in w])
    special = torch.tensor([-0.0, math.inf, -math.inf, 1e-45, 3.0])
    out = torch.ones(5)
    rft.add_(out, special, torch.tensor([math.inf, math.nan, 1.0, 1.0, 1.0]), 0, "square", impl=impl)
    same_bits([out], [special])
    last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(last)
    rft.add_(out, last, last * 2, 1.0, "abs", impl=impl)
    assert torch.equal(out, last + last.abs() * (last * 2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight", FACTORS)
def test_a_plan_adds_as_add_does(impl: Any, weight: Any) -> None:
    dtypes = ((BF16, F32), (F32,), (F32, F16))
    out, w, b = (tensors(i, d) for i, d in enumerate(dtypes))
    plan = Plan(out, b, w, impl)
    for scale in (-0.3, [0.5, 1.0, 0.0, -2.0, 0.25]):
        expected = [torch.zeros_like(x) for x in out]
        rft.add_(expected, w, b, scale, weight, impl=impl)
        plan.add(0.0)
        plan.add(scale, weight, tensors=[(3, 5), (0, 3)])
        same_bits(out, expected)
        plan.add(0.0)
        plan.add(scale, weight, tensors=[(2, 4)])
        same_bits(out[2:4], expected[2:4])
        same_bits(out[:2], [x.to(o.dtype) for x, o in zip(w[:2], out[:2], strict=True)])


def test_a_plan_adds_in_one_launch_and_refuses_what_add_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    write = native.Table.write
    monkeypatch.setattr(
        native.Table, "write", lambda self, runs, of: calls.append(list(runs)) or write(self, runs, of)
    )
    w = tensors(0)
    plan = Plan(w, w, w)
    version = w[0]._version
    plan.add([0.1, 0.2, 0.3, 0.4, 0.5], "abs")
    assert calls == [[(0, 5)]] and w[0]._version > version
    before = [x.clone() for x in w]
    with refused(ValueError, "add", "weight", "cube"):
        plan.add(1.0, "cube")  # type: ignore[arg-type]
    with refused(ValueError, "add", "scale", 5, 2):
        plan.add([1.0, 2.0], tensors=[(0, 2)])
    with refused(ValueError, "add", "(4, 6)"):
        plan.add(1.0, tensors=[(4, 6)])
    same_bits(w, before)


def test_sam_and_asam_reach_their_published_perturbation() -> None:
    """Foret et al. 2021, Eq. 2; Kwon et al. 2021, Eq. 7 with T_w = |w|: rho T_w^2 g / ||T_w g||."""
    torch.manual_seed(0)
    model = nn.Linear(7, 3)
    model(torch.randn(4, 7)).square().sum().backward()
    w = [p.detach().double() for p in model.parameters()]
    g = [p.grad.double() for p in model.parameters() if p.grad is not None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float((x * x).sum()) for x in g))
    rft.add_(model, before, grads, 0.05 / norm)  # type: ignore[arg-type]
    for p, x, y in zip(model.parameters(), w, g, strict=True):
        assert torch.allclose(p.double(), x + 0.05 * y / norm, rtol=0, atol=1e-7)
    norm = math.sqrt(sum(float((x * y).square().sum()) for x, y in zip(w, g, strict=True)))
    rft.add_(model, before, grads, 0.5 / norm, weight="square")  # type: ignore[arg-type]
    for p, x, y in zip(model.parameters(), w, g, strict=True):
        assert torch.allclose(p.double(), x + 0.5 * x * x * y / norm, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "facts"),
    [
        ({"scale": math.nan}, ValueError, ("scale",)),
        ({"scale": "1"}, TypeError, ("scale",)),
        ({"weight": "cube"}, ValueError, ("weight", "cube")),
        ({"scale": [1.0, 2.0]}, ValueError, ("scale", 2)),
        ({"b": [None]}, TypeError, ("b[0]",)),
        ({"b": torch.ones(4)}, ValueError, ("b", "(4,)")),
        ({"w": torch.ones(3).double()}, TypeError, ("w of tensor 0", "float64")),
        ({"out": torch.ones(6)[::2]}, ValueError, ("out of tensor 0",)),
    ],
)
def test_what_add_refuses(arguments: Any, error: Any, facts: Any) -> None:
    usual = {"out": torch.ones(3), "w": torch.ones(3), "b": torch.ones(3), "scale": 1.0}
    with refused(error, "add_", *facts):
        rft.add_(**{**usual, **arguments})
    room = torch.ones(5)
    with pytest.raises(ValueError, match=r"b of tensor 0 overlaps|overlaps b of tensor 0"):
        rft.add_(room[:3], torch.ones(3), room[2:], 1.0)


# ---------------------------------------------------------------- numbers of each tensor

COUNT = 5
LISTS: list[dict[str, Any]] = [
    {"alpha": [0.0, 0.3, 0.5, 0.8, 1.0]},
    {"alpha": 0.7, "rho": [0.0, 0.1, 0.2, 0.0, 1e-50]},
    {"alpha": [0.0, 1.0, 0.4, 1.0, 0.6], "rho": [0.1, 0.0, 0.2, 0.3, 0.0], "on": "interpolated"},
    {"alpha": 1.0, "keep": [0.0, 1.0, 0.5, 0.9, 1.0], "fill": "zeroshot", "seed": 2**63 + 1},
    {
        "alpha": [0.0, 0.9, 1.0, 1.0, 0.2],
        "rho": [0.5, 0.0, 0.1, 0.1, 0.2],
        "keep": [0.5, 0.5, 1, 0, 1],
        "draw": 7,
    },
    {"alpha": [0.2] * 5, "rho": [0.1] * 5, "keep": [0.5] * 5, "adaptive": False, "sign": -1},
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("numbers", LISTS)
def test_each_tensor_gets_the_bits_of_a_call_with_its_numbers(impl: Any, numbers: dict[str, Any]) -> None:
    dtypes = ((F32,), (F32,), (F32, BF16))
    out, w0, w1 = (tensors(i, d, (6, 0, 1029, 2300, 35)) for i, d in enumerate(dtypes))
    w1[2][:4] = torch.tensor([-0.0, math.inf, math.nan, 1e-45])
    w0[3][:2] = torch.tensor([-0.0, -math.inf])
    at = rft.offsets(out)
    rft.write_(out, w0, w1, noise="uniform", **numbers, impl=impl)
    plan_out = [torch.zeros_like(x) for x in out]
    plan = Plan(plan_out, w0, w1, impl)
    plan.write(noise="uniform", tensors=[(3, 5), (0, 3)], **numbers)
    for i in range(COUNT):
        own = {k: v[i] if isinstance(v, list) else v for k, v in numbers.items()}
        single = torch.zeros_like(out[i])
        rft.write_(single, w0[i], w1[i], noise="uniform", offset=at[i], **own, impl=impl)
        same_bits([out[i], plan_out[i]], [single, single])


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_of_each_tensor(impl: Any) -> None:
    scales = [0.5, 1.0, 0.0, -2.0, 0.25]
    w, b = tensors(1), tensors(2)
    w[2][0] = -0.0
    out = [torch.zeros_like(x) for x in w]
    rft.add_(out, w, b, scales, "abs", impl=impl)
    for i, scale in enumerate(scales):
        single = torch.zeros_like(out[i])
        rft.add_(single, w[i], b[i], scale, "abs", impl=impl)
        same_bits([out[i]], [single])


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_of_each_tensor_in_other_layouts(impl: Any) -> None:
    w = [
        torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(7),
        torch.randn(5, 6).T,
    ]
    at = rft.offsets(w)
    together, alone = [x.clone() for x in w], [x.clone() for x in w]
    rft.perturb_(together, [0.1, 0.0, 0.2], draw=1, noise="uniform", impl=impl)
    for x, rho, offset in zip(alone, [0.1, 0.0, 0.2], at, strict=True):
        rft.perturb_(x, rho, draw=1, noise="uniform", offset=offset, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_lists_of_numbers_are_one_call_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    write = native.Table.write
    monkeypatch.setattr(
        native.Table,
        "write",
        lambda self, runs, request: calls.append(list(runs)) or write(self, runs, request),
    )
    w = tensors(0)
    rft.perturb_(w, [0.1, 0.2, 0.3, 0.4, 0.5], draw=0)
    rft.keep_mask_like(w, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert calls == [[(0, 5)], [(0, 5)]]


def test_lists_of_numbers_may_hold_those_of_numpy_and_torch() -> None:
    w, scales = tensors(0), [0.1, 0.2, 0.3, 0.4, 0.5]
    expected = [torch.empty_like(x) for x in w]
    rft.add_(expected, w, w, scales)
    for given in (np.array(scales), torch.tensor(scales).double(), [np.array(s) for s in scales]):
        out = [torch.empty_like(x) for x in w]
        rft.add_(out, w, w, given)  # type: ignore[arg-type]
        same_bits(out, expected)


def test_lists_of_numbers_that_are_refused() -> None:
    w = tensors(0)
    with refused(ValueError, "write", "alpha", 5, 2):
        rft.write_(w, w, w, [0.5, 0.5])
    with refused(ValueError, "perturb_", "rho", "tensor 3"):
        rft.perturb_(w, [0.1, 0.1, 0.1, -1, 0.1], draw=0)
    with refused(TypeError, "keep_mask_like", "keep", "tensor 1"):
        rft.keep_mask_like(w, [0.1, "all", 0.1, 1, 0.1])  # type: ignore[list-item]
    with refused(TypeError, "write", "alpha", "tensor 0"):
        rft.write_(w, w, w, [[0.1]] * 5)  # type: ignore[list-item]
    plan = Plan(w, w, w)
    with refused(ValueError, "rho", 5, 2):
        plan.write(0.5, rho=[0.1, 0.2], tensors=[(0, 2)])
