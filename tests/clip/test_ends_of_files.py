"""Ends made of files that people have: Long-CLIP, activations that a file shows, wrapped names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_checkpoints import TEXT, VISION, clip, huggingface, renamed
from support.wording import refused
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rft_fast import checkpoints
from rft_fast.clip import Ends, Setup

HEAD = {"classification_head.weight": torch.ones(3, 10)}


def arch(folder: Path, quick: bool = False) -> str:
    model_cfg = {"embed_dim": 10, "quick_gelu": quick, "vision_cfg": VISION, "text_cfg": TEXT}
    (file := folder / f"arch_{quick}.json").write_text(json.dumps({"model_cfg": model_cfg}))
    return str(file)


@pytest.mark.parametrize("second", [False, True])
def test_text_positions_of_long_clip_are_inert_beside_a_head(tmp_path: Path, second: bool) -> None:
    torch.save(clip().state_dict(), tmp_path / "clip.pt")
    tuned = {name: tensor * 1.01 for name, tensor in clip().state_dict().items()}
    tuned["positional_embedding"] = torch.ones(248, 12)
    if second:
        tuned["positional_embedding_res"] = torch.ones(248, 12)
    torch.save(tuned, tmp_path / "long.pt")
    setup = Setup(arch(tmp_path), head="zeroshot", zeroshot_head=HEAD)
    ends = Ends(setup, checkpoints.load(tmp_path / "clip.pt"))
    zeroshot, finetuned = ends.pair(checkpoints.load(tmp_path / "long.pt"))
    assert zeroshot.keys() == finetuned.keys() and not any("_res" in name for name in finetuned)
    files = (checkpoints.read(tmp_path / name) for name in ("clip.pt", "long.pt"))
    assert checkpoints.compare(*files).problems == ()


def pickled(folder: Path, quick: bool) -> Path:
    torch.save(clip(quick_gelu=quick), folder / "a.pt")
    return folder / "a.pt"


def inside(folder: Path, quick: bool) -> Path:
    torch.save({"model": nn.DataParallel(clip(quick_gelu=quick)), "epoch": 1}, folder / "a.pt")
    return folder / "a.pt"


def scripted(folder: Path, quick: bool) -> Path:
    model = clip(quick_gelu=quick).eval()
    traced = torch.jit.trace_module(model, {"encode_image": torch.zeros(1, 3, 8, 8)}, check_trace=False)
    traced.save(str(folder / "a.pt"))
    return folder / "a.pt"


def transformers(folder: Path, quick: bool) -> Path:
    save_file(huggingface(clip().state_dict()), folder / "model.safetensors")
    tower = {"hidden_act": "quick_gelu" if quick else "gelu"}
    config = {"model_type": "clip", "vision_config": tower, "text_config": tower}
    (folder / "config.json").write_text(json.dumps(config))
    return folder  # as save_pretrained leaves it


def open_clips(folder: Path, quick: bool) -> Path:
    save_file(clip().state_dict(), folder / "open_clip_model.safetensors")
    config = {"embed_dim": 10, "quick_gelu": quick, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [pickled, inside, scripted, transformers, open_clips])
@pytest.mark.parametrize("quick", [False, True])
def test_activations_that_contradict_the_architecture_are_refused_in_both_directions(
    tmp_path: Path, write: Callable[[Path, bool], Path], quick: bool
) -> None:
    state = checkpoints.load(write(tmp_path, quick))
    Ends(Setup(arch(tmp_path, quick), zeroshot_head=HEAD), state)
    with refused(ValueError, "QuickGELU", "GELU", json.dumps(quick)):
        Ends(Setup(arch(tmp_path, not quick), zeroshot_head=HEAD), state)


@pytest.mark.parametrize(
    "content",
    [
        lambda state: AveragedModel(clip()).state_dict(),
        lambda state: {"state_dict": renamed(state, "", "model.module._orig_mod."), "loops": {}},
        lambda state: {
            "module": {n.replace("visual.", "visual._fsdp_wrapped_module."): t for n, t in state.items()}
        },
        lambda state: {"net": renamed(state, "", "net.clip.")},
        lambda state: {"model": huggingface(state), "args": None},
        lambda state: {"model": renamed(huggingface(state), "", "module.clip.")},
    ],
    ids=["average", "lightning", "fsdp", "prefix", "transformers", "transformers, prefix"],
)
def test_ends_of_trainers_files_are_those_of_the_model(tmp_path: Path, content: Any) -> None:
    state = clip().state_dict()
    torch.save(content(state), tmp_path / "a.pt")
    setup = Setup(arch(tmp_path), zeroshot_head=HEAD)
    got = Ends(setup, checkpoints.load(tmp_path / "a.pt")).zeroshot
    expected = Ends(setup, dict(state)).zeroshot
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
