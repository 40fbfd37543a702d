"""Paths between two fine-tuned models, in closed form, by brute force, and as a run."""

from __future__ import annotations

import math
from pathlib import Path as File
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_zoo
from support.tiny_models import dataset, deep
from support.wording import refused
from torch import Tensor

from rft_fast import catalogue, results, studies, sweep
from rft_fast.config.request import read
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path
from rft_fast.path.writer import InPlace
from rft_fast.run import cost
from rft_fast.studies.bands import dealt
from rft_fast.studies.facts import Facts
from rft_fast.studies.images import ImageResults
from rft_fast.studies.others import Others

ALPHAS = [0.0, 0.25, 0.5, 1.0]
State = dict[str, Tensor]


def moved(state: State, seed: int, scale: float = 0.3) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in state.items()
    }


def pixels(data: Dataset) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (data.mean, data.std))
    return (data.images.float() / 255 - mean) / std


def scored(model: Any, state: State, data: Dataset) -> tuple[Tensor, Tensor]:
    """Losses and hits by plain torch."""
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(pixels(data)).double()
    losses = torch.nn.functional.cross_entropy(logits, data.labels, reduction="none")
    return losses, (logits.argmax(1) == data.labels).double()


def test_a_bump_in_closed_form() -> None:
    """With both matrices of opposite sign the model is the same; logits at alpha are (1 - 2 alpha)^2 z."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 5, bias=False), torch.nn.Linear(5, 7, bias=False)
        )
    one = {name: 3 * tensor.clone() for name, tensor in model.state_dict().items()}
    zero = moved(one, 1)
    data = dataset("far", 60)
    with torch.no_grad():
        logits = (pixels(data).flatten(1) @ one["1.weight"].T @ one["2.weight"].T).double()
    data = Dataset("far", data.images, logits.argmax(1), data.mean, data.std)  # the model is always right
    path, evaluator = Path(model, zero, one), Evaluator(model, [data])
    opposite = {name: -tensor for name, tensor in one.items()}
    rows = studies.pairs(path, evaluator, ALPHAS, {"b": opposite}, model="a")
    for alpha, row in zip(ALPHAS, rows.to_dict("records"), strict=True):
        scale = (1 - 2 * alpha) ** 2
        expected = torch.nn.functional.cross_entropy(scale * logits, data.labels)
        assert row["loss"] == pytest.approx(float(expected), abs=1e-5)
        assert row["accuracy"] == (1.0 if scale else float((data.labels == 0).double().mean()))
    (fact,) = studies.pair_effects(rows).to_dict("records")
    ends = float(torch.nn.functional.cross_entropy(logits, data.labels))
    assert fact["bump"] == pytest.approx(math.log(7) - ends, abs=1e-5) and fact["bump_alpha"] == 0.5
    assert fact["bump_low"] > 0 and fact["gain"] == 0 and fact["middle"] == 0.5
    assert fact["above_line"] == pytest.approx(float((data.labels == 0).double().mean()) - 1)
    # The path from zero-shot to either of them says nothing of this bump.
    own = studies.summarize(studies.interpolation(path, evaluator, ALPHAS))
    assert own["bump"].iloc[0] < fact["bump"] / 2


def test_it_is_the_line_between_the_two() -> None:
    model = deep().eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {name: moved(zero, seed) for seed, name in enumerate("abc")}
    sets = [dataset("far", 21), dataset("near", 9, seed=2, ood=False)]
    path, evaluator = Path(model, zero, states["a"]), Evaluator(model, sets, batch_size=8)
    path.write(0.3)
    before = path.checksum(), path.alpha
    kept: dict[int, Any] = {}
    rows = studies.pairs(path, evaluator, ALPHAS, states, model="a", images=kept)
    assert (path.checksum(), path.alpha) == before
    assert list(rows["partners"].unique()) == ["b", "c"] and len(rows) == len(kept) == 2 * 2 * len(ALPHAS)
    own = studies.interpolation(path, evaluator, ALPHAS)
    ends = own[own["alpha"] == 1].set_index("dataset")["loss"]
    at = rows[rows["alpha"] == 0].set_index("dataset")["loss"]
    assert (at == ends[at.index].to_numpy()).all()  # the bits of the fine-tuned end
    other = deep().eval()
    for name in "bc":
        for data in sets:
            curve = [
                scored(other, {k: torch.lerp(states["a"][k].double(), states[name][k].double(), alpha).float()
                               if states["a"][k].is_floating_point() else states["a"][k]
                               for k in zero}, data)
                for alpha in ALPHAS
            ]  # fmt: skip
            here = rows[(rows["partners"] == name) & (rows["dataset"] == data.name)]
            for alpha, (losses, hits), row in zip(ALPHAS, curve, here.to_dict("records"), strict=True):
                assert row["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
                assert row["accuracy"] == pytest.approx(float(hits.mean()))
                assert row["gain"] == pytest.approx(float((hits - curve[0][1]).mean()))
                line = (1 - alpha) * curve[0][0] + alpha * curve[-1][0]
                assert row["bump"] == pytest.approx(float((losses - line).mean()), abs=1e-5)


def test_parts_are_the_whole_and_errors_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep().eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {name: moved(zero, seed) for seed, name in enumerate("abc")}
    path, evaluator = Path(model, zero, states["a"]), Evaluator(model, [dataset("far", 21), dataset("n", 5)])
    whole = studies.pairs(path, evaluator, ALPHAS, states, model="a")
    loaded: list[str] = []

    class Watched(Others):
        def state(self, name: str) -> Any:
            loaded.append(name)
            return super().state(name)

    found: dict[int, Any] = {}
    for numbers in ([3, 9], [*range(3), *range(4, 9), *range(10, 16)]):
        studies.pairs(
            path, evaluator, ALPHAS, Watched(states), model="a", only=numbers, sink=found.__setitem__
        )
    parts = studies.frame(row for number in sorted(found) for row in found[number])
    pd.testing.assert_frame_equal(parts.drop(columns="seconds"), whole.drop(columns="seconds"))
    loaded.clear()
    studies.pairs(path, evaluator, ALPHAS, Watched(states), model="a", only=[8])
    assert loaded == ["c"]  # a model is read where its path is measured
    before = path.checksum()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studies.pairs(path, evaluator, ALPHAS, states, model="a", sink=stop)
    assert path.checksum() == before


def test_its_cost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep().eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {name: moved(zero, seed) for seed, name in enumerate("abc")}
    sets = [dataset("far", 21), dataset("near", 9, ood=False)]
    path, evaluator = Path(model, zero, states["a"]), Evaluator(model, sets)
    work = cost.Work.none(evaluator)
    sizes = {data.name: (len(data.labels), data.ood) for data in sets}
    before = path.checksum()
    studies.pairs(
        cost.counted_path(path, work),
        cost.counted_evaluator(evaluator, sizes, work),
        ALPHAS,
        cost.CountedOthers(states, path, work),
        model="a",
    )
    assert path.checksum() == before and work.loads == 2
    assert work.combined == sum(tensor.numel() for tensor in zero.values())
    written, images = [0, 0], [0]
    write = InPlace.write

    def watching(writer: InPlace, groups: Any, buffers: bool) -> list[str]:
        written[0] += 1
        written[1] += sum(slot.tensor.numel() for _, rows in groups for slot in rows.slots)
        return write(writer, groups, buffers)

    monkeypatch.setattr(InPlace, "write", watching)
    last = list(model.modules())[-1]
    _ = evaluator.runtime.images.need
    with last.register_forward_hook(lambda module, args, result: images.append(len(args[0]))):
        studies.pairs(path, evaluator, ALPHAS, states, model="a")
    assert [work.writes, work.written] == written
    assert work.images[-1] == sum(images) == 30 * (1 + 2 * (len(ALPHAS) - 1))


class Kept:
    def __init__(self, rows: pd.DataFrame, hits: np.ndarray) -> None:
        self.rows, self.hits = rows, hits.astype(bool)

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        mine = ((self.rows["model"] == model) & (self.rows["dataset"] == dataset)).to_numpy()
        hits = self.hits[mine]
        return ImageResults(self.rows[mine], hits, np.zeros(hits.shape, np.float16), None)


def rows_of(hits: np.ndarray, partners: list[str], alphas: list[float] = ALPHAS) -> pd.DataFrame:
    accuracy = hits.mean(axis=1)
    return studies.frame(
        {"study": "pairs", "model": "a", "partners": partner, "dataset": "far", "ood": True, "alpha": alpha,
         "samples": hits.shape[1], "accuracy": accuracy[place * len(alphas) + at],
         "bump": alpha * (1 - alpha), "bump_se": 0.01}
        for place, partner in enumerate(partners) for at, alpha in enumerate(alphas)
    )  # fmt: skip


def test_the_table_against_its_definition() -> None:
    hits = np.random.default_rng(0).random((8, 40)) < np.array([[0.5, 0.7, 0.8, 0.6] * 2]).T
    rows = rows_of(hits, ["b", "c"])
    table = studies.pair_effects(rows.sample(frac=1, random_state=1), None)
    assert table["gain_held_out"].isna().all() and table["above_line_low"].isna().all()
    table = studies.pair_effects(rows, Kept(rows, hits)).set_index("partner")
    for place, partner in enumerate("bc"):
        own, fact = hits[4 * place : 4 * place + 4].astype(float), table.loc[partner]
        mean = own.mean(axis=1)
        assert fact["gain"] == pytest.approx(mean.max() - max(mean[0], mean[3]))
        assert fact["gain_alpha"] == ALPHAS[int(mean.argmax())]
        each, fold = np.empty(40), dealt(40)
        for image in range(40):  # each image by those of the other folds
            rest = own[:, fold != fold[image]].mean(axis=1)
            ends = own[0, image] if rest[0] >= rest[3] else own[3, image]
            each[image] = own[int(rest.argmax()), image] - ends
        assert fact["gain_held_out"] == pytest.approx(each.mean())
        error = each.std(ddof=1) / math.sqrt(40)
        critical = 2.331  # Student's t, 39 degrees, 1 - 0.025 / 2: two pairs
        assert fact["gain_held_out_high"] == pytest.approx(each.mean() + critical * error, abs=1e-4)
        above = own[2] - (own[0] + own[3]) / 2
        error = above.std(ddof=1) / math.sqrt(40)
        assert fact["above_line"] == pytest.approx(above.mean()) and fact["middle"] == 0.5
        assert fact["above_line_low"] == pytest.approx(above.mean() - critical * error, abs=1e-4)
        assert fact["bump"] == 0.25 and fact["bump_alpha"] == 0.5
        low = 0.25 - 2.331 * 0.01  # one-sided, 1 - 0.05 / (2 positions x 2 pairs)
        assert fact["bump_low"] == pytest.approx(low, abs=1e-4)


def test_models_that_agree_are_no_certainty() -> None:
    hits = np.tile(np.arange(10) % 3 > 0, (4, 1))
    rows = rows_of(hits, ["b"], [0.0, 0.3, 0.7, 1.0])
    (fact,) = studies.pair_effects(rows, Kept(rows, hits)).to_dict("records")
    assert fact["above_line_se"] == 0 and math.isnan(fact["above_line_low"])
    assert fact["gain_held_out"] == 0 and math.isnan(fact["gain_held_out_low"])


def test_the_models_that_it_takes() -> None:
    names = [f"m{number}" for number in range(7)]
    gains = [0.05, -0.01, 0.03, 0.01, 0.04, -0.02, 0.02]
    rows = studies.frame(
        {"study": "interpolation", "model": name, "dataset": "far", "ood": True, "alpha": alpha,
         "gain": gain * alpha}
        for name, gain in zip(names, gains, strict=True) for alpha in (0.0, 1.0)
    )  # fmt: skip
    study, facts = catalogue.study("pairs"), Facts(rows)
    # The three that gain most, the two that gain least.
    assert study.choose(facts, "m0") == {"partners": ["m1", "m2", "m4", "m5"]}
    assert study.choose(facts, "m4") == {"partners": ["m5"]}
    assert study.choose(facts, "m5") == {"partners": []}


def test_what_cannot_be_compared_is_refused(tmp_path: File) -> None:
    with refused(ValueError, "pairs"):
        studies.pair_effects(rows_of(np.ones((4, 4)), ["b"]).iloc[:0])
    rows = rows_of(np.ones((2, 4)), ["b"], [0.0, 1.0])
    with refused(ValueError, "a", "b"):
        studies.pair_effects(rows)
    rows = rows_of(np.ones((4, 6)), ["b"])
    with refused(ValueError, "a", "far", 6, 5):
        studies.pair_effects(rows, Kept(rows, np.ones((4, 5))))
    model = deep().eval()
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path, evaluator = Path(model, zero, moved(zero, 1)), Evaluator(model, [dataset("far", 5)])
    before = path.checksum()
    with refused(ValueError, "'c'", "b"):
        studies.pairs(path, evaluator, ALPHAS, {"b": moved(zero, 2)}, ["c"])
    with refused(ValueError, "'b'"):
        studies.pairs(path, evaluator, ALPHAS, {"b": moved(zero, 2)}, ["b", "b"])
    first = next(iter(zero))
    with refused(ValueError, first):
        studies.pairs(path, evaluator, ALPHAS, {"b": {**zero, first: torch.zeros(2)}})
    assert path.checksum() == before


def test_a_run_that_cannot_compare_is_refused(tmp_path: File) -> None:
    zoo = tiny_zoo.make(tmp_path)
    tiny_zoo.sweep_refused(["pairs", *tiny_zoo.own_models(zoo, "a")], "pairs", 2)
    tiny_zoo.sweep_refused(["pairs", *tiny_zoo.own_models(zoo, "abc"), "--models", "b"], "pairs", 2)
    tiny_zoo.sweep_refused(
        ["pairs", *tiny_zoo.own_models(zoo, "ab"), "--alphas", "0", "1"], "pairs", "--alphas", 0, 1
    )
    state = load_file(zoo / "b.safetensors")
    more = torch.cat([state["classification_head.weight"], torch.ones(1, 6)])
    head = {"classification_head.weight": more, "classification_head.bias": torch.zeros(4)}
    tiny_zoo.save({**state, **head}, zoo / "b.safetensors")
    tiny_zoo.sweep_refused(["pairs", *tiny_zoo.own_models(zoo, "ab")], "b.safetensors", 4, 3)
    tiny_zoo.save({**state, "model.visual.proj": torch.ones(8, 5)}, zoo / "b.safetensors")
    tiny_zoo.sweep_refused(["pairs", *tiny_zoo.own_models(zoo, "ab")], "b.safetensors")


@pytest.mark.slow
def test_a_run(tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, rows, table, figure and words; a second run finds nothing to do."""
    zoo = tiny_zoo.make(tmp_path)
    command = ["pairs", *tiny_zoo.own_models(zoo, "abc"), "--alphas", "0:1:5", "--device", "cpu"]
    assert read(command).measured == ["interpolation", "pairs"]
    assert sweep.main([*command, "--plan"]) == 0
    line = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("pairs"))
    # Three pairs at four new positions each, on 40 and 12 images; scores of the first end are known.
    assert line[1] == "3" and line[3] == f"{3 * 4 * 52}"
    out = tmp_path / "run"
    assert sweep.main([*command, "--out", str(out)]) == 0
    assert "the path between two fine-tuned models" in " ".join(capsys.readouterr().out.split())
    rows = results.load(out)
    own = rows[rows["study"] == "pairs"]
    assert own.drop_duplicates(["model", "partners"])[["model", "partners"]].to_numpy().tolist() == [
        ["a", "b"], ["a", "c"], ["b", "c"]
    ]  # fmt: skip
    assert len(own) == 3 * 2 * 5
    ends = rows[(rows["study"] == "interpolation") & (rows["alpha"] == 1)].set_index(["model", "dataset"])
    for alpha, who in ((0, "model"), (1, "partners")):
        for row in own[own["alpha"] == alpha].to_dict("records"):
            assert row["loss"] == pytest.approx(ends.loc[(row[who], row["dataset"]), "loss"], abs=1e-6)
            assert row["accuracy"] == ends.loc[(row[who], row["dataset"]), "accuracy"]
    table = pd.read_csv(out / "pairs.csv")
    expected = studies.pair_effects(rows, results.Stored(out))
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert table["gain_held_out"].notna().all() and (out / "figures" / "pairs.png").exists()
    assert sweep.main([*command, "--out", str(out)]) == 0
    pd.testing.assert_frame_equal(results.load(out), rows)


@pytest.mark.slow
def test_another_models_file_that_changed_withdraws_the_piece(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tiny_zoo.make(tmp_path)
    command = ["pairs", *tiny_zoo.own_models(zoo, "ab"), "--alphas", "0:1:3", "--device", "cpu"]
    add = results.Run.add

    def then(run: results.Run, study: str, *more: Any) -> None:
        add(run, study, *more)
        if study == "pairs":
            state = load_file(zoo / "b.safetensors")
            tiny_zoo.save({name: tensor + 0.01 for name, tensor in state.items()}, zoo / "b.safetensors")

    monkeypatch.setattr(results.Run, "add", then)
    assert sweep.main([*command, "--out", str(tmp_path / "run")]) == 1
    assert "b.safetensors" in capsys.readouterr().err
    assert "pairs" not in set(results.load(tmp_path / "run")["study"])
