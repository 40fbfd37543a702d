"""Finds the rows of a head that the classes of a data set are: by names, WordNet ids or numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rft_fast.clip import prompts
from rft_fast.common.words import many, some

from . import imagenet
from .maps import Answers
from .naming import composed, fold, numbers, places
from .source import Source

CURE = (
    'give a label map, or, if class i is row i, the word "order" (--data-labels '
    'NAME=order of the sweep, --label-map order of finetune, labels = "order" in a '
    'zoo, label_map="order" in Python; docs/data.md)'
)
_NAME_HEAD = ", or name the rows of the head (--class-names)"
_ALIKE = "regardless of case, spaces and Unicode form"

# Heads with as many unnamed rows are taken to be in the order of these classes. STL-10 is not included: it
# has other classes than CIFAR-10, in another order.
_BUILT_IN = {"CIFAR-10": prompts.CLASS_NAMES["cifar10"], "CIFAR-100": prompts.CLASS_NAMES["cifar100"]}
_IN_PLACE = 0.95  # share of names in their place that shows that a list is in the head's order

_Candidates = Sequence[Collection[int]]  # for each class the rows that it may have


@dataclass(frozen=True)
class Rows:
    """The rows of a head.

    Args:
        count: number of rows.
        names: their class names, in order; empty if unknown.

    Raises:
        ValueError: no rows, or another number of names.
    """

    count: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1 or len(self.names) not in (0, self.count):
            raise ValueError(
                "Rows: expected at least one row, and either no names or one for each; got "
                f"{self.count} rows and {len(self.names)} names"
            )


def by_evidence(source: Source, rows: Rows) -> tuple[Answers, str]:
    """Find the rows of named classes.

    Returns:
        The rows of each class, and the kind of evidence in words.

    Raises:
        ValueError: the evidence is missing or contradictory.
    """
    names = source.class_names
    own = own_rows(names, rows)
    if len(names) == rows.count and (found := matched(own, _is_list(names, rows, own))):
        return single(found), "by name"
    wnids = imagenet.are_wnids(names)
    of_head = imagenet_rows(rows)
    if of_head is None and wnids and len(names) == rows.count:
        of_head = imagenet_rows(rows, set().union(*imagenet.candidates(names)))
    if of_head is not None and (rows.count == imagenet.CLASSES or len(names) == rows.count):
        classes = imagenet.candidates(names)
        if source.kind == "imagenet-v2":
            classes = [{int(fold(name))} for name in names]
        if found := matched(classes, in_place=len(names) == imagenet.CLASSES):
            return single(_of_head(found, names, of_head)), _how(source)
        if rows.count == imagenet.CLASSES and (wnids or 2 * sum(map(bool, classes)) > len(names)):
            raise ValueError(_unclear_imagenet(names, classes))
    if len(names) != rows.count:
        raise ValueError(other_count(names, rows))
    if not any(own) and (found := numbers(names)):
        if of_head is not None and rows.count == imagenet.CLASSES and min(found) == 1:
            raise ValueError(
                "its classes are numbers from 1, and the head is ImageNet's: the published archives "
                "number the classes by ILSVRC2012_ID, in another order than the rows of the head; "
                f"{CURE}"
            )
        return single(ordered(names)), "by number"
    if rows.names:
        raise ValueError(_other_names(names, rows, own, wnids))
    if built_in := _built_in(names):
        return single(built_in[1]), f"by the names of {built_in[0]}, assuming that the head is in this order"
    if rows.count == 1:
        return [(0,)], "there is only one class and one row"
    table = some([f"{name} -> {row}" for row, name in enumerate(names)], 10)
    ids = "; its classes are WordNet ids, but the head is not ImageNet's" if wnids else ""
    raise ValueError(
        f"the names of the {rows.count} rows of the head are unknown, so that nothing shows "
        f"which class is which row{ids}; in order, they would be {table}; {CURE}{_NAME_HEAD}"
    )


def proposed(source: Source, rows: Rows) -> dict[str, int | None]:
    """The row that each class name alone indicates; None if there is none, several, or another has it."""
    names, of_head = source.class_names, imagenet_rows(rows) or {}
    classes = [[of_head[row] for row in of if row in of_head] for of in imagenet.candidates(names)]
    own = own_rows(names, rows)
    found = [next(iter(a or b)) if len(a or b) == 1 else None for a, b in zip(own, classes, strict=True)]
    return {name: row if found.count(row) == 1 else None for name, row in zip(names, found, strict=True)}


def matched(candidates: _Candidates, in_place: bool = False, unknown: bool = False) -> list[int] | None:
    """Choose distinct rows for all classes, or return None if there is doubt.

    Args:
        candidates: rows that each class may have.
        in_place: accept a few classes with several candidates, if the list is otherwise in the rows' order.
        unknown: accept a few without any, too.
    """
    found = [next(iter(rows)) for rows in candidates if len(rows) == 1]
    if len(found) == len(candidates):
        return found if len(set(found)) == len(found) else None
    sure = sum(rows == {place} for place, rows in enumerate(map(set, candidates)))
    fits = all(place in rows or (unknown and not rows) for place, rows in enumerate(candidates))
    if in_place and fits and sure >= _IN_PLACE * len(candidates):
        return list(range(len(candidates)))
    return None


def own_rows(names: Sequence[str], rows: Rows) -> _Candidates:
    """The rows with the name of each class."""
    named = places(rows.names)
    return [named.get(fold(name), ()) for name in names]


def _is_list(names: Sequence[str], rows: Rows, own: _Candidates) -> bool:
    """Whether the names may be the head's own list: none is spelled exactly as only another row is."""
    for place, (name, alike) in enumerate(zip(names, own, strict=True)):
        exact = {row for row in alike if composed(rows.names[row]) == composed(name)}
        if exact and place not in exact:
            return False
    return True


def imagenet_rows(rows: Rows, among: Collection[int] = ()) -> dict[int, int] | None:
    """Map ImageNet's classes to the rows of a head; None for a head of other classes.

    1,000 rows without names are taken to be in ImageNet's order.

    Args:
        rows: rows of the head.
        among: the only ImageNet classes that the rows can be; resolves ambiguous names such as ``missile``.
    """
    whole = rows.count == imagenet.CLASSES
    if not rows.names:
        found = list(range(imagenet.CLASSES)) if whole else None
    else:
        classes = imagenet.candidates(rows.names)
        if among:
            classes = [of.intersection(among) for of in classes]
        found = matched(classes, in_place=whole, unknown=whole)  # a few names are often edited
    return None if found is None else {row: place for place, row in enumerate(found)}


def _of_head(classes: Sequence[int], names: Sequence[str], row_of: Mapping[int, int]) -> list[int]:
    """Rows of ImageNet classes; refuses a published data set that lacks a few of its classes."""
    if outside := [name for name, row in zip(names, classes, strict=True) if row not in row_of]:
        are = many(len(outside), f"of {len(names)} classes is", f"of {len(names)} classes are")
        raise ValueError(f"{are} not in the head: {some(outside)}; {CURE}")
    wnids = imagenet.synsets()
    title, missing = imagenet.almost(wnids[row] for row in classes)
    if missing and len(row_of) == imagenet.CLASSES:
        are = many(len(missing), f"class of {title} is", f"classes of {title} are")
        raise ValueError(
            f"{are} missing, so that accuracy would be too high: {some(missing)}; complete the data set, or "
            "give a label map if this is intended"
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


def elsewhere(names: Sequence[str], order: Sequence[int], own: _Candidates) -> list[str]:
    """Classes whose names are those of other rows than ``order`` states."""
    return [name for name, row, of in zip(names, order, own, strict=True) if len(of) == 1 and row not in of]


def ordered(names: Sequence[str]) -> list[int]:
    """The row of each class: its place, or its number if all names are consecutive numbers."""
    found = numbers(names)
    return [number - min(found) for number in found] or list(range(len(names)))


def single(rows: Sequence[int]) -> Answers:
    return [(row,) for row in rows]


# --- messages -----------------------------------------------------------------------------------------


def both(names: Sequence[str], rows: Rows) -> str:
    return f"classes of the data set: {some(names, 10)}; of the head: {some(rows.names, 10)}"


def other_count(names: Sequence[str], rows: Rows) -> str:
    lists = f"; {both(names, rows)}" if rows.names else f": {some(names)}"
    return (
        f"the data set has {len(names)} classes, but the head has {rows.count} rows; give a "
        "label map (class of the data set -> row of the head), or the head of this data "
        f"set{lists}"
    )


def _other_names(names: Sequence[str], rows: Rows, own: _Candidates, wnids: bool) -> str:
    unknown = [name for name, of in zip(names, own, strict=True) if not of]
    unclear = [name for name, of in zip(names, own, strict=True) if len(of) > 1]
    cure = CURE
    if wnids:
        what = "its classes are WordNet ids, but the head is not ImageNet's"
    elif len(unknown) == len(names):
        what = "none of its class names is in the head"
    elif unknown:
        of = f"of its {len(names)} class names"
        what = f"{many(len(unknown), f'{of} is', f'{of} are')} not in the head: {some(unknown)}"
        if moved := elsewhere(names, ordered(names), own):
            cure = f"classes are in another order than in the head, such as {some(moved)}; give a label map"
    elif unclear:
        what = f"several rows of the head have the same name, {some(unclear)} ({_ALIKE})"
    else:
        by_name = places(names)
        twice = [", ".join(names[place] for place in of) for of in by_name.values() if len(of) > 1]
        what = f"several classes have the same name, {some(twice)} ({_ALIKE})"
    return f"{what}; {cure}; {both(names, rows)}"


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
    share = f"of {len(names)} classes"
    parts = []
    if unknown:
        are = many(len(unknown), f"{share} is", f"{share} are")
        parts.append(f"{are} not among the 1,000 classes of ImageNet: {some(unknown, 10)}")
    if unclear:
        parts.append(f"{len(unclear)} {share} may be several classes of ImageNet: {some(unclear, 10)}")
    if twice:
        parts.append(f"several names are the same class of ImageNet: {some(twice, 10)}")
    return (
        f"{'; '.join(parts)}; give a label map that maps them to rows, or to none (python -m "
        "rft_fast.datasets ... --write-labels FILE.csv writes a draft)"
    )
