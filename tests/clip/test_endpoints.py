"""Ends and live models against the wrappers that fine-tuning repositories evaluate with, rebuilt here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from support.wording import refused, warned
from torch import Tensor, nn

from rft_fast import Path as WeightPath
from rft_fast.checkpoints import Activation, Tensors
from rft_fast.clip import architectures, classifier, matching
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.clip.heads import zeroshot_head
from rft_fast.clip.prompts import Prompts

State = dict[str, Tensor]

EMBED = 12
CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
}
PROMPTS = Prompts(("tench", "dog", "great white shark"), ("a photo of a {}.", "the {}", "art of a {}!"))
CLASSES = len(PROMPTS.class_names)
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(9))
HEAD_WEIGHT, HEAD_BIAS = "classification_head.weight", "classification_head.bias"


@pytest.fixture
def arch(tmp_path: Path) -> str:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(CONFIG))
    return str(file)


def clip(seed: int, config: dict[str, Any] = CONFIG, kind: Any = open_clip.CLIP) -> Any:
    torch.manual_seed(seed)
    model = kind(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
        model.logit_scale.fill_(3.0 + seed / 10)
    return model


def checkpoint(seed: int) -> State:
    return {name: tensor.clone() for name, tensor in clip(seed).state_dict().items()}


def head(seed: int, rows: int = CLASSES) -> State:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(rows, EMBED, generator=generator), torch.randn(rows, generator=generator)
    return {HEAD_WEIGHT: weight, HEAD_BIAS: bias}


def soup(seed: int) -> State:
    """As model-soups' files are, once under canonical names."""
    state = {n: t for n, t in checkpoint(seed).items() if not n.startswith("transformer.")}
    return {**state, **head(seed)}


def between(a: State, b: State, alpha: float) -> State:
    """The line, in float64."""
    return {n: ((1 - alpha) * a[n].double() + alpha * b[n].double()).float() for n in a}


def open_clip_head(model: Any, scale: float | None = None) -> Tensor:
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    columns = build_zero_shot_classifier(model, tokenizer, PROMPTS.class_names, PROMPTS.templates)
    factor = model.logit_scale.exp() if scale is None else scale
    return (factor * columns.T).detach()


def check_path(ends: Ends, pair: tuple[State, State], truth: Callable[[float], Tensor]) -> None:
    """truth: alpha -> logits, of the other side."""
    path = WeightPath(ends.live, *pair)
    seen = []
    for alpha in (0.0, 0.4, 1.0):
        path.write(alpha)
        with torch.no_grad():
            got = ends.live(IMAGES)
        expected = truth(alpha)
        assert got.shape == (len(IMAGES), CLASSES)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        seen.append(expected)
    assert (seen[0] - seen[1]).abs().max() > 0.1 < (seen[1] - seen[2]).abs().max()


# --- the other side, written out ----------------------------------------------------------------------


class SoupWrapper(nn.Module):
    """Model soups: the model, then a linear head on its normalised features."""

    def __init__(self, model: Any, features: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.classification_head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.encode_image(images)
        features = features / features.norm(dim=-1, keepdim=True)
        logits: Tensor = self.classification_head(features)
        return logits


class NormalizingHead(nn.Linear):
    """WiSE-FT's and task vectors' head: it normalises its input itself."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs / inputs.norm(dim=-1, keepdim=True))


class ImageEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(images)
        return features


class WiseClassifier(nn.Module):
    """WiSE-FT: an image encoder, which holds the whole CLIP, and a normalising head."""

    def __init__(self, model: Any, features: int, classes: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(model)
        self.classification_head = NormalizingHead(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classification_head(self.image_encoder(images))
        return logits


class CLIPEncoder(nn.Module):
    """FLYP: the whole CLIP; its zero-shot head is made again from text for every evaluation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def classify(self, images: Tensor) -> Tensor:
        tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
        rows = []
        for name in PROMPTS.class_names:
            texts = tokenizer([template.format(name) for template in PROMPTS.templates])
            embeddings = self.model.encode_text(texts)
            embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
            row = embeddings.mean(dim=0, keepdim=True)
            rows.append(row / row.norm())
        weights = torch.cat(rows) * self.model.logit_scale.exp()
        return F.normalize(self.model.encode_image(images), dim=-1) @ weights.T


def evaluated(wrapper: nn.Module, state: State, prefix: str) -> Tensor:
    """The wrapper's logits with these canonical weights."""
    own = {n if n.startswith("classification_head") else prefix + n: t for n, t in state.items()}
    missing, unexpected = wrapper.load_state_dict(own, strict=False)
    assert not unexpected and all("transformer." in name and "visual" not in name for name in missing)
    with torch.no_grad():
        logits: Tensor = wrapper.classify(IMAGES) if isinstance(wrapper, CLIPEncoder) else wrapper(IMAGES)
    return logits


def along(wrapper: nn.Module, a: State, b: State, prefix: str) -> Callable[[float], Tensor]:
    return lambda alpha: evaluated(wrapper, between(a, b, alpha), prefix)


# --- wrappers -----------------------------------------------------------------------------------------


def test_model_soups(arch: str) -> None:
    zero, tuned = soup(0), soup(1)
    ends = Ends(Setup(arch), zero)
    wrapper = SoupWrapper(clip(7), EMBED, CLASSES).eval()
    check_path(
        ends, ends.pair(tuned), lambda alpha: evaluated(wrapper, between(zero, tuned, alpha), "model.")
    )
    assert ends.classes == CLASSES and set(ends.zeroshot) == set(ends.live.state_dict())
    assert set(ends.inert) == set(zero) - set(ends.zeroshot)


def test_wise_ft(arch: str) -> None:
    """The zero-shot file is CLIP alone, the fine-tuned ones have a head; both ends as WiSE-FT makes them."""
    zero, tuned = checkpoint(0), {**checkpoint(1), **head(1)}
    ends = Ends(Setup(arch, prompts=PROMPTS), zero)
    start = {**zero, HEAD_WEIGHT: open_clip_head(clip(0)), HEAD_BIAS: torch.zeros(CLASSES)}
    wrapper = WiseClassifier(clip(7), EMBED, CLASSES).eval()
    check_path(ends, ends.pair(tuned), along(wrapper, start, tuned, "image_encoder.model."))


@pytest.mark.slow
def test_flyp(arch: str) -> None:
    """Both towers on the path: the truth encodes the prompts anew with interpolated weights."""
    zero, tuned = checkpoint(0), checkpoint(3)
    ends = Ends(Setup(arch, towers="both", prompts=PROMPTS), zero)
    wrapper = CLIPEncoder(clip(7)).eval()
    check_path(
        ends, ends.pair(tuned), lambda alpha: evaluated(wrapper, between(zero, tuned, alpha), "model.")
    )
    assert isinstance(ends.live, classifier.ZeroShotClassifier)
    assert set(ends.zeroshot) == set(ends.live.state_dict())
    assert not ends.live.training and ends.classes == CLASSES


def test_flyp_with_fixed_heads(arch: str) -> None:
    """The image tower alone on the path: each end's head is what its own text tower makes."""
    zero, tuned = checkpoint(0), checkpoint(3)
    ends = Ends(Setup(arch, prompts=PROMPTS), zero)
    heads = {HEAD_BIAS: torch.zeros(CLASSES)}
    a = {**zero, HEAD_WEIGHT: open_clip_head(clip(0)), **heads}
    b = {**tuned, HEAD_WEIGHT: open_clip_head(clip(3)), **heads}
    wrapper = SoupWrapper(clip(7), EMBED, CLASSES).eval()
    check_path(ends, ends.pair(tuned), along(wrapper, a, b, "model."))


@pytest.mark.slow
def test_custom_text_models(arch: str, tmp_path: Path) -> None:
    """open_clip's layout `text.*`, and with it pooling, masks and a projection with a bias."""
    text = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text}, "init_logit_bias": -10.0}
    Path(arch).write_text(json.dumps({**config, "custom_text": True}))
    model, tuned = (clip(seed, config, open_clip.CustomTextCLIP) for seed in (0, 1))
    ends = Ends(Setup(arch, towers="both", prompts=PROMPTS), model.state_dict())
    pair = ends.pair(tuned.state_dict())
    wrapper = CLIPEncoder(clip(7, config, open_clip.CustomTextCLIP)).eval()
    assert ends.inert == {"logit_bias": "logit bias: the same for every class"}
    check_path(ends, pair, along(wrapper, model.state_dict(), tuned.state_dict(), "model."))


# --- heads --------------------------------------------------------------------------------------------


def test_zeroshot_head_is_open_clips(arch: str) -> None:
    for seed, scale in ((0, None), (1, 100.0)):
        got = zeroshot_head(arch, checkpoint(seed), PROMPTS, scale)
        assert got.dtype == torch.float32 and got.shape == (CLASSES, EMBED) and not got.requires_grad
        torch.testing.assert_close(got, open_clip_head(clip(seed), scale), rtol=1e-5, atol=1e-5)


def test_many_classes_go_in_parts(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zeroshot_head(arch, checkpoint(0), PROMPTS)
    for batch in (1, 6, 7):
        monkeypatch.setattr("rft_fast.clip.heads.BATCH", batch)
        torch.testing.assert_close(zeroshot_head(arch, checkpoint(0), PROMPTS), expected)


def test_half_precision_weights_and_scales_of_either_shape(arch: str) -> None:
    """OpenAI's files mix float16 and float32; open_clip's logit_scale is 0-d or [1]."""
    half = {n: t.half() if t.ndim > 1 else t for n, t in checkpoint(0).items()}
    half["logit_scale"] = half["logit_scale"].reshape(1)
    model = clip(0)
    model.load_state_dict({n: t.float().reshape(model.state_dict()[n].shape) for n, t in half.items()})
    got = zeroshot_head(arch, half, PROMPTS)
    torch.testing.assert_close(got, open_clip_head(model), rtol=1e-5, atol=1e-5)
    ends = Ends(Setup(arch, towers="both", prompts=PROMPTS), half)
    a, b = ends.pair(checkpoint(1))
    assert a["logit_scale"].shape == b["logit_scale"].shape == ()
    WeightPath(ends.live, a, b).write(0.5)
    assert abs(ends.live.logit_scale.item() - 3.05) < 1e-6


@pytest.mark.parametrize("choice", ["interpolate", "zeroshot", "finetuned"])
def test_whose_head(arch: str, choice: str) -> None:
    zero, tuned = soup(0), soup(1)
    a, b = Ends(Setup(arch, head=choice), zero).pair(tuned)
    owner = {"interpolate": (zero, tuned), "zeroshot": (zero, zero), "finetuned": (tuned, tuned)}[choice]
    for end, state, images in zip((a, b), owner, (zero, tuned), strict=True):
        for name in (HEAD_WEIGHT, HEAD_BIAS):
            assert end[name] is state[name]
        assert all(end[n] is t for n, t in images.items() if n.startswith("visual."))  # nothing is copied


def test_a_finetuned_head_for_a_zero_shot_file_without_one(arch: str) -> None:
    zero, tuned = checkpoint(0), soup(1)
    with refused(ValueError, "--class-names"):
        Ends(Setup(arch, head="finetuned"), zero)
    for ends in (
        Ends(Setup(arch, head="finetuned"), zero, classes=CLASSES),
        Ends(Setup(arch, head="finetuned", prompts=PROMPTS), zero),
    ):
        assert HEAD_WEIGHT not in ends.zeroshot  # each fine-tuned model brings another
        a, b = ends.pair(tuned)
        assert a[HEAD_WEIGHT] is b[HEAD_WEIGHT] is tuned[HEAD_WEIGHT]
        WeightPath(ends.live, a, b)


def test_a_given_zero_shot_head_counts(arch: str) -> None:
    given = {HEAD_WEIGHT: head(5)[HEAD_WEIGHT]}
    ends = Ends(Setup(arch, zeroshot_head=given), soup(0))
    a, b = ends.pair(soup(1))
    assert a[HEAD_WEIGHT] is given[HEAD_WEIGHT]
    assert torch.equal(a[HEAD_BIAS], torch.zeros(CLASSES))
    assert torch.equal(b[HEAD_WEIGHT], head(1)[HEAD_WEIGHT])


def test_a_bias_missing_in_one_file_is_zero(arch: str) -> None:
    zero = soup(0)
    del zero[HEAD_BIAS]
    a, b = Ends(Setup(arch), zero).pair(soup(1))
    assert torch.equal(a[HEAD_BIAS], torch.zeros(CLASSES)) and b[HEAD_BIAS].any()
    assert HEAD_BIAS not in zero  # the caller's dict is not touched


def test_scale(arch: str) -> None:
    ends = Ends(Setup(arch, prompts=PROMPTS, scale=100.0), checkpoint(0))
    for end, seed in zip(ends.pair(checkpoint(1)), (0, 1), strict=True):
        expected = open_clip_head(clip(seed), 100.0)
        torch.testing.assert_close(end[HEAD_WEIGHT], expected, rtol=1e-5, atol=1e-4)
    both = Ends(Setup(arch, "both", prompts=PROMPTS, scale=100.0), checkpoint(0))
    for end in both.pair(checkpoint(1)):
        assert abs(end["logit_scale"].exp().item() - 100) < 1e-3


def test_a_head_that_is_made_is_kept_under_its_name(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(Setup(arch, prompts=PROMPTS), checkpoint(0))
    first = ends.pair(checkpoint(1), "one")[1][HEAD_WEIGHT]
    monkeypatch.setattr("rft_fast.clip.heads._encode", None)
    assert ends.pair(checkpoint(1), "one")[1][HEAD_WEIGHT] is first
    with pytest.raises(TypeError):
        ends.pair(checkpoint(2), "two")


def test_the_random_state_is_kept_and_weights_are_not_changed(arch: str) -> None:
    zero, tuned = checkpoint(0), checkpoint(1)
    copies = [{n: t.clone() for n, t in state.items()} for state in (zero, tuned)]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ends = Ends(Setup(arch, prompts=PROMPTS), zero)
    path = WeightPath(ends.live, *ends.pair(tuned))
    assert torch.equal(torch.rand(4), expected)
    path.write(0.3)
    for state, copy in zip((zero, tuned), copies, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)


# --- refusals -----------------------------------------------------------------------------------------


def test_weights_of_another_architecture_are_named(arch: str) -> None:
    with torch.device("meta"):
        other = dict(open_clip.create_model("ViT-B-16", device="meta", load_weights=False).state_dict())
    fits = "ViT-B-16", "ViT-B-16-quickgelu"
    for setup in (Setup("ViT-B-32", prompts=PROMPTS), Setup("ViT-B-32", "both", prompts=PROMPTS)):
        with refused(ValueError, "ViT-B-32", *fits):
            Ends(setup, other)
    ends = Ends(Setup(arch), soup(0))
    with refused(ValueError, *fits):
        ends.pair(other)
    with refused(ValueError, *fits):  # the text tower's are compared as well
        zeroshot_head("ViT-L-14", other, PROMPTS)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"towers": "text"}, "text"),
        ({"head": "mean"}, "mean"),
        ({"towers": "both"}, "--class-names"),
        ({"towers": "both", "prompts": PROMPTS, "head": "zeroshot"}, ""),
        ({"towers": "both", "prompts": PROMPTS, "zeroshot_head": head(0)}, ""),
        ({"head": "finetuned", "zeroshot_head": head(0)}, "--zeroshot-head"),
        ({"zeroshot_head": {"weight": torch.ones(1)}}, ""),
        ({"zeroshot_head": {}}, ""),
        ({"scale": 100.0}, "--head-scale"),
        ({"scale": 0.0, "prompts": PROMPTS}, "0.0"),
        ({"scale": float("nan"), "prompts": PROMPTS}, ""),
    ],
)
def test_setups_that_make_no_sense(change: dict[str, Any], facts: str) -> None:
    with refused(ValueError, *facts.split()) as caught:
        Setup("ViT-B-32", **change)
    assert str(caught.value).startswith("Setup: ")


def without(state: State, *prefixes: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


HEADLESS = without(soup(0), "classification_head")


@pytest.mark.parametrize(
    ("setup", "state", "facts"),
    [
        ({}, HEADLESS, "--zeroshot-head"),
        ({}, checkpoint(0), "--class-names --zeroshot-head"),
        ({"towers": "both", "prompts": PROMPTS}, HEADLESS, "--towers"),
        ({"prompts": PROMPTS}, without(checkpoint(0), "logit_scale"), "--head-scale"),
        *(
            (setup, {**checkpoint(0), "logit_scale": torch.tensor(scale)}, f"logit_scale {scale:g}")
            for setup in ({"prompts": PROMPTS}, {"prompts": PROMPTS, "towers": "both"})
            for scale in (100.0, 1000.0, math.inf, -math.inf, math.nan)
        ),
        ({"prompts": PROMPTS}, without(checkpoint(0), "ln_final"), "text.ln_final.weight"),
        ({"prompts": PROMPTS}, {**HEADLESS, **head(0, 4)}, "4 3"),
        ({"zeroshot_head": {HEAD_WEIGHT: torch.ones(3, 5)}}, soup(0), "12] 5]"),
        ({}, {**soup(0), HEAD_WEIGHT: torch.ones(EMBED)}, "[12]"),
        ({}, {**soup(0), HEAD_BIAS: torch.ones(2)}, "[3] [2]"),
        ({}, {**soup(0), "encoder.weight": torch.ones(2)}, "encoder.weight"),
        ({}, {**soup(0), "classification_head.extra": torch.ones(2)}, "classification_head.extra"),
        ({}, without(soup(0), "visual."), ""),
        ({}, without(soup(0), "visual.proj"), "visual.proj"),
        ({"prompts": PROMPTS, "scale": 9.0, "head": "zeroshot"}, soup(0), ""),
    ],
)
def test_zero_shot_ends_that_are_refused(arch: str, setup: dict[str, Any], state: State, facts: str) -> None:
    with refused(ValueError, *facts.split()):
        Ends(Setup(arch, **setup), state)


@pytest.mark.parametrize(
    ("setup", "state", "facts"),
    [
        ({}, HEADLESS, "--head"),
        ({}, checkpoint(1), "--class-names --head"),
        ({}, {**soup(1), **head(1, 5)}, "5 3 --head"),
        ({"prompts": PROMPTS, "scale": 9.0}, soup(1), ""),
        ({"head": "finetuned"}, {**soup(1), **head(1, 5)}, "5 3"),
        ({"head": "zeroshot"}, without(soup(1), "visual.proj"), "visual.proj"),
    ],
)
def test_fine_tuned_ends_that_are_refused(
    arch: str, setup: dict[str, Any], state: State, facts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = Ends(Setup(arch, **setup), soup(0))
    monkeypatch.setattr("rft_fast.clip.heads._encode", None)  # nothing is computed before
    for operation in (ends.check, ends.pair):
        with refused(ValueError, *facts.split()):
            operation(state)


def test_nothing_is_encoded_before_it_is_asked_for(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rft_fast.clip.heads._encode", None)
        ends = Ends(Setup(arch, prompts=PROMPTS), checkpoint(0))
        ends.check(checkpoint(1))
        assert ends.classes == CLASSES and ends.live is ends.live
    first = ends.zeroshot[HEAD_WEIGHT]
    monkeypatch.setattr("rft_fast.clip.heads._encode", None)
    assert ends.zeroshot[HEAD_WEIGHT] is first  # nor twice


def test_both_towers_need_a_scale(arch: str) -> None:
    state = without(checkpoint(0), "logit_scale")
    with refused(ValueError, "logit_scale", "--head-scale"):
        Ends(Setup(arch, "both", prompts=PROMPTS), state)
    pair = Ends(Setup(arch, "both", prompts=PROMPTS, scale=9.0), state).pair(state)
    assert [end["logit_scale"].exp().item() for end in pair] == pytest.approx([9.0, 9.0])


def test_head_zeroshot_helps_where_it_is_said_to(arch: str) -> None:
    ends = Ends(Setup(arch, head="zeroshot"), soup(0))
    for state in (HEADLESS, checkpoint(1), {**soup(1), **head(1, 5)}):
        a, b = ends.pair(state)
        assert a[HEAD_WEIGHT] is b[HEAD_WEIGHT]
        WeightPath(ends.live, a, b)


def test_an_architecture_with_the_other_activation_is_refused(tmp_path: Path) -> None:
    for quick in (True, False):
        (tmp_path / f"{quick}.json").write_text(json.dumps({**CONFIG, "quick_gelu": quick}))
    state = soup(0)
    for quick in (True, False):
        told = {"image": Activation(quick, "its code")}
        right, wrong = (Setup(str(tmp_path / f"{kind}.json"), head="zeroshot") for kind in (quick, not quick))
        ends = Ends(right, Tensors(state, told))
        ends.check(Tensors(state, told))
        ends.check(state)  # says nothing of itself
        with refused(ValueError, "quick_gelu", str(quick).lower()):
            Ends(wrong, Tensors(state, told))
        with refused(ValueError):
            Ends(wrong, state).check(Tensors(state, told))
        # Of a text tower that makes no head, nothing depends.
        Ends(wrong, Tensors(state, {"text": told["image"]}))


def test_the_architecture_to_name_instead() -> None:
    quick = {"image": Activation(True, "its code")}
    with refused(ValueError, "--arch", "ViT-B-32-quickgelu"):
        matching.check_evidence("ViT-B-32", quick)
    with refused(ValueError, "--arch", "ViT-B-32"):
        matching.check_evidence("ViT-B-32-quickgelu", {"image": Activation(False, "its code")})
    with refused(ValueError, "quick_gelu"):
        matching.check_evidence("ViT-B-32-256", quick)
    matching.check_evidence("RN50", quick)  # whose image tower has ReLU
    with torch.device("meta"):
        tower = {f"visual.{n}": t for n, t in architectures.visual("ViT-B-32").state_dict().items()}
    assert matching.likely(tower)[:2] == ["ViT-B-32", "ViT-B-32-quickgelu"]
    assert matching.likely(Tensors(tower, quick))[:1] == ["ViT-B-32-quickgelu"]
    matching.check_evidence("ViT-B-16-SigLIP", quick)  # timm's, with an activation of its own


def test_unmerged_adapters_are_no_ends(arch: str) -> None:
    unmerged = {**soup(1), "visual.transformer.resblocks.0.attn.out_proj.lora_A.weight": torch.ones(2, 2)}
    for make in (lambda: Ends(Setup(arch), unmerged), lambda: Ends(Setup(arch), soup(0)).check(unmerged)):
        with refused(ValueError, "LoRA"):
            make()


# --- other image sizes --------------------------------------------------------------------------------

LARGER = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 32}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_of_another_image_size_are_resampled_as_open_clip_does(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    (tmp_path / "larger.json").write_text(json.dumps(LARGER))
    setup = Setup(str(tmp_path / "larger.json"), head="zeroshot")
    small, large = soup(0), {**clip(1, LARGER).state_dict(), **head(1)}
    small["visual.positional_embedding"] = small["visual.positional_embedding"].to(dtype)
    with refused(ValueError, "4", "16", "--resize-positions"):
        Ends(setup, small)
    with warned(UserWarning, "4"):
        ends = Ends(replace(setup, resize_positions=True), small)
    ends.check(large)
    start, _ = ends.pair(large)
    model = clip(2, LARGER)
    expected = {name: tensor.float() for name, tensor in small.items() if not name.startswith("class")}
    open_clip.model.resize_pos_embed(expected, model)
    model.load_state_dict(expected, strict=False)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = ends.live
    tower.load_state_dict({name: tensor.float() for name, tensor in start.items()})
    with torch.no_grad():
        got, want = tower.visual(images), model.visual(images)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)
    # A fine-tuned end, too; and in the other direction.
    (tmp_path / "smaller.json").write_text(json.dumps(CONFIG))
    shrink = Ends(Setup(str(tmp_path / "smaller.json"), head="zeroshot", resize_positions=True), small)
    with warned(UserWarning, "2"):
        assert shrink.pair(large)[1]["visual.positional_embedding"].shape == (5, 32)
    odd = {**small, "visual.positional_embedding": torch.ones(7, 32)}
    with refused(ValueError):
        Ends(replace(setup, resize_positions=True), odd)


def test_shapes_alone_can_be_checked_for_another_image_size(tmp_path: Path) -> None:
    (tmp_path / "larger.json").write_text(json.dumps(LARGER))
    meta = {name: tensor.to("meta") for name, tensor in soup(0).items()}
    with warned(UserWarning, "4"):
        Ends(Setup(str(tmp_path / "larger.json"), head="zeroshot", resize_positions=True), meta)
