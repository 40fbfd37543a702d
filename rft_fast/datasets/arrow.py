"""Reader of Hugging Face data sets, by pyarrow alone: folders of ``save_to_disk``, and the Hub's Parquet."""

from __future__ import annotations

import bisect
import io
import json
import pathlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rft_fast.common import files as on_disk
from rft_fast.common import meter
from rft_fast.common.words import many, some
from rft_fast.datasets import cache as caches

from . import arrow_files
from .source import MOST_ROWS, Source, numbered, open_file, open_image

LABELS = ("label", "labels", "fine_label")  # names of label columns; also decide between several ClassLabels
IN_MEMORY = 0.1  # share of the free memory; larger Arrow files are mapped
GROUPS_KEPT = 4  # Parquet row groups in memory, for threads that read different ones


def matches(path: pathlib.Path) -> bool:
    """Whether the path is a folder of ``save_to_disk``, a Parquet file, a folder of those, or one split."""
    if path.is_file():
        return path.suffix == ".parquet"
    return arrow_files.is_saved(path) or arrow_files.has_parquet(path)


def source(path: pathlib.Path, where: str) -> Source:
    """List the images of one split of a Hugging Face data set.

    The data set must have one Image column, and one ClassLabel column or one named ``label``, ``labels`` or
    ``fine_label``. Without a ClassLabel, integers under these names are rows of the head. Arrow files are
    read into memory, or mapped if they are large; of Parquet, a few row groups are kept in memory. Images
    that are not embedded are files below the data set's folder, named relative to the file that lists them.

    Args:
        path: the folder of a ``Dataset``; the folder of a ``DatasetDict``, followed by ``/<split>`` if it has
            several; a Parquet file; or a folder of ``<split>-00000-of-00001.parquet`` files (or with those in
            ``data/``), likewise.
        where: prefix of error messages.

    Raises:
        ValueError: a file is missing or damaged, the columns do not fit, a label is unknown (-1) or has no
            name, or an image is neither embedded nor a file. The message names the file.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{where}: reading {path} needs pyarrow; pip install 'rft-fast[huggingface]'"
        ) from error
    if path.suffix == ".parquet" or not arrow_files.is_saved(path):
        parts: list[_Part] = [_ParquetPart(file, where, path) for file in arrow_files.parquet(path, where)]
    else:
        saved = arrow_files.saved(path, where)
        held = sum(file.stat().st_size for file in saved) <= IN_MEMORY * meter.available("cpu")
        parts = [_ArrowPart(file, where, path, held) for file in saved]
    features = parts[0].features
    try:
        image, label = _columns(features, parts[0].schema, f"{where}: {parts[0].file}")
    except UnicodeError as error:
        raise ValueError(f"{where}: {parts[0].file} is damaged: column names are not text") from error
    files: list[caches.File] = []
    labels: list[Tensor] = []
    stored = on_disk.Inputs()
    for part in parts:
        stored.add(part.file)
        if not part.schema.equals(parts[0].schema):
            raise ValueError(f"{where}: the columns of {part.file} differ from those of {parts[0].file}")
        files += numbered(part.file, part.rows)
        labels.append(part.labels(label))
        part.check_images(image)
    numbers = torch.cat(labels)
    names = features.get(label, {}).get("names") or []
    if not len(numbers):
        raise ValueError(f"{where}: {path} has no images")
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or most >= (len(names) or MOST_ROWS):
        beyond = f", beyond {len(names)} names" if names else ", which cannot be rows of a head"
        hint = "; a test split without labels? use another split" if least < 0 else beyond
        raise ValueError(f"{where}: {path} has labels from {least} to {most} in {label!r}{hint}")
    pieces = _Pieces(part.rows for part in parts)

    def open_image(index: int) -> Image.Image:
        part, row = pieces.find(index)
        return parts[part].open(image, row)

    return Source(
        kind="arrow",
        path=path,
        files=files,
        labels=numbers,
        class_names=tuple(str(name) for name in names),
        open=open_image,
        notes=(f"columns {image!r} and {label!r} of {', '.join(parts[0].schema.names)}",),
        stored=stored,
    )


class _Pieces:
    """Consecutive pieces of a table, given their numbers of rows."""

    def __init__(self, counts: Iterable[int]) -> None:
        self._starts = [0, *accumulate(counts)]

    def find(self, row: int) -> tuple[int, int]:
        """Return the piece that contains a row, and the row's position in it."""
        piece = bisect.bisect_right(self._starts, row) - 1
        return piece, row - self._starts[piece]


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Raise ValueError, beginning with ``what``, if pyarrow cannot read a file in the block."""
    import pyarrow as pa

    try:
        yield
    except on_disk.Changed:
        raise
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{what}: {error}") from error


class _Part(ABC):
    """One file of a data set; common to Arrow and Parquet."""

    def __init__(
        self, file: pathlib.Path, where: str, data_set: pathlib.Path, schema: Any, rows: int
    ) -> None:
        """Images that are not embedded are files below ``data_set``, the path as the user gave it."""
        self.file = file
        self.folder = (data_set if data_set.is_dir() else file.parent).resolve()
        self.where = f"{where}: {file}"
        self.schema = schema
        self.rows = rows
        self.features = _features(schema, file, self.where)

    @abstractmethod
    def column(self, name: str) -> Any:
        """Return a whole column, a pyarrow.ChunkedArray."""

    @abstractmethod
    def chunk(self, name: str, row: int) -> tuple[Any, int]:
        """Return the piece of a column that contains a row, and the row's position in it."""

    def labels(self, name: str) -> Tensor:
        column = self.column(name)
        if column.null_count:
            raise ValueError(f"{self.where} has {many(column.null_count, 'image')} without a {name!r}")
        return torch.from_numpy(column.to_numpy().astype("int64"))

    def check_images(self, name: str) -> None:
        """Check that images that are not embedded exist as files."""
        column = self.column(name)
        if _is_struct(column.type):
            chunks = [chunk.field("bytes") for chunk in column.chunks]
        else:
            chunks = list(column.chunks)
        if not column.null_count and not any(chunk.null_count for chunk in chunks):
            return
        missing = []
        for row, entry in enumerate(entry for chunk in column.chunks for entry in chunk):
            if not entry.is_valid or (_is_struct(column.type) and not entry["bytes"].is_valid):
                path = entry.as_py()["path"] if entry.is_valid and _is_struct(column.type) else None
                try:
                    if not self.beside(path).is_file():
                        missing.append(f"row {row} ({path!r})")
                except (OSError, ValueError) as error:
                    missing.append(f"row {row} ({error})")
        if missing:
            raise ValueError(
                f"{self.where} has {len(missing)} images that are neither embedded nor files on this "
                f"machine: {some(missing)}; save the data set again with save_to_disk, on the machine "
                "that has the files"
            )

    def beside(self, path: str | None) -> pathlib.Path:
        """Return the file of an image that is not embedded.

        Raises:
            ValueError: there is no path, or it leads out of the data set's folder, as by links: the author
                of a data set does not choose which other files are read.
        """
        if not path:
            raise ValueError("no path")
        found = pathlib.Path(self.file.parent, path).resolve()
        if not found.is_relative_to(self.folder):
            raise ValueError(f"{path!r} is outside the folder of the data set, {self.folder}")
        return found

    def open(self, name: str, row: int) -> Image.Image:
        chunk, at = self.chunk(name, row)
        entry = chunk[at].as_py()
        data, path = (entry["bytes"], entry["path"]) if isinstance(entry, dict) else (entry, None)
        if data is not None:
            return open_image(io.BytesIO(data))
        return open_file(self.beside(path))


class _ArrowPart(_Part):
    """A file of the Arrow IPC stream format, in memory if ``held``, otherwise mapped."""

    def __init__(self, file: pathlib.Path, where: str, data_set: pathlib.Path, held: bool) -> None:
        import pyarrow as pa

        self._mapped = on_disk.Inputs()
        with _reading(f"{where}: {file} is truncated or not an Arrow stream"):
            with on_disk.opened(file) as stream:
                if held:
                    source = pa.BufferReader(pa.py_buffer(on_disk.Content(stream)[:]))
                else:
                    self._mapped.add(file)
                    source = pa.memory_map(str(file))
            with source:
                self.table = pa.ipc.open_stream(source).read_all()
        super().__init__(file, where, data_set, self.table.schema, self.table.num_rows)
        self._columns: dict[str, tuple[Any, _Pieces]] = {}

    def column(self, name: str) -> Any:
        if name not in self._columns:
            column = self.table.column(name)
            with _reading(f"{self.where} is damaged in {name!r}"):
                column.validate(full=True)  # invalid offsets would read outside the file
            self._columns[name] = (column, _Pieces(map(len, column.chunks)))
        return self._columns[name][0]

    def chunk(self, name: str, row: int) -> tuple[Any, int]:
        self._mapped.check()  # before use: if a mapped file is truncated, a signal kills the process
        column, pieces = self._columns[name]
        index, at = pieces.find(row)
        return column.chunk(index), at


class _ParquetPart(_Part):
    """A Parquet file, read by row groups, of which the last few stay in memory."""

    def __init__(self, file: pathlib.Path, where: str, data_set: pathlib.Path) -> None:
        from pyarrow import parquet

        if kind := on_disk.special(file):
            raise ValueError(f"{where}: {file} is {kind}, expected a file")
        with _reading(f"{where}: {file} is truncated or not Parquet"):
            self.parquet = parquet.ParquetFile(file)  # read, not mapped
            super().__init__(file, where, data_set, self.parquet.schema_arrow, self.parquet.metadata.num_rows)
        metadata = self.parquet.metadata
        self._pieces = _Pieces(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def column(self, name: str) -> Any:
        with _reading(f"{self.where} is damaged"):
            return self.parquet.read([name]).column(0)

    def check_images(self, name: str) -> None:
        # Finding missing images would take as long as decoding them all; open() reports them.
        return

    def chunk(self, name: str, row: int) -> tuple[Any, int]:
        group, at = self._pieces.find(row)
        with self._lock:
            if group not in self._groups:
                with _reading(f"{self.where} is damaged"):
                    column = self.parquet.read_row_group(group, [name]).column(0)
                self._groups[group] = column.combine_chunks()
                if len(self._groups) > GROUPS_KEPT:
                    self._groups.popitem(last=False)
            return self._groups[group], at


def _features(schema: Any, file: pathlib.Path, where: str) -> dict[str, Any]:
    """Hugging Face's column types, from the schema or else from ``dataset_info.json`` beside the file."""
    stored = (schema.metadata or {}).get(b"huggingface")
    beside = file.with_name("dataset_info.json")
    try:
        if stored is not None:
            features = json.loads(stored)["info"]["features"]
        elif beside.is_file():
            features = json.loads(on_disk.read_bytes(beside))["features"]
        else:
            return {}
        known = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
        if not all(isinstance(feature.get("names") or [], list) for feature in known.values()):
            raise ValueError("class names are not a list")
        return known
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: its features cannot be read: {type(error).__name__}: {error}") from error


def _is_struct(kind: Any) -> bool:
    """Whether a column is a struct {bytes, path}, as Image columns are."""
    from pyarrow import types

    return bool(types.is_struct(kind)) and {field.name for field in kind} >= {"bytes", "path"}


def _columns(features: dict[str, Any], schema: Any, where: str) -> tuple[str, str]:
    """Names of the image column and of the label column."""
    from pyarrow import types

    def of(kind: str) -> list[str]:
        return [name for name in schema.names if features.get(name, {}).get("_type") == kind]

    held = f"its columns are {some([f'{field.name} ({field.type})' for field in schema], 20)}"
    images = of("Image") or [name for name in schema.names if _is_struct(schema.field(name).type)]
    images = [name for name in images if _is_image(schema.field(name).type)]
    if len(images) != 1:
        raise ValueError(
            f"{where} has {len(images)} image columns, expected one; {held}; keep one with "
            "select_columns and save it again"
        )
    labels = of("ClassLabel") or [name for name in LABELS if name in schema.names]
    if len(labels) > 1:
        labels = [name for name in LABELS if name in labels][:1] or labels
    labels = [name for name in labels if types.is_integer(schema.field(name).type)]
    if len(labels) != 1:
        raise ValueError(
            f"{where} has {len(labels)} label columns, expected one ClassLabel, or one named "
            f"{', '.join(LABELS)}; {held}; see class_encode_column and select_columns of datasets"
        )
    return images[0], labels[0]


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    return _is_struct(kind) or bool(types.is_binary(kind) or types.is_large_binary(kind))
