"""Recorded stages against running them one by one; what a recording is, is played by a stand-in."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from support.tiny_models import (
    CLASSES,
    Recorder,
    assert_plain,
    close,
    dataset,
    deep,
    linears,
    plain,
    shaken,
    staged,
    transformer,
    two_towers,
)
from support.wording import warned
from torch import Tensor, nn

from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.graphs import SHORT, WARM, Graphs, on
from rft_fast.evaluate.precision import cast
from rft_fast.evaluate.stages import Stage, stages

pytestmark = pytest.mark.usefixtures("one_thread")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def eager(chain: tuple[Stage, ...], first: int, last: int, x: Tensor, inputs: Tensor) -> Tensor:
    for stage in chain[first:last]:
        x = stage.run(x, inputs)
    return x


def in_place() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 16),
        nn.SiLU(inplace=True),
        nn.Unflatten(1, (4, 4)),
        nn.ELU(inplace=True),
        nn.Linear(4, 4),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "shapes that change": deep,
    "in place": in_place,
    "convolutions": staged,
    "a transformer": lambda: transformer(layers=3),
}


@pytest.mark.slow(only="^a transformer$")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_recorded_stages_follow_writes_shapes_and_starts(make: Callable[[], nn.Module]) -> None:
    model, recorder = make().eval(), Recorder()
    torch.manual_seed(1)
    chain = stages(model, torch.rand(2, 3, 8, 8)).image
    recorded = Graphs(recorder)
    with torch.inference_mode():
        for turn in range(12):
            shaken(model, 0.05)
            inputs = torch.rand((5, 2, 5, 3)[turn % 4], 3, 8, 8)
            for first in range(len(chain)):
                x = eager(chain, 0, first, inputs, inputs)
                kept = x.clone()
                for last in {first, len(chain) - 1, len(chain)} - set(range(first)):
                    got = recorded.run(chain, first, last, x, inputs)
                    torch.testing.assert_close(
                        got, eager(chain, first, last, kept, inputs), rtol=1e-5, atol=1e-6
                    )
                    assert torch.equal(x, kept)
    assert recorder.replayed > 50


def test_a_stage_is_recorded_once_for_every_shape_from_the_third_time_on() -> None:
    model, recorder = deep().eval(), Recorder()
    chain = stages(model, torch.rand(2, 3, 8, 8)).image
    recorded = Graphs(recorder)
    counts = []
    with torch.inference_mode():
        for n in (4, 4, 4, 4, 7, 7, 4, 7, 7):
            recorded.run(chain, 0, 4, torch.rand(n, 3, 8, 8), None)
            counts.append(recorder.recorded)
    assert WARM == 2 and counts == [0, 0, 4, 4, 4, 4, 4, 8, 8]
    # Runs in which a stage has its recording: three of four images each, two of seven.
    assert recorder.replayed == 4 * (3 + 2)
    recorded.clear()
    with torch.inference_mode():
        recorded.run(chain, 0, 4, torch.rand(4, 3, 8, 8), None)
    assert recorder.replayed == 20 and not recorded._buffers


def test_stages_that_look_at_the_input_are_not_recorded() -> None:
    chain = (
        Stage(lambda x, _: x + 1),
        Stage(lambda x, inputs: x * inputs, reads_inputs=True),
        Stage(lambda x, _: x - 3),
    )
    recorder = Recorder()
    recorded = Graphs(recorder)
    for k in range(6):
        inputs = torch.full((2, 3), float(k))
        assert recorded.run(chain, 0, 3, inputs, inputs).equal((inputs + 1) * inputs - 3)
        x = torch.rand(2, 3)
        assert recorded.run(chain, 1, 3, x, inputs).equal(x * inputs - 3)
    assert recorder.recorded == 2


def test_only_short_stages_are_recorded() -> None:
    """By the bytes that go in and come out together, at each shape anew; the numbers are the same."""
    wide = SHORT // 8 - 512  # numbers of float32 that fill half of it, with 512 left in each half
    chain = (
        Stage(lambda x, _: x + 1),
        Stage(lambda x, _: x.repeat(1, wide // 4)),  # from few to many: just short
        Stage(lambda x, _: x * 2),  # from many to many: long for two samples, short for one
        Stage(lambda x, _: x[:, :4] - 3),  # from many to few
        Stage(lambda x, _: x * x),
    )
    expected = {1: {0, 1, 2, 3, 4}, 2: {0, 1, 3, 4}, 3: {0, 4}}
    for samples, short in expected.items():
        recorder = Recorder()
        recorded = Graphs(recorder)
        for turn in range(6):
            x = torch.rand(samples, 4) + turn
            want = ((x + 1) * 2 - 3) ** 2
            assert torch.equal(recorded.run(chain, 0, 5, x, None), want)
        assert recorder.recorded == len(short) and recorder.replayed == len(short) * (6 - WARM)
        ran = {chain.index(key[0]) for key, record in recorded._recorded.items() if record.replay}  # type: ignore[arg-type]
        assert ran == short
        assert all(buffer.nbytes <= SHORT for buffer in recorded._buffers.values())


def test_views_of_a_buffer_do_not_pass_for_the_buffer() -> None:
    """Square activations, turned by stages that are too young to be recorded."""

    def turned(x: Tensor, _: Tensor) -> Tensor:
        return x.transpose(1, 2)

    recorder = Recorder()
    recorded = Graphs(recorder)
    last = Stage(lambda x, _: x * torch.arange(3.0))
    first = Stage(lambda x, _: x + 1)
    between = [Stage(lambda x, _: x + 2), Stage(lambda x, _: x + 3)]
    for _ in range(4):
        recorded.run((first, *between, last), 0, 4, torch.rand(2, 3, 3), None)
    assert recorder.recorded == 4
    for _ in range(6):
        chain = (first, Stage(turned), Stage(lambda x, _: x), last)
        x = torch.rand(2, 3, 3)
        expected = (x + 1).transpose(1, 2) * torch.arange(3.0)
        assert torch.equal(recorded.run(chain, 0, 4, x, None), expected)
    assert recorder.replayed == 4 * 2 + 2 * 6 and recorder.recorded == 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_view_of_the_buffer_that_is_recorded_with_is_copied_once(fails: bool) -> None:
    """Copied once more, or used after the copy, square activations would be turned back."""
    recorder = Recorder()

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        if fails and recorder.recorded == 1:
            raise RuntimeError("of the test")
        return recorder(body)

    recorded = Graphs(capture)
    first, last = Stage(lambda x, _: x + 1), Stage(lambda x, _: x * torch.arange(3.0))
    for _ in range(WARM):
        recorded.run(
            (first, Stage(lambda x, _: x), Stage(lambda x, _: x), last), 0, 4, torch.rand(2, 3, 3), None
        )
    young = (Stage(lambda x, _: x.transpose(1, 2)), Stage(lambda x, _: x))
    x = torch.rand(2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = recorded.run((first, *young, last), 0, 4, x, None)
    assert recorder.recorded == (1 if fails else 2)
    assert torch.equal(got, (x + 1).transpose(1, 2) * torch.arange(3.0))


def test_a_capture_that_fails_falls_back_with_one_warning() -> None:
    model = deep().eval()
    chain = stages(model, torch.rand(2, 3, 8, 8)).image
    tries = 0

    def fail(body: Callable[[], None]) -> Callable[[], None]:
        nonlocal tries
        tries += 1
        if tries == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return body

    recorded = Graphs(fail)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(8):
            x = torch.rand(4, 3, 8, 8)
            torch.testing.assert_close(recorded.run(chain, 0, 4, x, None), model(x), rtol=1e-5, atol=1e-6)
    assert tries == 4  # of four stages once each
    (one,) = said
    assert str(one.message).endswith("without a CUDA graph: operation not permitted when stream is capturing")
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        interrupted = Graphs(lambda body: (_ for _ in ()).throw(KeyboardInterrupt))  # type: ignore[arg-type]
        for _ in range(3):
            interrupted.run(chain, 0, 4, torch.rand(4, 3, 8, 8), None)


@pytest.mark.slow(only="^True$")
@pytest.mark.parametrize("text", [False, True])
def test_walks_hold_copies_of_what_recordings_return(text: bool) -> None:
    model: Any = two_towers() if text else deep()
    sets = [dataset("a", 21), dataset("b", 5)]
    evaluator = Evaluator(model, sets, batch_size=8)
    evaluator.runtime.graphs, recorder = Graphs(recorder := Recorder()), recorder
    for turn in range(3):
        walk = evaluator.walk()
        for station in range(evaluator.stations):
            walk.advance(station)
            buffers = {buffer.data_ptr() for buffer in evaluator.runtime.graphs._buffers.values()}
            flows = [*walk.flows, *([walk.text] if walk.text is not None else [])]
            assert not any(f.held is not None and f.held.data_ptr() in buffers for f in flows)
            assert_plain(walk.scores(), model, sets)
            found = walk.variants(lambda k: None, 5, evaluator.stations - 1)
            assert_plain(found[0], model, sets)
            assert_plain(found[4], model, sets)
        shaken(model, 0.05)
        assert turn < 1 or recorder.replayed > 0


def test_variants_through_recordings() -> None:
    model, sets = deep(), [dataset("a", 5), dataset("b", 3)]
    evaluator = Evaluator(model, sets, batch_size=8)
    evaluator.runtime.graphs = Graphs(recorder := Recorder())
    walk = evaluator.walk()
    walk.advance(1)
    weight = linears(model)[1].weight

    @torch.no_grad()
    def write(k: int) -> None:
        weight.fill_(0.02 * k)

    for _ in range(2):
        found = walk.variants(write, 20, 1)
        for k, scores in enumerate(found):
            write(k)
            assert_plain(scores, model, sets)
    assert recorder.replayed > 20


def test_recordings_are_let_go_when_memory_runs_out() -> None:
    model, data = deep(), dataset(count=32)
    expected = plain(model, data)
    evaluator = Evaluator(model, [data], batch_size=16)
    evaluator.runtime.graphs = Graphs(Recorder())
    evaluator.runtime.images.relieve = evaluator.runtime.graphs.clear  # as it is on a GPU
    for _ in range(3):
        evaluator.scores()
    assert evaluator.runtime.graphs._buffers

    def check(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    linears(model)[1].register_forward_pre_hook(check)
    with warned(UserWarning, 16, 8):
        losses = evaluator.scores()["set"].losses
    close(losses, expected)
    assert all(len(buffer) <= 8 for buffer in evaluator.runtime.graphs._buffers.values())


class Cuda:
    """As much of torch.cuda as a recording asks for. ``events``: what was asked, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.fail: list[str | None] = []  # of each capture to come: why it ends with an error
        self.pools = 0
        self.users: dict[int, WeakSet[Any]] = {}  # pool -> its graphs; as torch does, none without refuses
        cuda = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                cuda.events.append(f"begin {pool}")
                if pool in cuda.users and not cuda.users[pool]:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                cuda.users.setdefault(pool, WeakSet()).add(self)

            def capture_end(self) -> None:
                cuda.events.append("end")
                if why := cuda.fail.pop(0) if cuda.fail else None:
                    raise RuntimeError(why)

            def replay(self) -> None:
                cuda.events.append("replay")

        def pool() -> int:
            cuda.pools += 1
            return cuda.pools

        def debug(mode: object) -> None:
            cuda.events.append(f"sync {mode}")

        names = {
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
            "graph_pool_handle": pool,
            "CUDAGraph": Graph,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": debug,
            "empty_cache": lambda: cuda.events.append("empty_cache"),
        }
        for name, stand_in in names.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.events.append(f"let go of {pool}"),
            raising=False,
        )  # fmt: skip
        self.capture = on.__wrapped__(torch.device("cuda", 0))

    def seen(self) -> list[str]:
        events, self.events[:] = list(self.events), []
        return events


def body() -> None:
    assert not gc.isenabled()


def test_a_pool_lives_as_long_as_a_graph_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    first, second = cuda.capture(body), cuda.capture(body)
    once = ["sync error", "sync 0", "begin 1", "end"]
    assert cuda.seen() == once * 2 and gc.isenabled()
    first()
    assert cuda.seen() == ["replay"]
    del first
    third = cuda.capture(body)
    assert "begin 1" in cuda.seen()
    del second, third  # torch refuses a pool whose last graph is gone
    kept = cuda.capture(body)
    assert "begin 2" in cuda.seen()
    del kept


def test_a_capture_that_fails_is_ended_and_its_pool_left(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    kept = cuda.capture(body)
    cuda.seen()
    cuda.fail = ["capture invalidated", "it was ended before"]
    with pytest.raises(RuntimeError, match="capture invalidated"):
        cuda.capture(body)
    assert cuda.seen()[2:] == ["begin 1", "end", "end", "let go of 1"] and gc.isenabled()
    again = cuda.capture(body)
    assert "begin 2" in cuda.seen()
    del kept, again


def test_graphs_of_an_older_pool_do_not_keep_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    older = cuda.capture(body)
    cuda.fail = ["capture invalidated", "it was ended before"]
    with pytest.raises(RuntimeError, match="capture invalidated"):
        cuda.capture(body)
    newer = cuda.capture(body)
    del newer
    last = cuda.capture(body)
    assert "begin 3" in cuda.seen()
    del older, last


def test_a_capture_that_lacks_memory_is_tried_again_without_torchs_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    held: list[weakref.ref[Tensor]] = []

    def lacking() -> None:
        mine = torch.zeros(3)
        assert not any(other() is not None for other in held)  # what the first attempt had is gone
        if cuda.events[-1] == "begin 1":
            held.append(weakref.ref(mine))
            raise torch.OutOfMemoryError("CUDA out of memory")

    kept = cuda.capture(lacking)
    assert len(held) == 1 and cuda.seen()[2:] == [
        "begin 1",
        "end",
        "let go of 1",
        "empty_cache",
        "begin 2",
        "end",
    ]
    del kept
    cuda = Cuda(monkeypatch)
    cuda.fail = ["CUDA out of memory", "it was ended before", None]
    replay = cuda.capture(body)
    assert cuda.seen()[2:] == ["begin 1", "end", "end", "let go of 1", "empty_cache", "begin 2", "end"]
    replay()
    cuda.fail = ["CUDA out of memory", "", "CUDA out of memory", ""]
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda.capture(body)


def test_what_waits_for_the_device_is_refused_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        cuda.capture(waits)
    assert cuda.seen() == ["sync error", "sync 0"] and gc.isenabled()


# --- on a GPU -------------------------------------------------------------------------------------


def on_gpu(model: nn.Module) -> nn.Module:
    return model.to("cuda")


def losses_of(evaluator: Evaluator) -> Tensor:
    return torch.cat([scores.losses for scores in evaluator.scores().values()])


@contextmanager
def at_most(images: int, module: nn.Module) -> Iterator[None]:
    """The allocator of the GPU itself refuses memory to larger batches."""

    def check(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > images:
            torch.empty(1 << 60, dtype=torch.uint8, device="cuda")

    handle = module.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_cuda_graphs_compute_what_the_model_computes(make: Callable[[], nn.Module]) -> None:
    model, sets = make(), [dataset("a", 50), dataset("b", 9)]
    truth = make().double()
    live = on_gpu(model)
    evaluator = Evaluator(live, sets, batch_size=16)
    without = Evaluator(live, sets, batch_size=16, graphs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(6):
            torch.manual_seed(turn)
            with torch.no_grad():
                for parameter in truth.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            # In place, so that the recordings read the new ones.
            with torch.no_grad():
                for there, here in zip(live.parameters(), truth.parameters(), strict=True):
                    there.copy_(here)
            expected = torch.cat([exact(truth, data) for data in sets])
            for of in (evaluator, without):
                torch.testing.assert_close(losses_of(of).double(), expected, rtol=1e-4, atol=1e-4)
                walk = of.walk()
                for station in range(of.stations):
                    walk.advance(station)
                    got = torch.cat([scores.losses for scores in walk.scores().values()])
                    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
                found = of.walk().variants(lambda k: None, 5, 0)
                assert len(found) == 5
                torch.testing.assert_close(found[4]["b"].losses.double(), expected[50:], rtol=1e-4, atol=1e-4)
    assert evaluator.runtime.graphs is not None and without.runtime.graphs is None
    assert any(record.replay is not None for record in evaluator.runtime.graphs._recorded.values())


def exact(model: nn.Module, data: Any) -> Tensor:
    """Losses in float64 on the CPU."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        logits = model.eval()((data.images.double() / 255 - mean) / std)
    return nn.functional.cross_entropy(logits, data.labels, reduction="none")


@pytest.mark.gpu
@needs_cuda
def test_two_towers_on_a_gpu() -> None:
    model, sets = two_towers(), [dataset("a", 20)]
    expected = plain(model, sets[0])
    evaluator = Evaluator(on_gpu(model), sets, batch_size=8)
    for _ in range(4):
        walk = evaluator.walk()
        for station in range(evaluator.stations):
            walk.advance(station)
            torch.testing.assert_close(walk.scores()["a"].losses, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_cuda
def test_streamed_images_are_those_that_stay() -> None:
    model, sets = on_gpu(transformer(layers=2)), [dataset("a", 203), dataset("b", 9)]
    resident = Evaluator(model, sets, batch_size=16)
    # Images of a limit that is too small for them; room is left for batches and held activations.
    limit = sum(data.images.nbytes for data in sets) * 2
    streamed = Evaluator(model, sets, batch_size=16, memory_limit=limit)
    assert resident.feeds[0].images.is_cuda and not streamed.feeds[0].images.is_cuda
    for _ in range(3):
        assert torch.equal(losses_of(streamed), losses_of(resident))
    walk = streamed.walk()
    walk.advance(2)
    assert torch.equal(walk.scores()["a"].losses, resident.scores()["a"].losses)
    weights = list(model.parameters())
    (loss, slopes), (other, expected) = streamed.gradient(weights), resident.gradient(weights)
    assert loss == pytest.approx(other, rel=1e-5)
    for got, truth in zip(slopes, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("precision", "steps"), [("tf32", 2**-10), ("bf16", 2**-8), ("fp16", 2**-10)])
def test_other_precisions_on_a_gpu(precision: str, steps: float) -> None:
    if precision in ("tf32", "bf16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{precision} needs compute capability 8.0")
    data = dataset(count=100)
    expected = plain(transformer(layers=2), data)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    model = on_gpu(cast(transformer(layers=2), precision))
    evaluator = Evaluator(model, [data], batch_size=16, precision=precision)
    for _ in range(4):
        losses = evaluator.scores()["set"].losses
        assert (losses - expected).abs().max() < 100 * steps
    assert not torch.equal(losses, expected)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.gpu
@needs_cuda
def test_full_precision_is_full_on_a_gpu() -> None:
    """The products of TF32 would be off by a thousandth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 512), nn.Linear(512, CLASSES))
    expected = exact(shaken(model).double(), data := dataset(count=64))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        got = losses_of(Evaluator(on_gpu(model.float()), [data]))
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5 * float(expected.max()))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("graphs", [False, True])
def test_memory_that_runs_out_on_a_gpu(graphs: bool) -> None:
    model = transformer(layers=2)
    data = dataset(count=50)
    expected = plain(model, data)
    evaluator = Evaluator(on_gpu(model), [data], batch_size=32, graphs=graphs)
    for _ in range(4):
        evaluator.scores()
    # Hooks do not run in a replay; the recordings are let go first, as after a real failure.
    if evaluator.runtime.graphs is not None:
        evaluator.runtime.graphs.clear()
    with at_most(8, model.visual.conv1), pytest.warns(UserWarning, match="do not fit in the memory of cuda"):
        losses = evaluator.scores()["set"].losses
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert evaluator.runtime.images.size(50) == 8
    if evaluator.runtime.graphs is not None:
        assert all(len(buffer) <= 8 for buffer in evaluator.runtime.graphs._buffers.values())
        with warnings.catch_warnings():  # none of which says that a stage runs without a graph
            warnings.simplefilter("error")
            for _ in range(4):
                torch.testing.assert_close(evaluator.scores()["set"].losses, expected, rtol=1e-4, atol=1e-4)
        assert any(record.replay is not None for record in evaluator.runtime.graphs._recorded.values())
    with at_most(0, model.visual.conv1), pytest.raises(MemoryError, match="not even one image"):
        Evaluator(model, [data])


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_nothing_is_left_of_a_capture_that_fails_on_a_gpu(error: type[BaseException]) -> None:
    capture = on(torch.device("cuda", torch.cuda.current_device()))
    x = torch.zeros(1000, device="cuda")
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        x.add_(1)
        if calls > 1:  # the first run only looks whether it waits
            raise error("of the test")

    with pytest.raises(error, match="of the test"):
        capture(fails)
    torch.rand(1, device="cuda")  # nothing of torch believes that it is being captured

    def adds() -> None:
        x.add_(1)

    replay = capture(adds)
    x.zero_()
    replay()
    replay()
    assert x.unique().tolist() == [2.0]
