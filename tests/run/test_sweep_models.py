"""The command line on models and data of other kinds: zoo files, heads, both towers, formats, label maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from support import tiny_zoo
from support.tiny_zoo import ARCH, save, sweep_refused
from torch import Tensor

from rft_fast import checkpoints, results, sweep
from rft_fast.config import request, zoo
from rft_fast.settings import Along

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("cat", "dog", "fish")
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
MODEL = {"embed_dim": 6, "vision_cfg": ARCH["model_cfg"]["vision_cfg"], "text_cfg": TEXT}
HEAD = "classification_head.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the soup layout, and of the same towers whole CLIPs without a head."""
    made = tiny_zoo.make(tmp_path_factory.mktemp("zoo"))
    (made / "clip.json").write_text(json.dumps({**ARCH, "model_cfg": MODEL}))
    (made / "names.txt").write_text("\n".join(NAMES))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        clip = open_clip.CLIP(**MODEL).state_dict()
        torch.save({"epoch": 0, "state_dict": clip}, made / "clip0.pt")
        tuned = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in clip.items()}
        torch.save(
            {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in tuned.items()}}, made / "clip1.pt"
        )
        head = {HEAD: torch.randn(3, 6), "classification_head.bias": torch.randn(3)}
        tower = {f"model.{k}": 1.01 * v for k, v in clip.items() if k.startswith("visual.")}
        save(tower | head, made / "tuned.st")
    return made


def pixels(file: Path) -> tuple[Tensor, Tensor]:
    with np.load(file) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        return (images / 255 - 0.5) / 0.25, torch.from_numpy(arrays["labels"])


def load_clip(state: dict[str, Tensor]) -> open_clip.CLIP:
    clip = open_clip.CLIP(**MODEL)
    clip.load_state_dict(state)
    return clip.eval()


def mix(first: dict[str, Tensor], last: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {name: torch.lerp(first[name], last[name], alpha) for name in first}


@torch.no_grad()
def text_head(clip: open_clip.CLIP, scale: float | None = None) -> Tensor:
    """By open_clip's own words for it: prompts in one template."""
    tokens = open_clip.SimpleTokenizer(context_length=16)([f"a photo of a {name}." for name in NAMES])
    features: Tensor = clip.encode_text(tokens, normalize=True)
    return (clip.logit_scale.exp() if scale is None else scale) * features


@torch.no_grad()
def truth(clip: open_clip.CLIP, weight: Tensor, bias: Tensor | float, file: Path) -> tuple[float, float]:
    images, labels = pixels(file)
    logits = clip.encode_image(images, normalize=True) @ weight.T + bias
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def run(out: Path, *arguments: str | Path) -> dict[float, tuple[float, float]]:
    """Loss and accuracy by alpha, of one model on one set."""
    words = [str(word) for word in ("interpolation", *arguments, "--alphas", "0", ".4", "1", "--out", out)]
    assert sweep.main([*words, "--device", "cpu", "--no-cache"]) == 0
    rows = results.load(out)
    assert rows["model"].nunique() == rows["dataset"].nunique() == 1
    return {row.alpha: (row.loss, row.accuracy) for row in rows.itertuples()}


def same(found: dict[float, tuple[float, float]], expected: dict[float, tuple[float, float]]) -> None:
    assert list(found) == list(expected)
    for alpha, (loss, accuracy) in expected.items():
        assert found[alpha] == (pytest.approx(loss, abs=2e-6), pytest.approx(accuracy)), alpha


def clips(folder: Path) -> list[dict[str, Tensor]]:
    first = torch.load(folder / "clip0.pt", weights_only=True)["state_dict"]
    last = torch.load(folder / "clip1.pt", weights_only=True)["state_dict"]
    return [first, {name.removeprefix("module."): tensor for name, tensor in last.items()}]


def two(folder: Path) -> list[str | Path]:
    return ["--arch", folder / "clip.json", "--zeroshot", folder / "clip0.pt", "--finetuned",
            folder / "clip1.pt", "--data", f"far={folder / 'far.npz'}"]  # fmt: skip


PROMPTED = ["--class-names", "names.txt", "--templates", "photo"]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["interpolate", "zeroshot", "finetuned"])
@pytest.mark.parametrize("scale", [None, 30.0])
def test_heads_made_from_each_ends_own_text_tower(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, scale: float | None
) -> None:
    monkeypatch.chdir(folder)
    scaled = [] if scale is None else ["--head-scale", str(scale)]
    found = run(tmp_path / "run", *two(folder), *PROMPTED, "--head", head, *scaled)
    ends = clips(folder)
    heads = [text_head(load_clip(end), scale) for end in ends]
    if head != "interpolate":
        heads = [heads[head == "finetuned"]] * 2
    same(
        found,
        {
            alpha: truth(load_clip(mix(*ends, alpha)), torch.lerp(*heads, alpha), 0.0, folder / "far.npz")
            for alpha in (0, 0.4, 1)
        },
    )


@pytest.mark.slow
def test_both_towers_encode_the_prompts_again_at_every_alpha(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    found = run(tmp_path / "run", *two(folder), *PROMPTED, "--towers", "both")
    ends = clips(folder)
    models = {alpha: load_clip(mix(*ends, alpha)) for alpha in (0, 0.4, 1)}
    same(found, {a: truth(m, text_head(m), 0.0, folder / "far.npz") for a, m in models.items()})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["head"]["towers"] == "both" and len(config["head"]["sha256 of the prompts"]) == 64


@pytest.mark.slow
def test_a_zoo_file_says_the_same_as_options(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    by_options = run(tmp_path / "options", *two(folder), *PROMPTED, "--head", "finetuned")
    (folder / "zoo.toml").write_text(
        """
        name = "clips"
        arch = "clip.json"
        zeroshot = { path = "clip0.pt", format = "open_clip" }
        class-names = "names.txt"
        templates = "photo"
        head = "zeroshot"
        [finetuned]
        tuned = "clip1.pt"
        [data]
        far = { path = "far.npz", kind = "npz" }
        """
    )
    monkeypatch.chdir(tmp_path)  # a zoo's paths are relative to its file
    zeroshot = run(tmp_path / "as it says", folder / "zoo.toml")
    assert zeroshot != by_options
    assert run(tmp_path / "folder", folder, "--head", "finetuned") == by_options


@pytest.mark.slow
def test_with_finetuned_heads_no_models_share_a_zero_shot_end(folder: Path, tmp_path: Path) -> None:
    # Two models of equal towers but other heads, whose rows would be alike if one's end served the other.
    out, st = tmp_path / "run", folder / "tuned.st"
    again = {**_soup(st), HEAD: -_soup(st)[HEAD]}
    save(again, folder / "again.st")
    base = [*("--arch", folder / "clip.json", "--zeroshot", folder / "clip0.pt", "--head", "finetuned")]
    words = ["interpolation", "sharpness", *base, "--finetuned", st, folder / "again.st"]
    words += ["--data", f"far={folder / 'far.npz'}", "--alphas", "0", "1", "--draws", "2", "--out", out]
    assert sweep.main([str(word) for word in words]) == 0
    rows = results.load(out)
    at_zero = rows[(rows["study"] == "interpolation") & (rows["alpha"] == 0)].set_index("model")["loss"]
    clip = load_clip(clips(folder)[0])
    for name, state in (("tuned", _soup(st)), ("again", again)):
        expected, _ = truth(clip, state[HEAD], state["classification_head.bias"], folder / "far.npz")
        assert at_zero[name] == pytest.approx(expected, abs=2e-6)
    clean = rows[(rows["study"] == "sharpness") & (rows["alpha"] == 0)].set_index("model")["sharpness"]
    assert clean["tuned"] != clean["again"]


def _soup(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["zeroshot", "finetuned"])
def test_one_head_joins_models_of_other_classes(folder: Path, tmp_path: Path, choice: str) -> None:
    three, five = tmp_path / "three.st", tmp_path / "five.st"
    zeroshot, tuned = (three, five) if choice == "zeroshot" else (five, three)
    ends = clips(folder)
    for file, rows in ((three, 3), (five, 5)):
        soup = ends[file == tuned]
        head = {HEAD: torch.randn(rows, 6), "classification_head.bias": torch.randn(rows)}
        save({f"model.{k}": v for k, v in soup.items() if k.startswith("visual.")} | head, file)
    words = ["--arch", folder / "clip.json", "--zeroshot", zeroshot, "--finetuned", tuned, "--head", choice]
    found = run(tmp_path / "run", *words, "--data", f"far={folder / 'far.npz'}")
    state = _soup(three)
    fixed = (state[HEAD], state["classification_head.bias"], folder / "far.npz")
    same(found, {alpha: truth(load_clip(mix(*ends, alpha)), *fixed) for alpha in (0, 0.4, 1)})


def test_all_models_are_checked_before_a_prompt_is_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("rft_fast.clip.heads._encode", None)
    words = [*two(folder), *PROMPTED, "--out", tmp_path / "run"]
    words.insert(words.index("--data"), folder / "b.safetensors")  # of a tower without a text tower
    headless = {k: v for k, v in _soup(folder / "b.safetensors").items() if "head" not in k}
    save(headless, folder / "headless.safetensors")
    words[words.index(folder / "b.safetensors")] = folder / "headless.safetensors"
    sweep_refused([str(word) for word in ("interpolation", *words)], folder / "headless.safetensors")
    both = [str(word) for word in ("interpolation", *words, "--towers", "both")]
    sweep_refused(both, "--towers")


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    state = _soup(folder / "a.safetensors")
    state["model.visual.proj"][0, 0] = torch.nan
    save(state, tmp_path / "lost.safetensors")
    words = ["interpolation", "--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors"]
    words += ["--finetuned", folder / "a.safetensors", tmp_path / "lost.safetensors"]
    words += ["--data", f"far={folder / 'far.npz'}", "--out", tmp_path / "run"]
    sweep_refused([str(word) for word in words], "visual.proj")


def test_options_of_a_zoo_are_no_entries(folder: Path, tmp_path: Path) -> None:
    """What the zoo has entries for is not silently ignored among its options."""
    text = f"""
        name = "a/b"
        arch = "{folder / "tiny.json"}"
        zeroshot = "{folder / "zeroshot.safetensors"}"
        finetuned = {{ a = "{folder / "a.safetensors"}" }}
        data = {{ far = {{ path = "{folder / "far.npz"}" }} }}
        [options]
    """
    (tmp_path / "zoo.toml").write_text(text + 'head = "zeroshot"')
    sweep_refused(
        ["interpolation", str(tmp_path)],
        "options.head",
    )
    (tmp_path / "zoo.toml").write_text(text + "samples = 7")
    asked_for = request.read(["interpolation", str(tmp_path)])
    assert asked_for.of(Along).samples == 7 and asked_for.out.parent == Path("rft-runs")


@pytest.mark.slow
def test_a_label_map_scores_as_it_says(folder: Path, tmp_path: Path) -> None:
    # The folder's classes 0, 1, 2 are the head's 2, 0, 1; the same as relabelling by hand.
    zeroshot = ["--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors"]
    zeroshot += ["--finetuned", folder / "a.safetensors"]
    (folder / "map.json").write_text(json.dumps({"0": 2, "1": 0, "2": 1}))
    mapped = run(tmp_path / "a", *zeroshot, "--data", f"near={folder / 'near'}",
                 "--data-labels", f"near={folder / 'map.json'}")  # fmt: skip
    turned = tmp_path / "turned"
    turned.mkdir()
    for theirs, ours in ((0, 2), (1, 0), (2, 1)):
        (turned / str(ours)).symlink_to(folder / "near" / str(theirs))
    by_hand = run(tmp_path / "b", *zeroshot, "--data", f"near={turned}")
    same(mapped, by_hand)
    assert mapped != run(tmp_path / "c", *zeroshot, "--data", f"near={folder / 'near'}")


@pytest.mark.slow
def test_names_of_folders_are_rows_by_the_heads_names_or_by_a_word(folder: Path, tmp_path: Path) -> None:
    """Classes 0, 1, 2 by names that sort otherwise: right with the head's names, refused without; with the
    word order as if they were numbers."""
    words = ["--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors"]
    words += ["--finetuned", folder / "a.safetensors"]
    for number, name in enumerate(("Owl", "ant", "CAFE\u0301")):
        (tmp_path / "named" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "named" / name).symlink_to(folder / "near" / str(number))
    near = [*words, "--data", f"near={tmp_path / 'named'}"]
    (tmp_path / "names.txt").write_text("owl\nAnt\ncaf\u00e9\n", "utf-8")
    sweep_refused([str(word) for word in ("interpolation", *near)], "Owl -> 1", "ant -> 2")
    named = run(tmp_path / "a", *near, "--class-names", tmp_path / "names.txt")
    numbers = run(tmp_path / "b", *words, "--data", f"near={folder / 'near'}")
    assert sorted(results.load(tmp_path / "a")["accuracy"]) == sorted(
        results.load(tmp_path / "b")["accuracy"]
    )
    (tmp_path / "turned").mkdir()
    for number, name in enumerate(("2", "0", "1")):
        (tmp_path / "turned" / str(number)).symlink_to(folder / "near" / name)
    in_order = run(tmp_path / "c", *near, "--data-labels", "near=order")
    same(in_order, run(tmp_path / "d", *words, "--data", f"near={tmp_path / 'turned'}"))
    assert named and numbers and in_order != named
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["data"]["near"]["labels"] == "order"


def test_a_part_of_the_classes_is_scored_among_its_rows(folder: Path, tmp_path: Path) -> None:
    (folder / "part.toml").write_text("0 = 1\n1 = []\n2 = [0]\n")
    out = tmp_path / "run"
    zeroshot = ["--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors"]
    zeroshot += ["--finetuned", folder / "a.safetensors", "--data", f"near={folder / 'near'}"]
    run(out, *zeroshot, "--data-labels", f"near={folder / 'part.toml'}")
    rows = results.load(out)
    assert set(rows["samples"]) == {8}  # of 12
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["near"]["classes"] == 2


def test_the_plan_of_such_a_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["interpolation", *two(folder), "--class-names", folder / "names.txt", "--towers", "both",
             "--templates", "simple", "--plan"]  # fmt: skip
    assert sweep.main([str(word) for word in words]) == 0
    assert "interpolation" in capsys.readouterr().out


def cases(folder: Path) -> list[list[Any]]:
    clip, soup = (
        two(folder),
        [*("--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors")],
    )
    tuned = ["--finetuned", folder / "a.safetensors"]
    far = ["--data", f"far={folder / 'far.npz'}"]
    names = ["--class-names", folder / "names.txt"]
    return [
        clip,
        [*clip, "--towers", "both"],
        [*clip, *names, "--towers", "both", "--head", "zeroshot"],
        [*clip, "--class-names", "imagnet"],
        [*clip, *names, "--templates", "opnai"],
        [*soup, *tuned, *far, "--templates", "photo"],
        [*clip, *names, "--head-scale", "0"],
        [*clip, "--zeroshot-head", folder / "nowhere.pt"],
        [*clip, "--zeroshot-head", folder / "clip0.pt"],
        [*soup, *tuned, *far, "--towers", "both", *names],
        [*soup, *tuned, *far, "--class-names", "cifar10"],
        [*soup, *tuned, *far, "--format", "wiseft"],
        [*soup, *tuned, *far, "--data-kind", "far=tar"],
        [*soup, *tuned, *far, "--data-kind", "near=npz"],
        [*soup, *tuned, *far, "--data-labels", "far=nowhere.json"],
        [*soup, "--finetuned", folder / "clip1.pt", *far],
        ["--arch", "ViT-B-16", *soup[2:], *tuned, *far],
        ["--arch", "ViT-B-32", "--zeroshot", "openai", *tuned, *far],
        ["--arch", "ViT-B-32", "--zeroshot", "opnai", *tuned, *far],
        [folder / "zoo.toml", "--arch", "ViT-B-32"],
        [folder / "near"],
    ]


@pytest.mark.parametrize("number", range(21))
def test_what_does_not_fit_is_refused_before_a_measurement(folder: Path, tmp_path: Path, number: int) -> None:
    arguments = cases(folder)[number]
    out = tmp_path / "run"
    sweep_refused([str(word) for word in ("interpolation", *arguments, "--out", out)])
    assert not out.exists()


def test_classes_that_differ_between_head_and_data(folder: Path, tmp_path: Path) -> None:
    four = tmp_path / "four"
    for number in range(4):
        (four / str(number)).mkdir(parents=True)
        (four / str(number) / "x.png").symlink_to(folder / "near" / "0" / "0.png")
    words = ["interpolation", "--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors"]
    words += ["--finetuned", folder / "a.safetensors", "--data", f"near={folder / 'near'}", f"four={four}"]
    sweep_refused([*map(str, words), "--out", str(tmp_path / "run")], "4", "3")


def test_published_weights_are_fetched_once_and_read_like_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download itself is open_clip's; here it is a file that is there already."""
    asked = []

    def download(config: object, **_: object) -> str:
        asked.append(config)
        return str(folder / "zeroshot.safetensors")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    words = ["interpolation", "--arch", "ViT-B-32-quickgelu", "--zeroshot", "openai", "--finetuned",
             str(folder / "a.safetensors"), "--data", f"far={folder / 'far.npz'}"]  # fmt: skip
    asked_for = request.read([*words, "--out", str(tmp_path / "run")])
    assert asked_for.zoo.zeroshot == zoo.Weights("openai") and not asked
    with pytest.raises(SystemExit):  # the tiny file is not of this architecture
        sweep.main([*words, "--out", str(tmp_path / "run")])
    assert len(asked) == 1


@pytest.mark.slow
def test_ends_that_are_no_ends_are_refused(folder: Path, tmp_path: Path) -> None:
    start = _soup(folder / "zeroshot.safetensors")
    torch.save({name: tensor.half() for name, tensor in start.items()}, tmp_path / "rounded.pt")
    other = {n: torch.randn_like(t) if "visual" in n and t.ndim > 1 else t for n, t in start.items()}
    save(other, tmp_path / "other.st")
    save({n: 0.01 * torch.randn_like(t) for n, t in start.items()}, tmp_path / "vector.st")
    probe = {n: t + 1 if "head" in n else t for n, t in start.items()}
    save(probe, tmp_path / "probe.st")
    tuned = _soup(folder / "a.safetensors")  # its classes in another order, as of another class list
    save({n: t + 0.01 if "visual" in n else start[n][[1, 0, 2]] if "head" in n else t
          for n, t in tuned.items()}, tmp_path / "moved.st")  # fmt: skip
    base = ["interpolation", "--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors",
            "--data", f"far={folder / 'far.npz'}", "--device", "cpu", "--no-cache"]  # fmt: skip

    def words(file: Path, *more: str) -> list[str]:
        return [str(word) for word in (*base, "--finetuned", file, "--out", tmp_path / "run", *more)]

    for file, message in (
        (folder / "zeroshot.safetensors", ""),
        (tmp_path / "rounded.pt", ""),
        (tmp_path / "other.st", "--unrelated"),
        (tmp_path / "vector.st", ""),
        (tmp_path / "moved.st", ""),
    ):
        sweep_refused(words(file), *message.split())
        # As `checkpoints A B` says.
        ends = (folder / "zeroshot.safetensors", file)
        assert message in str(checkpoints.compare(*map(checkpoints.read, ends)))
    sweep_refused(words(folder / "zeroshot.safetensors", "--unrelated"))
    sweep_refused(words(tmp_path / "probe.st", "--head", "zeroshot"))
    assert not (tmp_path / "run").exists()
    assert sweep.main(words(tmp_path / "probe.st", "--alphas", "0", "1")) == 0
    assert sweep.main(words(tmp_path / "other.st", "--alphas", "0", "1", "--unrelated", "--overwrite")) == 0
    lines = ['name = "z"', f'arch = "{folder / "tiny.json"}"', f'zeroshot = "{base[4]}"', "[finetuned]",
             f'x = {{ path = "{tmp_path / "other.st"}", unrelated = true }}',
             "[data]", f'far = {{ path = "{folder / "far.npz"}" }}']  # fmt: skip
    (tmp_path / "zoo.toml").write_text("\n".join(lines))
    assert zoo.read(tmp_path / "zoo.toml").finetuned["x"].unrelated


def test_another_image_size_by_option_and_by_zoo(folder: Path, tmp_path: Path) -> None:
    state = _soup(folder / "zeroshot.safetensors")
    name = "model.visual.positional_embedding"
    larger = {**state, name: torch.randn(10, 8), "model.visual.proj": state["model.visual.proj"] * 1.1}
    save(larger, tmp_path / "larger.st")
    base = ["--arch", folder / "tiny.json", "--zeroshot", folder / "zeroshot.safetensors",
            "--finetuned", tmp_path / "larger.st", "--data", f"far={folder / 'far.npz'}"]  # fmt: skip
    sweep_refused(["interpolation", *map(str, base), "--out", str(tmp_path / "no")], "--resize-positions")
    found = run(tmp_path / "run", *base, "--resize-positions")
    assert "resampled" in (tmp_path / "run" / "run.log").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resize_positions"] is True
    lines = ['name = "z"', f'arch = "{base[1]}"', f'zeroshot = "{base[3]}"', "resize-positions = true",
             "[finetuned]", f'x = "{base[5]}"',
             "[data]", f'far = {{ path = "{folder / "far.npz"}" }}']  # fmt: skip
    (tmp_path / "zoo.toml").write_text("\n".join(lines))
    assert zoo.read(tmp_path / "zoo.toml").resize_positions and len(found) == 3
    assert (
        checkpoints.compare(*map(checkpoints.read, (base[3], base[5])))
        .problems[0]
        .count("--resize-positions")
    )
