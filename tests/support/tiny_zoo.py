"""A tiny zoo for the command line's tests: made in a moment, in the formats that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from rft_fast import sweep
from support.wording import command_refused

VISION = {"image_size": 8, "patch_size": 4, "width": 8, "head_width": 4, "layers": 1}
ARCH: dict[str, Any] = {
    "model_cfg": {"embed_dim": 6, "vision_cfg": {**VISION, "mlp_ratio": 2.0}, "text_cfg": {}},
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 8},
}
CLASSES = 3
# All studies in a few seconds.
BRIEF = ["--alphas", "0:1:5", "--sharpness-alphas", "0", "0.5", "1", "--layer-samples", "39", "--draws",
         "4", "--rhos", "0.5", "1", "--straggler-margin", "1e-4", "--mask-seeds", "2", "--methods", "zero",
         "magnitude", "--device", "cpu"]  # fmt: skip


def make(folder: Path) -> Path:
    """Checkpoints in model-soups layout, an .npz, and a folder of class folders."""
    (folder / "tiny.json").write_text(json.dumps(ARCH))
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(6, ARCH["model_cfg"]["vision_cfg"], text)
        base = {f"model.visual.{name}": tensor for name, tensor in clip.visual.state_dict().items()}
        base["model.logit_scale"] = torch.tensor(2.0)
        base["classification_head.weight"] = 3 * torch.randn(CLASSES, 6)
        base["classification_head.bias"] = torch.zeros(CLASSES)
        save(base, folder / "zeroshot.safetensors")
        for name in "abc":
            tuned = {key: tensor + 0.3 * torch.randn_like(tensor) for key, tensor in base.items()}
            save(tuned, folder / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "far.npz", images=images, labels=rng.integers(0, CLASSES, 40))
    for i in range(12):
        path = folder / "near" / str(i % CLASSES) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    return folder


def save(state: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def own_models(zoo: Path, models: str = "ab") -> list[str]:
    return [
        *("--arch", str(zoo / "tiny.json"), "--zeroshot", str(zoo / "zeroshot.safetensors")),
        *("--finetuned", *(str(zoo / f"{name}.safetensors") for name in models)),
        *("--data", f"far={zoo / 'far.npz'}", "--id-data", f"near={zoo / 'near'}"),
    ]


def sweep_refused(arguments: list[str], *facts: object) -> None:
    command_refused(sweep.main, arguments, *facts, silent=False)
