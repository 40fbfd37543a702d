"""ImageNet and its relatives in their true layouts, and what goes wrong with them."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from support.tiny_trees import FOLDERS, RNG, bordered, ids, mappings, tree
from support.wording import refused, said
from torch import nn
from torchvision.datasets import ImageFolder

from rft_fast import datasets
from rft_fast.clip.architectures import Preprocess
from rft_fast.datasets import doctor
from rft_fast.evaluate import Evaluator

PREPROCESS = Preprocess((8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
IMAGENET = datasets.Rows(1000)


def load(path: Path, **more: Any) -> datasets.Dataset:
    return datasets.load("set", path, PREPROCESS, **more)


def not_loaded(path: Path, *facts: str, **more: Any) -> None:
    with refused(ValueError, "set", *facts) as caught:
        load(path, **more)
    with pytest.raises(ValueError) as again:
        datasets.find("set", path, PREPROCESS, **more)
    assert str(again.value) == str(caught.value)


# --- wnid folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "val", "val_in_folder"])
def test_imagenet_val(tmp_path: Path, inner: str) -> None:
    wnids = ids()
    tree(tmp_path / "imagenet" / inner, wnids)
    if inner:
        tree(tmp_path / "imagenet" / "train", wnids[:3])
        (tmp_path / "imagenet" / "meta.bin").touch()
    source = datasets.open_source("val", tmp_path / "imagenet")
    assert source.kind == "imagenet" and source.path == tmp_path / "imagenet" / inner
    assert any("ImageNet-1k" in note for note in source.notes)
    assert any(str(tmp_path / "imagenet" / inner) in note for note in source.notes) is bool(inner)
    got = load(tmp_path / "imagenet", rows=IMAGENET)
    assert got.labels.tolist() == list(range(1000)) and got.classes is None and got.groups is None
    assert got.class_names == tuple(wnids)
    assert datasets.find("set", tmp_path / "imagenet", PREPROCESS, rows=IMAGENET).count == 1000


def test_parts_of_which_none_is_clear_are_refused(tmp_path: Path) -> None:
    wnids = ids()[:4]
    tree(tmp_path / "train", wnids)
    not_loaded(tmp_path)
    flat = tmp_path / "val"  # as the official archive unpacks
    flat.mkdir()
    Image.new("RGB", (9, 9)).save(flat / "ILSVRC2012_val_00000001.JPEG", "JPEG")
    not_loaded(tmp_path)
    not_loaded(flat)
    tree(tmp_path / "val_in_folder", wnids)
    assert datasets.open_source("set", tmp_path).path == tmp_path / "val_in_folder"
    tree(tmp_path / "test", wnids)
    not_loaded(tmp_path, "val_in_folder")
    assert datasets.open_source("set", tmp_path / "train").path == tmp_path / "train"  # when asked for


@pytest.mark.parametrize("names", [["ants", "bees"], ["0", "1"]])
def test_of_parts_with_any_classes_the_one_to_evaluate_on_is_taken(tmp_path: Path, names: list[str]) -> None:
    tree(tmp_path / "train", names, each=3)
    tree(tmp_path / "val", names, each=2)
    rows = datasets.Rows(2, ("bees", "ants")) if "ants" in names else datasets.Rows(2)
    got = load(tmp_path, rows=rows)
    assert got.class_names == (rows.names or tuple(names))
    assert got.labels.tolist() == ([1, 1, 0, 0] if "ants" in names else [0, 0, 1, 1])
    source = datasets.open_source("set", tmp_path)
    assert source.path == tmp_path / "val"
    said("\n".join(source.notes), tmp_path / "val")
    said(str(doctor.examine(tmp_path)), "4 images", "2 classes of 2 images")


def test_this_folder_is_what_its_name_and_neighbours_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "objectnet-1.0"
    mappings(root / "mappings")
    tree(root / "images", FOLDERS)
    for path, there in ((".", root / "images"), ("..", root / "images" / "chair")):
        monkeypatch.chdir(there)
        source = datasets.open_source("set", path)
        assert source.kind == datasets.detect(path) == "objectnet" and source.trim == 2
        assert "ObjectNet" in str(doctor.examine(Path(path), quick=True))


def test_folders_named_as_parts_may_be_classes_when_said(tmp_path: Path) -> None:
    tree(tmp_path, ["train", "val"])
    not_loaded(tmp_path)
    assert load(tmp_path, kind="folder").class_names == ("train", "val")


@pytest.mark.parametrize("variant", ["a", "r"])
def test_two_hundred_classes_are_scored_among_their_own_rows(tmp_path: Path, variant: str) -> None:
    wnids = ids(variant)
    tree(tmp_path / "data" / "set", wnids)
    (tmp_path / "data" / "README.txt").touch()
    data = tmp_path / "data"  # one folder above
    truth = [ids().index(wnid) for wnid in sorted(wnids)]
    assert truth != list(range(200))
    got = load(data, rows=IMAGENET)
    assert got.labels.tolist() == truth
    assert got.classes is not None and got.classes.tolist() == sorted(truth)
    assert got.class_names == tuple(sorted(wnids)) and got.groups is None
    notes = datasets.open_source("set", data).notes
    assert any(f"ImageNet-{variant.upper()}" in note for note in notes) and str(data / "set") in notes[0]
    shutil.rmtree(data / "set" / wnids[7])
    not_loaded(data, "1", f"ImageNet-{variant.upper()}", wnids[7], rows=IMAGENET)


def test_a_part_of_imagenet_is_scored_among_itself(tmp_path: Path) -> None:
    wnids = [ids()[row] for row in (3, 17, 999)]
    tree(tmp_path / "a", wnids, each=2)
    got = load(tmp_path / "a", rows=IMAGENET)
    assert got.labels.tolist() == [3, 3, 17, 17, 999, 999]
    assert got.classes is not None and got.classes.tolist() == [3, 17, 999]
    tree(tmp_path / "b", [name.upper() for name in wnids], each=1)  # from a disk without lower case
    assert load(tmp_path / "b", rows=IMAGENET).labels.tolist() == [3, 17, 999]
    tree(tmp_path / "c", ids()[:990])
    not_loaded(tmp_path / "c", "10", "ImageNet-1k", rows=IMAGENET)


def test_wnids_that_imagenet_does_not_have_are_listed(tmp_path: Path) -> None:
    tree(tmp_path, [ids()[0], "n00000001", "n99999999"])
    not_loaded(tmp_path, "2", "3", "ImageNet", "1,000", "n00000001", "n99999999", rows=IMAGENET)
    not_loaded(tmp_path, "WordNet", "n00000001 -> 0", "n01440764 -> 1", "order", rows=datasets.Rows(3))
    own = load(tmp_path, rows=datasets.Rows(3), label_map="order")  # a head of their own
    assert own.labels.tolist() == [0, 1, 2]
    mapped = {"n00000001": None, "n99999999": [], ids()[0]: 0}
    got = load(tmp_path, rows=IMAGENET, label_map=mapped)
    assert got.labels.tolist() == [0]


def test_other_folders_among_wnids_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, [ids()[0], ids()[1], "n01443537 (1)"])
    not_loaded(tmp_path, "WordNet", "2", "n01443537 (1)")
    assert len(load(tmp_path, kind="folder").labels) == 3


def test_a_folder_of_data_sets_is_not_a_data_set(tmp_path: Path) -> None:
    tree(tmp_path / "imagenet-a", ids("a")[:3])
    tree(tmp_path / "imagenet-r", ids("r")[:3])
    not_loaded(tmp_path)
    (tmp_path / "imagenet-r").rename(tmp_path / "notes")
    shutil.rmtree(tmp_path / "notes")
    tree(tmp_path / "notes", ["odds"])
    not_loaded(tmp_path)
    assert load(tmp_path, kind="folder").class_names == ("imagenet-a", "notes")


# --- V2 --------------------------------------------------------------------------------------------


def test_v2_folders_are_numbers_not_strings(tmp_path: Path) -> None:
    root = tree(tmp_path / "v2" / "imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)])
    source = datasets.open_source("set", tmp_path / "v2")
    assert source.kind == "imagenet-v2" and source.path == root
    got = load(tmp_path / "v2", rows=IMAGENET)
    assert got.labels.tolist() == list(range(1000)) and got.classes is None
    trap = ImageFolder(str(root)).class_to_idx
    assert trap["10"] == 2  # what torchvision would score
    number = int(got.labels[537])
    stored = Image.open(root / str(number) / "0.png")
    only = datasets.load("one", tree(tmp_path / "one", ["x"]), PREPROCESS)
    stored.save(tmp_path / "one" / "x" / "0.png")
    only = datasets.load("one", tmp_path / "one", PREPROCESS)
    assert torch.equal(got.images[537], only.images[0])
    (root / "1000").mkdir()
    not_loaded(root, "imagenet-v2", "0", "999", kind="imagenet-v2")


def test_numbered_classes_in_the_order_of_strings_keep_their_numbers() -> None:
    """As a converter makes them from V2: class names are numbers, labels their places among strings."""
    names = tuple(sorted(str(i) for i in range(1000)))
    labels = torch.arange(1000)
    source = datasets.Source("arrow", Path("x"), [], labels, names, lambda index: Image.new("RGB", (8, 8)))
    for rows in (IMAGENET, None):
        assert datasets.assign(source, rows, None).labels.tolist() == [int(name) for name in names]


# --- ObjectNet -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shipped", "outer", "images", "flat"])
def test_objectnet_by_brute_force(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "objectnet-1.0"
    rows_of = mappings(root / "mappings")
    images = root if layout == "flat" else root / "images"
    bordered(images)
    (root / "README").touch()
    path = {"shipped": root, "outer": tmp_path, "images": images, "flat": root}[layout]
    source = datasets.open_source("set", path)
    assert (source.kind, source.path, source.trim) == ("objectnet", images, 2)
    assert len(source.files) == 21 and source.class_names == tuple(sorted(FOLDERS))
    scanned = datasets.find("set", path, PREPROCESS, rows=IMAGENET)
    assert scanned.count == 15
    data = load(path, rows=IMAGENET)

    files = [(name, file) for name in sorted(rows_of) for file in sorted((images / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(file))[2:-2, 2:-2] for _, file in files])
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels)  # 8 x 8 stays 8 x 8

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1000))
    with torch.no_grad():  # so that all cases happen
        model[1].bias[[row for rows in rows_of.values() for row in rows]] += 1
        model[1].weight.mul_(3)
    weight, bias = (t.double().detach().numpy() for t in (model[1].weight, model[1].bias))
    normal = (pixels / 255 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)
    logits = normal.transpose(0, 3, 1, 2).reshape(len(files), -1) @ weight.T + bias
    scored = sorted(row for rows in rows_of.values() for row in rows)
    losses, hits = [], []
    for line, (name, _) in zip(logits, files, strict=True):
        best = {other: max(line[row] for row in rows) for other, rows in rows_of.items()}
        hits.append(max(best, key=best.__getitem__) == name)
        total = sum(math.exp(line[row]) for row in scored)
        losses.append(-math.log(sum(math.exp(line[row]) for row in rows_of[name]) / total))
    got = Evaluator(model, [data]).scores()["set"]
    np.testing.assert_allclose(got.losses.numpy(), losses, rtol=1e-5, atol=1e-5)
    assert got.correct.tolist() == hits and 0 < sum(hits) < 15

    assert data.classes is not None and data.classes.tolist() == scored
    assert data.groups is not None
    counts_as = dict(zip(data.classes.tolist(), data.groups.tolist(), strict=True))
    assert len(set(counts_as.values())) == 5
    for rows in rows_of.values():
        assert len({counts_as[row] for row in rows}) == 1
    drawn = load(path, rows=IMAGENET, samples=6, seed=4)
    chosen = sorted(np.random.RandomState(4).permutation(15)[:6].tolist())
    assert torch.equal(drawn.images, data.images[chosen]) and torch.equal(drawn.labels, data.labels[chosen])
    not_loaded(path, "ImageNet", "1000", rows=datasets.Rows(113))


def test_objectnet_is_cached_as_it_is_cut(tmp_path: Path) -> None:
    mappings(tmp_path / "on" / "mappings")
    bordered(tmp_path / "on" / "images")
    cache = tmp_path / "caches"
    cold = load(tmp_path / "on", cache=cache)
    assert datasets.find("set", tmp_path / "on", PREPROCESS).undecoded(cache) == 0
    assert torch.equal(cold.images, load(tmp_path / "on", cache=cache).images)
    whole = load(tmp_path / "on" / "images", kind="folder", cache=cache)
    assert len(whole.labels) == 21 and len(list(cache.glob("*.pixels"))) == 2
    assert not torch.equal(whole.images[6:9], load(tmp_path / "on", cache=cache).images[:3])
    assert datasets.find("set", tmp_path / "on", PREPROCESS).time_decoding(0.01) > 0


def test_objectnet_traps(tmp_path: Path) -> None:
    root = tmp_path / "on"
    mappings(root / "mappings")
    bordered(root / "images")
    shutil.rmtree(root / "images" / "chair")
    not_loaded(root, "1", "5")
    tree(root / "images", ["chair", "unicorn"])
    not_loaded(root)
    shutil.rmtree(root / "images" / "unicorn")
    load(root)
    for file in sorted((root / "mappings").iterdir()):
        whole = file.read_text()
        file.write_text(whole[: len(whole) // 2])
        not_loaded(root, file.name)
        file.write_text(whole)
    (root / "mappings" / "imagenet_to_label_2012_v2").rename(
        root / "mappings" / "imagenet_to_label_2012_v2.txt"
    )
    load(root)
    labels = root / "mappings" / "objectnet_to_imagenet_1k.json"
    whole = labels.read_text()
    labels.write_text(whole.replace("barber chair", "crane"))
    not_loaded(root, "crane")
    labels.write_text(whole.replace("Chair", "Sofa"))
    not_loaded(root, "Sofa")
    labels.unlink()
    not_loaded(root, "objectnet_to_imagenet_1k.json", "ObjectNet")
    shutil.rmtree(root / "mappings")
    not_loaded(root / "images", "ObjectNet", kind="objectnet")


def test_an_image_smaller_than_its_border(tmp_path: Path) -> None:
    mappings(tmp_path / "mappings")
    bordered(tmp_path / "images", each=1)
    Image.new("RGB", (4, 9)).save(tmp_path / "images" / "chair" / "00.png")
    refused_words = "chair/00.png (4 x 9 pixels: a border of 2 leaves nothing)"
    with refused(ValueError, "1", "5") as caught:
        load(tmp_path)
    assert refused_words in str(caught.value)


# --- kinds -----------------------------------------------------------------------------------------


def test_kinds_are_detected_or_said(tmp_path: Path) -> None:
    tree(tmp_path / "any", ["cat", "dog"])
    tree(tmp_path / "wnids", ids()[:2])
    assert datasets.detect(tmp_path / "any") == "folder"
    assert datasets.detect(tmp_path / "wnids") == "imagenet"
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(2, int))
    assert datasets.detect(tmp_path / "x.npz") == "npz"
    not_loaded(tmp_path / "any", "WordNet", kind="imagenet")
    not_loaded(tmp_path / "any", "imagenett", "imagenet-v2", kind="imagenett")
    not_loaded(tmp_path / "nowhere")
    not_loaded(tmp_path / "nowhere", kind="folder")
    for kind in datasets.KINDS:
        with refused(ValueError, "set"):
            load(tmp_path / "nowhere", kind=kind)


def test_class_folders_beside_archives(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    tree(root / "val", ids()[:2])
    (root / "ILSVRC2012_img_val.tar").touch()
    assert datasets.detect(root) == "imagenet"
    (root / "train").mkdir()
    (root / "train" / f"{ids()[0]}.tar").touch()  # as the official archive unpacks
    not_loaded(root)
    assert len(load(root, kind="imagenet").labels) == 2


def test_an_npz_as_a_source(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([4, 0, 4]), classes=np.array([0, 4, 7]))
    source = datasets.open_source("x", tmp_path / "x.npz")
    assert [file.name for file in source.files] == ["x.npz/0", "x.npz/1", "x.npz/2"]
    for index in range(3):
        assert np.array_equal(np.asarray(source.open(index)), images[index])
    got = load(tmp_path / "x.npz", rows=datasets.Rows(8))
    assert got.labels.tolist() == [4, 0, 4]
    assert got.classes is not None and got.classes.tolist() == [0, 4, 7]
    not_loaded(tmp_path / "x.npz", "7", rows=datasets.Rows(7))
    got = load(tmp_path / "x.npz", label_map={"0": 1, "1": None, "2": None, "3": None, "4": [0, 2]})
    assert got.labels.tolist() == [0, 1, 0]
    assert got.groups is not None and got.groups.tolist() == [0, 1, 0]


def test_images_of_an_archive_are_decoded_once(tmp_path: Path) -> None:
    import tarfile

    tree(tmp_path / "data", ["a", "b"], each=3)
    tar, cache = tmp_path / "set.tar", tmp_path / "caches"
    with tarfile.open(tar, "w") as archive:
        for number, file in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
            (tmp_path / "cls").write_text(str(number // 3))
            archive.add(file, f"{number:03}.png")
            archive.add(tmp_path / "cls", f"{number:03}.cls")
    truth = load(tmp_path / "data")
    cold = load(tar, cache=cache)
    assert torch.equal(cold.images, truth.images) and torch.equal(cold.labels, truth.labels)
    scans = [datasets.find("set", path, PREPROCESS).undecoded(cache) for path in (tar, tmp_path / "data")]
    assert scans == [0, 6]
    assert torch.equal(load(tar, cache=cache).images, truth.images)
    part = load(tar, cache=cache, samples=4, seed=2)
    chosen = sorted(np.random.RandomState(2).permutation(6)[:4].tolist())
    assert torch.equal(part.images, truth.images[chosen])
    os.utime(tar, (1, 1))
    assert datasets.find("set", tar, PREPROCESS).undecoded(cache) == 6
    whole = tar.read_bytes()
    at = whole.index(b"IDAT")
    tar.write_bytes(whole[:at] + b"\0" * 20 + whole[at + 20 :])
    refused_words = "000.png of"
    with refused(ValueError, "1", "6") as caught:
        load(tar)
    assert refused_words in str(caught.value)


def test_images_that_are_programs_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    tree(tmp_path / "data", ["a"], each=1)
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "a" / "x.jpg", "EPS")
    with pytest.raises(pytest.fail.Exception), Image.open(tmp_path / "data" / "a" / "x.jpg") as image:
        image.load()
    with refused(ValueError, "1", "2", "x.jpg"):
        load(tmp_path / "data")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "PPM", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_formats_are_told_by_content(tmp_path: Path, form: str) -> None:
    tree(tmp_path, ["a"], each=1)
    Image.new("RGB", (9, 9), (200, 100, 0)).save(tmp_path / "a" / "x.jpg", form)
    assert len(load(tmp_path).labels) == 2
