"""Every checkpoint format in its true byte layout, written by the classes that write it elsewhere (or by
likenesses of them, which are gone when the file is read), against the state dict of what was written."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from support.tiny_checkpoints import (
    TEXT,
    VISION,
    WRITERS,
    CLIPEncoder,
    Head,
    ImageClassifier,
    ImageEncoder,
    State,
    clip,
    dump,
    huggingface,
    renamed,
    same,
    written,
)
from support.wording import refused, said, warned
from torch import Tensor, nn

from rft_fast import checkpoints


@pytest.mark.parametrize("how", WRITERS)
def test_wiseft(tmp_path: Path, how: str) -> None:
    file = tmp_path / "checkpoint_10.pt"
    state = written(WRITERS[how], file, lambda own: ImageClassifier(ImageEncoder(own["convert"]), Head()))
    assert "src" not in sys.modules and "clip" not in sys.modules
    got = checkpoints.read(file)
    assert got.format == "wiseft" and got.file == file
    expected = {n.removeprefix("image_encoder.model."): t for n, t in state.items()}
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in expected
    assert "passing" not in expected and "visual.attn_mask" not in expected
    same(got.tensors, expected)
    said("\n".join(got.notes), "byte_mask, steps")
    with refused(ValueError, "soup", "wiseft"):
        checkpoints.read(file, "soup")
    same(checkpoints.load(file, format="task-vector"), expected)


def test_wiseft_without_normalisation_and_in_half_precision(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    make = lambda own: ImageClassifier(ImageEncoder(own["convert"], half=True), Head(False))  # noqa: E731
    state = written(dump(4), file, make)
    got = checkpoints.read(file)
    same(got.tensors, {n.removeprefix("image_encoder.model."): t for n, t in state.items()})
    assert got.tensors["visual.conv1.weight"].dtype == torch.float16
    (doubt,) = got.doubts
    assert doubt.startswith("classification_head does not normalise") and doubt in got.notes
    for load in (checkpoints.load, checkpoints.load_head):
        with warned(UserWarning, "a.pt", "classification_head") as told:
            load(file)
        assert [Path(warning.filename) for warning in told] == [Path(__file__)]


@pytest.mark.parametrize("how", WRITERS)
def test_flyp_alone_and_wrapped_for_several_devices(tmp_path: Path, how: str) -> None:
    file = tmp_path / "checkpoint_3.pt"
    state = written(WRITERS[how], file, lambda own: CLIPEncoder(own["convert"]))
    got = checkpoints.read(file)
    assert got.format == "flyp"
    same(got.tensors, renamed(state, "model."))
    parallel = written(WRITERS[how], file, lambda own: nn.DataParallel(CLIPEncoder(own["convert"])))
    assert all(name.startswith("module.model.") for name in parallel)
    got = checkpoints.read(file)
    assert got.format == "flyp"
    same(got.tensors, renamed(parallel, "module.model."))


@pytest.mark.parametrize("how", WRITERS)
def test_task_vectors_and_their_heads(tmp_path: Path, how: str) -> None:
    file = tmp_path / "finetuned.pt"
    state = written(WRITERS[how], file, lambda own: ImageEncoder(own["convert"]))
    got = checkpoints.read(file)
    assert got.format == "task-vector"
    same(got.tensors, renamed(state, "model."))
    assert got.tensors["byte_mask"].dtype == torch.uint8 and got.tensors["steps"].dtype == torch.int64
    head = written(WRITERS[how], tmp_path / "head_MNIST.pt", lambda own: Head())
    same(checkpoints.load_head(tmp_path / "head_MNIST.pt"), renamed(head, "", "classification_head."))


def test_modules_of_open_clip_pickled_whole(tmp_path: Path) -> None:
    model = clip()
    torch.save(model, tmp_path / "a.pt")
    got = checkpoints.read(tmp_path / "a.pt")
    assert got.format == "task-vector"
    assert "attn_mask" not in got.tensors  # a buffer that does not persist
    same(got.tensors, model.state_dict())
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 32}
    timms = open_clip.CustomTextCLIP(8, vision, TEXT)  # keeps enums
    torch.save(timms, tmp_path / "b.pt")
    same(checkpoints.load(tmp_path / "b.pt"), timms.state_dict())


def test_tied_tensors_and_views_of_one_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "visual.a": base[:6].view(2, 3),
        "visual.b": base[6:].view(3, 6).t(),
        "visual.c": base,
        "visual.d": base[::2],
        "visual.e": base[5],
        "visual.f": base[3:3],
    }
    for how, write in WRITERS.items():
        write(state, tmp_path / how)
        same(checkpoints.load(tmp_path / how), state)
    module = nn.Linear(3, 3)
    module.other = nn.Linear(3, 3)
    module.other.weight = module.weight
    for how, write in WRITERS.items():
        write(module, tmp_path / how)
        same(checkpoints.load(tmp_path / how), module.state_dict())


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool),
)


@pytest.mark.parametrize("how", [*WRITERS, "safetensors"])
def test_every_dtype(tmp_path: Path, how: str) -> None:
    state = {str(d): (torch.arange(6).reshape(2, 3) % 2).to(d) for d in DTYPES}
    (save_file if how == "safetensors" else WRITERS[how])(state, tmp_path / "a")
    file = tmp_path / ("a.safetensors" if how == "safetensors" else "a")
    (tmp_path / "a").rename(file)
    same(checkpoints.load(file), state, order=how != "safetensors")


@pytest.mark.parametrize("how", WRITERS)
def test_what_was_read_can_be_written_to_and_the_file_stays(tmp_path: Path, how: str) -> None:
    module = nn.Linear(40, 40)
    WRITERS[how](module, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    for tensor in checkpoints.load(tmp_path / "a").values():
        tensor.zero_()
    assert (tmp_path / "a").read_bytes() == before
    same(checkpoints.load(tmp_path / "a"), module.state_dict())


def test_parameters_with_attributes(tmp_path: Path) -> None:
    tensor = nn.Parameter(torch.randn(3))
    tensor.wd = 0.1  # type: ignore[attr-defined]
    plain = torch.randn(3)
    plain.tag = "x"  # type: ignore[attr-defined]
    for how, write in WRITERS.items():
        write({"a": tensor, "b": plain}, tmp_path / how)
        same(checkpoints.load(tmp_path / how), {"a": tensor.detach(), "b": plain})


# --- state dicts ----------------------------------------------------------------------------------


def soup(model: open_clip.CLIP) -> State:
    """As model-soups writes: the text tower's transformer is removed, the rest remains."""
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("transformer.")}
    return {**renamed(state, "", "model."), "classification_head.weight": torch.randn(4, 10)}


def test_model_soups(tmp_path: Path) -> None:
    state = soup(clip())
    for how in ("zip", "old"):
        WRITERS[how](state, tmp_path / "model_0.pt")
        got = checkpoints.read(tmp_path / "model_0.pt")
        assert got.format == "soup" and not got.notes
        same(got.tensors, {name.removeprefix("model."): tensor for name, tensor in state.items()})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("how", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("nonscalar", [False, True])
def test_open_clip(tmp_path: Path, prefix: str, how: str, nonscalar: bool) -> None:
    model = clip(nonscalar_logit_scale=nonscalar)
    state = renamed(model.state_dict(), "", prefix)
    assert state[prefix + "logit_scale"].ndim == nonscalar
    if how == "safetensors":
        save_file(state, tmp_path / "a")
    else:
        optimizer = torch.optim.AdamW(model.parameters())
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        state = renamed(model.state_dict(), "", prefix)
        args = argparse.Namespace(lr=1.0, path=Path("x"), device=torch.device("cpu"))
        beside = {"epoch": 1, "name": "run", "optimizer": optimizer.state_dict(), "args": args}
        WRITERS[how]({**beside, "state_dict": state}, tmp_path / "a")
    got = checkpoints.read(tmp_path / "a")
    assert got.format == "open_clip"
    if how != "safetensors":
        said("\n".join(got.notes), "epoch, name, optimizer, args")
    same(got.tensors, model.state_dict(), order=how != "safetensors")


def test_open_clip_with_a_custom_text_tower(tmp_path: Path) -> None:
    model = open_clip.CustomTextCLIP(10, VISION, TEXT)
    torch.save({"state_dict": renamed(model.state_dict(), "", "module."), "epoch": 1}, tmp_path / "a.pt")
    got = checkpoints.read(tmp_path / "a.pt")
    assert got.format == "open_clip" and any(name.startswith("text.") for name in got.tensors)
    same(got.tensors, model.state_dict())


def test_formats_asked_for(tmp_path: Path) -> None:
    torch.save(clip().state_dict(), tmp_path / "a.pt")
    assert checkpoints.read(tmp_path / "a.pt").format == "open_clip"
    assert checkpoints.read(tmp_path / "a.pt", "state-dict").format == "state-dict"
    with refused(ValueError, "a.pt", "flyp", "open_clip"):
        checkpoints.read(tmp_path / "a.pt", "flyp")
    with refused(ValueError, "wise-ft", "wiseft"):
        checkpoints.load(tmp_path / "a.pt", format="wise-ft")


# --- OpenAI ---------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """A tower that TorchScript can hold, with OpenAI's extra numbers and mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            OrderedDict([("conv1", nn.Conv2d(3, 4, 2, bias=False)), ("ln", nn.LayerNorm(4))])
        )
        self.visual.conv1.half()
        self.text_projection = nn.Parameter(torch.randn(6, 5).half().t())
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.attn_mask = torch.full((2, 2), float("-inf"))  # no parameter and no buffer
        for name, number in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.visual.conv1(image.to(self.visual.conv1.weight.dtype))
        return (
            features * self.logit_scale.exp()
            + self.text_projection.sum()
            + self.input_resolution
            + self.attn_mask.size(0)
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_openai(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    model = Scripted().eval()
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(1, 3, 4, 4))
    made.save(str(tmp_path / "ViT-B-32.pt"))
    got = checkpoints.read(tmp_path / "ViT-B-32.pt")
    assert got.format == "openai"
    numbers = ("input_resolution", "context_length", "vocab_size")
    assert numbers[0] in got.notes[0]
    expected = {name: tensor for name, tensor in made.state_dict().items() if name not in numbers}
    assert {t.dtype for t in expected.values()} == {torch.float16, torch.float32}
    same(got.tensors, expected, order=False)
    with refused(ValueError, "task-vector", "openai"):
        checkpoints.read(tmp_path / "ViT-B-32.pt", "task-vector")


# --- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["safetensors", "zip", "old"])
def test_huggingface(tmp_path: Path, how: str) -> None:
    model = clip()
    state = huggingface(model.state_dict())
    (save_file if how == "safetensors" else WRITERS[how])(state, tmp_path / "a")
    got = checkpoints.read(tmp_path / "a")
    assert got.format == "huggingface" and "position_ids" in got.notes[0]
    same(got.tensors, model.state_dict(), order=False)
    clip(1).load_state_dict(got.tensors)
    assert checkpoints.read(tmp_path / "a", "state-dict").tensors.keys() == state.keys()


def test_huggingface_towers_alone(tmp_path: Path) -> None:
    state, whole = huggingface(clip().state_dict()), clip().state_dict()
    vision = {n: t for n, t in state.items() if n.startswith(("vision_model.", "visual_projection."))}
    save_file(vision, tmp_path / "vision.safetensors")
    got = checkpoints.read(tmp_path / "vision.safetensors")
    same(got.tensors, {n: t for n, t in whole.items() if n.startswith("visual.")}, order=False)
    said("\n".join(got.notes))
    del vision["visual_projection.weight"]
    save_file(vision, tmp_path / "bare.safetensors")
    said("\n".join(checkpoints.read(tmp_path / "bare.safetensors").notes))
    text = {n: t for n, t in state.items() if n.startswith(("text_model.", "text_projection."))}
    save_file(text, tmp_path / "text.safetensors")
    names = checkpoints.load(tmp_path / "text.safetensors")
    assert names.keys() == {n for n in whole if not n.startswith("visual.")} - {"logit_scale"}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda s: s.pop("vision_model.encoder.layers.0.self_attn.k_proj.weight"), "k_proj.weight"),
        (lambda s: s.update({"classifier.weight": torch.ones(3, 16)}), "classifier.weight"),
        (lambda s: s.update({"vision_model.head.probe": torch.ones(3)}), "vision_model.head.probe"),
        (lambda s: s.update({"visual_projection.weight": torch.ones(3)}), ""),
        (
            lambda s: s.update({"vision_model.pre_layernorm.weight": torch.ones(16)}),
            "visual.ln_pre.weight",
        ),
        (
            lambda s: s.update({"text_model.encoder.layers.1.self_attn.v_proj.bias": torch.ones(12).half()}),
            "",
        ),
    ],
)
def test_huggingface_that_is_not_clip(tmp_path: Path, change: Callable[[State], object], facts: str) -> None:
    state = huggingface(clip().state_dict())
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    with refused(ValueError, *facts.split()):
        checkpoints.load(tmp_path / "a.safetensors")


# --- other things of torch ------------------------------------------------------------------------


def test_text_tower_as_torch_module(tmp_path: Path) -> None:
    tower = TextTransformer(7, 30, 12, 2, 2, output_dim=10)
    buffer = io.BytesIO()
    pickle.dump(tower, buffer)
    (tmp_path / "a.pkl").write_bytes(buffer.getvalue())
    same(checkpoints.load(tmp_path / "a.pkl"), tower.state_dict())


# --- what a file says of its activation ---------------------------------------------------------------

QUICK, PLAIN = "QuickGELU", "GELU"
SMALL = {"embed_dim": 10, "vision_cfg": VISION, "text_cfg": TEXT}


class Functional(nn.Module):
    """A block whose activation is no module: only the archive's code has it."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.visual = nn.Linear(4, 4)
        self.quick = quick

    def forward(self, x: Tensor) -> Tensor:
        x = self.visual(x)
        return x * torch.sigmoid(1.702 * x) if self.quick else nn.functional.gelu(x)


class FunctionalQuick(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = self.visual(x)
        return x * torch.sigmoid(1.702 * x)


class FunctionalPlain(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.visual(x))


def whole(folder: Path, quick: bool) -> Path:
    torch.save(clip(quick_gelu=quick), folder / "a.pt")
    return folder / "a.pt"


def encoder(folder: Path, quick: bool) -> Path:
    class CLIPEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = clip(quick_gelu=quick)

    CLIPEncoder.__qualname__ = "CLIPEncoder"
    globals()["CLIPEncoder"], kept = CLIPEncoder, globals()["CLIPEncoder"]
    torch.save(CLIPEncoder(), folder / "a.pt")
    globals()["CLIPEncoder"] = kept
    return folder / "a.pt"


def traced(folder: Path, quick: bool) -> Path:
    torch.jit.trace(clip(quick_gelu=quick).visual.eval(), torch.zeros(1, 3, 8, 8), check_trace=False)
    script = torch.jit.trace_module(
        clip(quick_gelu=quick).eval(), {"encode_image": torch.zeros(1, 3, 8, 8)}, check_trace=False
    )
    script.save(str(folder / "a.pt"))
    return folder / "a.pt"


def functional(folder: Path, quick: bool) -> Path:
    torch.jit.trace(Functional(quick), torch.zeros(1, 4)).save(str(folder / "a.pt"))
    return folder / "a.pt"


def scripted(folder: Path, quick: bool) -> Path:
    torch.jit.script((FunctionalQuick if quick else FunctionalPlain)(quick)).save(str(folder / "a.pt"))
    return folder / "a.pt"


def bare(name: str, metadata: dict[str, str] | None = None, **beside: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(clip().state_dict(), folder / name, metadata)
        for other, content in beside.items():
            (folder / f"{other}.json").write_text(
                content if isinstance(content, str) else json.dumps(content)
            )
        return folder / name

    return write


def hugging(folder: Path, config: Any, name: str = "model.safetensors") -> Path:
    save_file({"vision_model.embeddings.class_embedding": torch.ones(2)}, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / name


@pytest.mark.parametrize("write", [whole, encoder, traced, functional, scripted])
@pytest.mark.parametrize("quick", [True, False])
def test_activations_in_a_file(tmp_path: Path, write: Callable[[Path, bool], Path], quick: bool) -> None:
    got = checkpoints.read(write(tmp_path, quick))
    found = got.tensors.activation["image"]
    assert found.quick is quick
    assert any((QUICK if quick else PLAIN) in note for note in got.notes)
    assert checkpoints.load(got.file).activation == got.tensors.activation  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("write", "image"),
    [
        (bare("a.safetensors"), None),
        (bare("a.safetensors", {"quick_gelu": "True"}), True),
        (bare("a.safetensors", {"hidden_act": "gelu"}), False),
        (bare("a.safetensors", {"hidden_act": "relu", "n": "{"}), None),
        (bare("a.safetensors", {"config": json.dumps({"model_cfg": {**SMALL, "quick_gelu": True}})}), True),
        (bare("a.safetensors", {"finetune": json.dumps({"configuration": {"model": SMALL}})}), False),
        (bare("a.safetensors", open_clip_config={"model_cfg": {**SMALL, "quick_gelu": True}}), True),
        (bare("a.safetensors", open_clip_config={"model_cfg": SMALL}), False),
        (bare("a.safetensors", open_clip_config={**SMALL, "vision_cfg": {"timm_model_name": "x"}}), None),
        (bare("a.safetensors", open_clip_config={**SMALL, "vision_cfg": {"layers": [1, 1, 1, 1]}}), None),
        (bare("a.safetensors", open_clip_config="[" * 9999), None),
        (bare("a.safetensors", config={"vision_config": {"hidden_act": "quick_gelu"}}), None),  # of another
        (bare("model.safetensors", config={"vision_config": {"hidden_act": "quick_gelu"}}), True),
        (bare("model.safetensors", config={"lr": 1e-5, "model": "x"}), None),
        # Two that contradict each other are no evidence.
        (bare("a.safetensors", {"quick_gelu": "true"}, open_clip_config={"model_cfg": SMALL}), None),
        (lambda folder: hugging(folder, {"vision_config": {"hidden_act": "quick_gelu"}}, "x.bin"), True),
        (lambda folder: hugging(folder, {"vision_config": {"hidden_act": "gelu"}}), False),
        (lambda folder: hugging(folder, {"vision_config": {}}), None),
        (lambda folder: hugging(folder, {"model_type": "clip", "vision_config": {}}), True),  # its default
        (lambda folder: hugging(folder, {"model_type": "clip_vision_model", "hidden_act": "gelu"}), False),
        (lambda folder: hugging(folder, ["vision_config"]), None),
    ],
)  # fmt: skip
def test_activations_beside_weights(
    tmp_path: Path, write: Callable[[Path], Path], image: bool | None
) -> None:
    file = write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (link := tmp_path / "elsewhere" / "zeroshot.pt").symlink_to(file)
    for name in (file, link):
        found = checkpoints.read(name).tensors.activation.get("image")
        assert (found and found.quick) == image, found


def test_activations_that_differ_between_the_towers(tmp_path: Path) -> None:
    model = clip()
    for block in model.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    torch.save(model, tmp_path / "a.pt")
    found = checkpoints.read(tmp_path / "a.pt").tensors.activation
    assert (found["image"].quick, found["text"].quick) == (False, True)
    model.visual.transformer.resblocks[0].mlp.gelu = open_clip.transformer.QuickGELU()
    torch.save(model, tmp_path / "b.pt")  # both in one tower: none
    got = checkpoints.read(tmp_path / "b.pt")
    assert list(got.tensors.activation) == ["text"]
    said("\n".join(got.notes))
