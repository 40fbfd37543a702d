"""Which rows of a classification head the classes of a data set are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rft_fast import prompts
from rft_fast.words import some

from . import imagenet, maps
from .maps import Answers, LabelMap
from .naming import composed, fold, numbers, places
from .source import MOST_ROWS, Source

ORDER = "order"  # instead of a label map: class i is row i
CURE = (
    'give a label map or, if class i is row i, the word "order" instead (--data-labels NAME=order, '
    'labels = "order" in a zoo, label_map="order" in Python; docs/data.md)'
)
_NAME_HEAD = ", or name the head's rows (--class-names)"
_ALIKE = "case, spaces and Unicode forms do not count"

# Heads of so many unnamed rows are taken to be in the order of these classes. STL-10 is not among them: its
# ten classes are others than CIFAR-10's, and in another order.
_BUILT_IN = {"CIFAR-10": prompts.CLASS_NAMES["cifar10"], "CIFAR-100": prompts.CLASS_NAMES["cifar100"]}
_IN_PLACE = 0.95  # of a list's names at their own place show that the list is in the head's order

_Candidates = Sequence[Collection[int]]  # for each class the rows that it may be


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
    how: by which evidence, in words.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor | None
    groups: Tensor | None
    how: str = ""


def assign(source: Source, rows: Rows | None, label_map: LabelMap | Path | str | None = None) -> Assignment:
    """The rows of a head that the classes of a source are.

    Without a label map they are found by evidence: the same names on both sides; WordNet ids or names of
    ImageNet, for a head of ImageNet's classes (or of 1,000 unnamed rows); numbers, which have an order of
    their own; the names of CIFAR-10 and CIFAR-100, for as many unnamed rows; labels without names, which are
    rows. Names are compared by :func:`rft_fast.datasets.naming.fold`. Classes that are parts of ImageNet are
    scored among their rows alone.

    Args:
        source: the data set.
        rows: the head's. None: there is no head yet. Rows are ImageNet's for ObjectNet, and where all classes
            are WordNet ids of ImageNet, or its 1,000 names; else class i is row i of a head that is still to
            be made.
        label_map: for each class of the source its row, as a number or by the name of the head's class; a
            list of those, of which each is right; or None, so that it is not scored. A mapping, or a file:
            ``.json`` and ``.toml`` hold one (TOML writes [] for None), ``.csv`` has the columns ``class,row``
            and a line for each row that is right, or one with an empty row. It must name the source's
            classes, all and no others. Or ``"order"``: class i is row i, numbers as numbers, of a head with
            as many rows. None: by evidence.

    Raises:
        ValueError: the evidence is missing, contradicts itself or the label map, or rows are not the head's;
            the message lists what does not fit.
    """
    try:
        if rows is None and label_map is None and _are_imagenets(source):
            rows = Rows(imagenet.CLASSES)
        if label_map == ORDER:
            return _in_order(source, rows)
        if label_map is not None:
            names = source.class_names or [str(label) for label in range(int(source.labels.max()) + 1)]
            given = label_map if isinstance(label_map, Mapping) else maps.read_map(Path(label_map))
            head, most = ((), MOST_ROWS) if rows is None else (rows.names, rows.count)
            return _assignment(source, maps.answers(names, head, most, given), rows, "by the label map")
        if not source.class_names:
            return _as_labelled(source, rows, "labels are rows of the head")
        if source.imagenet is not None and (rows is None or rows.count != len(source.class_names)):
            return _assignment(source, _objectnet(source, rows), rows, "by ObjectNet's mappings")
        if rows is None:
            return _as_labelled(source, rows, "class i is row i, as no head is known")
        answers, how = _by_evidence(source, rows)
        return _assignment(source, answers, rows, how)
    except ValueError as error:
        raise ValueError(f"labels of {source.path}: {error}") from error


def as_given(text: str) -> Path | str:
    """What stands on a command line for a label map: its file, or the word order."""
    return ORDER if text == ORDER else Path(text)


def is_settled(source: Source, rows: Rows) -> bool:
    """Whether :func:`assign` finds the rows of a source without a label map."""
    try:
        assign(source, rows)
    except ValueError:
        return False
    return True


def _are_imagenets(source: Source) -> bool:
    names = source.class_names
    if imagenet.are_wnids(names):
        return all(map(imagenet.is_imagenets, names))
    return len(names) == imagenet.CLASSES and _matched(imagenet.candidates(names)) is not None


# --- evidence -----------------------------------------------------------------------------------------


def _by_evidence(source: Source, rows: Rows) -> tuple[Answers, str]:
    """The rows of classes that have names, and what shows them."""
    names = source.class_names
    own = _own_rows(names, rows)
    if len(names) == rows.count and (found := _matched(own, _is_list(names, rows, own))):
        return _single(found), "by name"
    wnids = imagenet.are_wnids(names)
    of_head = _imagenet_rows(rows)
    if of_head is not None and (rows.count == imagenet.CLASSES or len(names) == rows.count):
        classes = imagenet.candidates(names)
        if source.kind == "imagenet-v2":
            classes = [{int(fold(name))} for name in names]
        if found := _matched(classes, in_place=len(names) == imagenet.CLASSES):
            return _single(_of_head(found, names, of_head)), _how(source)
        if rows.count == imagenet.CLASSES and (wnids or 2 * sum(map(bool, classes)) > len(names)):
            raise ValueError(_unclear_imagenet(names, classes))
    if len(names) != rows.count:
        raise ValueError(_other_count(names, rows))
    if not any(own) and numbers(names):
        return _single(_order(names)), "by number"
    if rows.names:
        raise ValueError(_other_names(names, rows, own, wnids))
    if built_in := _built_in(names):
        return _single(built_in[1]), f"by the names of {built_in[0]}, in whose order the head is taken to be"
    if rows.count == 1:
        return [(0,)], "the only class is the only row"
    table = some([f"{name} -> {row}" for row, name in enumerate(names)], 10)
    ids = "; its classes are WordNet ids, and the head is not ImageNet's" if wnids else ""
    raise ValueError(
        f"the names of the head's {rows.count} rows are not known, so nothing shows which class is which row"
        f"{ids}; in order they would be {table}; {CURE}{_NAME_HEAD}"
    )


def _matched(candidates: _Candidates, in_place: bool = False, unknown: bool = False) -> list[int] | None:
    """A row for each class, none twice, where there is no doubt.

    in_place: a few names may be those of several rows, in a list that is otherwise in the rows' order.
    unknown: or of none.
    """
    found = [next(iter(rows)) for rows in candidates if len(rows) == 1]
    if len(found) == len(candidates):
        return found if len(set(found)) == len(found) else None
    sure = sum(rows == {place} for place, rows in enumerate(map(set, candidates)))
    fits = all(place in rows or (unknown and not rows) for place, rows in enumerate(candidates))
    if in_place and fits and sure >= _IN_PLACE * len(candidates):
        return list(range(len(candidates)))
    return None


def _own_rows(names: Sequence[str], rows: Rows) -> _Candidates:
    """The rows that are named as each class."""
    named = places(rows.names)
    return [named.get(fold(name), ()) for name in names]


def _is_list(names: Sequence[str], rows: Rows, own: _Candidates) -> bool:
    """Whether nothing speaks against names being the very list of the head's: none of them is written exactly
    as that of another row alone."""
    for place, (name, alike) in enumerate(zip(names, own, strict=True)):
        exact = {row for row in alike if composed(rows.names[row]) == composed(name)}
        if exact and place not in exact:
            return False
    return True


def _imagenet_rows(rows: Rows) -> dict[int, int] | None:
    """ImageNet's class -> the row of a head; None for a head of other classes.

    Of 1,000 rows without names it is taken that they are in ImageNet's order.
    """
    if not rows.names:
        found = list(range(imagenet.CLASSES)) if rows.count == imagenet.CLASSES else None
    else:
        whole = rows.count == imagenet.CLASSES  # people improve on a few names
        found = _matched(imagenet.candidates(rows.names), in_place=whole, unknown=whole)
    return None if found is None else {row: place for place, row in enumerate(found)}


def _of_head(classes: Sequence[int], names: Sequence[str], row_of: Mapping[int, int]) -> list[int]:
    """The rows of ImageNet's classes, of which a published set must not lack a few."""
    if lost := [name for name, row in zip(names, classes, strict=True) if row not in row_of]:
        raise ValueError(
            f"{len(lost)} of {len(names)} classes are not among the head's: {some(lost)}; {CURE}"
        )
    wnids = imagenet.synsets()
    title, missing = imagenet.almost(wnids[row] for row in classes)
    if missing and len(row_of) == imagenet.CLASSES:
        raise ValueError(
            f"{len(missing)} of the classes of {title} are missing, so it would score too high: "
            f"{some(missing)}; complete it, or give a label map if these are meant"
        )
    return [row_of[row] for row in classes]


def _how(source: Source) -> str:
    if source.kind == "imagenet-v2":
        return "by the numbers of ImageNetV2"
    return "by WordNet id" if imagenet.are_wnids(source.class_names) else "by the names of ImageNet"


def _built_in(names: Sequence[str]) -> tuple[str, list[int]] | None:
    folded = [fold(name) for name in names]
    for title, known in _BUILT_IN.items():
        row_of = {fold(name): row for row, name in enumerate(known)}
        if len(names) == len(known) and set(folded) == set(row_of):
            return title, [row_of[name] for name in folded]
    return None


def _objectnet(source: Source, rows: Rows | None) -> Answers:
    known = source.imagenet or {}
    row_of = _imagenet_rows(rows or Rows(imagenet.CLASSES))
    if row_of is None or len(row_of) != imagenet.CLASSES:
        count = 0 if rows is None else rows.count
        what = "rows of other classes" if count == imagenet.CLASSES else "rows"
        raise ValueError(
            f"its mappings are to ImageNet's {imagenet.CLASSES} classes, the head has {count} {what}; "
            "give a label map"
        )
    return [tuple(row_of[row] for row in known.get(name, ())) for name in source.class_names]


# --- as the user or the file says ---------------------------------------------------------------------


def _in_order(source: Source, rows: Rows | None) -> Assignment:
    """Class i as row i, as the user says; refused where names of the head show another order."""
    names, how = source.class_names, "in order, as requested"
    if not names or rows is None:
        return _as_labelled(source, rows, how)
    order = _order(names)
    if len(names) != rows.count:
        raise ValueError(_other_count(names, rows))
    moved = _moved(names, order, _own_rows(names, rows))
    if rows.names:  # the same class of ImageNet, by another name
        classes = imagenet.candidates(rows.names)
        row_of = {next(iter(of)): row for row, of in enumerate(classes) if len(of) == 1}
        of_head = [[row_of[row] for row in of if row in row_of] for of in imagenet.candidates(names)]
        moved += [name for name in _moved(names, order, of_head) if name not in moved]
    if moved:
        raise ValueError(
            f'"order" was requested, but its classes are in another order than the head\'s, as {some(moved)} '
            f"show; give a label map; {_both(names, rows)}"
        )
    return _assignment(source, _single(order), rows, how)


def _moved(names: Sequence[str], order: Sequence[int], own: _Candidates) -> list[str]:
    """The classes whose names are those of other rows than their order says."""
    return [name for name, row, of in zip(names, order, own, strict=True) if len(of) == 1 and row not in of]


def _as_labelled(source: Source, rows: Rows | None, how: str) -> Assignment:
    """Labels as the source has them: rows of the head."""
    labels, classes = source.labels, source.classes
    if source.class_names:
        labels = torch.tensor(_order(source.class_names), dtype=torch.int64)[labels]
    highest = max((int(t.max()) for t in (labels, classes) if t is not None and len(t)), default=0)
    if rows is not None and highest >= rows.count:
        raise ValueError(f"it has label {highest}, the head has {rows.count} rows; give a label map")
    return Assignment(torch.arange(len(labels)), labels, classes, None, how)


def _order(names: Sequence[str]) -> list[int]:
    """The row of each class by its place, or by its number if all are consecutive numbers."""
    found = numbers(names)
    return [number - min(found) for number in found] or list(range(len(names)))


def _single(rows: Sequence[int]) -> Answers:
    return [(row,) for row in rows]


# --- what is refused ----------------------------------------------------------------------------------


def _both(names: Sequence[str], rows: Rows) -> str:
    return f"its classes: {some(names, 10)}; the head's: {some(rows.names, 10)}"


def _other_count(names: Sequence[str], rows: Rows) -> str:
    lists = f"; {_both(names, rows)}" if rows.names else f": {some(names)}"
    return (
        f"{len(names)} classes, but the head has {rows.count} rows; give a label map (class of the data "
        f"set -> row of the head), or the head that belongs to this data set{lists}"
    )


def _other_names(names: Sequence[str], rows: Rows, own: _Candidates, wnids: bool) -> str:
    unknown = [name for name, of in zip(names, own, strict=True) if not of]
    unclear = [name for name, of in zip(names, own, strict=True) if len(of) > 1]
    cure = CURE
    if wnids:
        what = "its classes are WordNet ids, and the head's are not ImageNet's"
    elif len(unknown) == len(names):
        what = "none of its classes is named as one of the head's"
    elif unknown:
        what = f"{len(unknown)} of its {len(names)} classes are not named as the head's: {some(unknown)}"
        if moved := _moved(names, _order(names), own):
            cure = f"others are in another order than there, such as {some(moved)}; give a label map"
    elif unclear:
        what = f"several rows of the head have the name of {some(unclear)} ({_ALIKE})"
    else:
        by_name = places(names)
        twice = [", ".join(names[place] for place in of) for of in by_name.values() if len(of) > 1]
        what = f"classes that are one by their names: {some(twice)} ({_ALIKE})"
    return f"{what}; {cure}; {_both(names, rows)}"


def _unclear_imagenet(names: Sequence[str], classes: _Candidates) -> str:
    unknown = [name for name, of in zip(names, classes, strict=True) if not of]
    unclear = [
        f"{name} (rows {', '.join(map(str, sorted(of)))})"
        for name, of in zip(names, classes, strict=True)
        if len(of) > 1
    ]
    holders: dict[int, list[str]] = {}
    for name, of in zip(names, classes, strict=True):
        for row in of if len(of) == 1 else ():
            holders.setdefault(row, []).append(name)
    twice = [" and ".join(of) for of in holders.values() if len(of) > 1]
    parts = [
        f"{len(found)} of {len(names)} classes {what}: {some(found, 10)}"
        for found, what in (
            (unknown, "are not among ImageNet's 1,000"),
            (unclear, "may be several of ImageNet's"),
            (twice, "are of one class of ImageNet"),
        )
        if found
    ]
    return f"{'; '.join(parts)}; give a label map in which they have rows, or none"


# --- the result ---------------------------------------------------------------------------------------


def _assignment(source: Source, answers: Answers, rows: Rows | None, how: str) -> Assignment:
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
        how,
    )
