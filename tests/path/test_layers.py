"""Parameter names -> layers, on the names of real open_clip modules and of other families."""

from __future__ import annotations

import pytest
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from support.wording import refused
from torch import nn

from rft_fast.path.layers import group, layer_of, select


def names_of(visual: nn.Module) -> list[str]:
    model = nn.ModuleDict({"visual": visual, "classification_head": nn.Linear(8, 3)})
    return [name for name, _ in model.named_parameters()]


@pytest.fixture(scope="module")
def vit() -> list[str]:
    # Eleven blocks, so that resblocks.1 and resblocks.10 both exist.
    return names_of(
        VisionTransformer(image_size=8, patch_size=4, width=16, layers=11, heads=2, mlp_ratio=2, output_dim=8)
    )


@pytest.fixture(scope="module")
def resnet() -> list[str]:
    return names_of(ModifiedResNet(layers=[1, 2, 1, 1], output_dim=8, heads=4, image_size=32, width=8))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("visual.conv1.weight", "visual.conv1"),
        ("visual.class_embedding", "visual.class_embedding"),
        ("visual.proj", "visual.proj"),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks.3.attn.in_proj"),
        ("visual.transformer.resblocks.3.attn.in_proj_bias", "visual.transformer.resblocks.3.attn.in_proj"),
        ("visual.transformer.resblocks.3.mlp.c_fc.bias", "visual.transformer.resblocks.3.mlp.c_fc"),
        ("logit_scale", "logit_scale"),
        ("a.weight.bias", "a.weight"),  # one ending is dropped, once
        ("weight", "weight"),  # the model is itself the module, and a layer needs a name
        ("_weight", "_weight"),
        ("a.weights", "a.weights"),
        ("a.reweight", "a.reweight"),
    ],
)  # fmt: skip
def test_module_is_the_key_rule(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks.3"),
        ("visual.layer2.0.downsample.1.weight", "visual.layer2.0"),
        ("visual.conv1.weight", "visual.conv1"),
        ("visual.class_embedding", "visual.class_embedding"),
        ("classification_head.bias", "classification_head"),
        ("vision_model.encoder.layers.3.self_attn.q_proj.bias", "vision_model.encoder.layers.3"),
        (
            "vision_model.embeddings.position_embedding",
            "vision_model.embeddings.position_embedding",
        ),
        ("visual.trunk.blocks.7.attn.qkv.weight", "visual.trunk.blocks.7"),  # timm ViT
        ("visual.trunk.stages.2.blocks.5.conv_dw.weight", "visual.trunk.stages.2.blocks.5"),
        ("visual.trunk.stages.2.downsample.0.weight", "visual.trunk.stages.2"),
        ("blocks.3.1.conv_pw.weight", "blocks.3.1"),  # timm EfficientNet
        ("0.1.weight", "0.1"),
    ],
)
def test_block(name: str, layer: str) -> None:
    assert layer_of(name, "block") == layer


def test_a_vision_transformer(vit: list[str]) -> None:
    layers = group(vit)
    assert list(layers)[:3] == [
        "visual.class_embedding", "visual.positional_embedding", "visual.proj"
    ]  # fmt: skip
    assert [vit[i] for i in layers["visual.transformer.resblocks.10.attn.in_proj"]] == [
        "visual.transformer.resblocks.10.attn.in_proj_weight",
        "visual.transformer.resblocks.10.attn.in_proj_bias",
    ]
    assert sorted(i for indices in layers.values() for i in indices) == list(range(len(vit)))

    blocks = group(vit, "block")
    assert [name for name in blocks if "resblocks" in name] == [
        f"visual.transformer.resblocks.{i}" for i in range(11)
    ]
    assert all(".resblocks.1." in vit[i] for i in blocks["visual.transformer.resblocks.1"])
    assert {"visual.conv1", "visual.ln_pre", "visual.proj", "classification_head"} <= set(blocks)


def test_a_resnet(resnet: list[str]) -> None:
    blocks = group(resnet, "block")
    assert {"visual.layer2.0", "visual.layer2.1", "visual.conv1", "visual.bn1"} <= set(blocks)
    inside = [resnet[i] for i in blocks["visual.layer2.0"]]
    assert "visual.layer2.0.downsample.0.weight" in inside
    assert inside == [name for name in resnet if name.startswith("visual.layer2.0.")]
    assert "visual.layer2.0.downsample.0" in group(resnet)  # a layer of its own when finer


def test_tensor_is_one_layer_each(vit: list[str]) -> None:
    assert group(vit, "tensor") == {name: [i] for i, name in enumerate(vit)}


def test_regular_expressions(vit: list[str]) -> None:
    # The whole match, ending at a component: block 1 does not swallow block 10.
    layers = group(vit, r"re:visual\.transformer\.resblocks\.1")
    assert len(layers["visual.transformer.resblocks.1"]) == 12
    assert "visual.transformer.resblocks.10.mlp.c_fc" in layers  # not matched: its module layer
    # The first group: the same part of every block together.
    layers = group(vit, r"re:.*\.(attn|mlp)")
    assert len(layers["attn"]) == len(layers["mlp"]) == 44
    # A group that took no part leaves the whole match.
    assert group(["a.0.w", "b.w"], r"re:a\.(\d)|b") == {"0": [0], "b": [1]}


def test_group_refuses(vit: list[str]) -> None:
    with refused(ValueError, "granularity", "layer"):
        group(vit, "layer")
    with refused(ValueError, "granularity", "re:resblocks"):
        group(vit, "re:resblocks")
    with refused(ValueError, "re:("):
        group(vit, "re:(")


def test_select_is_exact(vit: list[str]) -> None:
    blocks = list(group(vit, "block"))
    assert select(blocks, ["visual.transformer.resblocks.1"]) == ["visual.transformer.resblocks.1"]
    assert len(select(blocks, [r"re:.*resblocks\.1\d*"])) == 2
    # In the order of the names, each once, whatever the order of the patterns.
    assert select("abc", ["c", "re:[ac]", "a"]) == ["a", "c"]
    assert select(blocks, []) == []


def test_select_refuses_and_suggests(vit: list[str]) -> None:
    blocks = list(group(vit, "block"))
    with refused(ValueError, "visual.conv2", "visual.conv1"):
        select(blocks, ["visual.conv2"])
    with refused(ValueError, "'resblocks.10'", "visual.transformer.resblocks.10"):
        select(blocks, ["resblocks.10"])
    with refused(ValueError, "zzz", len(blocks), blocks[0], blocks[-1]):
        select(blocks, ["zzz"])
    with refused(ValueError, "sweep", "re:resblocks"):
        select(blocks, ["re:resblocks"], operation="sweep")  # patterns match whole names
    with refused(ValueError, "a"):
        select([], ["a"])
    with refused(ValueError, "re:("):
        select(blocks, ["re:("])
    with refused(TypeError, "visual.conv1"):
        select(blocks, "visual.conv1")
    with refused(TypeError, 3):
        select(blocks, [3])  # type: ignore[list-item]
