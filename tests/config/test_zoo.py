"""zoo.read: every name in a zoo file is resolved and checked before anything else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.wording import refused

from rft_fast.config import zoo

GOOD = """
name = "soup"
arch = "model.json"
zeroshot = "weights/zero.pt"
[finetuned]
"z last" = "weights/one.pt"
"a first" = "weights/two.pt"
[data]
val = { path = "val", ood = false }
[data.sketch]
path = "sketch.npz"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "val").mkdir()
    for name in ("model.json", "weights/zero.pt", "weights/one.pt", "weights/two.pt", "sketch.npz"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    file = folder / "zoo.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, GOOD)
    monkeypatch.chdir(folder.parent)
    got = zoo.read(Path(folder.name) / "zoo.toml")
    assert got == zoo.Zoo(
        name="soup",
        arch=str(folder / "model.json"),
        zeroshot=zoo.Weights(str(folder / "weights/zero.pt")),
        finetuned={
            "z last": zoo.Weights(str(folder / "weights/one.pt")),
            "a first": zoo.Weights(str(folder / "weights/two.pt")),
        },
        data={
            "val": zoo.DataSource(folder / "val", ood=False),
            "sketch": zoo.DataSource(folder / "sketch.npz", ood=True),
        },
    )
    assert list(got.finetuned) == ["z last", "a first"]
    write(folder, GOOD + "[options]")
    assert zoo.read(folder) == got


def test_the_order_is_said_by_a_word_and_by_no_other(folder: Path) -> None:
    (folder / "order").touch()  # a label map ends in .json, .toml or .csv
    write(folder, GOOD + 'labels = "order"')
    assert zoo.read(folder).data["sketch"].labels == "order"
    write(folder, GOOD + 'labels = "ordr"')
    with refused(ValueError):
        zoo.read(folder)


@pytest.mark.parametrize("key", ["arch", "class-names", "templates"])
def test_no_file_of_the_working_directory_is_taken(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder.parent / f"here-{key}"
    here.mkdir()
    (here / "mine.txt").write_text("a photo of a {}")
    monkeypatch.chdir(here)
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(f"{key} ="))
    file = write(folder, f'{key} = "mine.txt"\n{text}')
    with refused(ValueError, key, "mine.txt"):
        zoo.read(file)
    (folder / "mine.txt").write_text("a photo of a {}")
    taken = zoo.read(file)
    found = {"arch": taken.arch, "class-names": taken.head.class_names, "templates": taken.head.templates}
    assert found[key] == str(folder / "mine.txt")
    (here / "photo").write_text("what a built-in list is called")
    assert zoo.read(write(folder, f'templates = "photo"\n{GOOD}')).head.templates == "photo"


def test_a_model_name_stays_a_name(folder: Path) -> None:
    got = zoo.read(write(folder, GOOD.replace("model.json", "ViT-B-32-quickgelu")))
    assert got.arch == "ViT-B-32-quickgelu"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("zeroshot =", "zero_shot =", ("zero_shot", "did you mean zeroshot?")),
        ('path = "sketch.npz"', 'pth = "sketch.npz"', ("data.sketch.pth", "did you mean path?")),
        ("ood = false", "odd = false", ("data.val.odd", "did you mean ood?")),
        ('name = "soup"', "", ("name is missing",)),
        ('name = "soup"', "name = 3", ("name must be a string, got 3",)),
        ('name = "soup"', 'name = ""', ("name is empty",)),
        ("ood = false", 'ood = "no"', ("data.val.ood must be a boolean", "'no'")),
        (
            "weights/two.pt",
            "weights/three.pt",
            ("finetuned.a first", "three.pt, which does not exist"),
        ),
        ('"weights/zero.pt"', '"weights"', ("zeroshot names", "weights is a directory")),
        ('"weights/one.pt"', '"weights"', ("finetuned.z last names", "weights is a directory")),
        ("weights/zero.pt", "zero.pt", ("zeroshot names no file", "there is no file zero.pt")),
        ('path = "sketch.npz"', "", ("data.sketch.path is missing",)),
        (
            '[data.sketch]\npath = "sketch.npz"',
            'sketch = "sketch.npz"',
            ("data.sketch must be a table",),
        ),
        ('"z last" = "weights/one.pt"\n"a first" = "weights/two.pt"', "", ("finetuned is empty",)),
        ("[finetuned]", "[finetuned", ("not valid TOML",)),
    ],
)
def test_refusals_name_file_and_entry(folder: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    assert old in GOOD
    file = write(folder, GOOD.replace(old, new))
    with pytest.raises(ValueError) as caught:
        zoo.read(file)
    for word in ("zoo: ", str(file), *words):
        assert word in str(caught.value)


OPTIONS = """
[options]
layer-draws = 5
rhos = [0.5, 1]
layer-data = "sketch"
no-control = true
"""


def test_options_have_the_values_of_the_command_line(folder: Path) -> None:
    got = zoo.read(write(folder, GOOD + OPTIONS)).options
    assert got == {"layer-draws": 5, "rhos": (0.5, 1), "layer-data": ("sketch",), "no-control": False}


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("no-control = false", "options.no-control"),
        ("rhos = []", "options.rhos"),
        ("rhos = [[1]]", "options.rhos"),
        ("since = 2026-11-22", "options.since"),
        ("layer-drawz = 5", "options.layer-drawz"),
        ("layer-draws = 0", "options.layer-draws"),
        ("layer-draws = [1, 2]", "options.layer-draws [1, 2]"),
        ("layer-draws = true", "options.layer-draws"),
        ("no-control = 1", "options.no-control"),
        ('estimator = "best"', "options.estimator best"),
        ("rhos = [1, 1]", "options.rhos"),
        ("alphas = [0, 2]", "options.alphas [0, 1]"),
        ('out = "here"', "options.out"),
        ('arch = "RN50"', "options.arch"),
        ("no-cache = true", "options.no-cache"),
    ],
)
def test_options_that_cannot_be(folder: Path, line: str, facts: str) -> None:
    with refused(ValueError, *facts.split()):
        zoo.read(write(folder, GOOD + "[options]\n" + line))


def test_missing_file(tmp_path: Path) -> None:
    with refused(ValueError, "nowhere.toml"):
        zoo.read(tmp_path / "nowhere.toml")


def test_the_embedded_zoo() -> None:
    digits = zoo.digits()
    assert digits.name == "digits"
    assert len(digits.finetuned) == 9
    assert {source.ood for source in digits.data.values()} == {True, False}
