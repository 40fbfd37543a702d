"""A zoo: one zero-shot model, models fine-tuned from it, and the data sets to score them on."""

from __future__ import annotations

import difflib
import math
import pathlib
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeVar

from .. import checkpoints
from ..common import disk, files, program
from ..common.words import flat
from ..names import (
    CLASS_LISTS,
    FORMATS,
    HEADS,
    KINDS,
    ORDER,
    TEMPLATE_LISTS,
    TOWERS,
    Format,
    HeadChoice,
    Kind,
    Towers,
)
from . import settings

_Name = TypeVar("_Name", bound=str)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Weights:
    """A checkpoint: a file, or, for the zero-shot end, the name of published weights.

    Attributes:
        source: an absolute path, a pretrained tag of open_clip, or ``hf-hub:org/name``
            (:func:`rft_fast.checkpoints.fetch`).
        format: one of ``checkpoints.FORMATS``; None: detected.
        unrelated: whether a fine-tuned end may come from another training than the zero-shot end.
        key: which weights, where the file has several (:func:`rft_fast.checkpoints.read`).
    """

    source: str
    format: Format | None = None
    unrelated: bool = False
    key: str | None = None


@dataclass(frozen=True)
class DataSource:
    """Where a data set is, and how it is read (:func:`rft_fast.datasets.load`).

    Attributes:
        path: of its folder or file.
        ood: whether it is out of distribution for the fine-tuned models.
        kind: one of ``datasets.KINDS``; None: detected.
        labels: the rows of the head that its classes are: a file, a table class -> row, or ``"order"``
            (class i is row i); None: by their names.
    """

    path: pathlib.Path
    ood: bool = True
    kind: Kind | None = None
    labels: pathlib.Path | Mapping[str, Any] | str | None = None


@dataclass(frozen=True)
class Head:
    """The head of the models (:class:`rft_fast.clip.endpoints.Setup`).

    Attributes:
        towers: ``image`` or ``both``.
        choice: ``interpolate``, or the end whose head is kept.
        class_names: as of :func:`rft_fast.clip.prompts.class_names`; None: the checkpoints have heads.
        templates: as of :func:`rft_fast.clip.prompts.templates`.
        scale: factor of a head made from prompts; None: the model's own.
        given: a file with the zero-shot head.
    """

    towers: Towers = "image"
    choice: HeadChoice = "interpolate"
    class_names: str | None = None
    templates: str = "openai"
    scale: float | None = None
    given: pathlib.Path | None = None


@dataclass(frozen=True)
class Zoo:
    """The content of a zoo file. Every path is absolute and exists.

    Attributes:
        name: of the zoo.
        arch: an open_clip model name, the path of a JSON file or ``hf-hub:org/name``
            (:func:`rft_fast.clip.architectures.config`).
        zeroshot: the zero-shot end.
        finetuned: name in tables and figures -> checkpoint, in the order of the file.
        data: name -> data set, likewise.
        head: of all models.
        options: option of ``python -m rft_fast.sweep`` -> value; the command line overrides them.
        resize_positions: as in :class:`rft_fast.clip.endpoints.Setup`.
    """

    name: str
    arch: str
    zeroshot: Weights
    finetuned: dict[str, Weights]
    data: dict[str, DataSource]
    head: Head = Head()
    options: Mapping[str, Any] = field(default_factory=dict)
    resize_positions: bool = False

    @property
    def own_heads(self) -> bool:
        """Whether each model has a zero-shot end of its own, for it keeps its own head."""
        return self.head.choice == "finetuned"

    def outside(self, out: pathlib.Path) -> pathlib.Path:
        """Return the directory of a run. Raises ValueError if it lies inside a data set."""
        disk.check_outside(out, {name: source.path for name, source in self.data.items()}, "argument --out")
        return out


def read(path: str | PathLike[str]) -> Zoo:
    """Read a zoo: a TOML file, or a folder with a ``zoo.toml``. Its paths are relative to the file itself::

        name = "soup"
        arch = "ViT-B-32-quickgelu"     # an open_clip model name, or a JSON file in its format
        zeroshot = "zeroshot.pt"        # or { path =, format =, key = }, "openai", "hf-hub:org/name"
        resize-positions = true         # may be left out: --resize-positions
        head = "interpolate"            # this and the next six may be left out: --head
        towers = "image"                # --towers
        class-names = "imagenet"        # --class-names: a built-in list, or a file
        templates = "openai"            # --templates, likewise
        head-scale = 100                # --head-scale
        zeroshot-head = "head.pt"       # --zeroshot-head
        [finetuned]
        "lr 1e-5" = "model_1.pt"
        "lr 3e-5" = { path = "model_2.pt", format = "wiseft" }
        "average" = { path = "last.pth.tar", key = "state_dict_ema" }  # a file with several: --key
        "other" = { path = "model_3.pt", unrelated = true }  # not fine-tuned from zeroshot: --unrelated
        [data]
        imagenet = { path = "imagenet/val", ood = false }
        sketch = { path = "sketch" }    # ood = true unless said otherwise
        stl10 = { path = "stl10_binary", kind = "cifar", labels = "stl10.json" }
        pets = { path = "pets", labels = "order" }      # class i is row i of the head
        [options]                       # may be left out: how it is studied, as sweep's options
        layer-draws = 5                 # --layer-draws 5
        layer-data = ["sketch"]         # --layer-data sketch
        no-control = true               # --no-control

    Paths may also be absolute, or lead out of the folder: what is there is read, and nothing is written.
    Options are those of :func:`rft_fast.config.settings.builder` that a zoo may have.

    Raises ValueError, naming the file and the entry, for a file or a path in it that does not
    exist, invalid TOML, a missing or unknown entry (with the nearest known one), or a value of
    another type.
    """
    file = pathlib.Path(path).resolve()
    if file.is_dir():
        file /= "zoo.toml"
        if not file.is_file():
            raise ValueError(
                f"zoo: {file.parent} has no zoo.toml, which names models and data; rft_fast.finetune "
                "writes one, or write one as docs/zoo.md describes"
            )
    if not file.is_file():
        raise ValueError(f"zoo: the file {file} does not exist")
    try:
        table = tomllib.loads(files.read_text(file, "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"zoo: {file} is not valid TOML: {error}") from error

    entries = _Entries(file)
    for names, value in flat(table):
        texts = [*names, *(value if isinstance(value, list) else [value])]
        if any(isinstance(text, str) and program.nul(text) for text in texts):
            raise entries.error(repr(".".join(names))[1:-1], f"contains a NUL byte, got {value!r}")
    entries.known(table, "", ("name", "arch", "zeroshot", *_HEAD, _RESIZE, "finetuned", "data", "options"))
    arch = entries.get(table, "arch", str)
    finetuned = entries.get(table, "finetuned", dict)
    data = entries.get(table, "data", dict)
    for name, source in data.items():
        if not isinstance(source, dict):
            raise entries.error(f"data.{name}", f"must be a table with a path, got {source!r}")
        entries.known(source, f"data.{name}.", ("path", "ood", "kind", "labels"))
    options = entries.get(table, "options", dict) if table.get("options", {}) != {} else {}
    return Zoo(
        name=entries.get(table, "name", str),
        # A name that is no file beside the zoo is open_clip's to know: architectures.config decides.
        arch=entries.file_or_name("arch", arch),
        zeroshot=entries.weights(table, "zeroshot", published=arch),
        finetuned={name: entries.weights(finetuned, name, "finetuned.") for name in finetuned},
        data={name: entries.data(source, f"data.{name}.") for name, source in data.items()},
        head=entries.head(table),
        options=settings.builder().of_table(options, entries.error, "options."),
        resize_positions=entries.get({_RESIZE: False, **table}, _RESIZE, bool),
    )


def digits() -> Zoo:
    """The zoo that ships with the package: a tiny CLIP on digits, and nine models fine-tuned."""
    return read(pathlib.Path(__file__).parents[1] / "digits" / "zoo.toml")


class _Entries:
    """Reads typed entries out of a file's tables, with errors that name both."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def error(self, key: str, what: str) -> ValueError:
        return ValueError(f"zoo: {self.file}: {key} {what}")

    def known(self, table: Iterable[str], prefix: str, names: tuple[str, ...]) -> None:
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
                raise self.error(f"{prefix}{key}", f"is not an entry of a zoo; {hint}")

    def get(self, table: Mapping[str, Any], key: str, kind: Any, prefix: str = "") -> Any:
        if key not in table:
            raise self.error(f"{prefix}{key}", "is missing")
        value = table[key]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.error(f"{prefix}{key}", f"must be a {_TOML[kind]}, got {value!r}")
        if value in ("", {}):
            raise self.error(f"{prefix}{key}", "is empty")
        return value

    def path(self, table: Mapping[str, Any], key: str, prefix: str = "") -> pathlib.Path:
        path: pathlib.Path = self.file.parent / self.get(table, key, str, prefix)
        if not path.exists():
            raise self.error(f"{prefix}{key}", f"names {path}, which does not exist")
        return path

    def weights(
        self, table: Mapping[str, Any], key: str, prefix: str = "", published: str | None = None
    ) -> Weights:
        """published: the architecture of which published weights may be named instead of a file."""
        entry = table.get(key)
        if isinstance(entry, dict):
            prefix, table, key = f"{prefix}{key}.", entry, "path"
            self.known(
                entry, prefix, ("path", "format", "key", *(["unrelated"] if published is None else []))
            )
        unrelated = key == "path" and self.get({"unrelated": False, **table}, "unrelated", bool, prefix)
        format = self.one_of(table, "format", FORMATS, prefix) if key == "path" else None
        which = self.get(table, "key", str, prefix) if key == "path" and "key" in table else None
        source = self.get(table, key, str, prefix)
        if published is None or (self.file.parent / source).exists():
            file = self.path(table, key, prefix)
            try:
                checkpoints.located(file)
            except ValueError as error:
                raise self.error(f"{prefix}{key}", f"names no readable checkpoint: {error}") from None
            return Weights(str(file), format, unrelated, which)
        try:
            if pathlib.Path(source).exists():  # in the working directory, which a zoo does not depend on
                raise ValueError(f"{source} is relative to the working directory")
            checkpoints.check_source(source, published)
        except ValueError as error:
            raise self.error(f"{prefix}{key}", f"names no file beside it: {error}") from None
        return Weights(source, format, key=which)

    def data(self, source: Mapping[str, Any], prefix: str) -> DataSource:
        labels: pathlib.Path | Mapping[str, Any] | str | None = None
        if isinstance(source.get("labels"), dict) or source.get("labels") == ORDER:
            labels = source["labels"]
        elif "labels" in source:
            labels = self.path(source, "labels", prefix)
        return DataSource(
            path=self.path(source, "path", prefix),
            ood=self.get({"ood": True, **source}, "ood", bool, prefix),
            kind=self.one_of(source, "kind", KINDS, prefix),
            labels=labels,
        )

    def head(self, table: Mapping[str, Any]) -> Head:
        usual = Head()
        scale = self.get(table, "head-scale", (int, float)) if "head-scale" in table else None
        if scale is not None and not 0 < scale < math.inf:
            raise self.error("head-scale", f"must be a positive number, got {scale!r}")
        return Head(
            towers=self.one_of(table, "towers", TOWERS) or usual.towers,
            choice=self.one_of(table, "head", HEADS) or usual.choice,
            class_names=self.list_or_file(table, "class-names", CLASS_LISTS),
            templates=self.list_or_file(table, "templates", TEMPLATE_LISTS) or usual.templates,
            scale=None if scale is None else float(scale),
            given=self.path(table, "zeroshot-head") if "zeroshot-head" in table else None,
        )

    def one_of(
        self, table: Mapping[str, Any], key: str, known: Iterable[_Name], prefix: str = ""
    ) -> _Name | None:
        if key not in table:
            return None
        value: str = self.get(table, key, str, prefix)
        names = {str(name): name for name in known}
        if value not in names:
            raise self.error(f"{prefix}{key}", f"must be one of {', '.join(names)}; got {value!r}")
        return names[value]

    def list_or_file(self, table: Mapping[str, Any], key: str, built_in: Collection[str]) -> str | None:
        """A file beside the zoo, or else the name of a built-in list."""
        if key not in table:
            return None
        return self.file_or_name(key, self.get(table, key, str), built_in)

    def file_or_name(self, key: str, value: str, built_in: Collection[str] = ()) -> str:
        """A file beside the zoo, or else a name, which others know; never a file that lies elsewhere."""
        if (beside := self.file.parent / value).is_file():
            return str(beside)
        if (
            value not in built_in and pathlib.Path(value).is_file()
        ):  # in the working directory, which a zoo does not depend on
            raise self.error(
                key, f"names no file beside it: {value} is relative to the working directory; move it there"
            )
        return value


_RESIZE = "resize-positions"
_HEAD = ("head", "towers", "class-names", "templates", "head-scale", "zeroshot-head")
_TOML = {str: "string", dict: "table", bool: "boolean (true or false)", (int, float): "number"}
