"""checkpoints.load: every layout to one set of names, and nothing hostile gets through."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.wording import refused
from torch import nn

from rft_fast import checkpoints

STATE = {
    "visual.conv1.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "visual.bn.num_batches_tracked": torch.tensor(7),
    "visual.mask": torch.tensor([True, False]),
    "visual.proj": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "positional_embedding": torch.ones(2, 2, dtype=torch.bfloat16),
    "classification_head.weight": torch.ones(4, 5),
    "logit_scale": torch.tensor(4.6),
}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {
        name if name.startswith("classification_head") else prefix + name: tensor
        for name, tensor in STATE.items()
    }


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def same_content(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    same(dict(sorted(got.items())), dict(sorted(expected.items())))


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "model.",
        "module.model.",
        "image_encoder.model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module.",
        "module.module.model._orig_mod.",
        "image_encoder.module.model.",
        "module.image_encoder._orig_mod.model.",
    ],
)
def test_every_prefix_and_both_formats(tmp_path: Path, prefix: str) -> None:
    state = prefixed(prefix)
    if prefix.startswith("module."):  # a wrapped classifier wraps its head as well
        state = {n if n.startswith("module.") else f"module.{n}": t for n, t in state.items()}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    same(checkpoints.load(tmp_path / "a.pt"), STATE)
    same_content(checkpoints.load(tmp_path / "a.safetensors"), STATE)  # safetensors sorts


def test_what_precedes_a_model_is_dropped_at_the_start_and_wrappers_at_any_place(tmp_path: Path) -> None:
    state = {
        "visual.model.bias": torch.ones(1),
        "visual.module.weight": torch.ones(1),
        "module": torch.ones(1),
    }
    torch.save(state, tmp_path / "a.pt")
    assert list(checkpoints.load(tmp_path / "a.pt")) == ["visual.model.bias", "visual.weight", "module"]


def test_open_clip_training_checkpoint(tmp_path: Path) -> None:
    wrapper = {
        "epoch": 3,
        "name": "run",
        "state_dict": OrderedDict(prefixed("module.")),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "scaler": {"scale": 1.0},
    }
    torch.save(wrapper, tmp_path / "epoch_3.pt")
    same(checkpoints.load(tmp_path / "epoch_3.pt"), STATE)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "a.bin")
    same_content(checkpoints.load(str(tmp_path / "a.pt")), STATE)
    same(checkpoints.load(tmp_path / "a.bin"), STATE)


def test_parameters_and_strides_become_plain_contiguous_tensors(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    torch.save({"visual.conv1.weight": nn.Parameter(weight)}, tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt")["visual.conv1.weight"]
    assert type(loaded) is torch.Tensor and not loaded.requires_grad
    assert loaded.is_contiguous() and torch.equal(loaded, weight)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_writing_to_what_was_loaded_leaves_the_file_alone(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    torch.save(STATE, file) if suffix == "pt" else save_file(STATE, file)
    before = file.read_bytes()
    for tensor in checkpoints.load(file).values():
        tensor.zero_()
    assert file.read_bytes() == before
    same_content(checkpoints.load(file), STATE)


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert checkpoints.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with refused(ValueError, "sha256"):
        checkpoints.sha256(tmp_path / "b")


def not_loaded(file: Path, *facts: str) -> str:
    with refused(ValueError, file.name, *facts) as caught:
        checkpoints.load(file)
    return str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    not_loaded(tmp_path / "missing.pt")
    not_loaded(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    not_loaded(tmp_path / "empty.safetensors")
    (tmp_path / "notes.pt").write_text("these are not the weights you are looking for")
    not_loaded(tmp_path / "notes.pt")
    (tmp_path / "noise.pt").write_bytes(b"\x01\xff\x00\x02" * 9)
    not_loaded(tmp_path / "noise.pt", "torch.save")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    not_loaded(tmp_path / "images.zip", "torch.save")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 605143316\n"
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "m-1-of-2.bin", "b": "m-2-of-2.bin"}}).encode()


@pytest.mark.parametrize("ending", ["pt", "safetensors", "bin"])
@pytest.mark.parametrize(
    "content",
    [
        LFS,
        b"\xef\xbb\xbf" + LFS,
        b"/annex/objects/SHA256E-s605--1.pt\n",
        b"<!DOCTYPE html><html><title>Sign in</title>",
        b"\n  <HTML lang='en'>",
        b"<!-- cached --><html>",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        INDEX,
        b'{"mode":{"a":1}}',  # its ninth byte is that of a safetensors file
        b'{"error": "Repository not found\\u001b[2J"}',
        b'{"a":' * 5000,
        "<!DOCTYPE html>".encode("utf-16"),
        b"<center>403 Forbidden</center>",
        b"# xet version 0\nfilesize = 12\n",
        b"outs:\n- md5: abc\n",
        b"\x08\x07\x12\x07pytorch\x1a" + bytes(99),
        b"\x82\xa6params\x81\xa1a\x01",
        b"GGUF\x03\x00\x00\x00" + bytes(64),
        b"\x1f\x8b\x08\x00" + bytes(range(99)),
        b"\x89HDF\r\n\x1a\n" + bytes(99),
        b"\x93NUMPY\x01\x00v\x00{'descr'",
        b"model.pt" + bytes(249) + b"ustar\x00" + bytes(255),
        bytes(4096),
        "weights \u00fc\u00df are elsewhere".encode("utf-16"),
        b"(dp0\nS'a'\n",
        b"}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
    ],
    ids=range(26),
)
def test_files_of_other_kinds_are_named(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(content)
    assert not_loaded(tmp_path / f"a.{ending}").isprintable()


@pytest.mark.parametrize(
    ("names", "facts"),
    [
        (["a.npy", "b.npy"], ""),
        (["x/model.pt"], "model.pt"),
        (["word/a.xml"], "torch.save"),
        (["x/inner.zip"], "inner.zip"),
        (["config.json", "model.weights.h5"], "Keras"),
    ],
)
def test_zip_files_of_other_kinds_are_named(tmp_path: Path, names: list[str], facts: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in names:
            archive.writestr(name, b"1")
    not_loaded(tmp_path / "a.pt", *facts.split())


@pytest.mark.parametrize("end", ["data-00000-of-00001", "data-00001-of-00003", "meta", "index", "pb"])
def test_parts_of_tensorflow_checkpoints_are_named(tmp_path: Path, end: str) -> None:
    (tmp_path / f"model.ckpt.{end}").write_bytes(bytes(range(1, 250)))
    not_loaded(tmp_path / f"model.ckpt.{end}", "TensorFlow")


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"last_epoch": 3, "base_lrs": [0.1]}, "last_epoch"),
        ({"state": {0: {"exp_avg": torch.ones(3, 3), "step": 1}}, "param_groups": []}, "state.0 --key"),
    ],
    ids=["schedule", "optimizer"],
)
def test_the_state_of_a_training_is_no_model(tmp_path: Path, content: dict[str, Any], facts: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    not_loaded(tmp_path / "a.pt", *facts.split())


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.7, 0.999])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    for write, name in ((torch.save, "a.pt"), (save_file, "a.safetensors")):
        file = tmp_path / name
        write({"visual.proj": torch.randn(64, 64)}, file)
        content = file.read_bytes()
        file.write_bytes(content[: max(1, int(len(content) * share))])
        not_loaded(file)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_run_something_run_nothing(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    hostile = {"visual.proj": torch.ones(2), "classification_head.weight": Hostile(marker)}
    torch.save(hostile, tmp_path / "zip.pt", pickle_protocol=protocol)
    not_loaded(tmp_path / "zip.pt", "posix.system", "state_dict")
    torch.save(
        hostile,
        tmp_path / "old.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=False,
    )
    not_loaded(tmp_path / "old.pt", "posix.system")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps([Hostile(marker)], protocol=protocol))
    not_loaded(tmp_path / "bare.pkl", "posix.system")
    torch.save({"state_dict": hostile, "epoch": 1}, tmp_path / "wrapped.pt")
    not_loaded(tmp_path / "wrapped.pt", "posix.system")
    assert not marker.exists()


def test_a_module_of_torch_is_read(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    torch.save(module, tmp_path / "module.pt")
    (tmp_path / "module.pkl").write_bytes(pickle.dumps(module))
    for name in ("module.pt", "module.pkl"):
        same(checkpoints.load(tmp_path / name), module.state_dict())


def test_pickle_that_claims_huge_sizes(tmp_path: Path) -> None:
    (tmp_path / "huge.pkl").write_bytes(b"\x80\x04\x8e" + (1 << 50).to_bytes(8, "little") + b"x")
    not_loaded(tmp_path / "huge.pkl")
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x04Nr" + (1 << 31).to_bytes(4, "little") + b".")
    not_loaded(tmp_path / "memo.pkl", "NoneType")


def test_torchscript_archive_without_content(tmp_path: Path) -> None:
    file = tmp_path / "openai.pt"
    with zipfile.ZipFile(file, "w") as archive:
        for entry in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{entry}", b"")
    not_loaded(file)


def rewritten(file: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    target = file.with_name("rewritten.pt")
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change.get(name.partition("/")[2], content))
    return target


def test_tampered_archives(tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(1000)}, tmp_path / "a.pt")
    not_loaded(rewritten(tmp_path / "a.pt", {}, zipfile.ZIP_DEFLATED))
    not_loaded(rewritten(tmp_path / "a.pt", {"data/0": b"short"}))
    not_loaded(rewritten(tmp_path / "a.pt", {"data.pkl": b"garbage"}))


def test_a_shape_beyond_what_is_stored(tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
    not_loaded(tmp_path / "a.pt", "visual.proj", "4")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_holds_more_than_tensors(tmp_path: Path) -> None:
    cases = {
        "plain": ({**STATE, "temperature": 0.1, "note": "x"}, "temperature note"),
        "number_name": ({3: torch.ones(1)}, "3"),
        "ema": ({"state_dict": STATE, "state_dict_ema": {"a": torch.ones(2)}}, "state_dict_ema"),
        "inner": ({"state_dict": {"a": 1}}, "state_dict"),
        "tensor": (torch.ones(3), ""),
        "nothing": ({}, ""),
        "sparse": ({"visual.proj": torch.eye(3).to_sparse()}, "visual.proj"),
    }
    for name, (content, facts) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        not_loaded(tmp_path / f"{name}.pt", *facts.split())


def test_names_that_collide(tmp_path: Path) -> None:
    state = {"visual.proj": torch.ones(1), "model.visual.proj": torch.zeros(1)}
    save_file(state, tmp_path / "a.safetensors")
    not_loaded(tmp_path / "a.safetensors", "model.visual.proj", "visual.proj")


def test_unmerged_adapters_are_named(tmp_path: Path) -> None:
    q = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj."
    save_file({f"{q}lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, tmp_path / "adapter_model.safetensors")
    torch.save(
        {**STATE, "visual.conv1.weight_g": torch.ones(1), "visual.conv1.weight_v": torch.ones(1)},
        tmp_path / "b",
    )
    save_file({"vision_model.a.lora_A.weight": torch.ones(2)}, tmp_path / "c")
    (adapter,) = checkpoints.read(tmp_path / "adapter_model.safetensors").notes
    assert "LoRA" in adapter and "merge" in adapter and f"{q}lora_A.weight" in adapter
    assert "remove_weight_norm" in "".join(checkpoints.read(tmp_path / "b").notes)
    not_loaded(tmp_path / "c", "LoRA")
