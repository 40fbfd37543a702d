"""Files of torch, of pickle and of safetensors -> what they hold.

A tensor's bytes are read when it is made, into memory of its own. Nothing is memory-mapped, so that a file
that is cut short meanwhile is an error and no signal. Sizes that a file claims are compared with the bytes
that are there before they are used.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..common import files
from ..common.pickles import Global, Stream, Unreadable
from . import activation, foreign
from .pickled_tensors import unpickle
from .values import SAFETENSORS, Span, Storage, Stored, natural, storage

SUPPORTED = (
    "safetensors files, files of torch.save, old and new, pickles of whole modules, and TorchScript archives"
)
_MAGIC = 0x1950A86A20F9469CFC6C  # how files of torch.save began before they were zip files
_PROTOCOL = 1001
_MOST_CODE = 16 << 20  # bytes; that of a CLIP takes some 100 KiB
_MOST_SIDES = 64  # of a tensor, which torch has no more of
_MOST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer ones
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.M
)
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True, eq=False)
class Content:
    """What a file holds. container: "safetensors", "torch", "old torch", "pickle" or "torchscript".

    value: tensors by name (safetensors), else what the pickle describes, all of classes in values.py.
    own: of the classes of a TorchScript archive, the names of their parameters and buffers. metadata: of a
    safetensors header. activations: whether QuickGELU (True) and GELU (False) are in a TorchScript archive's
    code.
    """

    container: str
    value: Any
    size: int
    own: Mapping[str, frozenset[str]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    activations: frozenset[bool] = frozenset()


def read(stream: BinaryIO, file: Path) -> Content:
    """What a file holds; its first bytes decide how it is read, and its name only where they do not.

    stream: the file, open and without a buffer; it is needed until the last tensor is made.

    Raises Unreadable for a file that is empty, damaged, hostile or in no known format; files.Changed for one
    that becomes shorter meanwhile.
    """
    data = files.Content(stream)
    size = len(data)
    if not size:
        raise Unreadable("is empty: the rest of an interrupted download, or of a full disk. Get it again")
    head = bytes(data[: foreign.FIRST])
    # The length of the header comes first; in a text these eight bytes would be a huge number.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return _safetensors(data)
    if (reason := foreign.why(stream, file, head)) is not None:
        raise Unreadable(reason)
    if file.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02"):
        return _safetensors(data)
    if head.startswith(b"PK"):
        return _zip(stream, data)
    if not head.startswith(b"\x80"):  # the opcode that opens every binary pickle
        raise Unreadable(f"is in no known format (it starts with {head[:9]!r}). Supported: {SUPPORTED}")
    position = Stream(data[:])
    value = unpickle(position, nested=_nested)
    if isinstance(value, int) and value == _MAGIC:
        return Content("old torch", _old_torch(position, nested=_nested), size)
    return Content("pickle", value, size)


# --- safetensors ----------------------------------------------------------------------------------


def _safetensors(data: files.Content) -> Content:
    """Eight bytes: the length of a JSON object, name -> type, shape and place; then the tensors, gapless."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > min(len(data), 8 + _MOST_HEADER):
        raise _not_whole("its header is longer than the file, or than any header")
    try:
        header = json.loads(bytes(data[8:start]), object_pairs_hook=_distinct)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are no texts")
        entries = [(*map(natural, entry["data_offsets"]), name, entry) for name, entry in header.items()]
        found, end = {}, 0
        for first, last, name, entry in sorted(entries, key=lambda entry: entry[:3]):
            shape = tuple(map(natural, entry["shape"]))
            if len(shape) > _MOST_SIDES:
                raise ValueError(f"{name[:80]!r} has {len(shape)} dimensions")
            if entry["dtype"] not in SAFETENSORS:
                raise Unreadable(f"has {name[:80]!r} of type {entry['dtype']!r}, which is unknown here")
            dtype = SAFETENSORS[entry["dtype"]]
            if first != end or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name[:80]!r} is not where, or not as large as, it says")
            steps = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
            kept = Storage(dtype, last - first, Span(data, start + first, start + last))
            found[name], end = Stored(kept, dtype, 0, shape, tuple(steps)), last
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _not_whole(f"{type(error).__name__}: {error}") from error
    if start + end != len(data):
        raise _not_whole(f"its tensors take {end:,} bytes, it has {len(data) - start:,} for them")
    return Content("safetensors", found, len(data), metadata=metadata)


def _not_whole(why: str) -> Unreadable:
    return Unreadable(f"is not a whole safetensors file: {why}. If it was downloaded, do so again")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return found


# --- zip files of torch.save and torch.jit.save ---------------------------------------------------


def _zip(stream: BinaryIO, data: files.Content) -> Content:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile lets almost anything through
        raise Unreadable(
            f"is a damaged or truncated zip file: {error}. If it was downloaded, do so again"
        ) from error
    found = {entry.filename: entry for entry in entries}
    if len(found) < len(entries):
        raise Unreadable("is a zip file with several entries of one name")
    tops = [name.removesuffix("data.pkl") for name in found if name.rpartition("/")[2] == "data.pkl"]
    if len(tops) != 1:
        if tops:
            raise Unreadable(f"is a zip, but not of torch.save: it holds {len(tops)} checkpoints")
        raise Unreadable(f"{foreign.of_zip(list(found))}. Supported: {SUPPORTED}")
    parts = _Parts(tops[0], found, data)
    if (order := parts.place("byteorder")) is not None and bytes(order.read()) != b"little":
        raise Unreadable("was written on a big-endian machine, which is not supported")
    script = f"{parts.top}constants.pkl" in found
    value = unpickle(Stream(parts["data.pkl"].read()), parts.storage, None if script else _nested)
    if not script:
        return Content("torch", value, len(data))
    own, activations = _of_code(stream, f"{parts.top}code/")
    constants = (parts.place(name) for name in parts.inside("constants/"))
    if any(map(_is_quick, constants)):
        activations.add(True)
    return Content("torchscript", value, len(data), own, activations=frozenset(activations))


def _is_quick(constant: Span | None) -> bool:
    """Whether a constant is the 1.702 of QuickGELU."""
    data = b"" if constant is None or len(constant) > 8 else bytes(constant.read())
    if len(data) not in (4, 8):
        return False
    (value,) = struct.unpack("<f" if len(data) == 4 else "<d", data)
    return bool(abs(value - 1.702) < 1e-6)


def _of_code(stream: BinaryIO, top: str) -> tuple[dict[str, frozenset[str]], set[bool]]:
    """The parameters and buffers of each class, as lists in an archive's code tell; and which activations.

    A module's other tensors, such as an attention mask, lie beside them in the pickle. The code is text here,
    of which nothing else is read.
    """
    found: dict[str, frozenset[str]] = {}
    activations: set[bool] = set()
    left = _MOST_CODE
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if not entry.filename.startswith(top) or not entry.filename.endswith(".py"):
                    continue
                with archive.open(entry) as packed:  # compressed, so only so much of it is unfolded
                    text = packed.read(left + 1)
                left -= len(text)
                if left < 0:
                    raise Unreadable(f"has more than {_MOST_CODE >> 20} MiB of code, which no model needs")
                module = entry.filename[len(top) : -len(".py")].replace("/", ".")
                code = text.decode("utf-8", "replace")
                activations |= activation.of_code(code)
                for name, *lists in _CLASS.findall(code):
                    found[f"{module}.{name}"] = frozenset(_QUOTED.findall(" ".join(lists)))
    except Unreadable:
        raise
    except Exception as error:  # as above
        raise Unreadable(f"is a damaged or truncated zip file: {error}") from error
    return found, activations


class _Parts:
    """The entries of a torch archive, where they lie in the file. Nothing is ever unpacked."""

    def __init__(self, top: str, entries: Mapping[str, zipfile.ZipInfo], data: files.Content) -> None:
        self.top = top
        self.entries = entries
        self.data = data
        self.storages: dict[str, Storage] = {}
        spans = sorted((*self.span(entry), entry.filename) for entry in entries.values())
        for (_, stop, name), (start, _, other) in pairwise(spans):
            if start < stop:
                raise Unreadable(f"is a zip whose entries {name!r} and {other!r} overlap")

    def span(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Where an entry's bytes start and end in the file."""
        header = self.data[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or bytes(header[:4]) != b"PK\x03\x04":
            raise Unreadable(f"is a damaged zip: the entry {entry.filename!r} is not where it should be")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.compress_size > len(self.data):
            raise Unreadable(f"is a truncated zip: the entry {entry.filename!r} goes beyond its end")
        return start, start + entry.compress_size

    def inside(self, folder: str) -> list[str]:
        """The names of the entries in a folder, as :meth:`place` takes them."""
        start = self.top + folder
        return [name.removeprefix(self.top) for name in self.entries if name.startswith(start)]

    def place(self, name: str) -> Span | None:
        entry = self.entries.get(self.top + name)
        if entry is None:
            return None
        # torch stores its entries as they are; compressed ones could unfold to any size.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Unreadable(
                f"has compressed entries ({entry.filename!r}), which torch.save never writes and which "
                "cannot be read where they lie; save it again with torch.save"
            )
        if entry.flag_bits & 1:
            raise Unreadable(f"has encrypted entries ({entry.filename!r})")
        return Span(self.data, *self.span(entry))

    def __getitem__(self, name: str) -> Span:
        part = self.place(name)
        if part is None:
            raise Unreadable(f"is a damaged zip: it has no entry {self.top + name!r}; nothing was executed")
        return part

    def storage(self, identity: Any) -> Storage:
        """('storage', type, entry, device, elements)"""
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise Unreadable("refers to data in an unknown way; nothing was executed")
        claimed = storage(identity[1], identity[4])
        key = identity[2]
        if not isinstance(key, str):
            raise Unreadable("refers to an entry that has no name; nothing was executed")
        if (known := self.storages.get(key)) is None:
            claimed.data = self[f"data/{key}"]
            known = self.storages[key] = claimed
        _same_claim(known, claimed, key)
        if known.data is None or len(known.data) != claimed.nbytes:
            raise Unreadable(
                f"claims {claimed.nbytes} bytes for a storage that has {len(known.data or b'')}: it is "
                "damaged; nothing was executed"
            )
        return known


def _same_claim(known: Storage, claimed: Storage, key: str) -> None:
    if (known.dtype, known.nbytes) != (claimed.dtype, claimed.nbytes):
        raise Unreadable(f"claims storage {key[:40]!r} twice, differently; nothing was executed")


# --- files of torch.save before they were zip files, and storages within a pickle -----------------


def _nested(data: memoryview) -> Storage:
    """The storage that ``torch.storage._load_from_bytes`` is given: an old torch file of its own."""
    stream = Stream(data)
    if unpickle(stream) != _MAGIC:
        raise Unreadable("holds tensors that are not in torch's own format; nothing was executed")
    value = _old_torch(stream, nested=None)
    if not isinstance(value, Storage):
        raise Unreadable(
            "holds something other than numbers where a tensor's should be; nothing was executed"
        )
    return value


def _old_torch(stream: Stream, nested: Any) -> Any:
    """What follows the magic number: protocol, machine, the object, its storages' names, their bytes."""
    if unpickle(stream) != _PROTOCOL:
        raise Unreadable(f"is a file of torch.save in another protocol than {_PROTOCOL}")
    machine = unpickle(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Unreadable("was written on a big-endian machine, which is not supported")
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []
    value = unpickle(stream, partial(_old_storage, roots, views), nested)
    keys = unpickle(stream)
    if not isinstance(keys, list) or len(keys) != len(roots) or any(key not in roots for key in keys):
        raise Unreadable("is damaged: it lists other storages than its tensors use; nothing was executed")
    for key in keys:
        root = roots[key]
        itemsize = 1 if root.dtype is None else root.dtype.itemsize
        start = stream.position + 8
        # The number of elements precedes them; for a storage without a type, these are bytes.
        count = int.from_bytes(stream.data[stream.position : start], "little")
        if root.data is not None or start > len(stream.data) or count * itemsize != root.nbytes:
            raise Unreadable(
                "is damaged: a storage is not as large as its tensors claim; nothing was executed"
            )
        if start + root.nbytes > len(stream.data):
            raise Unreadable(
                f"is truncated: {start + root.nbytes - len(stream.data)} bytes of tensors are missing"
            )
        root.data = stream.data[start : start + root.nbytes]
        stream.position = start + root.nbytes
    for view, root, offset in views:
        if not isinstance(root.data, memoryview) or offset + view.nbytes > len(root.data):
            raise Unreadable(
                "is damaged: a storage goes beyond the one that it is part of; nothing was executed"
            )
        view.data = root.data[offset : offset + view.nbytes]
    return value


def _old_storage(roots: dict[str, Storage], views: list[tuple[Storage, Storage, int]], identity: Any) -> Any:
    """('module', class, file, source) or ('storage', type, key, device, elements, part of it or None)"""
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        if isinstance(identity[1], Global):
            return identity[1]
    elif isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
        claimed, key = storage(identity[1], identity[4]), str(identity[2])
        root = roots.setdefault(key, claimed)
        _same_claim(root, claimed, key)
        if len(identity) == 5 or identity[5] is None:
            return root
        _, offset, count = identity[5]
        view = storage(identity[1], count)
        at = storage(identity[1], offset).nbytes
        views.append((view, root, at))
        return view
    raise Unreadable("refers to data in an unknown way; nothing was executed")


# --- tensors --------------------------------------------------------------------------------------


class Maker:
    """Makes tensors of what a file holds: dense, contiguous, each distinct one once.

    size: the file's, in bytes. What cannot be a view of its bytes is copied; all copies together may not take
        more. meta: tensors of the type and shape alone, on the device "meta"; their bytes are not read.
    """

    def __init__(self, size: int, meta: bool = False) -> None:
        self.budget, self.meta = size, meta
        self.made: dict[Any, Tensor] = {}

    def tensor(self, stored: Stored) -> Tensor:
        """Raises Unreadable for a tensor that goes beyond its storage, or has more elements than it."""
        key = (id(stored.storage), stored.dtype, stored.offset, stored.size, stored.stride)
        if key not in self.made:
            try:
                self.made[key] = self._make(stored)
            except (RuntimeError, OverflowError) as error:
                raise Unreadable("claims a shape that torch cannot make: it is damaged") from error
        return self.made[key]

    def _make(self, stored: Stored) -> Tensor:
        data = stored.storage.data
        if data is None:
            raise Unreadable("has a storage whose bytes are nowhere: it is damaged")
        count = 1
        for side in stored.size:
            count *= side
            if count >= 1 << 63:
                break
        itemsize = stored.dtype.itemsize
        if len(stored.size) > _MOST_SIDES or count * itemsize > len(data):
            raise Unreadable(
                f"claims shape {stored.size[:8]} but stores only {len(data)} bytes; "
                "save it with .contiguous()"
            )
        if not count:
            return torch.empty(stored.size, dtype=stored.dtype, device="meta" if self.meta else "cpu")
        last = stored.offset + sum(
            (side - 1) * step for side, step in zip(stored.size, stored.stride, strict=True)
        )
        if (last + 1) * itemsize > len(data):
            raise Unreadable(f"goes beyond its storage of {len(data)} bytes: it is damaged")
        if self.meta:
            return torch.empty(stored.size, dtype=stored.dtype, device="meta")
        if isinstance(data, Span):
            data = stored.storage.data = data.read()
        raw = torch.frombuffer(data, dtype=torch.uint8)
        raw = raw[stored.offset * itemsize : (last + 1) * itemsize]
        if raw.data_ptr() % itemsize:  # in a pickle, tensors begin anywhere
            raw = self._paid(raw).clone()
        result = raw.view(stored.dtype).as_strided(stored.size, stored.stride)
        return result if result.is_contiguous() else self._paid(result).contiguous()

    def _paid(self, tensor: Tensor) -> Tensor:
        self.budget -= tensor.nbytes
        if self.budget < 0:
            raise Unreadable("holds tensors that unfold to more than its size")
        return tensor
