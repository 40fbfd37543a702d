"""Any of a study's measurements, made anywhere in any order, are those of the whole study, bit for bit."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pandas as pd
import pytest
import torch
from support import tiny_models
from support.tiny_models import dataset
from support.wording import refused
from torch import nn

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator, Scores, Walk
from rft_fast.path import Path
from rft_fast.studies import ESTIMATORS, Protocol
from rft_fast.studies import interpolate as along
from rft_fast.studies.rows import AT_ONCE, Measured

# Of CASES.
some_slow = pytest.mark.slow(
    only="resnet|towers|goal|prune|pieces|around|gradient|path|^(layers|layer-wise|hessian|worst case)$"
)
pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = [0.0, 0.4, 1.0]
SETS = {"a": 37, "b": 5, "c": 20}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": tiny_models.staged,
    "odd widths": lambda: tiny_models.deep(9),
    "transformer": lambda: tiny_models.transformer(2),
    "resnet": tiny_models.resnet,
    "two towers": tiny_models.two_towers,
}


def pictures(name: str, count: int, side: int) -> Dataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return dataset(name, count, seed=count, images=images, ood=name != "b")


class Worker:
    """A model, its path and its evaluator, built anew as another process would."""

    def __init__(self, kind: str, sets: Sequence[str] = tuple(SETS), **options: Any) -> None:
        with torch.random.fork_rng():
            model = MODELS[kind]()
        generator = torch.Generator().manual_seed(3)
        zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        one = {
            name: t + 0.2 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in zero.items()
        }
        self.path = Path(model, zero, one)
        side = 32 if kind == "resnet" else 8
        self.evaluator = Evaluator(
            model, [pictures(n, SETS[n], side) for n in sets], **{"batch_size": 7, **options}
        )


Study = Callable[..., pd.DataFrame]


@dataclass
class Case:
    study: Study
    kind: str
    known: str | None = None  # the argument that takes known scores
    sets: tuple[str, ...] = tuple(SETS)
    options: dict[str, Any] = field(default_factory=dict)

    def worker(self) -> Worker:
        return Worker(self.kind, self.sets, **self.options)

    def run(self, worker: Worker, known: dict[Any, Any] | None = None, **more: Any) -> pd.DataFrame:
        if known is not None and self.known is not None:
            more[self.known] = known
        return self.study(worker.path, worker.evaluator, model="m", **more)


def interpolation(path: Path, evaluator: Evaluator, **more: Any) -> pd.DataFrame:
    return studies.interpolation(path, evaluator, ALPHAS, **more)


def layers(others: str = "zeroshot") -> Study:
    return lambda p, e, **more: studies.layerwise_interpolation(p, e, ALPHAS, others=others, **more)


def general(*, draws: int = 4, **how: Any) -> Study:
    protocol = Protocol(**how)
    return lambda p, e, **more: studies.sharpness(p, e, ALPHAS, [0.1, 0.4], draws, protocol=protocol, **more)


def layerwise(*, draws: int = 4, **how: Any) -> Study:
    protocol = Protocol(**how)

    def study(path: Path, evaluator: Evaluator, **more: Any) -> pd.DataFrame:
        return studies.layerwise_sharpness(
            path, evaluator, [0.0, 0.6], [0.1, 0.4], draws, protocol=protocol, **more
        )

    return study


def prune(path: Path, evaluator: Evaluator, **more: Any) -> pd.DataFrame:
    return studies.prune_stragglers(
        path, evaluator, ALPHAS, layers={"first": path.layers[:1], "others": path.layers[2:4]},
        methods=["zero", "magnitude", "rescale"], seeds=[4, 7], **more,
    )  # fmt: skip


# In several pieces, so that layers are taken AT_ONCE: the transformer has 19 of them.
PIECES: dict[str, Any] = {"sets": ("a", "c"), "options": {"batch_size": 8, "memory_limit": 8_000}}
ONE: dict[str, Any] = {"sets": ("c",)}
CASES: dict[str, Case] = {
    "interpolation": Case(interpolation, "transformer", "zeroshot"),
    "interpolation, convolutions": Case(interpolation, "convolutions", "zeroshot"),
    "interpolation, two towers": Case(interpolation, "two towers", "zeroshot"),
    "layers": Case(layers(), "transformer", "zeroshot"),
    "layers, convolutions": Case(layers(), "convolutions", "zeroshot"),
    "layers, odd widths": Case(layers(), "odd widths", "zeroshot"),
    "layers, resnet": Case(layers(), "resnet", "zeroshot", **ONE),
    "layers, two towers": Case(layers(), "two towers", "zeroshot", **ONE),
    "layers around the fine-tuned": Case(layers("finetuned"), "transformer", "zeroshot"),
    "layers in pieces": Case(layers(), "transformer", "zeroshot", **PIECES),
    "plain": Case(general(estimator="plain"), "transformer"),
    "per image": Case(general(noise_batch=11), "convolutions"),
    "antithetic": Case(general(estimator="per-image-antithetic"), "convolutions"),
    "gradient by batches": Case(general(estimator="gradient", noise_batch=11), "transformer"),
    "hessian": Case(general(estimator="hessian"), "convolutions"),
    "worst case": Case(general(estimator="apgd-linf"), "convolutions"),
    "until a goal": Case(general(estimator="plain", goal=0.05, most=30), "transformer"),
    "in pieces until a goal": Case(
        general(estimator="gradient", goal=0.02, most=20), "transformer", **PIECES
    ),
    "layer-wise": Case(layerwise(estimator="plain"), "transformer", sets=("b", "c")),
    "layer-wise, odd widths": Case(layerwise(estimator="plain"), "odd widths"),
    "layer-wise, resnet": Case(layerwise(estimator="plain", draws=2), "resnet", **ONE),
    "layer-wise, two towers": Case(layerwise(estimator="gradient", draws=2), "two towers", sets=("b",)),
    "layer-wise antithetic": Case(layerwise(estimator="per-image-antithetic"), "convolutions"),
    "layer-wise gradient": Case(layerwise(estimator="gradient"), "transformer", sets=("b", "c")),
    "layer-wise per image, resnet": Case(layerwise(draws=2), "resnet", sets=("b",)),
    "layer-wise per image": Case(layerwise(noise_batch=9), "convolutions", sets=("b", "c")),
    "layer-wise on the path": Case(layerwise(on="interpolated"), "convolutions"),
    "layer-wise hessian": Case(layerwise(estimator="hessian", goal=0.002, most=12), "convolutions"),
    "layer-wise worst case": Case(layerwise(estimator="apgd-l2"), "convolutions"),
    "layer-wise until a goal": Case(layerwise(estimator="plain", goal=0.005), "transformer", **ONE),
    "layer-wise in pieces": Case(layerwise(estimator="plain", draws=2), "transformer", **PIECES),
    "layer-wise in pieces until a goal": Case(
        layerwise(estimator="plain", goal=0.001, most=10), "transformer", **PIECES
    ),
    "prune": Case(prune, "transformer", "unpruned"),
    "prune, convolutions": Case(prune, "convolutions", "unpruned", sets=("a", "b")),
}
LONG = {"layer-wise in pieces until a goal"}  # of which the first test takes over two seconds
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES]
)


class Told:
    """A sink for one or more calls, wherever they are made: number -> rows, in the order of telling."""

    def __init__(self) -> None:
        self.rows: dict[int, list[dict[str, object]]] = {}

    def __call__(self, number: int, rows: list[dict[str, object]]) -> None:
        assert number not in self.rows
        self.rows[number] = rows

    def frame(self, numbers: Iterable[int] | None = None) -> pd.DataFrame:
        """In the order of the numbers."""
        chosen = self.rows if numbers is None else numbers
        return studies.frame(row for number in sorted(chosen) for row in self.rows[number])


@dataclass
class Whole:
    """What a study of all measurements returns and tells."""

    rows: pd.DataFrame
    told: Told

    @property
    def count(self) -> int:
        return len(self.told.rows)


_WHOLE: dict[str, Whole] = {}


def whole(name: str) -> Whole:
    if name not in _WHOLE:
        told = Told()
        _WHOLE[name] = Whole(CASES[name].run(CASES[name].worker(), sink=told), told)
    return _WHOLE[name]


def assert_same(rows: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        rows.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True
    )


# --- any of them, anywhere ------------------------------------------------------------------------


@some_slow
@EACH
def test_one_at_a_time_in_any_order(name: str) -> None:
    case, all_of_it = CASES[name], whole(name)
    numbers = random.Random(name).sample(range(all_of_it.count), min(all_of_it.count, 40))
    worker, found = case.worker(), Told()
    before = worker.path.checksum()
    for number in numbers:
        rows = case.run(worker, {}, only=[number], sink=found)
        pd.testing.assert_frame_equal(rows, found.frame([number]))
    assert worker.path.checksum() == before
    assert_same(found.frame(), all_of_it.told.frame(numbers))


@some_slow
@EACH
def test_ranges_split_over_two_workers(name: str) -> None:
    """Each keeps its own known scores from range to range."""
    case, all_of_it = CASES[name], whole(name)
    rng = random.Random(name)
    cuts = sorted({0, all_of_it.count, *(rng.randint(0, all_of_it.count) for _ in range(7))})
    ranges = [range(first, last) for first, last in pairwise(cuts)]
    rng.shuffle(ranges)
    workers: list[tuple[Worker, dict[Any, Any]]] = [(case.worker(), {}), (case.worker(), {})]
    found = Told()
    for turn, numbers in enumerate(ranges):
        worker, known = workers[turn % 2]
        case.run(worker, known, only=numbers, sink=found)
    assert_same(found.frame(), all_of_it.rows)
    # And some that lie apart, in a third place.
    some = set(rng.sample(range(all_of_it.count), (all_of_it.count + 1) // 2))
    rows = case.run(case.worker(), {}, only=some)
    assert_same(rows, all_of_it.told.frame(some))


@pytest.mark.slow
def test_there_is_something_to_tell_apart() -> None:
    """So that the tests above could fail: pieces, chunks of layers, draws that differ, sets of all kinds."""
    for name, case in CASES.items():
        worker = case.worker()
        parts = worker.evaluator.parts(None, case.sets[0])
        assert (len(parts[0].pieces()) > 1) == ("pieces" in name), name
        if "layer" in name and "pieces" in name:
            assert len(worker.path.layers) > 2 * AT_ONCE
        if "goal" in name:
            drawn = whole(name).rows["draws"]
            assert drawn[drawn > 0].nunique() > 1, name
        assert whole(name).count > 5 and whole(name).rows["loss"].nunique() > 5


# --- what the numbers are -------------------------------------------------------------------------


@EACH
def test_numbers_count_from_zero_and_are_told_once_with_their_rows(name: str) -> None:
    found = whole(name)
    assert sorted(found.told.rows) == list(range(found.count))
    pd.testing.assert_frame_equal(found.rows, found.told.frame())
    assert all(found.told.rows.values())


def test_rows_come_in_the_order_of_the_numbers_whatever_was_made_first() -> None:
    told = Told()
    record = Measured("s", 4, [3, 0, 2], told)
    assert [record.wants(number) for number in range(5)] == [True, False, True, True, False]
    for number in (2, 0, 3):
        record.add(number, [{"study": "s", "draws": 10 * number}, {"study": "s", "draws": 10 * number + 1}])
    assert list(told.rows) == [2, 0, 3]
    assert record.frame()["draws"].tolist() == [0, 1, 20, 21, 30, 31]
    pd.testing.assert_frame_equal(record.frame(), told.frame())


def places(rows: pd.DataFrame, *columns: str) -> list[tuple[object, ...]]:
    """What the rows are of, in order, each once."""
    keys = rows[list(columns)].astype(object).where(rows[list(columns)].notna(), None)
    return list(dict.fromkeys(keys.itertuples(index=False, name=None)))


def test_the_order_is_the_documented_one() -> None:
    rows = whole("interpolation").rows
    assert places(rows, "alpha", "dataset") == [(a, d) for a in ALPHAS for d in SETS]
    assert whole("interpolation").count == 9

    ordered = whole("layers").rows["layer"].unique().tolist()
    assert len(ordered) == 19
    assert places(whole("layers").rows, "dataset", "layer") == [(d, n) for d in SETS for n in ordered]
    assert whole("layers").count == 57
    assert (whole("layers").rows.groupby(["dataset", "layer"])["alpha"].apply(list).map(len) == 3).all()

    assert places(whole("plain").rows, "alpha", "dataset") == [(a, d) for a in ALPHAS for d in SETS]
    assert whole("plain").count == 9
    rows = whole("layer-wise").rows
    expected = [(a, d, n) for a in (0.0, 0.6) for d in ("b", "c") for n in ordered]
    assert places(rows, "alpha", "dataset", "layer") == expected and whole("layer-wise").count == 76
    rows = whole("layer-wise hessian").rows
    assert places(rows, "alpha", "dataset") == [(a, d) for a in (0.0, 0.6) for d in SETS]
    assert whole("layer-wise hessian").count == 6  # one for all layers

    rows = whole("prune").rows
    curves = places(rows, "method", "criterion", "control", "seed")
    assert len(curves) == 1 + 2 * (4 + 3 + 4) and curves[0] == (None, None, None, None)
    assert whole("prune").count == len(curves) * 3
    assert places(rows, "method", "criterion", "control", "seed", "alpha") == [
        (*curve, alpha) for curve in curves for alpha in ALPHAS
    ]


def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may be scored, differentiated or written."""
    for kind, call in (
        (Evaluator, "walk"), (Evaluator, "gradient"), (Evaluator, "curvature"), (Path, "_write"),
    ):  # fmt: skip
        monkeypatch.setattr(kind, call, lambda *_, call=call, **__: pytest.fail(call))


@pytest.mark.slow(only="two towers|goal")
@EACH
def test_numbers_that_there_are_none_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, count = CASES[name], whole(name).count
    worker, known = case.worker(), {}  # type: ignore[var-annotated]
    idle(monkeypatch)
    for only, words in (
        ([count], str(count)),
        ([0, -1], "-1"),
        ({count + 7, count, 0, -2}, f"-2, {count}, {count + 7}"),
        (range(count, count + 6), rf"{count}, {count + 1}, {count + 2}, {count + 3} and 2 more"),
    ):
        with refused(ValueError, count - 1, words):
            case.run(worker, known, only=only, sink=lambda *told: pytest.fail("told"))
    assert not known


TABLE = studies.frame([])
OF_WRONG_TYPES: dict[str, tuple[Callable[[Worker], object], tuple[str, ...]]] = {
    "alphas, text": (lambda w: studies.interpolation(w.path, w.evaluator, "01"), ("alphas", "list")),
    "alphas, none": (
        lambda w: studies.layerwise_interpolation(w.path, w.evaluator, None),
        ("alphas", "list"),
    ),
    "alphas, texts": (lambda w: studies.prune_stragglers(w.path, w.evaluator, ["0", "1"]), ("alphas", "'0'")),
    "alphas, digits": (lambda w: studies.interpolation(w.path, w.evaluator, [0, 10**400, 1]), ("alphas",)),
    "rhos, a number": (lambda w: studies.sharpness(w.path, w.evaluator, [0.5], 1.0), ("rhos", "list", "1.0")),
    "rhos, nothing": (
        lambda w: studies.layerwise_sharpness(w.path, w.evaluator, [0.5], [None]),
        ("rhos", "None"),
    ),
    "no path": (
        lambda w: studies.interpolation(w.evaluator, w.evaluator, ALPHAS),
        ("rft_fast.Path",),
    ),
    "no evaluator": (lambda w: studies.sharpness(w.path, None, [0.5], [1.0]), ("Evaluator", "NoneType")),
    "no protocol": (
        lambda w: studies.sharpness(w.path, w.evaluator, [0.5], [1.0], protocol="plain"),
        ("Protocol", "'plain'"),
    ),
    "keep": (lambda w: studies.prune_stragglers(w.path, w.evaluator, ALPHAS, "0.5"), ("keep", "'0.5'")),
    "others": (
        lambda w: studies.layerwise_interpolation(w.path, w.evaluator, ALPHAS, others=[]),
        ("others",),
    ),
    "layers": (lambda w: studies.layerwise_interpolation(w.path, w.evaluator, ALPHAS, "0"), ("layers",)),
    "only, a number": (lambda w: studies.interpolation(w.path, w.evaluator, ALPHAS, only=3), ("only", "3")),
    "only, text": (lambda w: studies.interpolation(w.path, w.evaluator, ALPHAS, only="0"), ("only", "'0'")),
    "only, a half": (
        lambda w: studies.interpolation(w.path, w.evaluator, ALPHAS, only=[0.5]),
        ("only", "0.5"),
    ),
    "goal": (lambda w: Protocol(goal="small"), ("goal", "'small'")),
    "rows, a list": (lambda w: studies.summarize([]), ("summarize", "DataFrame", "list")),
    "rows, another table": (lambda w: studies.stragglers(pd.DataFrame({"a": [1]})), ("COLUMNS",)),
    "rows of a correlation": (lambda w: studies.correlation([1]), ("correlation", "list")),
    "rows of gains": (lambda w: studies.best_gains(None), ("best_gains", "NoneType")),
    "xi": (lambda w: studies.summarize(TABLE, "2 %"), ("xi", "'2 %'")),
    "a straggler's margin": (lambda w: studies.stragglers(TABLE, None), ("margin", "None")),
    "a margin of zero": (lambda w: studies.near_zero(TABLE, None), ("margin", "None")),
}


@pytest.mark.parametrize("call", OF_WRONG_TYPES)
def test_what_is_of_a_wrong_type_is_named_before_anything_runs(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, facts = OF_WRONG_TYPES[call]
    worker = Worker("convolutions")
    idle(monkeypatch)
    with refused((TypeError, ValueError), *facts):
        make(worker)


@EACH
def test_none_of_them_is_nothing_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    worker, known = case.worker(), {}  # type: ignore[var-annotated]
    idle(monkeypatch)
    for only in ([], set(), range(3, 3)):
        rows = case.run(worker, known, only=only, sink=lambda *told: pytest.fail("told"))
        assert rows.empty and list(rows.columns) == list(studies.COLUMNS)
    assert not known


@pytest.mark.parametrize("estimator", [None, *ESTIMATORS])
def test_without_layers_there_are_no_measurements(estimator: str | None) -> None:
    study = layers() if estimator is None else layerwise(estimator=estimator)
    worker = Worker("convolutions")
    assert study(worker.path, worker.evaluator, layers=[], only=[]).empty
    with refused(ValueError):
        study(worker.path, worker.evaluator, layers=[], only=[0])


# --- a study that is stopped ----------------------------------------------------------------------


class Stop(BaseException):
    """What a study cannot be prepared for."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@some_slow
@EACH
@pytest.mark.usefixtures("no_collector")
def test_a_sink_that_fails_leaves_the_model_and_the_rest_can_be_made(name: str) -> None:
    case, all_of_it = CASES[name], whole(name)
    worker = case.worker()
    worker.path.write(0.37, 0.2, seed=8)
    worker.path.write(0.9, layers=worker.path.layers[-1:])
    before, kept = worker.path.checksum(), []
    training = [module.training for module in worker.path.model.modules()]
    for fail_at in sorted({1, (all_of_it.count + 1) // 2, all_of_it.count}):
        found = Told()

        def sink(number: int, rows: list[dict[str, object]], found: Told = found, at: int = fail_at) -> None:
            if len(found.rows) == at - 1:
                raise Stop
            found(number, rows)

        with pytest.raises(Stop) as stopped:
            case.run(worker, {}, sink=sink)
        kept.append(stopped)  # with all frames of the study
        assert worker.path.checksum() == before and worker.path.alpha is None
        assert list(found.rows) == list(all_of_it.told.rows)[: fail_at - 1]
        assert [module.training for module in worker.path.model.modules()] == training
        if 1 < fail_at:
            rest = set(range(all_of_it.count)) - set(found.rows)
            case.run(worker, {}, only=rest, sink=found)
            assert_same(found.frame(), all_of_it.rows)
            assert worker.path.checksum() == before
    del kept


# --- scores that are known ------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each data set goes to its logits."""
    found: Counter[str] = Counter()
    variants = Walk.variants

    def watching(walk: Walk, write: Callable[[int], object], count: int, last: int) -> Any:
        found.update({feed.name: count for feed in walk.feeds})
        return variants(walk, write, count, last)

    monkeypatch.setattr(Walk, "variants", watching)
    return found


def taken(scored: Counter[str]) -> dict[str, int]:
    counts = dict(scored)
    scored.clear()
    return counts


def right(kind: str, alphas: Sequence[float] = ALPHAS) -> dict[tuple[str, float], Scores]:
    """Scores of the path in another place, each data set and position on its own."""
    found = {}
    for name in SETS:
        worker = Worker(kind, [name])
        for alpha in alphas:
            with worker.path.at(alpha):
                found[name, alpha] = worker.evaluator.scores()[name]
    return found


def wrong(scores: Scores) -> Scores:
    """As right, but a nat worse, and all wrong."""
    return Scores(scores.losses + 1, torch.zeros_like(scores.correct))


def equal(got: Scores, expected: Scores) -> bool:
    return torch.equal(got.losses, expected.losses) and torch.equal(got.correct, expected.correct)


@pytest.mark.parametrize("kind", ["transformer", "convolutions"])
def test_interpolation_reads_and_fills_the_zero_shot_scores(kind: str, scored: Counter[str]) -> None:
    worker, truth = Worker(kind), right(kind)
    taken(scored)
    known: dict[str, Scores] = {}
    rows = studies.interpolation(worker.path, worker.evaluator, ALPHAS, zeroshot=known)
    assert taken(scored) == dict.fromkeys(SETS, 3)
    assert set(known) == set(SETS) and all(equal(known[name], truth[name, 0.0]) for name in SETS)

    again = studies.interpolation(worker.path, worker.evaluator, ALPHAS, zeroshot=known)
    assert taken(scored) == dict.fromkeys(SETS, 2)
    assert_same(again, rows)
    # Alpha = 0 is all there is to some measurements, and what others are compared with.
    some = {"b": truth["b", 0.0]}
    studies.interpolation(worker.path, worker.evaluator, ALPHAS, only=[0, 1, 5], zeroshot=some)
    # Always together, so that bits are the same; with the fine-tuned end, from which the bump is measured.
    assert taken(scored) == {"a": 3, "b": 3, "c": 3}
    assert set(some) == set(SETS) and all(equal(some[name], truth[name, 0.0]) for name in SETS)
    # What is known is believed.
    false = {"a": wrong(truth["a", 0.0])}
    other = studies.interpolation(worker.path, worker.evaluator, ALPHAS, zeroshot=false)
    mine, plain = (table[table["dataset"] == "a"].set_index("alpha") for table in (other, rows))
    assert mine.loc[0.0, "accuracy"] == 0 < plain.loc[0.0, "accuracy"]
    assert mine.loc[0.4, "gain"] == mine.loc[0.4, "accuracy"] == plain.loc[0.4, "accuracy"]
    assert mine.loc[1.0, "rise"] == pytest.approx(plain.loc[1.0, "rise"] - 1, abs=1e-6)
    assert_same(*(t[t["dataset"] != "a"] for t in (other, rows)))


@pytest.mark.parametrize("limit", [None, 8_000])
def test_layers_read_and_fill_the_zero_shot_scores(limit: int | None, scored: Counter[str]) -> None:
    worker, truth = Worker("transformer", batch_size=8, memory_limit=limit), {}  # type: ignore[var-annotated]
    with worker.path.at(0.0):
        for name in SETS:
            truth[name] = worker.evaluator.parts(None, name)[0].scores()[name]
    pieces = {name: len(worker.evaluator.parts(None, name)[0].pieces()) for name in SETS}
    assert (max(pieces.values()) > 1) == (limit is not None)
    count = len(worker.path.layers)
    each = {name: 2 * count * pieces[name] for name in SETS}  # two positions besides alpha = 0
    taken(scored)
    known: dict[str, Scores] = {}
    rows = layers()(worker.path, worker.evaluator, zeroshot=known)
    assert taken(scored) == {name: 1 + each[name] for name in SETS}
    assert set(known) == set(SETS) and all(equal(known[name], truth[name]) for name in SETS)
    again = layers()(worker.path, worker.evaluator, zeroshot=known)
    assert taken(scored) == each
    assert_same(again, rows)
    # One layer of the second data set.
    some: dict[str, Scores] = {}
    layers()(worker.path, worker.evaluator, zeroshot=some, only=[count])
    assert list(some) == ["b"] and equal(some["b"], truth["b"])
    assert taken(scored) == {"b": 1 + 2 * pieces["b"]}
    false = {"b": wrong(truth["b"])}
    other = layers()(worker.path, worker.evaluator, zeroshot=false)
    assert (other.loc[(other["dataset"] == "b") & (other["alpha"] == 0), "accuracy"] == 0).all()
    assert_same(*(t[t["dataset"] != "b"] for t in (other, rows)))


def test_layers_around_the_fine_tuned_have_no_use_for_them() -> None:
    worker, known = Worker("convolutions"), {"a": wrong(right("convolutions")["a", 0.0])}
    rows = layers("finetuned")(worker.path, worker.evaluator, zeroshot=known)
    assert list(known) == ["a"] and not known["a"].correct.any()
    assert_same(rows, layers("finetuned")(worker.path, worker.evaluator))


@pytest.mark.slow
def test_pruning_reads_and_fills_the_unpruned_scores(scored: Counter[str]) -> None:
    worker, truth = Worker("transformer"), right("transformer")
    taken(scored)
    known: dict[tuple[str, float], Scores] = {}
    rows = prune(worker.path, worker.evaluator, unpruned=known)
    curves = 22  # and the unpruned one; none of them is pruned at alpha = 0
    assert taken(scored) == dict.fromkeys(SETS, 2 * curves + 3)
    assert set(known) == set(truth) and all(equal(known[key], truth[key]) for key in truth)
    again = prune(worker.path, worker.evaluator, unpruned=known)
    assert taken(scored) == dict.fromkeys(SETS, 2 * curves)
    assert_same(again, rows)
    # One pruned position needs the unpruned ones there and at alpha = 0, if these are not known.
    some = {("a", 0.0): truth["a", 0.0], ("c", 1.0): truth["c", 1.0]}
    prune(worker.path, worker.evaluator, unpruned=some, only=[5])
    assert taken(scored) == dict.fromkeys(SETS, 3)  # always together, so that bits are the same
    assert set(some) == {(name, alpha) for name in SETS for alpha in (0.0, 1.0)}
    assert all(equal(some[key], truth[key]) for key in some)
    false = {("b", 0.4): wrong(truth["b", 0.4])}
    other = prune(worker.path, worker.evaluator, unpruned=false)
    there = (other["dataset"] == "b") & (other["alpha"] == 0.4)
    assert (other.loc[there & other["method"].isna(), "accuracy"] == 0).all()
    assert (other.loc[there, "change"] == other.loc[there, "accuracy"]).all()
    assert_same(*(t[~there] for t in (other, rows)))


# --- together or alone ----------------------------------------------------------------------------


@pytest.mark.slow(only="^resnet$")
@pytest.mark.parametrize("kind", ["transformer", "convolutions", "resnet", "two towers"])
def test_data_sets_scored_together_or_alone_give_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    among = Evaluator.among

    def watching(evaluator: Evaluator, names: Sequence[str]) -> Evaluator:
        groups.append(list(names))
        return among(evaluator, groups[-1])

    monkeypatch.setattr(Evaluator, "among", watching)
    found = []
    for most, expected in ((4096, ["abc"]), (1, ["a", "b", "c"]), (41, ["a", "bc"]), (42, ["ab", "c"])):
        monkeypatch.setattr(along, "TOGETHER", most)
        groups.clear()
        worker = Worker(kind)
        found.append(interpolation(worker.path, worker.evaluator))
        # At three positions; the fine-tuned end is scored ahead, where a set first needs it.
        assert sorted("".join(names) for names in groups) == sorted(expected * 3)
        assert_same(found[-1], found[0])
    assert found[0]["loss"].nunique() == 9


# --- what else a measurement does not depend on ---------------------------------------------------


@pytest.mark.slow(but="^None-plain$")
@pytest.mark.parametrize("estimator", ["plain", "per-image", "gradient"])
@pytest.mark.parametrize("limit", [None, 8_000])
def test_draws_until_a_goal_are_those_of_the_layer_alone(estimator: str, limit: int | None) -> None:
    goal = {"plain": 0.008, "per-image": 0.006, "gradient": 0.001}[estimator]
    study = layerwise(estimator=estimator, goal=goal, most=12)
    worker = Worker("transformer", ["a"], batch_size=8, memory_limit=limit)
    assert (len(worker.evaluator.pieces()) > 1) == (limit is not None)
    rows = study(worker.path, worker.evaluator)
    drawn = rows[rows["draws"] > 0].groupby("layer", sort=False)["draws"].max()
    assert drawn.min() == 4 and drawn.max() == 8  # those of the pilot are not among them
    names = worker.path.layers
    rng = random.Random(1)
    some = set(rng.sample(names, 9))
    for chosen in (*([name] for name in rng.sample(names, 6)), [name for name in names if name in some]):
        alone = study(worker.path, worker.evaluator, layers=chosen)
        assert_same(alone, rows[rows["layer"].isin(chosen)].reset_index(drop=True))


@pytest.mark.slow(only="resnet|two towers")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("batch_size", "frozen"), [(7, False), (7, True), (None, False)])
def test_gradients_do_not_depend_on_which_others_are_asked_for(
    kind: str, batch_size: int | None, frozen: bool
) -> None:
    """That is what makes measurements with the control variate exact in any selection."""
    evaluator = Worker(kind, ["b", "c"], batch_size=batch_size).evaluator
    evaluator.model.requires_grad_(not frozen)
    weights = list(evaluator.model.parameters())
    loss, gradients = evaluator.gradient(weights)
    assert sum(bool(gradient.any()) for gradient in gradients) > len(weights) / 2
    rng = random.Random(0)
    chosen = [[k] for k in {0, len(weights) - 1, *rng.sample(range(len(weights)), min(16, len(weights)))}]
    chosen += [rng.sample(range(len(weights)), rng.randint(2, len(weights))) for _ in range(8)]
    for some in chosen:
        again, found = evaluator.gradient([weights[k] for k in some])
        assert again == loss
        for k, gradient in zip(some, found, strict=True):
            assert torch.equal(gradient, gradients[k]), (kind, k, len(some))
    assert all(weight.requires_grad is not frozen for weight in weights)
