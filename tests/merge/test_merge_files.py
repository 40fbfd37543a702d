"""Files that a merge writes: names, formats, provenance, and what is left after a failure."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import tiny_checkpoints, tiny_merge
from support.tiny_checkpoints import (
    WRITERS,
    CLIPEncoder,
    Head,
    ImageClassifier,
    ImageEncoder,
    clip,
    huggingface,
    written,
)
from support.tiny_merge import merged
from support.wording import command_refused, refused, said
from torch import Tensor, nn

from rft_fast import checkpoints
from rft_fast.checkpoints.__main__ import main as checkpoints_main
from rft_fast.merge import Request, provenance, run
from rft_fast.merge.__main__ import main

ZERO = tiny_merge.base()
ONE = tiny_merge.moved(ZERO, 1)


def expected(zero: Path, one: Path, alpha: float) -> dict[str, Tensor]:
    a, b = checkpoints.load(zero), checkpoints.load(one)
    return {
        name: ((1 - alpha) * a[name].double() + alpha * tensor.double())
        if tensor.is_floating_point()
        else tensor
        for name, tensor in b.items()
    }


def agree(got: Any, truth: dict[str, Tensor]) -> None:
    assert set(got) == set(truth)
    for name, tensor in truth.items():
        assert torch.allclose(got[name].double(), tensor.double(), atol=1e-6), name


def shaken(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return tiny_merge.moved({name: tensor.detach().clone() for name, tensor in state.items()}, 9)


def test_provenance(tmp_path: Path) -> None:
    files = tiny_merge.put(tmp_path, zero=ZERO, one=ONE)
    out = tmp_path / "out.safetensors"
    _, outcome = merged("interpolate", files, out, alpha=(0.5, ("visual.conv1", 0.25)))
    found = provenance(out)
    assert found is not None and found == outcome.provenance
    assert found["method"] == "interpolate" and found["numbers"]["alpha"] == [0.5, ["visual.conv1", 0.25]]
    _, outcome = merged("hold", files, tmp_path / "held.safetensors", layers=("visual.conv1",))
    assert outcome.provenance["numbers"] == {"alpha": [1.0], "layers": ["visual.conv1"]}
    for source, role, file in zip(found["sources"], ("zero-shot", "fine-tuned"), files.values(), strict=True):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert source == {"file": str(file), "sha256": digest, "role": role}
    assert provenance(files["zero"]) is None
    (tmp_path / "text.safetensors").write_text("no tensors")
    with refused(ValueError, "text.safetensors"):
        provenance(tmp_path / "text.safetensors")
    note = next(note for note in checkpoints.read(out).notes if "rft_fast.merge" in note)
    said(note, "interpolate", "visual.conv1", "zero.safetensors", "one.safetensors")
    for text in ("{", "[]", '{"sources": 3}', '{"method": "x", "sources": [{"file": 1}], "numbers": {}}'):
        save_file({"visual.x": torch.ones(1)}, tmp_path / "odd.safetensors", {"rft_fast.merge": text})
        assert not any("rft_fast" in note for note in checkpoints.read(tmp_path / "odd.safetensors").notes)
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_the_provenance_of_a_file_of_torch_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tiny_merge.put(tmp_path, zero=ZERO, one=ONE)
    out = tmp_path / "soup.pt"
    outcome = run(Request("soup", (files["zero"], files["one"]), out))
    with zipfile.ZipFile(out) as archive:
        assert json.loads(archive.read("archive/rft_fast.merge")) == outcome.provenance
    assert provenance(out) == outcome.provenance and len(outcome.provenance["sources"]) == 2
    assert checkpoints_main([str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # long notes are wrapped
    notes = printed.split("written by rft_fast.merge: ")
    assert len(notes) == 2 and notes[1].startswith("soup, of zero.safetensors, one.safetensors")
    torch.save(ONE, tmp_path / "other.pt")
    assert provenance(tmp_path / "other.pt") is None

    def altered(text: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(tmp_path / "other.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
            for entry in old.infolist():
                new.writestr(entry, old.read(entry))
            new.writestr("other/rft_fast.merge", text, compression)
        return tmp_path / "x.pt"

    # A pickle that would call print: it is read as text, and is no JSON.
    for text in (
        b"\x80\x02cbuiltins\nprint\nX\x01\x00\x00\x00x\x85R.",
        b"[1]",
        b"{",
        b"\xff",
        b"[" * 100_000,
    ):
        with refused(ValueError, "x.pt", "rft_fast.merge"):
            provenance(altered(text))
        assert not any("rft_fast" in note for note in checkpoints.read(tmp_path / "x.pt").notes)
    assert capsys.readouterr().out == ""
    with refused(ValueError, "rft_fast.merge", f"{(16 << 20) + 1:,}"):
        provenance(altered(b" " * ((16 << 20) + 1)))
    with refused(ValueError, "rft_fast.merge"):
        provenance(altered(b" " * (1 << 20), zipfile.ZIP_DEFLATED))


MODULES: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "wiseft": lambda own: ImageClassifier(ImageEncoder(own["convert"]), Head()),
    "flyp": lambda own: CLIPEncoder(own["convert"]),
    "task-vector": lambda own: ImageEncoder(own["convert"]),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("how", "kind"), [*((how, "wiseft") for how in WRITERS), ("zip", "flyp"), ("zip", "task-vector")]
)
def test_pickled_modules_of_other_repositories(tmp_path: Path, how: str, kind: str, suffix: str) -> None:
    zero, one = tmp_path / "zero", tmp_path / "one"

    def tuned(own: dict[str, Any]) -> nn.Module:
        module = MODULES[kind](own)
        module.load_state_dict(shaken(module.state_dict()))
        return module

    stored = written(WRITERS[how], zero, MODULES[kind])
    written(WRITERS[how], one, tuned)
    assert checkpoints.read(zero).format == kind
    written_back(tmp_path, suffix, set(stored))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", ["soup", "open_clip", "training"])
def test_state_dicts(tmp_path: Path, kind: str, suffix: str) -> None:
    model = clip().state_dict()
    stored = {f"module.{name}": tensor for name, tensor in model.items()}
    if kind == "soup":
        stored = {f"model.{name}": tensor for name, tensor in model.items()} | {
            "classification_head.weight": torch.randn(3, 10)
        }
    for name, state in (("zero", stored), ("one", shaken(stored))):
        torch.save({"state_dict": state, "epoch": 3} if kind == "training" else state, tmp_path / name)
    written_back(tmp_path, suffix, set(stored))


def written_back(folder: Path, suffix: str, names: set[str]) -> None:
    """Checks a merge of the files zero and one, and the names in its result."""
    out = folder / f"out{suffix}"
    run(Request("interpolate", (folder / "one",), out, folder / "zero", alpha=(0.4,)))
    agree(checkpoints.load(out), expected(folder / "zero", folder / "one", 0.4))
    if suffix == ".pt":
        assert set(torch.load(out)) == names
    else:
        with safe_open(out, "pt") as opened:
            assert set(opened.keys()) == names


def test_hugging_face_files_and_back(tmp_path: Path) -> None:
    """Names written out by hand; q, k and v apart, projections transposed."""
    zero, one = (clip(seed).state_dict() for seed in (0, 0))
    one = shaken(dict(one))
    files = tiny_merge.put(tmp_path, zero=huggingface(zero), one=huggingface(one))
    out = tmp_path / "out.safetensors"
    got, _ = merged("interpolate", files, out, alpha=(0.4,))
    truth = {name: 0.6 * zero[name].double() + 0.4 * one[name].double() for name in one}
    agree(got, {n: t for n, t in huggingface(truth).items() if not n.endswith("position_ids")})
    assert all(tensor.is_contiguous() for tensor in got.values())
    # To open_clip's names and back: the same bits.
    merged("interpolate", files, tmp_path / "open.safetensors", alpha=(0.4,), format="open_clip")
    assert checkpoints.read(tmp_path / "open.safetensors").format == "open_clip"
    agree(checkpoints.load(tmp_path / "open.safetensors"), truth)
    two = {"zero": tmp_path / "open.safetensors", "one": files["one"]}
    again, _ = merged("interpolate", two, tmp_path / "c.safetensors", alpha=(0.0,), format="huggingface")
    tiny_checkpoints.same(again, got, order=False)
    soup, _ = merged("interpolate", two, tmp_path / "d.safetensors", alpha=(0.0,), format="soup")
    assert all(name.startswith("model.") for name in soup)


def test_the_weights_that_a_key_chooses(tmp_path: Path) -> None:
    state, average = dict(clip().state_dict()), shaken(dict(clip().state_dict()))
    torch.save({"state_dict": shaken(state), "state_dict_ema": average}, tmp_path / "one")
    torch.save(state, tmp_path / "zero")
    request = Request(
        "interpolate",
        (tmp_path / "one",),
        tmp_path / "out.safetensors",
        tmp_path / "zero",
        alpha=(0.4,),
        key="state_dict_ema",
    )
    run(request)
    truth = {name: 0.6 * state[name].double() + 0.4 * average[name].double() for name in state}
    agree(checkpoints.load(request.out), truth)
    with refused(ValueError, "state_dict", "state_dict_ema"):
        run(replace(request, key=None, overwrite=True))


def test_two_sets_of_weights_of_one_file(tmp_path: Path) -> None:
    """The provenance names them; one set twice is refused."""
    state, average = dict(clip().state_dict()), shaken(dict(clip().state_dict()))
    torch.save({"state_dict": state, "ema": average}, file := tmp_path / "both")
    out = tmp_path / "out.safetensors"
    request = Request("interpolate", (file,), out, file, alpha=(0.4,), key="ema", zeroshot_key="state_dict")
    outcome = run(request)
    truth = {name: 0.6 * state[name].double() + 0.4 * average[name].double() for name in state}
    agree(checkpoints.load(out), truth)
    assert [source["key"] for source in outcome.provenance["sources"]] == ["state_dict", "ema"]
    with refused(ValueError, file):
        run(replace(request, zeroshot_key="ema", overwrite=True))


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    """Its shards are hashed as one; tensors are read across them."""
    names = [*ZERO]
    halves = {f"one-{k}": {n: ONE[n] for n in part} for k, part in ((1, names[:5]), (2, names[5:]))}
    tiny_merge.put(tmp_path, zero=ZERO, **halves)
    index = {n: f"one-{1 if n in names[:5] else 2}.safetensors" for n in names}
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    out = tmp_path / "out.safetensors"
    outcome = run(Request("interpolate", (file,), out, tmp_path / "zero.safetensors", alpha=(0.4,)))
    agree(checkpoints.load(out), {n: 0.6 * ZERO[n].double() + 0.4 * ONE[n].double() for n in names})
    assert outcome.provenance["sources"][1]["sha256"] == checkpoints.sha256(file)


def test_torchscript(tmp_path: Path) -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Linear(4, 3)
            self.logit_scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Tower()
    for name in ("zero", "one"):
        torch.jit.script(model).save(tmp_path / name)
        model.load_state_dict(shaken(model.state_dict()))
    out = tmp_path / "out.safetensors"
    run(Request("interpolate", (tmp_path / "one",), out, tmp_path / "zero", alpha=(0.4,)))
    agree(checkpoints.load(out), expected(tmp_path / "zero", tmp_path / "one", 0.4))


def adapter(folder: Path, modules: dict[str, tuple[Tensor, Tensor]], alpha: float, **whole: Tensor) -> Path:
    """Write an adapter as peft does: factors of weights, and tensors that it holds whole."""
    folder.mkdir()
    state = dict(whole)
    for module, (a, b) in modules.items():
        state |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file({f"base_model.model.{n}": t for n, t in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": len(a), "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tuned(tmp_path: Path) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """A base and two adapters of it, and the float64 difference that each makes."""
    noise = torch.Generator().manual_seed(4)
    files, differences = tiny_merge.put(tmp_path, zero=ZERO), {}
    for place, name in enumerate(("first", "second")):
        module = f"visual.transformer.resblocks.{place}.mlp.c_fc"
        a, b = 0.2 * torch.randn(2, 5, generator=noise), torch.randn(13, 2, generator=noise)
        files[name] = adapter(tmp_path / name, {module: (a, b)}, alpha=3)
        differences[f"{module}.weight"] = 3 / 2 * b.double() @ a.double()
    return files, differences


def test_adapters_are_merged_as_the_models_that_they_make(
    tuned: tuple[dict[str, Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    files, differences = tuned
    out = tmp_path / "out.safetensors"
    state, outcome = merged("task-arithmetic", files, out, scale=(0.5,))
    truth = {name: t.double() + 0.5 * differences.get(name, torch.zeros(())) for name, t in ZERO.items()}
    tiny_merge.close(state, truth)
    assert not outcome.provenance["notes"]
    names = [Path(source["file"]).parent.name for source in outcome.provenance["sources"]]
    assert names[1:] == ["first", "second"]
    assert outcome.provenance["sources"][1]["sha256"] == checkpoints.sha256(files["first"])
    one = {name: files[name] for name in ("zero", "first")}
    state, _ = merged("interpolate", one, tmp_path / "whole.safetensors", alpha=(1.0,))
    for name, tensor in checkpoints.load(files["first"], base=ZERO).items():
        assert torch.equal(state[name], tensor)


def test_an_adapter_without_its_base(
    tuned: tuple[dict[str, Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    files, _ = tuned
    out = tmp_path / "out.safetensors"
    with refused(ValueError, files["first"], "--zeroshot"):
        run(Request("soup", (files["first"], files["second"]), out))
    with refused(ValueError, files["first"]):
        run(Request("interpolate", (files["zero"],), out, files["first"], alpha=(1.0,)))
    with refused(ValueError, files["first"], "ema"):
        run(Request("interpolate", (files["first"],), out, files["zero"], key="ema", alpha=(1.0,)))
    assert not out.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_views_and_dtypes_of_torch_files(tmp_path: Path, suffix: str) -> None:
    """Transposed, shared, sliced, empty and 0-d tensors, integers, and dtypes of several sizes."""
    big = torch.randn(6, 4)
    state = {
        "visual.t": big.T,
        "visual.part": big[2:4],
        "visual.column": big[:, 1],
        "visual.half": torch.randn(5).half(),
        "visual.double": torch.randn(3, dtype=torch.float64),
        "visual.ids": torch.arange(5),
        "visual.flags": torch.tensor([True, False, True]),
        "visual.scalar": torch.tensor(2.0),
        "visual.none": torch.empty(0, 2),
    }
    torch.save(state, tmp_path / "zero.pt")
    torch.save({k: v.clone() for k, v in shaken(state).items()}, tmp_path / "one.pt")
    out = tmp_path / f"out{suffix}"
    run(Request("interpolate", (tmp_path / "one.pt",), out, tmp_path / "zero.pt", alpha=(0.25,)))
    got, truth = checkpoints.load(out), expected(tmp_path / "zero.pt", tmp_path / "one.pt", 0.25)
    for name, tensor in truth.items():
        assert got[name].dtype == state[name].dtype and got[name].shape == state[name].shape
        assert torch.allclose(got[name].double(), tensor.double(), atol=2e-3 if "half" in name else 1e-6)
    if suffix == ".pt":
        assert list(torch.load(out, weights_only=True)) == list(state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_activations_stay_known(tmp_path: Path, suffix: str) -> None:
    """What a pickled class shows of QuickGELU is in the result's metadata."""
    for name in ("zero", "one"):
        written(WRITERS["zip"], tmp_path / name, MODULES["wiseft"])
    before = checkpoints.load(tmp_path / "zero").activation  # type: ignore[attr-defined]
    out = tmp_path / f"out{suffix}"
    run(Request("interpolate", (tmp_path / "one",), out, tmp_path / "zero", alpha=(0.5,)))
    after = checkpoints.load(out).activation  # type: ignore[attr-defined]
    assert before and {k: v.quick for k, v in after.items()} == {k: v.quick for k, v in before.items()}


def test_a_text_tower_of_one_file_is_copied_or_left_out_with_a_note(tmp_path: Path) -> None:
    text = {"transformer.resblocks.0.ln_1.weight": torch.randn(4)}
    for zero, one in ((ZERO | text, ONE), (ZERO, ONE | text)):
        files = tiny_merge.put(tmp_path, zero=zero, one=one)
        got, outcome = merged(
            "interpolate", files, tmp_path / "out.safetensors", alpha=(0.5,), overwrite=True
        )
        assert set(got) == set(one) and len(outcome.notes) == 1
        said(outcome.notes[0], *text)
        if one is not ONE:
            assert torch.equal(got[next(iter(text))], next(iter(text.values())))


def test_batch_norm(tmp_path: Path) -> None:
    state = ZERO | {
        "visual.bn.running_mean": torch.randn(3),
        "visual.bn.running_var": torch.rand(3) + 1,
        "visual.bn.num_batches_tracked": torch.tensor(7),
    }
    other = tiny_merge.moved(state, 1) | {"visual.bn.num_batches_tracked": torch.tensor(9)}
    got, outcome = merged(
        "interpolate",
        tiny_merge.put(tmp_path, zero=state, one=other),
        tmp_path / "o.safetensors",
        alpha=(0.5,),
    )
    assert got["visual.bn.num_batches_tracked"] == 9
    said("\n".join(outcome.notes), "visual.bn.running_mean", "visual.bn.num_batches_tracked")


# --- the command, and failures ------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tiny_merge.put(tmp_path, zero=ZERO, one=ONE)
    words = ["interpolate", "--zeroshot", str(files["zero"]), "--finetuned", str(files["one"])]
    words += ["--alpha", "0.5", "re:visual.conv1=0.1", "--out", str(tmp_path / "out.safetensors")]
    assert main(words) == 0
    said(capsys.readouterr().out, str(len(ZERO)))
    command_refused(main, words, "--overwrite")
    assert main([*words, "--overwrite"]) == 0


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, when the disk shows it; and in the middle, when it does not."""
    state = {"visual.x": torch.ones(300, 1000)}
    files = tiny_merge.put(tmp_path, zero=state, one=state)
    words = ["interpolate", "--zeroshot", files["zero"], "--finetuned", files["one"], "--alpha", ".5"]
    words = [*map(str, words), "--out", str(tmp_path / f"out{suffix}")]
    before = listing(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # EFBIG, in the middle of the tensor
    try:
        assert main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == before
    said(capsys.readouterr().err)
    real = os.fstatvfs

    def full(handle: int) -> Any:
        return type("", (), {"f_bavail": 2, "f_frsize": real(handle).f_frsize})

    monkeypatch.setattr(os, "fstatvfs", full)
    assert main(words) == 1
    assert listing(tmp_path) == before and os.strerror(errno.ENOSPC)
    said(capsys.readouterr().err, "out.safetensors" if suffix == ".safetensors" else "out.pt", "1,200,000")


def test_a_source_that_changes_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rft_fast.merge import work

    files = tiny_merge.put(tmp_path, zero=ZERO, one=ONE)
    before = listing(tmp_path)
    do = work._Work.do

    def change(self: Any, job: Any, writer: Any) -> None:
        do(self, job, writer)
        with files["one"].open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"abcd")

    monkeypatch.setattr(work._Work, "do", change)
    with refused(OSError, files["one"]):
        merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.5,))
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Four tensors of 32 MiB in each file; the peak of a fresh process grows by less than two of them."""
    state = {f"visual.{i}": torch.randn(8, 1 << 20) for i in range(4)}
    tiny_merge.put(tmp_path, zero=state, one={name: tensor + 0.1 for name, tensor in state.items()})
    code = f"""
import json, pathlib, resource
from rft_fast.merge import Request, run
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder = pathlib.Path({str(tmp_path)!r})
import rft_fast.merge.work, rft_fast as rft, torch
rft.interpolate_(torch.zeros(4), torch.zeros(4), torch.zeros(4), 0.5)
before = peak()
run(Request("interpolate", (folder / "one.safetensors",), folder / "o.safetensors",
    folder / "zero.safetensors", alpha=(0.5,)))
print(json.dumps(peak() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 64
