"""The kernel contract: what one write means, and which requests are refused.

Every backend computes, for each element, in float32 whatever the storage types::

    w1  = finetuned if kept else fill              kept: mask word < round(keep * 2**32)
    on = finetuned:     w1 += (sign * rho) * (|w1| or 1) * eps ;  out = lerp(w0, w1, alpha)
    on = interpolated:  v = lerp(w0, w1, alpha) ;  out = v + (sign * rho) * (|v| or 1) * eps

and nothing else. ``Write`` holds the numbers of one such request, ``Row`` the three tensors of one table
entry. Both are validated when they are made, so that backends check nothing.

The ends of lerp are exact: alpha = 0 gives the bits of zeroshot, alpha = 1 those of finetuned. A NaN in half
precision stays a NaN; its other bits may change on the way through float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import c_float
from dataclasses import dataclass, field, fields
from operator import index

import numpy as np
import torch
from torch import Tensor

from rft_fast.names import FILL, NOISE, ON, Fill, Noise, On

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The last word of the Philox counter: noise, mask and signs of images never share a random bit.
PURPOSE_NOISE = 0
PURPOSE_MASK = 1
PURPOSE_SIGN = 2

# Consecutive elements served by one Philox block of four words.
BLOCK = 4

# A seed has 64 bits, a draw number 32.
SEEDS, DRAWS = 2**64, 2**32

FLOAT32_MAX = float(np.finfo(np.float32).max)


def _choice(name: str, value: object, offered: Sequence[str]) -> None:
    if value not in offered:
        raise ValueError(f"write: {name} must be one of {', '.join(offered)}; got {value!r}")


def _whole(name: str, value: object, limit: int) -> int:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
        raise TypeError(f"write: {name} must be an integer; got {value!r} of type {type(value).__name__}")
    if not 0 <= value < limit:
        raise ValueError(f"write: {name} must lie in [0, 2**{limit.bit_length() - 1}); got {value}")
    return int(value)


def _float32(number: float) -> float:
    """Same as ``float(np.float32(number))`` in a quarter of the time; every write needs two of these."""
    return c_float(number).value


def _finite(name: str, value: object) -> float:
    try:
        if isinstance(value, (str, bytes, bytearray)):  # float() would read "0.5"
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(
            f"write: {name} must be a number; got {value!r} of type {type(value).__name__}"
        ) from None
    except OverflowError:  # an integer or a fraction, perhaps with too many digits to show
        raise ValueError(f"write: {name} must be finite in float32; got a number beyond float64") from None
    # Beyond float32 the kernels would compute with infinity.
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError(f"write: {name} must be finite in float32; got {number}")
    return number


@dataclass(frozen=True)
class Write:
    """The numbers of one write, validated. All functions that write take these.

    Args:
        alpha: Position on the path: 0 is zero-shot, 1 is fine-tuned. Any finite number; outside [0, 1] the
            write extrapolates. (The paper's formulas write the mirrored alpha, its figures this one.)
        rho: Noise scale, finite and >= 0; 0 adds no noise (rho of Eq. 3).
        on: Weights that the noise is added to: "finetuned", before they are interpolated (Sec. 3.1), or
            "interpolated", after it (Eq. 3).
        keep: Probability, in [0, 1], that a fine-tuned weight survives the Bernoulli mask of Algorithm 1; 1
            masks nothing.
        fill: Value of a masked fine-tuned weight: "zero", or "zeroshot" for its zero-shot value.
        noise: Distribution of the noise: "normal" (mean 0, variance 1), "uniform" on (-1, 1), or "rademacher"
            (-1 or 1).
        adaptive: Scale the noise by the magnitude of each weight; False: by rho alone.
        seed: Key of the random generator, an integer in [0, 2**64). Decides the noise and the mask.
        draw: Number of the noise draw, an integer in [0, 2**32). All draws of a seed have the same mask.
        sign: 1, or -1 for the opposite noise (antithetic pairs).

    Raises:
        TypeError: A number has the wrong type; the message names it.
        ValueError: A number is out of range; the message names it.
    """

    alpha: float
    rho: float = 0.0
    on: On = "finetuned"
    keep: float = 1.0
    fill: Fill = "zero"
    noise: Noise = "normal"
    adaptive: bool = True
    seed: int = 0
    draw: int = 0
    sign: int = 1

    # Derived once, so that all backends start from the same float32 values.

    scale: float = field(init=False, repr=False)
    """sign * rho, rounded to float32."""

    threshold: int = field(init=False, repr=False)
    """A weight is kept when its mask word is below this (2**32: always)."""

    base: int = field(init=False, repr=False)
    k: float = field(init=False, repr=False)
    """``lerp(w0, w1) = (w1 if base else w0) + (w1 - w0) * k``, k rounded to float32.

    The nearer end is the base, as in torch.lerp, which makes both ends exact: base 0 with k = alpha below
    1/2, else base 1 with k = alpha - 1. k = 0 copies the bits of the base.
    """

    noisy: bool = field(init=False, repr=False)
    """Whether noise reaches the output; at alpha = 0, noise on the fine-tuned weights does not."""

    masked: bool = field(init=False, repr=False)
    """Whether any weight can be masked and the mask reaches the output."""

    def __post_init__(self) -> None:
        alpha, rho = _finite("alpha", self.alpha), _finite("rho", self.rho)
        keep = _finite("keep", self.keep)
        if rho < 0:
            raise ValueError(f"write: rho must be >= 0; got {rho} (for the opposite draw pass sign=-1)")
        if not 0 <= keep <= 1:
            raise ValueError(f"write: keep is a probability in [0, 1]; got {keep}")
        _choice("on", self.on, ON)
        _choice("fill", self.fill, FILL)
        _choice("noise", self.noise, NOISE)
        if not isinstance(self.adaptive, (bool, np.bool_)):
            raise TypeError(f"write: adaptive must be True or False; got {self.adaptive!r}")
        if self.sign not in (1, -1):
            raise ValueError(f"write: sign must be +1 or -1; got {self.sign!r}")
        threshold = round(keep * 2**32)
        base = 0 if alpha < 0.5 else 1
        self.__dict__.update(  # faster than object.__setattr__ for each: a layer-wise study makes thousands
            alpha=alpha,
            rho=rho,
            keep=keep,
            adaptive=bool(self.adaptive),
            sign=int(self.sign),
            seed=_whole("seed", self.seed, SEEDS),
            draw=_whole("draw", self.draw, DRAWS),
            scale=_float32(self.sign * rho),
            threshold=threshold,
            base=base,
            k=_float32(alpha - base),
            noisy=rho > 0 and not (self.on == "finetuned" and alpha == 0),
            masked=threshold < 2**32 and alpha != 0,
        )


# In the order of every function's arguments.
WRITE_ARGUMENTS = tuple(f.name for f in fields(Write) if f.init)


@dataclass(frozen=True)
class Row:
    """One entry of a table: three tensors of equal shape, and the Philox block at which its noise starts."""

    out: Tensor
    zeroshot: Tensor
    finetuned: Tensor
    first_block: int
    name: str

    @property
    def size(self) -> int:
        return self.out.numel()


def device_of(rows: Sequence[Row]) -> torch.device:
    """Return the device of a table's rows; the CPU for an empty table."""
    return rows[0].out.device if rows else torch.device("cpu")


def as_list(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return one tensor or an iterable of tensors as a list; raises TypeError for anything else."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):
        raise TypeError(
            f"write: {name} must be a torch.Tensor or several in a list; got {type(tensors).__name__}"
        )
    listed = list(tensors)
    for place, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"write: {name}[{place}] must be a torch.Tensor; got {type(tensor).__name__}")
    return listed


def first_blocks(tensors: Sequence[Tensor]) -> list[int]:
    """Return the Philox block at which the noise of each tensor starts: each tensor starts a new block."""
    starts, block = [], 0
    for tensor in tensors:
        starts.append(block)
        block += -(-tensor.numel() // BLOCK)
    return starts


def make_rows(
    out: Tensor | Iterable[Tensor],
    zeroshot: Tensor | Iterable[Tensor],
    finetuned: Tensor | Iterable[Tensor],
    names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> list[Row]:
    """Check the tensors of a table and assign their noise.

    Args:
        out, zeroshot, finetuned: The tensors, as for :func:`rft_fast.write_`.
        names: What error messages call the tensors; None: "tensor 0", "tensor 1" ...
        blocks: Philox block at which the noise of each tensor starts; None: one tensor after the other from
            0.

    Raises:
        TypeError: A dtype is not offered, or something is not a tensor.
        ValueError: Tensors differ in shape or device, are not contiguous, overlap, or have freed memory.
    """
    rows = lay_out(out, zeroshot, finetuned, names, blocks)
    for row in rows:
        _check_memory(row)
    _check_overlap(rows)
    return rows


def lay_out(
    out: Tensor | Iterable[Tensor],
    zeroshot: Tensor | Iterable[Tensor],
    finetuned: Tensor | Iterable[Tensor],
    names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> list[Row]:
    """As :func:`make_rows`, without the checks of memory: for tensors that have no addresses."""
    outs, w0s, w1s = (
        as_list("out", out),
        as_list("zeroshot", zeroshot),
        as_list("finetuned", finetuned),
    )
    if not len(outs) == len(w0s) == len(w1s):
        raise ValueError(
            "write: out, zeroshot and finetuned must hold equally many tensors; "
            f"got {len(outs)}, {len(w0s)} and {len(w1s)}"
        )
    if names is not None and len(names) != len(outs):
        raise ValueError(f"write: {len(outs)} tensors but {len(names)} names")
    labels = [f"tensor {i}" for i in range(len(outs))] if names is None else list(names)
    starts = first_blocks(outs) if blocks is None else blocks
    rows = [Row(*row) for row in zip(outs, w0s, w1s, starts, labels, strict=True)]
    for row in rows:
        _check_row(row, rows[0].out.device)
    return rows


def _roles(row: Row) -> tuple[tuple[str, Tensor], ...]:
    return ("out", row.out), ("zeroshot", row.zeroshot), ("finetuned", row.finetuned)


def _check_row(row: Row, device: torch.device) -> None:
    for role, tensor in _roles(row):
        if tensor.dtype not in DTYPES:
            offered = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(
                f"write: {role} of {row.name} is {tensor.dtype}; offered are {offered}. "
                "Convert it with .float(), or copy it instead of interpolating"
            )
        if tensor.layout is not torch.strided or not tensor.is_contiguous() or tensor.is_neg():
            raise ValueError(
                f"write: {role} of {row.name}, shape {tuple(tensor.shape)}, is not contiguous "
                f"(layout {tensor.layout}); pass .contiguous() memory, for a module "
                ".to(memory_format=torch.contiguous_format)"
            )
        if tensor.device != device:
            raise ValueError(
                f"write: all tensors must lie on one device; {role} of {row.name} is on "
                f"{tensor.device}, the first output on {device}"
            )
        if tensor.shape != row.out.shape:
            raise ValueError(
                f"write: shapes differ for {row.name}: out {tuple(row.out.shape)}, "
                f"{role} {tuple(tensor.shape)}"
            )


def _check_memory(row: Row) -> None:
    for role, tensor in _roles(row):
        if lacks_memory(tensor):
            raise ValueError(
                f"write: {role} of {row.name}, shape {tuple(tensor.shape)}, lies beyond its storage of "
                f"{tensor.untyped_storage().nbytes()} bytes, which was freed or cut short (as FSDP does "
                "between uses); gather the full tensor first"
            )


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a contiguous tensor extends beyond its storage (``untyped_storage().resize_`` shrinks it)."""
    size = tensor.numel()
    end = (tensor.storage_offset() + size) * tensor.element_size()
    return size > 0 and bool(end > tensor.untyped_storage().nbytes())


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype


def _check_overlap(rows: Sequence[Row]) -> None:
    """Refuse outputs that share memory with anything but their own source, which would be read too late."""
    if rows and rows[0].out.device.type == "meta":
        return
    spans: list[tuple[int, int, bool, str]] = []  # first byte, end, is an output, what
    for row in rows:
        if row.size == 0:
            continue
        spans.append((*_span(row.out), True, f"out of {row.name}"))
        for role, source in (("zeroshot", row.zeroshot), ("finetuned", row.finetuned)):
            if not _is_same(source, row.out):
                spans.append((*_span(source), False, f"{role} of {row.name}"))
    spans.sort()
    # Sweep by address: of the earlier spans, only the furthest output and the furthest span matter.
    any_end, any_what, out_end, out_what = -1, "", -1, ""
    for start, end, is_out, what in spans:
        reach, other = (any_end, any_what) if is_out else (out_end, out_what)
        if start < reach:
            raise ValueError(
                f"write: {what} overlaps {other} in memory; an output may be its own source, "
                "but share no other byte. Give it storage of its own, e.g. .clone()"
            )
        if end > any_end:
            any_end, any_what = end, what
        if is_out and end > out_end:
            out_end, out_what = end, what


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def check_runs(runs: Iterable[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """Check half-open (first, last) ranges of table rows and return them in ascending order.

    Args:
        runs: Ranges in any order; empty ones are allowed.
        rows: Rows of the table.

    Raises:
        TypeError: ``runs`` is not a list of pairs of integers.
        ValueError: A range lies outside the table, or two overlap.
    """
    try:
        found = sorted([(index(first), index(last)) for first, last in runs])
    except (TypeError, ValueError):
        raise TypeError(
            f"write: tensors must be a list of runs, each a pair of integers (first, last); got {runs!r}"
        ) from None
    before = (0, 0)
    for first, last in found:
        if not 0 <= first <= last <= rows:
            raise ValueError(f"write: run ({first}, {last}) is outside the table's {rows} tensors")
        if first == last:
            continue
        if first < before[1]:  # the second write of a row in place would start from the first one's
            raise ValueError(f"write: runs {before} and ({first}, {last}) overlap; name each tensor once")
        before = (first, last)
    return found
