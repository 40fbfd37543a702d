"""Counts against what really runs, rates and forecasts against worked examples. No timing is asserted."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from support import tiny_models
from support.wording import refused
from torch import Tensor, nn

from rft_fast import studies
from rft_fast.common.words import duration
from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.stages import Stages
from rft_fast.kernels import Plan
from rft_fast.path import Path
from rft_fast.path.writer import InPlace
from rft_fast.run import cost
from rft_fast.run.cost import Flops, Line, Memory, Rates, Work, counted_evaluator, counted_path
from rft_fast.studies.estimators import Protocol

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.5, 1.0]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "one stage": lambda: tiny_models.toy(kind=tiny_models.Opaque),
    "convolutions": tiny_models.staged,
    "transformer": lambda: tiny_models.transformer(2),
    "two towers": tiny_models.two_towers,
}
Study = Callable[[Path, Evaluator], Any]


def prune(path: Path, evaluator: Evaluator) -> object:
    methods = ["zero", "rescale", "magnitude"]
    return studies.prune_stragglers(
        path, evaluator, ALPHAS, layers={"named": path.layers[:1]}, methods=methods, seeds=[0, 1]
    )


def general(estimator: str, draws: int = 4, **more: Any) -> Study:
    protocol = Protocol(estimator, **more)
    return lambda p, e: studies.sharpness(p, e, ALPHAS, [0.1, 0.5], draws, protocol=protocol)


def layerwise(estimator: str, draws: int = 4, **more: Any) -> Study:
    protocol = Protocol(estimator, **more)
    return lambda p, e: studies.layerwise_sharpness(p, e, ALPHAS, [0.1, 0.5], draws, protocol=protocol)


STUDIES: dict[str, Study] = {
    "interpolation": lambda p, e: studies.interpolation(p, e, ALPHAS),
    "layers": lambda p, e: studies.layerwise_interpolation(p, e, ALPHAS),
    "layers from fine-tuned": lambda p, e: studies.layerwise_interpolation(p, e, ALPHAS, others="finetuned"),
    "first layers": lambda p, e: studies.cumulative_interpolation(p, e, ALPHAS),
    "some of the last layers": lambda p, e: studies.cumulative_interpolation(
        p, e, ALPHAS, directions=["last"], only=[1, len(p.layers) - 1, len(p.layers) + 1]
    ),
    "plain": general("plain"),
    "gradient": general("gradient"),
    "noise batches": general("gradient", noise_batch=10),
    "layer-wise": layerwise("plain"),
    "layer-wise gradient": layerwise("gradient"),
    "layer-wise noise batches": layerwise("plain", noise_batch=10),
    "hessian": layerwise("hessian", 2),
    "worst case": general("apgd-l2", 3),
    "worst case by layer": layerwise("apgd-linf", 3),
    "worst case as published": general("apgd-l2-published", 3, noise_batch=10, restarts=2),
    "prune": prune,
    "coefficients": lambda p, e: studies.coefficients(
        p, e, ALPHAS, {"t": {p.layers[0]: 0.5, None: 1.0}}, {"held": p.layers[:1]}, seeds=[0]
    ),
    "search": lambda p, e: studies.search_coefficients(p, e.among([e.datasets[0].name]), ALPHAS),
    "ensemble": lambda p, e: studies.ensemble(p, e, ALPHAS),
    "some of the interpolation": lambda p, e: studies.interpolation(p, e, ALPHAS, only=[1, 4]),
    "some of the layers": lambda p, e: studies.layerwise_interpolation(
        p, e, ALPHAS, only=[2, len(p.layers) - 1, len(p.layers) + 1]
    ),
    "some of layer-wise": lambda p, e: studies.layerwise_sharpness(
        p,
        e,
        ALPHAS,
        [0.1],
        4,
        only=range(2 * len(p.layers) + 1, 3 * len(p.layers) + 2),
        protocol=Protocol("plain"),
    ),
}


def setting(model: nn.Module, **options: Any) -> tuple[Path, Evaluator, dict[str, tuple[int, bool]]]:
    zero = {name: value.clone() for name, value in model.state_dict().items()}
    one = {
        name: value + 0.01 * torch.ones_like(value) if value.is_floating_point() else value.clone()
        for name, value in zero.items()
    }
    sets = [tiny_models.dataset("a", 37), tiny_models.dataset("b", 20, seed=2, ood=False)]
    evaluator = Evaluator(model, sets, **options)
    return Path(model, zero, one), evaluator, {d.name: (len(d.labels), d.ood) for d in sets}


@contextmanager
def watched(path: Path, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """What really goes through stages, model and kernels, counted as it happens."""
    found, lock = Work.none(evaluator), threading.Lock()
    chains, text = evaluator.stages, len(evaluator.stages.text)

    def spy(run: Callable[..., Tensor], at: int) -> Callable[..., Tensor]:
        def watching(x: Tensor, other: Tensor) -> Tensor:
            with lock:
                found.runs[at] += 1
                found.images[at] += len(x) if at >= text else 0
            return run(x, other)

        return watching

    spied = Stages(
        tuple(replace(s, run=spy(s.run, text + i)) for i, s in enumerate(chains.image)),
        tuple(replace(s, run=spy(s.run, i)) for i, s in enumerate(chains.text)),
        chains.head,
        None if chains.join is None else spy(chains.join, len(found.runs) - 1),
        chains.joined,
        chains.prompts,
    )
    slopes: list[int] = []

    def forward(module: nn.Module, args: tuple[Tensor, ...], result: object) -> None:
        if torch.is_grad_enabled():
            with lock:
                slopes.append(len(args[0]))

    submit = Plan.submit

    def write(plan: Plan, request: Any, runs: Any = None) -> None:
        if plan not in (path.writer.parameters, path.writer.buffers):
            return submit(plan, request)  # noise for directions, which is no write of the path
        tensors = [s.tensor for s in path.slots if s.is_float]
        tensors = [s for s in tensors if isinstance(s, nn.Parameter) == (plan is path.writer.parameters)]
        each = request if isinstance(request, list) else [request] * len(tensors)
        found.writes += plan is path.writer.parameters
        for own, tensor in (
            pair for first, last in runs for pair in list(zip(each, tensors, strict=True))[first:last]
        ):
            if own.noisy or own.masked:
                found.noisy += tensor.numel()
            else:
                found.written += tensor.numel()
        submit(plan, request, runs)

    write_all = InPlace.write

    def copy_integers(writer: InPlace, groups: Any, buffers: bool) -> list[str]:
        integers = [slot for _, rows in groups for slot in rows.integers]
        found.written += sum(s.tensor.numel() for s in integers) if buffers else 0
        return write_all(writer, groups, buffers)

    # Needs are found out with a forward pass of their own, once.
    runtime = evaluator.runtime
    for batches in (runtime.images, runtime.prompts, runtime.slopes, runtime.curvatures):
        _ = batches.need
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "stages", spied)
        patch.setattr(Plan, "submit", write)
        patch.setattr(InPlace, "write", copy_integers)
        hook = evaluator.model.register_forward_hook(forward)
        try:
            yield found
        finally:
            hook.remove()
    found.batches = len(slopes)
    found.gradients[0] = sum(slopes)


# Every study on the transformer; of the others, what their stages change.
CASES = [("transformer", study) for study in STUDIES]
CASES += [(model, study) for model in MODELS for study in list(STUDIES)[1::3] if model != "transformer"]
CASES += [("two towers", study) for study in STUDIES if study.startswith("some")]


@pytest.mark.slow(but="one stage|convolutions")
@pytest.mark.parametrize(("model", "study"), dict.fromkeys(CASES))
def test_counts_are_those_of_the_run(model: str, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_size = 8 if len(study) % 2 else None
    with torch.random.fork_rng():
        made = setting(MODELS[model](), batch_size=batch_size)
    assert_counted(study, *made, monkeypatch)


@pytest.mark.slow(but="^some of the layers$")
@pytest.mark.parametrize(
    "study", ["layers", "plain", "layer-wise gradient", "some of the layers", "some of layer-wise"]
)
def test_counts_are_those_of_the_run_in_pieces(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece begins anew for every few layers."""
    with torch.random.fork_rng():
        made = setting(MODELS["transformer"](), batch_size=8, memory_limit=8_000)
    assert len(made[1].pieces()) > 3
    assert_counted(study, *made, monkeypatch)


def assert_counted(
    study: str,
    path: Path,
    evaluator: Evaluator,
    sizes: dict[str, tuple[int, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = cost.count(STUDIES[study], path, evaluator, sizes)
    with watched(path, evaluator, monkeypatch) as real:
        STUDIES[study](path, evaluator)
    assert counted.images == real.images
    text = len(evaluator.stages.text)
    assert counted.runs[text:] == real.runs[text:]
    prompts = evaluator.stages.prompts
    if prompts is not None:
        # A run of a text stage is one of all prompts, in however many batches.
        once = -(-len(prompts) // evaluator.runtime.prompts.size(len(prompts)))
        assert [once * n for n in counted.runs[:text]] == real.runs[:text]
    assert sum(counted.gradients) + counted.curvatures == sum(real.gradients)
    assert counted.batches == real.batches
    assert counted.writes == real.writes
    assert (counted.written, counted.noisy) == (real.written, real.noisy)


def test_nothing_is_run_or_written_while_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    path, evaluator, sizes = setting(tiny_models.staged())
    before, alpha = path.checksum(), path.alpha
    with watched(path, evaluator, monkeypatch) as real:
        for name, study in STUDIES.items():
            if name != "prune":
                cost.count(study, path, evaluator, sizes)
    assert not any(real.images) and not real.writes and not any(real.gradients)
    assert path.checksum() == before and path.alpha == alpha


def test_sizes_of_data_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    path, evaluator, _ = setting(tiny_models.staged())
    made: list[int] = []
    empty = torch.empty

    def watching(*shape: Any, **options: Any) -> Tensor:
        found = empty(*shape, **options)
        made.append(found.numel())
        return found

    monkeypatch.setattr(torch, "empty", watching)
    work = cost.count(STUDIES["interpolation"], path, evaluator, {"huge": (50_000, True)})
    assert work.images == [3 * 50_000.0] * evaluator.stations
    assert max(made, default=0) < 50_000  # the meter looks at a batch


def test_control_variates_are_counted() -> None:
    path, evaluator, sizes = setting(tiny_models.staged())
    weights = sum(p.numel() for p in path.model.parameters())
    with_slope = cost.count(general("gradient", 4), path, evaluator, sizes)
    assert cost.count(general("plain", 4), path, evaluator, sizes).touched == 0
    # For each alpha and data set the clean product, then one for each rho and draw; three operations each.
    assert with_slope.touched == 3 * 2 * (1 + 2 * 4) * 3 * weights
    assert with_slope.differentiated == weights


def test_the_worst_case_tells_the_weights_that_it_copies() -> None:
    path, evaluator, sizes = setting(tiny_models.staged())
    work = cost.count(general("apgd-l2", 3), path, evaluator, sizes)
    assert work.borrowed == sum(p.numel() for p in path.model.parameters())


def test_gradients_of_late_weights_are_told_from_early_ones() -> None:
    path, evaluator, sizes = setting(tiny_models.staged())
    work = Work.none(evaluator)
    counted, weights = counted_evaluator(evaluator, sizes, work), counted_path(path, work)
    for layer in path.layers:
        counted.gradient([w.live for w in weights.weights([layer])])
    expected = [0.0] * evaluator.stations
    for layer in path.layers:
        expected[evaluator.stage_of(path.tensors(layer))] += 57
    assert work.gradients == expected and sum(map(bool, expected)) > 1


def test_a_walk_that_turns_back_is_refused() -> None:
    _, evaluator, sizes = setting(tiny_models.staged())
    walk = counted_evaluator(evaluator, sizes, Work.none(evaluator)).walk()
    walk.advance(1)
    with refused(ValueError):
        walk.advance(0)


# --- sums, rates, forecasts -------------------------------------------------------------------------


def test_work_adds_and_repeats() -> None:
    one = Work([1.0, 2.0], [1.0, 1.0], scorings=3, gradients=[4.0, 0.0], held=10)
    other = Work([10.0, 0.0], [2.0, 0.0], scorings=1, gradients=[0.0, 1.0], held=7)
    both = one + other
    assert (both.images, both.runs, both.scorings) == ([11.0, 2.0], [3.0, 1.0], 4)
    assert both.gradients == [4.0, 1.0] and both.held == 10
    assert (one * 3).images == [3.0, 6.0] and (one * 3).held == 10 and one.images == [1.0, 2.0]


RATES = Rates([1.0, 3.0], [0.5, 0.0], 10.0, 50.0, 0.25, 2.0, 0.001, 0.01, 0.1, 0.0001)


def test_a_forecast_by_hand() -> None:
    work = Work([100.0, 10.0], [4.0, 2.0], gradients=[5.0, 8.0], curvatures=2, batches=8, writes=3)
    work.written, work.noisy, work.touches, work.touched = 1000, 100, 20, 30000
    forward = 100 + 30 + 4 * 0.5
    # Forward takes 4 of the 10; the way back to the second stage, three quarters of 6.
    slopes = 5 * 10 + 8 * (4 + 4.5)
    others = 2 * 50 + 8 * 0.25 + 3 * 2 + 1 + 1 + 2 + 3
    assert cost.forecast(work, RATES) == pytest.approx(forward + slopes + others)
    assert cost.forecast(work * 7, RATES) == pytest.approx(7 * (forward + slopes + others))


def test_a_line_through_two_times() -> None:
    # a * 100 + b * 4 and a + b.
    assert cost.rates._line(100 * 2 + 4 * 0.5, 2.5, 100, 4) == pytest.approx((2.0, 0.5))
    assert cost.rates._line(100.0, 50.0, 100, 4) == pytest.approx(
        (0.0, 25.0)
    )  # never negative, the sum right
    assert cost.rates._line(100.0, 0.1, 100, 4) == pytest.approx((1.0, 0.0))
    assert cost.rates._line(3.0, 3.0, 1, 1) == (3.0, 0.0)


@pytest.mark.parametrize("model", MODELS)
def test_a_calibration_fits_a_clock_that_knows(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that reckons by the true counts gives rates whose forecasts are the truth."""
    path, evaluator, sizes = setting(MODELS[model]())
    costs, state = cost.flops(evaluator), path.checksum()
    work = Work.none(evaluator)
    walk_class = cost.rates._judged

    def judged(walk: Any) -> None:
        counted = counted_evaluator(
            evaluator, {feed.name: (len(feed), True) for feed in walk.feeds}, work
        ).walk()
        if walk.stage:
            before = copy.deepcopy(work)
            counted.advance(walk.stage)
            work.__dict__.update(before.__dict__)
        counted.scores()
        walk_class(walk)

    def of(clock: object, call: Callable[[], object]) -> float:
        work.__dict__.update(Work.none(evaluator).__dict__)
        call()
        text = len(evaluator.stages.text)
        return 1e-6 + sum(
            n * (2.0 + s) + r * (0.0 if s >= text else 7.0)
            for s, (n, r) in enumerate(zip(work.images, work.runs, strict=True))
        )

    monkeypatch.setattr(cost.rates, "_judged", judged)
    monkeypatch.setattr(cost.rates._Clock, "of", of)
    rates = cost.calibrate(evaluator, path, costs, Work.none(evaluator), seconds=1e6)
    text = len(evaluator.stages.text)
    for stage, rate in enumerate(rates.images[text:], start=text):
        assert rate == pytest.approx(2.0 + stage, rel=1e-3)
    assert rates.runs[:text] == pytest.approx([7.0] * text, rel=1e-3)
    assert rates.runs[text:] == [0.0] * (len(rates.runs) - text)
    assert path.checksum() == state
    assert sizes


@pytest.mark.parametrize("seconds", [1e-3, 0.5])
def test_a_real_calibration_has_all_rates_and_leaves_the_model(seconds: float) -> None:
    path, evaluator, _ = setting(tiny_models.transformer())
    before = path.checksum()
    rates = cost.calibrate(evaluator, path, cost.flops(evaluator), None, seconds)
    assert path.checksum() == before
    # Of a few images the batch itself may be all that takes time.
    assert sum(rates.images + rates.runs) > 0 and min(rates.images + rates.runs) >= 0
    assert rates.gradient + rates.batch > 0 and rates.curvature + rates.batch > 0
    assert rates.write + rates.written > 0 and rates.write + rates.noisy > 0 and rates.touch > 0
    none = cost.calibrate(evaluator, path, cost.flops(evaluator), Work.none(evaluator), seconds)
    assert none.gradient == none.curvature == 0


def test_an_evaluator_of_another_model_is_refused() -> None:
    path, _, _ = setting(tiny_models.staged())
    _, other, _ = setting(tiny_models.staged())
    with refused(ValueError):
        cost.calibrate(other, path, cost.flops(other))


# --- FLOPs and bytes ----------------------------------------------------------------------------------


def test_flops_of_stages_add_up_to_the_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Tanh(), nn.Linear(5, 6))
    path, evaluator, sizes = setting(model)
    found = cost.flops(evaluator)
    assert found.forward == 2 * (192 * 5 + 5 * 6)
    work = cost.count(STUDIES["interpolation"], path, evaluator, sizes)
    assert found.of(work) == 3 * 57 * found.forward
    assert found.forwards(work) == 3 * 57
    slopes = cost.count(general("gradient"), path, evaluator, sizes)
    full = cost.flops(evaluator, slopes)
    # The image's own gradient is not asked for.
    assert full.gradient == 2 * (2 * 192 * 5 + 3 * 5 * 6)


def test_flops_of_a_text_tower_are_those_of_all_prompts() -> None:
    _, evaluator, _ = setting(tiny_models.two_towers())
    _, more, _ = setting(tiny_models.two_towers(4))
    few, many = cost.flops(evaluator), cost.flops(more)
    assert few.text == len(evaluator.stages.text)
    assert sum(many.stages[: many.text]) == 2 * sum(few.stages[: few.text]) > 0


def test_late_gradients_take_fewer_flops() -> None:
    found = Flops([10.0, 30.0], 0, gradient=120.0)
    early = Work([0.0, 0.0], [0.0, 0.0], gradients=[1.0, 0.0])
    late = Work([0.0, 0.0], [0.0, 0.0], gradients=[0.0, 1.0])
    assert found.of(early) == 120 and found.of(late) == 40 + 60


def test_memory_is_that_of_its_parts() -> None:
    path, evaluator, sizes = setting(tiny_models.staged())
    weights = 3 * sum(t.nbytes for t in path.model.state_dict().values())
    work = cost.count(layerwise("apgd-l2", 3), path, evaluator, sizes)
    found = cost.memory(work, evaluator, path, 57, copies=9)
    assert found.weights == weights
    assert found.images == 57 * 3 * 8 * 8
    assert found.copies == 4 * int(work.differentiated + 9 * work.borrowed)
    assert found.total == sum(getattr(found, f.name) for f in fields(Memory))
    walked = cost.count(STUDIES["layers"], path, evaluator, sizes)
    assert walked.held >= 57
    assert cost.memory(walked, evaluator, path, 57).held == walked.held * evaluator.boundary
    assert cost.memory(walked, evaluator, path, 57).copies == 0
    shared = cost.count(layerwise("per-image-gradient", 2), path, evaluator, sizes)
    assert 0 < shared.recorded <= 37
    assert cost.memory(shared, evaluator, path, 57).held > shared.held * evaluator.boundary


# --- words ----------------------------------------------------------------------------------------------


def test_a_table_says_all_of_it() -> None:
    path, evaluator, sizes = setting(tiny_models.staged())
    work = cost.count(STUDIES["interpolation"], path, evaluator, sizes)
    rates = Rates([1.0] * 3, [0.0] * 3, 0, 0, 0, 0, 0, 0, 0, 0)
    slow = Rates([2.0] * 3, [0.0] * 3, 0, 0, 0, 0, 0, 0, 0, 0)
    memory = cost.memory(work, evaluator, path, 57)
    lines = [Line("interpolation", 2, work * 2, rates), Line("layers", 1, work, slow, more=60.0)]
    text = cost.table(lines, cost.flops(evaluator), memory, path, ["which layers is not known"])
    rows = text.splitlines()
    assert rows[1].split()[:4] == ["interpolation", "2", "6", "342"]
    assert rows[2].split()[:4] == ["layers", "1", "3", "171"]
    assert rows[3].split()[:3] == ["total", "9", "513"]
    assert rows[1].endswith(duration(3 * 342)) and rows[2].endswith(duration(6 * 171 + 60))
    assert rows[3].endswith(duration(3 * 342 + 6 * 171 + 60))
    assert f"peak memory: {memory.total / 2**30:.3g} GiB (" in text and "- which layers is not known" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (190800, "53 h 0 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == (words if seconds < 172800 else "2 d 5 h")
