"""Number formats: what is cast, what is written, what comes out, and what is as before afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from support.tiny_models import (
    CLASSES,
    assert_plain,
    dataset,
    deep,
    linears,
    plain,
    shaken,
    toy,
    transformer,
    two_towers,
)
from support.wording import refused
from torch import Tensor, nn

import rft_fast as rft
from rft_fast import Path
from rft_fast.evaluate import Evaluator, precision
from rft_fast.evaluate.precision import PRECISIONS, cast, check, exact

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("name", PRECISIONS)
def test_cast_leaves_the_head_and_the_scale_in_float32(name: str) -> None:
    model = transformer()
    parameters = list(model.parameters())
    assert cast(model, name) is model
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert {p.dtype for p in model.visual.parameters()} == {PRECISIONS[name]}
    assert {p.dtype for p in model.classification_head.parameters()} == {torch.float32}
    both = cast(two_towers(), name)
    assert {p.dtype for p in (*both.visual.parameters(), *both.text.parameters())} == {PRECISIONS[name]}  # type: ignore[union-attr]
    assert both.logit_scale.dtype == torch.float32 and both.prompts.dtype == torch.int64
    assert {p.dtype for p in cast(toy(), name).parameters()} == {PRECISIONS[name]}  # without towers, all


@pytest.mark.parametrize("make", [transformer, toy, two_towers])
@pytest.mark.parametrize(("name", "steps"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_halves_are_near_float32(make: Any, name: str, steps: float) -> None:
    data = dataset(count=30)
    expected = plain(make(), data)
    evaluator = Evaluator(cast(make(), name), [data], batch_size=8, precision=name)
    assert evaluator.precision == name and evaluator.feeds[0].prepare(slice(0, 1)).dtype == HALVES[name]
    losses = evaluator.scores()["set"].losses
    assert losses.dtype == torch.float32
    error = (losses - expected).abs().max() / expected.abs().max()
    assert 0 < error < 40 * steps
    walk = evaluator.walk()
    for station in range(evaluator.stations):
        walk.advance(station)
        torch.testing.assert_close(walk.scores()["set"].losses, losses, rtol=20 * steps, atol=20 * steps)
    found = walk.variants(lambda k: None, 3, evaluator.stations - 1)
    torch.testing.assert_close(found[2]["set"].losses, losses, rtol=20 * steps, atol=20 * steps)


@pytest.mark.parametrize("name", HALVES)
def test_logits_are_not_rounded_to_half(name: str) -> None:
    """A logit of 30 in bfloat16 has steps of an eighth; the head's products are taken in float32."""
    model = cast(transformer(), name)
    seen: list[Tensor] = []
    model.classification_head.register_forward_hook(lambda m, a, y: seen.append(y))
    Evaluator(model, [dataset()], precision=name).scores()
    assert {y.dtype for y in seen} == {torch.float32}
    logits = seen[-1]
    assert not torch.equal(logits, logits.to(HALVES[name]).float())


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("noise", [{}, {"rho": 0.1, "seed": 3, "draw": 2}, {"keep": 0.5, "seed": 1}])
def test_a_path_writes_into_half_weights_what_casting_float32_gives(name: str, noise: dict[str, Any]) -> None:
    zeroshot, finetuned = transformer(), shaken(transformer(), 0.2)
    full = Path(transformer(), zeroshot, finetuned)
    half = Path(cast(transformer(), name), zeroshot, finetuned)
    full.write(0.3, **noise)
    half.write(0.3, **noise)
    for (key, want), (_, got) in zip(
        full.model.named_parameters(), half.model.named_parameters(), strict=True
    ):
        assert torch.equal(got, want.to(got.dtype)), key
    # The ends are kept as they came, and there is no other float32 weight of the towers.
    weights = {weight.name: weight for weight in half.weights()}
    live = [w.live.dtype for key, w in weights.items() if "visual" in key]
    assert set(live) == {HALVES[name]} and live
    assert all(
        w.live.data_ptr() == p.data_ptr()
        for w, p in zip(
            (weights[key] for key, _ in half.model.named_parameters() if key in weights),
            (p for key, p in half.model.named_parameters() if key in weights),
            strict=True,
        )
    )


def test_studies_run_in_half_precision() -> None:
    zeroshot, finetuned = transformer(), shaken(transformer(), 0.2)
    rows = {}
    for name in ("fp32", "bf16"):
        path = Path(cast(transformer(), name), zeroshot, finetuned)
        evaluator = Evaluator(path.model, [dataset()], precision=name)
        rows[name] = rft.studies.layerwise_interpolation(path, evaluator, [0, 0.5, 1])
        assert set(rows[name]["precision"]) == {name}
    difference = (rows["fp32"]["loss"] - rows["bf16"]["loss"]).abs()
    assert 0 < difference.max() < 0.1


def test_what_is_refused() -> None:
    with refused(ValueError, *PRECISIONS, "int8"):
        check("int8", torch.device("cpu"))
    with refused(ValueError, "int8"):
        cast(toy(), "int8")
    with refused(ValueError, "tf32", "cpu", "fp32"):
        Evaluator(toy(), [dataset()], precision="tf32")
    for name in PRECISIONS:
        check(name, torch.device("cuda"))
    for name, model, needed, has in (
        ("bf16", toy(), "bfloat16", "float32"),
        ("fp16", cast(toy(), "bf16"), "float16", "bfloat16"),
        ("fp32", cast(transformer(), "bf16"), "float32", "bfloat16, float32"),
    ):
        with refused(ValueError, needed, has, f"cast(model, {name!r})"):
            Evaluator(model, [dataset()], precision=name)


def switches() -> tuple[Any, ...]:
    backends: Any = torch.backends
    found = [
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        attention_kernels(),
    ]
    return (*found, *operations())


def attention_kernels() -> dict[str, bool]:
    cuda: Any = torch.backends.cuda
    return {
        name: getattr(cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "cudnn", "math")
    }


def operations() -> list[str]:
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    places = [backends.cuda.matmul, backends.mkldnn.matmul]
    for backend in (backends.cudnn, backends.mkldnn):
        places += [backend.conv, backend.rnn]
    return [place.fp32_precision for place in places]


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", ["fp32", "ieee", "tf32", "bf16x3"])
def test_switches_are_set_and_given_back(matmul: str, reduced: bool, name: str) -> None:
    backends: Any = torch.backends
    was = switches()
    try:
        torch.set_float32_matmul_precision(matmul)
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction = reduced
        before = switches()
        with exact(name):
            inside = switches()
        assert switches() == before
        with pytest.raises(KeyboardInterrupt), exact(name):
            raise KeyboardInterrupt
        assert switches() == before
        # Torch's older and newer names agree, else it would refuse to answer by the older ones.
        tf32 = name == "tf32"
        assert inside[:5] == ("high" if tf32 else "highest", False, False, tf32, tf32)
        assert set(inside[6:]) <= {"tf32" if tf32 else "ieee"}
        kernels = dict.fromkeys(before[5], False) | {"math": True} if name == "ieee" else before[5]
        assert inside[5] == kernels
    finally:
        torch.set_float32_matmul_precision(was[0])
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction = was[1]
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction = was[2]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has no newer names")
@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_switches_that_were_set_by_their_newer_names(name: str) -> None:
    backends: Any = torch.backends
    was = switches()
    matmul, conv = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    try:
        backends.cuda.matmul.fp32_precision = "tf32"
        backends.cudnn.conv.fp32_precision = "ieee"
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
        before = operations()
        with exact(name):
            assert set(operations()) == {"tf32" if name == "tf32" else "ieee"} and switches()
        assert operations() == before
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
    finally:
        backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision = matmul, conv
    assert switches() == was


def test_switches_are_given_back_after_errors_of_the_model() -> None:
    model = deep()
    evaluator = Evaluator(model, [dataset()])
    linears(model)[2].register_forward_hook(lambda *_: 1 / 0)
    before = switches()
    calls = (
        evaluator.scores,
        lambda: evaluator.walk().advance(3),
        lambda: evaluator.gradient(list(model.parameters())),
        lambda: evaluator.curvature(list(model.parameters()), list(model.parameters())),
    )
    math = torch.backends.cuda.flash_sdp_enabled()
    for call in calls:
        with pytest.raises(ZeroDivisionError):
            call()
        assert switches() == before and torch.backends.cuda.flash_sdp_enabled() == math
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert not any(p.grad is not None for p in model.parameters())


class Attending(nn.Module):
    """Three tokens of 64 numbers that attend to each other by torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(64, 16) for _ in range(3))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        q, k, v = (map(images.flatten(2)).view(-1, 3, 2, 8).transpose(1, 2) for map in self.maps)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        logits: Tensor = self.head(heads.transpose(1, 2).flatten(1))
        return logits

    def written_out(self, images: Tensor) -> Tensor:
        """In float64: softmax(Q K^T / sqrt(8)) V, head by head."""
        maps = [(m.weight.double(), m.bias.double()) for m in self.maps]
        q, k, v = ((images.double().flatten(2) @ w.T + b).unflatten(2, (2, 8)) for w, b in maps)
        found = []
        for head in range(2):
            weights = (q[:, :, head] @ k[:, :, head].mT / 8**0.5).exp()
            found.append(weights / weights.sum(2, keepdim=True) @ v[:, :, head])
        return torch.stack(found, 2).flatten(1) @ self.head.weight.double().T + self.head.bias.double()


def kernels_of(call: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return {event.key.removeprefix("aten::") for event in seen.key_averages()}


@pytest.mark.slow
@pytest.mark.parametrize("make", [Attending, partial(transformer, 2)])
def test_ieee_takes_no_fused_attention_kernel(make: Callable[[], Any]) -> None:
    """A GPU's would take products of float32 as three of TF32; on the CPU it is known by its name."""
    model, data = make().eval(), dataset(count=2)
    weights = list(model.parameters())
    for name in ("fp32", "ieee"):
        evaluator = Evaluator(model, [data], precision=name)
        for call in (evaluator.scores, partial(evaluator.gradient, weights)):
            kernels = kernels_of(call)
            assert ("_scaled_dot_product_flash_attention_for_cpu" in kernels) == (name == "fp32")
            assert name == "fp32" or kernels & {"_scaled_dot_product_attention_math", "bmm"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_ieee_on_a_gpu(graphs: bool) -> None:
    """No fused attention; nearer to float64 than products of TF32 (2**-11) by far."""
    model, data = Attending().eval(), dataset(count=40)
    live: Any = Attending().eval().to("cuda")
    evaluator = Evaluator(live, [data], precision="ieee", graphs=graphs)
    kernels = kernels_of(evaluator.scores)
    assert "_scaled_dot_product_attention_math" in kernels
    assert not any(
        name in kernel for kernel in kernels for name in ("efficient_att", "flash_att", "cudnn_att")
    )
    images = evaluator.feeds[0].prepare(slice(0, 40)).cpu()
    expected = nn.functional.cross_entropy(model.written_out(images), data.labels, reduction="none")
    for _ in range(4):  # recorded from the third time on
        losses = evaluator.scores()["set"].losses
        assert (losses - expected).abs().max() < 1e-6 * expected.abs().max()


def test_ieee_is_float32s_own_attention() -> None:
    model, data = Attending().eval(), dataset(count=40)
    evaluator = Evaluator(model, [data], precision="ieee")
    assert evaluator.stations > 2
    with torch.no_grad():
        logits = model.written_out(evaluator.feeds[0].prepare(slice(0, 40)))
        expected = nn.functional.cross_entropy(logits, data.labels, reduction="none")
    losses = evaluator.scores()["set"].losses
    assert (losses - expected).abs().max() < 4e-7 * expected.abs().max()


def test_rows_under_ieee_are_those_of_float64() -> None:
    zeroshot, finetuned, data = transformer(2), shaken(transformer(2), 0.2), dataset(count=30)
    path = Path(transformer(2), zeroshot, finetuned)
    evaluator = Evaluator(path.model, [data], precision="ieee")
    rows = rft.studies.interpolation(path, evaluator, [0, 0.3, 1])
    assert set(rows["precision"]) == {"ieee"}
    images = evaluator.feeds[0].prepare(slice(0, 30)).double()
    for alpha, loss in zip(rows["alpha"], rows["loss"], strict=True):
        truth: Any = transformer(2).double()
        ends = (zeroshot.parameters(), finetuned.parameters())
        with torch.no_grad():
            for weight, w0, w1 in zip(truth.parameters(), *ends, strict=True):
                weight.copy_((1 - alpha) * w0.double() + alpha * w1.double())
            expected = nn.functional.cross_entropy(truth(images), data.labels)
        assert loss == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.usefixtures("compiler")
def test_a_compiler_puts_no_fused_attention_in_the_place_of_ieees() -> None:
    model, data = Attending().eval(), dataset(count=9)
    evaluator = Evaluator(model, [data], precision="ieee", compile=True)
    losses = evaluator.scores()["set"].losses
    kernels = kernels_of(evaluator.scores)
    assert "bmm" in kernels and not any("_attention" in name for name in kernels)
    eager = Evaluator(model, [data], precision="ieee").scores()["set"].losses
    torch.testing.assert_close(losses, eager, rtol=2e-6, atol=0)


@cache
def compiles() -> str:
    """Why torch.compile does not work here; empty where it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.rand(4))
    except Exception as error:  # no compiler for C++ on this machine
        return f"torch.compile does not work here: {error}"
    return ""


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    if why := compiles():
        pytest.skip(why)
    yield
    torch.compiler.reset()


def test_scores_may_be_asked_for_in_any_mode() -> None:
    model, sets = deep(), [dataset(count=9)]
    evaluator = Evaluator(model, sets, batch_size=4)
    weights = list(model.parameters())
    loss, slopes = evaluator.gradient(weights)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = evaluator.gradient(weights)
            scores = evaluator.scores()
        assert inside[0] == loss and all(map(torch.equal, inside[1], slopes))
        assert_plain(scores, model, sets)


@pytest.mark.usefixtures("compiler")
def test_compiled_stages_give_the_same_numbers() -> None:
    model, sets = deep(), [dataset("a", 21), dataset("b", 5)]
    evaluator = Evaluator(model, sets, batch_size=8, compile=True)
    assert evaluator.stations == 4 and evaluator.span(linears(model)[1].parameters()) == (1, 1)
    for _ in range(2):
        walk = evaluator.walk()
        assert_plain(walk.scores(), model, sets)
        walk.advance(2)
        assert_plain(walk.scores(), model, sets)
        found = walk.variants(lambda k: None, 3, 2)
        assert_plain(found[1], model, sets)
        shaken(model, 0.1)  # in place: compiled stages see it
    with torch.no_grad():
        linears(model)[0].weight.mul_(2)
    assert_plain(evaluator.scores(), model, sets)
    plainly = Evaluator(model, sets, batch_size=8)
    weights = list(model.parameters())
    assert evaluator.gradient(weights)[0] == pytest.approx(plainly.gradient(weights)[0], rel=1e-6)


@pytest.mark.slow
def test_every_stage_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles one function eight times and no more, so no two stages may be one to it."""
    torch.compiler.reset()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, examples: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, dynamic=False))
    model, sets = transformer(3), [dataset("a", 8)]
    evaluator = Evaluator(model, sets, batch_size=8, compile=True)
    assert len(evaluator.stages.image) > 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_plain(evaluator.scores(), model, sets)
    assert len(graphs) == len(evaluator.stages.image)
    torch.compiler.reset()


def test_the_package_offers_precision() -> None:
    assert set(precision.PRECISIONS) == {"fp32", "ieee", "tf32", "bf16x3", "bf16", "fp16"}
    assert isinstance(cast(nn.Linear(2, 2), "fp16"), nn.Linear)
