"""Which rows of a classification head the classes of a data set are."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft_fast.words import some

from . import imagenet
from .source import MOST_ROWS, Source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LabelMap = Mapping[str, int | str | Sequence[int | str] | None]

_Answers = list[tuple[int, ...]]  # for each class the rows that are right; none: not scored


@dataclass(frozen=True)
class Rows:
    """The rows of a head. count: how many. names: of their classes, in order, where they are known."""

    count: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1 or len(self.names) not in (0, self.count):
            raise ValueError(
                "Rows: expected at least one row, and a name for each or none; got "
                f"{self.count} rows and {len(self.names)} names"
            )


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which images are scored, and as what.

    images: int64 [m], positions in the source's files. labels: int64 [m], rows of the head.
    classes: int64 [k], the distinct rows scored among, in order, None for all. groups: int64 [k], the row
    that each of ``classes`` counts as where several are right for one class, else None.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor | None
    groups: Tensor | None


def assign(source: Source, rows: Rows | None, label_map: LabelMap | Path | None = None) -> Assignment:
    """The rows of a head that the classes of a source are.

    rows: the head's. None: ImageNet's for ObjectNet, and where all classes are WordNet ids of ImageNet; else
        class i is row i, whatever the head.
    label_map: for each class of the source its row, as a number or by the name of the head's class; a list of
        those, of which each is right; or None, so that it is not scored. A mapping, or a file: ``.json`` and
        ``.toml`` hold one (TOML writes [] for None), ``.csv`` has the columns ``class,row`` and a line for
        each row that is right, or one with an empty row. It must name the source's classes, all and no
        others. None: classes named as the head's go to those rows; WordNet ids under a head of 1,000 rows to
        ImageNet's, and parts of them are scored among their rows alone; as many classes as rows go to the
        rows in order.

    Raises ValueError for anything else, listing what does not fit.
    """
    try:
        if rows is None and label_map is None and _are_imagenets(source.class_names):
            rows = Rows(imagenet.CLASSES)
        if label_map is not None:
            answers = _given(source, rows, label_map)
        elif source.imagenet is not None and (rows is None or rows.count != len(source.class_names)):
            answers = _objectnet(source, rows)
        elif rows is None or not source.class_names:
            return _as_told(source, rows)
        else:
            answers = _automatic(source.class_names, rows)
        return _assignment(source, answers, rows)
    except ValueError as error:
        raise ValueError(f"labels of {source.path}: {error}") from error


def are_settled(source: Source, rows: Rows) -> bool:
    """Whether labels, names or the kind of a source tell its rows, not their order alone."""
    names = source.class_names
    if not names or source.imagenet is not None or source.kind == "imagenet-v2":
        return True
    by_wnid = imagenet.are_wnids(names) and rows.count == imagenet.CLASSES
    return by_wnid or sorted(map(_plain, names)) == sorted(map(_plain, rows.names))


def _are_imagenets(names: Sequence[str]) -> bool:
    return bool(names) and {name.lower() for name in names} <= set(imagenet.synsets())


def read_map(file: Path) -> dict[str, Any]:
    """A label map from a file, as :func:`assign` describes. Raises ValueError for what is none."""
    try:
        if file.suffix == ".csv":
            return _read_csv(file)
        if file.suffix == ".toml":
            found: Any = tomllib.loads(file.read_text("utf-8"))
        elif file.suffix == ".json":
            found = json.loads(file.read_text("utf-8"), object_pairs_hook=_distinct)
        else:
            raise ValueError("expected a .json, .toml or .csv")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"label map {file}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"label map {file}: expected a table of classes, got {type(found).__name__}")
    return found


def _read_csv(file: Path) -> dict[str, Any]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        head, *lines = [line for line in csv.reader(stream) if line] or [[]]
    if head != ["class", "row"]:
        raise ValueError(f"the first line must be class,row, got {','.join(head)!r}")
    found: dict[str, list[int | str]] = {}
    for line in lines:
        if len(line) != 2:
            raise ValueError(f"expected two columns, got {','.join(line)!r}")
        name, row = line[0], line[1].strip()
        if name in found and not (found[name] and row):
            raise ValueError(f"class {name!r} is both scored and not, or twice not")
        found.setdefault(name, [])
        if row:
            found[name].append(int(row) if row.isdecimal() else row)
    return dict(found)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"classes {some(twice)} are named twice")
    return dict(pairs)


def _given(source: Source, rows: Rows | None, label_map: LabelMap | Path) -> _Answers:
    given = label_map if isinstance(label_map, Mapping) else read_map(Path(label_map))
    names = source.class_names or [str(label) for label in range(int(source.labels.max()) + 1)]
    if lost := [name for name in names if name not in given]:
        raise ValueError(f"the label map does not name {len(lost)} of {len(names)} classes: {some(lost)}")
    if strange := [str(name) for name in given if name not in set(names)]:
        raise ValueError(f"the label map names classes that the data set does not have: {some(strange)}")
    places = _places(rows.names if rows is not None else ())
    most = MOST_ROWS if rows is None else rows.count
    wrong = []
    answers: _Answers = []
    for name in names:
        answer: Any = given[name]
        listed = isinstance(answer, Sequence) and not isinstance(answer, str)
        parts = answer if listed else [] if answer is None else [answer]
        found = []
        for part in parts:
            if isinstance(part, str):
                found.append(_row_named(part, name, places))
            elif isinstance(part, bool) or not isinstance(part, int):
                raise ValueError(f"class {name!r}: expected a row or the name of one, got {part!r}")
            else:
                found.append(part)
        wrong += [f"{name} = {row}" for row in found if not 0 <= row < most]
        answers.append(tuple(found))
    if wrong:
        raise ValueError(f"rows beyond the head, which are 0 to {most - 1}: {some(wrong)}")
    return answers


def _row_named(part: str, name: str, places: Mapping[str, list[int]]) -> int:
    found = places.get(_plain(part), [])
    if len(found) == 1:
        return found[0]
    if not places:
        raise ValueError(
            f"class {name!r}: {part!r} is a name, but the head's are not known here; give the row"
        )
    state = f"are those of rows {some(found)}; give one's number" if found else "is no class of the head"
    raise ValueError(f"class {name!r}: {part!r} {state}")


def _objectnet(source: Source, rows: Rows | None) -> _Answers:
    known = source.imagenet or {}
    if rows is not None and rows.count != imagenet.CLASSES:
        raise ValueError(
            f"its mappings are to ImageNet's {imagenet.CLASSES} classes, the head has {rows.count}; "
            "give a label map"
        )
    return [known.get(name, ()) for name in source.class_names]


def _as_told(source: Source, rows: Rows | None) -> Assignment:
    """Labels as the source has them: rows of the head."""
    labels, classes = source.labels, source.classes
    if source.class_names:
        labels = torch.tensor(_in_order(source.class_names), dtype=torch.int64)[labels]
    highest = max((int(t.max()) for t in (labels, classes) if t is not None and len(t)), default=0)
    if rows is not None and highest >= rows.count:
        raise ValueError(f"it has label {highest}, the head has {rows.count} rows; give a label map")
    return Assignment(torch.arange(len(labels)), labels, classes, None)


def _automatic(names: Sequence[str], rows: Rows) -> _Answers:
    ours, theirs = [_plain(name) for name in names], [_plain(name) for name in rows.names]
    places = _places(rows.names)
    if sorted(ours) == sorted(theirs) and (ours == theirs or len(set(theirs)) == len(theirs)):
        return [(row,) for row in (range(len(ours)) if ours == theirs else (places[n][0] for n in ours))]
    if imagenet.are_wnids(names) and rows.count == imagenet.CLASSES:
        return _by_wnid(names)
    if len(names) != rows.count:
        raise ValueError(
            f"{len(names)} classes, but the head has {rows.count} rows; give a label map (class of the data "
            "set -> row of the head), or the head that belongs to this data set"
        )
    order = _in_order(names)
    # A name that comes twice, such as ImageNet's cardigan (a dog, and a jacket), tells nothing.
    alike = {name for name, count in Counter(ours).items() if count == 1 and len(places.get(name, ())) == 1}
    if moved := [names[i] for i, name in enumerate(ours) if name in alike and places[name] != [order[i]]]:
        raise ValueError(
            f"its classes are in another order than the head's, as {some(moved)} show, and not all are "
            f"named alike: {some([n for n in names if _plain(n) not in places])}; give a label map"
        )
    return [(row,) for row in order]


def _by_wnid(names: Sequence[str]) -> _Answers:
    row_of = {wnid: row for row, wnid in enumerate(imagenet.synsets())}
    found = [name.lower() for name in names]
    if unknown := [name for name in found if name not in row_of]:
        raise ValueError(
            f"{len(unknown)} of {len(names)} classes are not among ImageNet's 1,000: {some(unknown)}; give a "
            "label map in which they have rows, or none"
        )
    title, lost = imagenet.almost(found)
    if lost:
        raise ValueError(
            f"{len(lost)} of the classes of {title} are missing, so it would score too high: {some(lost)}; "
            "complete it, or give a label map if these are meant"
        )
    return [(row_of[name],) for name in found]


def _in_order(names: Sequence[str]) -> list[int]:
    """The row of each class by its place, or by its number if all are numbers without a gap."""
    if all(re.fullmatch(r"[0-9]+", name) for name in names):
        numbers = [int(name) for name in names]
        if sorted(numbers) == list(range(min(numbers), min(numbers) + len(names))):
            return [number - min(numbers) for number in numbers]
    return list(range(len(names)))


def _assignment(source: Source, answers: _Answers, rows: Rows | None) -> Assignment:
    owner: dict[int, frozenset[int]] = {}
    if twice := [answer for answer in answers if len(set(answer)) != len(answer)]:
        raise ValueError(f"a class has a row twice: {some(twice[0])}")
    for row, right in ((row, frozenset(answer)) for answer in answers for row in answer):
        if owner.setdefault(row, right) != right:
            raise ValueError(
                f"row {row} is right for classes that differ in their other rows, so neither is scored right"
            )
    used = sorted(owner)
    table = torch.tensor([min(answer) if answer else -1 for answer in answers], dtype=torch.int64)
    labels = table[source.labels]
    images = torch.nonzero(labels >= 0).flatten()
    if not len(images):
        raise ValueError("none of its images is scored")
    every = rows is not None and len(used) == rows.count
    grouped = any(len(answer) > 1 for answer in answers)
    return Assignment(
        images,
        labels[images],
        None if every and not grouped else torch.tensor(used),
        torch.tensor([min(owner[row]) for row in used]) if grouped else None,
    )


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    """Rows of the classes of each name: a head may have two of one name."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(_plain(name), []).append(row)
    return found


def _plain(name: str) -> str:
    """A name without its case, underscores and spaces."""
    return re.sub(r"[_\s]+", "", name).casefold()
