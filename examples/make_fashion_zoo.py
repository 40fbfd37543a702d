"""Make the Fashion zoo: 36 models fine-tuned from each of three tiny CLIP models, by a recipe written before.

    apt-get install dataset-fashion-mnist
    python examples/make_fashion_zoo.py DIR [--jobs 2] [--plan]

Everything is fixed in `fashion_recipe.toml` beside this file: data, styles, captions, grids, the studies and
the hypotheses. From 70,000 images of garments (Debian's package, MIT licence), each block pre-trains a CLIP
contrastively on images in six styles, with its own seed, and fine-tunes copies of its image encoder and head
on plain images.

| in DIR | contents |
| --- | --- |
| `recipe.json` | the recipe that made it; another one is refused |
| `data/*.npz` | images for pre-training and fine-tuning, and the test sets |
| `start0` ... | the pre-trained models |
| `block0` ... | a zoo each, for `python -m rft_fast.sweep DIR/block0` |

A stopped or killed command resumes: repeat it. `--jobs N` starts N processes of this command, which divide
the work; so do several commands of your own with the same DIR, once one of them has written `data`. `--quick`
uses the tiny sizes of the recipe, for tests.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import tiny_clip
import torch
from safetensors.torch import save
from tiny_clip import Labelled, jittered, noised, normalized, shuffled_in_rounds, to_bytes, turn, warped
from torch import Tensor

from rft_fast import finetune
from rft_fast.clip.classifier import ZeroShotClassifier
from rft_fast.common import disk
from rft_fast.common.words import differences, some
from rft_fast.finetune.losses import classifier
from rft_fast.finetune.output import FileKeeper

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Recipe = dict[str, Any]
KEEP_EVERY = 200  # steps between two saved states, a few seconds of work
WEIGHTS = "clip.safetensors"  # of a pre-trained image encoder and its zero-shot head
PACKAGE = "dataset-fashion-mnist"


def read_recipe(file: Path, quick: bool) -> Recipe:
    """The entries of the recipe; with `quick`, its tiny sizes instead of the real ones."""
    recipe = tomllib.loads(file.read_text(encoding="utf-8"))
    for table, entries in recipe.pop("quick").items():
        if quick:
            recipe[table] |= entries
    if quick:
        del recipe["data"]["sha256"]
    return recipe


def claim_folder(out: Path, recipe: Recipe) -> None:
    """Record the recipe in the directory, or refuse one that was made by another recipe."""
    file = out / "recipe.json"
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if different := differences(there, recipe, sides=("there", "in the recipe")):
            raise ValueError(
                f"{out} was made by another recipe ({some(different)}); restore the recipe, or choose "
                "another DIR"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and has no recipe.json; choose a new directory")
    else:
        out.mkdir(parents=True, exist_ok=True)
        disk.replace(file, (json.dumps(recipe, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------------------- data


def read_idx(recipe: Recipe, folder: Path, part: str) -> Labelled:
    """Images and labels of one part, `train` or `t10k`, from IDX files."""
    arrays = []
    for name, header in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; install the images with apt-get install {PACKAGE}, or name their "
                "folder with --images"
            )
        content = file.read_bytes()
        expected = recipe["data"].get("sha256", {}).get(name)
        if expected is not None and (found := hashlib.sha256(content).hexdigest()) != expected:
            raise ValueError(f"{file} has the SHA-256 {found}, the recipe expects {expected}: other images")
        arrays.append(np.frombuffer(gzip.decompress(content), np.uint8, offset=header))
    images = torch.from_numpy(arrays[0].reshape(-1, 28, 28).copy()).float() / 255
    return Labelled(images, torch.from_numpy(arrays[1].copy()).long())


def occluded(images: Tensor, side: int, grey: float) -> Tensor:
    """Images with a grey square at a random place."""
    start = torch.randint(28 - side + 1, (2, len(images), 1))
    rows, columns = ((first <= torch.arange(28)) & (torch.arange(28) < first + side) for first in start)
    return images.masked_fill(rows[:, :, None] & columns[:, None, :], grey)


def scaled(images: Tensor, least: float, most: float) -> Tensor:
    """Images made smaller, each by a random factor."""
    n = len(images)
    return warped(images, torch.zeros(n), scale=least + (most - least) * torch.rand(n))


STYLES: dict[str, Callable[..., Tensor]] = {
    "plain": lambda images: images,
    "rotated": lambda images, least, most: warped(images, turn(len(images), least, most)),
    "noisy": noised,
    "inverted": lambda images: 1 - images,
    "occluded": occluded,
    "scaled": scaled,
}


def in_style(recipe: Recipe, style: str, images: Tensor) -> Tensor:
    return STYLES[style](images, **recipe["styles"][style])


def ood_styles(recipe: Recipe) -> list[str]:
    return [style for style in recipe["styles"] if style != "plain"]


def data_names(recipe: Recipe) -> list[str]:
    return ["pretrain", "train", *ood_styles(recipe), "plain"]


def deal(recipe: Recipe, folder: Path) -> dict[str, Labelled]:
    """Deal the images out: name of a set -> images, the styles applied. The same on every call."""
    sizes = {"pretrain": recipe["data"]["pretrain"], "train": recipe["data"]["finetune"]}
    sizes |= dict.fromkeys(ood_styles(recipe), recipe["data"]["ood"])
    seed = recipe["data"]["split-seed"]
    rest = shuffled_in_rounds(read_idx(recipe, folder, "train"), seed)
    if (needed := sum(sizes.values())) > len(rest.labels):
        raise ValueError(f"the recipe needs {needed} training images, {folder} has {len(rest.labels)}")
    sets, first = {}, 0
    for name, size in sizes.items():
        sets[name], first = rest.part(first, first + size), first + size
    test = shuffled_in_rounds(read_idx(recipe, folder, "t10k"), seed)
    sets["plain"] = test.part(0, recipe["data"]["id"])
    for number, style in enumerate(ood_styles(recipe)):
        torch.manual_seed(1000 * seed + number)
        sets[style] = Labelled(in_style(recipe, style, sets[style].images), sets[style].labels)
    return sets


def write_data(sets: dict[str, Labelled], out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, (images, labels) in sets.items():
        content = io.BytesIO()
        np.savez_compressed(content, images=to_bytes(images).numpy(), labels=labels.numpy())
        disk.replace(out / f"{name}.npz", content.getvalue())


# ----------------------------------------------------------------------------------- pre-training


class Captions:
    """The texts of a recipe and their tokens."""

    def __init__(self, recipe: Recipe) -> None:
        self.classes, self.templates = recipe["captions"]["classes"], recipe["captions"]["templates"]
        self.styles = list(recipe["styles"])
        texts = [template.format_map({"class": "", "style": ""}) for template in self.templates]
        self._tokens = tiny_clip.vocabulary(" ".join([*texts, *self.classes, *self.styles]))
        self.length = max(len(template.split()) for template in self.templates) + 1  # and the end
        self.model = tiny_clip.architecture(self.length, len(self._tokens))

    def tokens(self, texts: list[str]) -> Tensor:
        return tiny_clip.tokenized(texts, self._tokens, self.length)

    def of(self, template: int, label: int, style: int) -> str:
        words = {"class": self.classes[label], "style": self.styles[style]}
        return str(self.templates[template].format_map(words))

    def prompts(self) -> Tensor:
        """int64 [classes, templates, length]: every class in the templates that name no style."""
        templates = [template for template in self.templates if "{style}" not in template]
        rows = [[template.format_map({"class": name}) for template in templates] for name in self.classes]
        return torch.stack([self.tokens(row) for row in rows])


@dataclass(frozen=True)
class Pairs:
    """Batches of images in random styles with captions; a batch depends on seed, epoch and number alone."""

    recipe: Recipe
    captions: Captions
    data: Labelled
    seed: int

    def __len__(self) -> int:
        return len(self.data.labels) // int(self.recipe["pretraining"]["batch-size"])

    def epoch(self, number: int, first: int = 0) -> Iterator[finetune.Batch]:
        size = self.recipe["pretraining"]["batch-size"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1000 + number) * 100_000)
            order = torch.randperm(len(self.data.labels))
        for batch in range(first, len(self)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((self.seed * 1000 + number) * 100_000 + 1 + batch)
                made = self._batch(order[batch * size : (batch + 1) * size])
            yield made

    def _batch(self, chosen: Tensor) -> finetune.Batch:
        how, styles, n = self.recipe["pretraining"], self.captions.styles, len(chosen)
        images, labels = jittered(self.data.images[chosen], how["jitter"]), self.data.labels[chosen]
        shares = [how["plain"] if s == "plain" else (1 - how["plain"]) / (len(styles) - 1) for s in styles]
        style = torch.multinomial(torch.tensor(shares), n, replacement=True)
        for number, name in enumerate(styles):
            if len(which := torch.nonzero(style == number)[:, 0]):
                images[which] = in_style(self.recipe, name, images[which])
        template = torch.randint(len(self.captions.templates), (n,))
        places = zip(template.tolist(), labels.tolist(), style.tolist(), strict=True)
        texts = self.captions.tokens([self.captions.of(*place) for place in places])
        return finetune.Batch(normalized(images), labels, texts=texts)


def new_model(captions: Captions, seed: int) -> ZeroShotClassifier:
    torch.manual_seed(seed)
    clip = open_clip.CustomTextCLIP(**captions.model)
    return ZeroShotClassifier(clip.visual, clip.text, captions.prompts(), clip.logit_scale)


def pretraining_setting(recipe: Recipe) -> finetune.Setting:
    how = recipe["pretraining"]
    return finetune.Setting(
        lr=how["lr"],
        epochs=how["epochs"],
        weight_decay=how["weight-decay"],
        betas=tuple(how["betas"]),
        warmup=how["warmup"],
        batch_size=how["batch-size"],
    )


def images_of(file: Path) -> Labelled:
    with np.load(file, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"]).float() / 255
        return Labelled(images, torch.from_numpy(arrays["labels"]))


def pretrain(recipe: Recipe, out: Path, number: int) -> None:
    """Pre-train the CLIP model of a block, or resume it, and write it as an image encoder with its head."""
    start, seed, captions = out / f"start{number}", recipe["pretraining"]["seeds"][number], Captions(recipe)
    model = new_model(captions, seed)
    keeper = FileKeeper(start / "pretraining.resume", {"block": number}, KEEP_EVERY)
    pairs = Pairs(recipe, captions, images_of(out / "data" / "pretrain.npz"), seed)
    finetune.train(model, pairs, pretraining_setting(recipe), keeper=keeper, label=f"block {number}")
    write_start(start, captions, model)
    keeper.file.unlink(missing_ok=True)


def write_start(start: Path, captions: Captions, model: ZeroShotClassifier) -> None:
    """Write the image encoder, with the head that the text encoder makes of the prompts."""
    start.mkdir(exist_ok=True)
    config = {"model_cfg": captions.model, "preprocess_cfg": tiny_clip.PREPROCESS}
    disk.replace(start / "model.json", (json.dumps(config, indent=2) + "\n").encode())
    state = {
        name if name.startswith("classification_head.") else f"model.{name}": value.detach().contiguous()
        for name, value in classifier(model).state_dict().items()
    }
    disk.replace(start / WEIGHTS, save(state))


# ------------------------------------------------------------------------------------ fine-tuning


def settings(recipe: Recipe) -> dict[str, finetune.Setting]:
    """The grid: name -> setting."""
    how = recipe["finetuning"]
    choices = {name: how[name] for name in ("lr", "epochs", "augment")}
    fixed = {"weight_decay": how["weight-decay"], "batch_size": how["batch-size"], "seed": how["seed"]}
    return finetune.grid(choices, **fixed)


def fine_tune(recipe: Recipe, out: Path, number: int) -> list[str]:
    """Make the models of a block that no other process is making. Returns those that diverged, and why."""
    start, data = out / f"start{number}", out / "data"
    request = finetune.Request(
        arch=str(start / "model.json"),
        zeroshot=str(start / WEIGHTS),
        train=data / "train.npz",
        out=out / f"block{number}",
        settings=settings(recipe),
        val={"plain": data / "plain.npz"},
        ood={style: data / f"{style}.npz" for style in ood_styles(recipe)},
        label_map="order",
        store="float16",
        device="cpu",
        workers=1,
        in_memory=True,
        keep_every=KEEP_EVERY,
    )
    return [f"block {number}, {name}: {why}" for name, why in finetune.run(request).diverged.items()]


def work(recipe: Recipe, out: Path) -> list[str]:
    """One process's share: pre-training of all blocks, then their fine-tuning. Returns what diverged."""
    blocks = range(len(recipe["pretraining"]["seeds"]))
    for number in blocks:
        start = out / f"start{number}"
        start.mkdir(exist_ok=True)
        with disk.locked(start / ".lock") as ours:
            if ours and not (start / WEIGHTS).exists():
                pretrain(recipe, out, number)
    diverged = []
    for number in blocks:
        start = out / f"start{number}"
        with disk.locked(start / ".lock", wait=True):
            if not (start / WEIGHTS).exists():  # the process that was at it has been stopped
                pretrain(recipe, out, number)
        diverged += fine_tune(recipe, out, number)
    return diverged


def study_commands(recipe: Recipe, out: Path) -> list[str]:
    """The commands of the studies in all blocks, for a shell. Models that diverged are not named."""
    found = []
    for command, number in product(recipe["studies"]["commands"], range(len(recipe["pretraining"]["seeds"]))):
        block, grid = out / f"block{number}", settings(recipe)
        made = [name for name in grid if (block / f"{name}.safetensors").exists()] or [*grid]
        words = command.format(
            zoo=shlex.quote(str(block)),
            out=shlex.quote(str(out / f"run{number}")),
            all=shlex.join(made),
            part=shlex.join(name for name in made if grid[name].augment == "none"),
            samples=recipe["studies"]["samples"],
        )
        found.append(f"{shlex.quote(sys.executable)} -m rft_fast.sweep {words}")
    return found


# ------------------------------------------------------------------------------------------- plan


def plan(recipe: Recipe, jobs: int) -> None:
    """Print what would be made, and the time that it takes, estimated from a few steps of each kind."""
    how, grid, blocks = recipe["pretraining"], settings(recipe), len(recipe["pretraining"]["seeds"])
    n, tests = recipe["data"]["finetune"], recipe["data"]["id"]
    batches = how["epochs"] * (recipe["data"]["pretrain"] // how["batch-size"])
    print(f"{blocks} blocks, {batches} steps of pre-training and {len(grid)} models each:")
    for name, setting in grid.items():
        print(f"  {name}: {setting.epochs * math.ceil(n / setting.batch_size)} steps")
    first, each, scoring = timing(recipe, {setting.augment for setting in grid.values()})
    tuning = sum(s.epochs * n * each[s.augment] + (s.epochs + 1) * tests * scoring for s in grid.values())
    total = blocks * (batches * first + tuning) / 60
    print(
        f"an image takes {', '.join(f'{1e6 * t:.0f} us ({a})' for a, t in each.items())} in fine-tuning, ",
        end="",
    )
    print(f"{1e6 * scoring:.0f} us in scoring; a step of pre-training takes {1e3 * first:.0f} ms")
    print(
        f"estimated: {total:.0f} minutes of CPU, {total / jobs:.0f} minutes with {jobs} processes on as many "
        f"quiet cores; the recipe allows {recipe['minutes']}"
    )


def timing(recipe: Recipe, augments: set[str]) -> tuple[float, dict[str, float], float]:
    """Seconds of CPU of a step of pre-training, of an image in fine-tuning by augmentation, in scoring."""
    captions, size = Captions(recipe), recipe["pretraining"]["batch-size"]
    count = 10 * recipe["finetuning"]["batch-size"]
    data = Labelled(
        torch.rand(max(5 * size, count), 28, 28), torch.zeros(max(5 * size, count), dtype=torch.int64)
    )
    model = new_model(captions, 0)
    setting = finetune.Setting(lr=1e-5, epochs=1, warmup=1, batch_size=size)
    pairs = Pairs(recipe, captions, data, 0)
    start = time.process_time()
    finetune.train(model, pairs, setting, label="timing")
    first = (time.process_time() - start) / len(pairs)
    scored = classifier(model)
    start = time.process_time()
    with torch.no_grad():
        scored(normalized(data.images[:count]))
    scoring, each = (time.process_time() - start) / count, {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_start(out / "start0", captions, model)
        write_data({"train": data.part(0, count), "plain": data.part(0, 10)}, out / "data")
        one = {"finetuning": recipe["finetuning"] | {"lr": [1e-5], "epochs": [1]}, "styles": {"plain": {}}}
        for augment in sorted(augments):
            one["finetuning"]["augment"] = [augment]
            start = time.process_time()
            fine_tune(one, out, 0)
            each[augment] = (time.process_time() - start) / count
    return first, each, scoring


# ------------------------------------------------------------------------------------------- main


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the Fashion zoo of fashion_recipe.toml, or resume it.")
    here = Path(__file__).resolve().parent
    parser.add_argument("out", type=Path, metavar="DIR", help="directory of the zoo, to make or to resume")
    parser.add_argument("--recipe", type=Path, default=here / "fashion_recipe.toml", metavar="FILE")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of the IDX files (default: the recipe's)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="make nothing; print sizes and estimated time")
    parser.add_argument(
        "--studies", action="store_true", help="make nothing; print the commands of the studies"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    return parser


def main() -> int:
    parser = options()
    wanted = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and rounding depends on the number
    recipe = read_recipe(wanted.recipe, wanted.quick)
    if wanted.jobs < 1:
        parser.error(f"argument --jobs: expected a number of at least 1, got {wanted.jobs}")
    if wanted.plan:
        plan(recipe, wanted.jobs)
        return 0
    if wanted.studies:
        print("\n".join(study_commands(recipe, wanted.out)))
        return 0
    try:
        folder = wanted.images or Path(recipe["data"]["folder"])
        data = wanted.out / "data"
        missing = [name for name in data_names(recipe) if not (data / f"{name}.npz").exists()]
        sets = deal(recipe, folder) if missing else {}  # refused before anything is written
        claim_folder(wanted.out, recipe)
        write_data({name: sets[name] for name in missing}, data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    command = [sys.executable, __file__, *sys.argv[1:], "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    others = [subprocess.Popen(command, env=environment) for _ in range(wanted.jobs - 1)]
    diverged = work(recipe, wanted.out)
    failed = [other.args for other in others if other.wait()]
    for line in diverged:
        print(f"diverged and left out: {line}")
    if failed:
        print(f"{len(failed)} of {wanted.jobs} processes failed; the same command resumes")
        return 1
    print(f"next: python {sys.argv[0]} {wanted.out} --studies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
