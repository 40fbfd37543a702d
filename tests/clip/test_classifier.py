"""The classifier against forwards written out here, and against weights of other architectures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from support.wording import refused
from torch import Tensor, nn

from rft_fast.clip import classifier
from rft_fast.clip.endpoints import Ends, Setup

EMBED, WIDTH, HEADS, LAYERS, PATCH, SIZE, CLASSES = 16, 32, 2, 2, 8, 32, 5
VISION = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "layers": LAYERS,
    "width": WIDTH,
    "head_width": WIDTH // HEADS,
    "mlp_ratio": 2.0,
}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}


def config(**changes: Any) -> dict[str, Any]:
    return {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": TEXT, **changes}


def clip_with_head(cfg: dict[str, Any], seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """A whole CLIP and its checkpoint with a head, as model-soups lays it out."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**cfg).eval()
    for parameter in clip.parameters():  # zero biases and unit gains would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    state = {name: t for name, t in state.items() if not name.startswith("transformer.")}
    state["classification_head.weight"] = torch.randn(CLASSES, cfg["embed_dim"])
    state["classification_head.bias"] = torch.randn(CLASSES)
    return clip, state


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "model.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def ends_of(arch: str | Path, state: dict[str, Tensor]) -> Ends:
    return Ends(Setup(str(arch)), state)


def build_loaded(arch: str | Path, state: dict[str, Tensor]) -> nn.Module:
    ends = ends_of(arch, state)
    ends.live.load_state_dict(ends.zeroshot)
    return ends.live


def plain_forward(state: dict[str, Tensor], images: Tensor, quick_gelu: bool) -> Tensor:
    """A vision transformer and head in float64, from the tensors alone."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        if quick_gelu:
            return x / (1 + torch.exp(-1.702 * x))
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    n, side = len(images), SIZE // PATCH
    patches = images.double().reshape(n, 3, side, PATCH, side, PATCH)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, -1)
    x = patches @ w["visual.conv1.weight"].reshape(WIDTH, -1).T
    x = torch.cat([w["visual.class_embedding"].expand(n, 1, WIDTH), x], 1)
    x = norm(x + w["visual.positional_embedding"], "visual.ln_pre")
    for layer in range(LAYERS):
        block = f"visual.transformer.resblocks.{layer}"
        y = norm(x, f"{block}.ln_1")
        y = y @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        q, k, v = (part.reshape(n, -1, HEADS, WIDTH // HEADS) for part in y.chunk(3, -1))
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(WIDTH // HEADS)
        y = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).reshape(n, -1, WIDTH)
        x = x + linear(y, f"{block}.attn.out_proj")
        y = gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(y, f"{block}.mlp.c_proj")
    features = norm(x, "visual.ln_post")[:, 0] @ w["visual.proj"]
    features = features / features.pow(2).sum(-1, keepdim=True).sqrt()
    return linear(features, "classification_head")


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_logits_equal_a_written_out_forward(tmp_path: Path, quick_gelu: bool) -> None:
    cfg = config(quick_gelu=quick_gelu)
    _, state = clip_with_head(cfg)
    model = build_loaded(write(tmp_path, cfg), state)
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        got = model(images)
    expected = plain_forward(state, images, quick_gelu)
    assert got.dtype == torch.float32 and got.shape == (4, CLASSES)
    assert (got - expected).abs().max() < 2e-5
    assert (plain_forward(state, images, not quick_gelu) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "vision",
    [
        VISION,
        {**VISION, "output_tokens": True},
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": True},
    ],
    ids=["vit", "tokens", "resnet", "timm"],
)
def test_logits_equal_the_model_soups_wrapper(tmp_path: Path, vision: dict[str, Any]) -> None:
    local = {**vision, "timm_model_pretrained": False} if "timm_model_name" in vision else vision
    clip, state = clip_with_head(config(vision_cfg=local))
    model = build_loaded(write(tmp_path, config(vision_cfg=vision)), state)
    images = torch.randn(3, 3, vision["image_size"], vision["image_size"])
    with torch.no_grad():
        features = clip.encode_image(images) if "output_tokens" not in vision else None
        if features is None:
            features = clip.visual(images)[0]
        features = features / features.norm(dim=-1, keepdim=True)
        weight, bias = state["classification_head.weight"], state["classification_head.bias"]
        assert torch.equal(model(images), nn.functional.linear(features, weight, bias))


def test_a_known_model_name_builds_that_model_and_nothing_of_the_text() -> None:
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-32-quickgelu", device="meta")
    state = {n: t for n, t in clip.state_dict().items() if not n.startswith("transformer.")}
    state["classification_head.weight"] = torch.empty(10, 512, device="meta")
    ends = ends_of("ViT-B-32-quickgelu", state)
    model, inert = ends.live, ends.inert
    names = set(model.state_dict())
    assert names == {n for n in state if n.startswith("visual.")} | {
        "classification_head.weight",
        "classification_head.bias",
    }
    assert set(inert) == set(state) - names
    activations = {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__}
    assert activations == {"QuickGELU"}
    assert not model.training


def test_names_alone_are_read_and_the_random_state_is_kept(tmp_path: Path) -> None:
    file = write(tmp_path, config())
    _, state = clip_with_head(config())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = ends_of(file, {n: t.to("meta") for n, t in state.items()}).live
    assert torch.equal(torch.rand(4), expected)
    assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in model.parameters())


def test_what_has_no_effect_is_told_and_a_missing_bias_is_zero(tmp_path: Path) -> None:
    _, state = clip_with_head(config())
    del state["classification_head.bias"]
    state["classification_head.weight"] = state["classification_head.weight"].half()
    before = set(state)
    ends = ends_of(write(tmp_path, config()), state)
    used, inert = ends.zeroshot, ends.inert
    assert set(state) == before  # the caller's dict is not touched
    bias = used["classification_head.bias"]
    assert torch.equal(bias, torch.zeros(CLASSES, dtype=torch.float16))
    assert set(inert) == {
        "positional_embedding",
        "text_projection",
        "logit_scale",
        "token_embedding.weight",
        "ln_final.weight",
        "ln_final.bias",
    }
    assert "text tower" in inert["ln_final.bias"] and "head" in inert["logit_scale"]
    assert set(used) | set(inert) == before | {"classification_head.bias"}


def refuses(call: Any, *arguments: Any, facts: tuple[str, ...] = ()) -> None:
    with refused(ValueError, *facts):
        call(*arguments)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    _, state = clip_with_head(config())
    other = write(tmp_path, config(vision_cfg={**VISION, "width": 48, "layers": 3}))
    refuses(
        ends_of,
        other,
        state,
        facts=(
            "visual.conv1.weight",
            "(32, 3, 8, 8)",
            "(48, 3, 8, 8)",
        ),
    )
    file = write(tmp_path, config())
    extra = {**state, "visual.extra": torch.ones(2)}
    refuses(
        ends_of,
        file,
        extra,
        facts=(
            "visual.extra",
            "(2,)",
        ),
    )
    less = {name: tensor for name, tensor in state.items() if name != "visual.proj"}
    refuses(ends_of, file, less, facts=("visual.proj",))
    wide = {**state, "classification_head.weight": torch.ones(5, 17)}
    refuses(
        ends_of,
        file,
        wide,
        facts=(
            "16",
            "[5, 17]",
        ),
    )
    bias = {**state, "classification_head.bias": torch.ones(6)}
    refuses(
        ends_of,
        file,
        bias,
        facts=(
            "classification_head.bias",
            "[5]",
            "[6]",
        ),
    )


def test_the_right_architecture_is_named() -> None:
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16", device="meta", load_weights=False)
    state = {**clip.state_dict(), "classification_head.weight": torch.empty(10, 512, device="meta")}
    refuses(
        ends_of,
        "ViT-B-32",
        state,
        facts=(
            "ViT-B-32",
            "ViT-B-16",
            "ViT-B-16-quickgelu",
        ),
    )
    # Where the name is right and something else is wrong, none is named.
    del state["visual.proj"]
    refuses(ends_of, "ViT-B-16", state, facts=("visual.proj",))


def test_classify_normalises_the_features() -> None:
    model = classifier.ImageClassifier(nn.Flatten(), nn.Linear(3, CLASSES)).eval()
    x = torch.tensor([[3.0, 0.0, 4.0]])
    head = model.classification_head
    with torch.no_grad():
        expected = torch.tensor([[0.6, 0.0, 0.8]]) @ head.weight.T + head.bias
        torch.testing.assert_close(model.classify(x), expected)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.classify(50 * x), expected)


# --- both towers ----------------------------------------------------------------------------------


def both_towers(**changes: Any) -> classifier.ZeroShotClassifier:
    """Two templates for each of three classes; features of four numbers."""
    torch.manual_seed(0)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.EmbeddingBag(20, 4, mode="sum")

        def forward(self, tokens: Tensor) -> Tensor:
            features: Tensor = self.embedding(tokens)
            return features

    given: dict[str, Any] = {
        "visual": nn.Sequential(nn.Flatten(), nn.Linear(12, 4)),
        "text": Text(),
        "prompts": torch.randint(20, (3, 2, 6)),
        "logit_scale": nn.Parameter(torch.tensor(1.5)),
    }
    return classifier.ZeroShotClassifier(**{**given, **changes})


@pytest.mark.parametrize("scale", [torch.tensor(1.5), torch.tensor([1.5])])
def test_zero_shot_logits_equal_the_formula_written_out(scale: Tensor) -> None:
    model = both_towers(logit_scale=nn.Parameter(scale))
    images = torch.randn(5, 3, 2, 2)
    with torch.no_grad():
        got = model(images)
        image = model.visual(images).double()
        text = [[model.text(prompt[None])[0].double() for prompt in prompts] for prompts in model.prompts]
    assert got.shape == (5, 3) and got.dtype == torch.float32
    for c, features in enumerate(text):
        row = torch.zeros(4, dtype=torch.float64)
        for feature in features:
            row += feature / feature.pow(2).sum().sqrt() / len(features)
        row *= math.exp(1.5) / row.pow(2).sum().sqrt()
        for i in range(5):
            expected = (image[i] / image[i].pow(2).sum().sqrt() * row).sum()
            assert abs(got[i, c].item() - expected.item()) < 1e-5
    assert (got - got[:, :1]).abs().max() > 0.1  # the classes differ


def test_many_prompts_go_in_parts_and_stay_in_order() -> None:
    torch.manual_seed(1)
    prompts = torch.randint(20, (101, 7, 6))
    model = both_towers(prompts=prompts)
    images = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), model.join(model.visual(images), model.text(prompts.flatten(0, 1)))
        )


def test_prompts_are_no_part_of_a_checkpoint_but_move_with_the_model() -> None:
    model = both_towers()
    assert set(model.state_dict()) == {
        "logit_scale",
        "visual.1.weight",
        "visual.1.bias",
        "text.embedding.weight",
    }
    assert model.to("meta").prompts.device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "error", "facts"),
    [
        ({"visual": len}, TypeError, "nn.Module builtin_function_or_method"),
        ({"text": None}, TypeError, "nn.Module NoneType"),
        ({"prompts": [[1]]}, TypeError, ""),
        ({"prompts": torch.zeros(3, 2, 6)}, ValueError, "torch.float32 2"),
        ({"prompts": torch.zeros(3, 6, dtype=torch.int64)}, ValueError, "torch.int64"),
        ({"prompts": torch.zeros(3, 0, 6, dtype=torch.int64)}, ValueError, "torch.int64 0"),
        ({"logit_scale": 1.5}, TypeError, "logit_scale"),
        ({"logit_scale": torch.tensor(1.5)}, TypeError, "logit_scale nn.Parameter"),
        ({"logit_scale": nn.Parameter(torch.ones(2))}, ValueError, "torch.float32"),
        ({"logit_scale": nn.Parameter(torch.ones(1, 1))}, ValueError, "torch.float32"),
    ],
)
def test_bad_arguments_of_both_towers(changes: dict[str, Any], error: type[Exception], facts: str) -> None:
    with refused(error, *facts.split()):
        both_towers(**changes)
