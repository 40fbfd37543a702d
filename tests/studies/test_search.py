"""The greedy search of coefficients against plain loops over whole forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support import tiny_models
from support.tiny_models import Told, counted, dataset, plain, random_state
from support.tiny_zoo import CLASSES, make, own_models, sweep_refused
from support.wording import refused
from torch import nn

from rft_fast import report, results, studies, sweep
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path

pytestmark = pytest.mark.usefixtures("one_thread")

VALUES = [0.0, 0.3, 1.0]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "one stage": lambda: tiny_models.toy(kind=tiny_models.Opaque),
    "deep": tiny_models.deep,
    "convolutions": tiny_models.staged,
    "transformer": lambda: tiny_models.transformer(2),
    "two towers": tiny_models.two_towers,
}


def path_of(name: str) -> Path:
    with torch.random.fork_rng():
        model = MODELS[name]()
    return Path(model, random_state(model, 1, 0.4), random_state(model, 6, 0.4))


def by_hand(path: Path, order: list[str], data: Any) -> tuple[list[float], list[float]]:
    """Coefficients and losses of a plain loop, each from a write of the whole model."""
    table, chosen, losses = dict.fromkeys(path.layers, 1.0), [], []
    for layer in order:
        found = {}
        for value in sorted(VALUES, reverse=True):
            with path.at({**table, layer: value, None: 1.0}):
                found[value] = float(plain(path.model, data).double().mean())
        table[layer] = min(found, key=found.__getitem__)
        chosen.append(table[layer])
        losses.append(found[table[layer]])
    return chosen, losses


@pytest.mark.parametrize("limit", [None, 8_000], ids=["whole", "in pieces"])
@pytest.mark.parametrize("model", MODELS)
def test_each_step_is_that_of_a_plain_loop(model: str, limit: int | None) -> None:
    path, data, told = path_of(model), dataset("near", 31), Told()
    evaluator = Evaluator(path.model, [data], batch_size=8, memory_limit=limit)
    before = path.checksum()
    rows = studies.search_coefficients(path, evaluator, VALUES, model="m", sink=told)
    assert path.checksum() == before and told.numbers == [0]
    spans = {layer: evaluator.span(path.tensors(layer)) for layer in path.layers}
    assert rows["layer"].tolist() == sorted(spans, key=spans.__getitem__)
    chosen, losses = by_hand(path, rows["layer"].tolist(), data)
    assert rows["coefficients"].astype(float).tolist() == chosen
    assert len(set(chosen)) > 1 or len(chosen) < 3  # the test can fail
    assert rows["loss"].tolist() == pytest.approx(losses, rel=1e-4)
    with path.at(1.0):
        first = float(plain(path.model, data).double().mean())
    steps = np.diff([first, *losses])
    assert rows["rise"].tolist() == pytest.approx(steps.tolist(), abs=1e-4) and (rows["rise"] <= 1e-6).all()


def test_it_takes_no_more_passes_than_layers() -> None:
    path, data = path_of("deep"), dataset("near", 31)
    evaluator = Evaluator(path.model, [data], batch_size=8)
    modules = tiny_models.linears(path.model)
    runs = []
    for study in (
        lambda: studies.layerwise_interpolation(path, evaluator, [0, 0.3, 1], others="finetuned"),
        lambda: studies.search_coefficients(path, evaluator, VALUES),
    ):
        with counted(*modules) as sizes:
            study()
        runs.append([sum(each) for each in sizes])
    assert runs[1] == runs[0] and runs[0][0] < runs[0][-1]


def test_a_closed_form() -> None:
    """Logits w1 w2 for the first of two classes, w1 from 0 to -1, w2 from 0 to 1: w1 at zero-shot is best."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logit = self.b(self.a(images.flatten(1)[:, :1] * 0 + 1))
            return torch.cat([logit, torch.zeros_like(logit)], 1)

    model, names = Product(), ("a.weight", "b.weight")
    data = dataset("near", 5, labels=torch.zeros(5).long())
    pairs = (dict(zip(names, weights, strict=True)) for weights in ((0.0, 0.0), (-1.0, 1.0)))
    path = Path(model, *({name: torch.full((1, 1), w) for name, w in pair.items()} for pair in pairs))
    rows = studies.search_coefficients(path, Evaluator(model, [data]), VALUES)
    assert rows["coefficients"].tolist() == ["0", "1"]  # of equal losses, the highest coefficient
    assert rows["loss"].tolist() == pytest.approx([np.log(2)] * 2)
    assert rows["rise"].iloc[0] == pytest.approx(np.log(2) - np.log1p(np.exp(1)))


@pytest.mark.parametrize(
    ("how", "facts"),
    [
        pytest.param({"values": [0.0, 0.5]}, [0.5], id="no 1"),
        pytest.param({"values": [1.0, 1.5]}, [1.5], id="above 1"),
        pytest.param({"values": []}, ["[]"], id="none"),
        pytest.param({"layers": ["9"]}, ["9"], id="layer"),
        pytest.param({"only": [1]}, [1], id="number"),
    ],
)
def test_refused_before_anything_is_scored(how: dict[str, Any], facts: list[object]) -> None:
    path = path_of("deep")
    evaluator = Evaluator(path.model, [dataset("near", 5)])
    with refused(ValueError, *facts):
        studies.search_coefficients(path, evaluator, **how)
    with refused(ValueError, "a, b"):
        two = Evaluator(path.model, [dataset("a", 5), dataset("b", 5)])
        studies.search_coefficients(path, two)


# --- the sweep ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = make(tmp_path_factory.mktemp("zoo"))
    rng = np.random.default_rng(5)
    for i in range(18):
        file = folder / "train" / str(i % CLASSES) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return folder


def command(zoo: File) -> list[str]:
    words = own_models(zoo)
    at = words.index("--id-data") + 1
    words[at:at] = [f"train={zoo / 'train'}"]
    brief = ["--alphas", "0:1:3", "--device", "cpu", "--slopes", "none", "--hold", "none"]
    return ["coefficients", *words, *brief, "--search", "train"]


@pytest.mark.slow
def test_a_sweep_searches_and_judges_on_other_images(
    zoo: File, tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*command(zoo), "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "search" in plan
    out = tmp_path / "run"
    assert sweep.main([*command(zoo), "--out", str(out)]) == 0
    rows = results.load(out)
    assert {*rows["study"]} == {"interpolation", "search", "coefficients"}
    found, own = rows[rows["study"] == "search"], rows[rows["study"] == "coefficients"]
    assert set(found["dataset"]) == {"train"} and set(own["dataset"]) == {"near", "far"}
    assert set(own["coefficients"].dropna()) == {"greedy search"}
    assert (found.groupby("model")["loss"].agg(lambda loss: (np.diff(loss) <= 1e-6).all())).all()
    printed = " ".join(capsys.readouterr().out.split())
    assert "greedy search" in printed and "by greedy search" in printed
    page = report.write(out).read_text()
    assert "greedy search" in page and "was not finished" not in page
    before = (out / "rows.csv").read_bytes()
    assert sweep.main([*command(zoo), "--out", str(out)]) == 0
    assert (out / "rows.csv").read_bytes() == before


def test_a_search_needs_images_of_its_own(zoo: File) -> None:
    words = ["coefficients", *own_models(zoo), "--alphas", "0", "1", "--hold", "none", "--slopes", "none"]
    for name in ("near", "far", "nowhere"):
        sweep_refused([*words, "--search", name], "--search", name, "near")


@pytest.mark.slow
@pytest.mark.ray
def test_workers_find_the_same(zoo: File, tmp_path: File) -> None:
    rows = {}
    for name, more in {"alone": [], "two": ["--workers", "2"]}.items():
        assert sweep.main([*command(zoo), *more, "--out", str(tmp_path / name)]) == 0
        rows[name] = results.load(tmp_path / name).drop(columns="seconds")
    pd.testing.assert_frame_equal(rows["two"], rows["alone"])
