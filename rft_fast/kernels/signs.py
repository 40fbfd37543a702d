"""Random signs of single images, with which one base perturbation serves many images.

Sign i of a tensor for image n is a bit of Philox4x32-10: key = seed; counter = (first block of the tensor's
noise + i // 128, n, draw, ``PURPOSE_SIGN``); bit i % 32 of word (i // 32) % 4; 1 is plus. So signs depend on
seed, draw, the image's number in its data set and the tensor's position in the model, and on nothing else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rft_fast.kernels.contract import PURPOSE_SIGN, Write
from rft_fast.kernels.reference import MASK32, philox

BITS = 128  # signs of one Philox block


def blocks_of(count: int) -> int:
    """Return the number of Philox blocks that hold ``count`` signs."""
    return -(-count // BITS)


def signs(seed: int, draw: int, images: Tensor, first_block: int, count: int) -> Tensor:
    """Return the signs of one tensor for each image.

    Args:
        seed: Key of the random generator, an integer in [0, 2**64).
        draw: Number of the draw, an integer in [0, 2**32).
        images: Int64 [n]: numbers of images in their data set, each in [0, 2**32).
        first_block: Philox block at which the tensor's noise starts.
        count: Signs per image.

    Returns:
        Float32 [n, count] of -1 and 1, on the device of ``images``.

    Raises:
        TypeError: Seed or draw is no integer.
        ValueError: A number is out of range.
    """
    last = first_block + blocks_of(count)
    check_blocks(last)
    blocks = torch.arange(first_block, last, device=images.device)
    return signs_of_blocks(seed, draw, images, blocks)[:, :count]


def check_blocks(end: int) -> None:
    """Raise ValueError unless there are signs of all blocks before ``end``."""
    if end > MASK32 + 1:
        raise ValueError("signs: the model has too many weights to give each image its own signs")


def signs_of_blocks(seed: int, draw: int, images: Tensor, blocks: Tensor) -> Tensor:
    """Return all signs of some Philox blocks, int64 [b], for each image: float32 [n, 128 * b].

    The caller has to :func:`check_blocks`: to read their numbers here would wait for the device.
    """
    request = Write(0.0, seed=seed, draw=draw)  # refuses other numbers
    shape = len(images), len(blocks)
    counter = (
        blocks.expand(shape).flatten(),
        images.unsqueeze(1).expand(shape).flatten(),
        torch.full((shape[0] * shape[1],), request.draw, device=images.device),
        torch.full((shape[0] * shape[1],), PURPOSE_SIGN, device=images.device),
    )
    words = philox(counter, request.seed).to(torch.int32).contiguous()  # the low halves
    octets = (
        words.view(torch.uint8).flatten().int()
    )  # the lowest first, as on every machine that torch runs on
    table = _table(images.device)
    return torch.nn.functional.embedding(octets, table).view(shape[0], shape[1] * BITS)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The signs of the bits of each byte, the lowest first: float32 [256, 8]."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8)
    return ((bits & 1) * 2 - 1).float().to(device)
