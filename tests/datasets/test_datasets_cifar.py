"""CIFAR-10, -100, -10.1, -10.2 and STL-10, written here byte for byte as they are published."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from support.tiny_sources import PREPROCESS, holds, pictures, scored, unreadable
from support.wording import refused

from rft_fast import datasets
from rft_fast.datasets import cifar, pickled_arrays


def python2(value: Any) -> bytes:
    """A value as cPickle of Python 2 wrote it, protocol 2: strings are byte strings, arrays numpy.core's."""
    if isinstance(value, np.ndarray):
        shape = b"".join(b"J" + struct.pack("<i", extent) for extent in value.shape)
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        kind = (
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        data = value.tobytes()
        return (
            made + b"(K\x01(" + shape + b"t" + kind + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
        )
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(python2(entry) for entry in value) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    return b"U" + bytes([len(value)]) + value.encode("latin-1")


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "python 2": lambda value: b"\x80\x02" + python2(value) + b".",
    **{f"protocol {p}": lambda value, p=p: pickle.dumps(value, p) for p in (0, 2, 3, 4, 5)},
    "bytes keys": lambda value: pickle.dumps({key.encode(): entry for key, entry in value.items()}, 2),
    "list of numpy's": lambda value: pickle.dumps(
        {key: [np.int64(e) if isinstance(e, int) else e for e in v] if isinstance(v, list) else v
         for key, v in value.items()}, 4),
}  # fmt: skip


def cifar10(folder: Path, pixels: np.ndarray, labels: list[int], write: Callable[[Any], bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), 3072)
    batch = {"batch_label": "x", "labels": labels, "data": planes, "filenames": ["é.png"] * len(labels)}
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(write(batch))
    meta = {"num_cases_per_batch": 10000, "label_names": list(cifar.CIFAR10), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(write(meta))
    return folder


def cifar100(folder: Path, pixels: np.ndarray, labels: list[int], write: Callable[[Any], bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), 3072)
    batch = {"fine_labels": labels, "coarse_labels": [19] * len(labels), "data": planes}
    for name in ("train", "test"):
        (folder / name).write_bytes(write(batch))
    names = [f"fine {i}" for i in range(100)]
    (folder / "meta").write_bytes(write({"fine_label_names": names, "coarse_label_names": ["c"] * 20}))
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_pickled_cifar_is_read_as_torchvision_reads_it(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = pictures(4, 32, 32), [9, 0, 3, 3]
    ten = cifar10(tmp_path / "cifar-10-batches-py", pixels, labels, WRITERS[writer])
    hundred = cifar100(tmp_path / "cifar-100-python", pixels, [99, 0, 3, 3], WRITERS[writer])
    for path in (ten, ten / "test_batch", ten / "data_batch_2", ten / "test"):
        assert cifar.matches(path)
        source = cifar.source(path, "")
        holds(source, pixels, labels)
        assert source.class_names == cifar.CIFAR10
    holds(cifar.source(ten / "train", ""), np.concatenate([pixels] * 5), labels * 5)
    for path in (hundred, hundred / "test", hundred / "train"):
        source = cifar.source(path, "")
        holds(source, pixels, [99, 0, 3, 3])
        assert source.class_names[99] == "fine 99"
    if writer == "python 2":  # as the published files are
        for theirs in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
            monkeypatch.setattr(theirs, "_check_integrity", lambda self: True)
            monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": None})
            truth = theirs(str(tmp_path), train=False)
            np.testing.assert_array_equal(truth.data, pixels)
        scored(ten, "cifar", pixels, labels)
    (ten / "data_batch_3").unlink()
    unreadable(cifar.source, ten / "train", "5", "data_batch_4")


def test_binary_cifar(tmp_path: Path) -> None:
    pixels, labels = pictures(3, 32, 32), [9, 0, 3]
    planes = pixels.transpose(0, 3, 1, 2).reshape(3, 3072)
    ten, hundred = tmp_path / "cifar-10-batches-bin", tmp_path / "elsewhere"
    ten.mkdir()
    hundred.mkdir()
    column = np.array(labels, np.uint8)[:, None]
    np.concatenate([column, planes], 1).tofile(ten / "test_batch.bin")
    np.concatenate([column * 0 + 19, column, planes], 1).tofile(hundred / "test.bin")
    assert cifar.source(ten, "").class_names == cifar.CIFAR10  # known
    (ten / "batches.meta.txt").write_text("\n".join(cifar.CIFAR10) + "\n\n")
    assert not cifar.matches(hundred)  # any file may be called test.bin
    (hundred / "fine_label_names.txt").write_text("\n".join(cifar.CIFAR100) + "\n")
    for folder in (ten, hundred):
        source = cifar.source(folder, "")
        holds(source, pixels, labels)
        assert source.class_names == (cifar.CIFAR10 if folder is ten else cifar.CIFAR100)
        scored(folder, "cifar", pixels, labels)
        (file,) = folder.glob("test*.bin")
        file.write_bytes(file.read_bytes()[:-1])
        unreadable(cifar.source, folder, file.name)
        file.write_bytes(b"")
        unreadable(cifar.source, folder, file.name, "0")


def test_cifar_10_1_and_10_2(tmp_path: Path) -> None:
    pixels, labels = pictures(3, 32, 32), [9, 0, 3]
    np.save(tmp_path / "cifar10.1_v6_data.npy", pixels)
    unreadable(cifar.source, tmp_path, "cifar10.1_v6_labels.npy")
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.array(labels, np.int32))
    holds(cifar.source(tmp_path, ""), pixels, labels)
    scored(tmp_path, "cifar", pixels, labels)
    np.save(tmp_path / "cifar10.1_v4_data.npy", pixels[:2])
    np.save(tmp_path / "cifar10.1_v4_labels.npy", np.array(labels[:2], np.int64))
    unreadable(cifar.source, tmp_path, "cifar10.1_v4_data.npy", "cifar10.1_v6_data.npy")
    holds(cifar.source(tmp_path / "cifar10.1_v4_data.npy", ""), pixels[:2], labels[:2])

    held = {"images": pixels, "labels": np.array(labels), "keywords": np.array(["a", 1, None], object)}
    np.savez(tmp_path / "cifar102_test.npz", label_names=list(cifar.CIFAR10), **held)
    np.savez_compressed(tmp_path / "cifar102_train.npz", **held)
    np.save(tmp_path / "cifar102_test.npy", held, allow_pickle=True)  # as it was first published
    for name in ("cifar102_test.npz", "cifar102_train.npz", "cifar102_test.npy"):
        source = cifar.source(tmp_path / name, "")
        holds(source, pixels, labels)
        assert source.class_names == cifar.CIFAR10
        scored(tmp_path / name, "cifar", pixels, labels)
        whole = (tmp_path / name).read_bytes()
        for length in (0, 50, 500, len(whole) - 40):
            (tmp_path / name).write_bytes(whole[:length])
            unreadable(cifar.source, tmp_path / name, *name.split())


def test_stl10_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = pictures(3, 96, 96), [9, 0, 3]
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "test_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
    (folder / "test_y.bin").write_bytes(bytes(label + 1 for label in labels))
    (folder / "class_names.txt").write_text("\n".join(cifar.STL10) + "\n")
    source = cifar.source(folder, "")
    holds(source, pixels, labels)
    assert source.class_names == cifar.STL10
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    truth = torchvision.datasets.STL10(str(tmp_path), "test")
    np.testing.assert_array_equal(truth.data.transpose(0, 2, 3, 1), pixels)
    assert truth.labels.tolist() == labels and tuple(truth.classes) == source.class_names
    scored(folder, "cifar", pixels, labels)
    for data, facts in (
        (b"\0\1\2", "0 2"),
        (b"\1\2\13", "1 11"),
        (b"\1\2", "3"),
        (b"", "3"),
    ):
        (folder / "test_y.bin").write_bytes(data)
        unreadable(cifar.source, folder, "test_X.bin", *facts.split())
    (folder / "class_names.txt").write_text("airplane\n")
    (folder / "test_y.bin").write_bytes(b"\1\2\3")
    unreadable(cifar.source, folder, "class_names.txt", "1")


def test_stl10_under_a_head_for_cifar10_needs_a_map(tmp_path: Path) -> None:
    pixels, labels = pictures(4, 96, 96), [1, 7, 2, 9]  # bird, monkey, car, truck
    (tmp_path / "test_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
    (tmp_path / "test_y.bin").write_bytes(bytes(label + 1 for label in labels))
    rows = datasets.Rows(10, cifar.CIFAR10)
    with refused(ValueError):  # as many classes, so in order they would do
        datasets.load("stl10", tmp_path, PREPROCESS, rows=rows)
    rowed: dict[str, str | None] = {name: name for name in cifar.STL10}
    got = datasets.load(
        "stl10", tmp_path, PREPROCESS, rows=rows, label_map=rowed | {"car": "automobile", "monkey": None}
    )
    assert got.labels.tolist() == [2, 1, 9] and got.classes is not None
    assert got.classes.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]  # a frog is never right


class Hostile:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


DEEP = b"\x80\x02}" + b"(" + b")" + b"\x85" * 100_000 + b"K\x01u."  # {((((...))))): 1}: hashing overflows
AGAIN = b"\x80\x04c_codecs\nencode\nq\x01" + b"X@B\x0f\x00" + b"x" * 1_000_000 + b"q\x00"  # the text: 1 MB
AGAIN += (
    b"X\x06\x00\x00\x00latin1q\x02" + b"h\x01h\x00h\x02\x86R" * 3_000 + b"."
)  # made into bytes 3,000 times


@pytest.mark.parametrize(
    ("data", "called"),
    [
        *[(pickle.dumps(Hostile(os.mkdir, "made"), protocol), "posix.mkdir") for protocol in (0, 2, 4, 5)],
        (pickle.dumps(Hostile(eval, "1/0"), 2), "eval"),
        (b"\x80\x02cnumpy\nload\n)R.", "numpy.load"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "os.system"),
        (
            b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI63\ntbcnumpy\nndarray\n\x81.",
            "",
        ),
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", ""),
        (b"\x80\x02P1\n.", ""),
        (b"\x80\x02\x82\x01.", ""),
        (DEEP, ""),
        (b"\x80\x02r\xff\xff\xff\xff.", ""),
        (b"\x80\x02h\x05.", ""),
        (b"\x80\x02.", ""),
        (AGAIN, ""),
        (b"\x80\x02]", ""),
        (b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00.", ""),
        (b"\x80\x04\x8e" + b"\xff" * 6 + b"\x00\x00.", ""),
        (b"", ""),
        (b"\xff\xfe", ""),
    ],
    ids=range(22),
)
def test_pickles_that_ask_for_more_than_arrays_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, called: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(ValueError, called):
        pickled_arrays.read(data)
    assert not Path("made").exists() and not copyreg._extension_cache  # type: ignore[attr-defined]
    Path("test_batch").write_bytes(data)
    unreadable(cifar.source, Path("test_batch"), "test_batch", called)


@pytest.mark.parametrize(
    "batch",
    [
        {"labels": [0], "data": np.zeros((1, 3071), np.uint8)},
        {"labels": [0], "data": np.zeros((1, 3072), np.int8)},
        {"labels": [0, 1], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [10], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [-1], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [True], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": ["0"], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [], "data": np.zeros((0, 3072), np.uint8)},
        {"labels": [0], "data": np.array([{}], object)},
        {"labels": [0], "data": np.zeros(1, [("a", "u1")])},
        {"labels": [0], "data": b"x" * 3072},
        {"fine_labels": [0], "data": np.zeros((1, 3072), np.uint8)},
        [1],
    ],
)
def test_batches_of_other_contents_are_refused(tmp_path: Path, batch: Any) -> None:
    for protocol in (2, 4):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
        unreadable(cifar.source, tmp_path, "test_batch")


def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "cifar10.1_v6_data.npy"
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.zeros(1, np.int64))
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 32, 32, 3)}
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
    unreadable(cifar.source, tmp_path)
    with zipfile.ZipFile(tmp_path / "cifar102_test.npz", "w") as archive:
        for name in ("images", "labels"):
            archive.writestr(f"{name}.npy", file.read_bytes())
    unreadable(cifar.source, tmp_path / "cifar102_test.npz")
    np.save(file, np.array([Hostile(os.mkdir, "made")]), allow_pickle=True)
    unreadable(cifar.source, tmp_path / file.name)
    np.save(tmp_path / "cifar102_test.npy", np.array(Hostile(os.mkdir, "made"), object), allow_pickle=True)
    unreadable(cifar.source, tmp_path / "cifar102_test.npy", "posix.mkdir")
