"""Stages of many kinds of models against the models' own forward passes, and against changed weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from support.wording import refused, warned
from torch import Tensor, nn

from rft_fast.clip.classifier import ImageClassifier, ZeroShotClassifier
from rft_fast.evaluate.stages import Stage, chains, stages, tokens

CLASSES = 5

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """Zero biases and unit gains would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.isfinite().all():
            tensor.data += 0.05 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def tower(**changes: Any) -> VisionTransformer:
    small = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(**{**small, "output_dim": 6, **changes})


def classified(visual: nn.Module, width: int = 6) -> ImageClassifier:
    return ImageClassifier(visual, nn.Linear(width, CLASSES))


def tokens_first() -> ImageClassifier:
    visual = tower()
    visual.transformer.batch_first = False
    for block in visual.transformer.resblocks:
        block.attn.batch_first = False
    return classified(visual)


def without_projection() -> ImageClassifier:
    visual = tower()
    visual.proj = None
    return classified(visual, 16)


def text_tower(**changes: Any) -> TextTransformer:
    small = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2, "output_dim": 6}
    return TextTransformer(**{**small, **changes})


def from_timm(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return model


def sequential() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, CLASSES))


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CUSTOM = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}
QUERIES = {"attn_pooler_queries": 4, "attn_pooler_heads": 2}

# Name -> how to make it, the size of its images (0: it takes tokens), its number of stages.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # conv1, class_embedding, positional_embedding, ln_pre, 2 * (attention, MLP), ln_post, proj, head
    "vit": (lambda: classified(tower()), 8, 11),
    "vit quick_gelu": (lambda: classified(tower(act_layer=QuickGELU)), 8, 11),
    "vit layer scale": (lambda: classified(tower(ls_init_value=0.2)), 8, 11),
    "vit without proj": (without_projection, 8, 10),
    "vit average": (lambda: classified(tower(pool_type="avg")), 8, 11),
    "vit ln after pool": (lambda: classified(tower(final_ln_after_pool=True)), 8, 11),
    "vit attentional": (lambda: classified(tower(attentional_pool=True, **QUERIES)), 8, 12),
    "vit parallel": (lambda: classified(tower(attentional_pool="parallel", output_dim=16), 16), 8, 12),
    "vit no ln_pre": (lambda: classified(tower(no_ln_pre=True)), 8, 10),
    "vit sine": (lambda: classified(tower(pos_embed_type="sin_cos_2d")), 8, 11),
    "vit patch dropout": (lambda: classified(tower(patch_dropout=0.5)), 8, 11),
    "vit custom blocks": (lambda: classified(tower(block_type="custom", **CUSTOM)), 8, 11),
    "vit tokens first": (tokens_first, 8, 11),
    "modified resnet": (lambda: classified(ModifiedResNet([1, 1, 1, 1], 16, 4, 32, 8), 16), 32, 13),
    "timm in open_clip": (
        lambda: classified(TimmModel("test_resnet", 6, proj="linear", pretrained=False)),
        32,
        12,
    ),
    "timm vit": (lambda: from_timm("vit_tiny_patch16_224", img_size=32, **SMALL), 32, 9),
    "timm siglip": (lambda: from_timm("vit_base_patch16_siglip_224", img_size=32, **SMALL), 32, 11),
    "timm distilled": (lambda: from_timm("deit_tiny_distilled_patch16_224", img_size=32, **SMALL), 32, 9),
    "timm convnext": (
        lambda: from_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        64,
        14,
    ),
    "timm resnet": (lambda: from_timm("test_resnet"), 32, 11),
    "timm efficientnet": (lambda: from_timm("test_efficientnet"), 32, 29),
    "timm swin": (
        lambda: from_timm(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(2, 2)
        ),
        56,
        8,
    ),
    "timm eva02": (lambda: from_timm("eva02_tiny_patch14_224", img_size=28, depth=2), 28, 9),
    "timm beit": (lambda: from_timm("beit_base_patch16_224", img_size=32, **SMALL), 32, 8),
    "timm fastvit": (
        lambda: from_timm("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
        64,
        22,
    ),
    "sequential": (sequential, 8, 4),
    "text": (text_tower, 0, 8),
    "text eos": (lambda: text_tower(pool_type="eos"), 0, 8),
    "text first, unmasked": (lambda: text_tower(pool_type="first", no_causal_mask=True), 0, 8),
    "text class token": (lambda: text_tower(embed_cls=True, pool_type="last"), 0, 6),
    "text padding mask": (lambda: text_tower(no_causal_mask=True, use_pad_mask=True), 0, 5),
}
SUNK = {"vit", "vit quick_gelu", "vit layer scale", "vit without proj", "vit ln after pool"}
SUNK |= {"vit sine", "vit patch dropout", "vit no ln_pre"}


def family(name: str) -> tuple[Any, Tensor]:
    """The model, and a batch of five for it."""
    torch.manual_seed(0)
    make, size, _ = FAMILIES[name]
    model = shaken(make())
    return model, torch.randn(5, 3, size, size) if size else torch.randint(1, 20, (5, 6))


def quietly(model: nn.Module, inputs: Tensor, exact: bool = True) -> tuple[Stage, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stages(model, inputs, exact=exact)
    assert (found.text, found.join, found.joined, found.prompts) == ((), None, (), None)
    return found.image


def run(chain: Sequence[Stage], inputs: Tensor) -> Tensor:
    x = inputs
    for stage in chain:
        x = stage.run(x, inputs)
    return x


def boundaries(chain: Sequence[Stage], inputs: Tensor) -> list[Tensor]:
    found = [inputs]
    for stage in chain:
        found.append(stage.run(found[-1], inputs))
    return found


@pytest.mark.slow(only="^(modified resnet|timm resnet|timm fastvit)$")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_bits_as_the_forward_pass(name: str) -> None:
    model, inputs = family(name)
    chain = quietly(model, inputs[:2])
    assert len(chain) == FAMILIES[name][2]
    with torch.inference_mode():
        found = boundaries(chain, inputs)
        assert torch.equal(found[-1], model(inputs)) and found[-1].isfinite().all()
        assert all(len(x) == 5 for x in found)
        for k, stage in enumerate(chain):
            x, kept = found[k].clone(), inputs.clone()
            again = stage.run(x, inputs if stage.reads_inputs or not k else torch.full_like(inputs, 7))
            assert torch.equal(again, found[k + 1])
            assert torch.equal(x, found[k]) and torch.equal(inputs, kept)  # nothing is changed in place
        assert torch.equal(run(chain, inputs[:1]), model(inputs[:1]))


@pytest.mark.slow(only="^(timm in open_clip|timm vit|timm efficientnet|timm eva02|timm fastvit)$")
@pytest.mark.parametrize("name", FAMILIES)
def test_by_default_the_same_numbers_up_to_rounding(name: str) -> None:
    model, inputs = family(name)
    chain = quietly(model, inputs[:2], exact=False)
    assert len(chain) == FAMILIES[name][2]
    with torch.inference_mode():
        got, expected = run(chain, inputs), model(inputs)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        if name in SUNK:  # the last block's attention and MLP each give one token
            late = [x.shape[1:] for x in boundaries(chain, inputs) if x.ndim == 3 and x.shape[1] == 1]
            assert late == [(1, 16)] * (1 if name == "vit ln after pool" else 2)
        for x in boundaries(chain, inputs)[1:-1]:  # no boundary holds on to a larger tensor
            assert x.nbytes >= x.untyped_storage().nbytes()


@pytest.mark.slow(but="^(vit patch|sequential)")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_weight_is_seen_by_the_stages_that_name_it_alone(name: str, exact: bool) -> None:
    model, inputs = family(name)
    inputs = inputs[:3]
    chain = quietly(model, inputs, exact)
    with torch.inference_mode():
        before = boundaries(chain, inputs)
    for weight, tensor in (*model.named_parameters(), *model.named_buffers()):
        named = [k for k, stage in enumerate(chain) if any(tensor is other for other in stage.tensors)]
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            continue
        was = tensor.detach().clone()
        torch.manual_seed(1)
        tensor.data += 0.05 * torch.rand_like(tensor)
        with torch.inference_mode():
            changed = [
                k
                for k, stage in enumerate(chain)
                if not torch.equal(stage.run(before[k], inputs), before[k + 1])
            ]
            first = min(named, default=0)
            x = before[first]
            for stage in chain[first:]:
                x = stage.run(x, inputs)
            expected = model(inputs)
        assert changed == named, (weight, named, changed)
        # Some are never used; and a bias of all keys is no more than rounding in a softmax.
        if not weight.endswith("k_bias"):
            assert torch.equal(x, before[-1]) == (not named), weight
        assert (x - expected).abs().max() <= (0 if exact else 1e-5) * expected.abs().max(), weight
        tensor.data.copy_(was)


def test_stages_begin_right_before_layers() -> None:
    model, inputs = family("vit")
    chain = quietly(model, inputs)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    got = [[names[id(tensor)] for tensor in stage.tensors] for stage in chain]
    block = "visual.transformer.resblocks."
    attention = ("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias")
    attention += ("attn.out_proj.weight", "attn.out_proj.bias")
    mlp = [f"ln_2.{n}" for n in ("weight", "bias")]
    mlp += [f"mlp.{m}.{n}" for m in ("c_fc", "c_proj") for n in ("weight", "bias")]
    assert got == [
        ["visual.conv1.weight"],
        ["visual.class_embedding"],
        ["visual.positional_embedding"],
        ["visual.ln_pre.weight", "visual.ln_pre.bias"],
        [f"{block}0.{n}" for n in attention],
        [f"{block}0.{n}" for n in mlp],
        [f"{block}1.{n}" for n in attention],
        [f"{block}1.{n}" for n in mlp],
        ["visual.ln_post.weight", "visual.ln_post.bias"],
        ["visual.proj"],
        ["classification_head.weight", "classification_head.bias"],
    ]
    with torch.inference_mode():  # the head needs normalised features and nothing else
        features = boundaries(chain, inputs)[-2]
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))


# --- what forward passes may do -------------------------------------------------------------------


class Model(nn.Module):
    """Two layers and a head on flattened images; subclasses say how they go together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)


class AddsInPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x += self.second(x)
        x.mul_(2)
        return self.third(x)


class ChangesItsInput(Model):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        x.mul_(3)
        return self.third(self.second(self.first(flat)))


class MasksInPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1) > 0
        mask = torch.zeros_like(bright, dtype=torch.float32)
        mask.masked_fill_(bright, 2.0)  # its result is not used
        return self.third(self.second(self.first(x.flatten(1)) * mask) * mask)


class MasksThroughAView(Model):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x.flatten(1))
        half = mask[:, :6]
        half.zero_()
        return self.third(self.second(self.first(x.flatten(1)) * mask) * mask)


class LooksBack(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x.flatten(1)))
        return self.third(y + x.flatten(1))


class Sizes(Model):
    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        y = self.first(x.reshape(n, channels * height * width)).to(self.third.weight.dtype)
        y = y.new_zeros(n, y.shape[1]) + self.second(y / math.sqrt(2)) * height
        return self.third(y.view(y.size(0), -1))


class SizeAcross(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        width = x.shape[1]  # alive until the end
        return self.third(self.second(x)) / width


class BatchElsewhere(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).t()
        x = torch.cat([x, x], 0) + self.second.bias.repeat(2)[:, None]
        x = x.t().reshape(-1, 12)  # two rows for every image
        return self.third(self.second(x)).view(-1, 2, CLASSES)[:, 0]


class Doubled(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return self.third(self.second(self.first(torch.cat([y, -y]))))[: x.shape[0]]


class KeepsWhatItComputes(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.second(self.first(x.flatten(1)))
        return self.third(self.features)


class Tied(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.third(nn.functional.linear(self.second(self.first(x.flatten(1))), self.first.weight))


class Constant(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x.flatten(1)) + torch.arange(12.0)))


class Unused(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        self.second(x)
        return self.third(x)


ODD: dict[type[Model], list[str]] = {  # what each stage reads
    AddsInPlace: ["first", "second", "third"],
    ChangesItsInput: ["first", "second", "third"],
    MasksInPlace: ["first", "second", "third"],
    MasksThroughAView: ["first second", "third"],
    LooksBack: ["first", "second", "third"],
    Sizes: ["first", "second", "third"],
    SizeAcross: ["first", "second third"],
    Doubled: ["first second third"],
    KeepsWhatItComputes: ["first", "second", "third"],
    BatchElsewhere: ["first", "second", "second third"],
    Tied: ["first", "second", "first", "third"],
    Constant: ["first", "second", "third"],
    Unused: ["first", "third"],
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("exact", [True, False])
def test_what_forward_passes_may_do(kind: type[Model], exact: bool) -> None:
    model = kind().eval()
    images = torch.randn(5, 3, 2, 2)
    if len(ODD[kind]) == 1:
        with warned(UserWarning, kind.__name__):
            chain = stages(model, images, exact).image
        assert [stage.tensors for stage in chain] == [()]
    else:
        chain = quietly(model, images, exact)
        names = {id(tensor): name.split(".")[0] for name, tensor in model.named_parameters()}
        got = [" ".join(dict.fromkeys(names[id(t)] for t in stage.tensors)) for stage in chain]
        assert got == ODD[kind]
        for stage in chain:
            assert len({id(t) for t in stage.tensors}) == len(stage.tensors)
    assert all(isinstance(value, Tensor) for name, value in vars(model).items() if name == "features")
    with torch.inference_mode():
        expected, kept = model(images.clone()), images.clone()
        found = boundaries(chain, images) if len(chain) > 1 else [images, run(chain, images.clone())]
        assert torch.equal(found[-1], expected)
        for k, stage in enumerate(chain):
            if len(chain) > 1:
                x = found[k].clone()
                assert torch.equal(stage.run(x, images), found[k + 1]) and torch.equal(x, found[k])
        assert torch.equal(images, kept)
    if kind is LooksBack:
        assert [stage.reads_inputs for stage in chain] == [False, True, False]


def test_the_model_stays_as_it_was() -> None:
    model = Constant().train()
    model.second.eval()
    before = dict(vars(model)), set(model.state_dict()), [m.training for m in model.modules()]
    weights = [tensor.clone() for tensor in model.parameters()]
    quietly(model, torch.randn(2, 3, 2, 2), exact=False)
    assert before == (dict(vars(model)), set(model.state_dict()), [m.training for m in model.modules()])
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_tracing_is_in_eval_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    kept = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    images = torch.randn(4, 3, 2, 2)
    chain = quietly(model, images)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    model.eval()
    assert len(chain) == 3 and torch.equal(run(chain, images), model(images))


def test_weights_and_buffers_are_looked_up_when_a_stage_runs() -> None:
    class Buffered(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.rand(12))
            self.shift = nn.Parameter(torch.rand(12))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1)) * self.gain.exp()  # of a buffer alone
            return self.third(self.second(x + self.shift))

    model = Buffered().eval()
    images = torch.randn(3, 3, 2, 2)
    chain = quietly(model, images)
    with torch.inference_mode():
        old = model(images)
    model.gain.mul_(3)
    model.shift.data.add_(1)
    with torch.inference_mode():
        assert torch.equal(run(chain, images), model(images)) and not torch.equal(model(images), old)
    model.gain = torch.rand(12)  # replaced, as Module.to does
    model.shift = nn.Parameter(torch.rand(12))
    model.second = nn.Linear(12, 12)
    with torch.inference_mode():
        assert torch.equal(run(chain, images), model(images))


class HalfOfTheTime(nn.Module):
    """What it does depends on the values: torch.fx cannot trace it."""

    def __init__(self, model: nn.Module | None = None, other: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = nn.Linear(12, 12) if model is None else model
        self.others = [other]  # unseen by nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        y: Tensor = self.model(x)
        return y if self.others[0] is None else y + self.others[0].bias


def test_what_cannot_be_traced_is_one_stage_with_a_warning() -> None:
    model = HalfOfTheTime(Tied()).eval()
    images = torch.randn(4, 3, 2, 2)
    with warned(UserWarning, "HalfOfTheTime", "torch.fx", "TraceError") as caught:
        chain = stages(model, images).image
    assert len(caught) == 1
    (only,) = chain
    assert only.tensors == () and not only.reads_inputs
    for x in (images, -images):
        assert torch.equal(only.run(x, x), model(x))
    model.model.third.bias.data += 1
    assert torch.equal(only.run(images, images), model(images))


def test_a_part_that_cannot_be_traced_is_called_as_a_whole() -> None:
    inner = HalfOfTheTime()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), inner, nn.Linear(12, 12), nn.Linear(12, 3)).eval()
    images = torch.randn(4, 3, 2, 2)
    chain = quietly(model, images)
    assert [len(stage.tensors) for stage in chain] == [2, 2, 2, 2]
    assert chain[1].tensors == (inner.model.weight, inner.model.bias)
    for x in (images, -images):
        assert torch.equal(run(chain, x), model(x))


def test_weights_that_a_part_reads_behind_the_back_of_its_owner_are_named() -> None:
    last = nn.Linear(12, 12)
    inner = HalfOfTheTime(other=last)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), inner, last).eval()
    chain = quietly(model, torch.randn(4, 3, 2, 2))
    assert any(tensor is last.bias for tensor in chain[1].tensors)
    assert not any(tensor is last.weight for tensor in chain[1].tensors)


def test_weights_are_never_made_constants() -> None:
    class Sly(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self._parameters["weight"].abs().t()  # not seen by torch.fx

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sly, self.last = Sly(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.sly(x.flatten(1)))
            return y

    Sly.__module__ = "elsewhere"  # not one of torch's own, which are never looked into
    model = Outer().eval()
    images = torch.randn(4, 3, 2, 2)
    chain = quietly(model, images)
    assert any(tensor is model.sly.weight for tensor in chain[0].tensors) and len(chain) == 2
    model.sly.weight.data.mul_(3)
    assert torch.equal(run(chain, images), model(images))


@pytest.mark.parametrize("back", [True, False])
def test_stages_that_compute_other_numbers_are_refused(back: bool) -> None:
    class Feels(Model):
        def forward(self, x: Tensor) -> Tensor:
            traced = not isinstance(x, Tensor)
            y: Tensor = self.third(self.second(self.first(x.flatten(1))))
            return y * (1 + 1e-6 * traced) if back else y + traced

    model = Feels().eval()
    with warned(UserWarning, "Feels"):
        (only,) = stages(model, torch.randn(2, 3, 2, 2)).image
    assert only.tensors == ()


class OtherKernels(nn.Module):
    """Its forward pass is a little off from what it is when traced, as if by a library's other kernels."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, CLASSES))
        self.off = off

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y if isinstance(x, torch.fx.Proxy) else y * (1 + self.off)


@pytest.mark.parametrize(
    ("dtype", "off", "near"),
    [
        (torch.float32, 5e-7, True),
        (torch.float32, 5e-6, True),
        (torch.float32, 5e-5, False),
        (torch.bfloat16, 2e-2, True),
        (torch.bfloat16, 0.2, False),
        (torch.float16, 5e-3, True),
        (torch.float16, 5e-2, False),
    ],
)
def test_a_gpus_stages_may_be_rounded_otherwise_a_cpus_may_not(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, off: float, near: bool
) -> None:
    model, images = shaken(OtherKernels(off)).to(dtype), torch.rand(2, 3, 8, 8).to(dtype)
    with warned(UserWarning, "OtherKernels"):
        assert len(stages(model, images).image) == 1
    monkeypatch.setattr(chains, "EXACT", ())  # as if the CPU were another kind of device
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = stages(model, images).image
    assert (len(found), len(said)) == ((2, 0) if near else (1, 1))


NARROW = {"image_size": 8, "patch_size": 2, "width": 32, "heads": 2, "output_dim": 8}
VIT_L = {"image_size": 224, "patch_size": 14, "width": 1024, "heads": 16, "output_dim": 768}


@pytest.mark.slow(only="^cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_vit_l_has_more_than_40_stages(device: str, dtype: torch.dtype) -> None:
    """On a GPU in full size; one bit of difference used to make it one stage, at half the speed."""
    size = VIT_L if device == "cuda" else NARROW
    torch.manual_seed(0)
    with torch.device(device):
        visual = VisionTransformer(layers=24, mlp_ratio=4.0, **size)
        model = ImageClassifier(visual.to(dtype), nn.Linear(size["output_dim"], CLASSES)).eval()
        images = torch.rand(2, 3, size["image_size"], size["image_size"]).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(stages(model, images).image) > 40


def test_a_model_that_changes_itself_is_one_stage() -> None:
    class Counts(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            y: Tensor = self.third(self.second(self.first(x.flatten(1))))
            return y

    with warned(UserWarning, "Counts"):
        (only,) = stages(Counts().eval(), torch.randn(2, 3, 2, 2)).image
    assert only.tensors == ()


def test_not_a_number_is_no_difference() -> None:
    model, images = family("vit")
    model.classification_head.bias.data[1] = math.nan
    model.classification_head.bias.data[2] = math.inf
    for exact in (True, False):
        chain = quietly(model, images, exact)
        assert len(chain) == 11 and run(chain, images)[:, 1].isnan().all()


def test_running_out_of_memory_is_not_hidden() -> None:
    class Greedy(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Greedy.calls += 1
            if x.sum() == 0 or Greedy.calls > 4:
                raise torch.OutOfMemoryError("not enough")
            return x.flatten(1)

    with pytest.raises(torch.OutOfMemoryError, match="not enough"):
        stages(nn.Sequential(Greedy(), nn.Linear(12, 3), nn.Linear(3, 3)).eval(), torch.randn(2, 3, 2, 2))
    assert Greedy.calls == 5


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        stages(Tied(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 2, 2), torch.tensor(1.0), [1]])
def test_an_example_without_a_batch_is_refused(images: Any) -> None:
    with refused(ValueError):
        stages(Tied(), images)


def test_one_image_is_example_enough() -> None:
    model, images = family("vit")
    chain = quietly(model, images[:1])
    assert len(chain) == 11 and torch.equal(run(chain, images), model(images))


def test_one_layer_is_one_stage_and_no_reason_to_warn() -> None:
    model = nn.Linear(4, 3).eval()
    (only,) = quietly(model, torch.randn(2, 4))
    assert only.tensors == (model.weight, model.bias)


def test_other_results_than_a_tensor_are_one_stage() -> None:
    with warned(UserWarning, "VisionTransformer"):
        (only,) = stages(tower(output_tokens=True).eval(), torch.randn(2, 3, 8, 8)).image
    assert only.tensors == ()


def test_hooks_are_part_of_the_model() -> None:
    model, images = family("vit")
    plain = model(images)
    model.visual.ln_post.register_forward_hook(lambda module, args, out: out * 2 + 1)
    model.visual.conv1.register_forward_hook(lambda module, args, out: out + 1)
    chain = quietly(model, images)
    assert torch.equal(run(chain, images), model(images)) and not torch.equal(model(images), plain)


@pytest.mark.slow(only="^modified resnet$")
@pytest.mark.parametrize("name", ["vit", "text padding mask", "modified resnet"])
def test_threads_do_not_disturb_each_other(name: str) -> None:
    model, inputs = family(name)
    chain = quietly(model, inputs, exact=False)
    batches = [inputs[[i % 5, (i * 2) % 5]] for i in range(24)]
    expected = [run(chain, batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for got, wanted in zip(pool.map(lambda batch: run(chain, batch), batches), expected, strict=True):
            assert torch.equal(got, wanted)


def test_made_under_inference_mode() -> None:
    model, images = family("vit")
    with torch.inference_mode():
        chain = quietly(model, images.clone(), exact=False)
        inside = run(chain, images)
    torch.testing.assert_close(run(chain, images), inside)
    assert run(chain, images).requires_grad


@pytest.mark.slow(only="timm")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["vit layer scale", "vit quick_gelu", "timm vit", "timm resnet"])
def test_gradients_once_and_twice(name: str, exact: bool) -> None:
    model, inputs = family(name)
    model, inputs = model.double(), inputs.double()
    chain = quietly(model, inputs, exact)
    weights = list(model.parameters())
    torch.manual_seed(2)
    directions = [torch.randn_like(weight) for weight in weights]

    def derivatives(compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = nn.functional.cross_entropy(compute(inputs), torch.arange(5) % CLASSES)
        first = torch.autograd.grad(loss, weights, create_graph=True)
        return [*first, *torch.autograd.grad(first, weights, directions)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got, expected = derivatives(lambda x: run(chain, x)), derivatives(model)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert sum(b.abs().sum() for b in expected[len(weights) :]) > 1


# --- one token instead of all ---------------------------------------------------------------------


class Tokens(nn.Module):
    """A block of self-attention and MLP, pooled by ``pool``."""

    def __init__(self, pool: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = pool
        self.mask = options.pop("mask", None)
        self.embed = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        x = x + self.mlp(x)
        logits: Tensor = self.head(self.pool(x))
        return logits


SELECTIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {  # tokens at each boundary
    "first": (lambda x: x[:, 0], [5, 5, 1, 1]),
    "last": (lambda x: x[:, -1], [5, 5, 1, 1]),
    "middle": (lambda x: x[:, 2, :], [5, 5, 1, 1]),
    "mean": (lambda x: x.mean(1), [5, 5, 5]),
    "two": (lambda x: x[:, 0] + x[:, 1], [5, 5, 5]),
    "softmax over tokens": (lambda x: x.softmax(1)[:, 0], [5, 5, 5]),
    "width": (lambda x: x.mT[:, 0, :1].expand(-1, 8), [5, 5, 5]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_one_token_is_computed_where_one_is_needed(name: str) -> None:
    pool, tokens = SELECTIONS[name]
    model = shaken(Tokens(pool))
    x = torch.randn(4, 5, 3)
    chain = quietly(model, x, exact=False)
    with torch.inference_mode():
        torch.testing.assert_close(run(chain, x), model(x), rtol=1e-5, atol=1e-6)
        got = [y.shape[1] for y in boundaries(chain, x)[1:-1] if y.ndim == 3]
    assert got[0] == 5 and (1 in got) == (1 in tokens), got


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_is_computed_in_half_precision_too(dtype: torch.dtype) -> None:
    """Whose logits are in float32, as those of a live model are."""
    torch.manual_seed(0)
    visual = VisionTransformer(8, 4, 64, 2, 4, 4.0, output_dim=32)
    model = shaken(ImageClassifier(visual, nn.Linear(32, CLASSES)).eval())
    model.visual.to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    chain = quietly(model, x, exact=False)
    with torch.inference_mode():
        logits = model(x)
        assert logits.dtype == torch.float32
        assert (run(chain, x) - logits).abs().max() <= 8 * torch.finfo(dtype).eps * logits.abs().max()
        got = [y.shape[1] for y in boundaries(chain, x)[1:-1] if y.ndim == 3]
    assert 5 in got and 1 in got, got


@pytest.mark.parametrize(
    ("options", "late"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"batch_first": False}, False),
        ({"add_bias_kv": True}, False),
        ({"add_zero_attn": True}, False),
        ({"kdim": 8, "vdim": 8}, True),
        ({"dropout": 0.5}, True),
        ({"mask": torch.zeros(5, 5)}, False),
        ({"mask": torch.full((5, 5), -math.inf).triu(1)}, False),
    ],
)
def test_attention_of_other_kinds(options: dict[str, Any], late: bool) -> None:
    """late: whether attention is computed for one query; the MLP is in any case."""
    model = shaken(Tokens(lambda x: x[:, 0], **options))
    x = torch.randn(5, 5, 3)
    chain = quietly(model, x, exact=False)
    with torch.inference_mode():
        torch.testing.assert_close(run(chain, x), model(x), rtol=1e-5, atol=1e-6)
    calls: list[int] = []
    model.attn.register_forward_pre_hook(lambda module, args: calls.append(1))
    run(chain, x)
    assert (calls == []) == late


def test_attention_for_one_token_is_attention() -> None:
    torch.manual_seed(0)
    attn = shaken(nn.MultiheadAttention(12, 3, batch_first=True)).double()
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    q, k, v = (x @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weights = (q[:, 2:3, part] @ k[..., part].mT / 2).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
    expected = torch.cat(heads, -1) @ attn.out_proj.weight.T + attn.out_proj.bias
    weights = (attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)
    torch.testing.assert_close(tokens.attend(x[:, 2:3], x, *weights, 3), expected)


@pytest.mark.slow(only="^<lambda>0$")
@pytest.mark.parametrize("wrong", [lambda q, *rest: q * 0.5, lambda *all: 1 / 0])
def test_a_shortcut_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    model, images = family("vit")
    monkeypatch.setattr(tokens, "attend", wrong)
    chain = quietly(model, images, exact=False)
    with torch.inference_mode():
        assert len(chain) == 11 and torch.equal(run(chain, images), model(images))


# --- both towers ----------------------------------------------------------------------------------


def both(visual: nn.Module | None = None, text: nn.Module | None = None) -> ZeroShotClassifier:
    torch.manual_seed(0)
    prompts = torch.randint(1, 20, (3, 2, 6))
    towers = (tower() if visual is None else visual, text_tower() if text is None else text)
    return shaken(ZeroShotClassifier(*towers, prompts, nn.Parameter(torch.tensor(1.0))))


@pytest.mark.slow(only="^False$")
@pytest.mark.parametrize("exact", [True, False])
def test_both_towers_are_chains_that_join(exact: bool) -> None:
    model = both()
    images = torch.randn(4, 3, 8, 8)
    found = stages(model, images[:2], exact)
    assert (len(found.image), len(found.text)) == (10, 8)
    assert found.prompts is not None and torch.equal(found.prompts, model.prompts.view(6, 6))
    assert (
        len(found.joined) == 1
        and found.joined[0] is model.logit_scale
        and found.join is not None
        and found.head is not None
    )
    with torch.inference_mode():
        features, text = run(found.image, images), run(found.text, found.prompts)
        assert features.shape == (4, 6) and text.shape == (6, 6)
        torch.testing.assert_close(
            found.join(features, found.head(text)), model(images), rtol=1e-5, atol=1e-6
        )
        # Prompts do not depend on their neighbours.
        parts = [run(found.text, part) for part in found.prompts.split(4)]
        torch.testing.assert_close(torch.cat(parts), text)


@pytest.mark.slow
def test_a_change_in_one_tower_leaves_the_other_alone() -> None:
    model = both()
    images = torch.randn(4, 3, 8, 8)
    found = stages(model, images)
    assert found.prompts is not None and found.join is not None and found.head is not None
    with torch.inference_mode():
        held = boundaries(found.image, images), boundaries(found.text, found.prompts)
    where = {}
    for chain, parts in enumerate((found.image, found.text)):
        for k, stage in reversed(list(enumerate(parts))):
            where |= {id(tensor): (chain, k) for tensor in stage.tensors}
    for name, tensor in model.named_parameters():
        was = tensor.detach().clone()
        torch.manual_seed(1)
        tensor.data += 0.1 * torch.rand_like(tensor)
        with torch.inference_mode():
            ends = [held[0][-1], held[1][-1]]
            if name != "logit_scale":
                chain, k = where[id(tensor)]
                assert chain == name.startswith("text."), name
                inputs, x = held[chain][0], held[chain][k]
                for stage in (found.image, found.text)[chain][k:]:
                    x = stage.run(x, inputs)
                assert not torch.equal(x, ends[chain]), name
                ends[chain] = x
            torch.testing.assert_close(
                found.join(ends[0], found.head(ends[1])), model(images), rtol=1e-5, atol=1e-6, msg=name
            )
        tensor.data.copy_(was)


@pytest.mark.slow
def test_one_tower_may_be_one_stage() -> None:
    model = both(text=Opaque(text_tower()))
    images = torch.randn(4, 3, 8, 8)
    with warned(UserWarning, "Opaque"):
        found = stages(model, images)
    assert (len(found.image), len(found.text)) == (10, 1)
    assert found.join is not None and found.prompts is not None
    with torch.inference_mode():
        got = found.join(run(found.image, images), found.head(run(found.text, found.prompts)))
        torch.testing.assert_close(got, model(images), rtol=1e-5, atol=1e-6)


class Opaque(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y if y.isnan().any() else y * 2


def test_a_kind_of_both_towers_with_a_forward_of_its_own_is_taken_as_it_is() -> None:
    class Louder(ZeroShotClassifier):
        def forward(self, images: Tensor) -> Tensor:
            return 3 * super().forward(images)

    torch.manual_seed(0)
    scale = nn.Parameter(torch.tensor(1.0))
    model = shaken(Louder(tower(), text_tower(), torch.randint(1, 20, (3, 2, 6)), scale))
    images = torch.randn(4, 3, 8, 8)
    with warned(UserWarning, "Louder"):  # its loop over prompts is not traced
        found = stages(model, images, exact=True)
    assert found.text == () and torch.equal(run(found.image, images), model(images))
