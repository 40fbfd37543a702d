"""Small trees of images in the true layouts of ImageNet's relatives."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


@functools.cache
def ids(variant: str = "") -> list[str]:
    """timm's own lists."""
    import timm.data

    names = list(timm.data.ImageNetInfo().label_names())
    if not variant:
        return names
    indices = Path(timm.data.__file__).parent / "_info" / f"imagenet_{variant}_indices.txt"
    return [names[int(index)] for index in indices.read_text().split()]


def tree(root: Path, names: list[str], each: int = 1, form: str = "{}.png") -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / form.format(index))
    return root


# Folders, their classes, and the ImageNet classes that are right for them, as the true files write them.
FOLDERS = {
    "alarm_clock": ("Alarm clock", "analog clock; digital clock"),
    "backpack": ("Backpack", "backpack, back pack, knapsack, packsack, rucksack, haversack"),
    "bicycle": ("Bicycle", "mountain bike, all-terrain bike; tandem, bicycle-built-for-two"),
    "chair": ("Chair", "barber chair; folding chair; rocking chair, rocker"),
    "binder_closed": ("Binder (closed)", "binder, ring-binder"),
    "air_freshener": ("Air freshener", None),
    "zipper": ("Zipper", None),
}


def mappings(folder: Path, seed: int = 0) -> dict[str, list[int]]:
    """The four files; returns the truth: rows by folder."""
    lines = [f"thing {i}, item {i}" for i in range(1000)]
    lines[5] = lines[6] = "crane"  # ImageNet has two, by one name
    wanted = [name for _, text in FOLDERS.values() if text for name in text.split("; ")]
    order = random.Random(seed).sample(range(10, 1000), len(wanted))
    for line, name in zip(order, wanted, strict=True):
        lines[line] = name
    line_of_row = random.Random(seed + 1).sample(range(1000), 1000)
    folder.mkdir(parents=True)

    def write(name: str, content: Any) -> None:
        (folder / name).write_text(json.dumps(content, indent=2))

    write("folder_to_objectnet_label.json", {name: label for name, (label, _) in FOLDERS.items()})
    write("objectnet_to_imagenet_1k.json", {label: text for label, text in FOLDERS.values() if text})
    write("pytorch_to_imagenet_2012_id.json", {str(row): line for row, line in enumerate(line_of_row)})
    (folder / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    return {
        name: [line_of_row.index(lines.index(part)) for part in text.split("; ")]
        for name, (_, text) in FOLDERS.items()
        if text
    }


def bordered(root: Path, each: int = 3) -> None:
    """Images with the red border that ObjectNet has, here two pixels wide; always the same."""
    rng = np.random.default_rng(0)
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
        for index in range(each):
            image = Image.new("RGB", (12, 12), (255, 0, 0))
            image.paste(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), (2, 2))
            image.save(root / name / f"{index:02}.png")
