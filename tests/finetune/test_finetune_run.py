"""Fine-tuning from files to a zoo: batches and augmentations, going on after a kill, the command line."""

from __future__ import annotations

import csv
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from support import tiny_zoo
from support.wording import command_refused, refused, said, warned
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op  # the other side of OPERATIONS

import rft_fast
from rft_fast import checkpoints, datasets, finetune, results, sweep
from rft_fast.clip import architectures, matching, prompts
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.common import disk
from rft_fast.config import zoo
from rft_fast.finetune import Setting, images, output, progress, training
from rft_fast.finetune.__main__ import main

CPU = torch.device("cpu")
TRAIN = ("--batch-size", "5", "--warm-up", "1", "--lr", "1e-2", "--epochs", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_zoo's, and `open.safetensors`: both towers and no head, as open_clip writes it."""
    made = tiny_zoo.make(tmp_path_factory.mktemp("finetune"))
    rng = np.random.default_rng(1)
    for i in range(12):
        path = made / "big" / "cat dog fox".split()[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 17, 3), dtype=np.uint8)).save(path)
    return made


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    """Tiny models suffer from more, and rounding depends on the number."""


def arguments(folder: Path, out: Path, *more: str, train: str = "near") -> list[str]:
    """train: "near", with numbers as classes, or "big", whose names say nothing of the head's rows."""
    if train == "big" and "--class-names" not in more:
        more = ("--label-map", "order", *more)
    return [
        *("--arch", str(folder / "tiny.json"), "--zeroshot", str(folder / "zeroshot.safetensors")),
        *("--train", str(folder / train), "--out", str(out), "--val", f"near={folder / 'near'}"),
        *("--ood", f"far={folder / 'far.npz'}", *TRAIN, *more),
    ]


def not_tuned(argv: list[str], *facts: object) -> None:
    command_refused(main, argv, *facts, silent=False)


def listed(folder: Path, train: str = "big", in_memory: bool = False) -> finetune.Images:
    source = datasets.open_source("train", folder / train)
    preprocess = architectures.preprocess(str(folder / "tiny.json"))
    return finetune.Images(source, torch.arange(12), source.labels, preprocess, 3, in_memory)


def decoded(file: Path) -> tuple[Tensor, Tensor]:
    with np.load(file) as archive:
        pixels = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)
        return pixels, torch.from_numpy(archive["labels"])


# --- the whole of it --------------------------------------------------------------------------------


def test_the_command_line_makes_a_zoo_that_the_sweep_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path, "--seed", "0", "1")) == 0
    out = capsys.readouterr().out
    said(out, tmp_path, "lr0.01-ep2-warm1-seed1: epoch 2 of 2")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["model.json", "zeroshot.safetensors", "zoo.toml"]
        + [f"lr0.01-ep2-warm1{seed}.{kind}" for seed in ("", "-seed1") for kind in ("csv", "safetensors")]
    )
    made = zoo.read(tmp_path / "zoo.toml")
    assert list(made.finetuned) == ["lr0.01-ep2-warm1", "lr0.01-ep2-warm1-seed1"]
    assert {name: data.ood for name, data in made.data.items()} == {"near": False, "far": True}

    start, given = load_file(tmp_path / "zeroshot.safetensors"), load_file(folder / "zeroshot.safetensors")
    assert set(start) == set(given) - {"model.logit_scale"}
    assert all(torch.equal(tensor, given[name]) for name, tensor in start.items())
    ends = Ends(Setup(made.arch), checkpoints.load(made.zeroshot.source))
    live = ends.live
    for file in made.finetuned.values():
        path = rft_fast.Path(live, *ends.pair(checkpoints.load(file.source)))
        path.write(0.5)
        assert path.layers

    with safe_open(made.finetuned["lr0.01-ep2-warm1-seed1"].source, "pt") as archive:
        metadata = archive.metadata()
    made_by = json.loads(metadata["finetune"])
    assert made_by["configuration"]["setting"]["seed"] == 1 and made_by["configuration"]["images"] == 12
    assert made_by["rft_fast"] == rft_fast.__version__
    with (tmp_path / "lr0.01-ep2-warm1.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "0"), ("1", "3"), ("2", "6")]
    assert rows[0]["lr"] == rows[0]["loss"] == "" and all(float(row["loss"]) > 0 for row in rows[1:])

    # The first and the last accuracy are those of the stored models, by another path through the package.
    data = datasets.load("near", folder / "near", architectures.preprocess(made.arch))
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    for row, stored in zip((0, -1), (made.zeroshot, made.finetuned["lr0.01-ep2-warm1"]), strict=True):
        live.load_state_dict(checkpoints.load(stored.source))
        with torch.no_grad():
            right = live((data.images.float() / 255 - mean) / std).argmax(1) == data.labels
        assert float(rows[row]["near"]) == pytest.approx(float(right.float().mean()))
    assert out.splitlines()[-1] == f"next: python -m rft_fast.sweep {tmp_path}"
    percent = f"{100 * float(rows[0]['near']):.1f}"
    assert out.count("epoch 0") == 1 and f"near {percent} %" in out.partition("epoch 0")[2].partition("\n")[0]


def test_zoos_are_moved_alone_or_with_their_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`in` lies in the zoo, `by` was given by a relative path, `far` by an absolute one."""
    project, out = tmp_path / "project", tmp_path / "project" / "zoos" / "z z"
    out.mkdir(parents=True)
    shutil.copytree(folder / "near", out / "in")
    shutil.copytree(folder / "near", project / "by")
    (project / "map.json").write_text('{"0": 0, "1": 1, "2": 2}')
    monkeypatch.chdir(project)
    argv = [
        *("--arch", str(folder / "tiny.json"), "--zeroshot", str(folder / "zeroshot.safetensors")),
        *("--train", "by", "--label-map", "map.json", "--out", "zoos/z z", "--val", "by", f"in={out / 'in'}"),
        *("--ood", f"far={folder / 'far.npz'}", *TRAIN),
    ]
    assert main(argv) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == "zoos/z z"
    with (out / "zoo.toml").open("rb") as stream:
        data = zoo.tomllib.load(stream)["data"]
    assert {name: entry["path"] for name, entry in data.items()} == {
        "by": "../../by",
        "in": "in",
        "far": str(folder / "far.npz"),
    }
    assert data["by"]["labels"] == "../../map.json"
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    moved = zoo.read(tmp_path / "moved" / "zoos" / "z z")
    assert [source.path.resolve() for source in moved.data.values()] == [
        tmp_path / "moved" / "by",
        tmp_path / "moved" / "zoos" / "z z" / "in",
        folder / "far.npz",
    ]
    (tmp_path / "moved" / "zoos" / "z z").rename(tmp_path / "alone")
    with refused(ValueError, "data.by.labels"):  # what was said to move with it
        zoo.read(tmp_path / "alone")


def test_finished_models_are_skipped_and_others_are_added(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path)) == 0
    file = tmp_path / "lr0.01-ep2-warm1.safetensors"
    before = (file.stat().st_mtime_ns, file.read_bytes())
    capsys.readouterr()
    assert main(arguments(folder, tmp_path, "--seed", "0", "3")) == 0
    said(capsys.readouterr().out, "lr0.01-ep2-warm1", "lr0.01-ep2-warm1-seed3")
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    assert main(arguments(folder, tmp_path, "--seed", "4")) == 0
    seeds = ("-seed4", "-seed3", "")
    assert list(zoo.read(tmp_path / "zoo.toml").finetuned) == [f"lr0.01-ep2-warm1{seed}" for seed in seeds]


def test_equal_requests_give_equal_files_whatever_the_threads(folder: Path, tmp_path: Path) -> None:
    more = ("--augment", "rand-m9-n2", "--mixup", "0.3", "--label-smoothing", "0.1")
    for name, workers in (("a", "1"), ("b", "4")):
        extra = ("--workers", workers, *(("--in-memory",) if name == "b" else ()))
        assert main(arguments(folder, tmp_path / name, *more, *extra, train="big")) == 0
    (file,) = (tmp_path / "a").glob("lr*.safetensors")
    assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_float16_files_start_from_the_rounded_zeroshot_model(folder: Path, tmp_path: Path) -> None:
    head = r"classification_head\..*"
    argv = arguments(folder, tmp_path, "--dtype", "float16", "--freeze", head, "--freeze-blocks", "1")
    assert main(argv) == 0
    start = load_file(tmp_path / "zeroshot.safetensors")
    tuned = load_file(tmp_path / "lr0.01-ep2-warm1.safetensors")
    assert {tensor.dtype for tensor in (*start.values(), *tuned.values())} == {torch.float16}
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert changed == {"model.visual.ln_post.weight", "model.visual.ln_post.bias", "model.visual.proj"}


@pytest.mark.slow
def test_a_checkpoint_without_a_head_gets_one_from_class_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {**tiny_zoo.ARCH["model_cfg"], "text_cfg": text}
    arch = tmp_path / "both.json"
    arch.write_text(json.dumps({**tiny_zoo.ARCH, "model_cfg": config}))
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "names.txt").write_text("fox\ncat\ndog\n")
    argv = arguments(folder, tmp_path / "zoo", "--class-names", str(tmp_path / "names.txt"), train="big")
    argv[1], argv[3] = str(arch), str(tmp_path / "clip.pt")
    del argv[argv.index("--val") : argv.index("--val") + 2]
    seen: list[Tensor] = []
    real = images.ImageBatches.epoch

    def spied(self: images.ImageBatches, *more: int) -> Any:
        seen.append(self.images.labels)
        return real(self, *more)

    monkeypatch.setattr(images.ImageBatches, "epoch", spied)
    assert main([*argv, "--templates", "photo", "--head-scale", "7"]) == 0
    with torch.no_grad():
        tokens = open_clip.tokenize([f"a photo of a {name}." for name in ("fox", "cat", "dog")], 16)
        features = clip.encode_text(tokens, normalize=True)
    head = load_file(tmp_path / "zoo" / "zeroshot.safetensors")["classification_head.weight"]
    torch.testing.assert_close(head, 7 * features, rtol=1e-4, atol=1e-5)
    # The folders cat, dog, fox are rows 1, 2, 0 of this head; the zoo tells the sweep so.
    assert seen[0].tolist() == [1] * 4 + [2] * 4 + [0] * 4
    named = zoo.read(tmp_path / "zoo").head.class_names
    assert named is not None and json.loads(Path(named).read_text()) == ["fox", "cat", "dog"]

    # The zoo has all that the sweep needs.
    words = ["interpolation", str(tmp_path / "zoo"), "--alphas", "0", "1", "--device", "cpu", "--no-cache"]
    assert sweep.main([*words, "--out", str(tmp_path / "run")]) == 0
    rows = results.load(tmp_path / "run").set_index("alpha")
    pixels, labels = decoded(folder / "far.npz")
    with torch.no_grad():
        logits = clip.encode_image((pixels.float() / 255 - 0.5) / 0.25, normalize=True) @ head.T
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    assert rows.loc[0, "loss"] == pytest.approx(expected, abs=1e-5)
    assert rows.loc[1, "loss"] != pytest.approx(expected, abs=1e-5)

    # Another model starts from the head that is there, which may have been made on another machine.
    monkeypatch.setattr("rft_fast.clip.heads._encode", None)
    assert main([*argv, "--templates", "photo", "--head-scale", "7", "--seed", "1"]) == 0
    other = [*argv, "--templates", "simple", "--head-scale", "7", "--seed", "2"]
    not_tuned(other, "head.templates")


def test_key_chooses_the_weights_to_start_from(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "zeroshot.safetensors")
    other = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({"state_dict": other, "state_dict_ema": state}, tmp_path / "both.pt")
    argv = arguments(folder, tmp_path / "zoo")
    argv[argv.index("--zeroshot") + 1] = str(tmp_path / "both.pt")
    not_tuned(argv, tmp_path / "both.pt", "state_dict_ema")
    assert main([*argv, "--zeroshot-key", "state_dict_ema", "--epochs", "1"]) == 0
    for name, tensor in load_file(tmp_path / "zoo" / "zeroshot.safetensors").items():
        assert torch.equal(tensor, state[name])


def test_names_that_toml_has_to_escape(tmp_path: Path) -> None:
    names = ['say "x"', "tab\t, line\n, \x7f, \\ and ä", "a.b"]
    for name in (*names, output.START):
        (tmp_path / f"{name}.safetensors" if name in names else tmp_path / name).touch()
    data = {name: {"path": str(tmp_path), "ood": True} for name in names}
    output.write_zoo(tmp_path, {"arch": "ViT-B-32"}, names, data)
    assert list(zoo.read(tmp_path).finetuned) == list(zoo.read(tmp_path).data) == names


def test_preprocessing_that_the_name_does_not_tell_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pretrained tag may have another mean than its architecture, and the zoo is read without the tag."""
    monkeypatch.setattr(checkpoints, "check_source", lambda *_: None)
    monkeypatch.setattr(matching, "check_activation", lambda *_: None)
    monkeypatch.setattr(checkpoints, "fetch", lambda *_: folder / "zeroshot.safetensors")
    real = architectures.preprocess

    def of_tag(arch: str, tag: str | None = None) -> architectures.Preprocess:
        return replace(real(arch), mean=(0.1, 0.2, 0.3)) if tag == "mine" else real(arch)

    monkeypatch.setattr(architectures, "preprocess", of_tag)
    argv = arguments(folder, tmp_path)
    argv[3] = "mine"
    assert main(argv) == 0
    assert real(zoo.read(tmp_path).arch) == replace(real(argv[1]), mean=(0.1, 0.2, 0.3))


# --- LP-FT ------------------------------------------------------------------------------------------


def test_the_head_is_first_trained_on_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the probe, the head is that of plain training on features of plain forward passes."""
    stages: list[dict[str, Tensor]] = []
    real = finetune.run.__globals__["train"]

    def spied(model: torch.nn.Module, *args: Any, **more: Any) -> Any:
        rows = real(model, *args, **more)
        stages.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return rows

    monkeypatch.setitem(finetune.run.__globals__, "train", spied)
    argv = arguments(folder, tmp_path, "--probe-epochs", "3", "--probe-lr", "0.05", train="big")
    assert main([*argv, "--no-clip"]) == 0

    listed_images = listed(folder)
    state = checkpoints.load(folder / "zeroshot.safetensors")
    ends = Ends(Setup(str(folder / "tiny.json")), state)
    model = ends.live
    model.load_state_dict(ends.zeroshot)
    data = datasets.load("big", folder / "big", listed_images.preprocess)
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    with torch.no_grad():
        features = model.visual((data.images.float() / 255 - mean) / std)
        features = features / features.norm(dim=1, keepdim=True)
    head = model.classification_head
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight], "weight_decay": 0.1}, {"params": [head.bias], "weight_decay": 0}]
    )
    step = 0
    for epoch in range(3):
        order = torch.from_numpy(np.random.default_rng([0, 0, epoch]).permutation(12))
        for chosen in order.split(5):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + np.cos(np.pi * step / 9)) / 2
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(features[chosen]), data.labels[chosen]).backward()
            optimizer.step()
            step += 1
    assert set(stages[0]) == {"classification_head.weight", "classification_head.bias"}
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(stages[0][f"classification_head.{name}"], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.equal(stages[1]["classification_head.weight"], stages[0]["classification_head.weight"])


# --- going on ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle of step 5; states are those of steps 2, 3 (the epoch's end) and 4."""
    more = ("--augment", "rand-m5-n1", "--mixup", "0.4", "--probe-epochs", "1", "--keep-every", "2")
    whole, again = (arguments(folder, tmp_path / name, *more, train="big") for name in ("whole", "again"))
    assert main(whole) == 0
    kill = """
import os, signal, sys, torch
from rft_fast.finetune import training
from rft_fast.finetune.__main__ import main
torch.set_num_threads(1)
real, calls = training.backward, []
def backward(model, *more):
    if hasattr(model, "visual"):
        calls.append(0)
    if len(calls) > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, *more)
training.backward = backward
main(sys.argv[1:])
"""
    result = subprocess.run([sys.executable, "-c", kill, *again], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (file,) = (tmp_path / "whole").glob("lr*.safetensors")
    assert not (tmp_path / "again" / file.name).exists()
    state = torch.load(tmp_path / "again" / f"{file.stem}.resume", weights_only=True)
    assert state["step"] == 4
    assert main(again) == 0
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not list((tmp_path / "again").glob("*.resume")) and not list((tmp_path / "again").glob(".*"))
    epochs = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(path.open())]
        for path in (file.with_suffix(".csv"), tmp_path / "again" / f"{file.stem}.csv")
    ]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 3


def test_stopped_between_a_model_and_its_zoo(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_zoo", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(argv) == 130
    assert (tmp_path / "lr0.01-ep2-warm1.resume").exists() and not (tmp_path / "zoo.toml").exists()
    left = tmp_path / ".zoo.toml.0123456789abcdef.part"
    left.write_bytes(b"left by a killed process")
    (tmp_path / ".lr0.01-ep2-warm1.lock").touch()
    (tmp_path / "other.safetensors").write_bytes(b"damaged, and none of ours")
    assert main(argv) == 0
    said(capsys.readouterr().out, "lr0.01-ep2-warm1")
    assert not left.exists()
    assert list(zoo.read(tmp_path).finetuned) == ["lr0.01-ep2-warm1"]
    assert not list(tmp_path.glob("*.resume")) and not list(tmp_path.glob(".*.lock"))


def test_what_another_process_makes_is_left_to_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(folder, tmp_path, "--seed", "0", "1")
    with disk.locked(tmp_path / ".lr0.01-ep2-warm1.lock") as ours:
        assert ours and main(argv) == 0
    said(capsys.readouterr().out, "lr0.01-ep2-warm1", "lr0.01-ep2-warm1-seed1")
    assert list(zoo.read(tmp_path).finetuned) == ["lr0.01-ep2-warm1-seed1"]
    assert main(argv) == 0
    assert list(zoo.read(tmp_path).finetuned) == ["lr0.01-ep2-warm1", "lr0.01-ep2-warm1-seed1"]


def test_a_full_disk_ends_with_1_and_keeps_what_there_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(folder, tmp_path, "--keep-every", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    real, saved = output.FileKeeper.save, []

    def save(self: output.FileKeeper, state: Any) -> None:
        saved.append(state["step"])
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        real(self, state)

    monkeypatch.setattr(output.FileKeeper, "save", save)
    try:
        assert main(argv) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said(capsys.readouterr().err)
    state = torch.load(tmp_path / "lr0.01-ep2-warm1.resume", weights_only=True)
    assert state["step"] == 1 and not list(tmp_path.glob(".*"))
    assert main(argv) == 0


def test_signals_stop_after_the_step_and_lose_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after each of six steps, two of which end an epoch; the last finds the work complete."""
    more = ("--augment", "none", "--mixup", "0.4")
    whole, again = (arguments(folder, tmp_path / name, *more, train="big") for name in ("whole", "again"))
    assert main(whole) == 0
    real, numbers = training.backward, [signal.SIGTERM, signal.SIGHUP] * 3

    def backward(*more: Any) -> float:
        signal.raise_signal(numbers.pop())
        return real(*more)

    monkeypatch.setattr(training, "backward", backward)
    before = signal.getsignal(signal.SIGHUP)
    assert [main(again) for _ in range(6)] == [130] * 5 + [0] and not numbers
    assert signal.getsignal(signal.SIGHUP) == before
    assert "Traceback" not in (printed := capsys.readouterr()).err and "SIGHUP" in printed.out
    (file,) = (tmp_path / "whole").glob("lr*.safetensors")
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert len(list(csv.DictReader((tmp_path / "again" / f"{file.stem}.csv").open()))) == 3
    assert not list((tmp_path / "again").glob("*.resume"))


def test_progress_within_an_epoch_is_a_line_where_there_is_no_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of six steps, two of which end an epoch; the clock says ten seconds per step."""
    argv = arguments(folder, tmp_path / "zoo")
    assert main(argv) == 0
    assert "step" not in capsys.readouterr().out
    clock = itertools.count(0, 10)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert main([*argv, "--seed", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    # The third step, on two images, ends an epoch and has no line.
    expected = [(1, 1, 50, 0.5), (1, 2, 40, 0.5), (2, 4, 20, 0.35), (2, 5, 10, 0.5)]
    for line, (epoch, step, left, rate) in zip(lines, expected, strict=True):
        assert line.startswith(f"lr0.01-ep2-warm1-seed1: epoch {epoch} of 2, step {step} of 6, loss ")
        assert line.endswith(f", {rate} images/s, {left} s left")


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    """What is random in the model itself: torch's generator is part of the state."""
    setting = Setting(lr=0.1, epochs=2, warmup=0, batch_size=4)

    def model() -> torch.nn.Module:
        torch.manual_seed(5)
        return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))

    torch.manual_seed(0)
    batches = images.FeatureBatches(torch.randn(10, 6), torch.arange(10) % 3, setting)

    class Stopped(Exception):
        pass

    class Stopping(output.FileKeeper):
        def save(self, state: Any) -> None:
            super().save(state)
            if state["step"] == 4:
                raise Stopped

    whole, again = model(), model()
    finetune.train(whole, batches, setting)
    again = model()
    with pytest.raises(Stopped):
        finetune.train(again, batches, setting, keeper=Stopping(tmp_path / "state", {"a": 1}, 1))
    torch.manual_seed(99)
    again = model()
    finetune.train(again, batches, setting, keeper=output.FileKeeper(tmp_path / "state", {"a": 1}, 1))
    for tensor, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(tensor, other)
    with refused(ValueError, "2"):
        output.FileKeeper(tmp_path / "state", {"a": 2}).load()
    (tmp_path / "state").write_bytes(b"PK rest")
    with refused(ValueError):
        output.FileKeeper(tmp_path / "state", {"a": 1}).load()


def test_other_files_are_never_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path)) == 0
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    not_tuned(arguments(folder, tmp_path, "--batch-size", "6"), "setting.batch_size", 5, 6)
    not_tuned(arguments(folder, tmp_path, train="big"))
    argv = arguments(folder, tmp_path)
    argv[3] = str(folder / "a.safetensors")
    not_tuned(argv, "zeroshot.safetensors")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents

    (tmp_path / "zoo.toml").write_text("name = 'mine'\n")
    not_tuned(arguments(folder, tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    tiny_zoo.save({"a": torch.zeros(1)}, other / "zeroshot.safetensors")
    not_tuned(arguments(folder, other))
    (other / "zeroshot.safetensors").unlink()
    (other / "model.json").write_text("{}")
    not_tuned(arguments(folder, other))
    (other / "model.json").unlink()
    table = other / "lr0.01-ep2-warm1.csv"
    table.write_text("precious")
    not_tuned(arguments(folder, other), table)
    assert table.read_text() == "precious"


def test_a_damaged_state_is_named_without_torch_s_advice(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lr0.01-ep2-warm1.resume").write_text("garbage")
    not_tuned(arguments(folder, tmp_path), "lr0.01-ep2-warm1.resume")


def test_the_last_row_survives_an_end_between_state_and_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(out: Path) -> list[dict[str, str]]:
        with (out / "lr0.01-ep2-warm1.csv").open() as stream:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]

    assert main(arguments(folder, tmp_path / "whole")) == 0
    write, calls = output.write_rows, 0

    def ended(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        write(*given)

    out = tmp_path / "ended"
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_rows", ended)
        assert main(arguments(folder, out)) == 130
    assert len(rows(out)) == 2
    assert main(arguments(folder, out)) == 0
    assert rows(out) == rows(tmp_path / "whole") and len(rows(out)) == 3


def test_what_float16_cannot_hold_is_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--dtype", "float16", "--epochs", "1", "--batch-size", "12", "--warm-up", "0", "--no-clip")
    assert main([*arguments(folder, tmp_path), *more, "--lr", "1e6"]) == 1
    said(capsys.readouterr().out, "torch.float16")
    assert not list(tmp_path.glob("lr*.safetensors"))
    (kept,) = tmp_path.glob("*.resume")
    assert max(t.abs().max() for t in torch.load(kept)["model"].values()) > 65504


# --- which rows the classes are ------------------------------------------------------------------------


def called(big: Path, out: Path, names: dict[str, str]) -> Path:
    """The images of "big", its classes cat, dog and fox called otherwise."""
    for name, new in names.items():
        shutil.copytree(big / name, out / new)
    return out


def test_a_label_map_is_for_what_is_out_of_distribution_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"cat": 2, "dog": 0, "fox": 1}')
    shutil.copytree(folder / "big", tmp_path / "big")
    argv = [
        *("--arch", str(folder / "tiny.json"), "--zeroshot", str(folder / "zeroshot.safetensors")),
        *("--train", str(folder / "big"), "--label-map", str(tmp_path / "map.json"), *TRAIN),
        *("--val", f"v={folder / 'big'}", "--out", str(tmp_path / "zoo"), "--ood"),
    ]
    other = called(folder / "big", tmp_path / "w", {"cat": "ant", "dog": "bee", "fox": "cow"})
    not_tuned([*argv, f"w={other}"], "w")
    assert not (tmp_path / "zoo").exists()
    assert main([*argv, f"w={tmp_path / 'big'}", f"far={folder / 'far.npz'}"]) == 0
    made = zoo.read(tmp_path / "zoo")
    assert {name: data.labels for name, data in made.data.items()} == {
        **dict.fromkeys("vw", tmp_path / "map.json"),
        "far": None,
    }
    assert (
        sweep.main([str(tmp_path / "zoo"), "interpolation", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    )
    scored = results.load(tmp_path / "run").pivot(index="alpha", columns="dataset", values="loss")
    assert (scored["v"] == scored["w"]).all()


def test_idx_files_are_trained_on_and_scored(folder: Path, tmp_path: Path) -> None:
    """The same images as .npz and as IDX give the same training; of a folder of two parts, none is chosen."""
    with np.load(folder / "far.npz") as archive:
        grey, labels = archive["images"][:12, :, :, 0], archive["labels"][:12].astype(np.uint8)
    np.savez(tmp_path / "same.npz", images=grey, labels=labels)
    (tmp_path / "mnist").mkdir()
    for name in ("train", "t10k"):
        file = tmp_path / "mnist" / f"{name}-images-idx3-ubyte"
        file.write_bytes(struct.pack(">4i", 0x803, 12, 8, 8) + grey.tobytes())
        file.with_name(f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, 12) + labels.tobytes()
        )
    start = ["--arch", str(folder / "tiny.json"), "--zeroshot", str(folder / "zeroshot.safetensors")]
    start += [*TRAIN, "--augment", "none", "--train"]
    idx = [*start, str(tmp_path / "mnist" / "train-images-idx3-ubyte"), "--val", str(tmp_path / "mnist")]
    assert main([*idx, "--out", str(tmp_path / "a")]) == 0
    assert main([*start, str(tmp_path / "same.npz"), "--val", f"mnist={tmp_path / 'same.npz'}",
                 "--out", str(tmp_path / "b")]) == 0  # fmt: skip
    first, second = (load_file(tmp_path / name / "lr0.01-ep2-none-warm1.safetensors") for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert zoo.read(tmp_path / "a").data["mnist"].path == tmp_path / "mnist"
    not_tuned([*start, str(tmp_path / "mnist"), "--out", str(tmp_path / "c")], "t10k-images-idx3-ubyte")


def test_cifar_is_not_trained_on_its_test_images(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "stl10"
    made.mkdir()
    for part in ("train", "test"):
        (made / f"{part}_X.bin").write_bytes(bytes(range(3)) * (96 * 96) * 3)
        (made / f"{part}_y.bin").write_bytes(bytes([1, 2, 3]))
    argv = arguments(folder, tmp_path / "zoo")
    argv[argv.index("--train") + 1] = str(made)
    not_tuned(argv, made / "train", "test_X.bin")
    argv[argv.index("--train") + 1] = str(made / "train")
    for option in ("--val", "--ood"):
        del argv[argv.index(option) : argv.index(option) + 2]
    not_tuned(argv, made / "train", "--val")


def test_validation_images_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    """As many, but shifted by one: alphabetical order alone would say that cats are dogs."""
    other = called(folder / "big", tmp_path / "x", {"fox": "ant", "cat": "cat", "dog": "dog"})
    argv = arguments(folder, tmp_path / "zoo", "--val", f"x={other}", train="big")
    not_tuned(argv)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.slow
def test_classes_of_unnamed_rows_need_a_word_and_the_zoo_names_them(folder: Path, tmp_path: Path) -> None:
    """What trains in the order of its folders is scored by their names, whatever their order elsewhere."""
    out = tmp_path / "zoo"
    turned = called(folder / "big", tmp_path / "y", {"cat": "Cat", "dog": "dog", "fox": "FOX"})
    assert sorted(path.name for path in turned.iterdir()) == ["Cat", "FOX", "dog"]
    argv = arguments(folder, out, "--val", f"x={turned}", "--ood", f"y={turned}", train="big")
    not_tuned([word for word in argv if word not in ("--label-map", "order")], "cat -> 0", "dog -> 1")
    assert not out.exists()
    assert main(argv) == 0
    made = zoo.read(out)
    assert prompts.class_names(made.head.class_names or "") == ("cat", "dog", "fox")
    assert not any(data.labels for data in made.data.values())
    assert sweep.main([str(out), "interpolation", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    scored = results.load(tmp_path / "run").pivot(index="alpha", columns="dataset", values="accuracy")
    with (out / "lr0.01-ep2-warm1.csv").open() as stream:
        *_, last = csv.DictReader(stream)
    assert scored.loc[1.0, "x"] == scored.loc[1.0, "y"] == pytest.approx(float(last["x"]))


def residual(folder: Path) -> tuple[Path, Path]:
    """An architecture with CLIP's own ResNet, and a checkpoint of it with a head for three classes."""
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1}
    (folder / "rn.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}})
    )
    tower = architectures.visual(str(folder / "rn.json")).state_dict()
    state = {f"model.visual.{name}": tensor for name, tensor in tower.items()}
    state["classification_head.weight"] = torch.randn(3, 6)
    tiny_zoo.save(state, folder / "rn.safetensors")
    return folder / "rn.json", folder / "rn.safetensors"


def test_towers_that_only_take_the_call_have_no_gradient_checkpointing(folder: Path, tmp_path: Path) -> None:
    arch, start = residual(tmp_path)
    argv = arguments(folder, tmp_path / "zoo", "--grad-checkpointing", train="big")
    assert main(argv) == 0
    argv = arguments(folder, tmp_path / "rn", "--grad-checkpointing", train="big")
    argv[1], argv[3] = str(arch), str(start)
    not_tuned(argv, "--accumulate")


def test_parts_of_a_batch_are_warned_of_where_its_statistics_are_trained(
    folder: Path, tmp_path: Path
) -> None:
    arch, start = residual(tmp_path)
    argv = arguments(folder, tmp_path / "rn", "--accumulate", "2", "--batch-size", "6", train="big")
    argv[1], argv[3] = str(arch), str(start)
    with warned(UserWarning, "visual.bn1"):
        assert main(argv) == 0


def test_sixteen_bits_are_not_trained_on_as_black_and_white(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate("012"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        Image.fromarray(np.full((9, 9), 9000 * i, np.uint16)).save(tmp_path / "deep" / name / "0.png")
    argv = arguments(folder, tmp_path / "zoo")
    argv[argv.index("--train") + 1] = str(tmp_path / "deep")
    not_tuned(argv, "I;16")
    assert main([*argv, "--no-check", "--warm-up", "0"]) == 1
    said(capsys.readouterr().err, "I;16")


# --- refused before the first step --------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ("--precision", "fp16"),
        ("--warm-up", "6"),
        ("--lr", "-1"),
        ("--augment", "strong"),
        ("--freeze", "nothing"),
        ("--train", "nowhere"),
        ("--val", "x=nowhere"),
        ("--ood", "near=nowhere"),
        ("--val", "loss=."),
        ("--out", f"{__file__}/zoo"),
        ("--random", "2", "--search-seed", "-1"),
        ("--zeroshot", "nowhere"),
        ("--arch", "nowhere"),
        ("--head-scale", "3"),
        ("--probe-epochs", "1", "--freeze", "classification_head.*"),
        ("--workers", "0"),
        ("--seed", "0", "0"),
        ("--unknown",),
        ("--dtype", "int8"),
        ("--device", "nowhere"),
    ],
)
def test_mistakes_are_refused(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    not_tuned(arguments(folder, tmp_path / "zoo", *more))
    assert not (tmp_path / "zoo").exists()


def test_images_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        (tmp_path / "four" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "four" / name / "0.png")
    argv = arguments(folder, tmp_path / "zoo")
    argv[argv.index("--train") + 1] = str(tmp_path / "four")
    not_tuned(argv, "4")
    for i in range(3):
        (tmp_path / "three" / str(i)).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "three" / str(i) / "fine.png")
    (tmp_path / "three" / "1" / "bad.png").write_bytes(b"no image")
    argv[argv.index("--train") + 1] = str(tmp_path / "three")
    not_tuned(argv, "4")
    assert not (tmp_path / "zoo").exists()
    (tmp_path / "three" / "0" / "more.png").symlink_to(tmp_path / "three" / "0" / "fine.png")
    assert main([*argv, "--batch-size", "2", "--no-check"]) == 1  # what is found on the way is no usage error
    error = capsys.readouterr().err
    assert "usage:" not in error
    said(error, "bad.png")


def test_a_diverging_model_is_left_out_and_the_others_are_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path, "--lr", "1e35", "1e-3", "--no-clip")) == 1
    streams = capsys.readouterr()
    assert "is nan at step" in streams.out or "is inf at step" in streams.out or "not finite" in streams.out
    said(streams.err, "1 diverged", "lr1e35-ep2-warm1")
    assert list(zoo.read(tmp_path / "zoo.toml").finetuned) == ["lr1e-3-ep2-warm1"]


def test_a_dry_run_lists_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--arch", "a", "--zeroshot", "z", "--train", "t", "--out", str(tmp_path / "o"), "--dry-run"]
    assert main([*argv, "--lr", "1e-5", "2e-5", "--epochs", "4", "--warm-up", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert table[:3] == [["model", "lr"], ["lr1e-5-ep4-warm7", "1e-5"], ["lr2e-5-ep4-warm7", "2e-5"]]
    shared = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert shared["epochs"] == "4" and shared["warm-up"] == "7" and shared["betas"] == "0.9, 0.999"
    assert lines[-2] == "2 models" and all(len(line) <= 80 for line in lines[:-1])
    said("\n".join(lines))
    assert main([*argv, "--random", "5", "--no-clip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "5 models" and "--dry-run" not in lines[-1]
    said("\n".join(lines), "none", 500)
    assert not (tmp_path / "o").exists()


# --- batches and augmentations ------------------------------------------------------------------------


def test_batches_hold_every_image_once_as_the_evaluation_reads_it(folder: Path) -> None:
    found = listed(folder)
    setting = Setting(batch_size=5, augment="none", seed=3)
    batches = images.ImageBatches(found, setting, CPU)
    whole = list(batches.epoch(1))
    assert len(batches) == 3 and [len(batch.labels) for batch in whole] == [5, 5, 2]
    order = torch.from_numpy(np.random.default_rng([3, 0, 1]).permutation(12))
    data = datasets.load("big", folder / "big", found.preprocess)
    expected = (data.images[order].float() / 255 - 0.5) / 0.25
    assert torch.equal(torch.cat([batch.images for batch in whole]), expected)
    assert torch.equal(torch.cat([batch.labels for batch in whole]), data.labels[order])
    late = list(batches.epoch(1, first=1))
    assert len(late) == 2 and all(
        torch.equal(a.images, b.images) for a, b in zip(late, whole[1:], strict=True)
    )
    other = torch.cat([batch.images for batch in batches.epoch(0)])
    assert not torch.equal(other, expected)


def test_mixup_blends_images_and_labels_alike() -> None:
    batch = finetune.Batch(torch.arange(6.0)[:, None, None, None].expand(6, 3, 2, 2), torch.arange(6))
    made = images.mixed(batch, 0.5, np.random.default_rng(0))
    assert made.others is not None and sorted(made.others.tolist()) == list(range(6)) and 0 < made.share < 1
    blended = made.share * made.labels + (1 - made.share) * made.others
    torch.testing.assert_close(made.images[:, 0, 0, 0], blended)
    shares = [images.mixed(batch, 0.5, np.random.default_rng(seed)).share for seed in range(400)]
    assert abs(np.mean(shares) - 0.5) < 0.06 and abs(np.var(shares) - 1 / 8) < 0.02  # of Beta(.5, .5)
    assert images.mixed(batch, 0, np.random.default_rng(0)) is batch


def test_crops_have_the_area_and_shape_that_they_should() -> None:
    boxes = np.array([images.crop_box(200, 260, np.random.default_rng(seed)) for seed in range(500)])
    top, left, height, width = boxes.T
    area, ratio = height * width / (200 * 260), width / height
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 200).all() and (left + width <= 260).all()
    assert area.min() > 0.89 and area.max() <= 1 and ratio.min() > 0.74 and ratio.max() < 1.35
    assert images.crop_box(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 13)


def test_a_crop_is_torchvision_s_of_the_same_box(folder: Path) -> None:
    preprocess = architectures.preprocess(str(folder / "tiny.json"))
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    rng = np.random.default_rng(7)
    top, left, height, width = images.crop_box(30, 40, np.random.default_rng(7))
    expected = torchvision.transforms.functional.resized_crop(
        image, top, left, height, width, [8, 8], InterpolationMode.BICUBIC
    )
    assert np.array_equal(images.augmentation("crop", preprocess)(image, rng), expected)
    flipped = [
        np.array(images.augmentation("crop-flip", preprocess)(image, np.random.default_rng(7)))
        for _ in range(2)
    ]
    assert np.array_equal(*flipped)
    assert any(np.array_equal(flipped[0], side) for side in (expected, np.array(expected)[:, ::-1]))


@pytest.mark.parametrize("name", list(images.OPERATIONS))
@pytest.mark.parametrize("magnitude", [0, 7, 30])
def test_operations_of_randaugment_are_torchvision_s(name: str, magnitude: int) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    space = torchvision.transforms.RandAugment()._augmentation_space(31, (24, 32))
    assert list(space) == list(images.OPERATIONS)
    values, signed = space[name]
    value = float(values[magnitude]) if values.ndim else 0.0
    for sign in (1, -1) if signed else (1,):
        expected = _apply_op(image, name, sign * value, InterpolationMode.BILINEAR, None)
        found = images.OPERATIONS[name](image, magnitude / 30, sign)
        assert np.abs(np.array(found).astype(int) - np.array(expected)).max() <= 1


def test_randaugment_applies_as_many_operations_as_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = architectures.preprocess(str(folder / "tiny.json"))
    seen: list[tuple[float, float]] = []

    def spy(image: Image.Image, share: float, sign: float) -> Image.Image:
        seen.append((share, sign))
        return image

    spies: dict[str, Callable[..., Image.Image]] = dict.fromkeys(images.OPERATIONS, spy)
    monkeypatch.setattr(images, "OPERATIONS", spies)
    image = Image.new("RGB", (12, 12))
    for seed in range(20):
        images.augmentation("rand-m6-n3", preprocess)(image, np.random.default_rng(seed))
    assert len(seen) == 60 and {share for share, _ in seen} == {0.2} and {sign for _, sign in seen} == {1, -1}
    images.augmentation("rand-m6-n0", preprocess)(image, np.random.default_rng(0))
    assert len(seen) == 60


def test_decoded_images_are_trained_on_as_they_are(folder: Path) -> None:
    source = datasets.open_source("train", folder / "far.npz")
    preprocess = architectures.preprocess(str(folder / "tiny.json"))
    found = finetune.Images(source, torch.arange(40), source.labels, preprocess, 2)
    batches = images.ImageBatches(found, Setting(batch_size=40, augment="none"), CPU)
    (batch,) = batches.epoch(0)
    pixels, _ = decoded(folder / "far.npz")
    order = torch.from_numpy(np.random.default_rng([0, 0, 0]).permutation(40))
    assert torch.equal(batch.images, (pixels[order].float() / 255 - 0.5) / 0.25)


def test_a_truncated_image_stops_training_by_name(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / str(i) / "a.jpg"
        )
    damaged = tmp_path / "1" / "a.jpg"
    damaged.write_bytes(damaged.read_bytes()[: os.path.getsize(damaged) // 2])
    source = datasets.open_source("train", tmp_path)
    preprocess = architectures.preprocess(str(folder / "tiny.json"))
    found = finetune.Images(source, torch.arange(3), source.labels, preprocess, 2)
    with refused(ValueError, "1/a.jpg"):
        list(images.ImageBatches(found, Setting(batch_size=3), CPU).epoch(0))
