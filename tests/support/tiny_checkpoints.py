"""What tests of checkpoint formats share: small models, likenesses of others' modules, writers."""

from __future__ import annotations

import argparse
import pickle
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torchvision import transforms

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 7, "vocab_size": 30, "width": 12, "heads": 2, "layers": 2}
State = dict[str, Tensor]


def clip(seed: int = 0, **options: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    model = open_clip.CLIP(10, VISION, TEXT, **options)
    for parameter in model.parameters():  # also those that begin as zeros and ones
        parameter.data = torch.randn_like(parameter)
    return model


def same(got: State, expected: State, order: bool = True) -> None:
    assert list(got) == list(expected) if order else set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor)]
        assert torch.equal(*bits), name
        assert got[name].is_contiguous() and not got[name].requires_grad


def renamed(state: State, old: str, new: str = "") -> State:
    return {new + name.removeprefix(old): tensor for name, tensor in state.items()}


def called(*_: Any) -> None:
    raise AssertionError("code of the file's classes ran")


@contextmanager
def modules_of(**contents: dict[str, Any]) -> Iterator[None]:
    """Modules that exist while a file is written, and not when it is read. Names: ``_`` for a dot."""
    made = {}
    for name, content in contents.items():
        full = name.replace("_", ".")
        module = made[full] = types.ModuleType(full)
        for key, value in content.items():
            if isinstance(value, type) or callable(value):
                value.__module__ = full
                value.__qualname__ = value.__name__ = key
            setattr(module, key, value)
        for depth in range(1, full.count(".") + 1):
            parent = full.rsplit(".", depth)[0]
            made.setdefault(parent, types.ModuleType(parent))
    shadowed = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(shadowed)


def huggingface(state: State) -> State:
    """A CLIPModel of transformers with these weights, its names written out by hand."""
    result = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.position_ids": torch.arange(7).unsqueeze(0),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].t(),
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(5).unsqueeze(0),
        "vision_model.pre_layrnorm.weight": state["visual.ln_pre.weight"],
        "vision_model.pre_layrnorm.bias": state["visual.ln_pre.bias"],
        "vision_model.post_layernorm.weight": state["visual.ln_post.weight"],
        "vision_model.post_layernorm.bias": state["visual.ln_post.bias"],
        "visual_projection.weight": state["visual.proj"].t(),
    }
    for tower, start in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(2):
            to, block = f"{tower}.encoder.layers.{layer}", f"{start}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                width = state[f"{block}.ln_1.weight"].shape[0]
                joined = state[f"{block}.attn.in_proj_{kind}"]
                result[f"{to}.self_attn.q_proj.{kind}"] = joined[:width]
                result[f"{to}.self_attn.k_proj.{kind}"] = joined[width : 2 * width]
                result[f"{to}.self_attn.v_proj.{kind}"] = joined[2 * width :]
                result[f"{to}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.out_proj.{kind}"]
                result[f"{to}.layer_norm1.{kind}"] = state[f"{block}.ln_1.{kind}"]
                result[f"{to}.layer_norm2.{kind}"] = state[f"{block}.ln_2.{kind}"]
                result[f"{to}.mlp.fc1.{kind}"] = state[f"{block}.mlp.c_fc.{kind}"]
                result[f"{to}.mlp.fc2.{kind}"] = state[f"{block}.mlp.c_proj.{kind}"]
    return {name: tensor.contiguous() for name, tensor in result.items()}


# --- likenesses of the modules of other repositories ----------------------------------------------


class LayerNorm(nn.LayerNorm):
    pass


class QuickGELU(nn.Module):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)
        self.ln_1 = LayerNorm(16)
        self.mlp = nn.Sequential(
            OrderedDict([("c_fc", nn.Linear(16, 64)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(64, 16))])
        )
        self.ln_2 = LayerNorm(16)
        self.attn_mask = torch.full((3, 3), -torch.inf)  # an attribute, no buffer


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.resblocks = nn.Sequential(Block(), Block())


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(5, 16))
        self.ln_pre = LayerNorm(16)
        self.transformer = Transformer()
        self.proj = nn.Parameter(torch.randn(16, 10).t().contiguous().t())  # not contiguous


class Bundled(nn.Module):
    """``clip.model.CLIP``"""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Transformer()
        self.token_embedding = nn.Embedding(30, 16)
        self.positional_embedding = nn.Parameter(torch.randn(7, 16))
        self.ln_final = LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 10))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.register_buffer("byte_mask", torch.tensor([1, 0, 1], dtype=torch.uint8))
        self.register_buffer("steps", torch.tensor(3))
        self.register_parameter("absent", None)
        self.act = torch.nn.functional.gelu
        self.dtype = torch.float32


class Head(nn.Linear):
    def __init__(self, normalize: bool = True) -> None:
        super().__init__(10, 4)
        self.normalize = normalize

    __setstate__ = called


class ImageEncoder(nn.Module):
    def __init__(self, convert: Any, half: bool = False) -> None:
        super().__init__()
        self.model = Bundled()
        if half:
            self.model.visual.half()
        self.train_preprocess = self.val_preprocess = transforms.Compose(
            [
                transforms.Resize(8, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(8),
                convert,
                transforms.ToTensor(),
                transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
            ]
        )
        self.cache_dir: Path | None = None

    __setstate__ = called


class ImageClassifier(nn.Module):
    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.classification_head = head
        self.process_images = True
        self.train_preprocess = encoder.train_preprocess
        self.args = argparse.Namespace(lr=1e-5, data=Path("here"), betas=(0.9, 0.999))

    __setstate__ = called


class CLIPEncoder(nn.Module):
    def __init__(self, convert: Any) -> None:
        super().__init__()
        self.model = Bundled()
        self.train_preprocess = convert
        self.cache_dir = None

    __setstate__ = called


def written(
    write: Callable[[Any, Path], None], file: Path, make: Callable[[dict[str, Any]], nn.Module]
) -> State:
    """Writes the module that ``make`` gives, while its classes exist, and returns its state dict."""

    def convert_to_rgb(image: Any) -> Any:
        called()

    def fresh(kind: type, **content: Any) -> Any:  # classes that only this file knows
        return type(kind.__name__, (kind,), content)

    torch.manual_seed(0)
    own = {
        "clip_clip": {"_convert_to_rgb": convert_to_rgb},
        "clip_model": {
            "CLIP": Bundled,
            "LayerNorm": LayerNorm,
            "QuickGELU": QuickGELU,
            "ResidualAttentionBlock": Block,
            "Transformer": Transformer,
            "VisualTransformer": Visual,
        },
        "src_models_modeling": {
            "ImageClassifier": ImageClassifier,
            "ImageEncoder": ImageEncoder,
            "ClassificationHead": Head,
            "CLIPEncoder": CLIPEncoder,
        },
    }
    kept = [(k, k.__module__, k.__qualname__, k.__name__) for table in own.values() for k in table.values()]
    try:
        with modules_of(**own):
            module = make({"convert": convert_to_rgb})
            write(module, file)
            return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    finally:
        for kind, module_name, qualname, name in kept:
            kind.__module__, kind.__qualname__, kind.__name__ = module_name, qualname, name


def dump(protocol: int) -> Callable[[Any, Path], None]:
    def write(content: Any, file: Path) -> None:
        with file.open("wb") as stream:
            pickle.dump(content, stream, protocol=protocol)

    return write


def save(content: Any, file: Path) -> None:
    torch.save(content, file)


def save_old(content: Any, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, file, _use_new_zipfile_serialization=False)


WRITERS = {
    "pickle2": dump(2),
    "pickle3": dump(3),
    "pickle4": dump(4),
    "pickle5": dump(5),
    "zip": save,
    "old": save_old,
}
