"""The native backend: ``csrc/`` through raw pointers. C++ on the CPU, CUDA on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from types import ModuleType
from typing import TypeVar

import torch

from rft_fast.kernels.contract import Row, Write, device_of, refuse_capture

T = TypeVar("T")

# Changed together with VERSION in csrc/bindings.cpp whenever the two sides must change together.
VERSION = 3

_REMEDY = (
    "reinstall where a C++17 compiler (g++ or clang++) is on the PATH: "
    "pip install --force-reinstall --no-deps ."
)


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why there is none."""
    try:
        import rft_fast._native as module
    except ImportError as error:
        note = resources.files("rft_fast") / "_native_missing.txt"
        reason = note.read_text() if note.is_file() else f"it cannot be imported ({error})"
        return None, f"no compiled module: {reason}; {_REMEDY}"
    if module.VERSION != VERSION:
        return None, (
            f"the compiled module has version {module.VERSION}, this package needs {VERSION}; " + _REMEDY
        )
    return module, ""


_native, _missing = _load()

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOISE = {"normal": 1, "uniform": 2, "rademacher": 3}

# The GPUs on which every kernel has been loaded.
_usable: set[torch.device] = set()


def as_entry(row: Row) -> tuple[int, ...]:
    """A row as the compiled module takes it."""
    tensors = (row.out, row.zeroshot, row.finetuned)
    pointers, dtypes = (t.data_ptr() for t in tensors), (_DTYPE[t.dtype] for t in tensors)
    return (*pointers, *dtypes, row.size, row.first_block)


def as_numbers(write: Write) -> tuple[object, ...]:
    """The arguments of the compiled module's ``Element``."""
    return (
        write.base,
        write.k,
        _NOISE[write.noise] if write.noisy else 0,
        write.scale,
        write.adaptive,
        write.on == "interpolated",
        write.masked,
        write.threshold if write.masked else 0,
        write.fill == "zeroshot",
        write.seed,
        write.draw,
    )


class Table:
    """Raw pointers of the rows. The tensors are kept, so their memory outlives the table.

    On a GPU the rows lie on the device, in memory of the table's own. A write then is one launch per run on
    the current stream of the tensors' device, waits for nothing, and may be captured in a CUDA graph, which
    needs the table alive as long as it is replayed.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        if _native is None:
            raise RuntimeError(f"native: {_missing}")
        self._device = device_of(rows)
        refuse_capture("native", self._device)
        self._keep = [(r.out.detach(), r.zeroshot.detach(), r.finetuned.detach()) for r in rows]
        self._element = _native.Element
        entries = [as_entry(row) for row in rows]
        if self._device.type == "cuda":
            self._table = with_memory(partial(_native.CudaTable, entries, self._device.index))
        else:
            self._table = _native.Table(entries)

    def write(self, runs: Sequence[tuple[int, int]], write: Write, isa: str = "") -> None:
        """isa: the CPU's instruction set, for tests; empty: the fastest that this machine has."""
        element = self._element(*as_numbers(write))
        if self._device.type == "cuda":
            self._table.write(runs, element, torch.cuda.current_stream(self._device).cuda_stream)
        else:
            self._table.write(runs, element, torch.get_num_threads(), isa)


def write_once(rows: Sequence[Row], write: Write) -> None:
    """As ``Table(rows).write`` of all rows; on a GPU it waits for nothing, as ``Table`` does."""
    device = device_of(rows)
    if device.type != "cuda" or _native is None:
        Table(rows).write(((0, len(rows)),), write)
        return
    refuse_capture("native", device)
    entries, element = [as_entry(row) for row in rows], _native.Element(*as_numbers(write))
    stream = torch.cuda.current_stream(device).cuda_stream
    with_memory(partial(_native.write_once, entries, element, device.index, stream))


def with_memory(call: Callable[[], T]) -> T:
    """A call that allocates memory of CUDA's own. Raises RuntimeError with CUDA's own words."""
    try:
        return call()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
    torch.cuda.empty_cache()  # what torch keeps for its next tensors, nobody else can have
    return call()


def isas() -> list[str]:
    """The instruction sets that this build and this machine share, the one in use last."""
    return [] if _native is None else list(_native.isas())


def why_not(device: torch.device) -> str | None:
    if _native is None:
        return _missing
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the compiled module runs on CPUs and NVIDIA GPUs; the tensors are on {device}"
    if not _native.CUDA:
        note = resources.files("rft_fast") / "_cuda_missing.txt"
        reason = note.read_text() if note.is_file() else "it was built without CUDA"
        return (
            f"no CUDA kernels: {reason}; reinstall where nvcc is on the PATH: "
            "RFT_CUDA=1 pip install --force-reinstall --no-deps ."
        )
    if device in _usable:
        return None
    reason = _native.why_not_cuda(device.index or 0)
    if reason:
        return (
            f"CUDA says of {device}: {reason} (if no kernel image fits the device, reinstall with "
            "RFT_CUDA_ARCH set to its compute capability, e.g. 90)"
        )
    _usable.add(device)
    return None
