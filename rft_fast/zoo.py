"""A zoo: one zero-shot model, models fine-tuned from it, and the data sets to score them on."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class DataSource:
    """Where a data set lies (:func:`rft_fast.datasets.load`), and whether it is OOD."""

    path: Path
    ood: bool = True


@dataclass(frozen=True)
class Zoo:
    """What a zoo file names, every path absolute and known to exist.

    arch: an open_clip model name, or the path of a JSON file (:func:`rft_fast.classifier.build`).
    finetuned: display name -> checkpoint, in the file's order. data: name -> source, likewise.
    options: how it is studied, as options of ``python -m rft_fast.sweep``; its command line overrides them.
    """

    name: str
    arch: str
    zeroshot: Path
    finetuned: dict[str, Path]
    data: dict[str, DataSource]
    options: tuple[str, ...] = ()


def read(path: str | PathLike[str]) -> Zoo:
    """Read a zoo file, in TOML; its paths are relative to the file itself::

        name = "soup"
        arch = "ViT-B-32-quickgelu"     # an open_clip model name, or a JSON file in its format
        zeroshot = "zeroshot.pt"
        [finetuned]
        "lr 1e-5" = "model_1.pt"
        [data]
        imagenet = { path = "imagenet/val", ood = false }
        sketch = { path = "sketch" }    # ood = true unless said otherwise
        [options]                       # may be left out: how it is studied, as sweep's options
        layer-draws = 5                 # --layer-draws 5
        layer-data = ["sketch"]         # --layer-data sketch
        no-control = true               # --no-control

    Raises ValueError, naming the file and the entry, for a file or a path in it that does not
    exist, invalid TOML, a missing or unknown entry (with the nearest known one), or a value of
    another type.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"zoo: there is no file {file}")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"zoo: {file} is not valid TOML: {error}") from error

    entries = _Entries(file)
    entries.known(table, "", ("name", "arch", "zeroshot", "finetuned", "data", "options"))
    arch = entries.get(table, "arch", str)
    finetuned = entries.get(table, "finetuned", dict)
    data = entries.get(table, "data", dict)
    for name, source in data.items():
        if not isinstance(source, dict):
            raise entries.error(f"data.{name}", f"must be a table with a path, got {source!r}")
        entries.known(source, f"data.{name}.", ("path", "ood"))
    options: list[str] = []
    for name, value in (entries.get(table, "options", dict) if "options" in table else {}).items():
        options += entries.option(name, value)
    return Zoo(
        name=entries.get(table, "name", str),
        # A name that is no file beside the zoo is open_clip's to know: classifier.build decides.
        arch=str(file.parent / arch) if (file.parent / arch).is_file() else arch,
        zeroshot=entries.path(table, "zeroshot"),
        finetuned={name: entries.path(finetuned, name, "finetuned.") for name in finetuned},
        data={
            name: DataSource(
                path=entries.path(source, "path", f"data.{name}."),
                ood=entries.get({"ood": True, **source}, "ood", bool, f"data.{name}."),
            )
            for name, source in data.items()
        },
        options=tuple(options),
    )


def digits() -> Zoo:
    """The zoo that ships with the package: a tiny CLIP on digits, and nine models fine-tuned."""
    return read(Path(__file__).parent / "digits" / "zoo.toml")


class _Entries:
    """Reads typed entries out of a file's tables, with errors that name both."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def error(self, key: str, what: str) -> ValueError:
        return ValueError(f"zoo: {self.file}: {key} {what}")

    def known(self, table: Iterable[str], prefix: str, names: tuple[str, ...]) -> None:
        for key in table:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
                raise self.error(f"{prefix}{key}", f"is not an entry of a zoo; {hint}")

    def get(self, table: Mapping[str, Any], key: str, kind: type, prefix: str = "") -> Any:
        if key not in table:
            raise self.error(f"{prefix}{key}", "is missing")
        value = table[key]
        if not isinstance(value, kind):
            raise self.error(f"{prefix}{key}", f"must be a {_TOML[kind]}, got {value!r}")
        if value in ("", {}):
            raise self.error(f"{prefix}{key}", "is empty")
        return value

    def option(self, name: str, value: Any) -> list[str]:
        """An entry of ``[options]`` as words of a command line."""
        if isinstance(value, bool):
            if not value:
                raise self.error(f"options.{name}", "can only be true; leave it out otherwise")
            return [f"--{name}"]
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (str, int, float)) for v in values):
            raise self.error(f"options.{name}", f"must be a string, number, true or a list, got {value!r}")
        return [f"--{name}", *map(str, values)]

    def path(self, table: Mapping[str, Any], key: str, prefix: str = "") -> Path:
        path: Path = self.file.parent / self.get(table, key, str, prefix)
        if not path.exists():
            raise self.error(f"{prefix}{key}", f"names {path}, which does not exist")
        return path


_TOML = {str: "string", dict: "table", bool: "boolean (true or false)"}
