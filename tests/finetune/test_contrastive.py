"""Fine-tuning of both towers by the contrastive loss (FLYP), against loops in float64 and open_clip."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny_zoo
from support.wording import command_refused, refused, said
from torch import Tensor, nn

from rft_fast import datasets, finetune, results, sweep
from rft_fast.clip import architectures
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.clip.prompts import Prompts, tokens
from rft_fast.config import zoo
from rft_fast.finetune import Batch, Setting, images, losses, training
from rft_fast.finetune.__main__ import main

NAMES = ("fox", "cat", "dog")
TEMPLATES = ("a {}.", "one {} here", "no {}")
TEXT = {"context_length": 10, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
CONFIG: dict[str, Any] = {**tiny_zoo.ARCH["model_cfg"], "text_cfg": TEXT}
TRAIN = ("--batch-size", "5", "--lr", "1e-2", "--epochs", "2", "--device", "cpu", "--augment", "none")


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    """Rounding depends on the number."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An architecture, a CLIP with both towers, twelve images of three classes, class names and templates."""
    made = tmp_path_factory.mktemp("contrastive")
    (made / "both.json").write_text(json.dumps({**tiny_zoo.ARCH, "model_cfg": CONFIG}))
    (made / "names.txt").write_text("\n".join(NAMES))
    (made / "templates.txt").write_text("\n".join(TEMPLATES))
    tiny_zoo.save(dict(clip().state_dict()), made / "clip.safetensors")
    rng = np.random.default_rng(1)
    for i in range(12):
        path = made / "big" / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 17, 3), dtype=np.uint8)).save(path)
    return made


def clip() -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(**CONFIG).eval()


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--arch", str(folder / "both.json"), "--zeroshot", str(folder / "clip.safetensors")),
        *("--class-names", str(folder / "names.txt"), "--templates", str(folder / "templates.txt")),
        *("--train", str(folder / "big"), "--val", f"big={folder / 'big'}", "--out", str(out)),
        *("--loss", "contrastive", *TRAIN, *more),
    ]


def by_loops(images: Tensor, texts: Tensor, scale: float) -> float:
    """The loss of Radford et al. 2021, Figure 3, pair by pair in Python's floats."""
    rows = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in images.tolist()]
    columns = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in texts.tolist()]
    cosine = [[scale * sum(a * b for a, b in zip(r, c, strict=True)) for c in columns] for r in rows]
    n = len(rows)
    of_images = [math.log(sum(map(math.exp, cosine[i]))) - cosine[i][i] for i in range(n)]
    of_texts = [math.log(sum(math.exp(cosine[i][j]) for i in range(n))) - cosine[j][j] for j in range(n)]
    return (sum(of_images) / n + sum(of_texts) / n) / 2


# --- the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_clip_s_written_out(n: int, dtype: torch.dtype) -> None:
    """The last two texts are the same, as those of two images of a class may be: plain CLIP, as in FLYP."""
    rng = torch.Generator().manual_seed(n)
    pictures, texts = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    texts[-1] = texts[-2 if n > 1 else -1]
    loss = losses.contrastive(pictures.to(dtype), texts.to(dtype), torch.tensor(9.0, dtype=dtype))
    assert float(loss) == pytest.approx(
        by_loops(pictures, texts, 9.0), rel=1e-5 if dtype == torch.float32 else 1e-12
    )
    assert n > 1 or float(loss) == 0


def test_gradients_of_the_loss_are_those_of_differences() -> None:
    rng = torch.Generator().manual_seed(3)
    pictures, texts = (
        torch.randn(4, 3, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.contrastive, (pictures, texts, scale))


class Fixed:
    """The same batches in every epoch."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        yield from self._batches[first:]


def test_training_is_adamw_on_open_clip_s_model(folder: Path) -> None:
    """Three steps, weight decay on matrices, against the same CLIP in float64, its loss and AdamW by hand."""
    state = clip().state_dict()
    setup = Setup(str(folder / "both.json"), "both", prompts=Prompts(NAMES, TEMPLATES))
    ends = Ends(setup, state)
    model, mine = ends.live, clip().double()
    model.load_state_dict(ends.zeroshot)
    rng = torch.Generator().manual_seed(2)
    texts = tokens(str(folder / "both.json"), Prompts(NAMES, TEMPLATES)).flatten(0, 1)
    batches = []
    for _ in range(3):
        chosen = torch.randint(len(texts), (6,), generator=rng)
        batches.append(
            Batch(torch.randn(6, 3, 8, 8, generator=rng), chosen // len(TEMPLATES), texts=texts[chosen])
        )
    setting = Setting(
        lr=1e-2, epochs=1, warmup=0, schedule="constant", weight_decay=0.5, clip=None, batch_size=6
    )
    rows = finetune.train(model, Fixed(batches), setting)

    parameters = dict(mine.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.5 if p.ndim >= 2 else 0.0} for p in parameters.values()], lr=1e-2
    )
    found = []
    for batch in batches:
        assert batch.texts is not None
        pictures, words, scale = mine(batch.images.double(), batch.texts)
        cosines = scale * pictures @ words.T
        loss = -(cosines.log_softmax(1).diag().mean() + cosines.log_softmax(0).diag().mean()) / 2
        assert loss.item() == pytest.approx(by_loops(pictures, words, scale.item()), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert rows[0]["loss"] == pytest.approx(np.mean(found), rel=1e-5)
    for name, tensor in model.named_parameters():
        ours, theirs = tensor.double(), parameters[name.removeprefix("text.")]
        if name.endswith("in_proj_bias"):  # keys' biases have no gradient but rounding, which AdamW magnifies
            ours, theirs = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5, msg=name)
        assert not torch.equal(tensor, ends.zeroshot[name])  # both towers and the scale are trained


def test_only_both_towers_take_texts() -> None:
    batch = Batch(
        torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), texts=torch.zeros(2, 4, dtype=torch.int64)
    )
    with refused(TypeError, "ZeroShotClassifier", "Linear"):
        finetune.train(nn.Linear(3, 3), Fixed([batch]), Setting(epochs=1, batch_size=2))


# --- batches ------------------------------------------------------------------------------------------


def test_each_image_has_a_random_template_of_its_class(folder: Path) -> None:
    source = datasets.open_source("train", folder / "big")
    labels = torch.tensor([NAMES.index(source.class_names[label]) for label in source.labels])
    arch = str(folder / "both.json")
    found = finetune.Images(source, torch.arange(12), labels, architectures.preprocess(arch), 2)
    prompts = tokens(arch, Prompts(NAMES, TEMPLATES))
    table = {tuple(prompts[c, t].tolist()): (c, t) for c in range(3) for t in range(3)}
    batches = images.ImageBatches(found, Setting(batch_size=5, augment="none"), torch.device("cpu"), prompts)
    seen: Counter[int] = Counter()
    epochs = []
    for number in range(30):
        texts = []
        for batch in batches.epoch(number):
            assert batch.texts is not None
            drawn = [table[tuple(text.tolist())] for text in batch.texts]
            assert [c for c, _ in drawn] == batch.labels.tolist()
            texts += [t for _, t in drawn]
        seen.update(texts)
        epochs.append(texts)
    assert len({tuple(texts) for texts in epochs}) == 30  # drawn anew
    assert all(abs(seen[t] - 120) < 4 * math.sqrt(360 * 2 / 9) for t in range(3))  # 360 draws of thirds
    late = [batch.texts for batch in batches.epoch(4, first=1)]
    whole = [batch.texts for batch in batches.epoch(4)][1:]
    assert all(torch.equal(a, b) for a, b in zip(late, whole, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(("size", "sizes"), [(11, [12]), (5, [5, 5, 2]), (12, [12]), (4, [4, 4, 4])])
def test_no_pair_is_alone(folder: Path, size: int, sizes: list[int]) -> None:
    """A step on one pair has no loss, and AdamW would step all the same."""
    source = datasets.open_source("train", folder / "big")
    arch = str(folder / "both.json")
    found = finetune.Images(source, torch.arange(12), source.labels, architectures.preprocess(arch), 2)
    prompts = tokens(arch, Prompts(NAMES, TEMPLATES))
    setting, cpu = Setting(batch_size=size, augment="none"), torch.device("cpu")
    pairs = images.ImageBatches(found, setting, cpu, prompts)
    assert [len(batch.labels) for batch in pairs.epoch(0)] == sizes and len(pairs) == len(sizes)
    alone = images.ImageBatches(found, setting, cpu)
    assert sum(len(batch.labels) for batch in alone.epoch(0)) == 12 and len(alone) == math.ceil(12 / size)


# --- the command --------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_files_are_open_clip_s(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path, "--epochs", "8")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"next: python -m rft_fast.sweep {tmp_path}"
    with (tmp_path / "lr0.01-ep8-none.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(9)]
    assert float(rows[8]["loss"]) < 0.9 * float(rows[1]["loss"])

    state = load_file(tmp_path / "lr0.01-ep8-none.safetensors")
    tuned = clip()
    tuned.load_state_dict(state)  # strictly: open_clip's names, nothing missing and nothing more
    start = load_file(tmp_path / "zeroshot.safetensors")
    assert all(torch.equal(tensor, clip().state_dict()[name]) for name, tensor in start.items())
    assert state["logit_scale"] != start["logit_scale"]
    assert {n for n, t in state.items() if torch.equal(t, start[n]) and "token_embedding" not in n} == set()

    # Accuracies of epoch 0 and of the last one, with heads that open_clip's text towers make.
    arch = str(folder / "both.json")
    data = datasets.load("big", folder / "big", architectures.preprocess(arch), rows=datasets.Rows(3, NAMES))
    for row, model in ((rows[0], clip()), (rows[8], tuned)):
        logits = by_open_clip(model, data.images)
        assert float(row["big"]) == pytest.approx(float((logits.argmax(1) == data.labels).float().mean()))

    made = zoo.read(tmp_path)
    assert made.head.towers == "image" and made.head.templates == str(tmp_path / "templates.json")
    assert json.loads(Path(made.head.templates).read_text()) == list(TEMPLATES)


def by_open_clip(model: open_clip.CLIP, pixels: Tensor) -> Tensor:
    """Logits with the head of the model's text tower: normalised mean of normalised features, scaled."""
    rows = []
    with torch.no_grad():
        for name in NAMES:
            texts = open_clip.tokenize([template.format(name) for template in TEMPLATES], 10)
            mean = model.encode_text(texts, normalize=True).mean(0)
            rows.append(mean / mean.norm())
        features = model.encode_image((pixels.float() / 255 - 0.5) / 0.25, normalize=True)
        logits: Tensor = model.logit_scale.exp() * features @ torch.stack(rows).T
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("towers", ["image", "both"])
def test_the_sweep_makes_heads_of_the_text_tower_of_each_end(
    folder: Path, tmp_path: Path, towers: str
) -> None:
    assert main(arguments(folder, tmp_path / "zoo")) == 0
    words = ["interpolation", str(tmp_path / "zoo"), "--alphas", "0", "1", "--device", "cpu", "--no-cache"]
    assert sweep.main([*words, "--towers", towers, "--out", str(tmp_path / "run")]) == 0
    rows = results.load(tmp_path / "run").set_index("alpha")
    arch = str(folder / "both.json")
    data = datasets.load("big", folder / "big", architectures.preprocess(arch), rows=datasets.Rows(3, NAMES))
    for alpha, name in ((0, "zeroshot"), (1, "lr0.01-ep2-none")):
        model = clip()
        model.load_state_dict(load_file(tmp_path / "zoo" / f"{name}.safetensors"))
        truth = nn.functional.cross_entropy(by_open_clip(model, data.images), data.labels)
        assert rows.loc[alpha, "loss"] == pytest.approx(float(truth), abs=1e-5)


def test_a_run_that_is_stopped_after_every_step_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = (
        arguments(folder, tmp_path / name, "--augment", "crop-flip", "--epochs", "1")
        for name in ("whole", "again")
    )
    assert main(whole) == 0
    real = training.backward

    def backward(*more: Any) -> float:
        signal.raise_signal(signal.SIGTERM)
        return real(*more)

    monkeypatch.setattr(training, "backward", backward)
    assert [main(again) for _ in range(3)] == [130, 130, 0]
    (file,) = (tmp_path / "whole").glob("lr*.safetensors")
    assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_models_start_from_the_file_that_the_zoo_has(folder: Path, tmp_path: Path) -> None:
    """In float16: from the rounded weights of both towers; and a text tower that is frozen keeps them."""
    argv = arguments(folder, tmp_path, "--dtype", "float16", "--freeze", r"text\..*")
    assert main(argv) == 0
    assert main([*argv, "--seed", "1"]) == 0
    start, tuned = (load_file(tmp_path / f"{n}.safetensors") for n in ("zeroshot", "lr0.01-ep2-none-seed1"))
    same = {name for name, tensor in start.items() if torch.equal(tensor, tuned[name])}
    assert {n for n in start if not n.startswith(("visual.", "logit_scale"))} <= same
    assert "logit_scale" not in same and {t.dtype for t in tuned.values()} == {torch.float16}


def test_a_head_that_the_checkpoint_holds_is_not_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"model.{name}": tensor for name, tensor in clip().state_dict().items()}
    state["classification_head.weight"] = torch.randn(3, 6)
    tiny_zoo.save(state, tmp_path / "headed.safetensors")
    argv = arguments(folder, tmp_path / "zoo", "--epochs", "1")
    argv[3] = str(tmp_path / "headed.safetensors")
    assert main(argv) == 0
    said(capsys.readouterr().out)
    assert load_file(tmp_path / "zoo" / "zeroshot.safetensors").keys() == clip().state_dict().keys()


def test_gradient_checkpointing_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    for name, more in (("a", ()), ("b", ("--grad-checkpointing",))):
        assert main(arguments(folder, tmp_path / name, *more)) == 0
    first, second = (load_file(tmp_path / name / "lr0.01-ep2-none.safetensors") for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- refused before the first step --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (("--head-scale", "3"), "--head-scale"),
        (("--mixup", "0", "0.2"), "--mixup 0.2"),
        (("--label-smoothing", "0.1"), "--label-smoothing 0.1"),
        (("--probe-epochs", "1"), "--probe-epochs 1"),
        (("--accumulate", "2"), "--accumulate 2 1 --grad-checkpointing"),
        (("--batch-size", "1"), "--batch-size 2 1"),
        (("--freeze", r"text\..*", r"visual\..*"), "logit_scale"),
    ],
)
def test_what_does_not_go_with_the_contrastive_loss_is_refused(
    folder: Path, tmp_path: Path, more: tuple[str, ...], facts: str
) -> None:
    command_refused(main, arguments(folder, tmp_path / "zoo", *more), *facts.split(), silent=False)
    assert not (tmp_path / "zoo").exists()


def test_models_without_what_is_trained_are_refused(folder: Path, tmp_path: Path) -> None:
    argv = arguments(folder, tmp_path / "zoo")
    start = argv.index("--class-names")
    command_refused(main, argv[:start] + argv[start + 4 :], "--class-names", silent=False)

    def other(*, arch: dict[str, Any] | None = None, state: dict[str, Tensor] | None = None) -> list[str]:
        words = [*argv]
        if arch is not None:
            (tmp_path / "other.json").write_text(json.dumps(arch))
            words[1] = str(tmp_path / "other.json")
        if state is not None:
            tiny_zoo.save(state, tmp_path / "other.safetensors")
            words[3] = str(tmp_path / "other.safetensors")
        return words

    no_text = {name: value for name, value in CONFIG.items() if name != "text_cfg"}
    command_refused(main, other(arch=no_text), "text_cfg", tmp_path / "other.json", silent=False)
    roberta = {**CONFIG, "text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}}
    command_refused(main, other(arch=roberta), "roberta-base", silent=False)
    (tmp_path / "words").mkdir()
    local = {**CONFIG, "text_cfg": {**TEXT, "hf_tokenizer_name": "words"}}
    command_refused(main, other(arch=local), "words", silent=False)
    state = dict(clip().state_dict())
    image = {name: tensor for name, tensor in state.items() if name.startswith(("visual.", "logit_scale"))}
    command_refused(main, other(state=image), silent=False)
    sigmoid = {**state, "logit_bias": torch.tensor(-10.0)}
    command_refused(main, other(state=sigmoid), "logit_bias", silent=False)
    del state["logit_scale"]
    command_refused(main, other(state=state), "logit_scale", silent=False)
    assert not (tmp_path / "zoo").exists()


def test_models_of_both_losses_do_not_share_a_zoo(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path)) == 0
    argv = arguments(folder, tmp_path, "--seed", "1", "--loss", "cross-entropy")
    command_refused(main, argv, "zeroshot.safetensors", silent=False)
