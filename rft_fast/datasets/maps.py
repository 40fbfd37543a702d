"""Label maps: for each class of a data set the rows of a head that are right, as written by users."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rft_fast.common import files
from rft_fast.common.words import some

from .naming import fold, places

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LabelMap = Mapping[str, int | str | Sequence[int | str] | None]
Answers = list[tuple[int, ...]]  # for each class the rows that are right; empty: not scored


def read_map(file: pathlib.Path) -> dict[str, Any]:
    """Read a label map from a file; :func:`rft_fast.datasets.assign` describes its forms.

    Raises:
        ValueError: the file cannot be read, or is not a label map.
    """
    try:
        if file.suffix == ".csv":
            return _read_csv(file)
        if file.suffix == ".toml":
            found: Any = tomllib.loads(files.read_text(file, "utf-8-sig"))
        elif file.suffix == ".json":
            found = json.loads(files.read_text(file, "utf-8-sig"), object_pairs_hook=_distinct)
        else:
            raise ValueError('expected a .json, .toml or .csv, or the word "order"')
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"label map {file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"label map {file}: expected an object or table of classes, got {type(found).__name__}"
        )
    return found


UNKNOWN = "?"  # a row to be filled in; no head has a class of that name


def write_csv(file: pathlib.Path, label_map: Mapping[str, Sequence[int | str]]) -> None:
    """Write a label map in the form that :func:`read_map` reads.

    Raises:
        FileExistsError: the file exists.
    """
    with file.open("x", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("class", "row"))
        writer.writerows((name, row) for name, rows in label_map.items() for row in rows or [""])


def _read_csv(file: pathlib.Path) -> dict[str, Any]:
    text = files.read_bytes(file).decode("utf-8-sig")
    head, *lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line] or [[]]
    if head != ["class", "row"]:
        raise ValueError(f"the first line must be class,row, got {','.join(head)!r}")
    found: dict[str, list[int | str]] = {}
    for line in lines:
        if len(line) != 2:
            raise ValueError(f"expected two columns, got {','.join(line)!r}")
        name, row = line[0], line[1].strip()
        if name in found and not (found[name] and row):
            raise ValueError(f"class {name!r} has a row and an empty row, or two empty rows")
        found.setdefault(name, [])
        if row:
            found[name].append(_Written(row) if row.isdecimal() else row)
    return dict(found)


class _Written(int):
    """A number in a CSV cell, which may be a row or a name."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"classes {some(twice)} occur twice")
    return dict(pairs)


def of_classes(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Match class names with the entries of a label map: by the exact name, else by its folded form.

    Raises:
        ValueError: a class without an entry, an entry without a class, or one that fits several.
    """
    entries = {name: given[name] for name in names if name in given}
    keys = [key for key in given if key not in entries]
    rest = [name for name in names if name not in entries]
    by_fold, wanted = places(keys), places(rest)
    unclear = [keys[of[0]] for key, of in by_fold.items() if key in wanted and len(of) + len(wanted[key]) > 2]
    if unclear:
        raise ValueError(
            f"the label map's {some(unclear)} are ambiguous or duplicate, because case, spaces "
            "and Unicode forms are ignored; spell them exactly as in the data set"
        )
    entries |= {name: given[keys[by_fold[fold(name)][0]]] for name in rest if fold(name) in by_fold}
    if missing := [name for name in names if name not in entries]:
        raise ValueError(f"the label map lacks {len(missing)} of {len(names)} classes: {some(missing)}")
    if unknown := [key for key in keys if fold(key) not in wanted]:
        raise ValueError(f"the label map names classes that the data set does not have: {some(unknown)}")
    return entries


def covers(names: Iterable[str], given: Mapping[str, Any]) -> bool:
    """Whether a label map has exactly these classes."""
    try:
        of_classes(list(names), given)
    except ValueError:
        return False
    return True


def answers(names: Sequence[str], head: Sequence[str], most: int, given: Mapping[str, Any]) -> Answers:
    """Look up the rows of each class in a label map.

    Args:
        names: class names of the data set.
        head: names of the head's rows; empty if unknown.
        most: number of rows.
        given: the label map.

    Raises:
        ValueError: an entry is not a row of the head; or as :func:`of_classes`.
    """
    entries = of_classes(names, given)
    rows_of = places(head)
    wrong = []
    found: Answers = []
    for name in names:
        answer: Any = entries[name]
        listed = isinstance(answer, Sequence) and not isinstance(answer, str)
        parts = answer if listed else [] if answer is None else [answer]
        rows = []
        for part in parts:
            if isinstance(part, str):
                rows.append(_row_named(part, name, rows_of))
            elif isinstance(part, _Written) and rows_of.get(fold(str(part)), [part]) != [part]:
                raise ValueError(
                    f"class {name!r}: {part} may be a row, or the name of "
                    f"{some(rows_of[fold(str(part))])}; use a .json map, where names are in quotes and "
                    "rows are not"
                )
            elif isinstance(part, bool) or not isinstance(part, int):
                raise ValueError(f"class {name!r}: expected a row or its name, got {part!r}")
            else:
                rows.append(part)
        wrong += [f"{name} = {row}" for row in rows if not 0 <= row < most]
        found.append(tuple(rows))
    if wrong:
        raise ValueError(f"rows must be in the head, 0 to {most - 1}: {some(wrong)}")
    return found


def _row_named(part: str, name: str, rows_of: Mapping[str, list[int]]) -> int:
    found = rows_of.get(fold(part), [])
    if len(found) == 1:
        return found[0]
    if not rows_of:
        raise ValueError(
            f"class {name!r}: {part!r} is a name, but the names of the head are unknown; give the "
            "number of the row"
        )
    state = (
        f"is the name of several rows, {some(found)}; give the number of one"
        if found
        else "is not a class of the head"
    )
    raise ValueError(f"class {name!r}: {part!r} {state}")
