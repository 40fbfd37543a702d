"""Results of single images as bytes: a bit for each hit, 16 bits for each loss and each prediction."""

from __future__ import annotations

import sqlite3

import numpy as np

from ..studies.images import ImageScores

Packed = tuple[bytes, bytes, bytes | None]
"""Hits, losses and predictions."""


def pack(scores: ImageScores) -> Packed:
    """Return the results of the images of a row as bytes, numbers with the low byte first."""
    predictions = scores.predictions
    return (
        np.packbits(scores.hits).tobytes(),
        scores.losses.astype("<f2", copy=False).tobytes(),
        None if predictions is None else predictions.astype("<u2", copy=False).tobytes(),
    )


def size(images: int) -> int:
    """Return the bytes that :func:`pack` makes of so many images."""
    return -(-images // 8) + 2 * images + 2 * images


def unpack(hits: object, losses: object, predictions: object) -> ImageScores:
    """Return what :func:`pack` was given.

    Raises:
        sqlite3.DatabaseError: The values do not come from it.
    """
    if not (isinstance(hits, bytes) and isinstance(losses, bytes) and isinstance(predictions, bytes | None)):
        raise sqlite3.DatabaseError("results of single images are not bytes")
    count = len(losses) // 2
    sizes = (len(hits), len(losses), 2 * count if predictions is None else len(predictions))
    if sizes != (-(-count // 8), 2 * count, 2 * count):
        raise sqlite3.DatabaseError(f"results of single images have {sizes} bytes, which do not fit together")
    return ImageScores(
        np.unpackbits(np.frombuffer(hits, np.uint8), count=count).astype(bool),
        np.frombuffer(losses, "<f2").astype(np.float16),
        None if predictions is None else np.frombuffer(predictions, "<u2").astype(np.uint16),
    )
