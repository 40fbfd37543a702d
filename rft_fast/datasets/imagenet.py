"""Classes of ImageNet and its relatives, and their published numbers of images."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TypeVar

from rft_fast.clip import prompts
from rft_fast.common import files

from .naming import fold, loose

_Value = TypeVar("_Value")

WNID = re.compile(r"n\d{8}", re.IGNORECASE)
CLASSES = 1000
OBJECTNET_IMAGES, OBJECTNET_SCORED, OBJECTNET_FOLDERS = 50_273, 18_574, 313

# The files that ship with ObjectNet, in its folder ``mappings``.
FOLDER_NAMES = "folder_to_objectnet_label.json"
TO_IMAGENET = "objectnet_to_imagenet_1k.json"
ROW_TO_LINE = "pytorch_to_imagenet_2012_id.json"
LINES = "imagenet_to_label_2012_v2"


@cache
def synsets(variant: str = "") -> tuple[str, ...]:
    """WordNet ids of ImageNet-1k in the order of its heads; variant "a" or "r": the 200 of that set."""
    name = f"imagenet_{variant}_synsets.txt" if variant else "imagenet_synsets.txt"
    return tuple(_info(name).split())


def _info(name: str) -> str:
    return (resources.files("timm") / "data" / "_info" / name).read_text("utf-8")


def are_wnids(names: Iterable[str]) -> bool:
    """Whether all names are WordNet ids, and there is at least one."""
    names = list(names)
    return bool(names) and all(WNID.fullmatch(name) for name in names)


def is_imagenets(wnid: str) -> bool:
    """Whether a WordNet id is one of ImageNet-1k's."""
    return fold(wnid) in set(synsets())


def candidates(names: Sequence[str]) -> list[set[int]]:
    """Find the ImageNet-1k classes (by their usual rows) that each class name may mean.

    Vocabularies are WordNet ids, the names of OpenAI and open_clip, and WordNet's synonyms: the first one,
    all of them joined, and in large data sets each one. Separators between words do not matter. An id or a
    row before a name (``n01440764_tench``) must agree with it. If a large data set is written in one
    vocabulary, that vocabulary resolves names of several classes, such as ``cardigan``, a jacket and a dog.
    """
    vocabularies = _vocabularies()
    if len(names) < _LARGE:
        vocabularies = vocabularies[:-1]
    found = [_any_of(name, vocabularies) for name in names]
    if len(names) < _LARGE or not any(len(rows) > 1 for rows in found):
        return found
    readings = [[known.get(loose(name), frozenset()) for name in names] for known in vocabularies[1:]]
    known = [sum(map(bool, rows)) for rows in readings]
    best = [rows for rows, count in zip(readings, known, strict=True) if count == max(known)]
    if max(known) < _WRITTEN * len(names) or any(rows != best[0] for rows in best):
        return found
    return [set(rows) if rows and len(of) > 1 else of for rows, of in zip(best[0], found, strict=True)]


_WRITTEN = 0.95  # share of names in a vocabulary that shows that a data set is written in it
_LARGE = 100  # classes; as many in one vocabulary are no coincidence


def _any_of(name: str, vocabularies: Sequence[Mapping[str, frozenset[int]]]) -> set[int]:
    def meant(text: str) -> set[int]:
        key = loose(text)
        return {row for known in vocabularies for row in known.get(key, ())}

    if rows := meant(name):
        return rows
    numbered = _NUMBERED.fullmatch(name.strip())
    if numbered is None:  # such as "crane 2", one of several with that name
        rows = meant(loose(name).rstrip("0123456789"))
        return rows if len(rows) > 1 else set()
    wnid, row, rest = numbered.group("wnid", "row", "name")
    return meant(rest) & (meant(wnid) if wnid else {int(row)})


_NUMBERED = re.compile(r"(?:(?P<wnid>[nN]\d{8})|(?P<row>[0-9]{1,4}))[\W_]+(?P<name>.+)", re.DOTALL)


@cache
def _vocabularies() -> tuple[Mapping[str, frozenset[int]], ...]:
    """Name -> rows, for WordNet ids, open_clip's names, all synonyms joined, the first one, and each."""
    lemmas = dict(line.split("\t", 1) for line in _info("imagenet_synset_to_lemma.txt").splitlines())
    synonyms = [lemmas[wnid].split(",") for wnid in synsets()]
    tables: tuple[Sequence[Sequence[str]], ...] = (
        [[wnid] for wnid in synsets()],
        [[name] for name in prompts.CLASS_NAMES["imagenet"]],
        [[",".join(names)] for names in synonyms],
        [names[:1] for names in synonyms],
        synonyms,
    )
    found = []
    for table in tables:
        rows: dict[str, set[int]] = {}
        for row, names in enumerate(table):
            for name in names:
                rows.setdefault(loose(name), set()).add(row)
        found.append({name: frozenset(of) for name, of in rows.items()})
    return tuple(found)


def title(names: Iterable[str]) -> str:
    """The published data set with exactly these WordNet ids; empty if there is none."""
    found = {name.lower() for name in names}
    lists = {"ImageNet-A": synsets("a"), "ImageNet-R": synsets("r"), "ImageNet-1k": synsets()}
    return next((name for name, ids in lists.items() if found == set(ids)), "")


def almost(names: Iterable[str]) -> tuple[str, list[str]]:
    """The published data set of which these ids are a large part but not all, and the missing ids.

    ("", []) if there is none. A large part is half of ImageNet-A or -R, but nine tenths of ImageNet-1k,
    since smaller parts of it are data sets of their own.
    """
    found = {name.lower() for name in names}
    parts = (
        ("ImageNet-A", synsets("a"), 0.5),
        ("ImageNet-R", synsets("r"), 0.5),
        ("ImageNet-1k", synsets(), 0.9),
    )
    for name, ids, share in parts:
        if found < set(ids) and len(found) >= share * len(ids):
            return name, [wnid for wnid in ids if wnid not in found]
    return "", []


def objectnet(folder: pathlib.Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Read ObjectNet's mappings.

    Args:
        folder: the folder ``mappings``.

    Returns:
        The class of each folder; and, for scored folders, the rows of an ImageNet head that are right.

    Raises:
        ValueError: a file is missing or contradictory; the message names it.
    """
    labels = _object(folder / FOLDER_NAMES, str)
    to_imagenet = _object(folder / TO_IMAGENET, str)
    line_of = {int(row): line for row, line in _object(folder / ROW_TO_LINE, int).items()}
    file = folder / LINES
    try:
        lines = files.read_text(file if file.is_file() else file.with_suffix(".txt")).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if sorted(line_of.values()) != list(range(len(lines))):
        raise ValueError(f"{folder / ROW_TO_LINE} must name each of the {len(lines)} lines of {file} once")
    rows: dict[str, list[int]] = {}
    for row, line in line_of.items():
        rows.setdefault(lines[line].strip(), []).append(row)
    folders = {label: name for name, label in labels.items()}
    if len(folders) != len(labels):
        raise ValueError(f"{folder / FOLDER_NAMES} gives one class to several folders")
    scored = {}
    for label, text in to_imagenet.items():
        names = text.split("; ")
        if label not in folders:
            raise ValueError(f"{folder / TO_IMAGENET} names {label!r}, which {FOLDER_NAMES} does not")
        if unclear := [name for name in names if len(rows.get(name, ())) != 1]:
            raise ValueError(
                f"{folder / TO_IMAGENET} names {unclear[0]!r}, which is not exactly one line of {LINES}"
            )
        scored[folders[label]] = tuple(rows[name][0] for name in names)
    return labels, scored


def _object(file: pathlib.Path, of: type[_Value]) -> dict[str, _Value]:
    """Read a JSON object whose values are all of one type."""
    try:
        found = json.loads(files.read_text(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; it is part of ObjectNet") from error
    if not isinstance(found, dict) or not found or not all(type(value) is of for value in found.values()):
        raise ValueError(f"{file} must hold a JSON object of {of.__name__} values")
    return found
