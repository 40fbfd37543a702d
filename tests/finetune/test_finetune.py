"""Training against loops, formulas and gradients written out by hand; settings and their names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from support.wording import refused
from torch import Tensor, nn

from rft_fast import finetune
from rft_fast.clip import architectures
from rft_fast.clip.classifier import ImageClassifier
from rft_fast.finetune import Batch, Request, Setting
from rft_fast.finetune.__main__ import BUILDER, parser

CLASSES = 5
VISION = open_clip.CLIPVisionCfg(layers=3, width=8, head_width=4, mlp_ratio=2.0, patch_size=4, image_size=8)
TEXT = open_clip.CLIPTextCfg(context_length=4, vocab_size=9, width=8, heads=2, layers=1)
PLAIN = Setting(lr=1e-2, epochs=2, warmup=0, batch_size=8, clip=None)


def classifier(seed: int = 0) -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        visual = open_clip.CLIP(6, VISION, TEXT).visual
        return ImageClassifier(visual, nn.Linear(6, CLASSES))


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(7, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, CLASSES))


@dataclass
class Fixed:
    """The same batches in every epoch, whatever the epoch."""

    batches: list[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        yield from self.batches[first:]


def batches(*shape: int, count: int = 3, n: int = 8, seed: int = 1) -> Fixed:
    rng = torch.Generator().manual_seed(seed)
    return Fixed(
        [
            Batch(torch.randn(n, *shape, generator=rng), torch.randint(CLASSES, (n,), generator=rng))
            for _ in range(count)
        ]
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy against (1 - s) one-hot + s / classes, written out, float64."""
    logs = logits.double().log_softmax(1)
    target = torch.full_like(logs, smoothing / CLASSES)
    target[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(target * logs).sum(1).mean()


# --- the optimizer ----------------------------------------------------------------------------------


def adamw_by_hand(
    model: nn.Module, data: Fixed, rates: list[float], decay: float, smoothing: float, clip: float | None
) -> None:
    """AdamW as its paper has it, in float64, with weight decay on matrices alone."""
    model.double()
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    order = [batch for _ in range(len(rates) // len(data)) for batch in data.epoch(0)]
    for t, (batch, rate) in enumerate(zip(order, rates, strict=True), start=1):
        loss = smoothed(model(batch.images.double()), batch.labels, smoothing)
        if batch.others is not None:
            other = smoothed(model(batch.images.double()), batch.others, smoothing)
            loss = batch.share * loss + (1 - batch.share) * other
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if clip is not None and norm > clip:
            gradients = tuple(g * clip / norm for g in gradients)
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                if p.ndim >= 2:
                    p.mul_(1 - rate * decay)
                p.sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


def by_formula(setting: Setting, steps: int) -> list[float]:
    cosine = [
        setting.lr * math.cos(math.pi / 2 * i / (steps - setting.warmup)) ** 2
        for i in range(steps - setting.warmup)
    ]
    return [setting.lr * (i + 1) / setting.warmup for i in range(setting.warmup)] + cosine


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("warmup", [0, 2])
def test_training_is_adamw_written_by_hand(warmup: int, clip: float | None) -> None:
    setting = replace(PLAIN, warmup=warmup, clip=clip, label_smoothing=0.2, weight_decay=0.7)
    data, model, mine = batches(7), small(), small()
    rows = finetune.train(model, data, setting)
    adamw_by_hand(mine, data, by_formula(setting, 6), 0.7, 0.2, clip)
    for (name, tensor), other in zip(model.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(tensor.double(), other, rtol=1e-4, atol=1e-5, msg=name)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    assert not model.training


def test_mixup_weighs_the_losses_of_the_two_labels() -> None:
    data = batches(7)
    others = [batch.labels.flip(0) for batch in data.batches]
    mixed = Fixed([replace(b, others=o, share=0.3) for b, o in zip(data.batches, others, strict=True)])
    model, mine = small(), small()
    setting = replace(PLAIN, label_smoothing=0.1)
    rows = finetune.train(model, mixed, replace(setting, epochs=1))
    with torch.no_grad():
        first = mixed.batches[0]
        logits = small()(first.images)
    loss = 0.3 * smoothed(logits, first.labels, 0.1) + 0.7 * smoothed(logits, first.labels.flip(0), 0.1)
    one = finetune.train(small(), Fixed(mixed.batches[:1]), replace(setting, epochs=1))
    assert one[0]["loss"] == pytest.approx(float(loss), rel=1e-6)
    adamw_by_hand(mine, mixed, by_formula(setting, 3), 0.1, 0.1, None)
    for tensor, other in zip(model.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(tensor.double(), other, rtol=1e-4, atol=1e-5)
    assert len(rows) == 1


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_is_linear_then_half_a_cosine(warmup: int) -> None:
    setting = replace(PLAIN, warmup=warmup)
    rates = [finetune.learning_rate(setting, step, 10) for step in range(10)]
    assert rates == pytest.approx(by_formula(setting, 10), rel=1e-12)
    constant = replace(setting, schedule="constant")
    assert finetune.learning_rate(constant, 9, 10) == setting.lr
    assert finetune.learning_rate(constant, 0, 10) == (setting.lr / 3 if warmup else setting.lr)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (10, 1), (259, 25), (4999, 499), (90000, 500)])
def test_the_usual_warm_up_is_a_tenth_of_the_steps(steps: int, warmup: int) -> None:
    setting = Setting(lr=1e-3)
    assert setting.name == "lr1e-3-ep8"
    for step in {0, max(warmup - 1, 0), warmup, steps - 1} - {steps}:
        given = replace(setting, warmup=warmup)
        rate = finetune.learning_rate(setting, step, steps)
        assert rate == finetune.learning_rate(given, step, steps) and 0 < rate <= 1e-3
    assert finetune.learning_rate(setting, 0, steps) == pytest.approx(1e-3 / max(warmup, 1))


def test_weight_decay_is_on_matrices_only() -> None:
    model = classifier()
    finetune.freeze(model, [r"visual\.proj"])
    decayed, others = finetune.adamw(model, replace(PLAIN, weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2} - {"visual.proj"}
    assert {names[id(p)] for p in decayed["params"]} == matrices
    assert "visual.class_embedding" in {names[id(p)] for p in others["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(names) - 1


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_make_the_same_step(parts: int) -> None:
    data = batches(7)
    whole, model = small(), small()
    expected = finetune.train(whole, data, PLAIN)
    rows = finetune.train(model, data, replace(PLAIN, accumulate=parts))
    for tensor, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5)
    assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1])
def test_gradient_checkpointing_changes_no_gradient(blocks: int) -> None:
    plain, model = classifier(), classifier()
    model.visual.set_grad_checkpointing(True)
    for either in (plain, model):
        finetune.freeze(either, blocks=blocks)
        finetune.train(either, batches(3, 8, 8), PLAIN)
    assert any("resblocks.2" in name for name in weights(plain))
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(model)[name]), name


@pytest.mark.slow
def test_bfloat16_training_stays_near_float32() -> None:
    exact, model = classifier(), classifier()
    finetune.train(exact, batches(3, 8, 8), replace(PLAIN, lr=1e-3))
    rows = finetune.train(model, batches(3, 8, 8), replace(PLAIN, lr=1e-3), precision="bf16")
    for (name, tensor), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert tensor.dtype == torch.float32
        assert (tensor - other).abs().max() < 0.015, name
    assert all(math.isfinite(row["loss"]) for row in rows)


# --- freezing ---------------------------------------------------------------------------------------


def test_frozen_weights_keep_their_bits() -> None:
    model = classifier()
    before = weights(model)
    frozen = finetune.freeze(model, [r"classification_head\..*"], blocks=2)
    finetune.train(model, batches(3, 8, 8), PLAIN)
    unchanged = {name for name, tensor in weights(model).items() if torch.equal(tensor, before[name])}
    assert unchanged == set(frozen)
    assert {"visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight"} < unchanged
    assert {name for name in unchanged if "resblocks" in name} == {
        name for name in before if "resblocks.0." in name or "resblocks.1." in name
    }


def test_statistics_of_frozen_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    finetune.freeze(model, [r"[01]\..*"])
    before = weights(model)
    seen: list[list[bool]] = []
    model[2].register_forward_hook(lambda *_: seen.append([m.training for m in model]))
    finetune.train(model, batches(7), PLAIN)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"3.weight", "3.bias"}
    assert seen[0] == [False, False, True, True]


@pytest.mark.parametrize(
    ("patterns", "blocks", "facts"),
    [
        (["visual"], 0, ""),
        (["("], 0, ""),
        ([], 4, "4 3"),
        ([], -1, "-1"),
        ([".*"], 0, ""),
    ],
)
def test_what_cannot_be_frozen_is_refused(patterns: list[str], blocks: int, facts: str) -> None:
    with refused(ValueError, *facts.split()):
        finetune.freeze(classifier(), patterns, blocks)


@pytest.mark.parametrize(
    ("name", "stem", "first"),
    [
        ("RN50", ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), "layer1"),
        ("convnext_base", ("trunk.stem",), "trunk.stages.0"),
        ("ViT-B-16-SigLIP", ("trunk.patch_embed", "trunk.pos_embed"), "trunk.blocks.0"),
    ],
)
def test_blocks_of_other_towers_are_found(name: str, stem: tuple[str, ...], first: str) -> None:
    with torch.device("meta"):
        model = ImageClassifier(architectures.visual(name), nn.Linear(4, 3))
    expected = [
        name
        for name, _ in model.named_parameters()
        if any(name == f"visual.{part}" or name.startswith(f"visual.{part}.") for part in (*stem, first))
    ]
    assert finetune.freeze(model, blocks=1) == expected


# --- errors -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_step_and_rate() -> None:
    data = batches(7)
    data.batches[1].images[0, 0] = math.nan
    with refused(finetune.Diverged, "mine", "1 of 6", "epoch 1", "0.00933"):
        finetune.train(small(), data, PLAIN, label="mine")


def test_training_that_cannot_work_is_refused() -> None:
    data = batches(7)
    with refused(ValueError, "fp16"):
        finetune.train(small(), data, PLAIN, precision="fp16")
    with refused(ValueError, "fp32", "tf32", "bf16", "fp16"):
        finetune.train(small(), data, PLAIN, precision="fp8")
    with refused(ValueError, "6", "2", "3"):
        finetune.train(small(), data, replace(PLAIN, warmup=6))
    with refused(ValueError, "float32", "0.weight", "torch.float64"):
        finetune.train(small().double(), data, PLAIN)
    with refused(ValueError):
        finetune.train(small().requires_grad_(False), data, PLAIN)
    with refused(ValueError):
        finetune.train(small(), Fixed([]), PLAIN)

    class Liar(Fixed):
        def __len__(self) -> int:
            return 4

    with refused(ValueError, "3", "4"):
        finetune.train(small(), Liar(data.batches), PLAIN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("epochs", 0),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("mixup", -1.0),
        ("augment", "rand-m31-n1"),
        ("augment", "flip"),
        ("warmup", -1),
        ("seed", 2**32),
        ("accumulate", 0),
        ("accumulate", 300),
        ("clip", 0.0),
        ("schedule", "step"),
        ("betas", (0.9, 1.0)),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: object) -> None:
    with refused(ValueError, field):
        Setting(**{field: value})  # type: ignore[arg-type]


def test_settings_of_another_type_are_refused() -> None:
    with refused(TypeError):
        Setting(epochs=2.0)  # type: ignore[arg-type]
    with refused(TypeError, "1"):
        Setting(lr="1")  # type: ignore[arg-type]


# --- grids ------------------------------------------------------------------------------------------


def test_names_tell_what_differs() -> None:
    assert Setting(lr=1e-5, epochs=4).name == "lr1e-5-ep4"
    assert Setting(lr=3.2e-4, epochs=16, batch_size=7).name == "lr3.2e-4-ep16"
    other = Setting(0.05, 1, 0.5, 0.1, 0.2, "rand-m9-n2", 10, 3)
    assert other.name == "lr0.05-ep1-wd0.5-ls0.1-mix0.2-rand-m9-n2-warm10-seed3"
    assert Setting(lr=1.0, epochs=1, weight_decay=0.0).name == "lr1-ep1-wd0"


def test_a_grid_is_the_product_of_its_options() -> None:
    made = finetune.grid({"lr": [1e-5, 3e-5], "epochs": [4], "seed": [0, 1]}, batch_size=32)
    assert list(made) == ["lr1e-5-ep4", "lr1e-5-ep4-seed1", "lr3e-5-ep4", "lr3e-5-ep4-seed1"]
    assert made["lr3e-5-ep4-seed1"] == Setting(lr=3e-5, epochs=4, seed=1, batch_size=32)
    assert list(finetune.grid({})) == [Setting().name]
    with refused(ValueError, "lr1e-5-ep8"):
        finetune.grid({"lr": [1e-5, 1e-5]})
    with refused(ValueError, "clip"):
        finetune.grid({"clip": [1.0]})
    with refused(ValueError):
        finetune.grid({"lr": []})


def test_random_settings_span_the_published_ranges() -> None:
    drawn = list(finetune.at_random(300, {"epochs": [4, 8]}).values())
    assert {setting.epochs for setting in drawn} == {4, 8}
    logs = np.log10([setting.lr for setting in drawn])
    assert -6 <= logs.min() < -5.9 and -4.1 < logs.max() <= -4 and abs(logs.mean() + 5) < 0.1
    for name, high in (("label_smoothing", 0.25), ("mixup", 0.9)):
        values = np.array([getattr(setting, name) for setting in drawn])
        assert 0.4 < (values == 0).mean() < 0.6 and values.max() <= high
    assert 0.4 < np.mean([setting.augment == "crop" for setting in drawn]) < 0.6
    assert list(finetune.at_random(3, {"epochs": [4, 8]}).values()) == drawn[:3]
    assert list(finetune.at_random(3, {}, 1).values()) != list(finetune.at_random(3, {}).values())
    assert [setting.seed for setting in drawn[:3]] == [0, 1, 2]


def test_data_go_by_the_name_of_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    words = "--arch a --zeroshot z --train t --out o --val . x=../far --ood ../near --no-clip".split()
    given = BUILDER.given(parser().parse_args(words))
    request = BUILDER.of(Request, given, settings={})
    assert request.val == {"far": Path("."), "x": Path("../far")} and request.ood == {"near": Path("../near")}
    assert BUILDER.fields(Setting, given) == {"clip": None}
    again = parser().parse_args([*words, "--val", "near", "y/near"])
    with pytest.raises(ValueError, match="--val: two data sets have the same name"):
        BUILDER.given(again)
    with pytest.raises(SystemExit):
        parser().parse_args([*words, "--clip", "2"])
