"""Files that change while they are in use, and what is no file."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from support import tiny_zoo
from support.tiny_sources import encoded
from support.wording import refused, said, warned

from rft_fast import checkpoints, datasets, figures, results, sweep
from rft_fast.clip.architectures import Preprocess
from rft_fast.common import files
from rft_fast.config import request
from rft_fast.evaluate import Scores
from rft_fast.results import Run
from rft_fast.run.cluster.actor import Answer, Problem
from rft_fast.run.cluster.dispatch import Dispatch
from rft_fast.run.cluster.workers import Failed
from rft_fast.run.pieces import Piece
from rft_fast.run.wiring import Models

pytestmark = pytest.mark.usefixtures("one_thread")

Act = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_zoo.make(tmp_path_factory.mktemp("zoo"))
    for name in "abc":  # long enough ago that nothing can write there any more at the same time
        os.utime(folder / f"{name}.safetensors", ns=(10**18, 10**18))
    return folder


def overwrite(file: Path) -> None:
    """Other weights in place, of the same size."""
    data = bytearray(file.read_bytes())
    data[-4:] = bytes(byte ^ 1 for byte in data[-4:])
    with file.open("r+b") as stream:
        stream.write(data)


def overwrite_and_set_time_back(file: Path) -> None:
    status = file.stat()
    overwrite(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(size: int) -> Act:
    return lambda file: os.truncate(file, size)


def replace(change: Act) -> Act:
    def act(file: Path) -> None:
        other = shutil.copy(file, file.with_name("new"))
        change(Path(other))
        os.replace(other, file)

    return act


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def nothing(file: Path) -> None:
    pass


def rewrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(file.read_bytes())


def retype(file: Path) -> None:
    file.write_text(file.read_text().replace('"mean": [0.5', '"mean": [0.25'))


def run(zoo: Path, monkeypatch: pytest.MonkeyPatch, file: str, act: Act, during: str) -> tuple[int, Any]:
    """An interpolation of two models; something happens to a file after a measurement of one of them."""
    add = Run.add

    def hooked(self: Run, study: str, model: str, number: int, *rows: Any) -> None:
        add(self, study, model, number, *rows)
        if model == during and number == 1:
            act(zoo / file)

    monkeypatch.setattr(Run, "add", hooked)
    monkeypatch.setattr(figures, "interpolation", lambda *_: None)
    status = sweep.main(
        ["interpolation", "--arch", str(zoo / "tiny.json"), "--zeroshot", str(zoo / "zeroshot.safetensors"),
         "--zeroshot-head", str(zoo / "head.safetensors"), "--head", "zeroshot", "--finetuned",
         *(str(zoo / f"{name}.safetensors") for name in "ab"), "--data", f"far={zoo / 'far.npz'}",
         "--alphas", "0:1:4", "--device", "cpu", "--quiet", "--out", str(zoo / "run")]
    )  # fmt: skip
    monkeypatch.setattr(Run, "add", add)
    return status, results.load(zoo / "run")


@pytest.fixture
def zoo(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "zoo")
    state = load_file(made / "zeroshot.safetensors")
    tiny_zoo.save({key: state[key] for key in state if "head" in key}, tmp_path / "zoo" / "head.safetensors")
    return tmp_path / "zoo"


CHANGES: dict[str, tuple[str, Act]] = {
    "overwritten": ("a.safetensors", overwrite),
    "overwritten, its time set back": ("a.safetensors", overwrite_and_set_time_back),
    "emptied": ("a.safetensors", truncate(0)),
    "cut short": ("a.safetensors", truncate(3000)),
    "longer": ("a.safetensors", truncate(1 << 20)),
    "replaced": ("a.safetensors", replace(overwrite)),
    "deleted": ("a.safetensors", os.unlink),
    "replaced by a FIFO": ("a.safetensors", replace_by_fifo),
    "zero-shot": ("zeroshot.safetensors", overwrite),
    "head": ("head.safetensors", replace(overwrite)),
    "architecture": ("tiny.json", retype),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_ends_the_run(
    how: str, zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, act = CHANGES[how]
    status, rows = run(zoo, monkeypatch, file, act, during="a")
    assert status == 1 and len(rows) == 0
    said(capsys.readouterr().err, zoo / file)


@pytest.mark.parametrize("during, kept", [("a", ["a"]), ("b", ["a"])])
@pytest.mark.parametrize("act", [overwrite, truncate(100), os.unlink])
def test_models_before_the_one_whose_file_changes_stay(
    act: Act, during: str, kept: list[str], zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(zoo / "b.safetensors", zoo / "before")
    status, rows = run(zoo, monkeypatch, "b.safetensors", act, during)
    assert status == 1 and rows["model"].unique().tolist() == kept and len(rows) == 4
    # With the file back, the same command ends with the rows of a run in which nothing happened.
    os.replace(zoo / "before", zoo / "b.safetensors")
    status, rows = run(zoo, monkeypatch, "b.safetensors", nothing, "b")
    shutil.rmtree(zoo / "run")
    again, undisturbed = run(zoo, monkeypatch, "b.safetensors", nothing, "b")
    assert status == again == 0
    assert rows.drop(columns="seconds").equals(undisturbed.drop(columns="seconds"))


@pytest.mark.parametrize("act", [os.utime, rewrite, replace(nothing)])
def test_the_same_bytes_are_no_change(act: Act, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(zoo, monkeypatch, "a.safetensors", act, "a")[0] == 0


def test_a_change_before_the_first_measurement_is_refused(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between hashing a model and loading it again."""
    hashed = files.sha256

    def hash_and_change(path: Any) -> str:
        found = hashed(path)
        if Path(path).name == "b.safetensors":
            overwrite(zoo / "b.safetensors")
        return found

    monkeypatch.setattr(files, "sha256", hash_and_change)
    with pytest.raises(SystemExit):
        run(zoo, monkeypatch, "a.safetensors", nothing, "a")
    said(capsys.readouterr().err, "b.safetensors")
    assert not (zoo / "run").exists()


def test_only_what_this_process_measured_is_withdrawn(tmp_path: Path) -> None:
    def row(study: str, model: str) -> dict[str, object]:
        return {"study": study, "model": model, "dataset": "d", "alpha": 0.5}

    config: dict[str, object] = {"finetuned": {"a": {}, "b": {}}}
    some = Scores(torch.ones(3), torch.ones(3, dtype=torch.bool))
    with Run(tmp_path, config) as earlier:
        earlier.add("layers", "a", 0, [row("layers", "a")])
        earlier.scores("z")["d", 0.0] = some
    with Run(tmp_path, config) as run:
        for study, model, number in (
            ("layers", "a", 1),
            ("layers", "a", 2),
            ("layers", "b", 1),
            ("prune", "a", 1),
        ):
            run.add(study, model, number, [row(study, model)] * 2)
        run.scores("z")["d", 1.0] = some
        assert run.withdraw("layers", "a") == 2 and run.withdraw("layers", "a") == 0
        assert run.done("layers", "a") == {0} and set(run.scores("z")) == {("d", 0.0)}
        run.add("layers", "a", 2, [row("layers", "a")])
    with Run(tmp_path, config) as again:  # which verifies all of it
        assert again.resumed == 4
        assert again.rows().groupby(["study", "model"]).size().to_dict() == {
            ("layers", "a"): 2, ("layers", "b"): 2, ("prune", "a"): 2,
        }  # fmt: skip


def test_inputs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    inputs = files.Inputs()
    assert (
        inputs.sha256(file) == "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"
    )  # sha256sum
    os.utime(file, ns=(0, 0))
    inputs.check()
    file.rename(tmp_path / "away")
    with refused(files.Changed):
        inputs.check()
    (tmp_path / "away").rename(file)
    inputs.check()
    with refused(files.Changed, "3", "4"), inputs.reading(file):
        file.write_bytes(b"more")
        raise ValueError("what a reader makes of it")
    unhashed = files.Inputs()
    unhashed.add(file)
    file.write_bytes(b"other")
    with pytest.raises(files.Changed):
        unhashed.sha256(file)


def test_bytes_written_within_one_tick_of_the_clock_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system whose times stand still: a young file is read again, not believed."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    status = os.stat(file)
    now = status.st_mtime_ns + files.YOUNG - 1
    monkeypatch.setattr(files.time, "time_ns", lambda: now)
    inputs = files.Inputs()
    inputs.sha256(file)
    file.write_bytes(b"two")
    stat = os.stat
    monkeypatch.setattr(files.os, "stat", lambda path: status if Path(path) == file else stat(path))
    with pytest.raises(files.Changed):
        inputs.check()
    # Also between the first look and the hash.
    inputs = files.Inputs()
    inputs.add(file)
    with pytest.raises(files.Changed), inputs.reading(file):
        file.write_bytes(b"ten")


def test_a_time_in_the_future_is_no_reason_to_hash_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    os.utime(file, ns=(1 << 62, 1 << 62))
    inputs = files.Inputs()
    inputs.sha256(file)
    monkeypatch.setattr(files, "sha256", None)
    inputs.check()
    with inputs.reading(file):
        pass


def test_a_worker_whose_file_changed_keeps_nothing_of_the_piece() -> None:
    piece = Piece("interpolation", "m", (0, 1), (1.0, 1.0))
    answer = Answer()
    answer.measured = [(0, [], ())]
    answer.problem = Problem(files.Changed("m.pt changed"))
    watch, cluster = Mock(), Mock()
    work = Dispatch(cluster, [], Mock(), watch)
    with refused(Failed, "m.pt"):
        work._keep(answer, piece, Mock())
    assert [call[0] for call in watch.method_calls] == ["measured", "withdrawn"]
    assert not Problem(OSError("another")).changed


@pytest.mark.parametrize("how", ["fifo", "socket", "device", "folder", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    holder = socket.socket(socket.AF_UNIX)
    match how:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            holder.bind(str(path))
        case "device":
            path = Path("/dev/zero")
        case "folder":
            path.mkdir()
        case _:
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to(tmp_path / "fifo")
    with holder:
        for read in (files.read_bytes, files.read_text, files.sha256, checkpoints.load, checkpoints.sha256):
            with refused(ValueError):
                read(path)


@pytest.mark.parametrize("write", ["zip", "old", "safetensors"])
def test_tensors_are_apart_from_the_file(write: str, tmp_path: Path) -> None:
    """A mapped file that is cut short would end the process, by SIGBUS."""
    state = {"visual.a": torch.arange(1 << 16, dtype=torch.float32), "visual.b": torch.ones(3)}
    file = tmp_path / "a.safetensors"
    if write == "safetensors":
        tiny_zoo.save(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=write == "zip")
    loaded = checkpoints.load(file)
    shapes = checkpoints.load(file, "meta")
    os.truncate(file, 0)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert shapes[name].is_meta and shapes[name].shape == tensor.shape
        assert shapes[name].dtype == tensor.dtype


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with files.opened(tmp_path / "a") as stream:
        content = files.Content(stream)
        assert bytes(content[10:12]) == b"\x0a\x0b" and len(content[95:200]) == 5
        np.frombuffer(content[:4], np.uint8)[0] = 9  # writable, and of its own
        os.truncate(tmp_path / "a", 50)
        with refused(files.Changed):
            content[40:60]


# --- data sets ------------------------------------------------------------------------------------


def images_of(kind: str, folder: Path) -> tuple[Path, Path]:
    """A data set of 12 images of 32 x 32, and the file of it that changes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12) % 3
    pngs = [encoded(image) for image in pixels]
    match kind:
        case "npz":
            np.savez(folder / "set.npz", images=pixels, labels=labels)
            return folder / "set.npz", folder / "set.npz"
        case "cifar":
            records = np.c_[labels, pixels.transpose(0, 3, 1, 2).reshape(12, -1)].astype(np.uint8)
            (folder / "test_batch.bin").write_bytes(records.tobytes())
            return folder, folder / "test_batch.bin"
        case "webdataset":
            with tarfile.open(folder / "set.tar", "w") as archive:
                for number, (png, label) in enumerate(zip(pngs, labels, strict=True)):
                    for name, data in ((f"{number}.png", png), (f"{number}.cls", b"%d" % label)):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
            return folder / "set.tar", folder / "set.tar"
        case "folder":
            for number, (png, label) in enumerate(zip(pngs, labels, strict=True)):
                (folder / str(label)).mkdir(exist_ok=True)
                (folder / str(label) / f"{number}.png").write_bytes(png)
            return folder, folder / "2" / "11.png"
        case "parquet":
            table = pa.table({"image": [{"bytes": png, "path": None} for png in pngs], "label": labels})
            parquet.write_table(table.cast(pa.schema([
                ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())
            ])), folder / "set.parquet", row_group_size=4)  # fmt: skip
            return folder / "set.parquet", folder / "set.parquet"
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["npz", "cifar", "webdataset", "folder", "parquet"])
@pytest.mark.parametrize("act", [overwrite, truncate(0), truncate(200), replace(overwrite), os.unlink])
def test_a_data_set_that_changes_between_listing_and_decoding(kind: str, act: Act, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path, file = images_of(kind, tmp_path / "set")
    listed = datasets.find("set", path, Preprocess((32, 32)))
    os.utime(file, ns=(1, 1))
    with refused(files.Changed):  # by its time alone, it may be another
        listed.load(cache=tmp_path / "cache", skip_unreadable=True)
    listed = datasets.find("set", path, Preprocess((32, 32)))
    act(file)
    with pytest.raises(files.Changed):
        listed.load(cache=tmp_path / "cache", skip_unreadable=True)


def test_images_that_change_later_are_said_to(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in memory, under a hash of their own: the rows stay right, and people are told."""
    status, rows = run(zoo, monkeypatch, "far.npz", truncate(0), "a")
    log = (zoo / "run" / "run.log").read_text()
    assert status == 0 and len(rows) == 8 and log.count("far.npz changed") == 1


def test_a_disk_that_fails_is_said_to_be_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.touch()
    with refused(OSError, "weights.pt"), files.opened(file):
        raise OSError(errno.EIO, "Input/output error")


def test_one_file_as_two_models_is_said_to_count_twice(tmp_path: Path) -> None:
    tiny_zoo.make(tmp_path)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    with warned(UserWarning):
        Models.load(request.read(tiny_zoo.own_models(tmp_path, "abc")))
