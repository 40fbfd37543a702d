"""Tar shards, Arrow and Parquet, written here as WebDataset and Hugging Face's datasets write them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from support.tiny_sources import encoded, holds, pictures, scored, unreadable
from support.wording import refused

from rft_fast.common import files
from rft_fast.datasets import arrow, shards
from rft_fast.datasets.source import Source

# WebDataset


def tar(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def clip_benchmark(root: Path, pixels: np.ndarray, labels: list[int], per_shard: int = 2) -> Path:
    """As the clip-benchmark sets on the Hub: test/0.tar ..., nshards.txt, names and templates above."""
    samples = [
        {f"s{i:07d}.png": encoded(image), f"s{i:07d}.cls": str(label).encode()}
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    for start in range(0, len(samples), per_shard):
        members = {name: data for s in samples[start : start + per_shard] for name, data in s.items()}
        tar(root / "test" / f"{start // per_shard}.tar", members)
    (root / "test" / "nshards.txt").write_text(f"{-(-len(samples) // per_shard)}\n")
    (root / "classnames.txt").write_text("cat\nsea dog\ncow\n", "utf-8-sig")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return root


def test_shards_are_read_in_their_numbers_order(tmp_path: Path) -> None:
    pixels, labels = pictures(23), [i % 3 for i in range(23)]
    root = clip_benchmark(tmp_path / "wds", pixels, labels)  # 12 shards: 10.tar comes after 9.tar
    for path in (root, root / "test"):
        assert shards.matches(path)
        source = shards.source(path, "")
        holds(source, pixels, labels)
        assert source.class_names == ("cat", "sea dog", "cow")
        assert source.files[22].name == "11.tar/s0000022.png"
    one = shards.source(root / "test" / "3.tar", "")
    holds(one, pixels[6:8], labels[6:8])
    scored(root, "webdataset", pixels, labels)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_any_tar_format_and_order_are_found(tmp_path: Path, form: int) -> None:
    pixels, long = pictures(3), "folder/" + "n" * 90 + "/" + "k" * 80
    members = {
        "b/1.cls": b"2\n",
        f"{long}.json": json.dumps({"label": 7, "width": 7, "caption": "é"}).encode(),
        "b/1.seg.txt": b"a note",
        f"{long}.PNG": encoded(pixels[1]),
        "b/1.png": encoded(pixels[0]),
        "../../up.png": encoded(pixels[2]),
        "../../up.json": b'{"cls": 0, "label": 0}',
        "__meta__.json": b"{}",
        "b/._1.png": b"of another system",
    }
    source = shards.source(tar(tmp_path / "x.tar", members, form), "")
    holds(source, pixels, [2, 7, 0])
    assert source.class_names == ()  # rows of the head
    assert "__meta__.json" in source.notes[1] and "._1.png" in source.notes[1]
    assert [file.size for file in source.files] == [len(encoded(image)) for image in pixels]


def test_jpeg_and_webp_in_shards_are_decoded_as_files_are(tmp_path: Path) -> None:
    pixels = pictures(2, 32, 40)
    data = [encoded(pixels[0], "JPEG"), encoded(pixels[1], "WEBP", lossless=True)]
    members = {"0.jpeg": data[0], "0.cls": b"1", "1.webp": data[1], "1.cls": b"0"}
    truth = [np.asarray(Image.open(io.BytesIO(item)).convert("RGB")) for item in data]
    holds(shards.source(tar(tmp_path / "x.tar", members), ""), np.stack(truth), [1, 0])


PNG = encoded(pictures(1)[0])


@pytest.mark.parametrize(
    ("members", "facts"),
    [
        ({"1.png": PNG, "1.cls": b"0", "2.png": PNG}, "2"),
        ({"1.cls": b"0"}, "1 0"),
        ({"1.png": PNG, "1.jpg": PNG, "1.cls": b"0"}, "1 2"),
        ({"a.1.png": PNG, "a.1.cls": b"0", "a.2.png": PNG, "a.2.cls": b"0"}, "a 2"),
        ({"1.PNG": PNG, "1.png": PNG, "1.cls": b"0"}, "1.png"),
        ({"1.png": PNG, "1.cls": b"dog"}, "1 dog"),
        ({"1.png": PNG, "1.cls": b"-1"}, "1 -1"),
        ({"1.png": PNG, "1.json": b'{"text": "a dog", "id": 3}'}, "1"),
        ({"1.png": PNG, "1.json": b'{"label": 1, "cls": 2}'}, "1"),
        ({"1.png": PNG, "1.json": b'{"label": true}'}, "1"),
        ({"1.png": PNG, "1.json": b"[" * 100_000}, "1"),
        ({"1.png": PNG, "1.json": b" " * (2 << 20)}, "1.json"),
        ({"README": b"nothing"}, ""),
    ],
)
def test_samples_that_would_score_wrong_are_named(
    tmp_path: Path, members: dict[str, bytes], facts: str
) -> None:
    unreadable(shards.source, tar(tmp_path / "x.tar", members), "x.tar", *facts.split())


def test_labels_beyond_the_names_and_shards_that_lack_are_refused(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path, pictures(4), [0, 1, 2, 3])
    unreadable(shards.source, root, "0", "3", "3")
    (root / "test" / "1.tar").unlink()
    unreadable(shards.source, root, "nshards.txt", "2", "1")
    (root / "classnames.txt").write_text("a\n\nb\n")
    (root / "test" / "nshards.txt").unlink()
    unreadable(shards.source, root, "classnames.txt")
    (tmp_path / "none").mkdir()
    unreadable(shards.source, tmp_path / "none")
    assert not shards.matches(tmp_path / "none") and not shards.matches(tmp_path / "nowhere")


def test_truncated_joined_and_compressed_shards_are_refused(tmp_path: Path) -> None:
    members = {f"{i}.{end}": PNG if end == "png" else b"0" for i in range(3) for end in ("png", "cls")}
    whole = tar(tmp_path / "x.tar", members).read_bytes()
    used = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the last file's block is the last that is not empty
    path = tmp_path / "cut.tar"
    for length in [1, 511, 513, 700, *range(1000, used, 391), used - 512, used, used + 511]:
        path.write_bytes(whole[:length])
        unreadable(shards.source, path, "cut.tar")
    path.write_bytes(b"")
    unreadable(shards.source, path, "cut.tar")
    path.write_bytes(whole + whole)
    unreadable(shards.source, path)
    damaged = bytearray(whole)
    damaged[2048 + 150] ^= 1  # in the checksum of a later header, which tarfile takes for the end
    path.write_bytes(damaged)
    unreadable(shards.source, path)
    path.write_bytes(b"\x89PNG" * 1000)
    unreadable(shards.source, path)
    for form in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"y.tar.{form}", f"w:{form}") as archive:
            archive.add(tmp_path / "x.tar", "x")
        assert shards.matches(tmp_path / f"y.tar.{form}")
        unreadable(shards.source, tmp_path / f"y.tar.{form}")


def test_claims_links_and_control_characters_do_no_harm(tmp_path: Path) -> None:
    path, name = tmp_path / "x.tar", "\x1b[31m\n/etc/1"
    source = shards.source(tar(path, {f"{name}.png": PNG, f"{name}.cls": b"0"}), "")
    assert source.files[0].name == "x.tar/\\x1b[31m\\n/etc/1.png"
    for size in (8**11 - 1, 1 << 60, -512):
        header = tarfile.TarInfo("1.png")
        header.size = size
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        unreadable(shards.source, path, "x.tar")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("1.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        unreadable(shards.source, path, "1.png")
    huge = tarfile.TarInfo("pax")  # a header for the next file that says it takes 2**50 bytes
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 50
    path.write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    unreadable(shards.source, path, "x.tar")


def test_a_shard_that_changes_is_not_read_on(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"1.png": PNG, "1.cls": b"0"})
    source = shards.source(path, "")
    os.utime(path, ns=(0, 1))
    with pytest.raises(files.Changed):
        source.open(0)


# Hugging Face


def features(names: list[str], **more: Any) -> dict[str, Any]:
    return {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}, **more}


def table(images: list[Any], labels: list[Any], told: dict[str, Any] | None) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": told}})} if told else None
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata)
    return pa.table([pa.array(images, kind), pa.array(labels, pa.int64())], schema)


def embedded(pixels: np.ndarray) -> list[dict[str, Any]]:
    return [{"bytes": encoded(image), "path": None} for image in pixels]


def saved(folder: Path, parts: list[pa.Table], told: dict[str, Any]) -> Path:
    """As datasets.save_to_disk: data-*.arrow in stream format, of batches, state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": told}))
    return folder


@pytest.mark.parametrize("in_schema", [True, False])
def test_saved_data_sets_are_read(tmp_path: Path, in_schema: bool) -> None:
    pixels, labels, told = pictures(9), [0, 1, 1, 0, 2, 1, 0, 0, 2], features(["cat", "sea dog", "cow"])
    rows = embedded(pixels)
    parts = [table(rows[a:b], labels[a:b], told if in_schema else None) for a, b in ((0, 5), (5, 9))]
    folder = saved(tmp_path / "set", parts, told)
    assert arrow.matches(folder)
    source = arrow.source(folder, "")
    holds(source, pixels, labels)
    assert source.class_names == ("cat", "sea dog", "cow")
    assert source.files[5].name == "data-00001-of-00002.arrow/0"
    scored(folder, "arrow", pixels, labels)


def test_a_dict_of_splits_takes_the_one_that_is_named(tmp_path: Path) -> None:
    pixels, told = pictures(4), features(["a", "b"])
    for name, rows in (("train", slice(0, 1)), ("test", slice(1, 4))):
        saved(tmp_path / name, [table(embedded(pixels[rows]), [0, 1, 1, 0][rows], told)], told)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert arrow.matches(tmp_path)
    unreadable(arrow.source, tmp_path)
    holds(arrow.source(tmp_path / "test", ""), pixels[1:], [1, 1, 0])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    holds(arrow.source(tmp_path, ""), pixels[1:], [1, 1, 0])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
    unreadable(arrow.source, tmp_path, "dataset_dict.json")


def test_parquet_of_the_hub_is_read_by_row_groups(tmp_path: Path) -> None:
    pixels, told = pictures(23), features(["a", "b"])
    labels, rows = [i % 2 for i in range(23)], embedded(pixels)
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number, (a, b) in enumerate(((0, 20), (20, 23))):
        file = folder / f"test-{number:05d}-of-00002.parquet"
        parquet.write_table(table(rows[a:b], labels[a:b], told), file, row_group_size=3)
    for path in (tmp_path / "set", folder, tmp_path / "set" / "test"):
        assert arrow.matches(path)
        source = arrow.source(path, "")
        holds(source, pixels, labels)
        assert source.class_names == ("a", "b")
    holds(arrow.source(folder / "test-00001-of-00002.parquet", ""), pixels[20:], labels[20:])
    scored(tmp_path / "set", "arrow", pixels, labels)
    parquet.write_table(table(rows[:1], [0], told), folder / "train-00000-of-00001.parquet")
    unreadable(arrow.source, tmp_path / "set")
    assert not arrow.matches(tmp_path / "set" / "validation")
    (folder / "test-00000-of-00002.parquet").unlink()
    unreadable(arrow.source, tmp_path / "set" / "test", "1", "2")
    (folder / "test-00001-of-00002.parquet").write_bytes(b"PAR1 cut")
    unreadable(arrow.source, folder / "test-00001-of-00002.parquet")


def test_images_by_path_have_to_be_there(tmp_path: Path) -> None:
    pixels, told = pictures(2), features(["a"])
    rows = [*embedded(pixels[:1]), {"bytes": None, "path": "images/there.png"}]
    folder = saved(tmp_path / "a", [table(rows, [0, 0], told)], told)
    (folder / "images").mkdir()
    (folder / "images" / "there.png").write_bytes(encoded(pixels[1]))
    holds(arrow.source(folder, ""), pixels, [0, 0])
    rows += [{"bytes": None, "path": "gone/x.png"}, None]
    folder = saved(tmp_path / "b", [table(rows, [0] * 4, told)], told)
    unreadable(arrow.source, folder, "3", "2", "gone/x.png", "3")


@pytest.mark.parametrize("how", ["arrow", "parquet"])
@pytest.mark.parametrize(
    "path",
    ["{outside}/x.png", "../x.png", "link.png", "links/x.png", "a/../../x.png", "../set2/x.png", "fifo.png",
     "/dev/zero", "/proc/self/environ", "", ".", "\0", "a" * 5000, "file://x.png", "~/x.png"],
)  # fmt: skip
def test_images_by_path_stay_inside_the_data_set(tmp_path: Path, path: str, how: str) -> None:
    """Of a data set from elsewhere: no other file is read, nothing is waited for."""
    pixels, told = pictures(1), features(["a"])
    rows = table([{"bytes": None, "path": path.format(outside=tmp_path)}], [0], told)
    folder = saved(tmp_path / "set", [rows], told)
    if how == "parquet":
        (folder / "state.json").unlink()
        parquet.write_table(rows, folder / "test.parquet")
    for other in (tmp_path, tmp_path / "set2"):
        other.mkdir(exist_ok=True)
        (other / "x.png").write_bytes(encoded(pixels[0]))
    (folder / "link.png").symlink_to(tmp_path / "x.png")
    (folder / "links").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo.png")
    with pytest.raises((ValueError, OSError)):
        arrow.source(folder, "data: 'set'").open(0)


def test_large_arrow_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, told = pictures(9), features(["a"])
    folder = saved(tmp_path / "set", [table(embedded(pixels), [0] * 9, told)], told)
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    source = arrow.source(folder, "")
    holds(source, pixels, [0] * 9)
    os.truncate(folder / "data-00000-of-00001.arrow", 100)
    with pytest.raises(files.Changed):  # and no SIGBUS
        source.open(8)


@pytest.mark.parametrize(
    ("labels", "told", "facts"),
    [
        ([0, -1], features(["a"]), "-1 0 label"),
        ([0, 2], features(["a", "b"]), "0 2 2"),
        ([0, None], features(["a"]), "1 label"),
        ([0, 0], {"label": {"_type": "ClassLabel", "names": "abc"}}, ""),
        ([], features(["a"]), ""),
    ],
)
def test_labels_that_would_score_wrong_are_refused(
    tmp_path: Path, labels: list[Any], told: dict[str, Any], facts: str
) -> None:
    images = embedded(pictures(len(labels)))
    unreadable(arrow.source, saved(tmp_path / "set", [table(images, labels, told)], told), *facts.split())


def test_columns_are_told_apart_or_listed(tmp_path: Path) -> None:
    pixels = pictures(2)
    base = table(embedded(pixels), [0, 1], None)

    def read(name: str, columns: pa.Table, told: dict[str, Any] | None) -> Source:
        return arrow.source(saved(tmp_path / name, [columns], told or {}), "")

    assert read("plain", base, None).class_names == ()  # rows of the head
    cifar100 = base.rename_columns(["image", "fine_label"]).append_column("coarse_label", base["label"])
    kinds = {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in ("fine_label", "coarse_label")}
    source = read("two", cifar100, {"image": {"_type": "Image"}, **kinds})
    holds(source, pixels, [0, 1])
    assert "'fine_label'" in source.notes[0]
    for name, columns, facts in [
        ("three", base.append_column("mask", base["image"]), ["2", "mask"]),
        ("none", base.select(["label"]), ["0", "label (int64)"]),
        ("bare", base.rename_columns(["image", "kind"]), ["0", "kind (int64)"]),
    ]:
        with refused(ValueError, *facts):
            read(name, columns, None)


def test_damaged_arrow_folders_are_refused(tmp_path: Path) -> None:
    told = features(["a"])
    folder = saved(tmp_path / "set", [table(embedded(pictures(2)), [0, 0], told)], told)
    file = folder / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        unreadable(arrow.source, folder, "data-00000-of-00001.arrow")
    file.unlink()
    unreadable(arrow.source, folder, "data-00000-of-00001.arrow")
    for state in ({}, {"_data_files": [{"filename": "../x.arrow"}]}, [], {"_indices_data_files": [1]}):
        (folder / "state.json").write_text(json.dumps(state))
        unreadable(arrow.source, folder)
    (folder / "state.json").write_text("{")
    unreadable(arrow.source, folder, "state.json")
