"""Files that want to run something, or to take memory or time that their size does not warrant: ValueError,
soon, and nothing has run. Whatever would have run leaves a canary file."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_pickles import (
    CONTAINERS,
    LEGACY,
    LITTLE,
    calls,
    identity,
    in_zip,
    load_from_bytes,
    rebuilt,
    text,
)
from support.wording import refused
from torch import nn

from rft_fast import checkpoints
from rft_fast.common.pickles import opcodes


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "code in a file ran"


def not_loaded(file: Path, *facts: str) -> str:
    """With no more than a gigabyte of memory, and not after hours."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with refused(ValueError, file.name, *facts) as caught:
        checkpoints.load(file)
    assert time.process_time() - start < 60  # of CPU: most take a hundredth of a second
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    return str(caught.value)


@pytest.mark.parametrize("how", calls(""))
@pytest.mark.parametrize("container", CONTAINERS)
def test_calls_are_refused_by_name_in_every_container(
    tmp_path: Path, canary: Path, container: str, how: str
) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(CONTAINERS[container](calls(f"touch {canary}")[how]))
    not_loaded(file, "os.system")


@pytest.mark.parametrize(
    "name",
    [
        *("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open"),
        *("subprocess.Popen", "functools.partial", "operator.attrgetter", "torch.hub.load", "torch.load"),
        *("torch.jit.load", "pickle.loads", "numpy.load", "importlib.import_module", "types.FunctionType"),
        *("torch.storage._load_from_bytes.__globals__.get", "torch._utils._rebuild_tensor_v2.__call__"),
        *(
            "torch._utils._rebuild_device_tensor_from_numpy",
            "torch._utils._import_dotted_name",
            "codecs.decode",
        ),
        *("collections.OrderedDict.__init__", "torch.FloatTensor", "src.models.modeling.ImageClassifier"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_else_is_not_called(tmp_path: Path, name: str, protocol: int) -> None:
    module, _, function = name.rpartition(".")
    imported = (
        f"c{module}\n{function}\n".encode() if protocol == 2 else text(module) + text(function) + b"\x93"
    )
    (tmp_path / "a.pt").write_bytes(b"\x80" + bytes([protocol]) + imported + text("x") + b"\x85R.")
    not_loaded(tmp_path / "a.pt", name)


class Builds:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["canary"]).touch()


class News:
    canary: Path

    def __new__(cls, canary: Path | None = None) -> News:
        if canary is not None:
            canary.touch()
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Path]:
        return (self.canary,)


def test_methods_of_importable_classes_do_not_run(tmp_path: Path, canary: Path) -> None:
    """A shell is made for a class whose code is at hand, too."""
    hostile = News()
    hostile.canary = canary
    module = nn.Linear(2, 2)
    module.extra = [Builds(canary), hostile]  # type: ignore[assignment]
    for protocol in range(2, 6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(module, protocol))
        assert checkpoints.load(tmp_path / "a.pkl").keys() == {"weight", "bias"}
    with pytest.raises(AssertionError):  # what they would do
        try:
            pickle.loads(pickle.dumps(module))
            assert not canary.exists()
        finally:
            canary.unlink()


def test_functions_that_are_only_kept_are_inert(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.act, module.dangerous = torch.nn.functional.gelu, os.system  # type: ignore[assignment]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(module))
    assert checkpoints.load(tmp_path / "a.pkl").keys() == {"weight", "bias"}
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"visual.proj": os.system}))
    not_loaded(tmp_path / "b.pkl", "visual.proj", "posix.system")


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + text("os\x1b[2J") + text("sys\ntem") + b"\x93)R.")
    message = not_loaded(tmp_path / "a.pkl", "os??2J.sys?tem")
    assert "\x1b" not in message and "\n" not in message
    for name in ("visual.\x1b[2J", "visual.\ud800", "x" * 2000):
        torch.save({name: torch.ones(1)}, tmp_path / "b.pt")
        assert not_loaded(tmp_path / "b.pt").isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02\x82\x01.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 1) + b"x.",
        b"\x80\x05\x97.",
        b"\x80\x02" + text("x") + b"Q.",
        b"\x80\x02Px\n.",
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02\x85.",
        b"\x80\x02}(Nu.",
        b"\x80\x02}]Ns.",
        b"\x80\x02K\x01Na.",
        b"\x80\x02K\x01K\x01K\x01s.",
        b"\x80\x02K\x01}b.",
        b"\x80\x02K\x01)\x81.",
        b"\x80\x04K\x01K\x01\x93.",
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02ctorch.nn\nModule\n)\x81.",
        b"\x80\x02c" + b"x" * 100_000,
        b"\x80\x02}I" + b"9" * 10_000 + b"\nNs.",
        b"\x80\x02}\x8b" + struct.pack("<i", 5000) + b"\x11" * 5000 + b"Ns.",
        load_from_bytes(b"hello"),
        load_from_bytes(in_zip(b"\x80\x02}.")),
        load_from_bytes(load_from_bytes(b"")),
        load_from_bytes(LEGACY + LITTLE + b"\x80\x02K\x01.\x80\x02]."),
        load_from_bytes(pickle.dumps(1)),
    ],
    ids=range(27),
)
def test_damaged_and_odd_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    not_loaded(tmp_path / "a.pt")


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**60, 2**62, 2**63, 2**64, -1, -(2**60)])
def test_claimed_sizes(tmp_path: Path, size: int) -> None:
    storage, data = identity(4), {"data/0": bytes(16)}
    cases = {
        "shape": in_zip(rebuilt(storage, 0, (size,), (1,)), **data),
        "two": in_zip(rebuilt(storage, 0, (size, 2), (0, 0)), **data),
        "empty": in_zip(rebuilt(storage, 0, (0, size, size), (1, 1, 1)), **data),
        "stride": in_zip(rebuilt(storage, 0, (2,), (size,)), **data),
        "offset": in_zip(rebuilt(storage, size, (1,), (1,)), **data),
        "storage": in_zip(rebuilt(identity(size), 0, (1,), (1,)), **data),
    }
    for name, content in cases.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        not_loaded(tmp_path / f"{name}.pt", "visual.proj" if "claims shape" in name else name)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (5,), (0,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (True,), (1,)),
        (0, (1,) * 100, (1,) * 100),
        (0, (1,) * 3, ("x",) * 3),
    ],
)
def test_tensors_that_leave_their_storage(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[Any, ...]
) -> None:
    (tmp_path / "a.pt").write_bytes(
        in_zip(rebuilt(identity(4), offset, size, stride), **{"data/0": bytes(16)})
    )
    not_loaded(tmp_path / "a.pt")


def test_old_files_that_claim_more_than_they_have(tmp_path: Path) -> None:
    def old(count: int, stored: int, data: bytes, keys: tuple[str, ...] = ("0",)) -> bytes:
        whole = identity(count)[:-2] + b"NtQ"
        body = rebuilt(whole, 0, (1,), (1,))
        return LEGACY + LITTLE + body + pickle.dumps(list(keys), 2) + struct.pack("<q", stored) + data

    cases = {
        "missing": old(4, 4, bytes(15)),
        "huge": old(2**60, 2**60, bytes(16)),
        "other": old(4, 5, bytes(20)),
        "negative": old(4, -4, bytes(16)),
        "no_key": old(4, 4, bytes(16), ()),
        "other_key": old(4, 4, bytes(16), ("1",)),
    }
    for name, content in cases.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        not_loaded(tmp_path / f"{name}.pt")
    twice = (
        rebuilt(identity(4)[:-2] + b"NtQ", 0, (1,), (1,))[:-2] + text("b") + identity(5)[:-2] + b"NtQ" + b"u."
    )
    (tmp_path / "twice.pt").write_bytes(
        LEGACY + LITTLE + twice.replace(b"\x80\x02}", b"\x80\x02}(", 1) + b"\x80\x02]."
    )
    not_loaded(tmp_path / "twice.pt")


def foreign(kind: str, key: bytes, count: int = 4) -> bytes:
    return b"(" + text("storage") + f"c{kind}\n".encode() + key + text("cpu") + b"K" + bytes([count]) + b"t"


@pytest.mark.parametrize(
    ("pid", "facts"),
    [
        (text("storage"), ""),
        (b"(" + text("module") + text("os") + b"NNt", ""),
        (foreign("os\nsystem", text("0")), "os.system"),
        (foreign("torch\nQInt8Storage", text("0")), "QInt8Storage"),
        (foreign("torch\nFloatStorage", text("../../etc/passwd")), ""),
        (foreign("torch\nFloatStorage", b"K\x01"), ""),
        (foreign("torch\nFloatStorage", text("0"), 5), "20"),
    ],
)
def test_persistent_ids(tmp_path: Path, pid: bytes, facts: str) -> None:
    (tmp_path / "a.pt").write_bytes(in_zip(b"\x80\x02" + pid + b"Q.", **{"data/0": bytes(16)}))
    not_loaded(tmp_path / "a.pt", *facts.split())


# --- truncation and noise -------------------------------------------------------------------------


def samples() -> dict[str, bytes]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2))
    result = {"pickle": pickle.dumps(module), "pickle2": pickle.dumps(module, 2)}
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    result["zip"] = buffer.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer, _use_new_zipfile_serialization=False)
        result["old"] = buffer.getvalue()
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(module), buffer)
        result["torchscript"] = buffer.getvalue()
    return result


@pytest.mark.parametrize("how", samples())
def test_truncated_anywhere(tmp_path: Path, how: str) -> None:
    whole, file = samples()[how], tmp_path / "a.pt"
    file.write_bytes(whole)
    assert len(checkpoints.load(file)) == 2
    for length in range(1, len(whole), 5):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^load: "):
            checkpoints.load(file)


def test_truncated_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "whole.safetensors")
    whole, file = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "a.safetensors"
    for length in range(1, len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^load: "):
            checkpoints.load(file)
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    not_loaded(file)
    header = b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    not_loaded(file)


@pytest.mark.parametrize("how", samples())
def test_noise_gives_values_or_a_value_error(tmp_path: Path, canary: Path, how: str) -> None:
    whole, file = samples()[how], tmp_path / "a.pt"
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        content = bytearray(whole)
        for place, value in zip(
            torch.randint(len(whole), (4,), generator=generator).tolist(),
            torch.randint(256, (4,), generator=generator).tolist(),
            strict=True,
        ):
            content[place] = value
        file.write_bytes(content)
        try:
            checkpoints.load(file)
        except ValueError as error:
            assert str(error).startswith("load: ")


# --- bombs ----------------------------------------------------------------------------------------


def test_zip_bombs_and_their_like(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 24))
    not_loaded(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", rebuilt(identity(1 << 22), 0, (1 << 22,), (1,)))
        archive.writestr("a/data/0", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    not_loaded(file)
    with zipfile.ZipFile(file, "w") as archive:  # code of a TorchScript archive is compressed, and read
        archive.writestr("a/data.pkl", b"\x80\x02c__torch__\nM\n)\x81.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        for name in "ab":
            archive.writestr(f"a/code/{name}.py", bytes(10 << 20), zipfile.ZIP_DEFLATED)
    not_loaded(file, "16", "MiB")
    whole = in_zip(rebuilt(identity(4), 0, (4,), (1,)), **{"data/0": bytes(16)})
    for name, change in {
        "entry sizes": lambda entry: (
            setattr(entry, "file_size", 1 << 40),
            setattr(entry, "compress_size", 1 << 40),
        ),
        "entry offset": lambda entry: setattr(entry, "header_offset", len(whole) - 4),
        "overlap": lambda entry: setattr(entry, "header_offset", 0),
        "encrypted": lambda entry: setattr(entry, "flag_bits", 1),
    }.items():
        file = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", rebuilt(identity(4), 0, (4,), (1,)))
            archive.writestr("a/data/0", bytes(16))
            change(archive.infolist()[1])  # the directory at the end is written on closing
        not_loaded(file)


def test_two_entries_of_one_name_and_two_archives(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02}.")
            archive.writestr("a/data.pkl", b"\x80\x02}.")
    not_loaded(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data.pkl", b"\x80\x02}.")
    not_loaded(tmp_path / "b.pt", "torch.save")


def test_nothing_is_unpacked(tmp_path: Path) -> None:
    state = {"visual.proj": torch.arange(4.0)}
    torch.save(state, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("../escaped", b"x")
        archive.writestr("/absolute", b"x")
    assert torch.equal(checkpoints.load(tmp_path / "a.pt")["visual.proj"], state["visual.proj"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    assert not (tmp_path.parent / "escaped").exists()


def test_a_big_endian_machine(tmp_path: Path) -> None:
    whole = in_zip(rebuilt(identity(4), 0, (4,), (1,)), **{"data/0": bytes(16), "byteorder": b"big"})
    (tmp_path / "a.pt").write_bytes(whole)
    not_loaded(tmp_path / "a.pt")
    sizes = pickle.dumps({"little_endian": False}, 2)
    (tmp_path / "b.pt").write_bytes(LEGACY + sizes + b"\x80\x02}.\x80\x02].")
    not_loaded(tmp_path / "b.pt")


BOMBS = {
    # Tuples that hold the one before twice: 2**60 leaves if anything walked them.
    "as value": b"\x80\x02}" + text("a") + b")" + b"2\x86" * 60 + b"s.",
    "as key": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "in set": b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.",
    "as size": rebuilt(b")" + b"2\x86" * 60, 0, (1,), (1,)),
    "as name": b"\x80\x02)" + b"2\x86" * 60 + b")R.",
    "as state": b"\x80\x02ctorch.nn\nModule\n)\x81)" + b"2\x86" * 60 + b"b.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "long text again": b"\x80\x02c_codecs\nencode\nq\x00"
    + text("x" * 100_000)
    + b"q\x010h\x00h\x01\x85R0" * 20_000
    + b"N.",
    "long list again": b"\x80\x02]("
    + b"N" * 100_000
    + b"eq\x01ctorch\nSize\nq\x000"
    + b"h\x00h\x01\x85R0" * 20_000
    + b".",
    "no end": b"\x80\x02" + b"N" * 1000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "a.pt").write_bytes(BOMBS[bomb])
    not_loaded(tmp_path / "a.pt")


def test_more_steps_than_any_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_OPCODES", 50_000)
    (tmp_path / "a.pt").write_bytes(b"\x80\x02" + b"N0" * 30_000 + b"N.")
    not_loaded(tmp_path / "a.pt", "50,000")


def modules(*body: bytes) -> bytes:
    return b"\x80\x02" + b"".join(body) + b"."


def module(children: bytes, parameters: bytes = b"}") -> bytes:
    return (
        b"ctorch.nn\nModule\n)\x81}(" + text("_parameters") + parameters + text("_buffers") + b"}"
        + text("_modules") + children + b"ub"
    )  # fmt: skip


@pytest.mark.slow
def test_modules_without_end(tmp_path: Path) -> None:
    doubled = module(b"}")
    for _ in range(60):  # each holds the one before at two places
        doubled += b"q\x01" + b"0" + module(b"}(" + text("a") + b"h\x01" + text("b") + b"h\x01u")
    itself = b"ctorch.nn\nModule\n)\x81q\x02" + module(b"}" + text("a") + b"h\x02s").removeprefix(
        b"ctorch.nn\nModule\n)\x81"
    )
    empty = b"}(" + b"".join(text(f"p{i}") + b"N" for i in range(3_000)) + b"u"
    wide = module(b"}", empty) + b"q\x010"
    wide += module(b"}(" + b"".join(text(f"m{i}") + b"h\x01" for i in range(3_000)) + b"u")
    for name, content in {"doubled": doubled, "itself": itself, "wide": wide}.items():
        (tmp_path / name).write_bytes(modules(content))
        not_loaded(tmp_path / name)


def test_many_copies_of_one_storage(tmp_path: Path) -> None:
    """Tensors that must be copied, since they are not contiguous, may not take more than the file does."""
    base = torch.zeros(1000, 1000)
    state = {f"visual.{i}": base[:, i:].t() for i in range(200)}
    torch.save(state, tmp_path / "a.pt")
    not_loaded(tmp_path / "a.pt")


def test_the_hand_written_pickles_are_what_they_seem(tmp_path: Path) -> None:
    """The same bytes with honest numbers are read: the refusals above are not for a slip of the pen."""
    (tmp_path / "a.pt").write_bytes(
        in_zip(rebuilt(identity(4), 1, (3,), (1,)), **{"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    )
    assert checkpoints.load(tmp_path / "a.pt")["visual.proj"].tolist() == [2, 3, 4]
    body = rebuilt(identity(4)[:-2] + b"NtQ", 0, (2, 2), (1, 2))
    data = pickle.dumps(["0"], 2) + struct.pack("<q4f", 4, 1, 2, 3, 4)
    (tmp_path / "b.pt").write_bytes(LEGACY + LITTLE + body + data)
    assert checkpoints.load(tmp_path / "b.pt")["visual.proj"].tolist() == [[1, 3], [2, 4]]
    view = identity(4)[:-2] + b"(" + text("9") + b"K\x01K\x02ttQ"  # a part of a storage, as old torch wrote
    (tmp_path / "c.pt").write_bytes(LEGACY + LITTLE + rebuilt(view, 0, (2,), (1,)) + data)
    assert checkpoints.load(tmp_path / "c.pt")["visual.proj"].tolist() == [2, 3]
    for name, content in calls(f"touch {tmp_path / 'ran'}").items():
        if name not in ("in_build", "in_pid", "as_type"):  # which end in an error of Python's reader
            pickle.loads(content)
            (tmp_path / "ran").unlink()  # it did run there
