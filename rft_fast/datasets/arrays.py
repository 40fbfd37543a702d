"""Reader of ``.npz`` files with images of the model's size."""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rft_fast.common import files
from rft_fast.common.words import many, some

from .source import MOST_ROWS, Source, numbered, reading


def matches(path: pathlib.Path) -> bool:
    """Whether the path is an ``.npz`` file."""
    return path.suffix == ".npz" and path.is_file()


def source(path: pathlib.Path, where: str) -> Source:
    """Read the images of an ``.npz`` file.

    The arrays are ``images``, uint8 [n, h, w] or [n, h, w, 3]; ``labels``, integers [n], rows of the head;
    and, if only some rows are to be scored among, ``classes``, distinct integers [k]. Grey images become
    RGB.

    Args:
        path: the file.
        where: prefix of error messages.

    Raises:
        ValueError: the file is damaged, has other arrays, or has labels that are not in ``classes`` or
            cannot be rows of a head.
    """
    stored = files.Inputs()
    with reading(stored, path, f"{where}: {path} cannot be read as arrays"), files.opened(path) as stream:
        if not zipfile.is_zipfile(stream):  # numpy would advise to unpickle it
            raise ValueError("it is incomplete, or not an .npz archive of numpy.savez")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    for key in ("images", "labels"):
        if key not in arrays:
            raise ValueError(f"{where}: {path} has no array {key!r}; it has {some(list(arrays))}")
    if unknown := [key for key in arrays if key not in ("images", "labels", "classes")]:
        raise ValueError(
            f"{where}: {path} has unknown arrays: {some(unknown)}; expected images, labels, and "
            "optionally classes"
        )
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise ValueError(
            f"{where}: images must be uint8 [n, h, w] or [n, h, w, 3], "
            f"got {images.dtype} {list(images.shape)} in {path}"
        )
    if 0 in images.shape:
        raise ValueError(f"{where}: {path} has no images: the shape is {list(images.shape)}")
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    labels = _integers(arrays["labels"], f"{where}: labels in {path}")
    if len(labels) != len(images):
        raise ValueError(f"{where}: {path} has {many(len(images), 'image')} but {many(len(labels), 'label')}")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    classes = None
    if "classes" in arrays:
        classes = _integers(arrays["classes"], f"{where}: classes in {path}")
        if len(set(classes.tolist())) != len(classes):
            raise ValueError(f"{where}: classes in {path} must be distinct")
        if outside := sorted(set(labels.tolist()) - set(classes.tolist())):
            raise ValueError(f"{where}: labels {some(outside)} are not among its classes, in {path}")
    return Source(
        kind="npz",
        path=path,
        files=numbered(path, len(images)),
        labels=labels,
        class_names=(),
        open=lambda index: Image.fromarray(pixels[index].permute(1, 2, 0).contiguous().numpy()),
        pixels=pixels,
        classes=classes,
        stored=stored,
    )


def _integers(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{where} must be integers [n], got {array.dtype} {list(array.shape)}")
    if len(array) and not (array.min() >= 0 and array.max() < MOST_ROWS):
        raise ValueError(
            f"{where} must be rows of a head, from 0 to {MOST_ROWS - 1}; got {array.min()} to {array.max()}"
        )
    return torch.from_numpy(array.astype(np.int64))
