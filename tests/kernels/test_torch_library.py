"""The operator that torch.compile, torch.export, make_fx and fake tensors see has the bits of eager calls."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.wording import refused
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

import rft_fast as rft
from rft_fast.kernels import Plan, Write, library
from rft_fast.kernels.contract import DTYPES

pytestmark = pytest.mark.compile

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
F32, BF16, F16 = DTYPES
OPERATOR = torch.ops.rft_fast.write_.default
# alpha to impl of an operator's call
NUMBERS = (0.3, 0.1, "finetuned", 0.5, "zero", "normal", True, 2**32 - 1, 7, 3, -1, "auto")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def random(*shape: int, dtype: torch.dtype = F32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def same(got: object, expected: object) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def operators(graph: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


# ---------------------------------------------------------------- torch's own checks


def one(w: Callable[[int], Tensor]) -> tuple[Any, ...]:
    return [w(0)], [w(1)], [w(2)]


def several(w: Callable[[int], Tensor]) -> tuple[Any, ...]:
    """Each combination of in place and not, and an empty tensor; row 0's sources are one tensor."""
    shared = w(1)
    out = [w(i) for i in range(4)] + [w(4)[:0]]
    return out, [shared, None, w(5), None, w(6)[:0]], [shared, w(7), None, None, w(8)[:0]]


def perturbed(w: Callable[[int], Tensor]) -> tuple[Any, ...]:
    return [w(0), w(1)], [None, None], [None, None]


def parameters(w: Callable[[int], Tensor]) -> tuple[Any, ...]:
    return [w(0).requires_grad_()], [w(1)], [w(2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensors", [one, several, perturbed, parameters, lambda w: ([], [], [])])
def test_opcheck(tensors: Any, dtype: torch.dtype, device: str) -> None:
    out, *sources = tensors(lambda seed: random(13, dtype=dtype, device=device, seed=seed))
    torch.library.opcheck(OPERATOR, (out, *sources, *NUMBERS))
    torch.library.opcheck(OPERATOR, (out, *sources, *NUMBERS, [5 * i for i in range(len(out))]))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_lists_of_numbers_and_of_other_layouts(device: str) -> None:
    w = [
        random(3, 4, 2, 2, device=device, seed=i).contiguous(memory_format=torch.channels_last)
        for i in range(3)
    ]
    out, nothing = [w[0], random(5, device=device)], [None, None]
    numbers = list(NUMBERS)
    torch.library.opcheck(OPERATOR, (out, nothing, nothing, *numbers, [4, 90], [0.1, 0.2], None, [0.5, 1.0]))
    torch.library.opcheck(OPERATOR, ([w[0]], [w[1]], [w[2]], *numbers))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensors", [one, several, perturbed, parameters, lambda w: ([], [], [])])
def test_opcheck_of_add(tensors: Any, dtype: torch.dtype, device: str) -> None:
    out, *sources = tensors(lambda seed: random(13, dtype=dtype, device=device, seed=seed))
    operator = torch.ops.rft_fast.add_.default
    torch.library.opcheck(operator, (out, *sources, [0.3] * len(out), "square", "auto"))


# ---------------------------------------------------------------- torch.compile


def everything(out: list[Tensor], w0: list[Tensor], w1: list[Tensor], seed: int) -> object:
    """Every function, with tensors read before and after they are written, and views of them."""
    # Of minimum and maximum no order of reading changes a bit; of a sum it may.
    before, view = out[0].aminmax(), out[0].view(-1)
    rft.write_(out, w0, w1, 0.3, 0.1, seed=seed, draw=4, keep=0.9)
    between, view = out[0] * 2, view + 1
    rft.perturb_(out[1], 0.1, seed=seed, noise="uniform", draw=0)
    rft.interpolate_(w1, w0, w1, 0.4)
    after = out[0] + w1[0], out[1].detach()
    return before, between, view, after, rft.noise_like(w0, seed=seed), rft.keep_mask_like(w0[1], 0.5, seed)


@pytest.mark.slow(only="^(inductor-dtype0-cpu|inductor-dtype1-cpu|inductor-dtype2-cpu)$")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_does_what_eager_code_does(backend: str, dtype: torch.dtype, device: str) -> None:
    def tensors() -> list[list[Tensor]]:
        kinds = {"dtype": dtype, "device": device}
        return [[random(37, seed=i, **kinds), random(5, 3, seed=9 + i, **kinds)] for i in range(3)]  # type: ignore[arg-type]

    for seed in (0, 2**64 - 1):
        expected, got = tensors(), tensors()
        expected_values = everything(*expected, seed)
        got_values = compiled(everything, backend)(*got, seed)
        same((got, got_values), (expected, expected_values))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICES == ["cpu"], reason="there is no GPU")
def test_compiled_code_that_is_captured_in_cuda_graphs() -> None:
    """The compiler must keep the operator out of its graphs, whose capture would refuse it."""

    def step(w: Tensor, x: Tensor) -> Tensor:
        y = (x * w).relu() + 1
        rft.perturb_(w, 0.1, seed=3, draw=0)
        return y * w

    x = random(64, device="cuda")
    got, expected = random(64, device="cuda", seed=1), random(64, device="cuda", seed=1)
    compiled_step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):  # capture begins after some calls
        same(compiled_step(got, x).clone(), step(expected, x))
        same(got, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_offsets_lists_and_containers(backend: str) -> None:
    def work(named: dict[str, Tensor], vector: list[Tensor], last: Tensor) -> object:
        rft.perturb_(named, [0.1, 0.2], draw=3, offset=[40, 0])
        rft.add_(list(named.values()), list(named.values()), vector, 0.5, weight="abs")
        rft.write_(last, last, last, 0.3, 0.1, offset=8)
        eps = rft.noise_like(named, offset=4)
        return eps, rft.keep_mask_like(vector, [0.2, 0.7], offset=16), last * 2

    results = []
    for function in (work, compiled(work, backend)):
        named = {"a": random(9), "b": random(3, 2, seed=1)}
        vector = [random(9, seed=2), random(3, 2, seed=3)]
        last = random(2, 3, 4, 4, seed=4).contiguous(memory_format=torch.channels_last)
        results.append((function(named, vector, last), named, vector, last))
    same(results[1], results[0])


def test_what_add_refuses_while_compiling() -> None:
    w = random(4)
    for arguments in ({"scale": 1.0, "weight": "cube"}, {"scale": math.nan}, {"scale": [1.0, 2.0]}):
        with refused(Exception, next(reversed(arguments))):
            compiled(lambda: rft.add_(w, w, w, **arguments), "eager")()  # type: ignore[arg-type] # noqa: B023
    with FakeTensorMode():
        fake = torch.empty(4)
        rft.add_(fake, fake, fake, 1.0)
        with refused(ValueError, "cube"):
            rft.add_(fake, fake, fake, 1.0, weight="cube")  # type: ignore[arg-type]


def test_another_seed_or_draw_compiles_nothing() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    write = compiled(lambda w, seed, draw: rft.perturb_(w, 0.1, seed=seed, draw=draw), counter)  # type: ignore[arg-type]
    for seed, draw in ((0, 0), (5, 6), (7, 2**32 - 1), (2**62, 9), (2**63, 3), (2**64 - 1, 4)):
        got, expected = random(9), random(9)
        write(got, seed, draw)
        rft.perturb_(expected, 0.1, seed=seed, draw=draw)
        same(got, expected)
    assert counter.frame_count <= 2  # constants at first, numbers from then on


def test_sizes_unknown_while_compiling() -> None:
    write = torch.compile(
        lambda w: rft.perturb_(w, 0.1, draw=0), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (5, 8, 13):
        got, expected = [[random(size), random(2 * size)] for _ in range(2)]
        write(got)
        rft.perturb_(expected, 0.1, draw=0)
        same(got, expected)


def test_a_source_that_is_a_view_of_the_output() -> None:
    def write(w: Tensor, other: Tensor) -> Tensor:
        rft.write_(w, other, w.detach(), 0.7, 0.1)
        return w + 1

    results = []
    for function in (write, compiled(write)):
        w = random(11)
        results.append((function(w, random(11, seed=1)), w))
    same(results[1], results[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autograd_sees_the_write(backend: str) -> None:
    def write_first(w: Tensor, x: Tensor) -> Tensor:
        rft.perturb_(w, 0.1, draw=0)
        return (w * x).sum()

    def write_last(w: Tensor, x: Tensor) -> Tensor:
        loss = (w * x).sum()
        rft.perturb_(w, 0.1, draw=0)
        return loss

    w, x = nn.Parameter(torch.ones(10)), torch.full((10,), 2.0, requires_grad=True)
    version = w._version
    compiled(write_first, backend)(w, x).backward()
    same((w.grad, x.grad), (x.detach(), w.detach()))
    assert w.is_leaf and w._version > version and not torch.equal(w, torch.ones(10))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(write_last, backend)(w, x).backward()


@pytest.mark.parametrize("how", ["write", "submit", "submit each"])
def test_a_plan_inside_compiled_code(how: str) -> None:
    """A row's noise stays where the whole table has it, whichever rows are written."""

    other = Write(0.7, 0.1, keep=0.9, seed=2**64 - 1)

    def write(plan: Plan, request: Write, draw: int) -> None:
        if how == "submit":
            plan.submit(request, [(1, 3)])
        elif how == "submit each":
            plan.submit([request, request, other, request], [(1, 3)])
        else:
            plan.write(0.4, tensors=[(1, 2), (2, 3)], rho=0.1, draw=draw)

    results = []
    for function in (write, compiled(write)):
        out = [torch.zeros(n) for n in (5, 6, 7, 8)]
        w0, w1 = ([random(n, seed=n + s) for n in (5, 6, 7, 8)] for s in (0, 10))
        plan = Plan(out, w0, w1)
        for draw in range(3):
            function(plan, Write(0.3, 0.1, keep=0.5, seed=2**64 - 1), draw)
        results.append(out)
    same(results[1], results[0])
    assert not results[0][0].any() and results[0][1].any()
    with refused(Exception):
        compiled(lambda: plan.write(0.4, tensors=[(0, 5)]))()


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": math.nan},
        {"alpha": "half"},
        {"rho": -0.1},
        {"keep": 1.1},
        {"on": "both"},
        {"fill": "mean"},
        {"noise": "cauchy"},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"draw": 2**32},
        {"sign": 0},
        {"impl": "cuda"},
        {"finetuned": torch.zeros(4)},
        {"finetuned": torch.zeros(3, dtype=torch.float64)},
        {"finetuned": torch.zeros(6)[::2]},
        {"finetuned": torch.zeros(3, device="meta")},
        {"finetuned": [torch.zeros(3)] * 2},
    ],
)
def test_refusals_while_compiling_name_the_argument(arguments: dict[str, Any]) -> None:
    w = torch.full((3,), 7.0)
    request = {"zeroshot": torch.zeros(3), "finetuned": torch.zeros(3), "alpha": 0.5, **arguments}
    with refused(Exception):
        compiled(lambda: rft.write_(w, **request), "eager")()
    assert (w == 7).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_plan_adds(backend: str) -> None:
    def add(plan: Plan) -> None:
        plan.add([0.1, 0.2, 0.3], "abs", tensors=[(0, 1), (2, 3)])

    results = []
    for function in (add, compiled(add, backend)):
        out = [torch.zeros(n) for n in (5, 6, 7)]
        w, b = ([random(n, seed=n + s) for n in (5, 6, 7)] for s in (0, 10))
        plan = Plan(out, b, w)
        function(plan)
        results.append(out)
    same(results[1], results[0])
    assert not results[0][1].any() and results[0][2].any()


def test_refusals_of_traced_code_name_the_tensors() -> None:
    with FakeTensorMode():
        a = {"conv1": torch.empty(2), "head": torch.empty(3)}
        b = {"conv1": torch.empty(2), "head": torch.empty(4)}
    for call in (
        lambda: rft.interpolate_(a, b, a, 0.5),
        lambda: rft.add_(a, a, b, 0.5),
    ):
        with refused(ValueError, "head"):
            call()
    real, other = {"head": torch.ones(3)}, {"head": torch.ones(4)}
    with pytest.raises(Exception, match="shapes differ for head"):
        compiled(lambda: rft.interpolate_(real, other, real, 0.5), "eager")()


@pytest.mark.parametrize("number", [torch.tensor(0.5), torch.tensor([0.5])], ids=["single", "list"])
@pytest.mark.parametrize("name", ["alpha", "rho", "keep", "scale"])
def test_numbers_in_tensors_are_refused_while_tracing(name: str, number: Tensor) -> None:
    """Their values are not known then. Eager calls take them."""
    w = torch.full((3,), 7.0)

    def call(number: Any) -> None:
        if name == "scale":
            rft.add_(w, w, w, number)
        else:
            rft.write_(w, w, w, **{"alpha": 0.5, name: number})

    with pytest.raises(Exception, match=rf"{name} is a tensor.*{name}\.item\(\)"):
        compiled(call, "eager")(number)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(number)
        w = torch.empty(3)
    with refused(TypeError, name):
        call(fake)
    w = torch.ones(3)
    call(number)


def test_a_number_known_only_when_it_runs_is_refused_then() -> None:
    write = compiled(lambda w, draw: rft.perturb_(w, 0.1, draw=draw))
    w = random(5)
    for draw in (0, 1, 2):
        write(w, draw)
    before = w.clone()
    with refused(ValueError, "0", "2**32", "-1"):
        write(w, -1)
    same(w, before)


# ---------------------------------------------------------------- fake tensors, meta tensors, graphs


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        fake = torch.empty(3, 5, dtype=BF16, device="cuda")  # of a GPU that need not be there
    rft.perturb_(fake, 0.1, draw=0)
    eps, mask = rft.noise_like([fake]), rft.keep_mask_like(fake, 0.5)
    assert (eps[0].dtype, mask.dtype) == (F32, torch.bool)
    assert eps[0].shape == mask.shape == fake.shape and eps[0].device == mask.device == fake.device
    with refused(ValueError):
        rft.write_(fake, fake, fake, 0.5, keep=2)
    with mode, refused(ValueError):
        rft.interpolate_(fake, fake, torch.empty(3, dtype=BF16, device="cuda"), 0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": "1"}, {"seed": True}, {"seed": 2**64}, {"seed": -1}, {"seed": 1.0}, {"draw": 2**70},
        {"draw": True}, {"adaptive": 2}, {"alpha": "0.5"}, {"alpha": 10**400}, {"rho": -1}, {"sign": 0},
        {"keep": None}, {"on": 3}, {"impl": "cuda"},
    ],
)  # fmt: skip
def test_numbers_are_refused_by_fake_tensors_as_by_real_ones(arguments: dict[str, Any]) -> None:
    request = {"alpha": 0.5, **arguments}
    with FakeTensorMode():
        fake = torch.empty(3)
    raised = []
    for w in (torch.zeros(3), fake):
        with refused((TypeError, ValueError)) as info:
            rft.write_(w, w, w, **request)
        raised.append((type(info.value), str(info.value)))
    with pytest.raises(raised[0][0]) as info, FakeTensorMode():
        rft.write_(torch.empty(3), torch.empty(3), torch.empty(3), **request)
    assert raised == [(type(info.value), str(info.value))] * 2


def test_numbers_of_other_types_mean_the_same_to_fake_tensors() -> None:
    numbers = {"alpha": np.float32(0.5), "seed": np.int64(3), "adaptive": np.bool_(True), "sign": 1.0}
    with FakeTensorMode():
        fake = torch.empty(3)
    for w in (torch.zeros(3), fake):
        rft.write_(w, w, w, rho=1, **numbers)  # type: ignore[arg-type]
    plan = Plan(w := random(9), w, w)
    expected = w.clone()
    rft.write_(expected, expected, expected, rho=1, **numbers)  # type: ignore[arg-type]
    make_fx(lambda: plan.write(rho=1, **numbers))()  # type: ignore[arg-type]
    same(w, expected)


def test_a_generator_of_tensors() -> None:
    model = nn.Linear(3, 5)
    before = [p.detach().clone() for p in model.parameters()]
    expected = [p.clone() for p in before]
    rft.perturb_(expected, 0.1, draw=0)
    compiled(lambda: rft.perturb_(model.parameters(), 0.1, draw=0))()
    same([p.detach() for p in model.parameters()], expected)
    with FakeTensorMode():
        fakes = [torch.empty(3), torch.empty(4)]
    assert [eps.shape for eps in rft.noise_like(fake for fake in fakes)] == [(3,), (4,)]
    with refused(ValueError, "1"):
        rft.interpolate_(iter(fakes), iter(fakes), [fakes[0], fakes[0]], 0.5)


def test_memory_that_was_freed_is_refused() -> None:
    """Also by way of the operator, as for FSDP's parameters, whose class is their own."""

    class Flat(nn.Parameter):
        pass

    flat = Flat(torch.ones(5))
    rft.perturb_(flat, 0.1, draw=0)
    flat.untyped_storage().resize_(0)
    with refused(ValueError, "0"):
        rft.perturb_(flat, 0.1, draw=0)


def test_meta_tensors() -> None:
    """The operator checks and does nothing, as torch's do; an eager call would leave weights unwritten."""
    meta = torch.empty(5, device="meta")
    OPERATOR([meta], [None], [None], *NUMBERS)
    with refused(ValueError):
        OPERATOR([meta], [None], [torch.empty(4, device="meta")], *NUMBERS)
    with refused(RuntimeError):
        rft.perturb_(meta, 0.1, draw=0)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_write(tracing_mode: str) -> None:
    w = random(9)
    plan = Plan(w, w, w)

    def write(out: Tensor, source: Tensor) -> Tensor:
        rft.write_(out, out, source, 0.3, 0.1, seed=2**63)
        if tracing_mode == "real":
            plan.write(0.3, rho=0.1)
        return out * 2

    graph = make_fx(write, tracing_mode=tracing_mode)(random(9), random(9, seed=1))
    assert operators(graph).count(OPERATOR) == (2 if tracing_mode == "real" else 1)
    if tracing_mode != "real":
        results = []
        for function in (write, graph):
            out = random(9, seed=2)
            results.append((function(out, random(9, seed=3)), out))
        same(results[1], results[0])


def test_export() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * rft.noise_like(x, seed=2**64 - 1)

    program = torch.export.export(Model(), (random(9),))
    same(program.module()(random(9, seed=1)), Model()(random(9, seed=1)))


# ---------------------------------------------------------------- what eager code pays


def test_eager_calls_go_straight_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("an eager call went through the operator")

    monkeypatch.setattr(library, "write_", refuse)
    w = nn.Parameter(random(9))
    rft.write_(w, w, [random(9)], 0.5)
    rft.perturb_([w], 0.1, draw=0)
    rft.noise_like(w)
    rft.keep_mask_like(w, 0.5)
    plan = Plan(w, w, w)
    plan.write(0.5)
    plan.submit(Write(0.5))


@pytest.mark.slow
def test_importing_the_package_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, rft_fast\n"
        "rft_fast.perturb_(torch.ones(3), 0.1, draw=0)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_write_of_a_tree() -> None:
    """The functions keep a list's order and one tensor's bareness in compiled code, too."""
    tensors = [random(3), random(4)]
    functions = (lambda: rft.noise_like(tensors), lambda: rft.noise_like(tensors[0]))
    for function in functions:
        got, expected = compiled(function)(), function()
        assert tree_map(type, got) == tree_map(type, expected)
        same(got, expected)
