"""Files of torch.save, zip archives and the older format, and TorchScript archives."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, BinaryIO

from ..common.files import Content
from ..common.pickles import Global, Stream, Unreadable
from ..common.words import many
from . import activation, foreign
from .pickled_tensors import unpickle
from .stored import OURS, Container, Span, Storage, storage

MAGIC = 0x1950A86A20F9469CFC6C  # the first value in files of torch.save before version 1.6
_PROTOCOL = 1001
_MOST_CODE = 16 << 20  # bytes; the code of a CLIP has about 100 KiB
_MOST_METADATA = 16 << 20  # bytes; the provenance of a soup of 72 models has about 20 KiB
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.M
)
_QUOTED = re.compile(r'"([^"]*)"')


def read_archive(stream: BinaryIO, data: Content) -> Container:
    """Read a zip archive of torch.save or torch.jit.save.

    Args:
        stream: the file.
        data: its bytes.

    Raises:
        Unreadable: it is damaged, hostile, or not such an archive.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises many kinds of errors
        raise Unreadable(
            f"is a damaged or truncated zip file: {error}. If it was downloaded, download it again"
        ) from error
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) < len(entries):
        raise Unreadable("is a zip file with several entries of the same name")
    tops = [name.removesuffix("data.pkl") for name in by_name if name.rpartition("/")[2] == "data.pkl"]
    if len(tops) != 1:
        if tops:
            raise Unreadable(f"is a zip file, but not of torch.save: it holds {len(tops)} checkpoints")
        raise Unreadable(f"{foreign.of_zip(list(by_name))}. Supported: {foreign.SUPPORTED}")
    parts = _Parts(tops[0], by_name, data)
    if (order := parts.place("byteorder")) is not None and bytes(order.read()) != b"little":
        raise Unreadable("was written on a big-endian machine, which is not supported")
    script = f"{parts.top}constants.pkl" in by_name
    value = unpickle(Stream(parts["data.pkl"].read()), parts.storage, None if script else nested_storage)
    if not script:
        return Container("torch", value, len(data), metadata=_metadata(parts))
    own, activations = _of_code(stream, f"{parts.top}code/")
    constants = (parts.place(name) for name in parts.inside("constants/"))
    if any(map(_is_quick, constants)):
        activations.add(True)
    return Container("torchscript", value, len(data), own, activations=frozenset(activations))


def _metadata(parts: _Parts) -> dict[str, str]:
    """Read the entries of text that rft_fast.merge adds; they are never unpickled."""
    found = {}
    for name in OURS:
        if (place := parts.place(name)) is None:
            continue
        if len(place) > _MOST_METADATA:
            raise Unreadable(
                f"has an entry {name!r} of {len(place):,} bytes, expected at most {_MOST_METADATA:,}"
            )
        found[name] = bytes(place.read()).decode("utf-8", "replace")
    return found


def _is_quick(constant: Span | None) -> bool:
    """Return whether a constant is the 1.702 of QuickGELU."""
    data = b"" if constant is None or len(constant) > 8 else bytes(constant.read())
    if len(data) not in (4, 8):
        return False
    (value,) = struct.unpack("<f" if len(data) == 4 else "<d", data)
    return bool(abs(value - 1.702) < 1e-6)


def _of_code(stream: BinaryIO, top: str) -> tuple[dict[str, frozenset[str]], set[bool]]:
    """Find the parameters and buffers of each class in an archive's code, and the activations in it.

    In the pickle, other tensors such as an attention mask are stored beside them. The code is only searched
    as text.
    """
    classes: dict[str, frozenset[str]] = {}
    activations: set[bool] = set()
    budget = _MOST_CODE
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if not entry.filename.startswith(top) or not entry.filename.endswith(".py"):
                    continue
                with archive.open(entry) as packed:  # compressed: a limited amount is decompressed
                    text = packed.read(budget + 1)
                budget -= len(text)
                if budget < 0:
                    raise Unreadable(f"has more than {_MOST_CODE >> 20} MiB of code, which no model needs")
                module = entry.filename[len(top) : -len(".py")].replace("/", ".")
                code = text.decode("utf-8", "replace")
                activations |= activation.of_code(code)
                for name, *lists in _CLASS.findall(code):
                    classes[f"{module}.{name}"] = frozenset(_QUOTED.findall(" ".join(lists)))
    except Unreadable:
        raise
    except Exception as error:  # as in read_archive
        raise Unreadable(f"is a damaged or truncated zip file: {error}") from error
    return classes, activations


class _Parts:
    """The entries of a torch archive, located in the file; none is decompressed."""

    def __init__(self, top: str, entries: Mapping[str, zipfile.ZipInfo], data: Content) -> None:
        self.top = top
        self.entries = entries
        self.data = data
        self.storages: dict[str, Storage] = {}
        spans = sorted((*self.span(entry), entry.filename) for entry in entries.values())
        for (_, stop, name), (start, _, other) in pairwise(spans):
            if start < stop:
                raise Unreadable(f"is a zip file in which the entries {name!r} and {other!r} overlap")

    def span(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Return the first byte of an entry in the file, and its end."""
        header = self.data[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or bytes(header[:4]) != b"PK\x03\x04":
            raise Unreadable(
                f"is a damaged zip file: the entry {entry.filename!r} is not where the directory says"
            )
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.compress_size > len(self.data):
            raise Unreadable(f"is a truncated zip file: the entry {entry.filename!r} extends beyond the end")
        return start, start + entry.compress_size

    def inside(self, folder: str) -> list[str]:
        """List the entries in a folder, as :meth:`place` takes them."""
        start = self.top + folder
        return [name.removeprefix(self.top) for name in self.entries if name.startswith(start)]

    def place(self, name: str) -> Span | None:
        """Locate an entry; None if it is missing."""
        entry = self.entries.get(self.top + name)
        if entry is None:
            return None
        # torch does not compress; compressed entries could expand to any size.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Unreadable(
                f"has compressed entries ({entry.filename!r}), which torch.save never writes; save it "
                "again with torch.save"
            )
        if entry.flag_bits & 1:
            raise Unreadable(f"has encrypted entries ({entry.filename!r})")
        return Span(self.data, *self.span(entry))

    def __getitem__(self, name: str) -> Span:
        part = self.place(name)
        if part is None:
            raise Unreadable(
                f"is a damaged zip file without the entry {self.top + name!r}; nothing was executed"
            )
        return part

    def storage(self, identity: Any) -> Storage:
        """Make the storage of a persistent id: ('storage', type, entry, device, elements)."""
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise Unreadable("refers to data in an unsupported way; nothing was executed")
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
                f"claims {claimed.nbytes} bytes for a storage of {len(known.data or b'')} bytes: it "
                "is damaged; nothing was executed"
            )
        return known


def _same_claim(known: Storage, claimed: Storage, key: str) -> None:
    if (known.dtype, known.nbytes) != (claimed.dtype, claimed.nbytes):
        raise Unreadable(f"claims two sizes or dtypes of storage {key[:40]!r}; nothing was executed")


# --- files of torch.save before they were zip files, and storages within a pickle --------------------


def nested_storage(data: memoryview) -> Storage:
    """Read the storage in the argument of ``torch.storage._load_from_bytes``, a file in the older format.

    Args:
        data: of the nested file.

    Raises:
        Unreadable: it is not such a file, or holds something else.
    """
    stream = Stream(data)
    if unpickle(stream) != MAGIC:
        raise Unreadable("holds tensors that are not in torch's own format; nothing was executed")
    value = read_legacy(stream, nested=None)
    if not isinstance(value, Storage):
        raise Unreadable(
            "holds something other than numbers in place of a tensor's data; nothing was executed"
        )
    return value


def read_legacy(stream: Stream, nested: Any) -> Any:
    """Read the older format after its magic number: protocol, machine, object, keys of storages, their bytes.

    Args:
        stream: the file, behind the magic number.
        nested: as for :func:`rft_fast.checkpoints.pickled_tensors.unpickle`.

    Returns:
        The object.

    Raises:
        Unreadable: it is damaged, hostile, or of a big-endian machine.
    """
    if unpickle(stream) != _PROTOCOL:
        raise Unreadable(f"is a file of torch.save in an unknown protocol (expected {_PROTOCOL})")
    machine = unpickle(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Unreadable("was written on a big-endian machine, which is not supported")
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []
    value = unpickle(stream, partial(_old_storage, roots, views), nested)
    keys = unpickle(stream)
    if not isinstance(keys, list) or len(keys) != len(roots) or any(key not in roots for key in keys):
        raise Unreadable("is damaged: it does not list the storages of its tensors; nothing was executed")
    for key in keys:
        root = roots[key]
        itemsize = 1 if root.dtype is None else root.dtype.itemsize
        start = stream.position + 8
        # The number of elements comes first; of bytes, for an untyped storage.
        count = int.from_bytes(stream.data[stream.position : start], "little")
        if root.data is not None or start > len(stream.data) or count * itemsize != root.nbytes:
            raise Unreadable("is damaged: a storage is smaller than its tensors claim; nothing was executed")
        if start + root.nbytes > len(stream.data):
            count = start + root.nbytes - len(stream.data)
            are = many(count, "byte of its tensors is", "bytes of its tensors are")
            raise Unreadable(f"is truncated: {are} missing")
        root.data = stream.data[start : start + root.nbytes]
        stream.position = start + root.nbytes
    for view, root, offset in views:
        if not isinstance(root.data, memoryview) or offset + view.nbytes > len(root.data):
            raise Unreadable(
                "is damaged: a storage extends beyond the one that contains it; nothing was executed"
            )
        view.data = root.data[offset : offset + view.nbytes]
    return value


def _old_storage(roots: dict[str, Storage], views: list[tuple[Storage, Storage, int]], identity: Any) -> Any:
    """Make the value of a persistent id.

    ('module', class, file, source) or ('storage', type, key, device, elements, view or None).
    """
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
    raise Unreadable("refers to data in an unsupported way; nothing was executed")
