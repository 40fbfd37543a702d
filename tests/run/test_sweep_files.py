"""The sweep on files that people have: several sets of weights in one, shards, LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from support import tiny_zoo
from support.tiny_zoo import sweep_refused

from rft_fast import checkpoints, results, sweep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def run(folder: Path, out: Path, *more: object) -> pd.DataFrame:
    """Accuracies and losses of a sweep, and nothing of how its model is called."""
    words = ("interpolation", "--arch", folder / "tiny.json", "--data", f"far={folder / 'far.npz'}",
             "--alphas", "0", "0.5", "1", "--device", "cpu", "--no-cache", "--out", out, *more)  # fmt: skip
    assert sweep.main([str(word) for word in words]) == 0
    return results.load(out)[["alpha", "loss", "accuracy"]]


@pytest.mark.slow
def test_weights_are_chosen_by_keys_and_entered_in_the_configuration(folder: Path, tmp_path: Path) -> None:
    a, b = (checkpoints.load(folder / f"{name}.safetensors") for name in ("zeroshot", "a"))
    other = {name: tensor * 1.5 for name, tensor in b.items()}
    torch.save({"epoch": 1, "state_dict": other, "state_dict_ema": b}, tmp_path / "last.pt")
    torch.save({"student": other, "teacher": a}, tmp_path / "start.pt")
    plain = ("--zeroshot", folder / "zeroshot.safetensors", "--finetuned", folder / "a.safetensors")
    want = run(folder, tmp_path / "want", *plain)
    given = ("--zeroshot", tmp_path / "start.pt", "--finetuned", tmp_path / "last.pt")
    keys = ("--zeroshot-key", "teacher", "--key", "state_dict_ema")
    pd.testing.assert_frame_equal(run(folder, tmp_path / "run", *given, *keys), want)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["zeroshot"]["key"] == "teacher"
    assert [one["key"] for one in config["finetuned"].values()] == ["state_dict_ema"]
    lines = ['name = "z"', f'arch = "{folder / "tiny.json"}"',
             'zeroshot = { path = "start.pt", key = "teacher" }', "[finetuned]",
             'm = { path = "last.pt", key = "state_dict_ema" }', "[data]",
             f'far = {{ path = "{folder / "far.npz"}" }}']  # fmt: skip
    (tmp_path / "zoo.toml").write_text("\n".join(lines))
    words = ("interpolation", tmp_path / "zoo.toml", "--alphas", "0", "0.5", "1", "--device", "cpu",
             "--no-cache", "--out", tmp_path / "zoo")  # fmt: skip
    assert sweep.main([str(word) for word in words]) == 0
    pd.testing.assert_frame_equal(results.load(tmp_path / "zoo")[["alpha", "loss", "accuracy"]], want)
    words = ("interpolation", "--arch", folder / "tiny.json", *given, *keys[2:], "--data",
             f"far={folder / 'far.npz'}", "--out", tmp_path / "no")  # fmt: skip
    sweep_refused([str(word) for word in words], "student", "teacher")


@pytest.mark.slow
def test_shards_and_adapters(folder: Path, tmp_path: Path) -> None:
    start = checkpoints.load(folder / "zeroshot.safetensors")
    module = "visual.transformer.resblocks.0.mlp.c_fc"
    out, into = start[f"{module}.weight"].shape
    a, b = torch.randn(2, into), torch.randn(out, 2)
    merged = {**start, f"{module}.weight": start[f"{module}.weight"] + 2.0 * b @ a}
    save_file(merged, tmp_path / "merged.safetensors")
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "shards").mkdir()
    places = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {key: merged[key] for key in sorted(merged)[number - 1 :: 2]}
        save_file(part, tmp_path / "shards" / name)
        places |= dict.fromkeys(part, name)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    common = ("--zeroshot", folder / "zeroshot.safetensors", "--unrelated", "--finetuned")
    want = run(folder, tmp_path / "want", *common, tmp_path / "merged.safetensors")
    for place in (tmp_path / "adapter", tmp_path / "shards", index):
        got = run(folder, tmp_path / "run", "--overwrite", *common, place)
        pd.testing.assert_frame_equal(got, want, rtol=1e-5)
        recorded = json.loads((tmp_path / "run" / "config.json").read_text())["finetuned"]
        assert [one["sha256"] for one in recorded.values()] == [checkpoints.sha256(place)]
