"""What a merge refuses, before it writes anything."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_merge
from support.tiny_merge import State, merged
from support.wording import command_refused, refused

from rft_fast.common import files
from rft_fast.merge import Request, lines, sources
from rft_fast.merge.__main__ import main

ZERO = tiny_merge.base()
ONE = tiny_merge.moved(ZERO, 1)
IDS = {"visual.ids": torch.arange(3)}


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("zero", "one", "facts"),
    [
        pytest.param(ZERO, {"other": torch.ones(2)}, ["zero.safetensors", "one.safetensors"], id="nothing"),
        pytest.param(ZERO, ONE | {"classification_head.weight": torch.ones(4, 5)}, [3, 4], id="head"),
        pytest.param(ZERO, without(ONE, "head"), ["classification_head.weight"], id="no head"),
        pytest.param(ZERO, ONE | {"visual.ln_post.weight": torch.ones(6)}, ["ln_post", 5, 6], id="shape"),
        pytest.param(ZERO, without(ONE, "conv1"), ["visual.conv1.weight"], id="missing"),
        pytest.param(ZERO, ONE | {"visual.more": torch.ones(1)}, ["visual.more"], id="more"),
        pytest.param(ZERO | IDS, ONE | {"visual.ids": torch.ones(3)}, ["visual.ids"], id="kind"),
        pytest.param(ZERO | IDS, ONE | {"visual.ids": torch.arange(3) + 1}, ["visual.ids"], id="integers"),
        pytest.param(
            ZERO | {"visual.c": torch.ones(2, dtype=torch.complex64)},
            ONE | {"visual.c": torch.ones(2, dtype=torch.complex64)},
            ["visual.c"],
            id="complex",
        ),
        pytest.param(ZERO, tiny_merge.base(5), ["--unrelated"], id="unrelated"),
        pytest.param(ZERO, {n: ONE[n] - ZERO[n] for n in ZERO}, ["task-arithmetic"], id="difference"),
        pytest.param(
            ZERO,
            ONE | {"visual.conv1.weight": torch.full((4, 3, 2, 2), math.nan)},
            ["visual.conv1.weight"],
            id="nan",
        ),
    ],
)
def test_models_that_do_not_belong_together(
    tmp_path: Path, zero: State, one: State, facts: list[object]
) -> None:
    files = tiny_merge.put(tmp_path, zero=zero, one=one)
    before = sorted(os.listdir(tmp_path))
    with refused(ValueError, *facts):
        merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.5,))
    assert sorted(os.listdir(tmp_path)) == before


def test_unrelated_models_on_request(tmp_path: Path) -> None:
    other = tiny_merge.base(5)
    files = tiny_merge.put(tmp_path, one=ZERO, two=other)
    got, _ = merged("soup", files, tmp_path / "out.safetensors", unrelated=True)
    name = "visual.conv1.weight"
    torch.testing.assert_close(got[name], (ZERO[name] + other[name]) / 2)


def test_activations_of_later_files_contradict_each_other(tmp_path: Path) -> None:
    """Also where the first file shows none."""
    files = tiny_merge.put(tmp_path, zero=ZERO)
    for seed, name, quick in ((1, "one", "true"), (2, "two", "false")):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(tiny_merge.moved(ZERO, seed), files[name], metadata={"quick_gelu": quick})
    with refused(ValueError, "one.safetensors", "two.safetensors", "QuickGELU"):
        merged("task-arithmetic", files, tmp_path / "out.safetensors")


def test_a_name_that_no_file_can_have_is_refused_before(tmp_path: Path) -> None:
    """Its temporary file has a longer name; the longest that is accepted can be written."""
    files = tiny_merge.put(tmp_path, zero=ZERO, one=tiny_merge.moved(ZERO, 1))
    suffix = ".safetensors"
    merged("interpolate", files, tmp_path / f"{'a' * (232 - len(suffix))}{suffix}", alpha=(0.5,))
    with refused(ValueError, "233 bytes", 232):
        merged("interpolate", files, tmp_path / f"{'b' * (233 - len(suffix))}{suffix}", alpha=(0.5,))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(3), torch.arange(3, dtype=torch.int32)),
        (torch.ones(2), torch.ones(2).to(torch.complex64)),
    ],
    ids=["integers", "complex"],
)
def test_dtypes_that_are_not_merged(tmp_path: Path, one: torch.Tensor, other: torch.Tensor) -> None:
    for name, tensor in (("zero", one), ("one", other)):
        torch.save({**ZERO, "visual.more": tensor}, tmp_path / f"{name}.pt")
    files = {name: tmp_path / f"{name}.pt" for name in ("zero", "one")}
    with refused(ValueError, "visual.more", "zero.pt", "one.pt"):
        merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.5,))


def test_two_copies_of_a_model(tmp_path: Path) -> None:
    files = tiny_merge.put(tmp_path, one=ONE, two=ONE)
    before = sorted(os.listdir(tmp_path))
    with refused(ValueError, "one.safetensors", "two.safetensors"):
        merged("soup", files, tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("whole", [".", "model.safetensors.index.json"])
def test_a_shard_of_a_model_is_not_overwritten(tmp_path: Path, whole: str) -> None:
    names = list(ONE)
    parts = {"model-00001-of-00002": names[:4], "model-00002-of-00002": names[4:]}
    shards = tiny_merge.put(tmp_path, **{p: {n: ONE[n] for n in inside} for p, inside in parts.items()})
    index = {name: shards[part].name for part, inside in parts.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (other := tmp_path / "other").mkdir()
    files = {**tiny_merge.put(other, zero=ZERO), "one": tmp_path / whole}
    out = shards["model-00001-of-00002"]
    before = out.read_bytes()
    with refused(ValueError, out.name):
        merged("interpolate", files, out, alpha=(0.5,), overwrite=True)
    assert out.read_bytes() == before


@pytest.mark.parametrize("text", ["both", "one"])
def test_numbers_beyond_the_requested_dtype(tmp_path: Path, text: str) -> None:
    """Merged, and copied because the other file has no such tensor."""
    large = {"text_projection": torch.full((2, 2), 1e6)}
    files = tiny_merge.put(tmp_path, zero=ZERO | (large if text == "both" else {}), one=ONE | large)
    with refused(ValueError, "text_projection", "float16"):
        merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.5,), dtype="float16")


@pytest.mark.parametrize("method", ["soup", "model-stock", "task-arithmetic", "ties", "slerp"])
def test_nan_by_any_method(tmp_path: Path, method: str) -> None:
    bad = ONE | {"visual.conv1.weight": torch.full((4, 3, 2, 2), math.nan)}
    several = {"one": ONE, "two": bad}
    states = (
        several if method == "soup" else {"zero": ZERO, **(several if method != "slerp" else {"two": bad})}
    )
    options = {"alpha": (0.5,)} if method == "slerp" else {}
    with refused(ValueError, "visual.conv1.weight", "NaN"):
        merged(method, tiny_merge.put(tmp_path, **states), tmp_path / "out.safetensors", **options)


def test_rows_of_a_head_in_another_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = torch.randn(6, 20)
    name = "classification_head.weight"
    files = tiny_merge.put(
        tmp_path, zero=without(ZERO, "head") | {name: head}, one=without(ONE, "head") | {name: head.flip(0)}
    )
    with refused(ValueError, "one.safetensors", 6):
        merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.5,))


FILE = Path("a.safetensors")
OUT = Path("out.safetensors")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("interpolat", {}, id="no method"),
        pytest.param("interpolate", {}, id="no alpha"),
        pytest.param("interpolate", {"alpha": (0.5,), "lines": (0.1, 0.2)}, id="alpha and lines"),
        pytest.param("interpolate", {"alpha": (0.5,), "alpha_table": (0.5,)}, id="alpha and table"),
        pytest.param("interpolate", {"alpha_table": (("x", 1e39),)}, id="table beyond float32"),
        pytest.param("hold", {"layers": ("x",), "alpha_table": (0.5,)}, id="table of hold"),
        pytest.param("interpolate", {"alpha": (math.nan,)}, id="nan"),
        pytest.param("interpolate", {"alpha": (0.5, ("x", math.inf))}, id="infinite"),
        pytest.param("interpolate", {"alpha": (0.5, 0.6)}, id="two alphas"),
        pytest.param("interpolate", {"alpha": (0.5,), "zeroshot": None}, id="no zero-shot"),
        pytest.param("interpolate", {"alpha": (0.5,), "finetuned": (FILE, OUT)}, id="two models"),
        pytest.param("interpolate", {"alpha": (0.5,), "out": Path("out.txt")}, id="suffix"),
        pytest.param("soup", {"zeroshot": None}, id="soup of one"),
        pytest.param("soup", {"finetuned": (FILE, FILE)}, id="soup with zero-shot"),
        pytest.param("task-arithmetic", {"finetuned": ()}, id="no model"),
        pytest.param("task-arithmetic", {"scale": (1.0, 2.0)}, id="scales"),
        pytest.param("task-arithmetic", {"scale": (1e39,)}, id="scale beyond float32"),
        pytest.param("interpolate", {"lines": (3e38, 3e38)}, id="lines beyond float32"),
        pytest.param("model-stock", {}, id="model-stock of one"),
        pytest.param("ties", {"density": 0.0}, id="density"),
        pytest.param("ties", {"finetuned": (FILE, OUT), "scale": (1.0, 2.0)}, id="two scales"),
        pytest.param("dare", {}, id="no drop"),
        pytest.param("dare-ties", {"drop": 1.0}, id="drop"),
        pytest.param("slerp", {"alpha": (0.5,), "least_angle": 90.0}, id="angle"),
        pytest.param("hold", {}, id="no layers"),
        pytest.param("prune", {"layers": ("x",), "keep": 1.5}, id="keep"),
        pytest.param("prune", {"layers": ("x",), "seed": -1}, id="seed"),
        pytest.param("soup", {"finetuned": (FILE, OUT), "zeroshot": None, "zeroshot_key": "x"}, id="key"),
        pytest.param("soup", {"finetuned": (FILE, OUT), "zeroshot": None, "alpha": (0.5,)}, id="unused"),
        pytest.param("interpolate", {"alpha": (0.5,), "scale": (0.3,)}, id="unused scale"),
        pytest.param("ties", {"drop": 0.5}, id="unused drop"),
    ],
)
def test_requests(method: Any, options: dict[str, Any]) -> None:
    with refused(ValueError):
        Request(**{"method": method, "finetuned": (FILE,), "out": OUT, "zeroshot": FILE} | options)


@pytest.mark.parametrize(
    ("alpha", "facts"),
    [
        ((0.5, ("visual.conv", 1.0)), ["visual.conv1"]),
        ((("visual.conv1", 1.0),), ["visual.class_embedding"]),
        ((0.5, ("visual.conv1", 1.0), ("re:visual.*", 0.0)), ["visual.conv1", "re:visual.*"]),
        ((0.5, ("re:visual(", 0.0)), ["re:visual("]),
    ],
)
def test_tables_of_layers(tmp_path: Path, alpha: Any, facts: list[object]) -> None:
    files = tiny_merge.put(tmp_path, zero=ZERO, one=ONE)
    with refused(ValueError, *facts):
        merged("interpolate", files, tmp_path / "out.safetensors", alpha=alpha)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(["visual.conv1"], id="none"),
        pytest.param(["visual.resblocks.0.x"], id="one"),
        pytest.param(
            ["visual.layer1.0.x", *(f"transformer.resblocks.{i}.x" for i in range(3))], id="text only"
        ),
        pytest.param([f"visual.trunk.stages.{i // 2}.blocks.{i % 2}.x" for i in range(4)], id="convnext"),
        pytest.param([f"visual.trunk.layers.{i // 2}.blocks.{i % 2}.x" for i in range(4)], id="swin"),
    ],
)
def test_lines_need_blocks(layers: list[str]) -> None:
    with refused(ValueError):
        lines(layers, 0.1, 0.2)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("interpolate --alpha 0.5 --scale 2", ["--scale", "task-arithmetic"]),
        ("interpolate --alpha x", ["x"]),
        ("interpolate --alpha =1", ["=1"]),
        ("interpolate --lines 1", []),
        ("interpolate --alpha 0.5 --zeroshot nowhere.pt", ["nowhere.pt"]),
        ("interpolate --alpha 0.5 --out nowhere/o.pt", ["nowhere"]),
        ("interpolate --alpha 0.5 --out one.safetensors --overwrite", ["one.safetensors"]),
        ("interpolate --alpha 0.5 --finetuned link.safetensors", ["link.safetensors", "zero.safetensors"]),
        ("interpolate --alpha 0.5 --finetuned .", []),
        ("interpolate --alpha 0.5 --finetuned empty.pt", ["empty.pt"]),
        ("interpolate --alpha 0.5 --format huggingface", ["huggingface"]),
        ("interpolate --alpha 0.5 --out link.safetensors", ["link.safetensors"]),
    ],
)
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, facts: list[object]) -> None:
    tiny_merge.put(tmp_path, zero=ZERO, one=ONE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.safetensors").symlink_to("zero.safetensors")
    (tmp_path / "empty.pt").touch()
    before = sorted(os.listdir(tmp_path))
    method, *options = words.split()
    usual = {"--zeroshot": "zero.safetensors", "--finetuned": "one.safetensors", "--out": "o.safetensors"}
    usual = {name: value for name, value in usual.items() if name not in options}
    command_refused(main, [method, *options, *(word for pair in usual.items() for word in pair)], *facts)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_read_beyond_the_end_of_a_tensor(tmp_path: Path) -> None:
    save_file({"visual.a": torch.arange(10.0)}, tmp_path / "a.safetensors")
    with sources.opened(tmp_path / "a.safetensors", files.Inputs()) as source:
        out = torch.empty(4)
        source.read("visual.a", out, 6)
        assert out.tolist() == [6, 7, 8, 9]
        with refused(ValueError, "visual.a", 2, 4):
            source.read("visual.a", out, 8)
