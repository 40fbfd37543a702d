"""What is said of architectures against open_clip's own models, made in full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from support.wording import refused

from rft_fast.clip import architectures, matching, tokenizers

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, **changes}


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "model.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def refuses(call: Any, *arguments: Any, facts: Sequence[str] = ()) -> None:
    with refused(ValueError, *facts):
        call(*arguments)


def shapes(name: str) -> dict[str, torch.Tensor]:
    """The whole model's state, made by open_clip itself, without memory."""
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta", load_weights=False)
    return dict(model.state_dict())


def soup(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("transformer.")}


def images(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", ["ViT-B-32", "ViT-B-32-quickgelu"]),
        ("ViT-B-16-quickgelu", ["ViT-B-16", "ViT-B-16-quickgelu"]),
        ("ViT-B-32-256", ["ViT-B-32-256"]),
        ("ViT-L-14-336", ["ViT-L-14-336", "ViT-L-14-336-quickgelu"]),
        ("RN50", ["RN50", "RN50-quickgelu"]),
        ("RN50x4", ["RN50x4", "RN50x4-quickgelu"]),
        ("coca_ViT-B-32", ["coca_ViT-B-32"]),
        ("ViT-S-16", ["ViT-S-16"]),
    ],
)
def test_weights_tell_their_architecture(name: str, expected: list[str]) -> None:
    state = shapes(name)
    assert matching.likely(state) == expected
    # Files of model-soups lack most of the text tower, and others lack it all.
    assert matching.likely(soup(state))[: len(expected)] == expected
    assert matching.likely(images(state))[: len(expected)] == expected


def test_what_is_not_known_is_not_named() -> None:
    tiny = dict(open_clip.CLIP(**CONFIG).state_dict())
    assert matching.likely(tiny) == []
    assert matching.likely({}) == []
    assert matching.likely({"visual.trunk.stem.weight": torch.ones(1)}) == []
    large = images(shapes("ViT-B-32"))
    large["visual.positional_embedding"] = torch.empty(11 * 11 + 1, 768, device="meta")
    assert matching.likely(large) == []  # an image size that open_clip has no name for


def test_towers_are_open_clips(tmp_path: Path) -> None:
    file = tmp_path / "arch.json"
    for changes in ({}, {"quick_gelu": True}):
        config = {**CONFIG, **changes}
        file.write_text(json.dumps(config))
        clip = open_clip.CLIP(**config).eval()
        visual, text = architectures.visual(file).eval(), architectures.text(file).eval()
        visual.load_state_dict(clip.visual.state_dict())
        text.load_state_dict({n: clip.state_dict()[n] for n in text.state_dict()})
        pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 20, (3, 6))
        with torch.no_grad():
            assert torch.equal(visual(pixels), clip.encode_image(pixels))
            assert torch.equal(text(tokens), clip.encode_text(tokens))


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32", "ViT-H-14-CLIPA", "EVA02-B-16"])
def test_text_towers_of_open_clip_models(name: str) -> None:
    whole = shapes(name)
    with torch.device("meta"):
        state = architectures.text(name).state_dict()
    prefix = "text." if "text.ln_final.weight" in whole else ""
    for key, tensor in state.items():
        assert whole[prefix + key].shape == tensor.shape
    with torch.device("meta"):
        assert {f"visual.{key}" for key in architectures.visual(name).state_dict()} == set(images(whole))


def test_towers_that_cannot_be_made(tmp_path: Path) -> None:
    with refused(ValueError, "--zeroshot-head"):
        architectures.text("roberta-ViT-B-32")
    file = tmp_path / "arch.json"
    file.write_text(json.dumps({key: value for key, value in CONFIG.items() if key != "text_cfg"}))
    with refused(ValueError, "model_cfg", "text_cfg"):
        architectures.text(file)
    architectures.visual(file)


# --- tokenizers ---------------------------------------------------------------------------------------


def test_tokenizers_are_open_clips(tmp_path: Path) -> None:
    texts = ["a photo of a tench.", "hello!"]
    for name in ("ViT-B-32", "coca_ViT-B-32"):
        got = tokenizers.tokenizer(name)(texts)
        assert torch.equal(got, open_clip.get_tokenizer(name)(texts))
    file = tmp_path / "arch.json"
    file.write_text(json.dumps({**CONFIG, "text_cfg": {"context_length": 9}}))
    assert torch.equal(tokenizers.tokenizer(file)(texts), open_clip.SimpleTokenizer(context_length=9)(texts))


def test_tokenizers_of_other_vocabularies_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "arch.json"
    file.write_text(json.dumps(CONFIG))
    with refused(ValueError, "20", "49408", "--zeroshot-head"):
        tokenizers.tokenizer(file)


def test_a_tokenizer_of_hugging_face_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", offline)
    with refused(ValueError, "timm/ViT-B-16-SigLIP"):
        tokenizers.tokenizer("ViT-B-16-SigLIP")


def test_a_tokenizer_of_hugging_face_gets_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def record(name: str, context: int, **options: Any) -> str:
        seen.update(options, name=name, context=context)
        return "tokenizer"

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", record)
    assert tokenizers.tokenizer("ViT-H-14-CLIPA") == "tokenizer"
    expected = {"name": "bert-base-uncased", "context": 32, "tokenizer_mode": None, "strip_sep_token": True}
    assert seen == expected | {"trust_remote_code": False, "local_files_only": True}


# --- preprocessing and activation ---------------------------------------------------------------------


def test_preprocessing_of_a_pretrained_tag() -> None:
    half = (0.5, 0.5, 0.5)
    plain, tagged = (architectures.preprocess("ViT-L-14", tag) for tag in (None, "laion2b_s32b_b82k"))
    assert plain == architectures.preprocess("ViT-L-14", "openai") != tagged
    assert (tagged.mean, tagged.std, tagged.resize_mode) == (half, half, "shortest")
    # What all tags of a name agree on is that model's, with or without a tag.
    siglip = architectures.preprocess("ViT-B-16-SigLIP")
    assert siglip == architectures.preprocess("ViT-B-16-SigLIP", "webli")
    assert (siglip.mean, siglip.std, siglip.resize_mode) == (half, half, "squash")
    assert architectures.preprocess("ViT-H-14-quickgelu", "dfn5b").resize_mode == "squash"
    assert architectures.preprocess("ViT-H-14-quickgelu").resize_mode == "shortest"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "PE-Core-B-16", "ViT-H-14-CLIPA"])
def test_every_tag_prepares_images_as_open_clip_does(name: str) -> None:
    for tag in open_clip.list_pretrained_tags_by_model(name):
        expected = open_clip.get_pretrained_cfg(name, tag)
        got = architectures.preprocess(name, tag)
        assert got.mean == tuple(expected["mean"]) and got.std == tuple(expected["std"])
        assert got.interpolation == expected["interpolation"]
        assert got.resize_mode == expected["resize_mode"]


def test_unknown_tags(tmp_path: Path) -> None:
    with refused(ValueError, "ViT-B-32", "opena1"):
        architectures.preprocess("ViT-B-32", "opena1")
    file = tmp_path / "arch.json"
    file.write_text(json.dumps(CONFIG))
    with refused(ValueError, "openai"):
        architectures.preprocess(file, "openai")


def test_quick_gelu_goes_with_the_weights(tmp_path: Path) -> None:
    fine = ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k"), ("RN50-quickgelu", "cc12m")
    for arch, tag in fine:
        matching.check_activation(arch, tag)
    with refused(ValueError, "openai", "QuickGELU", "ViT-B-32-quickgelu"):
        matching.check_activation("ViT-B-32", "openai")
    with refused(ValueError, "QuickGELU", "ViT-B-32"):
        matching.check_activation("ViT-B-32-quickgelu", "laion2b_s34b_b79k")
    # Not a question of activation, or none that can be answered.
    unknown = ("ViT-B-32", "nonsense"), ("ViT-B-16-SigLIP", "webli"), (str(tmp_path / "a.json"), "openai")
    for arch, tag in (*unknown, ("roberta-ViT-B-32", "laion2b_s12b_b32k")):
        matching.check_activation(arch, tag)


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("{", ""),
        ([1], ""),
        ({"model_cfg": changed(), "preproces_cfg": {}}, "preprocess_cfg"),
        (changed(quickgelu=True), "quick_gelu"),
        ({"model_cfg": {"vision_cfg": CONFIG["vision_cfg"]}}, "embed_dim"),
        ({"embed_dim": 16}, "vision_cfg"),
        (changed(vision_cfg={**CONFIG["vision_cfg"], "depth": 3}), ""),
    ],
)
def test_bad_config_files(tmp_path: Path, content: Any, facts: str) -> None:
    refuses(architectures.visual, write(tmp_path, content), facts=facts.split())


def test_unknown_model_names_come_with_the_nearest() -> None:
    refuses(architectures.config, "ViT-B-32-quickgelo", facts=("ViT-B-32-quickgelu",))
    refuses(architectures.preprocess, "nonsense!", facts=("open_clip",))


def test_preprocess(tmp_path: Path) -> None:
    reference = open_clip.transform.PreprocessCfg()
    named = architectures.preprocess("ViT-B-32")
    assert named.size == (224, 224)
    assert (named.mean, named.std) == (reference.mean, reference.std)
    assert (named.interpolation, named.resize_mode) == ("bicubic", "shortest")
    cfg = {"mean": 0.5, "std": [0.1, 0.2, 0.3], "interpolation": "bilinear", "size": [32, 32]}
    file = write(tmp_path, {"model_cfg": changed(), "preprocess_cfg": cfg})
    expected = architectures.Preprocess((32, 32), (0.5,) * 3, (0.1, 0.2, 0.3), interpolation="bilinear")
    assert architectures.preprocess(file) == expected


@pytest.mark.parametrize(
    ("cfg", "facts"),
    [
        ({"size": 64}, ("(64, 64)", "(32, 32)")),
        ({"meen": 1}, ("mean",)),
        ({"mean": [1, 2]}, ()),
        ({"std": 0}, ()),
        ({"mode": "L"}, ("RGB", "L")),
        ({"interpolation": "nearest"}, ()),
        ({"resize_mode": "fit"}, ("resize_mode",)),
    ],
)
def test_bad_preprocessing(tmp_path: Path, cfg: dict[str, Any], facts: tuple[str, ...]) -> None:
    file = write(tmp_path, {"model_cfg": changed(), "preprocess_cfg": cfg})
    refuses(architectures.preprocess, file, facts=(*facts,))


# --- the hub ------------------------------------------------------------------------------------------


def test_configuration_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": 0.5}}))
    asked = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    label, model_cfg, preprocess_cfg = architectures.config("hf-hub:some/model@v2")
    assert (label, model_cfg, preprocess_cfg) == ("hf-hub:some/model@v2", CONFIG, {"mean": 0.5})
    assert architectures.preprocess("hf-hub:some/model").mean == (0.5, 0.5, 0.5)
    name = "open_clip_config.json"
    assert asked == [("some/model", name, "v2"), ("some/model", name, None)]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with refused(ValueError, "hf-hub:some/model"):
        architectures.config("hf-hub:some/model")


VISION = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
HUGE = 10**9
SIZES: list[dict[str, object]] = [
    {"embed_dim": HUGE}, {"embed_dim": 10**400}, {"embed_dim": 1e9},
    *({"vision_cfg": {**VISION, name: value}} for name, value in (
        ("width", HUGE), ("width", 10**400), ("layers", 10**6), ("layers", [3, 4, 6, 10**6]),
        ("image_size", HUGE), ("image_size", [16, HUGE]), ("patch_size", HUGE), ("head_width", HUGE),
        ("mlp_ratio", 1e9), ("mlp_ratio", float("inf")), ("width", float("nan")),
        ("attn_pooler_queries", HUGE),
    )),
    *({"text_cfg": {name: value}} for name, value in (
        ("width", HUGE), ("layers", 10**6), ("context_length", HUGE), ("vocab_size", HUGE), ("heads", HUGE),
    )),
]  # fmt: skip


@pytest.mark.parametrize("change", SIZES, ids=repr)
def test_sizes_that_no_model_has_are_refused_before_memory_is_taken(
    change: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "arch.json"
    file.write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {}, **change}))
    for ask in (architectures.config, architectures.preprocess, architectures.visual, architectures.text):
        with refused(ValueError):
            ask(file)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, " " * (2 << 20), "1" * 5000, '{"embed_dim": ' + "9" * 5000 + "}"],
    ids=["lists", "objects", "long", "digits", "digits of a size"],
)
def test_files_that_are_no_architecture_end_in_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "arch.json").write_text(text)
    with refused(ValueError):
        architectures.config(tmp_path / "arch.json")


@pytest.mark.parametrize("entry", ['"mean": NaN', '"mean": Infinity', '"std": 1e999', '"fill_color": -1',
                                   '"fill_color": 256', '"mean": 1' + "0" * 400])  # fmt: skip
def test_preprocessing_takes_finite_numbers(entry: str, tmp_path: Path) -> None:
    model = json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {}})
    (tmp_path / "arch.json").write_text(f'{{"model_cfg": {model}, "preprocess_cfg": {{{entry}}}}}')
    with refused(ValueError):
        architectures.preprocess(tmp_path / "arch.json")
