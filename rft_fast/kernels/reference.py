"""The reference backend: plain torch on any device. This is the specification.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer arithmetic,
the mapping of its words to noise, and the formula of ``contract``. It is written to be read; the other
backends are written to be fast and must agree with it: random bits, uniforms, masks and interpolations
exactly, normals to 2e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rft_fast.kernels.contract import BLOCK, PURPOSE_MASK, PURPOSE_NOISE, Add, Request, Requests, Write
from rft_fast.kernels.places import Place
from rft_fast.kernels.rows import Row
from rft_fast.names import Noise, Weight, never

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Elements computed at a time, a multiple of BLOCK: temporaries take some 100 bytes per element, and 400 where
# the noise is in another order than that of memory.
CHUNK = 1 << 20


def philox(counter: Sequence[Tensor], seed: int) -> Tensor:
    """Compute Philox4x32-10.

    Args:
        counter: Four int64 tensors [n] of 32-bit words.
        seed: The 64-bit key.

    Returns:
        int64 [n, 4], the words x0 to x3, each in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, which leaves the bits of the unsigned product.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        hi0, lo0 = (p0 >> 32) & MASK32, p0 & MASK32
        hi1, lo1 = (p1 >> 32) & MASK32, p1 & MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return torch.stack((c0, c1, c2, c3), dim=1)


def words(seed: int, block: Tensor, draw: int, purpose: int) -> Tensor:
    """Return the random words of blocks, int64 [n]: int64 [n, 4]."""
    counter = (
        block & MASK32,
        block >> 32,
        torch.full_like(block, draw),
        torch.full_like(block, purpose),
    )
    return philox(counter, seed)


def noise(x: Tensor, kind: Noise) -> Tensor:
    """Map words, int64 [blocks, 4], to noise, float32 [4 * blocks].

    normal: Box-Muller on the pairs (x0, x1) and (x2, x3), computed in float64 and rounded once.
    uniform: 2 (x + 1/2) / 2**32 - 1 as (float32(x - 2**31) + 1/2) / 2**31, exact but for the rounding to
    float32. rademacher: the sign of that uniform, which is the top bit of x.
    """
    if kind == "normal":
        u = (x.to(torch.float64) + 0.5) / 2**32
        radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
        angle = 2 * math.pi * u[:, 1::2]
        pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2)
        return pairs.to(torch.float32).flatten()
    centred = (x - 2**31).flatten()
    if kind == "uniform":
        return (centred.to(torch.float32) + 0.5) * 2.0**-31
    if kind == "rademacher":
        return torch.where(centred >= 0, 1.0, -1.0)
    never(kind)


def _lerp(w0: Tensor, w1: Tensor, write: Write) -> Tensor:
    start = w1 if write.base else w0
    if write.k == 0:  # an end keeps its bits, also where w1 - w0 overflows or -0 would become 0
        return start
    return start + (w1 - w0) * write.k


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory, as a view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def positions(place: Place, index: Tensor) -> Tensor:
    """Return the position of elements, given their int64 index in the order of memory: int64, same shape."""
    found = torch.full_like(index, place.start)
    for size, stride in zip(reversed(place.sizes), reversed(place.strides), strict=True):
        found += index % size * stride
        index = index // size
    return found


def _blocks(row: Row, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the Philox blocks of elements [start, stop), and which of the blocks' words each element has.

    Elements are counted in the order of memory; ``start`` is a multiple of BLOCK.
    """
    element = torch.arange(stop - start, device=row.out.device)
    if row.place is None:
        blocks = torch.arange(start // BLOCK, -(-stop // BLOCK), device=row.out.device)
        return row.first_block + blocks, element
    # A block for each element: finding those that are shared would wait for the device.
    at = positions(row.place, start + element)
    return row.first_block + at // BLOCK, element * BLOCK + at % BLOCK


def _chunk(row: Row, request: Request, start: int, stop: int) -> Tensor:
    """Return out[start:stop] of one row, in the order of memory and in float32."""
    w0 = flat(row.zeroshot)[start:stop].to(torch.float32)
    w1 = flat(row.finetuned)[start:stop].to(torch.float32)
    if isinstance(request, Add):
        if request.scale == 0:
            return w1
        factor = {"none": torch.ones_like(w1), "abs": w1.abs(), "square": w1 * w1}[request.weight]
        return w1 + factor * request.scale * w0
    write = request
    blocks, element = _blocks(row, start, stop)

    def draw(purpose: int, number: int) -> Tensor:
        return words(write.seed, blocks, number, purpose)

    if write.masked:
        kept = draw(PURPOSE_MASK, 0).flatten()[element] < write.threshold
        w1 = torch.where(kept, w1, torch.zeros_like(w1) if write.fill == "zero" else w0)
    if not write.noisy:
        return _lerp(w0, w1, write)
    eps = noise(draw(PURPOSE_NOISE, write.draw), write.noise)[element]

    def perturbed(w: Tensor) -> Tensor:
        return w + (w.abs() * write.scale if write.adaptive else write.scale) * eps

    if write.on == "finetuned":
        return _lerp(w0, perturbed(w1), write)
    return perturbed(_lerp(w0, w1, write))


def _copied(row: Row, request: Request) -> Tensor | None:
    """The source whose bits ``out`` receives unchanged, NaNs included; None where more is computed."""
    if isinstance(request, Add):
        source, plain = row.finetuned, request.scale == 0
    else:
        source = row.finetuned if request.base else row.zeroshot
        plain = request.k == 0 and not request.noisy and not request.masked
    return source if plain and source.dtype == row.out.dtype else None


class Table:
    """The rows themselves: the reference prepares nothing."""

    def __init__(self, rows: Sequence[Row], wait: bool = True) -> None:
        self._rows = list(rows)

    @torch.no_grad()
    def write(self, runs: Sequence[tuple[int, int]], request: Requests) -> None:
        for first, last in runs:
            for index in range(first, last):
                self._write(self._rows[index], request if isinstance(request, Request) else request[index])

    def _write(self, row: Row, request: Request) -> None:
        source = _copied(row, request)
        if source is not None:
            row.out.detach().copy_(source)
            return
        out = flat(row.out)
        for start in range(0, row.size, CHUNK):
            stop = min(start + CHUNK, row.size)
            out[start:stop] = _chunk(row, request, start, stop).to(out.dtype)


@torch.no_grad()
def squares(rows: Sequence[Row], weight: Weight) -> float:
    """Return the sum of ``(factor(finetuned) * zeroshot)**2`` over all rows, computed in float64."""
    norms = []
    for row in rows:
        b, w = row.zeroshot.detach(), row.finetuned.detach()
        if weight != "none":
            b = b.double() * (w.double().abs() if weight == "abs" else w.double().square())
        norms.append(torch.linalg.vector_norm(b, dtype=torch.float64))
    return float(torch.stack(norms).square().sum()) if norms else 0.0  # one wait for the device


def why_not(device: torch.device) -> str | None:
    """Why this backend does not work on a device; None where it does."""
    if device.type == "meta":
        return "meta tensors hold no data: materialise them first (module.to_empty, then load)"
    if device.type == "mps":
        return "its normals are computed in float64, which MPS does not have; move the tensors to the CPU"
    return None
