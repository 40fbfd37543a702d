"""datasets.load: the pixels are open_clip's, and every trap is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from rft_fast import datasets
from rft_fast.classifier import Preprocess

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


def refused(*words: str, **arguments: Any) -> None:
    with pytest.raises(ValueError) as caught:
        datasets.load(**{"name": "set", "preprocess": PREPROCESS, **arguments})
    for word in ("'set'", *words):
        assert word in str(caught.value), caught.value


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
    refused("2, 5, 6 missing", path=tmp_path / "a")
    tree(tmp_path / "b", ["1", "01", "2"], each=1)
    refused("one number twice", path=tmp_path / "b")


def test_order_and_nesting(tmp_path: Path) -> None:
    tree(tmp_path, ["n02", "n10", "N01"], each=1)
    (tmp_path / "n02" / "deep").mkdir()
    picture(30, 30).save(tmp_path / "n02" / "deep" / "z.png")
    (tmp_path / "n02" / ".DS_Store").touch()
    (tmp_path / "README.txt").write_text("not an image, but no class either")
    got = datasets.load("set", tmp_path, PREPROCESS)
    assert got.class_names == ("N01", "n02", "n10")
    assert got.labels.tolist() == [0, 1, 1, 2]


def test_folder_traps_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "empty", ["cat", "dog"])
    (tmp_path / "empty" / "eel").mkdir()
    refused("empty class folders: eel", path=tmp_path / "empty")
    tree(tmp_path / "stray", ["cat"])
    picture(9, 9).save(tmp_path / "stray" / "lost.png")
    refused("outside of any class: lost.png", path=tmp_path / "stray")
    tree(tmp_path / "foreign", ["cat"])
    (tmp_path / "foreign" / "cat" / "labels.csv").touch()
    refused("no images: ", "labels.csv", path=tmp_path / "foreign")
    (tmp_path / "bare").mkdir()
    refused("no class folders", path=tmp_path / "bare")
    refused("does not exist", path=tmp_path / "nowhere")
    (tmp_path / "set.tar").touch()
    refused("is neither", path=tmp_path / "set.tar")


def test_unreadable_images_are_all_named(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"], each=3)
    (tmp_path / "a" / "1.png").write_text("<html>404</html>")
    whole = (tmp_path / "b" / "2.png").read_bytes()
    (tmp_path / "b" / "2.png").write_bytes(whole[: len(whole) // 2])
    refused("2 of 6 images cannot be read", "a/1.png", "b/2.png", path=tmp_path)


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
        ({"labels": good["labels"]}, ("no array 'images'", "labels")),
        ({**good, "extra": np.ones(1)}, ("unknown here: extra",)),
        ({**good, "images": good["images"] / 255}, ("must be uint8", "float64")),
        ({**good, "images": good["images"][..., None]}, ("[10, 24, 24, 1]",)),
        ({**good, "images": good["images"][:, :20]}, ("(24, 24)", "(20, 24)")),
        ({**good, "labels": good["labels"][1:]}, ("10 images but 9 labels",)),
        ({**good, "labels": good["labels"] * 0.5}, ("labels", "integers")),
        ({**good, "labels": good["labels"].astype(np.int8) - 1}, ("negative", "-1")),
        ({**good, "classes": np.array([0, 1])}, ("labels 2, 3 are not among",)),
        ({**good, "classes": np.array([0, 1, 2, 3, 3])}, ("distinct",)),
        ({"images": good["images"][:0], "labels": good["labels"][:0]}, ("no images",)),
        ({**good, "labels": np.array([Bomb(marker)] * 10)}, ("cannot be read",)),
    ]
    for content, words in cases:
        refused(*words, path=save(file, **content))
    assert not marker.exists()
    file.write_bytes(save(file, **good).read_bytes()[:500])
    refused("cannot be read", path=file)


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
    refused("11 samples", "only 10", path=file, samples=11)
    refused("at least 1", path=file, samples=0)
    refused("seed", path=file, seed=-1)
    with pytest.raises(TypeError, match="samples must be an int"):
        datasets.load("set", file, PREPROCESS, samples=2.5)  # type: ignore[arg-type]


def test_datasets_are_checked_when_made() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    mean = std = (0.5, 0.5, 0.5)
    good: dict[str, Any] = {"images": images, "labels": labels, "mean": mean, "std": std}
    datasets.Dataset("good", **good)
    refusals: list[dict[str, Any]] = [
        {"images": images.float()},
        {"images": images[:, :1]},
        {"images": images[0]},
        {"images": images[:1]},
        {"labels": labels.int()},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.5,)},
        {"classes": torch.tensor([0])},
    ]
    for bad in refusals:
        with pytest.raises(ValueError, match=r"^Dataset 'bad': "):
            datasets.Dataset("bad", **{**good, **bad})
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
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
    with pytest.raises(ValueError, match=r"^datasets: 'small': 4 samples asked for, but it has only 3"):
        datasets.subset(small, 4)
    for none in (0, -1):
        with pytest.raises(ValueError, match=f"samples must be at least 1, got {none}"):
            datasets.subset(small, none)
