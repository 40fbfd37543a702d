"""The cache of decoded images: the same bits however they come, and every accident survived and said."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from support import PATIENCE
from support.wording import refused, said, warned
from torchvision.datasets import ImageFolder

from rft_fast import cache as command
from rft_fast import datasets
from rft_fast.clip.architectures import Preprocess
from rft_fast.datasets import cache
from rft_fast.datasets.cache import file as cache_file
from rft_fast.datasets.cache import storage

RNG = np.random.default_rng(0)
PREPROCESS = Preprocess((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
SLOT = 3 * 24 * 24


def picture(height: int = 30, width: int = 40) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in two classes."""
    for index in range(10):
        file = tmp_path / "data" / f"class{index // 5}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(25 + index, 40 - index).save(file)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk that runs these tests is."""
    monkeypatch.setattr(storage, "RESERVE", 0)


@pytest.fixture(autouse=True)
def no_file_is_left_open() -> Iterator[None]:
    def descriptors() -> set[str]:
        return {link for fd in os.listdir("/proc/self/fd") if "caches" in (link := target(fd))}

    def target(fd: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            return ""

    if not Path("/proc/self/fd").is_dir():
        yield
        return
    before = descriptors()
    yield
    assert descriptors() <= before


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images decoded so far, in any order."""
    names: list[str] = []
    original = datasets.decoding.decode

    def counting(listing: Any, transform: Any, index: int) -> Any:
        names.append(Path(listing.files[index].name).name)
        return original(listing, transform, index)

    monkeypatch.setattr(datasets.decoding, "decode", counting)
    return names


def load(folder: Path, directory: Path | None, preprocess: Preprocess = PREPROCESS, **more: Any) -> Any:
    return datasets.load("set", folder, preprocess, cache=directory, **more)


def test_the_directory_may_be_a_text(folder: Path, tmp_path: Path) -> None:
    found = datasets.find("set", folder, PREPROCESS)
    assert found.undecoded(str(tmp_path)) == 10 and len(found.load(cache=str(tmp_path)).images) == 10
    assert found.undecoded(str(tmp_path)) == 0


def quietly(folder: Path, directory: Path | None, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, directory, **more)


def truth(folder: Path, preprocess: Preprocess = PREPROCESS) -> torch.Tensor:
    """Float images as ImageFolder and open_clip's own transform give them, normalised."""
    transform = open_clip.image_transform(
        preprocess.size[0], is_train=False, mean=preprocess.mean, std=preprocess.std
    )
    return torch.stack([image for image, _ in ImageFolder(str(folder), transform)])


def normalised(data: datasets.Dataset) -> torch.Tensor:
    """As the evaluator does it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return data.images.float().div(255).sub(mean).div(std)


def only(directory: Path) -> Path:
    """The one file in a directory of caches."""
    (file,) = (path for path in directory.iterdir() if path.name != ".lock")
    return file


def damage(file: Path, offset: int) -> None:
    """Turns one byte over."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 0xFF
    file.write_bytes(content)


def mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


# --- the pixels ----------------------------------------------------------------------------------


def test_cold_warm_and_without_a_cache_are_open_clips_bits(folder: Path, tmp_path: Path) -> None:
    expected = truth(folder)
    for directory in (None, tmp_path / "caches", tmp_path / "caches"):
        got = quietly(folder, directory)
        assert torch.equal(normalised(got), expected)
        assert got.labels.tolist() == [0] * 5 + [1] * 5


def test_nothing_is_decoded_twice(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    names = [f"{index}.png" for index in range(10)]
    part = quietly(folder, tmp_path / "caches", samples=4, seed=3)
    first = set(decoded)
    assert len(first) == len(decoded) == 4
    quietly(folder, tmp_path / "caches", samples=4, seed=3)
    assert len(decoded) == 4
    whole = quietly(folder, tmp_path / "caches")
    assert sorted(decoded) == names
    again = quietly(folder, tmp_path / "caches", samples=7)
    assert sorted(decoded) == names
    expected = truth(folder)
    assert torch.equal(normalised(whole), expected)
    for got, samples, seed in ((part, 4, 3), (again, 7, 0)):
        chosen = sorted(np.random.RandomState(seed).permutation(10)[:samples].tolist())
        assert torch.equal(normalised(got), expected[chosen])
    only(tmp_path / "caches")  # one cache for all of them


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_whole_folder_is_mapped_and_writing_to_it_changes_a_copy(folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "caches"
    for _ in range(2):  # cold and warm
        got = quietly(folder, directory)
        assert mapped(only(directory))
        got.images.fill_(7)
        del got
        assert not mapped(only(directory))
    part = quietly(folder, directory, samples=9)
    assert not mapped(only(directory))
    assert len(part.labels) == 9
    assert torch.equal(normalised(quietly(folder, directory)), truth(folder))


def test_images_that_were_taken_outlive_the_cache(folder: Path, tmp_path: Path) -> None:
    got = quietly(folder, tmp_path / "caches")
    only(tmp_path / "caches").unlink()
    assert torch.equal(normalised(got), truth(folder))


def test_another_transform_is_another_cache_but_another_normalisation_is_not(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory)
    other = replace(PREPROCESS, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.equal(normalised(quietly(folder, directory, preprocess=other)), truth(folder, other))
    assert len(decoded) == 10
    for count, other in enumerate(
        (
            replace(PREPROCESS, size=(20, 20)),
            replace(PREPROCESS, interpolation="bilinear"),
            replace(PREPROCESS, resize_mode="longest"),
            replace(PREPROCESS, resize_mode="longest", fill_color=128),
        ),
        start=2,
    ):
        for _ in range(2):
            got = quietly(folder, directory, preprocess=other)
            assert torch.equal(got.images, quietly(folder, None, preprocess=other).images)
        assert len(cache.entries(directory)) == count
    assert len(decoded) == 10 + 4 * (10 + 2 * 10)


def test_progress_counts_what_is_kept(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        calls: list[tuple[int, int]] = []
        quietly(folder, tmp_path / "caches", progress=lambda *call: calls.append(call))  # noqa: B023
        assert calls == [(count, 10) for count in range(1, 11)]


def test_an_npz_has_no_cache(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(4))
    quietly(tmp_path / "x.npz", tmp_path / "caches")
    assert not (tmp_path / "caches").exists()


# --- other files ---------------------------------------------------------------------------------


def test_changed_files_are_said_and_decoded_again(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory)

    def renewed(names: list[str], *counts: int) -> None:
        decoded.clear()
        with warned(UserWarning, folder, *counts) as caught:
            got = load(folder, directory)
        assert len(caught) == 1
        assert sorted(decoded) == names
        assert torch.equal(normalised(got), truth(folder))
        quietly(folder, directory)
        assert sorted(decoded) == names
        only(directory)

    file = folder / "class0" / "3.png"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the time alone
    renewed(["3.png"], 1, 10)
    status = file.stat()
    picture(50, 60).save(file)  # the size alone
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns and file.stat().st_size != status.st_size
    renewed(["3.png"], 1)
    picture().save(folder / "class0" / "00.png")  # every image after it moves
    (folder / "class1" / "9.png").unlink()
    (folder / "class1" / "8.png").rename(folder / "class1" / "85.png")
    picture(33, 44).save(file)
    renewed(["00.png", "3.png", "85.png"], 2, 1)


def test_other_versions_are_said_and_everything_is_decoded_again(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory)
    monkeypatch.setattr("PIL.__version__", "99.1")
    assert datasets.find("set", folder, PREPROCESS).undecoded(directory) == 10
    with warned(UserWarning, "99.1"):
        load(folder, directory)
    assert len(decoded) == 20
    quietly(folder, directory)
    assert len(decoded) == 20


def test_a_cache_under_a_wrong_name_is_not_believed(folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory)
    file = only(directory)
    other = replace(PREPROCESS, interpolation="bilinear")
    quietly(folder, directory, preprocess=other)
    (second,) = set(directory.glob("*.pixels")) - {file}
    file.replace(second)
    assert datasets.find("set", folder, other).undecoded(directory) == 10
    with warned(UserWarning):
        got = load(folder, directory, other)
    assert torch.equal(got.images, load(folder, None, other).images)


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 10, 9])
def test_a_damaged_image_is_decoded_again(
    folder: Path, tmp_path: Path, decoded: list[str], samples: int | None
) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory)
    chosen = sorted(np.random.RandomState(0).permutation(10)[: samples or 10].tolist())
    victim = chosen[4]
    damage(only(directory), -((10 - victim) * SLOT) + 100)
    decoded.clear()
    count = samples or 10
    with warned(UserWarning, "1", count):
        got = load(folder, directory, samples=samples)
    assert torch.equal(normalised(got), truth(folder)[chosen])
    assert decoded == [f"{victim}.png"]
    assert torch.equal(normalised(quietly(folder, directory)), truth(folder))
    assert decoded == [f"{victim}.png"]


def test_a_damaged_mark_is_found_too(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory)
    marks_at = cache_file.PAGE * 2  # after head and table, a page each
    assert only(directory).stat().st_size == 3 * cache_file.PAGE + 10 * SLOT
    damage(only(directory), marks_at + 8 * 6)
    with warned(UserWarning, "1", "10"):
        got = load(folder, directory)
    assert torch.equal(normalised(got), truth(folder))
    assert decoded.count("6.png") == 2 and len(decoded) == 11


@pytest.mark.parametrize("how", ["magic", "length", "head", "table", "short", "long", "empty", "format"])
def test_a_damaged_head_means_a_new_cache(
    folder: Path, tmp_path: Path, decoded: list[str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "caches"
    if how == "format":
        monkeypatch.setattr(cache_file, "FORMAT", 99)
        quietly(folder, directory)
        monkeypatch.undo()
        monkeypatch.setattr(storage, "RESERVE", 0)
        return_to = datasets.decoding.decode
        monkeypatch.setattr(datasets.decoding, "decode", lambda *a: decoded.append("") or return_to(*a))
    else:
        quietly(folder, directory)
        file = only(directory)
        content = file.read_bytes()
        offsets = {"magic": 0, "length": 11, "head": 30, "table": cache_file.PAGE + 40}
        if how in offsets:
            damage(file, offsets[how])
        else:
            file.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}[how])
    decoded.clear()
    assert datasets.find("set", folder, PREPROCESS).undecoded(directory) == 10
    with warned(UserWarning):
        got = load(folder, directory)
    assert len(decoded) == 10
    assert torch.equal(normalised(got), truth(folder))
    assert torch.equal(normalised(quietly(folder, directory)), truth(folder))
    assert len(decoded) == 10


# --- accidents -----------------------------------------------------------------------------------


def test_a_mark_is_written_only_when_its_image_is_safely_on_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after any call: what is marked by then was flushed by then."""
    monkeypatch.setattr(cache_file, "CHUNK", 3)
    events: list[tuple[str, int]] = []
    write, flush, rename = os.pwrite, storage.flush, os.replace

    def pwrite(fd: int, data: Any, offset: int) -> int:
        written = write(fd, data, offset)
        events.append(("write", offset))
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(storage, "flush", lambda fd: (flush(fd), events.append(("flush", 0))))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append(("name", 0)), rename(*names)))
    quietly(folder, tmp_path / "caches")
    marks, slots = 2 * cache_file.PAGE, 3 * cache_file.PAGE
    safe: set[int] = set()
    unsafe: set[int] = set()
    marked = []
    for what, offset in events:
        if what == "flush":
            safe |= unsafe
        elif what == "name":
            assert {0, cache_file.PAGE} <= safe  # head and table
        elif marks <= offset < slots:
            index = (offset - marks) // 8
            assert slots + index * SLOT in safe
            marked.append(index)
        else:
            unsafe.add(offset)
    assert marked == list(range(10))
    assert sum(what == "flush" for what, _ in events) == 1 + 4  # the making, then every three images


FILL = """
    import os, sys, time, warnings
    from pathlib import Path
    from rft_fast import datasets
    from rft_fast.datasets.cache import storage, file as cache_file
    from rft_fast.clip.architectures import Preprocess
    storage.RESERVE = 0
    folder, directory, ready = map(Path, sys.argv[1:4])
    preprocess = Preprocess((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    warnings.simplefilter("error")
"""


def script(body: str, *arguments: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    code = textwrap.dedent(FILL) + textwrap.dedent(body)
    names = [str(argument) for argument in arguments]
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {file}: {process.communicate()[1]}")
        time.sleep(0.01)


@pytest.mark.slow
def test_a_process_killed_half_way_leaves_what_it_had_finished(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    process = script(
        """
        cache_file.CHUNK = 2
        write = cache_file.CacheFile.write
        def stuck(self, index, pixels):
            if index == 7:  # 0 to 5 are marked, 6 is written
                os.pwrite(self.fd, pixels.tobytes()[:100], self.head.slots_at + index * self.head.slot)
                ready.touch()
                time.sleep(600)
            write(self, index, pixels)
        cache_file.CacheFile.write = stuck
        datasets.load("set", folder, preprocess, cache=directory)
        """,
        folder,
        tmp_path / "caches",
        tmp_path / "ready",
    )
    wait_for(tmp_path / "ready", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert datasets.find("set", folder, PREPROCESS).undecoded(tmp_path / "caches") == 4
    got = quietly(folder, tmp_path / "caches")
    assert sorted(decoded) == ["6.png", "7.png", "8.png", "9.png"]
    assert torch.equal(normalised(got), truth(folder))


def test_an_interrupt_or_error_keeps_what_was_decoded(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    def progress(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "caches", progress=progress)
    decoded.clear()
    quietly(folder, tmp_path / "caches")
    assert sorted(decoded) == ["6.png", "7.png", "8.png", "9.png"]


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_file(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    process = script(
        """
        def stuck(*names):
            ready.touch()
            time.sleep(600)
        os.replace = stuck
        datasets.load("set", folder, preprocess, cache=directory)
        """,
        folder,
        tmp_path / "caches",
        tmp_path / "ready",
    )
    wait_for(tmp_path / "ready", process)
    process.kill()
    process.communicate()
    assert only(tmp_path / "caches").suffix == ".part"
    assert len(cache.entries(tmp_path / "caches")) == 1
    got = quietly(folder, tmp_path / "caches")
    assert torch.equal(normalised(got), truth(folder))
    assert len(decoded) == 10
    assert only(tmp_path / "caches").suffix == ".pixels"  # the rest of the dead one is swept up


@pytest.mark.slow
def test_two_processes_at_once(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    """Both begin before there is a cache, or with an old one; both write all images, interleaved."""
    directory = tmp_path / "caches"
    quietly(folder, directory / "old")
    for file in folder.rglob("*.png"):
        os.utime(file, (1, 1))
    body = """
        import random
        warnings.simplefilter("ignore")
        mine, other = ready, Path(sys.argv[4])
        adopt, make, write = cache_file._adopt, cache_file._make, cache_file.CacheFile.write
        def together(name):
            Path(f"{mine}.{name}").touch()
            deadline = time.monotonic() + 900
            while not Path(f"{other}.{name}").exists():
                assert time.monotonic() < deadline, name
                time.sleep(0.001)
        made, calls = [], set()
        def once(*arguments):
            made.append(kind)
            return make(*arguments)
        def first(path, source):
            found = adopt(path, source)
            if kind not in calls:  # neither has found anything when both have looked
                calls.add(kind)
                assert found[0] is None
                together(kind)
            return found
        def slowly(self, index, pixels):
            together(f"{kind}{index}")
            time.sleep(random.random() / 100)
            write(self, index, pixels)
        cache_file._adopt, cache_file._make, cache_file.CHUNK = first, once, 3
        cache_file.CacheFile.write = slowly
        for kind in ("new", "old"):
            got = datasets.load("set", folder, preprocess, cache=directory / kind)
            print(got.images.numpy().tobytes().hex())
        print(*made)
    """
    one, two = tmp_path / "one", tmp_path / "two"
    processes = [script(body, folder, directory, one, two), script(body, folder, directory, two, one)]
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    expected = load(folder, None).images.numpy().tobytes().hex()
    made = []
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.split()[:2] == [expected] * 2
        made += out.split()[2:]
    assert sorted(made) == ["new", "old"]  # one process made each file, the other took it
    decoded.clear()
    for kind in ("new", "old"):
        assert torch.equal(normalised(quietly(folder, directory / kind)), truth(folder))
        only(directory / kind)
    assert decoded == []


# --- disks that refuse ---------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 8])
@pytest.mark.parametrize("calls", [0, 1, 2, 5, 8, 11])
def test_a_full_disk_is_said_and_the_cache_removed(
    folder: Path,
    tmp_path: Path,
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    samples: int | None,
    calls: int,
) -> None:
    """Full after any number of writes: head, table, images, a part of an image, marks."""
    directory, left, write = tmp_path / "caches", [calls], os.pwrite
    monkeypatch.setattr(cache_file, "CHUNK", 4)

    def pwrite(fd: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] == -1 and len(data) > 8:
            return write(fd, data[: len(data) // 2], offset)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with warned(UserWarning, os.strerror(errno.ENOSPC), "RFT_CACHE", folder) as caught:
        got = load(folder, directory, samples=samples)
    assert len(caught) == 1
    assert [file.name for file in directory.iterdir()] == [".lock"]
    assert len(decoded) == len(set(decoded)) == (samples or 10)  # nothing was lost
    chosen = sorted(np.random.RandomState(0).permutation(10)[: samples or 10].tolist())
    assert torch.equal(normalised(got), truth(folder)[chosen])
    monkeypatch.setattr(os, "pwrite", write)
    assert torch.equal(normalised(quietly(folder, directory)), truth(folder))


def test_a_disk_that_loses_what_it_took_is_found_out(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network disks do: writes succeed, the flush fails, and the bytes are gone."""

    def flush(fd: int) -> None:
        if decoded:
            os.pwrite(fd, bytes(3 * SLOT), 3 * cache_file.PAGE)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(storage, "flush", flush)
    with warned(UserWarning):
        got = load(folder, tmp_path / "caches")
    assert torch.equal(normalised(got), truth(folder))
    assert sorted(decoded) == sorted([f"{i}.png" for i in range(10)] + [f"{i}.png" for i in range(3)])


def test_a_full_disk_leaves_the_cache_of_another_run(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory, samples=5)

    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", pwrite)
        with warned(UserWarning):
            got = load(folder, directory)
    assert torch.equal(normalised(got), truth(folder))
    assert len(decoded) == 10
    assert datasets.find("set", folder, PREPROCESS).undecoded(directory) == 5


def test_too_little_room_is_seen_before(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "caches"
    free = [10 * SLOT - 1]
    usage = type("usage", (), {"free": property(lambda self: free[0])})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage())
    written: list[int] = []
    with monkeypatch.context() as watched:
        watched.setattr(cache_file.CacheFile, "write", lambda *_: written.append(1))
        with warned(UserWarning, "17.3", "0"):
            got = load(folder, directory)
    assert not written and not list(directory.glob("*.pixels*"))
    assert torch.equal(normalised(got), truth(folder))
    free[0] = 4 * SLOT
    quietly(folder, directory, samples=4)
    with warned(UserWarning):  # six more
        got = load(folder, directory)
    assert torch.equal(normalised(got), truth(folder))
    assert len(decoded) == 10 + 4 + 6
    free[0] = 6 * SLOT
    quietly(folder, directory)
    free[0] = 0
    quietly(folder, directory)  # a full disk does not matter any more
    assert len(decoded) == 26
    os.utime(folder / "class0" / "0.png", (1, 1))  # no room to take the other nine over
    with warned(UserWarning, "1") as caught:
        got = load(folder, directory)
    assert len(caught) == 2
    assert torch.equal(normalised(got), truth(folder))


def test_places_where_nothing_can_be_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with warned(UserWarning):
        got = load(folder, tmp_path / "file" / "caches")
    assert torch.equal(normalised(got), truth(folder))
    source = datasets.decoding.cached(datasets.open_source("set", folder), PREPROCESS)
    source.path(tmp_path / "caches").mkdir(parents=True)
    with warned(UserWarning):
        got = load(folder, tmp_path / "caches")
    assert torch.equal(normalised(got), truth(folder))
    assert cache.entries(tmp_path / "caches") == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_cache_that_must_not_be_written_is_read(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    directory = tmp_path / "caches"
    quietly(folder, directory, samples=5)
    original = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if str(path).startswith(str(directory)) and flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(error, os.strerror(error))
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    before = only(directory).read_bytes()
    quietly(folder, directory, samples=5)
    assert len(decoded) == 5
    with warned(UserWarning):
        got = load(folder, directory)
    assert torch.equal(normalised(got), truth(folder))
    assert len(decoded) == 10
    os.utime(folder / "class0" / "0.png", (1, 1))
    with warned(UserWarning, os.strerror(error)):
        got = load(folder, directory)
    assert torch.equal(normalised(got), truth(folder))
    assert only(directory).read_bytes() == before


def test_a_disk_that_cannot_be_mapped(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> torch.Tensor:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(cache_file.CacheFile, "map", refuse)
    with warned(UserWarning):
        got = load(folder, tmp_path / "caches")
    assert torch.equal(normalised(got), truth(folder))
    assert len(decoded) == 10


def mounts() -> bool:
    try:
        done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="needs unshare(1) and user namespaces")
def test_a_disk_that_is_really_full_and_one_that_is_really_read_only(folder: Path, tmp_path: Path) -> None:
    process = script(
        """
        import subprocess
        def mount(*options):
            subprocess.run(["mount", *options, str(directory)], check=True)
        def load():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                got = datasets.load("set", folder, preprocess, cache=directory)
            assert got.images.equal(datasets.load("set", folder, preprocess).images)
            print(*(warning.message for warning in caught), sep=" | ", flush=True)
        room = storage.check_room
        storage.check_room = lambda *_: None
        directory.mkdir()
        mount("-t", "tmpfs", "-o", "size=24k", "none")  # head, table, marks; the images do not fit
        load()
        print(sorted(file.name for file in directory.iterdir()))
        storage.check_room = room
        load()
        mount("-o", "remount,size=1m")
        load()
        mount("-o", "remount,ro")
        load()
        os.utime(folder / "class0" / "0.png", (1, 1))
        load()
        """,
        folder,
        tmp_path / "caches",
        tmp_path,
        prefix=("unshare", "-rm"),
    )
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    full, names, little, enough, read_only, stale = out.splitlines()
    said(full, "[Errno 28] No space left on device")
    assert names == "['.lock']"
    said(little)
    assert enough == "" and read_only == ""
    said(stale, "Read-only file system")


# --- what cannot be read -------------------------------------------------------------------------


def test_unreadable_images_are_skipped_again_from_the_cache(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    expected = truth(folder)
    for name in ("class0/0.png", "class1/6.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    with refused(ValueError, "2", "10"):
        load(folder, tmp_path / "caches")
    keep = [1, 2, 3, 4, 5, 7, 8, 9]
    for _ in range(2):
        decoded.clear()
        with warned(UserWarning, "2", "10", "0.png", "6.png"):
            got = load(folder, tmp_path / "caches", skip_unreadable=True)
        assert sorted(decoded) == ["0.png", "6.png"]  # the refusal kept the others
        assert torch.equal(normalised(got), expected[keep])
        assert got.labels.tolist() == [0] * 4 + [1] * 4
        assert got.skipped == 2


# --- the command ---------------------------------------------------------------------------------


def test_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RFT_CACHE", "~/here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "here"
    monkeypatch.delenv("RFT_CACHE")
    assert cache.directory() == tmp_path / "xdg" / "rft_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.directory() == tmp_path / ".cache" / "rft_fast"


def test_the_command_lists_and_clears_only_what_is_ours(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "caches"
    monkeypatch.setenv("RFT_CACHE", str(directory))
    assert command.main([]) == 0
    assert capsys.readouterr().out.startswith(f"0 caches, 0 bytes, in {directory}\n")
    got = quietly(folder, directory, samples=4)
    quietly(folder, directory, preprocess=replace(PREPROCESS, size=(20, 20)))
    (directory / "data-0123456789abcdef.pixels.01234567.part").touch()
    (directory / "data-0123456789abcdef.pixels").write_bytes(b"broken")
    others = ["notes.txt", "holiday.pixels", "data-0123456789abcdef.pixels.bak"]
    for name in others:
        (directory / name).write_text("keep me")
    assert command.main([]) == 0
    out = capsys.readouterr().out
    facts = ("4 of 10", "24 x 24", f"{folder}; resize_mode=shortest", "10 of 10", "20 x 20", "damaged")
    for fact in facts:
        assert fact in " ".join(out.split())  # in the order of the files' names, which are hashes
    assert f"in {directory}\n" in out and "\n4 caches" in out
    assert not any(name in out for name in others[:2])
    assert command.main(["--clear"]) == 0
    said(capsys.readouterr().out, "4")
    assert sorted(file.name for file in directory.iterdir()) == sorted(others)
    assert len(got.images) == 4


@pytest.mark.slow
def test_the_command_runs_without_a_word_from_python() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rft_fast.cache", "--help"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--clear" in done.stdout


def test_sizes_in_words() -> None:
    words = {0: "0 bytes", 999: "999 bytes", 1234: "1.23 KB", 2_500_000: "2.5 MB", 7_530_000_000: "7.5 GB"}
    assert {count: cache.size(count) for count in words} == words
