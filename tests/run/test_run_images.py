"""Results of single images of a sweep: what a plan says of them, the option that turns them off, reports."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support import tiny_zoo
from support.tiny_images import check_images, images_of
from support.tiny_zoo import own_models, sweep_refused
from support.wording import refused

from rft_fast import results, sweep
from rft_fast.run import wiring

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHAS = ["--alphas", "0:1:3", "--layer-samples", "39", "--device", "cpu"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


@pytest.mark.slow
def test_a_plan_says_their_size(zoo: Path, tmp_path: Path, capsys: Any) -> None:
    """Which is that of the run, byte for byte; and a run without them has none."""
    command = ["interpolation", "layers", *own_models(zoo), *ALPHAS]
    assert sweep.main([*command, "--plan"]) == 0
    (said,) = re.findall(r"Results of single images: ([\d,]+) bytes", capsys.readouterr().out)
    out = tmp_path / "run"
    assert sweep.main([*command, "--quiet", "--out", str(out)]) == 0
    check_images(out)
    assert list(pd.read_csv(out / "cost.csv")) == results.describe("cost")["name"].tolist()
    with closing(sqlite3.connect(out / "rows.sqlite")) as base:
        query = "SELECT sum(length(hits) + length(losses) + length(predictions)) FROM images"
        assert base.execute(query).fetchone() == (int(said.replace(",", "")),)
    found = results.images(out, study="layers", model="a")
    assert found.hits.shape[1] == 39 and found.hits.mean(1).tolist() == found.rows["accuracy"].tolist()

    assert sweep.main([*command, "--plan", "--no-image-results"]) == 0
    assert "single images" not in capsys.readouterr().out
    off = tmp_path / "off"
    assert sweep.main([*command, "--quiet", "--out", str(off), "--no-image-results"]) == 0
    assert images_of(off) == {}
    with refused(results.NoImages, "--no-image-results"):
        results.images(off, dataset="far")
    first, second = (results.load(place).drop(columns="seconds") for place in (out, off))
    assert first.equals(second)


def test_a_head_whose_classes_have_no_number_is_refused_at_once(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "NO_CLASS", 2)
    command = ["interpolation", *own_models(zoo), *ALPHAS, "--out", str(tmp_path / "run")]
    sweep_refused(command, "zeroshot.safetensors", 3, 2, "--no-image-results")
    assert not (tmp_path / "run").exists()
