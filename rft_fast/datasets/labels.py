"""Assigns rows of a classification head to the classes of a data set."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rft_fast.common.words import some
from rft_fast.names import ORDER

from . import imagenet, maps
from .evidence import (
    Rows,
    both,
    by_evidence,
    elsewhere,
    imagenet_rows,
    matched,
    ordered,
    other_count,
    own_rows,
    single,
)
from .maps import Answers, LabelMap
from .source import MOST_ROWS, Source


@dataclass(frozen=True, eq=False)
class Assignment:
    """The images to score, and their labels.

    Attributes:
        images: int64 [m], positions in the source's files.
        labels: int64 [m], rows of the head.
        classes: int64 [k], distinct rows to score among, ascending; None: all.
        groups: int64 [k], the row that each of ``classes`` counts as, if a class has several rows; otherwise
            None.
        how: the evidence, in words.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor | None
    groups: Tensor | None
    how: str = ""


def assign(
    source: Source, rows: Rows | None, label_map: LabelMap | pathlib.Path | str | None = None
) -> Assignment:
    """Find the rows of a head that the classes of a source are.

    Without a label map, the evidence is one of: equal names; WordNet ids or names of ImageNet, for a head of
    ImageNet's classes (or 1,000 unnamed rows); numbers, which have an order; the names of CIFAR-10 or
    CIFAR-100, for as many unnamed rows; labels without names, which are rows.
    :func:`rft_fast.datasets.naming.fold` decides which names are equal. Classes that are a part of ImageNet
    are scored among their own rows alone.

    Args:
        source: the data set.
        rows: rows of the head; None: there is no head yet. Then rows are ImageNet's for ObjectNet, and if all
            classes are WordNet ids of ImageNet, or its 1,000 names; otherwise class i is row i.
        label_map: for each class of the source its row, by number or by the name of the head's class; a list
            of rows that are all right; or None, for a class that is not scored. A mapping, or a file:
            ``.json`` or ``.toml`` (which has [] for None), or ``.csv`` with the columns ``class,row`` and
            one line per right row, or one with an empty row. It must have exactly the source's classes. Or
            ``"order"``: class i is row i, with numbers sorted as numbers, for a head of as many rows. None:
            by evidence.

    Raises:
        ValueError: evidence is missing, contradicts itself or the label map, or rows are not the head's. The
            message lists the classes concerned.
    """
    try:
        if rows is None and label_map is None and _are_imagenets(source):
            rows = Rows(imagenet.CLASSES)
        if label_map == ORDER:
            return _in_order(source, rows)
        if label_map is not None:
            names = source.class_names or [str(label) for label in range(int(source.labels.max()) + 1)]
            given = label_map if isinstance(label_map, Mapping) else maps.read_map(pathlib.Path(label_map))
            head, most = ((), MOST_ROWS) if rows is None else (rows.names, rows.count)
            return _assignment(source, maps.answers(names, head, most, given), rows, "by the label map")
        if not source.class_names:
            return _as_labelled(source, rows, "labels are rows of the head")
        if source.imagenet is not None and (rows is None or rows.count != len(source.class_names)):
            return _assignment(source, _objectnet(source, rows), rows, "by the mappings of ObjectNet")
        if rows is None:
            return _as_labelled(source, rows, "class i is row i, because the head is unknown")
        answers, how = by_evidence(source, rows)
        return _assignment(source, answers, rows, how)
    except ValueError as error:
        raise ValueError(f"labels of {source.path}: {error}") from error


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
    return len(names) == imagenet.CLASSES and matched(imagenet.candidates(names)) is not None


def _objectnet(source: Source, rows: Rows | None) -> Answers:
    known = source.imagenet or {}
    row_of = imagenet_rows(rows or Rows(imagenet.CLASSES))
    if row_of is None or len(row_of) != imagenet.CLASSES:
        count = 0 if rows is None else rows.count
        what = "rows of other classes" if count == imagenet.CLASSES else "rows"
        raise ValueError(
            f"it maps to the {imagenet.CLASSES} classes of ImageNet, but the head has {count} "
            f"{what}; give a label map"
        )
    return [tuple(row_of[row] for row in known.get(name, ())) for name in source.class_names]


# --- by the user or the file --------------------------------------------------------------------------


def _in_order(source: Source, rows: Rows | None) -> Assignment:
    """Class i as row i, as the user states; refused if names of the head show another order."""
    names, how = source.class_names, "in order, as requested"
    if not names or rows is None:
        return _as_labelled(source, rows, how)
    order = ordered(names)
    if len(names) != rows.count:
        raise ValueError(other_count(names, rows))
    moved = elsewhere(names, order, own_rows(names, rows))
    if rows.names:  # the same ImageNet class may have another name
        classes = imagenet.candidates(rows.names)
        row_of = {next(iter(of)): row for row, of in enumerate(classes) if len(of) == 1}
        of_head = [[row_of[row] for row in of if row in row_of] for of in imagenet.candidates(names)]
        moved += [name for name in elsewhere(names, order, of_head) if name not in moved]
    if moved:
        raise ValueError(
            '"order" was requested, but its classes are in another order than in the head, '
            f"such as {some(moved)}; give a label map; {both(names, rows)}"
        )
    return _assignment(source, single(order), rows, how)


def _as_labelled(source: Source, rows: Rows | None, how: str) -> Assignment:
    """Labels of the source, which are rows of the head."""
    labels, classes = source.labels, source.classes
    if source.class_names:
        labels = torch.tensor(ordered(source.class_names), dtype=torch.int64)[labels]
    highest = max((int(t.max()) for t in (labels, classes) if t is not None and len(t)), default=0)
    if rows is not None and highest >= rows.count:
        raise ValueError(f"it has the label {highest}, but the head has {rows.count} rows; give a label map")
    return Assignment(torch.arange(len(labels)), labels, classes, None, how)


# --- the result ---------------------------------------------------------------------------------------


def _assignment(source: Source, answers: Answers, rows: Rows | None, how: str) -> Assignment:
    owner: dict[int, frozenset[int]] = {}
    if twice := [answer for answer in answers if len(set(answer)) != len(answer)]:
        raise ValueError(f"a class has the same row twice: {some(twice[0])}")
    for row, right in ((row, frozenset(answer)) for answer in answers for row in answer):
        if owner.setdefault(row, right) != right:
            raise ValueError(
                f"row {row} is correct for classes whose other rows differ, so that neither can be scored"
            )
    used = sorted(owner)
    table = torch.tensor([min(answer) if answer else -1 for answer in answers], dtype=torch.int64)
    labels = table[source.labels]
    images = torch.nonzero(labels >= 0).flatten()
    if not len(images):
        raise ValueError("none of its images can be scored")
    every = rows is not None and len(used) == rows.count
    grouped = any(len(answer) > 1 for answer in answers)
    return Assignment(
        images,
        labels[images],
        None if every and not grouped else torch.tensor(used),
        torch.tensor([min(owner[row]) for row in used]) if grouped else None,
        how,
    )
