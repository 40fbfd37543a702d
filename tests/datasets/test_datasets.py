"""datasets.load: the pixels are open_clip's, and every trap is refused by name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageFile
from support.wording import refused, warned
from torchvision.datasets import ImageFolder

from rft_fast import datasets
from rft_fast.clip.architectures import Preprocess

RNG = np.random.default_rng(0)
PREPROCESS = Preprocess((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert(mode)


def tree(root: Path, classes: list[str], each: int = 2) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(each):
            picture(30, 40).save(root / name / f"{index}.png")
    return root


def not_loaded(*facts: str, **arguments: Any) -> None:
    with refused(ValueError, "set", *facts):
        datasets.load(**{"name": "set", "preprocess": PREPROCESS, **arguments})


@pytest.mark.parametrize(
    ("size", "resize_mode", "interpolation"),
    [
        ((24, 24), "shortest", "bicubic"),
        ((24, 24), "shortest", "bilinear"),
        ((24, 24), "squash", "bicubic"),
        ((24, 24), "longest", "bicubic"),
        ((20, 32), "shortest", "bicubic"),
    ],
)
def test_folder_equals_imagefolder_with_the_transform_of_open_clip(
    tmp_path: Path, size: tuple[int, int], resize_mode: str, interpolation: str
) -> None:
    for index, (mode, shape) in enumerate(
        [("RGB", (31, 47)), ("RGB", (90, 25)), ("L", (24, 24)), ("P", (50, 30)), ("RGBA", (13, 9))]
    ):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        picture(*shape, mode).save(folder / f"{index}.png")
    picture(64, 80).save(tmp_path / "class1" / "photo.JPEG", "JPEG")
    preprocess = Preprocess(size, resize_mode=resize_mode, interpolation=interpolation)
    got = datasets.load("set", tmp_path, preprocess)
    transform = open_clip.image_transform(
        size if resize_mode == "squash" or size[0] != size[1] else size[0],
        is_train=False,
        resize_mode=resize_mode,
        interpolation=interpolation,
    )
    expected = ImageFolder(str(tmp_path), transform)
    assert len(got.images) == len(expected) == 6
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (got.mean, got.std))
    for image, label, (truth, true_label) in zip(got.images, got.labels, expected, strict=True):
        assert int(label) == true_label
        assert torch.equal(image.float().div(255).sub(mean).div(std), truth)
    assert got.class_names == tuple(expected.classes)


def test_unusual_images_are_what_imagefolder_makes_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    picture(30, 40, "CMYK").save(folder / "cmyk.jpg")
    picture(30, 40, "CMYK").save(folder / "cmyk.tif")
    picture(30, 40, "LA").save(folder / "la.png")
    palette = picture(30, 40, "P")
    palette.save(folder / "index.png", transparency=3)
    palette.save(folder / "levels.png", transparency=bytes(range(256)))
    picture(30, 40, "1").save(folder / "bits.bmp")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # ImageFolder leaves images as they are stored
    picture(30, 40).save(folder / "rotated.jpg", exif=rotated)
    picture(30, 40).save(folder / "progressive.jpg", progressive=True)
    picture(30, 40).save(folder / "lossy.webp")
    picture(1, 50).save(folder / "line.ppm")
    got = datasets.load("set", tmp_path, PREPROCESS)
    transform = open_clip.image_transform(24, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)
    expected = ImageFolder(str(tmp_path), transform)
    assert len(got.images) == len(expected) == 10
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (got.mean, got.std))
    for image, (file, _), (truth, _) in zip(got.images, expected.samples, expected, strict=True):
        assert torch.equal(image.float().div(255).sub(mean).div(std), truth), file


def test_modes_that_bytes_cannot_hold_are_refused(tmp_path: Path) -> None:
    """ImageFolder clips them to white, silently."""
    tree(tmp_path, ["a"], each=2)
    grey = RNG.integers(0, 65536, (30, 40))
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "a" / "deep.tif")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "a" / "whole.tif")
    Image.fromarray((grey / 65536).astype(np.float32)).save(tmp_path / "a" / "float.tif")
    not_loaded("4", "6", "deep.png", "deep.tif", "I;16", "whole.tif", "float.tif", path=tmp_path)
    with warned(UserWarning, "4", "6"):
        assert datasets.load("set", tmp_path, PREPROCESS, skip_unreadable=True).skipped == 4


def test_folder_equals_pillow_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = picture(60, 45)
    source.save(tmp_path / "a" / "x.png")
    got = datasets.load("set", tmp_path, PREPROCESS).images[0]
    resized = source.resize((24, 32), Image.Resampling.BICUBIC)  # the shortest edge, 45, becomes 24
    truth = np.asarray(resized.crop((0, 4, 24, 28)))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), truth)


def test_numbered_folders_sort_as_numbers(tmp_path: Path) -> None:
    got = datasets.load("v2", tree(tmp_path, [str(i) for i in range(12)], each=1), PREPROCESS)
    assert got.class_names == tuple(str(i) for i in range(12))
    assert got.labels.tolist() == list(range(12))
    truth = np.asarray(Image.open(tmp_path / "10" / "0.png").resize((32, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(got.images[10].permute(1, 2, 0).numpy(), truth[:, 4:28])


def test_numbers_with_gaps_are_refused(tmp_path: Path) -> None:
    tree(tmp_path / "a", ["0", "1", "3", "4", "7"], each=1)
    not_loaded("2", "5", "6", path=tmp_path / "a")
    tree(tmp_path / "b", ["1", "01", "2"], each=1)
    not_loaded(path=tmp_path / "b")


def test_order_and_nesting(tmp_path: Path) -> None:
    tree(tmp_path, ["n02", "n10", "N01"], each=1)
    (tmp_path / "n02" / "deep").mkdir()
    picture(30, 30).save(tmp_path / "n02" / "deep" / "z.png")
    (tmp_path / "n02" / ".DS_Store").touch()
    (tmp_path / "n02" / ".ipynb_checkpoints").mkdir()
    picture(30, 30).save(tmp_path / "n02" / ".ipynb_checkpoints" / "z-checkpoint.png")
    (tmp_path / "README.txt").write_text("not an image, but no class either")
    got = datasets.load("set", tmp_path, PREPROCESS)
    assert got.class_names == ("N01", "n02", "n10")
    assert got.labels.tolist() == [0, 1, 1, 2]


def test_folder_traps_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "empty", ["cat", "dog"])
    (tmp_path / "empty" / "eel").mkdir()
    not_loaded("eel", path=tmp_path / "empty")
    tree(tmp_path / "stray", ["cat"])
    picture(9, 9).save(tmp_path / "stray" / "lost.png")
    not_loaded("lost.png", path=tmp_path / "stray")
    tree(tmp_path / "foreign", ["cat"])
    (tmp_path / "foreign" / "cat" / "labels.csv").touch()
    not_loaded("labels.csv", path=tmp_path / "foreign")
    (tmp_path / "bare").mkdir()
    not_loaded(path=tmp_path / "bare")
    not_loaded(path=tmp_path / "nowhere")
    (tmp_path / "set.rar").touch()
    not_loaded(path=tmp_path / "set.rar")


def test_unreadable_images_are_all_named(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"], each=3)
    (tmp_path / "a" / "1.png").write_text("<html>404</html>")
    whole = (tmp_path / "b" / "2.png").read_bytes()
    (tmp_path / "b" / "2.png").write_bytes(whole[: len(whole) // 2])
    not_loaded("2", "6", "a/1.png", "b/2.png", path=tmp_path)


@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_images_are_refused_whatever_pillow_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    names = ["0.png", "1.jpg", "2.webp", "3.tif", "4.bmp", "5.ppm", "6.jpg"]
    (tmp_path / "a").mkdir()
    for name in names:
        file = tmp_path / "a" / name
        picture(60, 80).save(file, progressive=name == "6.jpg")
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    picture(30, 30).save(tmp_path / "a" / "whole.png")
    not_loaded("7", "8", path=tmp_path)
    with warned(UserWarning, "7", "8"):
        assert len(datasets.load("set", tmp_path, PREPROCESS, skip_unreadable=True).labels) == 1
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("cached", [False, True])
def test_skipped_images_are_named_and_counted(tmp_path: Path, cached: bool) -> None:
    data = tree(tmp_path / "data", ["a", "b"], each=10)
    cache = tmp_path / "caches" if cached else None
    whole = datasets.load("set", data, PREPROCESS, cache=cache)
    assert whole.skipped == 0
    bad = [0, 7, 8, 13]
    for index in bad:
        (data / "ab"[index // 10] / f"{index % 10}.png").write_text("no image")
    facts = ("'set'", "4 of 20", *(f"{'ab'[i // 10]}/{i % 10}.png" for i in bad))
    with warned(UserWarning, *facts) as caught:
        got = datasets.load("set", data, PREPROCESS, cache=cache, skip_unreadable=True)
    assert len(caught) == 1 + cached
    keep = [index for index in range(20) if index not in bad]
    assert got.skipped == 4
    assert torch.equal(got.images, whole.images[keep]) and torch.equal(got.labels, whole.labels[keep])
    chosen = sorted(np.random.RandomState(5).permutation(20)[:12].tolist())
    assert 0 < len(set(chosen) & set(bad)) < 4
    with warned(UserWarning, len(set(chosen) & set(bad)), "12"):
        part = datasets.load("set", data, PREPROCESS, samples=12, seed=5, cache=cache, skip_unreadable=True)
    left = [index for index in chosen if index not in bad]
    assert part.skipped == 12 - len(left)
    assert torch.equal(part.images, whole.images[left]) and torch.equal(part.labels, whole.labels[left])
    drawn = datasets.subset(got, 16)
    assert len(drawn.labels) == 16 and drawn.skipped == 4
    not_loaded("4", "20", path=data, cache=cache)


def test_nothing_readable_is_refused_all_the_same(tmp_path: Path) -> None:
    tree(tmp_path, ["a"], each=2)
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"")
    not_loaded("2", path=tmp_path, skip_unreadable=True)
    with refused(ValueError, "set"):
        datasets.find("set", tmp_path, PREPROCESS).time_decoding()


def test_links(tmp_path: Path) -> None:
    """To folders elsewhere they are followed; to nowhere, and round in a circle, they are refused."""
    tree(tmp_path / "data", ["a", "b"], each=2)
    tree(tmp_path / "more", ["c"], each=3)
    (tmp_path / "data" / "a" / "c").symlink_to(tmp_path / "more" / "c")
    (tmp_path / "data" / "a" / "d").symlink_to("../b")
    found = datasets.load("set", tmp_path / "data", PREPROCESS)
    assert found.labels.tolist() == [0] * 7 + [1] * 2
    (tmp_path / "data" / "a" / "z.png").symlink_to(tmp_path / "nowhere.png")
    not_loaded("a/z.png", path=tmp_path / "data")
    (tmp_path / "data" / "a" / "z.png").unlink()
    (tmp_path / "data" / "b" / "up").symlink_to("..")
    not_loaded("b/up", path=tmp_path / "data")


def test_images_of_other_extensions_are_no_images(tmp_path: Path) -> None:
    tree(tmp_path, ["a"], each=2)
    picture(9, 9).save(tmp_path / "a" / "z.gif")
    not_loaded("z.gif", path=tmp_path)


def test_found_counts_without_decoding_or_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tree(tmp_path / "data", ["a", "b", "c"], each=4), tmp_path / "caches"

    def counts(used: Path | None = cache, **more: Any) -> tuple[int, int]:
        with monkeypatch.context() as blind:
            blind.setattr(Image, "open", None)
            found = datasets.find("set", data, PREPROCESS, **more)
            return found.count, found.undecoded(used)

    assert counts() == counts(None) == (12, 12)
    assert not cache.exists()
    datasets.load("set", data, PREPROCESS, samples=5, seed=1, cache=cache)
    before = {file: file.read_bytes() for file in cache.iterdir()}
    assert counts() == (12, 7) and counts(None) == (12, 12)
    assert counts(samples=5, seed=1) == (5, 0)
    drawn = [set(np.random.RandomState(seed).permutation(12)[:5].tolist()) for seed in (1, 2)]
    assert counts(samples=5, seed=2) == (5, len(drawn[1] - drawn[0]))
    os.utime(data / "abc"[min(drawn[0]) // 4] / f"{min(drawn[0]) % 4}.png", (1, 1))
    assert counts() == (12, 8)
    assert {file: file.read_bytes() for file in cache.iterdir()} == before
    found = datasets.find("x", save(tmp_path / "x.npz", **arrays()), PREPROCESS, samples=3)
    assert (found.count, found.undecoded(cache)) == (3, 0)
    with refused(ValueError, "set", "13"):
        counts(samples=13)
    (data / "d").mkdir()
    with refused(ValueError, "set"):
        counts()


def test_what_was_found_is_loaded_without_listing_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tree(tmp_path / "data", ["a", "b"], each=3)
    whole = datasets.load("set", data, PREPROCESS, samples=4, seed=3, ood=False)
    found = datasets.find("set", data, PREPROCESS, samples=4, seed=3)
    monkeypatch.setattr(os, "walk", None)
    got = found.load(ood=False, cache=tmp_path / "cache")
    for field in dataclasses.fields(got):
        one, other = (getattr(of, field.name) for of in (got, whole))
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_time_decoding_is_a_share_of_the_time_that_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "data", ["a", "b"], each=20)
    clock, decoded = [0.0], [0]
    original = datasets.decoding.decode

    def decode(*arguments: Any) -> Any:
        decoded[0] += 1
        return original(*arguments)

    def perf_counter() -> float:
        clock[0] += 0.25
        return clock[0]

    monkeypatch.setattr(datasets.decoding, "decode", decode)
    monkeypatch.setattr(datasets.finding.time, "perf_counter", perf_counter)
    # The clock is read at the beginning, after each image handed out, and at the end.
    assert datasets.find("set", tmp_path / "data", PREPROCESS).time_decoding(2.0) == 9 * 0.25 / 8
    assert decoded == [8]
    assert datasets.find("set", tmp_path / "data", PREPROCESS).time_decoding(1e9) == 41 * 0.25 / 40
    assert datasets.find("x", save(tmp_path / "x.npz", **arrays()), PREPROCESS).time_decoding() == 0


def test_decoding_ahead_is_bounded_and_in_order() -> None:
    taken, started = [0], [0]

    def items() -> Any:
        for item in range(50):
            started[0] += 1
            assert started[0] - taken[0] <= 7
            yield item

    with datasets.decoding.threads() as pool:
        results = []
        for result in datasets.decoding.ahead(pool, lambda item: item * item, items(), 7):
            taken[0] += 1
            results.append(result)
    assert results == [item * item for item in range(50)]


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    tree(tmp_path, ["a", "b"])
    datasets.load("set", tmp_path, PREPROCESS, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def save(file: Path, **arrays: Any) -> Path:
    np.savez(file, **arrays)
    return file


def arrays(count: int = 10, *channels: int) -> dict[str, Any]:
    return {
        "images": RNG.integers(0, 256, (count, 24, 24, *channels), dtype=np.uint8),
        "labels": (np.arange(count) % 4).astype(np.uint8),
    }


def test_npz(tmp_path: Path) -> None:
    colour, grey = arrays(10, 3), arrays(10)
    got = datasets.load("c", save(tmp_path / "c.npz", **colour), PREPROCESS, ood=False)
    assert got.images.dtype == torch.uint8 and got.labels.dtype == torch.int64
    assert np.array_equal(got.images.permute(0, 2, 3, 1).numpy(), colour["images"])
    assert got.labels.tolist() == colour["labels"].tolist()
    assert (got.name, got.mean, got.std) == ("c", PREPROCESS.mean, PREPROCESS.std)
    assert (got.ood, got.classes, got.class_names) == (False, None, ())
    got = datasets.load("g", save(tmp_path / "g.npz", **grey), PREPROCESS)
    assert got.ood
    for channel in range(3):
        assert np.array_equal(got.images[:, channel].numpy(), grey["images"])
    subset = save(tmp_path / "s.npz", **arrays(), classes=np.array([3, 0, 1, 2, 9]))
    classes = datasets.load("s", subset, PREPROCESS).classes
    assert classes is not None and classes.tolist() == [3, 0, 1, 2, 9]


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_npz_traps_are_named(tmp_path: Path) -> None:
    good, file, marker = arrays(), tmp_path / "x.npz", tmp_path / "marker"
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"labels": good["labels"]}, ("images", "labels")),
        ({**good, "extra": np.ones(1)}, ("extra",)),
        ({**good, "images": good["images"] / 255}, ("uint8", "float64")),
        ({**good, "images": good["images"][..., None]}, ("[10, 24, 24, 1]",)),
        ({**good, "images": good["images"][:, :20]}, ("(24, 24)", "(20, 24)")),
        ({**good, "labels": good["labels"][1:]}, ("10", "9")),
        ({**good, "labels": good["labels"] * 0.5}, ("labels",)),
        ({**good, "labels": good["labels"].astype(np.int8) - 1}, ("-1 to 2",)),
        ({**good, "labels": good["labels"].astype(np.uint64) + 2**63}, ()),
        ({**good, "images": good["images"][:, :0]}, ("[10, 0, 24]",)),
        ({**good, "classes": np.array([0, 1])}, ("2, 3",)),
        ({**good, "classes": np.array([0, 1, 2, 3, 3])}, ()),
        ({"images": good["images"][:0], "labels": good["labels"][:0]}, ()),
        ({**good, "labels": np.array([Bomb(marker)] * 10)}, ()),
    ]
    for content, facts in cases:
        not_loaded(*facts, path=save(file, **content))
    assert not marker.exists()
    file.write_bytes(save(file, **good).read_bytes()[:500])
    not_loaded(path=file)
    file.write_text("images, labels")
    not_loaded(path=file)


def test_samples_are_a_seeded_subset(tmp_path: Path) -> None:
    content = arrays(50)
    content["images"][:, 0, 0] = np.arange(50)
    file = save(tmp_path / "x.npz", **content)

    def chosen(samples: int, seed: int = 0) -> list[int]:
        got = datasets.load("x", file, PREPROCESS, samples=samples, seed=seed)
        indices: list[int] = got.images[:, 0, 0, 0].tolist()
        assert got.labels.tolist() == [content["labels"][i] for i in indices]
        return indices

    first = chosen(20)
    assert first == sorted(set(first)) and len(first) == 20
    assert chosen(20) == first != chosen(20, seed=1)
    assert set(chosen(5)) < set(first)
    assert chosen(50) == list(range(50))
    # The published stream of numpy's Mersenne twister: the same images everywhere, for good.
    assert first == sorted(np.random.RandomState(0).permutation(50)[:20].tolist())
    folder = tree(tmp_path / "tree", ["a", "b"], each=5)
    assert len(datasets.load("t", folder, PREPROCESS, samples=3).labels) == 3


def test_bad_samples_and_seeds(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", **arrays())
    not_loaded("11", "10", path=file, samples=11)
    not_loaded("1", path=file, samples=0)
    not_loaded(path=file, seed=-1)
    with refused(TypeError):
        datasets.load("set", file, PREPROCESS, samples=2.5)  # type: ignore[arg-type]


def test_datasets_are_checked_when_made() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    mean = std = (0.5, 0.5, 0.5)
    good: dict[str, Any] = {"images": images, "labels": labels, "mean": mean, "std": std}
    datasets.Dataset("good", **good)
    datasets.Dataset("good", **good, classes=torch.tensor([2, 1, 0]), groups=torch.tensor([0, 1, 0]))
    refusals: list[dict[str, Any]] = [
        {"images": images.float()},
        {"images": images[:, :1]},
        {"images": images[0]},
        {"images": images[:1]},
        {"labels": labels.int()},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.5,)},
        {"classes": torch.tensor([0])},
        {"skipped": -1},
        {"skipped": True},
        {"groups": torch.tensor([0, 1])},
        {"classes": torch.tensor([0, 1, 2]), "groups": torch.tensor([0, 1])},
        {"classes": torch.tensor([0, 1, 2]), "groups": torch.tensor([0, 1, 9])},
        {"classes": torch.tensor([0, 1, 2]), "groups": torch.tensor([0, 2, 1])},
        {"classes": torch.tensor([0, 1, 2]), "groups": torch.tensor([0, 0, 2])},
        {"classes": torch.tensor([0, 1]), "groups": torch.tensor([0.0, 1.0])},
    ]
    for bad in refusals:
        with refused(ValueError, "bad"):
            datasets.Dataset("bad", **{**good, **bad})
    with refused(TypeError):
        datasets.Dataset("bad", **{**good, "images": images.numpy()})


def test_a_subset_is_what_load_would_have_drawn(tmp_path: Path) -> None:
    content = arrays(50)
    content["images"][:, 0, 0] = np.arange(50)
    file = save(tmp_path / "x.npz", **content, classes=np.array([3, 0, 1, 2, 9]))
    whole = datasets.load("x", file, PREPROCESS, ood=False)
    for samples, seed in ((20, 0), (20, 7), (1, 3), (50, 0)):
        got, loaded = (
            datasets.subset(whole, samples, seed),
            datasets.load("x", file, PREPROCESS, samples=samples, seed=seed, ood=False),
        )
        chosen = sorted(np.random.RandomState(seed).permutation(50)[:samples].tolist())
        assert got.images[:, 0, 0, 0].tolist() == chosen
        assert got.labels.tolist() == [content["labels"][i] for i in chosen]
        assert torch.equal(got.images, loaded.images) and torch.equal(got.labels, loaded.labels)
        assert (got.name, got.mean, got.std, got.ood) == ("x", whole.mean, whole.std, False)
        assert got.classes is not None and torch.equal(got.classes, torch.tensor([3, 0, 1, 2, 9]))
    assert datasets.subset(whole, 5).images[:, 0, 0, 0].tolist() == sorted(
        np.random.RandomState(0).permutation(50)[:5].tolist()
    )
    assert len(whole.labels) == 50  # itself unchanged


def test_subsets_that_cannot_be() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    small = datasets.Dataset("small", images, torch.arange(3), (0.5,) * 3, (0.5,) * 3)
    with refused(ValueError, "small", "4", "3"):
        datasets.subset(small, 4)
    for none in (0, -1):
        with refused(ValueError, "1", none):
            datasets.subset(small, none)
