"""``--quick``: upper limits for a first look, what wins over them, and what they cannot stand beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import tiny_zoo
from support.tiny_zoo import own_models, sweep_refused

from rft_fast import sweep
from rft_fast.config import request
from rft_fast.settings import Along, Layers, Prune, Sharpness


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def zoo_file(zoo: Path, *options: str) -> str:
    lines = ['name = "tiny"', 'arch = "tiny.json"', 'zeroshot = "zeroshot.safetensors"', "[finetuned]"]
    lines += ['a = "a.safetensors"', "[data]", 'far = { path = "far.npz" }', "[options]", *options]
    (file := zoo / "own.toml").write_text("\n".join(lines))
    return str(file)


def test_the_limits(zoo: Path) -> None:
    asked = request.read([*own_models(zoo), "--quick"])
    along, layers, sharpness, prune = (asked.of(kind) for kind in (Along, Layers, Sharpness, Prune))
    assert along.quick and along.samples == layers.samples == sharpness.samples == 200
    assert along.alphas == layers.alphas == sharpness.alphas == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert (sharpness.draws, sharpness.layer_draws, prune.mask_seeds) == (4, 4, 2)
    (notice,) = asked.notices
    assert all(word in notice for word in ("--quick", "200 images", "6 positions", "4 draws", "2 masks"))


def test_smaller_options_of_a_zoo_stay(zoo: Path) -> None:
    file = zoo_file(
        zoo, "samples = 50", "alphas = [0, 0.5, 1]", "draws = 30", "layer-draws = 2", "goal-se = 0.01"
    )
    asked = request.read([file, "--quick"])
    along, sharpness = asked.of(Along), asked.of(Sharpness)
    assert (along.samples, along.alphas, sharpness.alphas) == (50, (0, 0.5, 1), (0, 0.5, 1))
    assert (sharpness.draws, sharpness.layer_draws, sharpness.goal_se) == (4, 2, None)


def test_positions_of_sharpness_are_among_those_that_are_left(zoo: Path) -> None:
    few = request.read([zoo_file(zoo, "sharpness-alphas = [0.1, 0.6, 1]"), "--quick"])
    assert few.of(Sharpness).alphas == pytest.approx([0.6, 1])
    none = request.read([zoo_file(zoo, "sharpness-alphas = [0.1, 0.7]"), "--quick"])
    assert none.of(Sharpness).alphas == none.of(Along).alphas


def test_the_command_line_wins_and_a_notice_says_so(zoo: Path) -> None:
    words = ["--quick", "--samples", "300", "--draws", "8", "--alphas", "0", "0.5", "1"]
    asked = request.read([*own_models(zoo), *words])
    along, layers, sharpness = asked.of(Along), asked.of(Layers), asked.of(Sharpness)
    assert (along.samples, along.alphas, layers.alphas) == (300, (0, 0.5, 1), (0, 0.5, 1))
    assert (sharpness.alphas, sharpness.draws, sharpness.layer_draws) == ((0, 0.5, 1), 8, 8)
    said = "\n".join(asked.notices)
    for was in ("--samples (300)", "--draws (8)", "--alphas (0, 0.5, 1)", ": 200", ": 4"):
        assert was in said
    limits = asked.notices[0]  # those that were not replaced
    assert "2 masks" in limits and not any(word in limits for word in ("images", "positions", "draws"))
    assert "--alphas (21 values)" in "\n".join(
        request.read([*own_models(zoo), "--quick", "--alphas", "0:1:21"]).notices
    )


def test_a_run_is_not_written_into_its_images(zoo: Path, tmp_path: Path) -> None:
    for out in (zoo / "near", zoo / "near" / "0" / "run", zoo / "near" / ".." / "near" / "run"):
        sweep_refused([*own_models(zoo), "--out", str(out)], "--out", "near")
    assert request.read([*own_models(zoo), "--out", str(zoo / "near-run")]).out == zoo / "near-run"


def test_it_does_not_stand_beside_the_paper_or_in_a_zoo(zoo: Path) -> None:
    sweep_refused([*own_models(zoo), "--quick", "--paper"], "--quick", "--paper")
    sweep_refused([zoo_file(zoo, "paper = true"), "--quick"], "--quick", "paper", "tiny")
    sweep_refused([zoo_file(zoo, "quick = true"), "interpolation"], "quick")


@pytest.mark.slow
def test_a_run_records_it(zoo: Path, tmp_path: Path) -> None:
    assert sweep.main(["interpolation", *own_models(zoo), "--quick", "--out", str(tmp_path / "run")]) == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["settings"]["along"] | {"quick": True, "samples": 200} == recorded["settings"]["along"]
