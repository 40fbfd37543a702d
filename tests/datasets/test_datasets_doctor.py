"""``python -m rft_fast.datasets``: everything that is wrong with a data set, said at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_trees import FOLDERS, bordered, ids, mappings, tree
from support.wording import command_refused, said

from rft_fast.datasets import doctor
from rft_fast.datasets.__main__ import main


def checked(
    capsys: pytest.CaptureFixture[str], status: int, *arguments: object, facts: tuple[str, ...] = ()
) -> str:
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    text = out if status < 2 else err
    said(text, *facts)
    return text


def test_no_path_is_not_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree(tmp_path, ["cat", "dog"]))
    command_refused(main, [""])
    checked(capsys, 0, ".", facts=("2",))


def test_a_sound_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path, ["cat", "dog"], each=2)
    Image.new("L", (30, 20)).save(tmp_path / "dog" / "grey.png")
    (names := tmp_path.with_suffix(".txt")).write_text("Dog\ncat\n")
    out = checked(capsys, 0, tmp_path, "--rows", names)
    assert out.splitlines() == [
        f"path    {tmp_path}",
        "kind    folder",
        "images  5 images, 2 classes of 2 (cat) to 3 (dog) images",
        "scored  5 images of 2 classes, among all of the head's 2 rows; by name",
        "modes   RGB 4, L 1",
        "sizes   12 x 9 to 30 x 20 (width x height)",
        "sound",
        "next: python -m rft_fast.sweep --arch NAME --zeroshot SOURCE --finetuned FILE "
        f"--data {tmp_path.name}={tmp_path} --class-names {names}",
    ]
    assert "modes" not in checked(capsys, 0, tmp_path, "--quick")
    checked(capsys, 1, tmp_path, "--rows", 3, facts=("3",))
    checked(capsys, 1, tmp_path, "--rows", "imagenet", facts=("1000",))


def test_what_could_not_be_checked_is_not_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "named", ["cat", "dog"])
    tree(tmp_path / "numbered", ["0", "1"])
    named, numbered = tmp_path / "named", tmp_path / "numbered"
    checked(
        capsys,
        1,
        named,
        "--rows",
        2,
        facts=("cat -> 0", "dog -> 1"),
    )
    for arguments in ([named], [numbered], [named, "--rows", 2, "--labels", "order"]):
        out = checked(capsys, 0, *arguments)
        assert "sound" not in out
    assert "\nsound\nnext: " in checked(capsys, 0, numbered, "--rows", 2)
    checked(capsys, 1, numbered, "--rows", _names(tmp_path, "1", "0"), "--labels", "order")


def test_a_label_map_is_begun_for_people_to_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "set", ["crane", "crane 2", "goldfish", "=tench", "tench"])
    file = tmp_path / "map.csv"
    arguments = (tmp_path / "set", "--rows", 1000)
    checked(capsys, 1, *arguments, facts=("--write-labels",))
    checked(capsys, 0, *arguments, "--write-labels", file, facts=("4",))
    assert file.read_text().split("\n")[1:-1] == ["=tench,?", "crane,?", "crane 2,?", "goldfish,1", "tench,?"]
    checked(capsys, 1, *arguments, "--labels", file)
    file.write_text(file.read_text().replace("=tench,?", "=tench,").replace("crane,?", "crane,134"))
    file.write_text(file.read_text().replace("crane 2,?", "crane 2,517").replace("tench,?", "tench,0"))
    assert "\nsound\nnext: " in checked(capsys, 0, *arguments, "--labels", file)
    before = file.read_bytes()
    assert "exists" in checked(capsys, 2, *arguments, "--write-labels", file) and file.read_bytes() == before
    checked(capsys, 2, tmp_path / "set", "--write-labels", tmp_path / "other.csv", facts=("--rows",))


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
    facts = "13 images", "6 classes", "RGB 10", "I;16 1", "8 problems", "2 images", "1 image"
    names = "lost.png", "empty", "notes.txt", "Cat (1), cat", "owl", "dog, hound", "cat/0.png", "cat/1.png"
    checked(capsys, 1, tmp_path, facts=(*facts, *names))


def test_published_counts_of_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wnids = ids()
    tree(tmp_path / "val", wnids, form="ILSVRC2012_val_{:08}.JPEG")
    facts = "50,000", "1,000 images", "1000 classes", "50 images", "1,000 classes", "1,000 rows"
    checked(capsys, 1, tmp_path, "--quick", facts=(str(tmp_path / "val"), *facts, f"{wnids[0]} (1)"))
    shutil.rmtree(tmp_path / "val" / wnids[3])
    checked(capsys, 1, tmp_path, "--quick", facts=("1", "ImageNet-1k", wnids[3]))


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
    for name, facts in (
        ("sketch", ("ImageNet-Sketch", "1,000 images", "1,000 rows")),
        ("v2", ("ImageNetV2", "2,000 images", "1,000 rows")),
        ("a", ("ImageNet-A", "200 images", "among 200", "1,000 rows")),
        ("r", ("ImageNet-R", "200 images", "among 200", "1,000 rows")),
    ):
        assert "\nsound\nnext: " in checked(capsys, 0, tmp_path / name, "--quick", facts=facts)
    shutil.rmtree(tmp_path / "v2" / "537")
    checked(capsys, 1, tmp_path / "v2", "--quick", "--rows", 1000, facts=("0 to 999", "537", "1000 rows"))


def test_a_copied_folder_hides_no_missing_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wnids = ids("r")
    tree(tmp_path, wnids)
    (tmp_path / wnids[3]).rename(tmp_path / f"{wnids[4]} (1)")
    facts = "ImageNet-R", "199", f"{wnids[4]} (1)", wnids[3], "30,000", "200"
    checked(capsys, 1, tmp_path, "--quick", facts=facts)


def test_objectnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mappings(tmp_path / "mappings")
    bordered(tmp_path / "images")
    facts = "21 images", "7 classes", "15 images", "5 classes", "among 9", "1,000 rows", "3 classes", "50,273"
    checked(capsys, 1, tmp_path, facts=(*facts, "313", str(len(FOLDERS)), "18,574"))
    shutil.rmtree(tmp_path / "mappings")
    checked(capsys, 2, tmp_path / "images", "--kind", "objectnet", facts=("ObjectNet",))


def test_an_npz_and_label_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, images=np.zeros((3, 8, 8), np.uint8), labels=np.array([4, 0, 4]), classes=np.array([0, 4]))
    checked(capsys, 0, file, facts=("3 images", "2 classes", "1 (0)", "2 (4)", "among 2"))
    tree(tmp_path / "data", ["cat", "dog"])
    (tmp_path / "m.csv").write_text("class,row\ncat,3\ndog,5\n")
    maps = "--labels", tmp_path / "m.csv"
    checked(capsys, 0, tmp_path / "data", "--rows", "cifar10", *maps, facts=("among 2", "10 rows"))
    checked(capsys, 1, tmp_path / "data", "--rows", 3, facts=("3",))
    checked(capsys, 1, tmp_path / "data", "--rows", 4, "--labels", tmp_path / "m.csv")


def test_what_is_no_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree(tmp_path / "train", ["a", "b"])
    checked(capsys, 2, tmp_path)
    checked(capsys, 2, tmp_path / "nowhere")
    checked(capsys, 2, tmp_path / "train", "--labels", tmp_path / "nowhere.csv", facts=("nowhere.csv",))
    checked(capsys, 2, tmp_path / "train", "--rows", "imagenett")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--kind", "imagenett"])
    assert stopped.value.code == 2


def test_progress(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"], each=2)
    calls: list[tuple[int, int]] = []
    doctor.examine(tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
