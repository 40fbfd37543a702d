"""Ensembles of the two ends' logits, against the definition, and the path minus them, in closed form."""

from __future__ import annotations

import math
from pathlib import Path as File
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_zoo
from support.tiny_models import dataset, deep, two_towers
from support.wording import refused

from rft_fast import results, studies, sweep
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path
from rft_fast.studies.images import ImageResults

ALPHAS = [0.0, 0.25, 1.0]


def ends(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(5)
    one = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in zero.items()
    }
    return zero, one


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("make", [deep, two_towers], ids=["fixed head", "head of prompts"])
@pytest.mark.parametrize("batch", [4, 64])
def test_it_is_the_mean_of_the_logits(make: Any, batch: int, normalized: bool) -> None:
    model: Any = make().eval()
    zero, one = ends(model)
    sets = [dataset("a", 21), dataset("b", 5)]
    path = Path(model, zero, one)
    before = path.checksum()
    kept: dict[int, Any] = {}
    evaluator = Evaluator(model, sets, batch_size=batch, normalize_logits=normalized)
    rows = studies.ensemble(path, evaluator, ALPHAS, model="m", images=kept)
    assert path.checksum() == before and list(kept) == [0, 1]
    for data in sets:
        logits = []
        for state in (zero, one):
            model.load_state_dict(state)
            with torch.no_grad():
                pixels = (data.images.float() / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(
                    data.std
                ).view(3, 1, 1)
                logits.append(model(pixels).double())
        for alpha in ALPHAS:
            blend = (1 - alpha) * logits[0] + alpha * logits[1]
            right = blend.argmax(1) == data.labels
            if normalized:
                blend = blend - blend.mean(1, keepdim=True)
                blend = blend / blend.norm(dim=1, keepdim=True)
            losses = torch.nn.functional.cross_entropy(blend, data.labels, reduction="none")
            row = rows[(rows["dataset"] == data.name) & (rows["alpha"] == alpha)].iloc[0]
            assert row["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
            assert row["accuracy"] == pytest.approx(float(right.double().mean()))
            if alpha == 0:
                base = right.double()
            change = right.double() - base
            assert row["gain"] == pytest.approx(float(change.mean()))
            assert row["gain_se"] == pytest.approx(float(change.std()) / math.sqrt(len(change)))


def test_the_ends_have_the_bits_of_the_path() -> None:
    model = deep().eval()
    zero, one = ends(model)
    path, evaluator = Path(model, zero, one), Evaluator(model, [dataset("a", 21)], batch_size=8)
    blends, weights = (study(path, evaluator, ALPHAS) for study in (studies.ensemble, studies.interpolation))
    columns = ["loss", "loss_se", "accuracy", "gain", "gain_se", "rise", "rise_se", "bump", "bump_se"]
    for alpha in (0.0, 1.0):
        pd.testing.assert_frame_equal(
            *(rows.loc[rows["alpha"] == alpha, columns] for rows in (blends, weights))
        )
    assert blends.loc[1, "loss"] != weights.loc[1, "loss"]


def test_a_linear_model_is_its_own_ensemble() -> None:
    """Logits are linear in the weights of a single layer, so both averages are the same."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))
    zero, one = ends(model)
    path, evaluator = Path(model, zero, one), Evaluator(model, [dataset("a", 21)])
    blends, weights = (study(path, evaluator, ALPHAS) for study in (studies.ensemble, studies.interpolation))
    np.testing.assert_allclose(blends["loss"], weights["loss"], rtol=1e-5)
    found = studies.ensemble_difference(pd.concat([blends, weights]))
    assert found["difference"].tolist() == [0.0] and math.isnan(found["difference_se"][0])


def rows_of(study: str, accuracy: list[float], alphas: list[float] = ALPHAS) -> pd.DataFrame:
    return studies.frame(
        {"study": study, "model": "m", "dataset": "far", "ood": True, "alpha": alpha, "samples": 4,
         "accuracy": value, "gain": value - accuracy[0]}
        for alpha, value in zip(alphas, accuracy, strict=True)
    )  # fmt: skip


class Kept:
    def __init__(self, hits: dict[str, np.ndarray]) -> None:
        self.hits = hits

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        hits = self.hits[study].astype(bool)
        return ImageResults(pd.DataFrame({"alpha": ALPHAS}), hits, np.zeros(hits.shape, np.float16), None)


def test_the_difference_is_paired_over_images() -> None:
    path = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    blend = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    rows = pd.concat([rows_of("interpolation", [0.25, 0.75, 0.25]), rows_of("ensemble", [0.25] * 3)])
    kept = Kept({"interpolation": path, "ensemble": blend})
    (found,) = studies.ensemble_difference(rows, kept).to_dict("records")
    assert (found["gain_path"], found["gain_ensemble"], found["difference"]) == (0.5, 0.0, 0.5)
    error = math.sqrt((2 * 0.25 + 2 * 0.25) / 3 / 4)  # differences 0, 1, 1, 0
    assert found["difference_se"] == pytest.approx(error)
    assert found["difference_high"] == pytest.approx(0.5 + 3.182446 * error)  # Student's t, three degrees
    assert found["alphas"] == 1 and found["samples"] == 4
    (same,) = studies.ensemble_difference(rows, Kept({"interpolation": blend, "ensemble": blend})).to_dict(
        "records"
    )
    assert same["difference_se"] == 0 and math.isnan(same["difference_low"])  # no certainty


def test_what_cannot_be_compared_is_refused() -> None:
    path, blend = rows_of("interpolation", [0.5] * 3), rows_of("ensemble", [0.5] * 3)
    with refused(ValueError, "ensemble"):
        studies.ensemble_difference(path)
    with refused(ValueError, "m", "far"):
        studies.ensemble_difference(blend)
    with refused(ValueError, "m", "far", 0.25):
        studies.ensemble_difference(pd.concat([path, rows_of("ensemble", [0.5] * 3, [0.0, 0.5, 1.0])]))
    with refused(ValueError, "m", "far"):
        studies.ensemble_difference(
            pd.concat([rows_of(study, [0.5] * 2, [0.0, 1.0]) for study in ("interpolation", "ensemble")])
        )
    model = deep().eval()
    path_ = Path(model, *ends(model))
    with refused(ValueError):
        studies.ensemble(path_, Evaluator(deep(), [dataset("a", 5)]), ALPHAS)


def test_a_run_without_positions_to_compare_is_refused(tmp_path: File) -> None:
    words = tiny_zoo.own_models(tiny_zoo.make(tmp_path), "a")
    tiny_zoo.sweep_refused(["ensemble", *words, "--alphas", "0", "1"], "--alphas", 0, 1)


@pytest.mark.slow
def test_a_run(tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, rows, table, figure and words; a second run finds nothing to do."""
    command = ["ensemble", *tiny_zoo.own_models(tiny_zoo.make(tmp_path), "ab"), "--alphas", "0:1:5"]
    assert sweep.main([*command, "--plan"]) == 0
    line = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ensemble"))
    images = sum(
        len(data) for data in (np.load(tmp_path / "far.npz")["labels"],)
    )  # beside those of the folder "near"
    assert line[1] == "2" and int(line[3].replace(",", "")) >= 2 * 2 * images  # two ends of two models
    out = tmp_path / "run"
    assert sweep.main([*command, "--out", str(out)]) == 0
    assert "averaging the weights is more accurate" in capsys.readouterr().out
    rows = results.load(out)
    assert rows["study"].value_counts().to_dict() == {"interpolation": 20, "ensemble": 20}
    table = pd.read_csv(out / "ensemble.csv")
    expected = studies.ensemble_difference(rows, results.Stored(out))
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert (out / "figures" / "ensemble.png").exists()
    assert sweep.main([*command, "--out", str(out)]) == 0
    pd.testing.assert_frame_equal(results.load(out), rows)
