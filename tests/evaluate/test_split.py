"""Split products against float64: numbers, derivatives, which products of a model are split, whole models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny_models import dataset, deep, plain, resnet, shaken, toy, transformer, two_towers
from support.wording import refused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rft_fast import studies
from rft_fast.common import meter
from rft_fast.evaluate import Evaluator, splitting
from rft_fast.evaluate.precision import cast, check, exact
from rft_fast.evaluate.split import halves, product
from rft_fast.evaluate.stages.tokens import attend
from rft_fast.path import Path
from rft_fast.studies import Protocol

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = 2.0**-16  # of an operand
FLOAT = 2.0**-22  # what sums of float32 add here, relative to the sum of absolute terms


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, a: Tensor, b: Tensor) -> None:
    """Within the bound of the products of halves: three steps of each term, and float32 sums."""
    bound = (3 * STEP + FLOAT) * (a.double().abs() @ b.double().abs())
    assert found.dtype == torch.float32
    assert ((found.double() - a.double() @ b.double()).abs() <= bound).all()


# --- numbers --------------------------------------------------------------------------------------


def test_halves_leave_a_sixty_five_thousandth() -> None:
    x = random(20_000) * torch.exp2(random(20_000, seed=1) * 9)
    hi, lo = halves(x)
    assert hi.dtype == lo.dtype == torch.bfloat16
    rest = x.double() - hi.double() - lo.double()
    assert (rest.abs() <= STEP * x.double().abs()).all() and rest.abs().max() > 0
    # The bound is nearly reached, so it is no loose one.
    assert (rest / x.double()).abs().max() > STEP / 8


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-25])
def test_numbers_of_sixteen_bits_are_exact(scale: float) -> None:
    whole = torch.arange(-(2**15), 2**15, 7).float() * 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    hi, lo = halves(whole)
    assert torch.equal(hi.float() + lo.float(), whole)


def test_closed_cases_where_bfloat16_fails() -> None:
    """bfloat16 has 8 bits: 257 is 256 there, and 1 + 2**-10 is 1."""
    for a, b, truth in (
        ([[257.0, -256.0]], [[1.0], [1.0]], 1.0),
        ([[1 + 2**-10, -1.0]], [[1024.0], [1024.0]], 1.0),
        ([[300.5, 1.0]], [[3.0], [-901.0]], 0.5),
        ([[2**-12 + 2**-3, -(2**-3)]], [[4096.0], [4096.0]], 1.0),
    ):
        left, right = torch.tensor(a), torch.tensor(b)
        assert product(left, right).item() == truth
        assert (left.bfloat16().float() @ right.bfloat16().float()).item() != truth


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 33), (33, 7)),
    ((2, 5, 33), (33, 7)),
    ((2, 3, 5, 33), (33, 7)),
    ((3, 5, 33), (3, 33, 7)),
    ((2, 3, 5, 33), (2, 3, 33, 7)),
    ((0, 4), (4, 3)),
    ((1, 1), (1, 1)),
    ((2, 0), (0, 3)),
]


@pytest.mark.parametrize("scale", [1.0, 2.0**60, 2.0**-60])
@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_products_are_within_the_bound(first: tuple[int, ...], second: tuple[int, ...], scale: float) -> None:
    a, b = scale * random(*first), random(*second, seed=1)
    assert product(a, b).shape == (a @ b).shape
    assert_near(product(a, b), a, b)


def test_errors_are_between_those_of_bfloat16_and_float32() -> None:
    a, b = random(64, 256), random(256, 64, seed=1)
    truth = a.double() @ b.double()
    size = truth.std()
    off = [
        ((x.double() - truth).std() / size).item()
        for x in (product(a, b), a.bfloat16() @ b.bfloat16(), a @ b)
    ]
    assert off[0] < 1e-5 and off[1] > 1e-3 and off[2] < 1e-6 < off[0]


def test_other_types_are_multiplied_as_they_are() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        a, b = random(3, 4).to(dtype), random(4, 5, seed=1).to(dtype)
        assert torch.equal(product(a, b), a @ b)


# --- derivatives, images of their own -------------------------------------------------------------


@pytest.mark.parametrize("second", [(6, 3), (2, 6, 3)])
def test_gradients_are_those_of_float64(second: tuple[int, ...]) -> None:
    a, b, weight = random(2, 5, 6), random(*second, seed=1), random(2, 5, 3, seed=2)
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    truths = [x.double().requires_grad_() for x in (a, b)]
    found = torch.autograd.grad((product(*leaves) * weight).sum(), leaves)
    wanted = torch.autograd.grad((torch.matmul(*truths) * weight).sum(), truths)
    for got, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=4 * STEP * float(truth.abs().max()))
        assert got.dtype == torch.float32


def test_products_with_the_hessian_are_those_of_float64() -> None:
    def second(a: Tensor, b: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        loss = multiply(multiply(a, b).tanh(), b.mT).square().mean()
        (slope,) = torch.autograd.grad(loss, b, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), b)[0]

    a, b = random(5, 6), random(6, 4, seed=1)
    found = second(a, b.clone().requires_grad_(), product)
    truth = second(a.double(), b.double().requires_grad_(), torch.matmul)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0), (0, 0), (2, 1)])
@pytest.mark.parametrize("many", [False, True])
def test_vmap_is_one_by_one(dims: tuple[int | None, int | None], many: bool) -> None:
    a, b = ((5, 6), (6, 3)) if not many else ((2, 5, 6), (2, 6, 3))
    shapes = [list(a), list(b)]
    for shape, dim in zip(shapes, dims, strict=True):
        if dim is not None:
            shape.insert(dim, 4)
    left, right = random(*shapes[0]), random(*shapes[1], seed=1)
    found = torch.vmap(product, dims)(left, right)
    for i in range(4):
        one = [x if d is None else x.select(d, i) for x, d in zip((left, right), dims, strict=True)]
        assert_near(found[i], *one)
        torch.testing.assert_close(found[i], product(*one), rtol=0, atol=1e-6)


# --- which products are split ---------------------------------------------------------------------


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """The shapes of the operands of split products, in the order of the calls."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.shape, b.shape))
        return product(a, b)

    monkeypatch.setattr(splitting, "product", recorded)
    return seen


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


# Name -> module, input, how many products are split.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(12, 5), (3, 4, 12), 1),
    "linear of one": (lambda: nn.Linear(12, 5, bias=False), (12,), 1),
    "patches": (lambda: nn.Conv2d(3, 5, 4, 4), (2, 3, 9, 12), 1),
    "patches without bias": (lambda: nn.Conv2d(3, 5, (2, 3), (2, 3), bias=False), (2, 3, 9, 9), 1),
    "overlapping": (lambda: nn.Conv2d(3, 5, 3, 2), (2, 3, 9, 9), 0),
    "padded": (lambda: nn.Conv2d(3, 5, 3, 3, padding=1), (2, 3, 9, 9), 0),
    "groups": (lambda: nn.Conv2d(4, 4, 2, 2, groups=2), (2, 4, 8, 8), 0),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_within_the_bound(name: str, split: list[Any]) -> None:
    make, shape, count = MODULES[name]
    module, x = seeded(make), random(*shape, seed=1)
    with torch.no_grad(), splitting.splitting():
        found = module(x)
    assert len(split) == count
    truth = module.double()(x.double())
    assert found.shape == truth.shape and found.is_contiguous()
    assert (found.double() - truth).abs().max() <= 3 * STEP * truth.abs().max()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", [None, "float", "bool", "of heads"])
def test_the_projections_of_attention_are_split(
    batch_first: bool, mask: str | None, split: list[Any]
) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    length = 4 if batch_first else 2
    above = torch.ones(length, length).triu(1).bool()
    hidden = torch.zeros(length, length).masked_fill(above, -torch.inf)
    masks = {"float": hidden, "bool": above, "of heads": hidden.expand(3 * (6 - length), -1, -1)}
    given = masks.get(mask or "")
    x = random(2, 4, 12, seed=1)
    with torch.no_grad(), splitting.splitting():
        found = module(x, x, x, attn_mask=given, need_weights=False)[0]
    assert [b for _, b in split] == [(12, 36), (12, 12)]  # and neither Q K^T nor P V
    double = given if given is None or given.dtype == torch.bool else given.double()
    y = x.double()
    truth = module.double()(y, y, y, attn_mask=double, need_weights=False)[0]
    assert (found.double() - truth).abs().max() <= 4 * STEP * truth.abs().max()


def test_attention_to_something_else(split: list[Any]) -> None:
    torch.manual_seed(0)
    for how in ({}, {"kdim": 5, "vdim": 7}, {"bias": False}):
        module = nn.MultiheadAttention(12, 3, batch_first=True, **how).eval()  # type: ignore[arg-type]
        q, k, v = (random(2, 4, n, seed=n) for n in (12, how.get("kdim", 12), how.get("vdim", 12)))
        split.clear()
        with torch.no_grad(), splitting.splitting():
            found = module(q, k, v, need_weights=False)[0]
        assert len(split) == 4
        truth = module.double()(q.double(), k.double(), v.double(), need_weights=False)[0]
        assert (found.double() - truth).abs().max() <= 4 * STEP * truth.abs().max()


def test_attention_that_returns_its_weights_stays_float32(split: list[Any]) -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(12, 3).eval(), random(2, 4, 12)
    with torch.no_grad():
        with splitting.splitting():
            found = module(x, x, x)
        wanted = module(x, x, x)
    assert not split and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_one_token(bias: bool, split: list[Any]) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).eval()
    shaken(module)
    weights = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    x = random(2, 4, 12, seed=1)
    with torch.no_grad(), splitting.splitting():
        found = attend(x[:, 1:2], x, *weights, 3)
    assert len(split) == 4
    y = x.double()
    truth = module.double()(y[:, 1:2], y, y, need_weights=False)[0]
    assert (found.double() - truth).abs().max() <= 4 * STEP * truth.abs().max()


def test_only_products_with_a_matrix_are_split(split: list[Any]) -> None:
    x, weight = random(2, 5, 6), random(6, 3, seed=1)
    with splitting.splitting():
        for found in (x @ weight, torch.matmul(x, weight), torch.mm(x[0], weight), x[0].mm(weight)):
            assert found.shape[-1] == 3
        assert len(split) == 4
        assert torch.equal(x @ x.mT, torch.bmm(x, x.mT)) and len(split) == 4
        F.scaled_dot_product_attention(x, x, x)
        assert torch.equal(x.double() @ weight.double(), torch.matmul(x.double(), weight.double()))
    assert len(split) == 4
    _ = x @ weight
    assert len(split) == 4


# --- states ---------------------------------------------------------------------------------------


def modes() -> int:
    return torch._C._len_torch_function_stack()


def test_states_are_given_back() -> None:
    assert not splitting.is_splitting() and modes() == 0
    with exact("bf16x3"):
        assert splitting.is_splitting() and modes() == 1
        with exact("bf16x3"):
            assert splitting.is_splitting() and modes() == 1
        with exact("fp32"):
            assert not splitting.is_splitting()
        assert splitting.is_splitting()
    with contextlib.suppress(ZeroDivisionError), exact("bf16x3"):
        _ = 1 / 0
    assert not splitting.is_splitting() and modes() == 0


def test_nothing_is_split_within_float32_within_split(split: list[Any]) -> None:
    x, weight = random(5, 6), random(6, 3, seed=1)
    with exact("bf16x3"), exact("fp32"):
        assert torch.equal(x @ weight, torch.mm(x, weight)) and not split


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_batches_side_by_side_are_split_too(split: list[Any]) -> None:
    data = dataset(count=64)
    evaluator = Evaluator(deep(), [data], batch_size=8, precision="bf16x3")
    workers = evaluator.runtime.images.workers  # which measures the memory of batches first
    assert workers(8, 8) == 1
    split.clear()
    alone = evaluator.scores()["set"].losses
    assert len(split) == 8 * 4
    with threads(3):
        assert workers(8, 8) > 1
        split.clear()
        together = evaluator.scores()["set"].losses
    assert torch.equal(alone, together) and len(split) == 8 * 4


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [transformer, partial(transformer, 3), toy, deep, two_towers])
def test_losses_are_near_those_of_float32(make: Callable[[], Any]) -> None:
    data = dataset(count=30)
    expected = plain(make(), data)
    model = make()
    assert cast(model, "bf16x3") is model and {p.dtype for p in model.parameters()} == {torch.float32}
    evaluator = Evaluator(model, [data], batch_size=8, precision="bf16x3")
    assert evaluator.precision == "bf16x3" and evaluator.stations > 2
    assert len(evaluator.stages.image) == len(Evaluator(make(), [data]).stages.image)
    losses = evaluator.scores()["set"].losses
    half = Evaluator(cast(make(), "bf16"), [data], precision="bf16").scores()["set"].losses
    off, of_half = ((x - expected).abs().max() / expected.abs().max() for x in (losses, half))
    assert 0 < off < 5e-5 and off < of_half / 50
    walk = evaluator.walk()
    for station in range(evaluator.stations):
        walk.advance(station)
        torch.testing.assert_close(walk.scores()["set"].losses, losses, rtol=1e-5, atol=1e-5)


def test_a_resnet_is_split_where_a_convolution_has_one_pixel(split: list[Any]) -> None:
    model, x = resnet(), random(2, 3, 32, 32)
    with torch.no_grad(), exact("bf16x3"):
        found = model(x)
    pixels = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride]
    assert 0 < len(pixels) < len(split)  # and the projections of its attention, and the head
    truth = model.double()(x.double())
    assert (found.double() - truth).abs().max() <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize("make", [partial(transformer, 2), two_towers])
def test_derivatives_are_those_of_float32_products(make: Callable[[], Any]) -> None:
    data = dataset(count=12)
    found, wanted = [], []
    for precision, into in (("bf16x3", found), ("fp32", wanted)):
        model = make()
        evaluator = Evaluator(model, [data], batch_size=5, precision=precision)  # type: ignore[arg-type]
        weights = [p for p in model.parameters() if p.is_floating_point()]
        loss, slopes = evaluator.gradient(weights)
        signs = [
            torch.sign(random(*w.shape, seed=k)) if w.ndim else torch.ones(()) for k, w in enumerate(weights)
        ]
        into += [torch.tensor(loss), *slopes, evaluator.curvature(weights, signs)]
    largest = max(float(x.abs().max()) for x in wanted[1:-1])
    for got, want in zip(found, wanted, strict=True):
        size = max(float(want.abs().max()), largest)
        assert (got - want).abs().max() <= 4e-4 * size
    assert any(not torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_studies_with_the_same_draws() -> None:
    """Sharpness, with noise per image and its control, at a rho where bfloat16 sees rounding alone."""
    zeroshot, finetuned, data = transformer(), shaken(transformer(), 0.2), dataset(count=16)
    rows = {}
    for precision in ("fp32", "bf16x3", "bf16"):
        path = Path(cast(transformer(), precision), zeroshot, finetuned)  # type: ignore[arg-type]
        evaluator = Evaluator(path.model, [data], precision=precision)  # type: ignore[arg-type]
        layers = [name for name in path.layers if "mlp.c_fc" in name]
        protocol = Protocol("per-image-gradient")
        rows[precision] = studies.layerwise_sharpness(
            path, evaluator, [1.0], [0.02], 4, layers, protocol=protocol
        )
        assert set(rows[precision]["precision"]) == {precision}
    off = {p: (rows[p]["sharpness"] - rows["fp32"]["sharpness"]).abs().median() for p in ("bf16x3", "bf16")}
    assert 0 < off["bf16x3"] < off["bf16"] / 50 and off["bf16x3"] < 5e-6


def test_images_with_weights_of_their_own_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image by image under torch.vmap, and when what was computed there is replayed."""
    alone: list[bool] = []

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        alone.append(torch._C._functorch.is_batchedtensor(a))
        return product(a, b)

    monkeypatch.setattr(splitting, "product", recorded)
    zeroshot, finetuned, data = transformer(), shaken(transformer(), 0.2), dataset(count=16)
    path = Path(transformer(), zeroshot, finetuned)
    evaluator = Evaluator(path.model, [data], precision="bf16x3")
    protocol = Protocol("per-image-gradient")
    rows = studies.sharpness(path, evaluator, [1.0], [0.1], 4, protocol=protocol)
    assert any(alone) and not all(alone) and len(evaluator.runtime.replays) > 0
    assert set(rows["estimator"]) == {"per-image-gradient"}


# --- refusals -------------------------------------------------------------------------------------


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ValueError, "bf16x3", "mps", "fp32"):
        check("bf16x3", torch.device("mps"))
    with refused(ValueError, "bf16x3", "compile=True"):
        Evaluator(toy(), [dataset()], precision="bf16x3", compile=True)
    with refused(ValueError, "bf16x3", "float32", "bfloat16"):
        Evaluator(cast(toy(), "bf16"), [dataset()], precision="bf16x3")
    cuda = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with refused(ValueError, "bf16x3", "cuda:1", "7.5", "8.0", "fp32"):
        check("bf16x3", cuda)


class Refusing(TorchFunctionMode):
    """A device whose libraries do not have the product, or give something else."""

    def __init__(self, answer: float | None) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ones:
            kwargs = {**(kwargs or {}), "device": "cpu"}
        found = func(*args, **(kwargs or {}))
        if func is torch.ones and self.answer is None:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return found * self.answer if func is torch.ones and self.answer is not None else found


@pytest.mark.parametrize(("answer", "reason"), [(None, "CUBLAS_STATUS_NOT_SUPPORTED"), (2.0, "wrong")])
def test_a_product_is_tried_first(monkeypatch: pytest.MonkeyPatch, answer: float | None, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with Refusing(1.0):
        check("bf16x3", torch.device("cuda"))
    with refused(ValueError, "bf16x3", "cuda", reason), Refusing(answer):
        check("bf16x3", torch.device("cuda"))


@pytest.mark.parametrize("many", [(), (2,)])
def test_on_a_gpu_one_product_of_bfloat16_gives_float32(many: tuple[int, ...]) -> None:
    """With fake tensors: the operation exists there, and three times the FLOPs are counted."""
    ran: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append((func, [x.dtype for x in args if isinstance(x, Tensor)]))
            return func(*args, **(kwargs or {}))

    def run() -> None:
        found = product(torch.empty(*many, 50, 64, device="cuda"), torch.empty(*many, 64, 20, device="cuda"))
        assert found.dtype == torch.float32 and found.device.type == "cuda" and found.shape == (*many, 50, 20)

    with FakeTensorMode(), Watch():
        run()
    multiply = torch.ops.aten.bmm.dtype if many else torch.ops.aten.mm.dtype
    assert (multiply, [torch.bfloat16, torch.bfloat16]) in ran
    assert meter.measure(run).flops == 3 * 2 * 50 * 64 * 20 * (2 if many else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpu_gives_the_numbers_of_the_cpu(graphs: bool) -> None:
    a, b = random(3, 50, 64), random(64, 20, seed=1)
    torch.testing.assert_close(product(a.cuda(), b.cuda()).cpu(), product(a, b), rtol=0, atol=2e-5)
    data = dataset(count=40)
    expected = Evaluator(transformer(2), [data], precision="bf16x3").scores()["set"].losses
    evaluator = Evaluator(transformer(2).cuda(), [data], precision="bf16x3", graphs=graphs)
    for _ in range(4):  # recorded from the third time on
        torch.testing.assert_close(evaluator.scores()["set"].losses, expected, rtol=1e-5, atol=1e-5)
