"""Checks of a request, its data sets, and the rows of the head that their classes belong to."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

from tqdm import tqdm

from rft_fast import datasets
from rft_fast.clip.architectures import Preprocess
from rft_fast.common import disk
from rft_fast.common.words import visible
from rft_fast.datasets import cifar, labels, maps, naming
from rft_fast.names import LOSSES, STORED

from .images import Images, threads
from .losses import check_contrastive
from .settings import Request, Setting
from .training import COLUMNS

RESERVED = "zeroshot"  # the name of the zero-shot model, which no other may have
LabelMaps = Mapping[str, pathlib.Path | str | None]  # data set -> file that maps its classes to rows


def check(request: Request) -> None:
    """Check what can be checked without opening a file.

    Raises:
        ValueError, TypeError: The request is inconsistent, or its directory cannot be written to.
    """
    if not request.settings:
        raise ValueError("finetune: no settings are given")
    if RESERVED in request.settings:
        raise ValueError(f"finetune: a model cannot be called {RESERVED!r}, the name of the zero-shot model")
    for name, setting in request.settings.items():
        if not name or pathlib.Path(name).name != name:
            raise ValueError(f"finetune: {name!r} cannot be the name of a file")
        if not isinstance(setting, Setting):
            raise TypeError(f"finetune: expected settings of type Setting, got {type(setting).__name__}")
    if request.store not in STORED:
        raise ValueError(f"finetune: store must be one of {', '.join(STORED)}; got {request.store!r}")
    if request.loss not in LOSSES:
        raise ValueError(f"finetune: loss must be one of {', '.join(LOSSES)}; got {request.loss!r}")
    if request.loss == "contrastive":
        _check_pairs(request)
    if both := sorted(set(request.val) & set(request.ood)):
        raise ValueError(
            f"finetune: {both[0]!r} names a data set of --val and one of --ood; give each its own name"
        )
    if missing := [str(path) for path in (*request.val.values(), *request.ood.values()) if not path.exists()]:
        raise ValueError(f"finetune: {missing[0]} does not exist")
    if taken := sorted(set(request.val) & set(COLUMNS)):
        raise ValueError(f"finetune: {taken[0]!r} is a column of the tables; give the data set another name")
    json.dumps(in_zoo(request, {}), ensure_ascii=False).encode()  # the zoo is UTF-8
    for name in ("workers", "keep_every"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"finetune: {name} must be at least 1, got {value}")
    disk.check_outside(request.out, {"train": request.train, **request.val, **request.ood}, "finetune: --out")
    there = next(path for path in (request.out, *request.out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"finetune: {there} is a file, expected a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"finetune: {there} cannot be written to; choose another --out")


def _check_pairs(request: Request) -> None:
    """Check what a request with the contrastive loss needs, and what has no meaning with it."""
    if request.class_names is None:
        raise ValueError(
            "finetune: --loss contrastive trains on pairs of an image and a prompt of its class; give the "
            "names of the classes with --class-names (and --templates)"
        )
    if request.head_scale is not None:
        raise ValueError(
            "finetune: --loss contrastive trains the logit scale, which scales the head; leave --head-scale "
            "out"
        )
    for setting in request.settings.values():
        check_contrastive(setting)


def training_source(request: Request) -> datasets.Source:
    """Return the source of the training images."""
    source = datasets.open_source("train", request.train, request.kind)
    if source.path.resolve() != request.train.resolve():
        raise ValueError(
            f"finetune: {request.train} contains several data sets, of which {source.path.name!r} "
            "would be used; name the one to train on"
        )
    part = request.train / "train"
    if source.kind == "cifar" and request.train.is_dir() and cifar.matches(part):
        raise ValueError(
            f"finetune: {request.train} is read as test images ({source.notes[0]}); for its training images "
            f"give --train {part}"
        )
    if not request.train.exists() and not (request.val or request.ood):
        raise ValueError(
            f"finetune: the zoo needs data, and {request.train} is only a part of a folder, which a zoo "
            "cannot name; give data to score with --val"
        )
    return source


def training_images(
    request: Request, source: datasets.Source, rows: datasets.Rows, preprocess: Preprocess
) -> Images:
    """Return the images of a source, labelled by rows of the head."""
    found = datasets.assign(source, rows, request.label_map)
    if found.groups is not None:
        raise ValueError(
            "finetune: some classes of the training images have several rows of the head; give a label map "
            "with one row for each class"
        )
    if not len(found.labels):
        raise ValueError(f"finetune: {request.train} contains no training images")
    if request.loss == "contrastive" and len(found.labels) < 2:
        raise ValueError(
            "finetune: the contrastive loss compares pairs of an image and a prompt, so it needs two images "
            f"or more; {request.train} has one"
        )
    if int(found.labels.max()) >= rows.count:
        raise ValueError(
            f"finetune: labels go up to {int(found.labels.max())}, but the head has {rows.count} classes"
        )
    tqdm.write(visible(f"train: rows of the head: {found.how}"))
    for note in source.notes:
        tqdm.write(visible(f"train: {note}"))
    workers = request.workers or threads()
    return Images(source, found.images, found.labels, preprocess, workers, request.in_memory)


def named_rows(request: Request, rows: datasets.Rows, images: Images) -> datasets.Rows:
    """Name the rows by the classes of the training images, where nothing else names them.

    Only if each row has exactly one class: in a data set with other classes, order alone would shift all
    classes that follow.
    """
    source, known = images.source, dict[int, str]()
    if rows.names or request.label_map not in (None, datasets.ORDER) or not source.class_names:
        return rows
    for row, label in zip(images.labels.tolist(), source.labels[images.chosen].tolist(), strict=True):
        known[row] = source.class_names[label]
    different = set(map(naming.fold, known.values())) - {""}
    if len(known) < rows.count or len(different) < rows.count:
        return rows
    return datasets.Rows(rows.count, tuple(known[row] for row in range(rows.count)))


def label_maps(request: Request, rows: datasets.Rows) -> LabelMaps:
    """Data set -> label map, for all but the training images, here and in the zoo."""
    sets = {**request.val, **request.ood}
    return {name: _label_map(request, rows, name, path) for name, path in sets.items()}


def _label_map(
    request: Request, rows: datasets.Rows, name: str, path: pathlib.Path
) -> pathlib.Path | str | None:
    """Return the label map of a data set; None where its classes show their rows."""
    given = request.label_map
    try:
        source = datasets.open_source(name, path)
        if given == datasets.ORDER:
            named = rows.names or not source.class_names or labels.is_settled(source, rows)
            given = None if named else given
        elif given is not None and name in request.ood:
            given = given if maps.covers(source.class_names, maps.read_map(pathlib.Path(given))) else None
        datasets.assign(source, rows, given)
    except ValueError as error:
        more = ""
        if name in request.ood:
            more = "; or leave it out here, and pass it to the sweep with --data and --data-labels"
        raise ValueError(f"finetune: {name!r}: {error}{more}") from error
    return given


def validation(
    request: Request, preprocess: Preprocess, rows: datasets.Rows, label_maps: LabelMaps
) -> dict[str, datasets.Dataset]:
    """Load the data sets that are scored after every epoch."""
    return {
        name: datasets.load(
            name,
            path,
            preprocess,
            ood=False,
            cache=request.cache,
            rows=rows,
            label_map=label_maps[name],
        )
        for name, path in request.val.items()
    }


def in_zoo(request: Request, label_maps: LabelMaps) -> dict[str, dict[str, object]]:
    """Data set -> its entries in the zoo."""
    sets, kind = {**request.val, **request.ood}, None
    if not sets:  # a zoo needs data
        sets, label_maps, kind = {"train": request.train}, {"train": request.label_map}, request.kind
    data: dict[str, dict[str, object]] = {}
    for name, path in sets.items():
        data[name] = {"path": _from_zoo(request, path), "ood": name in request.ood}
        if (given := label_maps.get(name)) is not None:
            order = given == datasets.ORDER
            data[name]["labels"] = given if order else _from_zoo(request, pathlib.Path(given))
        if kind is not None:
            data[name]["kind"] = kind
    return data


def _from_zoo(request: Request, path: pathlib.Path) -> str:
    """Return a path as the zoo names it.

    Relative to the zoo where it lies inside, since both can only move together, and where it was given as a
    relative path and has a folder in common with the zoo; otherwise absolute, so that the zoo can be moved.
    """
    out, target = request.out.resolve(), path.resolve()
    common = pathlib.Path(os.path.commonpath((out, target)))
    if common == out or (not path.is_absolute() and common != pathlib.Path(out.anchor)):
        return os.path.relpath(target, out)
    return str(target)
