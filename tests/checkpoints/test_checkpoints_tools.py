"""Around the reader: heads, two checkpoints side by side, sources of zero-shot models, the command line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from support.wording import command_refused, refused, said
from torch import Tensor, nn

from rft_fast import checkpoints
from rft_fast.checkpoints.__main__ import main

State = dict[str, Tensor]


def state(seed: int = 0, classes: int = 4) -> State:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.visual.conv1.weight": randn(6, 3, 2, 2),
        "model.visual.transformer.resblocks.0.attn.in_proj_weight": randn(18, 6),
        "model.visual.transformer.resblocks.0.attn.in_proj_bias": randn(18),
        "model.visual.proj": randn(6, 5).half(),
        "model.positional_embedding": randn(3, 4),
        "model.visual.steps": torch.tensor(seed),
        "classification_head.weight": randn(classes, 5),
        "classification_head.bias": randn(classes),
    }


def wrote(tmp_path: Path, name: str, content: State) -> checkpoints.Checkpoint:
    torch.save(content, tmp_path / name)
    return checkpoints.read(tmp_path / name)


# --- heads ----------------------------------------------------------------------------------------


def test_load_head(tmp_path: Path) -> None:
    weight, bias = torch.randn(4, 5), torch.randn(4)
    names = {"classification_head.weight": weight, "classification_head.bias": bias}
    cases: dict[str, Any] = {
        "bare": {"weight": weight, "bias": bias},
        "named": names,
        "module": nn.Linear(5, 4),
        "wrapped": {"module.weight": weight, "module.bias": bias},
        "full": {"model.visual.proj": torch.ones(3, 5), **names},
        "alone": {"weight": weight},
    }
    cases["module"].load_state_dict(cases["bare"])
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
        head = checkpoints.load_head(tmp_path / name)
        assert list(head) == list(names)[: 1 if name == "alone" else 2]
        assert all(torch.equal(head[n], names[n]) for n in head)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ({"visual.proj": torch.ones(2)}, ""),
        ({"bias": torch.ones(2)}, ""),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "visual.proj": torch.ones(2)}, ""),
        ({"weight": torch.ones(2)}, "[2]"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "[3]"),
    ],
)
def test_files_without_a_head(tmp_path: Path, content: State, facts: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with refused(ValueError, "load_head", *facts.split()):
        checkpoints.load_head(tmp_path / "a.pt")


# --- two side by side -----------------------------------------------------------------------------


def test_lineage_of_two(tmp_path: Path) -> None:
    a, b = state(0), state(0)
    b["model.visual.conv1.weight"] = b["model.visual.conv1.weight"] + 0.25
    b["model.visual.proj"] = b["model.visual.proj"].float()  # the same numbers in another type
    b["model.visual.steps"] = torch.tensor(9)
    del b["model.positional_embedding"]
    b["model.logit_scale"] = torch.tensor(1.0)
    lineage = checkpoints.compare(wrote(tmp_path, "a", a), wrote(tmp_path, "b", b))
    assert lineage.differing == ("visual.conv1.weight", "visual.proj", "visual.steps")
    assert lineage.only_a == ("positional_embedding",) and lineage.only_b == ("logit_scale",)
    assert lineage.other_shape == () and lineage.problems == () and not lineage.identical
    floats = [n for n in a if n in b and a[n].is_floating_point()]
    x, y = (torch.cat([s[n].double().flatten() for n in floats]) for s in (a, b))
    assert math.isclose(lineage.distance, float((y - x).norm()), rel_tol=1e-12)
    assert math.isclose(lineage.relative, float((y - x).norm() / x.norm()), rel_tol=1e-12)
    assert math.isclose(lineage.cosine, float(nn.functional.cosine_similarity(x, y, dim=0)), rel_tol=1e-12)
    said(str(lineage), "positional_embedding")


def test_lineage_of_one(tmp_path: Path) -> None:
    a = wrote(tmp_path, "a", state())
    lineage = checkpoints.compare(a, wrote(tmp_path, "b", state()))
    assert lineage.identical and lineage.distance == 0 == lineage.relative
    assert math.isclose(lineage.cosine, 1)
    said("\n".join(lineage.problems))
    half = {name: t.half() if t.is_floating_point() else t for name, t in state().items()}
    rounded = checkpoints.compare(a, wrote(tmp_path, "h", half))
    assert not rounded.identical
    said("\n".join(rounded.problems))
    other = wrote(tmp_path, "c", state(1))
    (problem,) = checkpoints.compare(a, other).problems
    said(problem, "unrelated")
    assert checkpoints.compare(a, other, unrelated=True).problems == ()


def difference(a: State, b: State) -> State:
    return {n: b[n].float() - a[n].float() if b[n].is_floating_point() else b[n] for n in b}


def moved(size: float) -> State:
    """The state with noise on all of its floats."""
    noise = state(7)
    return {n: t + size * noise[n] if t.is_floating_point() else t for n, t in state().items()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: moved(0.5), ""),
        (lambda a: {**a, **{n: t for n, t in state(3).items() if "head" in n}}, ""),  # a linear probe
        (lambda a: {n: t for n, t in a.items() if "head" not in n}, ""),  # a head that is made
        (
            lambda a: {n: t[[0, 2, 1, 3]] if "head" in n else t for n, t in moved(0.05).items()},
            "row 1 is the zero-shot row 2",
        ),
        (lambda a: moved(8.0), "unrelated"),
        (lambda a: {n: 3 * t for n, t in moved(0.1).items()}, "sum of models"),
        (lambda a: {n: -t if t.is_floating_point() else t for n, t in a.items()}, "unrelated"),
        (lambda a: difference(a, moved(0.1)), "task vector"),
        (lambda a: {n: torch.zeros_like(t) for n, t in a.items()}, "unrelated"),
        (lambda a: {**a, "model.positional_embedding": torch.ones(5, 4)}, "same weights"),  # inert
        (lambda a: {**moved(0.5), "model.positional_embedding": torch.ones(5, 4)}, ""),
        (lambda a: {**moved(0.5), "model.positional_embedding": torch.ones(3, 4).double()}, ""),
        (lambda a: {**moved(0.5), "model.extra": torch.ones(3)}, "extra"),
    ],
)
def test_kinship(tmp_path: Path, change: Any, word: str) -> None:
    a = {**state(), "model.visual.ln_pre.weight": torch.full((999,), 5.0)}
    share = 0.0 if word == "task vector" else 1.0
    b = {**change(a), "model.visual.ln_pre.weight": share * a["model.visual.ln_pre.weight"]}
    ends = wrote(tmp_path, "a", a), wrote(tmp_path, "b", b)
    for problems in (checkpoints.compare(*ends).problems, checkpoints.compare(*reversed(ends)).problems):
        assert len(problems) == bool(word) and word in "".join(problems), problems


def test_two_activations(tmp_path: Path) -> None:
    for name, quick in (("a", "true"), ("b", "false")):
        content = {n.removeprefix("model."): t.contiguous() for n, t in moved(ord(name) / 1e3).items()}
        save_file(content, tmp_path / name, {"quick_gelu": quick})
    a, b = (checkpoints.read(tmp_path / name) for name in "ab")
    said("\n".join(checkpoints.compare(a, b).problems))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda s: {"other": torch.ones(2)}, ()),
        (lambda s: {n: t for n, t in s.items() if "visual" not in n}, ()),
        (
            lambda s: {n: t for n, t in s.items() if "proj" not in n},
            ("3",),
        ),
        (lambda s: state(0, classes=7), ("4", "7")),
        (lambda s: {**s, "model.visual.proj": torch.ones(6, 4)}, ("visual.proj", "[6, 5]", "[6, 4]")),
        (lambda s: {**s, "model.visual.proj": torch.ones(6, 5).double()}, ("float32",)),
        (lambda s: {**s, "model.visual.proj": torch.ones(6, 5).long()}, ()),
        (lambda s: {**s, "model.visual.steps": torch.tensor(0, dtype=torch.int32)}, ()),
        (lambda s: {**s, "model.visual.proj": torch.full((6, 5), torch.nan)}, ("NaN",)),
    ],
)
def test_what_no_path_can_join(tmp_path: Path, change: Any, facts: tuple[str, ...]) -> None:
    lineage = checkpoints.compare(wrote(tmp_path, "a", state()), wrote(tmp_path, "b", change(state())))
    assert len(lineage.problems) >= 1
    said(str(lineage), *facts)


# --- sources --------------------------------------------------------------------------------------


def test_sources_that_can_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai.pt").touch()
    monkeypatch.chdir(tmp_path)
    for source in (
        *("openai", "laion2b_s34b_b79k", "laion2b-s34b-b79k", "openai.pt", str(tmp_path / "openai.pt")),
        *("hf-hub:laion/CLIP-ViT-B-32", "hf-hub:org/name@main", "hf-hub:org/na.me_1@refs/pr/3"),
    ):
        checkpoints.check_source(source, "ViT-B-32")


@pytest.mark.parametrize(
    ("source", "arch", "facts"),
    [
        ("laion2b_s34b", "ViT-B-32", "laion2b_s34b_b79k"),
        ("opnai", "ViT-B-32", ""),
        ("zzz", "ViT-B-32", ""),
        ("openai", "model.json", "model.json"),
        ("missing.pt", "ViT-B-32", "missing.pt"),
        ("some/where", "ViT-B-32", "some/where"),
        ("hf-hub:name", "ViT-B-32", "hf-hub:org/name"),
        ("hf-hub:a/b/c", "ViT-B-32", "hf-hub:org/name"),
        (".", "ViT-B-32", ""),
        ("", "ViT-B-32", ""),
    ],
)
def test_sources_that_cannot(source: str, arch: str, facts: str) -> None:
    for function in (checkpoints.check_source, checkpoints.fetch):
        with refused(ValueError, *facts.split()):
            function(source, arch)


def test_fetch_of_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ViT-B-32.pt"
    torch.save(state(), file)
    asked: list[Any] = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: asked.append(config) or str(file))
    assert checkpoints.fetch(str(file), "ViT-B-32") == file and not asked
    assert checkpoints.fetch("openai", "ViT-B-32") == file
    assert asked == [open_clip.get_pretrained_cfg("ViT-B-32", "openai")]

    def offline(config: Any) -> str:
        raise OSError("Name or service not known\nand a long traceback")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with refused(ValueError, "openai", "ViT-B-32"):
        checkpoints.fetch("openai", "ViT-B-32")
    for result in ("", str(tmp_path / "nowhere")):
        monkeypatch.setattr(open_clip, "download_pretrained", lambda config, result=result: result)
        with refused(ValueError):
            checkpoints.fetch("openai", "ViT-B-32")


def error(kind: type[Exception]) -> Exception:
    made = kind.__new__(kind)  # their constructors want a response
    Exception.__init__(made, "not there")
    return made


def test_fetch_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_file(state(), file)
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        if name == "config.json":
            (tmp_path / name).write_text('{"model_type": "clip", "vision_config": {}}')
        elif name != "model.safetensors":
            raise error(EntryNotFoundError)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert checkpoints.fetch("hf-hub:org/name@v1", "ViT-B-32") == file
    assert asked[0] == ("org/name", "open_clip_model.safetensors", "v1") and len(asked) == 4
    assert checkpoints.load(file).activation["image"].quick  # type: ignore[attr-defined]
    for kind, facts in (
        (EntryNotFoundError, "hf-hub:org/name open_clip_model.safetensors"),
        (LocalEntryNotFoundError, "hf-hub:org/name HF_HOME"),
        (ConnectionError, "hf-hub:org/name HF_HOME"),
    ):

        def fail(*_: Any, kind: type[Exception] = kind, **__: Any) -> str:
            raise error(kind)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with refused(ValueError, *facts.split()):
            checkpoints.fetch("hf-hub:org/name", "ViT-B-32")


# --- the command line -----------------------------------------------------------------------------


def test_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**state(), "model.extra": torch.ones(1)}, tmp_path / "model_0.pt")
    assert main([str(tmp_path / "model_0.pt")]) == 0
    said(
        capsys.readouterr().out,
        "266 in 9 tensors, 7 layers",
        "float32 (7), float16 (1), int64 (1)",
        *("229 in 5", "12 in 1", "24 in 2", "4 classes", "1 in 1", "visual.steps"),
        "visual.transformer.resblocks.0.attn.in_proj  weight [18, 6], bias [18]",
        "visual.conv1  weight [6, 3, 2, 2]",
        "visual.proj  [6, 5]",
    )


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a", state()), ("b", moved(0.3)), ("c", state(1, 7))):
        torch.save(content, tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main([a, b]) == 0
    said(capsys.readouterr().out)
    assert main([a, b, "--format", "soup"]) == 0
    torch.save({"state_dict": moved(0.4), "epoch": 1}, tmp_path / "d")
    assert main([a, str(tmp_path / "d"), "--format", "soup"]) == 0  # which is of the first alone
    said(capsys.readouterr().out, "open_clip")
    assert main([a, c]) == 1
    said(capsys.readouterr().out, "4", "7")
    torch.save(state(1), tmp_path / "e")
    assert main([a, str(tmp_path / "e")]) == 1 and main([a, str(tmp_path / "e"), "--unrelated"]) == 0


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\x80\x02cos\nsystem\n)R.")
    for arguments in (["missing"], [str(tmp_path / "b")], [str(tmp_path / "a"), str(tmp_path / "b")]):
        assert command_refused(main, arguments).count("\n") == 1
    command_refused(main, [tmp_path / "a", "--format", "openai"], "openai", "soup")


@pytest.mark.slow
def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rft_fast.checkpoints", str(tmp_path / "missing.pt")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    said(run.stderr)
