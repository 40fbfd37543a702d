"""The examples that need nothing but the package, on a model of a moment."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PATIENCE, tiny_zoo

from rft_fast import checkpoints, results, sweep
from rft_fast.config import zoo
from rft_fast.finetune import __main__ as finetune

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
