"""The examples that need nothing but the package, on a model of a moment."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from support import PATIENCE, tiny_zoo
from support.wording import command_refused, said

from rft_fast import checkpoints, results, studies, sweep
from rft_fast.config import zoo
from rft_fast.finetune import __main__ as finetune
from rft_fast.finetune.output import FileKeeper

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1},
}


def run(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An example and what it starts, in this process: importing torch anew takes longer than all the rest."""

    def here(command: list[str], check: bool) -> None:
        assert command[:3] == [sys.executable, "-m", "rft_fast.finetune"] and check
        assert finetune.main(command[3:]) == 0

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", here)
        patch.setattr(sys, "argv", [script, *words])
        patch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.slow
def test_the_soup_walkthrough_makes_a_zoo_that_the_sweep_reads(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(CLIP))
    words = [str(tmp_path / "soup"), "--arch", str(tmp_path / "tiny.json"), "--classes", "6", "--images", "4"]
    run("soup_walkthrough.py", words, monkeypatch)

    made = zoo.read(tmp_path / "soup" / "zoo")
    assert len(made.finetuned) == 2 and [data.ood for data in made.data.values()] == [False, True]
    first = checkpoints.read(tmp_path / "soup" / "zeroshot.pt")
    assert first.format == "soup" and len(first.tensors["classification_head.weight"]) == 1000
    last = checkpoints.load(next(iter(made.finetuned.values())).source)
    assert not torch.equal(last["visual.proj"], first.tensors["visual.proj"])

    out = tmp_path / "run"
    assert sweep.main(["interpolation", str(tmp_path / "soup" / "zoo"), "--out", str(out), "--no-cache"]) == 0
    rows = results.load(out)
    assert set(rows["dataset"]) == {"val", "imagenet-a"} and set(rows["samples"]) == {24}
    start = rows[(rows["alpha"] == 0) & (rows["dataset"] == "val")]["accuracy"]
    assert start.iloc[0] == pytest.approx(start.iloc[1]) and start.iloc[0] > 2 / 6  # the head was fitted


def test_the_readme_goes_from_files_to_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code, on small files."""
    tiny_zoo.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
        if "checkpoints.load" in block
    )
    for old, new in (
        ('"ViT-B-32"', '"tiny.json"'),
        ("zeroshot.pt", "zeroshot.safetensors"),
        ("finetuned.pt", "a.safetensors"),
        ('"sketch", "sketch"', '"sketch", "near"'),
        ("Rows(1000)", f"Rows({tiny_zoo.CLASSES})"),
    ):
        assert old in code
        code = code.replace(old, new)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["rows"]["alpha"].tolist() == [0, 0.5, 1] and set(found["rows"]["dataset"]) == {"sketch"}


@pytest.mark.slow
def test_the_tour_runs_as_a_notebook(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbformat.validate(tour)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)  # it is kept without them
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(tour, timeout=PATIENCE, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    start, middle, end = (
        float(re.findall(rf"alpha {alpha}: (\S+)", printed)[0]) for alpha in ("0", "0.5", "1")
    )
    assert start != end and middle == pytest.approx((start + end) / 2, abs=2e-6)
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 1 and not list(tmp_path.iterdir())


# --- the Fashion zoo ----------------------------------------------------------------------------------

FASHION = "make_fashion_zoo.py"


Fashion = Callable[[list[str]], int]


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> Fashion:
    """The example that makes the zoo: words -> exit status."""

    def make(words: list[str]) -> int:
        with pytest.raises(SystemExit) as ended:
            run(FASHION, words, monkeypatch)
        return int(ended.value.code or 0)

    return make


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDX files with noise of ten classes, named as in Debian's package."""
    folder, random = tmp_path_factory.mktemp("fashion-mnist"), np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 30)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        # Magic numbers and dimensions: 16 and 8 bytes.
        for name, header, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            packed = gzip.compress(bytes(header) + content.tobytes())
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(packed)
    return folder


def test_the_fashion_zoo_needs_its_images(tmp_path: Path, garments: Path, fashion: Fashion) -> None:
    out = tmp_path / "zoo"
    facts = ["train-images-idx3-ubyte.gz", "apt-get install dataset-fashion-mnist"]
    command_refused(fashion, [str(out), "--images", str(tmp_path)], *facts)
    command_refused(
        fashion, [str(out), "--images", str(garments)], "train-images-idx3-ubyte.gz", "SHA-256"
    )  # not the recipe's images
    assert not out.exists()


def test_the_fashion_zoo_refuses_a_directory_of_another_recipe(
    tmp_path: Path, garments: Path, fashion: Fashion
) -> None:
    text = (EXAMPLES / "fashion_recipe.toml").read_text("utf-8")
    recipe, out = tmp_path / "recipe.toml", tmp_path / "zoo"
    recipe.write_text(text.replace("seeds = [0, 1]\n", "seeds = []\n"), "utf-8")  # no block: only the data
    words = [str(out), "--quick", "--images", str(garments), "--recipe", str(recipe)]
    assert fashion(words) == 0
    before = {file: file.read_bytes() for file in out.rglob("*.*") if file.is_file()}
    assert {file.stem for file in before} >= {"recipe", "pretrain", "train", "plain", "scaled"}
    recipe.write_text(text.replace("deviation = 0.4", "deviation = 0.5"), "utf-8")
    command_refused(fashion, words, "styles.noisy.deviation", "0.4", "0.5", "pretraining.seeds")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    command_refused(fashion, [str(tmp_path / "other"), *words[1:]], "other", "recipe.json")
    assert {file: file.read_bytes() for file in out.rglob("*.*") if file.is_file()} == before


def test_the_fashion_zoo_deals_out_disjoint_balanced_images(
    tmp_path: Path, garments: Path, fashion: Fashion
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "zoo"
    text = (EXAMPLES / "fashion_recipe.toml").read_text("utf-8")
    recipe.write_text(text.replace("seeds = [0, 1]\n", "seeds = []\n"), "utf-8")
    words = [str(out), "--quick", "--images", str(garments), "--recipe", str(recipe)]
    assert fashion(words) == 0
    sets = {file.stem: dict(np.load(file)) for file in (out / "data").glob("*.npz")}
    sizes = {"pretrain": 40, "train": 20, "plain": 20}
    sizes |= dict.fromkeys(("rotated", "noisy", "inverted", "occluded", "scaled"), 10)
    assert {name: len(found["labels"]) for name, found in sets.items()} == sizes
    for name, found in sets.items():
        assert np.bincount(found["labels"]).tolist() == [sizes[name] // 10] * 10

    def known(part: str) -> dict[bytes, int]:
        packed = (garments / f"{part}-images-idx3-ubyte.gz").read_bytes()
        pixels = np.frombuffer(gzip.decompress(packed), np.uint8, offset=16).reshape(-1, 28, 28)
        return {image.tobytes(): place for place, image in enumerate(pixels)}

    train, test, seen = known("train"), known("t10k"), list[int]()
    for name, found in sets.items():
        images = 255 - found["images"] if name == "inverted" else found["images"]
        if name in ("pretrain", "train", "inverted"):  # the styles that can be undone
            places = [train[image.tobytes()] for image in images]
            assert [place % 10 for place in places] == found["labels"].tolist()
            seen += places
    assert len(set(seen)) == len(seen)
    assert all(
        test[image.tobytes()] % 10 == label for image, label in zip(*sets["plain"].values(), strict=True)
    )
    corners = sets["scaled"]["images"][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert not corners.any() and sets["scaled"]["images"].any((1, 2)).all()
    grey = (sets["occluded"]["images"] == 128).sum((1, 2))
    assert (grey >= 144).all() and (grey < 160).all()  # a square of 12, and a few pixels by chance


@pytest.mark.slow
def test_the_fashion_zoo_resumes_wherever_it_was_stopped(
    tmp_path: Path,
    garments: Path,
    one_thread: None,
    fashion: Fashion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """States are saved 4 times in pre-training (two blocks, two epochs), then once for each of six models."""
    words = ["--quick", "--images", str(garments)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fashion([str(whole), *words]) == 0
    save, left = FileKeeper.save, 0

    def stopping(self: FileKeeper, state: dict[str, Any]) -> None:
        nonlocal left
        save(self, state)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    for saves in (1, 1, 4):  # in the first block's pre-training, at its end, after the first model
        left = saves
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(FileKeeper, "save", stopping)
            run(FASHION, [str(parts), *words], monkeypatch)
    assert [file.name for file in parts.rglob("*.resume")] == ["lr1e-3-ep1-crop-flip.resume"]
    assert fashion([str(parts), *words]) == 0

    models = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert models == sorted(file.relative_to(parts) for file in parts.rglob("*.safetensors"))
    assert len(models) == 2 * (1 + 1 + 3)  # pre-trained, zero-shot, fine-tuned
    for model in models:
        first, second = load_file(whole / model), load_file(parts / model)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(parts.rglob("*.resume"))
    a, b = (load_file(whole / f"start{n}" / "clip.safetensors") for n in (0, 1))
    assert not torch.equal(a["model.visual.proj"], b["model.visual.proj"])
    tuned = load_file(whole / "block0" / "lr1e-3-ep1-none.safetensors")
    assert not torch.equal(tuned["model.visual.proj"], a["model.visual.proj"].half())

    made = zoo.read(whole / "block1")
    assert len(made.finetuned) == 3 and [data.ood for data in made.data.values()] == [False] + [True] * 5
    capsys.readouterr()
    assert fashion([str(whole), *words, "--studies"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 4
    for command in commands[::2]:  # of the first block
        assert command[:3] == [sys.executable, "-m", "rft_fast.sweep"]
        assert sweep.main([*command[3:], "--plan"]) == 0


@pytest.fixture(scope="module")
def judge() -> Any:
    """What examples/judge_fashion_zoo.py defines."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "judge_fashion_zoo.py")))


def test_blocks_are_combined_by_their_mean_and_permuted_within(judge: Any) -> None:
    """Two blocks of four models: 24 * 24 pairs of orders, all of which are counted here."""
    x = [np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])]
    y = [np.array([1.0, 2, 4, 3]), np.array([1.0, 1, 3, 4])]
    found = judge.by_permutation(x, y, judge.kendall, 4000, 0)
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert found.blocks == pytest.approx(expected)
    orders = [
        [stats.kendalltau(a, order).statistic for order in permutations(b)] for a, b in zip(x, y, strict=True)
    ]
    means = np.add.outer(*orders) / 2
    exact = (abs(means) >= abs(np.mean(expected)) - 1e-9).mean()
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact / 4000))
    # A measure that differs only by block says nothing: within each block all models are tied.
    assert judge.by_permutation([np.ones(4), np.zeros(4)], y, judge.kendall, 10, 0).p == 1


def test_what_only_repeats_the_loss_leaves_nothing(judge: Any) -> None:
    """Kendall's partial tau would be .2 here, although measure and outcome share nothing but the loss."""
    rng = np.random.default_rng(1)
    loss, noise, other = rng.normal(size=(3, 300))
    measure, outcome = np.exp(loss + 0.3 * noise), loss + 0.3 * other
    assert judge.kendall(measure, outcome) > 0.6
    left = judge.remaining(measure, loss)
    assert abs(judge.pearson(left, judge.remaining(outcome, loss))) < 0.12  # 2 standard errors
    assert judge.pearson(left, judge.remaining(np.exp(noise), loss)) > 0.9
    assert np.isnan(judge.pearson(np.ones(3), loss[:3]))
    few, z = [loss[:30] + 0.1 * other[:30]], [noise[:30]]
    sharp = judge.by_bootstrap([-few[0]], [rng.normal(size=30)], [loss[:30]], z, 200, 0)
    assert sharp.blocks[0] > 0.5 and sharp.p == pytest.approx(2 / 201)


def test_signs_and_holm_by_hand(judge: Any) -> None:
    """Three equal values: 2 of 8 signs give a mean as large. Holm: the smallest p times their number."""
    found = judge.by_signs([np.ones(3)], 4000, 0)
    assert found.mean == 1 and found.p == pytest.approx(2 / 8, abs=0.03)
    assert judge.by_signs([np.array([])], 10, 0).p == 1
    assert judge.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.slow
def test_intervals_are_those_of_means_and_hold_the_statistics(judge: Any) -> None:
    """Of a mean, by the central limit theorem; some models have no stragglers to hold."""
    rng = np.random.default_rng(2)
    layers = ["a", "b"]
    blocks = []
    for _ in range(3):
        names = "gain share stragglers flat general clean choice ensemble hold".split()
        models = pd.DataFrame(rng.normal(size=(36, len(names))), columns=names)
        models.loc[:29, "hold"] = np.nan
        sharpness = pd.DataFrame(rng.normal(size=(36, 2)), columns=layers)
        blocks.append(judge.Block(models, sharpness, pd.DataFrame([[True, False]] * 36, columns=layers)))
    bounds = judge.intervals(blocks, 0)
    choice = np.array([block.models["choice"] for block in blocks])
    half = 1.96 * np.sqrt((choice.var(axis=1) / 36).sum()) / 3
    assert bounds["H7"] == pytest.approx((choice.mean() - half, choice.mean() + half), abs=0.1 * half)
    found = judge.outcomes(blocks, 1, 0)
    for name, (low, high) in bounds.items():
        assert low < found[name].mean < high
    one = judge.statistics(blocks[0].models.assign(sharp=blocks[0].sharpness["a"]))
    assert {name: each.blocks[0] for name, each in found.items()} == pytest.approx(one)


def test_a_verdict_needs_the_sign_of_every_block(judge: Any) -> None:
    for blocks, p, expected in (
        ((0.2, 0.3, 0.1), 0.01, "supported"),
        ((0.4, 0.3, -0.1), 0.01, "not shown"),
        ((-0.2, -0.3, 0.1), 0.01, "refuted"),
        ((0.2, 0.3, 0.1), 0.05, "not shown"),
    ):
        assert judge.verdict(judge.Outcome(blocks, p), 1, p, 0.05) == expected


def test_stragglers_are_chosen_by_the_other_blocks(judge: Any) -> None:
    def block(stragglers: list[list[bool]], sharpness: list[float]) -> Any:
        layers = ["a", "b", "c", "d"]
        return judge.Block(
            pd.DataFrame(),
            pd.DataFrame([sharpness], columns=layers),
            pd.DataFrame(stragglers, columns=layers),
        )

    most = block([[True, False, False, False]] * 3, [1, 2, 3, 4])
    few = block([[False, True, True, False], [False] * 4, [False, False, True, False]], [10, 20, 30, 40])
    assert judge.straggler_sharpness([most, few], 1).tolist() == [10]  # a, in all models of the other block
    # c in two of three models is one in most of them; without such a layer, the three that are most often.
    assert judge.straggler_sharpness([most, few], 0).tolist() == [3]
    rare = block([[False, True, True, False], [False, False, True, True], [False] * 4, [False] * 4], [0] * 4)
    assert judge.straggler_sharpness([most, rare], 0).tolist() == [3]  # b, c, d


@pytest.mark.slow
def test_the_hypotheses_are_judged_on_the_runs_of_the_studies(
    tmp_path: Path,
    garments: Path,
    one_thread: None,
    fashion: Fashion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the quick zoo, whose models know nothing: no hypothesis is shown."""
    out, words = tmp_path / "zoo", ["--quick", "--images", str(garments)]
    assert fashion([str(out), *words]) == 0
    capsys.readouterr()
    assert fashion([str(out), *words, "--studies"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    for command in commands[::2]:
        assert sweep.main([*command[3:], "--no-cache", "--quiet"]) == 0
    for name in ("run{}", "run{}-hold"):  # the other block: the same runs again
        shutil.copytree(out / name.format(0), out / name.format(1))

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run("judge_fashion_zoo.py", [str(out)], monkeypatch)
    assert ended.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[::2]] == [f"H{n} not shown" for n in range(1, 9)]
    rows = results.load(out / "run0")
    assert set(rows.loc[rows["study"] == "layers", "model"]) == set(
        rows["model"]
    )  # not the best and worst alone
    images = results.Stored(out / "run0")
    path = studies.summarize(rows, images=images)
    share = path[path["ood"]]["mode"].isin(["gain", "high gain"]).mean()
    assert f"{share - 0.25:+.3f} ({share - 0.25:+.3f}, {share - 0.25:+.3f})" in printed[1]
    averaged = studies.ensemble_difference(rows, images=images)
    assert f": {averaged[averaged['ood']]['difference'].mean():+.3f} (" in printed[-1]

    tables = tmp_path / "tables.json"
    for words in ([str(out), "--tables", str(tables)], [str(tables)]):
        with pytest.raises(SystemExit):
            run("judge_fashion_zoo.py", words, monkeypatch)
        assert capsys.readouterr().out.splitlines() == printed

    recipe = json.loads((out / "recipe.json").read_text())
    recipe["analysis"]["models"] = 30
    (out / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as ended:
        run("judge_fashion_zoo.py", [str(out)], monkeypatch)
    assert ended.value.code == 1
    said(capsys.readouterr().out, 3, 30)


@pytest.mark.slow
def test_the_page_of_evidence_shows_what_the_kept_numbers_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = EXAMPLES.parent / "benchmarks" / "results" / "2026-12-01-fashion-tables.json"
    with pytest.raises(SystemExit) as ended:
        run("judge_fashion_zoo.py", [str(tables)], monkeypatch)
    assert ended.value.code == 0
    page = (EXAMPLES.parent / "docs" / "evidence.md").read_text("utf-8")
    assert capsys.readouterr().out in page
    monkeypatch.syspath_prepend(EXAMPLES)
    made = json.loads(tables.read_text("utf-8"))["recipe"]
    read_recipe = runpy.run_path(str(EXAMPLES / FASHION))["read_recipe"]
    assert made == read_recipe(EXAMPLES / "fashion_recipe.toml", quick=False)
