"""Merges that measure models on data: greedy soups and Fisher weights."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN as OPENAI_MEAN
from open_clip.constants import OPENAI_DATASET_STD as OPENAI_STD
from safetensors.torch import load_file
from support import tiny_merge, tiny_zoo
from support.tiny_merge import close
from support.wording import command_refused, refused, said
from torch import Tensor

from rft_fast import checkpoints, merge, sweep
from rft_fast.merge import Request, greedy_soup, provenance, run
from rft_fast.merge.__main__ import main
from rft_fast.run.measures import Measured

ZERO = tiny_merge.base()
MODELS = {name: tiny_merge.moved(ZERO, seed) for seed, name in enumerate(("one", "two", "three"))}


class Fake:
    """Measures by tables."""

    def __init__(
        self, accuracies: Mapping[str, float], information: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        self.accuracies, self.information = accuracies, information

    about: Mapping[str, object] = {"options": ["-x"]}

    def accuracy(self, files: Sequence[Path]) -> float:
        return self.accuracies["+".join(sorted(file.stem for file in files))]

    def fisher(self, file: Path) -> Mapping[str, Tensor]:
        return self.information[file.stem]

    def statistics(self, file: Path) -> Mapping[str, Tensor]:
        raise AssertionError("not needed")


@pytest.mark.parametrize("seed", range(20))
def test_greedy_soup_as_the_paper_has_it(seed: int) -> None:
    """Recipe 1 of Wortsman et al. 2022, with random accuracies of all subsets, many of them equal."""
    rng = np.random.default_rng(seed)
    files = [Path(name) for name in "abcde"]
    table = {
        frozenset(some): float(rng.integers(4)) / 4
        for size in range(1, 6)
        for some in itertools.combinations(files, size)
    }
    found = greedy_soup(files, lambda some: table[frozenset(some)])
    ingredients: set[Path] = set()
    for file in sorted(files, key=lambda f: (-table[frozenset({f})], f.name)):
        before = table[frozenset(ingredients)] if ingredients else -1.0
        if table[frozenset(ingredients | {file})] >= before:
            ingredients.add(file)
    assert set(found.kept) == ingredients and found.accuracy == table[frozenset(ingredients)]
    assert dict(found.alone) == {file: table[frozenset({file})] for file in files}


def test_a_greedy_soup_is_the_mean_of_the_models_kept(tmp_path: Path) -> None:
    files = tiny_merge.put(tmp_path, **MODELS)
    fake = Fake({"one": 0.5, "two": 0.7, "three": 0.6, "three+two": 0.65, "one+two": 0.7}, {})
    out = tmp_path / "out.safetensors"
    outcome = run(Request("greedy-soup", tuple(files.values()), out), fake)
    one, two = MODELS["one"], MODELS["two"]
    close(load_file(out), {name: (one[name].double() + two[name].double()) / 2 for name in ZERO})
    assert outcome.provenance["data"] == fake.about
    said("\n".join(outcome.notes), "one.safetensors", "three.safetensors")
    alone = Fake(dict.fromkeys(("one+two", "three+two"), 0.1) | {"one": 0.5, "two": 0.7, "three": 0.6}, {})
    run(Request("greedy-soup", tuple(files.values()), out, overwrite=True), alone)
    assert all(torch.equal(tensor, two[name]) for name, tensor in load_file(out).items())


def test_a_greedy_soup_takes_nothing_from_models_that_are_left_out(tmp_path: Path) -> None:
    """Names and dtypes are the best model's, and no note is about another one."""
    half = {f"model.{name}": tensor.bfloat16() for name, tensor in MODELS["one"].items()}
    del half["model.logit_scale"]
    files = tiny_merge.put(tmp_path, **{**MODELS, "one": half})
    table = {"one": 0.1, "two": 0.6, "three": 0.7, "three+two": 0.8, "one+three+two": 0.5}
    outcome = run(
        Request("greedy-soup", tuple(files.values()), tmp_path / "out.safetensors"), Fake(table, {})
    )
    got = load_file(tmp_path / "out.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in got.items()} == {
        name: (t.shape, t.dtype) for name, t in MODELS["three"].items()
    }
    assert not [note for note in outcome.notes if "logit_scale" in note]


def test_fisher_weights(tmp_path: Path) -> None:
    """Matena & Raffel 2022, Eq. 5; the mean where no model has any information."""
    files = tiny_merge.put(tmp_path, **MODELS)
    noise = torch.Generator().manual_seed(0)
    information: dict[str, dict[str, Tensor]] = {
        name: {
            key: torch.rand(t.shape, generator=noise) ** 8 * 1e-12
            for key, t in state.items()
            if key != "logit_scale"
        }
        for name, state in MODELS.items()
    }
    for each in information.values():
        each["visual.ln_post.weight"][:2] = 0
    out = tmp_path / "out.safetensors"
    run(Request("fisher", tuple(files.values()), out), Fake({}, information))
    truth = {}
    for key in ZERO:
        states = [state[key].double() for state in MODELS.values()]
        shares = [each.get(key, torch.zeros(())).double() for each in information.values()]
        total = sum(shares, torch.zeros(())).expand(ZERO[key].shape)
        weighted = sum((s * w for s, w in zip(shares, states, strict=True)), torch.zeros(()))
        truth[key] = torch.where(total > 0, weighted / total, sum(states, torch.zeros(())) / 3)
    close(load_file(out), truth)


@pytest.fixture(scope="module")
def resnets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small ResNets of CLIP with a head, and the images of the zoo at their size."""
    folder = tiny_zoo.make(tmp_path_factory.mktemp("resnets"))
    (folder / "tiny.json").write_text(json.dumps({"model_cfg": RESNET, "preprocess_cfg": {"size": 32}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = open_clip.model._build_vision_tower(6, RESNET["vision_cfg"])
        state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
        state |= {"classification_head.weight": torch.randn(3, 6), "classification_head.bias": torch.zeros(3)}
    for name, each in (("zeroshot", state), ("a", tiny_merge.moved(state, 1, 0.01))):
        for key in [key for key in each if key.endswith("running_var")]:
            each[key] = each[key].abs()
        tiny_zoo.save(each, folder / f"{name}.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "far.npz", images=images, labels=np.arange(40) % 3)
    return folder


RESNET: dict[str, Any] = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_statistics_of_batch_norm_are_those_of_the_data(
    resnets: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch's own update_bn estimates them, on the merged tower; nothing else changes."""
    ends = ["--zeroshot", resnets / "zeroshot.safetensors", "--finetuned", resnets / "a.safetensors"]
    plain, out = tmp_path / f"plain{suffix}", tmp_path / f"out{suffix}"
    words = ["interpolate", *map(str, ends), "--alpha", "0.5", "--out"]
    assert main([*words, str(plain)]) == 0
    options = ["--", *data(resnets), "--batch-size", "16"]
    assert main([*words, str(out), "--recalibrate", *options]) == 0
    said(capsys.readouterr().out)
    before, after = checkpoints.load(plain), checkpoints.load(out)
    tower = open_clip.model._build_vision_tower(6, RESNET["vision_cfg"])
    start = "visual."
    tower.load_state_dict({k.removeprefix(start): t for k, t in before.items() if k.startswith(start)})
    pixels = torch.from_numpy(np.load(resnets / "far.npz")["images"]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    torch.optim.swa_utils.update_bn(((pixels / 255 - mean) / std).split(16), tower)
    for name, tensor in tower.state_dict().items():
        if "running" in name:
            assert not torch.equal(after[start + name], before[start + name])
            torch.testing.assert_close(after[start + name], tensor, rtol=1e-4, atol=1e-5)
        elif "tracked" not in name:
            assert torch.equal(after[start + name], before[start + name])
    assert not [file for file in tmp_path.iterdir() if file not in (plain, out)]


def test_recalibration_with_a_difference(resnets: Path, tmp_path: Path) -> None:
    """A difference is no model that data could be shown to; the result is that of the model."""
    zero, one = (load_file(resnets / f"{name}.safetensors") for name in ("zeroshot", "a"))
    floats = [name for name, tensor in zero.items() if tensor.is_floating_point()]
    vector = {n: one[n] - zero[n] if n in floats else one[n] for n in one}
    files = {"model": resnets / "a.safetensors", **tiny_merge.put(tmp_path, vector=vector)}
    words = ["task-arithmetic", "--zeroshot", str(resnets / "zeroshot.safetensors"), "--recalibrate"]
    made = []
    for name, file in files.items():
        out = tmp_path / f"{name}-out.safetensors"
        assert main([*words, "--finetuned", str(file), "--out", str(out), "--", *data(resnets)]) == 0
        made.append(load_file(out))
        origin = provenance(out)
        assert origin is not None and origin["data"]["datasets"]
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_recalibration_of_a_model_without_batch_norm(zoo: Path, tmp_path: Path) -> None:
    ends = ["--zeroshot", zoo / "zeroshot.safetensors", "--finetuned", zoo / "a.safetensors", "--alpha", "1"]
    words = ["interpolate", *ends, "--out", tmp_path / "out.safetensors", "--recalibrate"]
    command_refused(main, words, "--id-data")
    command_refused(main, [*words, "--", *data(zoo)], "--recalibrate")
    assert not list(tmp_path.iterdir())


def test_fisher_information_that_is_no_number(tmp_path: Path) -> None:
    files = tiny_merge.put(tmp_path, **MODELS)
    broken = {"visual.conv1.weight": torch.full((4, 3, 2, 2), float("nan"))}
    with refused(ValueError, "visual.conv1.weight"):
        run(
            Request("fisher", tuple(files.values()), tmp_path / "out.safetensors"),
            Fake({}, dict.fromkeys(MODELS, broken)),
        )


def test_methods_without_their_data(tmp_path: Path) -> None:
    files = tiny_merge.put(tmp_path, **MODELS)
    with refused(ValueError, "fisher"):
        run(Request("fisher", tuple(files.values()), tmp_path / "out.safetensors"))
    words = ["--finetuned", *files.values(), "--out", tmp_path / "out.safetensors"]
    command_refused(main, ["greedy-soup", *words], "--id-data")
    command_refused(main, ["soup", *words, "--", "--arch", "x"], "soup")


# --- on images ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def data(zoo: Path) -> list[str]:
    return ["--arch", str(zoo / "tiny.json"), "--id-data", f"far={zoo / 'far.npz'}", "--device", "cpu"]


@pytest.mark.slow
def test_a_greedy_soup_on_images(zoo: Path, tmp_path: Path) -> None:
    """The accuracies are those of a sweep, of each model and of the soup."""
    models, out = [str(zoo / f"{name}.safetensors") for name in "abc"], tmp_path / "out.safetensors"
    assert main(["greedy-soup", "--finetuned", *models, "--out", str(out), "--", *data(zoo)]) == 0
    origin = merge.provenance(out)
    assert origin is not None
    words = [
        "interpolation",
        *tiny_zoo.own_models(zoo, "abc"),
        "--alphas",
        "0",
        "1",
        "--device",
        "cpu",
        "--quiet",
    ]
    words.insert(words.index("--data"), str(out))
    assert sweep.main([*words, "--out", str(tmp_path / "run")]) == 0
    rows = pd.read_csv(tmp_path / "run" / "rows.csv")
    rows = rows[(rows.alpha == 1) & (rows.dataset == "far")].set_index("model").accuracy
    for name in "abc":
        assert any(f"{name}.safetensors: accuracy {rows[name]:.4f}" in note for note in origin["notes"])
    assert origin["notes"][-1].endswith(f"accuracy {rows['out']:.4f}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy-soup", "fisher"])
def test_key_chooses_the_weights_that_are_measured(zoo: Path, tmp_path: Path, method: str) -> None:
    """As with files that have these weights alone."""
    alone, files = [zoo / f"{name}.safetensors" for name in "ab"], [tmp_path / f"{name}.pt" for name in "ab"]
    for file, one, other in zip(files, alone, alone[::-1], strict=True):
        torch.save({"state_dict": load_file(other), "state_dict_ema": load_file(one)}, file)
    made = []
    for number, (models, more) in enumerate(((alone, []), (files, ["--key", "state_dict_ema"]))):
        out = tmp_path / f"{number}.safetensors"
        words = [method, "--finetuned", *map(str, models), *more, "--out", str(out), "--", *data(zoo)]
        assert main([*words, "--samples", "6"]) == 0
        made.append(load_file(out))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def predicted(zoo: Path) -> tuple[Tensor, Tensor]:
    """Probabilities [images, classes] and features [images, 6] of model a, by open_clip in float64."""
    state = checkpoints.load(zoo / "a.safetensors")
    tower = open_clip.model._build_vision_tower(6, {**tiny_zoo.VISION, "mlp_ratio": 2.0}).double().eval()
    tower.load_state_dict(
        {k.removeprefix("visual."): t.double() for k, t in state.items() if k.startswith("visual.")}
    )
    pixels = torch.from_numpy(np.load(zoo / "far.npz")["images"]).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        features = torch.nn.functional.normalize(tower((pixels / 255 - 0.5) / 0.25), dim=1)
    weight, bias = (state[f"classification_head.{part}"].double() for part in ("weight", "bias"))
    return (features @ weight.T + bias).softmax(1), features


def measured(zoo: Path, *more: str) -> Mapping[str, Tensor]:
    files = [zoo / f"{name}.safetensors" for name in "ab"]
    return Measured([*data(zoo), *more], files).fisher(files[0])


def test_fisher_information_of_one_image(zoo: Path) -> None:
    """Of the bias (1[y = c] - p_c)^2 for one class y; of the weight that times the squared features."""
    found = measured(zoo, "--samples", "1")
    bias, weight = (found[f"classification_head.{part}"].double() for part in ("bias", "weight"))
    fitting = []
    for chances, features in zip(*predicted(zoo), strict=True):  # whichever image was sampled
        for drawn in range(tiny_zoo.CLASSES):
            slope = (torch.arange(tiny_zoo.CLASSES) == drawn).double() - chances
            if torch.allclose(bias, slope**2, rtol=1e-4, atol=1e-7):
                fitting.append(torch.allclose(weight, torch.outer(slope**2, features**2), rtol=1e-3))
    assert any(fitting)
    state = checkpoints.load(zoo / "a.safetensors")
    assert all(found[name].shape == state[name].shape for name in found)


def test_fisher_information_is_an_expectation_over_the_model_s_own_classes(zoo: Path) -> None:
    """Of the bias: the mean over images of p (1 - p), within 4 standard errors over 4 seeds."""
    found = [measured(zoo, "--seed", str(seed))["classification_head.bias"] for seed in range(4)]
    p, _ = predicted(zoo)
    variance = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2  # of (1[y = c] - p_c)^2
    error = (variance.sum(0) / (4 * len(p) ** 2)).sqrt()
    got = torch.stack(found).double().mean(0)
    assert ((got - (p * (1 - p)).mean(0)).abs() < 4 * error).all()
    assert not torch.equal(found[0], found[1])
