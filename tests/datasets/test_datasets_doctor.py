"""``python -m rft_fast.datasets``: everything that is wrong with a data set, said at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_trees import FOLDERS, bordered, ids, mappings, tree

from rft_fast.datasets import doctor
from rft_fast.datasets.__main__ import main


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    return out if status < 2 else err


def test_no_path_is_not_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree(tmp_path, ["cat", "dog"]))
    with pytest.raises(SystemExit) as ended:
        main([""])
    assert ended.value.code == 2 and "expected a path, got nothing" in capsys.readouterr().err
    assert "2 images" in said(capsys, 0, ".")


def test_a_sound_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path, ["cat", "dog"], each=2)
    Image.new("L", (30, 20)).save(tmp_path / "dog" / "grey.png")
    (names := tmp_path.with_suffix(".txt")).write_text("Dog\ncat\n")
    out = said(capsys, 0, tmp_path, "--rows", names)
    assert out.splitlines() == [
        f"{tmp_path}: a data set, kind folder",
        "5 images, 2 classes of 2 (cat) to 3 (dog) images",
        "scored: 5 images of 2 classes, among all of the head's 2 rows; by name",
        "modes: RGB 4, L 1; width x height: 12 x 9 to 30 x 20",
        "sound",
    ]
    assert "modes" not in said(capsys, 0, tmp_path, "--quick")
    assert "the head has 3 rows" in said(capsys, 1, tmp_path, "--rows", 3)
    assert "the head has 1000 rows" in said(capsys, 1, tmp_path, "--rows", "imagenet")


def test_what_could_not_be_checked_is_not_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "named", ["cat", "dog"])
    tree(tmp_path / "numbered", ["0", "1"])
    named, numbered = tmp_path / "named", tmp_path / "numbered"
    assert "cat -> 0, dog -> 1" in said(capsys, 1, named, "--rows", 2)
    for arguments in ([named], [numbered], [named, "--rows", 2, "--labels", "order"]):
        out = said(capsys, 0, *arguments)
        assert "not checked" in out and "sound" not in out
    assert "by number" in (out := said(capsys, 0, numbered, "--rows", 2)) and out.endswith("sound\n")
    assert "another order" in said(
        capsys, 1, numbered, "--rows", _names(tmp_path, "1", "0"), "--labels", "order"
    )


def test_a_label_map_is_begun_for_people_to_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "set", ["crane", "crane 2", "goldfish", "=tench", "tench"])
    file = tmp_path / "map.csv"
    arguments = (tmp_path / "set", "--rows", 1000)
    assert "--write-labels" in said(capsys, 1, *arguments)
    assert "4 are question marks" in said(capsys, 0, *arguments, "--write-labels", file)
    assert file.read_text().split("\n")[1:-1] == ["=tench,?", "crane,?", "crane 2,?", "goldfish,1", "tench,?"]
    assert "is a name, but the head's are not known" in said(capsys, 1, *arguments, "--labels", file)
    file.write_text(file.read_text().replace("=tench,?", "=tench,").replace("crane,?", "crane,134"))
    file.write_text(file.read_text().replace("crane 2,?", "crane 2,517").replace("tench,?", "tench,0"))
    assert said(capsys, 0, *arguments, "--labels", file).endswith("sound\n")
    before = file.read_bytes()
    assert "exists" in said(capsys, 2, *arguments, "--write-labels", file) and file.read_bytes() == before
    assert "give --rows" in said(capsys, 2, tmp_path / "set", "--write-labels", tmp_path / "other.csv")


def _names(folder: Path, *names: str) -> Path:
    (file := folder / "names.txt").write_text("\n".join(names))
    return file


def test_everything_wrong_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path, ["cat", "dog", "owl"], each=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "Cat (1)").mkdir()
    shutil.copytree(tmp_path / "dog", tmp_path / "hound")
    shutil.move(tmp_path / "owl" / "0.png", tmp_path / "Cat (1)" / "x.png")
    (tmp_path / "owl" / "owl").mkdir()
    shutil.move(tmp_path / "owl" / "1.png", tmp_path / "owl" / "owl" / "1.png")
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "0.png").write_text("<html>")
    whole = (tmp_path / "cat" / "1.png").read_bytes()
    (tmp_path / "cat" / "1.png").write_bytes(whole[:-40])
    deep = np.full((9, 9), 40000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "cat" / "deep.png")
    shutil.copy(tmp_path / "dog" / "0.png", tmp_path / "lost.png")
    out = said(capsys, 1, tmp_path)
    for words in (
        "13 images, 6 classes of 0 (empty) to 4 (cat) images",
        "modes: RGB 10, I;16 1",
        "8 problems:",
        "images outside of any class: lost.png",
        "empty class folders: empty",
        "files that are no images, which end in .jpg, .jpeg, ",
        "notes.txt",
        "seem to be one, twice: Cat (1), cat",
        "lie in folders of their own name: owl",
        "classes with the same files: dog, hound",
        "2 images cannot be read: ",
        "cat/0.png",
        "cat/1.png",
        "1 image of mode I;16",
    ):
        assert words in out, (words, out)


def test_published_counts_of_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wnids = ids()
    tree(tmp_path / "val", wnids, form="ILSVRC2012_val_{:08}.JPEG")
    out = said(capsys, 1, tmp_path, "--quick")
    assert f"{tmp_path / 'val'}: ImageNet, kind imagenet" in out
    assert "ImageNet has 50,000 images, here are 1,000" in out
    assert f"1000 classes have not the 50 images of ImageNet: {wnids[0]} (1)" in out
    assert "scored: 1,000 images of 1,000 classes, among all of the head's 1,000 rows" in out
    shutil.rmtree(tmp_path / "val" / wnids[3])
    out = said(capsys, 1, tmp_path, "--quick")
    assert f"1 of the classes of ImageNet-1k are missing, so it would score too high: {wnids[3]}" in out


@pytest.mark.slow
def test_whole_sets_are_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "sketch", ids(), form="sketch_{}.JPEG")
    tree(tmp_path / "v2", [str(i) for i in range(1000)], each=2)
    tree(tmp_path / "a", ids("a"))
    tree(tmp_path / "r", ids("r"))
    monkeypatch.setattr(
        doctor,
        "_PUBLISHED",
        {"ImageNet-Sketch": (1000,), "ImageNetV2": (2000,), "ImageNet-A": (200,), "ImageNet-R": (200,)},
    )
    monkeypatch.setattr(doctor, "_EACH", {"ImageNetV2": 2})
    every, part = "among all of the head's 1,000 rows", "among 200 of the head's 1,000 rows"
    for name, title, among in (
        ("sketch", "ImageNet-Sketch has 1,000 images: so it has here", every),
        ("v2", "ImageNetV2 has 2,000 images: so it has here", every),
        ("a", "ImageNet-A has 200 images: so it has here", part),
        ("r", "ImageNet-R has 200 images: so it has here", part),
    ):
        out = said(capsys, 0, tmp_path / name, "--quick")
        assert title in out and among in out and out.endswith("sound\n")
    shutil.rmtree(tmp_path / "v2" / "537")
    out = said(capsys, 1, tmp_path / "v2", "--quick", "--rows", 1000)
    assert "run from 0 to 999 with 537 missing" in out and "the head has 1000 rows" in out


def test_a_copied_folder_hides_no_missing_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wnids = ids("r")
    tree(tmp_path, wnids)
    (tmp_path / wnids[3]).rename(tmp_path / f"{wnids[4]} (1)")
    out = said(capsys, 1, tmp_path, "--quick")
    for words in (
        f"{tmp_path}: ImageNet-R, kind imagenet",
        f"no WordNet ids, among 199 that are: {wnids[4]} (1)",
        f"1 of the classes of ImageNet-R are missing: {wnids[3]}",
        "ImageNet-R has 30,000 images, here are 200",
    ):
        assert words in out, out


def test_objectnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mappings(tmp_path / "mappings")
    bordered(tmp_path / "images")
    out = said(capsys, 1, tmp_path)
    for words in (
        "ObjectNet, kind objectnet",
        "21 images, 7 classes of 3 images each",
        "scored: 15 images of 5 classes, among 9 of the head's 1,000 rows",
        "; for 3 classes several rows are right",
        "ObjectNet has 50,273 images, here are 21",
        f"ObjectNet has 313 class folders, here are {len(FOLDERS)}",
        "ObjectNet has 18,574 images to score, here are 15",
    ):
        assert words in out, out
    shutil.rmtree(tmp_path / "mappings")
    assert "is not ObjectNet as it ships" in said(capsys, 2, tmp_path / "images", "--kind", "objectnet")


def test_an_npz_and_label_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, images=np.zeros((3, 8, 8), np.uint8), labels=np.array([4, 0, 4]), classes=np.array([0, 4]))
    out = said(capsys, 0, file)
    assert "3 images, 2 classes of 1 (0) to 2 (4) images" in out and "among 2 of a head's rows" in out
    tree(tmp_path / "data", ["cat", "dog"])
    (tmp_path / "m.csv").write_text("class,row\ncat,3\ndog,5\n")
    out = said(capsys, 0, tmp_path / "data", "--rows", "cifar10", "--labels", tmp_path / "m.csv")
    assert "among 2 of the head's 10 rows" in out
    assert "3 rows" in said(capsys, 1, tmp_path / "data", "--rows", 3)
    assert "beyond the head" in said(
        capsys, 1, tmp_path / "data", "--rows", 4, "--labels", tmp_path / "m.csv"
    )


def test_what_is_no_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "train", ["a", "b"])
    assert "holds parts of a data set (train)" in said(capsys, 2, tmp_path)
    assert "does not exist" in said(capsys, 2, tmp_path / "nowhere")
    assert "nowhere.csv" in said(capsys, 2, tmp_path / "train", "--labels", tmp_path / "nowhere.csv")
    assert "imagenett" in said(capsys, 2, tmp_path / "train", "--rows", "imagenett")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--kind", "imagenett"])
    assert stopped.value.code == 2


def test_progress(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"], each=2)
    calls: list[tuple[int, int]] = []
    doctor.examine(tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
