"""IDX files, written here byte for byte as the MNIST family is published."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from support.tiny_sources import PREPROCESS, RNG, holds, scored, unreadable
from support.wording import refused, said

from rft_fast import datasets
from rft_fast.datasets import __main__ as command
from rft_fast.datasets import idx

LABELS = [7, 0, 9, 3, 3]


def grey(count: int = len(LABELS)) -> np.ndarray:
    return RNG.integers(0, 256, (count, 6, 5), dtype=np.uint8)


def packed(array: np.ndarray) -> bytes:
    """Unsigned bytes in IDX format: zero, zero, type 8, number of dimensions, sizes, bytes."""
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def part(
    folder: Path, images: np.ndarray, labels: list[int], name: str = "t10k", end: str = "", dash: str = "-"
) -> Path:
    folder.mkdir(exist_ok=True)
    squeeze = gzip.compress if end else bytes
    (folder / f"{name}-labels{dash}idx1-ubyte{end}").write_bytes(squeeze(packed(np.array(labels))))
    file = folder / f"{name}-images{dash}idx3-ubyte{end}"
    file.write_bytes(squeeze(packed(images)))
    return file


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dash", ["-", "."])
def test_idx_is_read_as_torchvision_reads_it(tmp_path: Path, end: str, dash: str) -> None:
    images = grey()
    (tmp_path / "MNIST").mkdir()
    file = part(tmp_path / "MNIST" / "raw", images, LABELS, end=end, dash=dash)
    train = part(file.parent, images[:2], [1, 8], "train", end, dash)
    for path in (tmp_path / "MNIST", file.parent, file):
        assert datasets.detect(path) == "idx"
        source = datasets.open_source("set", path)
        holds(source, images, LABELS)
        assert source.path == file and source.class_names == tuple("0123456789")
    source = datasets.open_source("set", train)
    holds(source, images[:2], [0, 7])
    assert source.class_names == tuple("12345678")
    if dash == "-" and not end:
        truth = torchvision.datasets.MNIST(str(tmp_path), train=False)
        np.testing.assert_array_equal(truth.data.numpy(), images)
        assert truth.targets.tolist() == LABELS
    scored(file, "idx", images, LABELS)


def test_of_a_file_in_both_forms_the_uncompressed_one_is_read(tmp_path: Path) -> None:
    part(tmp_path, grey(), LABELS, end=".gz")
    images = grey()
    file = part(tmp_path, images, LABELS[::-1])
    source = datasets.open_source("set", tmp_path)
    holds(source, images, LABELS[::-1])
    assert source.path == file


def test_compression_is_read_from_the_content(tmp_path: Path) -> None:
    """Browsers unpack files and leave the name, or pack none and add it."""
    images = grey()
    file = part(tmp_path, images, LABELS, end=".gz")
    file.write_bytes(packed(images))
    holds(datasets.open_source("set", file), images, LABELS)


def test_classes_are_numbers_and_go_to_rows_as_numbers_do(tmp_path: Path) -> None:
    images = grey(10)
    file = part(tmp_path, images, [*range(10)])
    for rows in (datasets.Rows(10), datasets.Rows(10, tuple("abcdefghij"))):
        assert datasets.load("set", file, PREPROCESS, rows=rows).labels.tolist() == [*range(10)]
    turned = datasets.Rows(10, tuple("9876543210"))
    assert datasets.load("set", file, PREPROCESS, rows=turned).labels.tolist() == [*range(9, -1, -1)]
    with refused(ValueError, 10, "1000"):  # digits are no rows of ImageNet's head
        datasets.load("set", file, PREPROCESS, rows=datasets.Rows(1000))
    letters = part(tmp_path / "letters", images, [*range(1, 11)], "emnist-letters-test", ".gz")
    assert datasets.load("set", letters, PREPROCESS, rows=datasets.Rows(10)).labels.tolist() == [*range(10)]


def test_what_is_ambiguous_or_only_for_training_is_refused(tmp_path: Path) -> None:
    train = part(tmp_path / "a", grey(), LABELS, "train")
    unreadable(idx.source, train.parent, train.name)
    part(tmp_path / "a", grey(), LABELS, "emnist-letters-test", ".gz")
    datasets.open_source("set", train.parent)
    part(tmp_path / "a", grey(), LABELS)
    unreadable(idx.source, train.parent, "t10k-images-idx3-ubyte", "emnist-letters-test-images-idx3-ubyte.gz")
    unreadable(idx.source, tmp_path, str(tmp_path))
    (tmp_path / "images.bin").touch()
    unreadable(idx.source, tmp_path / "images.bin", "images.bin")
    assert not idx.matches(tmp_path) and not idx.matches(tmp_path / "images.bin")


WHOLE = packed(np.zeros((5, 6, 5)))
DAMAGED = {
    "empty": b"",
    "short header": WHOLE[:15],
    "no dimension": WHOLE[:4],
    "one byte less": WHOLE[:-1],
    "one byte more": WHOLE + b"\0",
    "labels": packed(np.zeros(5)),
    "colours": packed(np.zeros((5, 6, 5, 3))),
    "floats": b"\0\0\x0d\x03" + WHOLE[4:],
    "unknown type": b"\0\0\x07\x03" + WHOLE[4:],
    "little-endian": b"\x03\x08\0\0" + WHOLE[4:],
    "page": b"<!DOCTYPE html><html>",
    "no images": packed(np.zeros((0, 6, 5))),
    "no width": packed(np.zeros((5, 6, 0))),
    "claims much": WHOLE[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + WHOLE[16:],
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_other_contents_are_refused(tmp_path: Path, damage: str, end: str) -> None:
    file = part(tmp_path, np.zeros((5, 6, 5), np.uint8), LABELS, end=end)
    data = DAMAGED[damage]
    file.write_bytes(gzip.compress(data) if end else data)
    unreadable(idx.source, file, file.name)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = part(tmp_path, grey(), LABELS)
    beside = tmp_path / "t10k-labels-idx1-ubyte"
    beside.write_bytes(packed(np.array(LABELS[:-1])))
    unreadable(idx.source, file, "5", "4", beside.name)
    for data in (packed(np.zeros((5, 1))), packed(np.array(LABELS))[:-1], packed(np.zeros(0))):
        beside.write_bytes(data)
        unreadable(idx.source, file, beside.name)
    beside.unlink()
    unreadable(idx.source, file, beside.name)


def test_gzip_that_is_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    file = part(tmp_path, grey(), LABELS, end=".gz")
    whole = file.read_bytes()
    for length in (2, 9, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=file.name):
            idx.source(file, "set")
    file.write_bytes(whole[:-8])
    unreadable(idx.source, file, file.name)
    wrong = bytearray(whole)
    wrong[-6] ^= 1  # of the check sum
    file.write_bytes(wrong)
    unreadable(idx.source, file, file.name)
    file.write_bytes(whole + b"more")
    unreadable(idx.source, file, file.name)


def test_gzip_takes_no_more_memory_than_its_header_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = part(tmp_path, grey(), LABELS, end=".gz")
    file.write_bytes(gzip.compress(packed(np.zeros((1 << 12, 1 << 10, 1 << 5), np.uint8)[:, :, :1])))
    monkeypatch.setattr(idx, "MOST_UNPACKED", 1 << 22)
    unreadable(idx.source, file, file.name)
    bomb = gzip.compress(WHOLE + bytes(1 << 26))
    file.write_bytes(bomb)
    seen: list[int] = []
    real = idx._part

    def counted(stream: object, count: int) -> bytes:
        seen.append(count)
        return real(stream, count)  # type: ignore[arg-type]

    monkeypatch.setattr(idx, "_part", counted)
    unreadable(idx.source, file, file.name)
    assert sum(seen) == len(WHOLE) + 1


def test_the_doctor_describes_idx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = part(tmp_path / "mnist", grey(10), [*range(10)], end=".gz")
    assert command.main([str(file.parent), "--rows", "10"]) == 0
    said(capsys.readouterr().out, "10 images", "idx")
    file.write_bytes(file.read_bytes()[:-20])
    assert command.main([str(file.parent)]) == 2
    said(capsys.readouterr().err, file.name)
    shutil.rmtree(file.parent)
    assert command.main([str(file.parent)]) == 2
