"""Recordings of functions against the functions themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tiny_models import Recorder, dataset, deep, shaken, staged, transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import rft_fast as rft
from rft_fast import studies
from rft_fast.evaluate import Evaluator, replays
from rft_fast.evaluate.replays import Replays
from rft_fast.evaluate.stages import stages
from rft_fast.path import Path

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": deep,
    "convolutions": staged,
    "a transformer": lambda: transformer(layers=2),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_recorded_stages_have_the_bits_of_stages_whose_weights_change(make: Callable[[], nn.Module]) -> None:
    model, known = make().eval(), Replays()
    torch.manual_seed(1)
    chain = stages(model, torch.rand(2, 3, 8, 8)).image
    with torch.inference_mode():
        for turn in range(8):
            shaken(model, 0.05)
            x = torch.rand((5, 2)[turn % 2], 3, 8, 8)
            for stage in chain:
                expected = stage.run(x, x)
                got = known.run(stage, lambda x, stage=stage: stage.run(x, x), [x], stage.tensors)
                assert torch.equal(got, expected) and got.stride() == expected.stride()
                x = expected
    assert len(known) == 2 * len(chain)


WEIGHT = torch.rand(4)


def looks(x: Tensor) -> Tensor:
    return x * torch.tensor(WEIGHT.tolist())


def looks_once(x: Tensor) -> Tensor:
    return x * float(WEIGHT.sum())


def reads_and_looks(x: Tensor) -> Tensor:
    return x * WEIGHT * torch.tensor(WEIGHT.tolist())


@pytest.mark.parametrize(
    "function",
    [
        looks,
        looks_once,
        reads_and_looks,
        lambda x: F.dropout(x * WEIGHT),
        lambda x: F.dropout(x * WEIGHT, inplace=True),
    ],
)
def test_what_looks_at_numbers_or_draws_some_is_not_recorded(function: Callable[[Tensor], Tensor]) -> None:
    known = Replays()
    for turn in range(5):
        WEIGHT.fill_(turn + 1.0)
        x = torch.rand(3, 4)
        torch.manual_seed(turn)
        got = known.run("it", function, [x], [WEIGHT])
        torch.manual_seed(turn)
        assert torch.equal(got, function(x))
    assert len(known) == 0


def in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z.mul_(y).clamp_(min=0.5)
    z[:, 1:].add_(WEIGHT[1:])
    a, b = z.contiguous().chunk(2, 1)
    return torch.cat([b, a, z.sort(1).values], 1).to(torch.float32)


def test_views_changes_in_place_and_several_results() -> None:
    known = Replays()
    for turn in range(5):
        WEIGHT.fill_(turn + 1.0)
        x, y = torch.randn(3, 4), torch.randn(3, 4)
        kept = x.clone(), y.clone()
        assert torch.equal(known.run("it", in_place, [x, y], [WEIGHT]), in_place(*kept))
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    assert len(known) == 1


def test_other_strides_dtypes_and_names_are_other_functions() -> None:
    known = Replays()

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1) + 1

    square = torch.rand(4, 4)
    for x in (square, square.t(), square.double(), square[:, :2]):
        for _ in range(4):
            assert torch.equal(known.run("flat", flat, [x], []), flat(x))
            assert torch.equal(known.run("twice", lambda x: x * 2, [x], []), x * 2)
    assert len(known) == 8


def test_an_argument_that_is_given_back_or_given_twice() -> None:
    known, x = Replays(), torch.rand(3)
    for _ in range(4):
        assert known.run("same", lambda x: x, [x], []) is x
        other = torch.rand(3)
        assert torch.equal(known.run("sum", lambda x, y: x + 2 * y, [x, x], []), 3 * x)
        assert torch.equal(known.run("sum", lambda x, y: x + 2 * y, [x, other], []), x + 2 * other)
    assert len(known) == 1  # of different ones


def test_those_made_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST", 3)
    known = Replays()
    for size in range(1, 9):
        for _ in range(3):
            known.run("it", lambda x: x + 1, [torch.rand(size)], [])
        assert len(known) == min(size, 3)


def test_large_arguments_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "LARGEST", 40)
    known = Replays()
    for size in (10, 11):
        for _ in range(3):
            assert len(known.run("it", lambda x: x + 1, [torch.rand(size)], [])) == size
    assert len(known) == 1


def test_errors_of_the_function_are_raised() -> None:
    known = Replays()

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("of the test")

    for _ in range(4):
        with pytest.raises(RuntimeError, match="of the test"):
            known.run("it", fails, [torch.rand(2)], [])


def test_several_threads() -> None:
    model, known = transformer(1).eval(), Replays()
    chain = stages(model, torch.rand(2, 3, 8, 8)).image

    def work(seed: int) -> bool:
        with torch.inference_mode():
            x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            for stage in chain:
                expected = stage.run(x, x)
                x = known.run(stage, lambda x, stage=stage: stage.run(x, x), [x], stage.tensors)
                if not torch.equal(x, expected):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))
    assert len(known) == len(chain)


def test_recordings_of_several_threads_leave_torch_outside_of_any_mode() -> None:
    known, weights = Replays(), [torch.rand(8, 8) for _ in range(200)]

    def work(first: int) -> None:
        for number in range(first, len(weights), 4):
            for _ in range(2):
                known.run(number, lambda x, w=weights[number]: x @ w, [torch.rand(2, 8)], [weights[number]])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(known) == len(weights)
    assert not is_in_torch_dispatch_mode()  # of which the kernels decide whether they are traced
    assert rft.norm([torch.ones(4)]) == 2


def layer_sharpness(
    estimator: str, evaluate: Callable[[Evaluator], None] = lambda evaluator: None, device: str = "cpu"
) -> tuple[list[float], Evaluator]:
    """Sharpness, its errors and accuracies of some layers, at two alphas in two draws."""
    torch.manual_seed(0)
    model = transformer(1).eval().to(device)
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = {name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in zero.items()}
    path, evaluator = Path(model, zero, one), Evaluator(model, [dataset(count=6)], batch_size=3)
    evaluate(evaluator)
    protocol = studies.Protocol(estimator)  # type: ignore[arg-type]
    layers = ["re:visual.(conv1|ln_pre)", "re:.*c_fc"]
    found = studies.layerwise_sharpness(path, evaluator, [0.4, 0.6], [0.3], 2, layers, protocol=protocol)
    return found[["sharpness", "sharpness_se", "accuracy"]].to_numpy().ravel().tolist(), evaluator


@pytest.mark.parametrize("estimator", ["per-image", "per-image-gradient"])
def test_rows_are_the_same_bits_without_recordings(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, evaluator = layer_sharpness(estimator)
    monkeypatch.setattr(Replays, "run", lambda self, key, function, args, reads: function(*args))
    assert len(evaluator.runtime.replays) > 5 and recorded == layer_sharpness(estimator)[0]


# --- CUDA graphs of recordings --------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["per-image", "per-image-gradient"])
def test_graphs_are_valid_for_every_draw_and_alpha(estimator: str) -> None:
    """Signs, bases and activations are inputs of a graph, and the weights are read where they are."""
    recorder = Recorder()

    def use_graphs(evaluator: Evaluator) -> None:
        evaluator.runtime.replays = Replays(recorder)

    graphed, _ = layer_sharpness(estimator, use_graphs)
    assert recorder.recorded > 5 and recorder.replayed > recorder.recorded
    assert graphed == layer_sharpness(estimator)[0]


def test_results_of_graphs_stay_when_the_next_one_runs() -> None:
    recorder = Recorder()
    known = Replays(recorder)
    given = [torch.rand(3, 4) for _ in range(9)]
    found = [known.run("it", lambda x: (x + 1).t(), [x], []) for x in given]
    assert all(torch.equal(y, (x + 1).t()) for x, y in zip(given, found, strict=True))
    # One run as it is, one recorded, two of the recording, then the graph.
    assert (recorder.recorded, recorder.replayed) == (1, 5)
    known.clear()
    assert len(known) == 0 and torch.equal(known.run("it", lambda x: x - 1, [given[0]], []), given[0] - 1)


@pytest.mark.parametrize("size", [10, 11], ids=["small", "large"])
@pytest.mark.parametrize("expanded", [False, True])
def test_only_short_functions_of_whole_tensors_become_graphs(
    size: int, expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "SHORT", 80)
    recorder = Recorder()
    known = Replays(recorder)
    for number in range(6):
        x = torch.full((1,), float(number)).expand(size) if expanded else torch.rand(size)
        assert torch.equal(known.run("it", lambda x: x + 1, [x], []), x + 1)
    assert recorder.recorded == (size == 10 and not expanded)


def test_a_graph_that_fails_is_left_with_one_warning() -> None:
    tries = 0

    def fail(body: Callable[[], None]) -> Callable[[], None]:
        nonlocal tries
        tries += 1
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    known = Replays(fail)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(8):
            x = torch.rand(4)
            assert torch.equal(known.run("it", lambda x: x * 3, [x], []), x * 3)
    (one,) = heard
    assert tries == 1
    assert str(one.message).endswith("without a CUDA graph: operation not permitted when stream is capturing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("estimator", ["per-image", "per-image-gradient"])
def test_graphs_on_a_gpu(estimator: str) -> None:
    def use_no_graphs(evaluator: Evaluator) -> None:
        evaluator.runtime.replays = Replays()

    graphed, evaluator = layer_sharpness(estimator, device="cuda")
    plain, _ = layer_sharpness(estimator, use_no_graphs, device="cuda")
    assert evaluator.runtime.replays._buffers
    torch.testing.assert_close(torch.tensor(graphed), torch.tensor(plain), rtol=1e-4, atol=1e-5)


def test_compiled_stages_are_not_replaced_by_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    def compiled(function: Callable[..., Tensor], options: object = None) -> Callable[..., Tensor]:
        def run(x: Tensor, inputs: Tensor) -> Tensor:
            nonlocal runs
            assert not is_in_torch_dispatch_mode()  # in one, torch.compile compiles nothing
            runs += 1
            return function(x, inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    model = deep().eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = Path(model, zero, {name: tensor * 1.1 for name, tensor in zero.items()})
    evaluator = Evaluator(model, [dataset(count=6)], batch_size=6, compile=True)
    counts = []
    for draws in (2, 3, 4, 5):
        runs = 0
        protocol = studies.Protocol("per-image")
        studies.layerwise_sharpness(path, evaluator, [0.5], [0.3], draws, path.layers[:1], protocol=protocol)
        counts.append(runs)
    assert counts[1] > counts[0] and counts == [*range(counts[0], counts[3] + 1, counts[1] - counts[0])]
