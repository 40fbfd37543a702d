"""Soups and Model Stock, in closed form, against files that are merged, by brute force, and as a run."""

from __future__ import annotations

import math
from pathlib import Path as File
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_merge, tiny_zoo
from support.tiny_models import dataset, deep
from support.wording import refused, warned
from torch import Tensor

from rft_fast import results, studies, sweep
from rft_fast.checkpoints import load
from rft_fast.config.request import read
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.merge import streamed
from rft_fast.merge.greedy import greedy_soup
from rft_fast.path import Path
from rft_fast.path.writer import InPlace
from rft_fast.run import cost, trackers
from rft_fast.run.measures import Measured
from rft_fast.run.wiring import Models, same_integers
from rft_fast.studies.bands import dealt
from rft_fast.studies.images import ImageResults
from rft_fast.studies.others import Others
from rft_fast.studies.soups import id_accuracies

ALPHAS = [0.0, 0.5, 1.0]
State = dict[str, Tensor]


def moved(state: State, seed: int, scale: float = 0.3) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in state.items()
    }


def setting(sets: list[Dataset]) -> tuple[Any, State, dict[str, State], Path, Evaluator]:
    model = deep().eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {name: moved(zero, seed) for seed, name in enumerate("abc")}
    return model, zero, states, Path(model, zero, states["a"]), Evaluator(model, sets)


def predicted(state: State, data: Dataset) -> Tensor:
    """The classes by plain torch."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (data.mean, data.std))
    other: Any = deep().eval()
    other.load_state_dict(state)
    with torch.no_grad():
        found: Tensor = other((data.images.float() / 255 - mean) / std).argmax(1)
    return found


def hits(state: State, data: Dataset) -> Tensor:
    return (predicted(state, data) == data.labels).double()


# --- the arithmetic -----------------------------------------------------------------------------------


def test_model_stock_in_closed_form() -> None:
    """Of K differences of one length, with the cosine c, t is K c / (1 + (K - 1) c)."""
    base = {"w": torch.tensor([5.0, 0.0, 0.0, 0.0]), "orthogonal": torch.zeros(4), "still": torch.ones(2)}
    common = torch.tensor([3.0, 0.0, 0.0, 0.0])
    models = []
    for k in range(3):
        own = torch.zeros(4)
        own[k + 1] = 4.0  # |difference| = 5, and 9 of 25 is common to two: c = .36
        models.append({"w": base["w"] + common + own, "orthogonal": own, "still": torch.ones(2)})
    state, ratios = streamed.model_stock(base, iter(models))
    t = 3 * 0.36 / (1 + 2 * 0.36)
    assert ratios == {"w": pytest.approx(t), "orthogonal": pytest.approx(0, abs=1e-9)}
    expected = base["w"] + t * (common + torch.tensor([0.0, 4 / 3, 4 / 3, 4 / 3]))
    torch.testing.assert_close(state["w"], expected)
    torch.testing.assert_close(state["orthogonal"], torch.zeros(4), atol=1e-7, rtol=0)
    assert state["still"].equal(torch.ones(2))
    same, ratios = streamed.model_stock(base, [models[0], models[0]])
    assert ratios["w"] == pytest.approx(1) and torch.allclose(same["w"], models[0]["w"])


def test_a_tensor_without_a_result_stays() -> None:
    base = {"s": torch.tensor(1.0), "w": torch.zeros(2)}
    models = [{"s": torch.tensor(1.0 + d), "w": torch.tensor([1.0, d])} for d in (0.5, -0.25)]
    state, ratios = streamed.model_stock(base, models)
    assert math.isnan(ratios["s"]) and state["s"] == 1 and ratios["w"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_mirror_images_have_no_result(dtype: torch.dtype) -> None:
    """Stored in 16 bits, w0 + d and w0 - d are opposite but for rounding, which would decide t."""
    torch.manual_seed(0)
    w0, d = torch.randn(64, 64), 0.05 * torch.randn(64, 64)
    base = {"w": w0.to(dtype)}
    models = [{"w": (base["w"].float() + sign * d).to(dtype)} for sign in (1, -1)]
    state, ratios = streamed.model_stock(base, models)
    assert math.isnan(ratios["w"]) and state["w"].equal(base["w"].float())


@pytest.mark.parametrize("method", ["soup", "model-stock"])
def test_the_bits_are_those_of_merged_files(method: str, tmp_path: File) -> None:
    """With statistics of BatchNorm and a counter, by the rule of merge."""
    norm = {
        "visual.bn.running_mean": torch.randn(3),
        "visual.bn.running_var": torch.rand(3) + 0.5,
        "visual.bn.num_batches_tracked": torch.tensor(7),
    }
    zero = tiny_merge.base() | norm
    models = {name: tiny_merge.moved(zero, seed) for seed, name in enumerate("abcd", 1)}
    models["b"]["visual.bn.num_batches_tracked"] = torch.tensor(9)
    files = tiny_merge.put(tmp_path, **({"zero": zero} if method == "model-stock" else {}), **models)
    merged, _ = tiny_merge.merged(method, files, tmp_path / "out.safetensors")
    found: Any = Others(models).mean("abcd")
    if method == "model-stock":
        found, ratios = Others(models).model_stock(zero, "abcd")
        assert set(ratios) == {n for n, t in zero.items() if t.is_floating_point() and t.numel()}
    assert set(found) == set(merged)
    for name, tensor in merged.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_integers_that_differ_are_refused() -> None:
    one = {"w": torch.zeros(2), "index": torch.tensor([1, 2])}
    with refused(ValueError, "index"):
        streamed.mean([one, {**one, "index": torch.tensor([1, 3])}])
    with refused(ValueError):
        streamed.mean([])


def test_the_zoos_files_have_the_bits_of_merge(tmp_path: File) -> None:
    """At alpha = 1 the live model is the file that merge writes."""
    zoo = tiny_zoo.make(tmp_path)
    models = Models.load(read(["soups", *tiny_zoo.own_models(zoo, "abc"), "--device", "cpu"]))
    path = models.path("b")
    zero = {name: slot.ends[0] for slot in path.slots for name in slot.names}
    stock, _ = models.others.model_stock(zero, "abc")
    for method, state in (("soup", models.others.mean("abc")), ("model-stock", stock)):
        files = {name: zoo / f"{name}.safetensors" for name in "abc"}
        if method == "model-stock":
            files = {"zero": zoo / "zeroshot.safetensors", **files}
        tiny_merge.merged(method, files, zoo / f"{method}.out.safetensors")
        merged = load(zoo / f"{method}.out.safetensors")
        with models.others.between(path, zero, state) as own, own.at(1.0):
            live = {name: tensor.clone() for name, tensor in models.live.state_dict().items()}
        assert live and all(torch.equal(tensor, merged[name]) for name, tensor in live.items())


def test_integers_are_compared_before_a_run() -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("index", torch.tensor([1, 2]))
    model.register_buffer("num_batches_tracked", torch.tensor(0))
    norm = torch.nn.Sequential(model)
    zero = {name: tensor.clone() for name, tensor in norm.state_dict().items()}

    def path(index: int, count: int) -> Path:
        changed = {"0.index": torch.tensor([1, index]), "0.num_batches_tracked": torch.tensor(count)}
        return Path(norm, zero, {**moved(zero, count), **changed})

    first = same_integers(path(2, 5), "a", {})
    assert [*first] == ["0.index"] and same_integers(path(2, 6), "b", first) is first
    with refused(ValueError, "a", "c", "0.index"):
        same_integers(path(3, 5), "c", first)


def test_trackers_tell_the_soups_apart() -> None:
    row = {"study": "soups", "dataset": "far", "method": "uniform", "partners": "a, b", "alpha": 1.0}
    assert trackers._read("soups", "b", row | {"accuracy": 0.5}) == (
        1.0,
        {"soups/far/b/uniform/accuracy": 0.5},
    )
    row |= {"study": "greedy", "method": "kept", "partners": "a", "accuracy": 0.5}
    assert trackers._read("greedy", "b", row) == (1.0, {"greedy/far/b/a/accuracy": 0.5})


# --- the study ----------------------------------------------------------------------------------------


def test_a_soup_whose_accuracy_is_known() -> None:
    """Two heads that err in opposite ways: their mean is right. Zero-shot is at chance."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))
    zero = {"1.weight": torch.zeros(7, 192), "1.bias": torch.zeros(7)}
    right = torch.full((7,), -1.0)
    right[3] = 1.0
    wrong = [torch.zeros(7), torch.zeros(7)]
    wrong[0][1], wrong[1][1] = 4.0, -4.0
    states = {name: {**zero, "1.bias": right + each} for name, each in zip("ab", wrong, strict=True)}
    data = dataset("far", 30)
    data = Dataset("far", data.images, torch.full((30,), 3), data.mean, data.std)
    path, evaluator = Path(model, zero, states["a"]), Evaluator(model, [data])
    rows = studies.soups(path, evaluator, ALPHAS, states, {"uniform": ["a", "b"], "greedy": ["b"]}, model="b")
    at = rows.set_index(["method", "alpha"])["accuracy"]
    assert at["uniform", 1.0] == 1.0 and at["uniform", 0.0] == 0.0 and at["greedy", 1.0] == 1.0
    alone = studies.interpolation(path, evaluator, ALPHAS)
    assert alone["accuracy"].tolist() == [0.0, 0.0, 0.0]  # a says 1
    # Differences (right + wrong) have the cosine (7 - 8 + ...) of their numbers.
    d = [(right + each).double() for each in wrong]
    cosine = float(d[0] @ d[1] / d[0].norm() / d[1].norm())
    ratios = studies.stock_ratios(rows)
    if 1 + cosine > 1e-6:
        assert ratios["1.bias"] == pytest.approx(2 * cosine / (1 + cosine), abs=1e-5)
    loss = rows.set_index(["method", "alpha"])["loss"]["uniform", 0.5]
    assert loss == pytest.approx(math.log(1 + 6 * math.exp(-1.0)), abs=1e-5)


def test_rows_are_of_the_averaged_weights() -> None:
    sets = [dataset("far", 21), dataset("near", 9, seed=2, ood=False)]
    _, zero, states, path, evaluator = setting(sets)
    path.write(0.3)
    before = path.checksum(), path.alpha
    kept: dict[int, Any] = {}
    members = {"uniform": ["a", "b", "c"], "greedy": ["c", "a"]}
    rows = studies.soups(path, evaluator, ALPHAS, states, members, model="c", images=kept)
    assert (path.checksum(), path.alpha) == before and len(kept) == len(rows) == 2 * (3 + 3 + 2)
    stock: Any = Others(states).model_stock(zero, "abc")[0]
    ends = {name: Others(states).mean(names) for name, names in members.items()} | {"model-stock": stock}
    for method, state in ends.items():
        for alpha in ALPHAS if method != "model-stock" else [0.0, 1.0]:
            mixed = {
                name: torch.lerp(zero[name], state[name], alpha)
                if zero[name].is_floating_point()
                else zero[name]
                for name in zero
            }
            for data in sets:
                (row,) = rows[
                    (rows["method"] == method) & (rows["alpha"] == alpha) & (rows["dataset"] == data.name)
                ].to_dict("records")
                assert row["accuracy"] == pytest.approx(float(hits(mixed, data).mean()))
                assert row["partners"] == ", ".join(members.get(method, members["uniform"]))
    found: dict[int, Any] = {}
    for numbers in ([1, 15], [0, *range(2, 15)]):
        studies.soups(
            path, evaluator, ALPHAS, states, members, model="c", only=numbers, sink=found.__setitem__
        )
    parts = studies.frame(row for number in sorted(found) for row in found[number])
    pd.testing.assert_frame_equal(parts.drop(columns="seconds"), rows.drop(columns="seconds"))


def test_the_search_is_recipe_one() -> None:
    sets = [dataset("near", 31, ood=False), dataset("near2", 12, seed=2, ood=False)]
    model, zero, states, path, evaluator = setting(sets)
    # Models beside the one that made the labels: averaging undoes what moved them, but for one far away.
    sets = [
        Dataset(data.name, data.images, predicted(states["a"], data), data.mean, data.std, ood=False)
        for data in sets
    ]
    evaluator = Evaluator(model, sets)
    scales = {"b": 0.2, "c": 3.0, "d": 0.1, "e": 0.15, "f": 0.25}
    states = {name: moved(states["a"], seed, scale) for seed, (name, scale) in enumerate(scales.items(), 10)}

    def accuracy(names: Any) -> float:
        state = {
            name: torch.stack([states[each][name] for each in names]).mean(0)
            if zero[name].is_floating_point()
            else zero[name]
            for name in zero
        }
        return math.fsum(float(hits(state, data).mean()) for data in sets) / 2

    alone = {name: accuracy([name]) for name in states}
    expected = greedy_soup([*states], accuracy)
    before = path.checksum()
    rows = studies.greedy_search(path, evaluator, states, alone, model="m")
    assert path.checksum() == before
    tried = rows.drop_duplicates("partners")
    assert tried["partners"].tolist() == [*expected.alone][1:]
    kept = tried.loc[tried["method"] == "kept", "partners"].tolist()
    assert kept == [*expected.kept][1:] and 0 < len(kept) < 4  # some of them
    if tried["method"].iloc[-1] == "kept":
        last = rows[rows["partners"] == tried["partners"].iloc[-1]]["accuracy"].mean()
        assert last == pytest.approx(expected.accuracy)


def test_its_cost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [dataset("far", 21), dataset("near", 9, ood=False)]
    model, _, states, path, evaluator = setting(sets)
    sizes = {data.name: (len(data.labels), data.ood) for data in sets}
    before = path.checksum()
    members = {"uniform": ["a", "b", "c"], "greedy": ["c", "a"]}
    accuracies = {"a": 0.5, "b": 0.4, "c": 0.6}

    def study(path: Path, evaluator: Evaluator, others: Others) -> None:
        studies.greedy_search(path, evaluator.among(["near"]), others, accuracies)
        studies.soups(path, evaluator, ALPHAS, others, members)

    work = cost.Work.none(evaluator)
    counted = cost.counted_evaluator(evaluator, sizes, work)
    study(cost.counted_path(path, work), counted, cost.CountedOthers(states, path, work))
    assert path.checksum() == before
    written, images, loaded = [0, 0], [0], [0]
    write = InPlace.write

    def watching(writer: InPlace, groups: Any, buffers: bool) -> list[str]:
        written[0] += 1
        written[1] += sum(slot.tensor.numel() for _, rows in groups for slot in rows.slots)
        return write(writer, groups, buffers)

    class Watched(Others):
        def state(self, name: str) -> Any:
            loaded[0] += 1
            return super().state(name)

    monkeypatch.setattr(InPlace, "write", watching)
    _ = evaluator.runtime.images.need
    last = list(model.modules())[-1]
    with last.register_forward_hook(lambda module, args, result: images.append(len(args[0]))):
        study(path, evaluator, Watched(states))
    assert [work.writes, work.written] == written
    assert work.images[-1] == sum(images) == 9 * 2 + 30 * (3 + 2 + 1)
    assert work.loads == loaded[0] == 3 + 3 + 2 + 3
    assert work.combined == 4 * sum(slot.tensor.numel() for slot in path.slots)


# --- the points ---------------------------------------------------------------------------------------


class Kept:
    def __init__(self, rows: pd.DataFrame, hits: np.ndarray) -> None:
        self.rows, self.hits = rows, hits

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        mine = (
            (self.rows["study"] == study) & (self.rows["model"] == model) & (self.rows["dataset"] == dataset)
        ).to_numpy()
        found = self.hits[mine]
        return ImageResults(self.rows[mine], found, np.zeros(found.shape, np.float16), None)


def made() -> tuple[pd.DataFrame, np.ndarray]:
    """Two data sets of 50 images; "b" is best in distribution."""
    draw, rows, table = np.random.default_rng(0), [], []
    for name, ood in (("near", False), ("far", True)):
        keys = [("interpolation", model, None, alpha) for model in "ab" for alpha in ALPHAS]
        keys += [("soups", "b", method, alpha) for method in ("uniform", "greedy") for alpha in ALPHAS]
        keys += [("soups", "b", "model-stock", alpha) for alpha in (0.0, 1.0)]
        for study, model, method, alpha in keys:
            rate = 0.3 + 0.3 * alpha + 0.25 * (model == "b") - 0.1 * (study == "soups")
            each = draw.random(50) < rate
            row = {"study": study, "model": model, "dataset": name, "ood": ood, "alpha": alpha,
                   "method": method, "samples": 50, "accuracy": each.mean()}  # fmt: skip
            if study == "soups":
                row["partners"] = "b" if method == "greedy" else "a, b"
            if method == "model-stock":
                row["coefficients"] = "u.weight=0.5, v=nan"
            rows.append(row)
            table.append(each)
    return studies.frame(rows), np.stack(table)


def test_the_points_against_their_definition() -> None:
    rows, table = made()
    found = studies.soup_points(rows, Kept(rows, table)).set_index(["dataset", "point"])
    assert id_accuracies(rows).keys() == {"b": 0, "a": 0}.keys() and next(iter(id_accuracies(rows))) == "b"

    def of(dataset: str, study: str, model: str, alpha: float, method: str | None = None) -> np.ndarray:
        mine = (rows["dataset"] == dataset) & (rows["study"] == study) & (rows["model"] == model)
        mine &= rows["alpha"] == alpha
        if method is not None:
            mine &= rows["method"] == method
        (place,) = np.flatnonzero(mine.to_numpy())
        return table[place].astype(float)

    assert found["difference_low"].loc["near"].isna().all()  # chosen on these images
    base = of("far", "interpolation", "b", 1.0)
    critical = 2.8  # Student's t, 49 degrees, 1 - 0.025 / 7
    expected = {
        "zero-shot": of("far", "interpolation", "b", 0.0),
        "mean of models": (of("far", "interpolation", "a", 1.0) + base) / 2,
        "uniform soup": of("far", "soups", "b", 1.0, "uniform"),
        "greedy soup": of("far", "soups", "b", 1.0, "greedy"),
        "Model Stock": of("far", "soups", "b", 1.0, "model-stock"),
    }
    near = {alpha: of("near", "soups", "b", alpha, "uniform").mean() for alpha in ALPHAS}
    by_id = max(ALPHAS, key=lambda alpha: (near[alpha], -alpha))
    expected["uniform, alpha by ID"] = of("far", "soups", "b", by_id, "uniform")
    for point, each in expected.items():
        fact, change = found.loc[("far", point)], each - base
        assert fact["accuracy"] == pytest.approx(each.mean()), point
        assert fact["difference"] == pytest.approx(change.mean())
        half = critical * change.std(ddof=1) / math.sqrt(50)
        assert fact["difference_low"] == pytest.approx(change.mean() - half, abs=2e-3)
    assert found.loc[("far", "best model"), "difference"] == 0
    assert math.isnan(found.loc[("far", "best model"), "difference_low"])
    fact = found.loc[("far", "uniform, best alpha")]
    curve = np.stack([of("far", "soups", "b", alpha, "uniform") for alpha in ALPHAS])
    fold, fitted = dealt(50), np.empty(50)
    for image in range(50):
        fitted[image] = curve[curve[:, fold != fold[image]].mean(axis=1).argmax(), image]
    assert fact["accuracy"] == pytest.approx(fitted.mean())
    best = curve.mean(axis=1).argmax()
    good = []
    for place, alpha in enumerate(ALPHAS):
        change = curve[best] - curve[place]
        bound = change.mean() - 2.01 * change.std(ddof=1) / math.sqrt(50)  # 1 - 0.05 / 2
        good += [alpha] if bound <= 0 or place == best else []
    assert (fact["alpha"], fact["alpha_low"], fact["alpha_high"]) == (ALPHAS[best], good[0], good[-1])
    plain = studies.soup_points(rows)
    assert plain["difference_low"].isna().all() and plain["alpha_low"].isna().all()
    pd.testing.assert_series_equal(
        studies.stock_ratios(rows), pd.Series({"u.weight": 0.5, "v": math.nan}, dtype=float)
    )


def test_what_cannot_be_averaged_is_refused() -> None:
    rows, _ = made()
    with refused(ValueError, "soups"):
        studies.soup_points(rows[rows["study"] == "interpolation"])
    with refused(ValueError, "near", "greedy soup"):
        studies.soup_points(rows[rows["method"].fillna("") != "greedy"])
    with refused(ValueError, "b"):
        studies.soup_points(rows[(rows["study"] == "soups") | (rows["model"] == "a")])
    assert "uniform, alpha by ID" not in set(studies.soup_points(rows[rows["ood"]])["point"])
    _, zero, states, path, evaluator = setting([dataset("far", 5)])
    with refused(ValueError, "a"):
        studies.soups(path, evaluator, ALPHAS, states, {"uniform": ["a"]})
    with refused(ValueError, "'x'"):
        studies.soups(path, evaluator, ALPHAS, states, {"uniform": ["a", "x"]})
    with refused(ValueError):
        studies.soups(path, evaluator, ALPHAS, states, {})
    with refused(ValueError, "a"):
        studies.greedy_search(path, evaluator, states, {"a": 0.5})
    opposite = {**states, "b": {name: 2 * zero[name] - t for name, t in states["a"].items()}}
    with warned(UserWarning, next(iter(zero))):
        rows = studies.soups(path, evaluator, ALPHAS, opposite, {"uniform": ["a", "b"]}, only=[3])
    assert studies.stock_ratios(rows).isna().all()


def test_a_run_that_cannot_average_is_refused(tmp_path: File) -> None:
    zoo = tiny_zoo.make(tmp_path)
    tiny_zoo.sweep_refused(["soups", *tiny_zoo.own_models(zoo, "a")], "soups", 2, "a")
    without = tiny_zoo.own_models(zoo, "ab")
    tiny_zoo.sweep_refused(["soups", *without[: without.index("--id-data")]], "soups", "--id-data")
    tiny_zoo.sweep_refused(["soups", *without, "--head", "finetuned"], "soups", "--head")
    tiny_zoo.sweep_refused(["soups", *tiny_zoo.own_models(zoo, "abc"), "--models", "a"], 3, "a", "--models")


@pytest.mark.slow
def test_a_run(tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, rows, table, figure and words; a second run finds nothing to do."""
    zoo = tiny_zoo.make(tmp_path)
    command = ["soups", *tiny_zoo.own_models(zoo, "abc"), "--alphas", "0:1:5", "--device", "cpu"]
    assert sweep.main([*command, "--plan"]) == 0
    printed = capsys.readouterr().out
    line = {words[0]: words for words in map(str.split, printed.splitlines()) if words}
    # Scores at alpha = 0 are known; two candidates are tried on the 12 images in distribution.
    assert line["soups"][3] == f"{52 * (4 + 4 + 1)}" and line["greedy"][3] == f"{2 * 12}"
    out = tmp_path / "run"
    assert sweep.main([*command, "--out", str(out)]) == 0
    assert "single model that is best in distribution" in " ".join(capsys.readouterr().out.split())
    rows = results.load(out)
    accuracies = id_accuracies(rows)
    top = next(iter(accuracies))
    own = rows[rows["study"] == "soups"]
    assert own["model"].unique().tolist() == [top] and len(own) == 2 * (5 + 5 + 2)
    assert own.loc[own["method"] == "uniform", "partners"].unique().tolist() == ["a, b, c"]
    # Merge chooses the same models of the same files.
    search = rows[rows["study"] == "greedy"]
    kept = [top, *search.loc[search["method"] == "kept", "partners"]]
    assert own.loc[own["method"] == "greedy", "partners"].unique().tolist() == [", ".join(kept)]
    data = ["--arch", str(zoo / "tiny.json"), "--id-data", f"near={zoo / 'near'}", "--device", "cpu"]
    files = [zoo / f"{name}.safetensors" for name in "abc"]
    measured = Measured(data, [zoo / "zeroshot.safetensors", *files])
    assert [file.stem for file in greedy_soup(files, measured.accuracy).kept] == kept
    table = pd.read_csv(out / "soups.csv")
    expected = studies.soup_points(rows, results.Stored(out))
    pd.testing.assert_frame_equal(table.fillna({"models": ""}), expected, check_dtype=False)
    assert (out / "figures" / "soups.png").exists()
    assert sweep.main([*command, "--out", str(out)]) == 0
    pd.testing.assert_frame_equal(results.load(out), rows)
    state = load_file(zoo / "b.safetensors")
    assert len(studies.stock_ratios(rows)) == len([n for n in state if "visual" in n or "head" in n])
