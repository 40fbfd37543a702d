"""From files to figures as a reader of model-soups would: checkpoints, ImageNet-A's folders, a sweep.

    python examples/soup_walkthrough.py DIR [--arch ViT-B-32-quickgelu] [--classes 40] [--images 2]
    python -m rft_fast.sweep DIR/zoo

Nothing is downloaded, so that everything can be tried anywhere: the checkpoints have the architecture, the
names and the layout of the published model-soups files and ImageNet's 1,000 rows in their head, but weights
of this script's making; the images are patterns, one for each class, in folders named as ImageNet-A's. The
zero-shot model is a random image tower with a head fitted to its features by ridge regression; two models
are fine-tuned from it by ``python -m rft_fast.finetune``. Accuracies say nothing about CLIP.

On two cores it takes some two minutes with 40 classes, and the sweep eight. ``--arch`` may be a JSON file
in open_clip's format: with the tiny model of tests/project/test_examples.py, all of it takes seconds.
"""

from __future__ import annotations

import argparse
import colorsys
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rft_fast.clip import architectures

ROWS = 1000  # of the head: ImageNet's classes
SCALE = 10  # nats between right and wrong, where the fit is perfect


def synsets(name: str) -> list[str]:
    """The folder names of ImageNet's variants, in the order of the head's rows, from timm."""
    return files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text().split()


def pattern(kind: int, generator: np.random.Generator, shifted: bool) -> Image.Image:
    """An image of a class: stripes of its own colours, width and direction, somewhere in the frame.

    shifted: out of distribution: darker, noisy and a bit turned.
    """
    width, height = (int(side) for side in generator.integers(180, 400, 2))
    hue, angle = (kind * 0.618) % 1, (kind * 0.381) % 1 * math.pi
    waves = 4 + kind % 7
    if shifted:
        angle += float(generator.uniform(-0.15, 0.15))
    x, y = np.meshgrid(np.arange(width) / 224, np.arange(height) / 224)
    phase = waves * 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) + generator.uniform(0, 6)
    stripes = (0.5 + 0.5 * np.sin(phase))[..., None]
    colours = [np.array(colorsys.hsv_to_rgb((hue + turn) % 1, 0.8, 0.9)) for turn in (0.0, 0.35)]
    pixels = stripes * colours[0] + (1 - stripes) * colours[1]
    pixels = pixels + generator.normal(0, 0.15 if shifted else 0.05, pixels.shape)
    pixels = pixels * (0.75 if shifted else generator.uniform(0.85, 1.0))
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


def write_images(folder: Path, wnids: list[str], images: int, seed: int, shifted: bool) -> None:
    """``folder/<wnid>/<number>.jpg``, of sizes that differ, as the published sets are laid out."""
    generator = np.random.default_rng(seed)
    for kind, wnid in enumerate(wnids):
        (folder / wnid).mkdir(parents=True)
        for number in range(images):
            pattern(kind, generator, shifted).save(folder / wnid / f"{number}.jpg", quality=90)


@torch.inference_mode()
def features_of(
    visual: torch.nn.Module, prepared: architectures.Preprocess, folder: Path, wnids: list[str]
) -> tuple[Tensor, Tensor]:
    """Normalised features [n, d] of a folder's images, and the place of each one's class in ``wnids``."""
    transform = open_clip.image_transform(prepared.size, is_train=False, mean=prepared.mean, std=prepared.std)
    found = [(file, kind) for kind, wnid in enumerate(wnids) for file in sorted((folder / wnid).iterdir())]
    features = []
    for start in range(0, len(found), 32):
        batch = [transform(Image.open(file).convert("RGB")) for file, _ in found[start : start + 32]]
        features.append(F.normalize(visual(torch.stack(batch)), dim=-1))
    return torch.cat(features), torch.tensor([kind for _, kind in found])


def ridge(features: Tensor, kinds: Tensor, classes: int, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight [classes, d] and bias [classes] of the linear map nearest to the classes' indicators."""
    inputs, targets = features.double(), F.one_hot(kinds, classes).double()
    means = inputs.mean(0)
    centred = inputs - means
    gram = centred.T @ centred + penalty * len(inputs) / inputs.shape[1] * centred.var() * torch.eye(
        inputs.shape[1], dtype=torch.float64
    )
    weight = torch.linalg.solve(gram, centred.T @ targets).T
    return weight.float(), (targets.mean(0) - weight @ means).float()


def soup_state(clip: open_clip.CLIP, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The names of model-soups: the text transformer is gone, its other parameters are left over."""
    state = {f"model.{name}": tensor for name, tensor in clip.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("model.transformer.")}
    return {**state, "classification_head.weight": weight, "classification_head.bias": bias}


def write_zeroshot(options: argparse.Namespace, wnids: list[str]) -> Path:
    """A zero-shot model whose head knows the patterns, as the rows of its 1,000 that the wnids have."""
    torch.manual_seed(options.seed)
    clip = open_clip.CLIP(**architectures.config(options.arch)[1]).eval()
    prepared = architectures.preprocess(options.arch)
    features, kinds = features_of(clip.visual, prepared, options.out / "to-fit-the-head", wnids)
    weight, bias = ridge(features, kinds, len(wnids))
    rows = synsets("imagenet")
    chosen = torch.tensor([rows.index(wnid) for wnid in wnids])
    head = torch.zeros(ROWS, weight.shape[1]).index_copy_(0, chosen, SCALE * weight)
    offset = torch.full((ROWS,), SCALE * float(bias.min())).index_copy_(0, chosen, SCALE * bias)
    file: Path = options.out / "zeroshot.pt"
    torch.save(soup_state(clip, head, offset), file)
    return file


# Short, so that all studies end in some minutes on two cores.
OPTIONS = """
[options]
alphas = "0:1:5"
layer-alphas = [0, 0.5, 1]
layer-samples = 32
sharpness-alphas = [0, 0.5, 1]
sharpness-samples = 16
rhos = 0.1
draws = 4
layer-draws = 2
mask-seeds = 1
granularity = "block"
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", metavar="DIR", type=Path, help="new directory for models and images")
    parser.add_argument(
        "--arch",
        default="ViT-B-32-quickgelu",
        help="a CLIP: open_clip model name, or a JSON file (%(default)s)",
    )
    parser.add_argument(
        "--classes", type=int, default=40, help="the first N of ImageNet-A's 200 (%(default)s)"
    )
    parser.add_argument("--images", type=int, default=2, help="of each class and set (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new directory")
    wnids = synsets("imagenet_a")[: options.classes]
    sets = {"to-fit-the-head": False, "train": False, "imagenet-val-part": False, "imagenet-a": True}
    for number, (name, shifted) in enumerate(sets.items()):
        write_images(options.out / name, wnids, options.images, options.seed + number, shifted)
    zeroshot = write_zeroshot(options, wnids)
    data, zoo = options.out, options.out / "zoo"
    words = ["--arch", options.arch, "--zeroshot", zeroshot, "--train", data / "train", "--augment", "none"]
    words += ["--val", f"val={data / 'imagenet-val-part'}", "--ood", f"imagenet-a={data / 'imagenet-a'}"]
    words += ["--lr", "3e-7", "2e-6", "--epochs", "1", "--warm-up", "1", "--batch-size", "20", "--out", zoo]
    subprocess.run([sys.executable, "-m", "rft_fast.finetune", *map(str, words)], check=True)
    with (zoo / "zoo.toml").open("a") as file:
        file.write(OPTIONS)
    print(f"now: python -m rft_fast.sweep {zoo}")


if __name__ == "__main__":
    main()
