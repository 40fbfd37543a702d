"""The Triton backend: any GPU that Triton compiles for; on the CPU through Triton's interpreter.

One launch writes any run of rows. A table on the device holds the addresses and sizes of each row, and for
each tile of TILE elements the row that it belongs to: a program finds its work by two dependent loads,
however many rows there are (bisection would take nine for ViT-L/14), for four bytes a tile. A run of rows is
a range of tiles, so a write uploads nothing (but numbers that differ from row to row). Rows that differ in
storage types, alignment or order of the noise need different code: each such group has its own table and
launch. Most models are one group.
"""

from __future__ import annotations

import importlib
import threading
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from rft_fast.kernels.contract import BLOCK, Add, Request, Requests
from rft_fast.kernels.resident import Resident, capturing, refuse_capture, refuse_numbers
from rft_fast.kernels.rows import Row, device_of

# Elements and warps of a program: eight elements (two blocks) per thread. Chosen by register counts, not yet
# tuned on the H100 and H200: for sm_90 ptxas reports 28 to 32 registers without noise, 45 to 50 with normals,
# 58 with normals and masks (8, 5 and 4 programs per SM), and no spills; sixteen elements per thread would
# need 90 registers and save 3 % of the instructions.
TILE = 2048
WARPS = 8

# Each product and sum of the formula is rounded on its own, which gives the reference's bits. On sm_90 that
# costs 2 instructions per element, of 49 with normals and of 9 without noise.
FP_FUSION = False

# Of NVIDIA's architectures Triton supports Ampere, the first with bfloat16, and newer.
MIN_CAPABILITY = (8, 0)

_DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Triton's interpreter keeps global state, and two threads should not compile one variant.
_lock = threading.Lock()

# Device and constants of a group -> the forms that have run, hence are compiled and loaded. No other form may
# be launched in a capture.
_ready: dict[tuple[object, ...], set[Form]] = {}


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the module with the kernel, or None and the reason why it is missing."""
    try:
        return importlib.import_module("rft_fast.kernels.triton_kernel"), ""
    except ImportError as error:
        return None, f"Triton cannot be imported ({error}); pip install 'triton>=3.4'"


def _interpreted(kernel: ModuleType) -> bool:
    """Whether TRITON_INTERPRET was set when the kernel was defined."""
    return not isinstance(kernel.write, kernel.triton.JITFunction)


class Form(NamedTuple):
    """The kernel's compile-time constants BASE to BY_ROW, which depend on the request."""

    base: int
    mixed: bool
    noise: str
    factor: str
    interpolated: bool
    fill: str
    by_row: bool = False


def form(write: Request) -> Form:
    """Return what a request compiles to. Requests that differ in numbers only have equal forms."""
    if isinstance(write, Add):
        noise = "operand" if write.scale else "none"
        return Form(1, False, noise, write.weight if write.scale else "none", False, "none")
    interpolated = write.on == "interpolated"
    # Where alpha is 0 in float32, changes of the fine-tuned weights do not reach the output.
    reached = write.base == 1 or write.k != 0
    noisy = write.noisy and (reached or interpolated)
    return Form(
        base=write.base,
        mixed=write.k != 0,
        noise=write.noise if noisy else "none",
        factor="abs" if write.adaptive and noisy else "none",
        interpolated=interpolated and noisy,
        fill=write.fill if write.masked and reached else "none",
    )


def form_by_row(requests: Sequence[Request]) -> Form:
    """The same of requests that differ from row to row: what any of them needs."""
    forms = [form(request) for request in requests]
    of_noise = next((each for each in forms if each.noise != "none"), forms[0])
    fill = next((each.fill for each in forms if each.fill != "none"), "none")
    return of_noise._replace(base=0, mixed=True, fill=fill, by_row=True)


def by_row(request: Request) -> tuple[int, int, int, int]:
    """Return a row's own k, scale, threshold and flags (base 1, noise 2, mask 4), as int32."""
    own, (k, scale, threshold, *_) = form(request), numbers(request)
    words = np.array([k, scale], np.float32).view(np.int32).tolist()
    flags = own.base + 2 * (own.noise != "none") + 4 * (own.fill != "none")
    return words[0], words[1], int(threshold), flags


def numbers(write: Request) -> tuple[float, ...]:
    """Return the kernel's run-time arguments k, scale, threshold, seed_low, seed_high, draw.

    32-bit words are passed as int32: Triton picks an integer's type by its value, and compiles for each.
    """
    if isinstance(write, Add):
        return 0.0, write.scale, 0, 0, 0, 0
    threshold = write.threshold if write.masked else 0
    words = (threshold, write.seed & 0xFFFFFFFF, write.seed >> 32, write.draw)
    return write.k, write.scale, *((word ^ 0x80000000) - 0x80000000 for word in words)


def _place(row: Row) -> tuple[int, ...]:
    """Start, sizes and strides of a place, the outermost first; nothing for rows without one."""
    if row.place is None:
        return ()
    sizes, strides = row.place.padded()
    return (row.place.start, *sizes, *strides)


def _aligned(row: Row) -> bool:
    """Whether each block of four elements can be accessed at once."""
    tensors = (row.out, row.zeroshot, row.finetuned)
    return all(t.data_ptr() % (BLOCK * t.element_size()) == 0 for t in tensors)


class _Group:
    """Rows of the same storage types and alignment, and their table on the device."""

    def __init__(self, rows: Sequence[tuple[int, Row]], kernel: ModuleType, wait: bool) -> None:
        """rows: (index in the whole table, row), none of them empty."""
        sample = rows[0][1]
        dtypes = (sample.out.dtype, sample.zeroshot.dtype, sample.finetuned.dtype)
        language = kernel.triton.language
        placed = sample.place is not None
        self.constants = (*(getattr(language, _DTYPE[d]) for d in dtypes), _aligned(sample), placed)
        self.index = [index for index, _ in rows]
        tiles = np.array([-(-row.size // TILE) for _, row in rows])
        # Row i has the tiles from [i] up to [i + 1].
        self._first_tile = [0, *np.cumsum(tiles).tolist()]
        records = [
            (*(t.data_ptr() for t in (row.out, row.zeroshot, row.finetuned)),
             row.size, row.first_block, first_tile, *_place(row))
            for (_, row), first_tile in zip(rows, self._first_tile, strict=False)
        ]  # fmt: skip
        device = sample.out.device
        self.ready = _ready.setdefault((device, *self.constants), set())
        of_tile = torch.from_numpy(np.arange(len(rows), dtype=np.int32).repeat(tiles))
        self.resident = Resident(device, [of_tile, torch.tensor(records, dtype=torch.int64)], wait)

        self.numbers = self.resident.parts[0]  # never read

    def take_numbers(self, own: torch.Tensor | None) -> None:
        """Copy the numbers of this group's rows to the device. ``own``: int32 [rows of the table, 4]."""
        if own is None:
            self.numbers = self.resident.parts[0]
        else:
            mine = own[self.index].contiguous()
            self.numbers = Resident(self.resident.parts[0].device, [mine], wait=False).parts[0]

    def range(self, first: int, last: int) -> tuple[int, int]:
        """Return the half-open range of this group's tiles among the whole table's rows [first, last)."""
        begin, end = bisect_left(self.index, first), bisect_left(self.index, last)
        return self._first_tile[begin], self._first_tile[end]


class Table:
    """The rows on the device. It holds the tensors, so that their memory outlives it.

    A write launches on the current stream of the tensors' device and waits for nothing. It can be captured in
    a CUDA graph after a write of the same form has run outside (which compiles it); the graph needs the table
    as long as it is replayed.

    Args:
        rows: The rows.
        wait: As for :class:`Resident`.
    """

    def __init__(self, rows: Sequence[Row], wait: bool = True) -> None:
        kernel, missing = _load()
        if kernel is None:
            raise RuntimeError(f"triton: {missing}")
        self._kernel = kernel
        self._interpreted = _interpreted(kernel)
        self._device = device_of(rows)
        refuse_capture("triton", self._device)
        self._keep = [(r.out.detach(), r.zeroshot.detach(), r.finetuned.detach()) for r in rows]
        groups: dict[tuple[object, ...], list[tuple[int, Row]]] = {}
        for index, row in enumerate(rows):
            if row.size > 0:
                dtypes = (row.out.dtype, row.zeroshot.dtype, row.finetuned.dtype)
                groups.setdefault((*dtypes, _aligned(row), row.place is not None), []).append((index, row))
        with _current(self._device):
            self._groups = [_Group(members, kernel, wait) for members in groups.values()]

    def write(self, runs: Sequence[tuple[int, int]], request: Requests) -> None:
        if isinstance(request, Request):
            constants, arguments, own = form(request), numbers(request), None
        else:
            refuse_numbers("triton", self._device)
            constants, arguments = form_by_row(request), numbers(request[0])
            own = torch.tensor([by_row(each) for each in request], dtype=torch.int32)
        with _lock, _current(self._device):
            for group in self._groups:
                group.take_numbers(own)
            for first, last in runs:
                for group in self._groups:
                    begin, end = group.range(first, last)
                    if begin < end:
                        self._launch(group, begin, end, constants, arguments)

    def _launch(
        self, group: _Group, begin: int, end: int, constants: Form, arguments: tuple[float, ...]
    ) -> None:
        if constants not in group.ready and capturing(self._device):
            raise RuntimeError(
                "triton: a write of this form has not run yet, and cannot be compiled while a CUDA "
                "graph is captured; run it once before the capture"
            )
        group.resident.stream()  # records the stream; Triton finds it by itself
        self._kernel.write[(end - begin,)](
            *group.resident.parts, group.numbers, begin, *arguments,
            *group.constants, *constants, TILE, self._interpreted,
            num_warps=WARPS, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        group.ready.add(constants)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make the tensors' device the current one: Triton launches on the current device's stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def why_not(device: torch.device) -> str | None:
    """Why this backend does not work on a device; None where it does."""
    if device.type not in ("cpu", "cuda"):
        return f"it runs on NVIDIA and AMD GPUs; the tensors are on {device}"
    kernel, missing = _load()
    if kernel is None:
        return missing
    if device.type == "cpu":
        if _interpreted(kernel):
            return None
        return (
            "Triton compiles for GPUs only; for tests it can be interpreted on the CPU, slowly: set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    if _interpreted(kernel):
        return "TRITON_INTERPRET is set, but the interpreter cannot reach a GPU's memory; unset it"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < MIN_CAPABILITY:
            return (
                f"Triton needs a GPU of compute capability {'.'.join(map(str, MIN_CAPABILITY))} "
                f"(Ampere) or newer; {device} has {major}.{minor}; impl='reference' works there"
            )
    return None
