"""The native backend, ``csrc/`` through raw pointers: C++ on the CPU, CUDA on NVIDIA GPUs."""

from __future__ import annotations

import pathlib
import platform
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rft_fast.kernels import reference
from rft_fast.kernels.contract import Add, Request, Requests
from rft_fast.kernels.resident import Resident, refuse_capture, refuse_numbers
from rft_fast.kernels.rows import Row, device_of
from rft_fast.names import Weight

# Equals VERSION in csrc/bindings.cpp; both change whenever the two sides must change together.
VERSION = 5

_REBUILD = "rebuild it from the sources: pip install --force-reinstall --no-deps ."


def _load() -> tuple[ModuleType | None, str]:
    """Return the compiled module, or None and the reason why it is missing."""
    try:
        import rft_fast._native as module
    except ImportError as error:
        return (
            None,
            f"no compiled module: {why_missing(error, pathlib.Path(__file__).parents[1])}; {_REBUILD}",
        )
    if module.VERSION != VERSION:
        return None, (
            f"the compiled module has version {module.VERSION}, this package needs {VERSION}: it was "
            f"built from other sources than the Python files; {_REBUILD}"
        )
    return module, ""


def why_missing(error: ImportError, package: pathlib.Path) -> str:
    """Explain why a package has no compiled module.

    Args:
        error: The error of importing it.
        package: Folder of the package.

    Returns:
        The reason, and what to do before it is built again.
    """
    if not isinstance(
        error, ModuleNotFoundError
    ):  # it exists, but was built for another C library, for example
        return f"it cannot be loaded on this machine ({error})"
    note = package / "_native_missing.txt"
    if note.is_file():
        return note.read_text(errors="replace").strip()
    if others := sorted(file.name for file in package.glob("_native.*") if file.suffix in (".so", ".pyd")):
        return f"{', '.join(others)} in {package} was built for another Python than this one, {_python()}"
    return f"{package} was never built: its files were copied or cloned, not installed"


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"


_native, _missing = _load()

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOISE = {"normal": 1, "uniform": 2, "rademacher": 3}
_OPERAND = 4  # what is added is read from the zero-shot end
_WEIGHT = {"none": 0, "abs": 1, "square": 2}

# GPUs on which every kernel has been loaded.
_usable: set[torch.device] = set()


def as_entry(row: Row) -> tuple[int, ...]:
    """Return a row as the compiled module takes it: 8 integers, and those of a place as 8 more."""
    tensors = (row.out, row.zeroshot, row.finetuned)
    pointers, dtypes = (t.data_ptr() for t in tensors), (_DTYPE[t.dtype] for t in tensors)
    entry = (*pointers, *dtypes, row.size, row.first_block)
    if row.place is None:
        return entry
    sizes, strides = row.place.padded()
    return (*entry, row.place.start, *sizes[1:], *strides)  # the outermost size follows from the row's


def as_numbers(request: Request) -> tuple[object, ...]:
    """Return the arguments of the compiled module's ``Element``."""
    if isinstance(request, Add):
        noise, weight = (_OPERAND if request.scale else 0), _WEIGHT[request.weight]
        return 1, 0.0, noise, request.scale, weight, False, False, 0, False, 0, 0
    return (
        request.base,
        request.k,
        _NOISE[request.noise] if request.noisy else 0,
        request.scale,
        int(request.adaptive),
        request.on == "interpolated",
        request.masked,
        request.threshold if request.masked else 0,
        request.fill == "zeroshot",
        request.seed,
        request.draw,
    )


class Table:
    """Raw pointers of the rows. It holds the tensors, so that their memory outlives it.

    On a GPU the rows lie on the device. A write is one launch per run on the current stream of the tensors'
    device and waits for nothing. It may be captured in a CUDA graph, which needs the table as long as it is
    replayed.

    Args:
        rows: The rows.
        wait: As for :class:`Resident`.
    """

    def __init__(self, rows: Sequence[Row], wait: bool = True) -> None:
        if _native is None:
            raise RuntimeError(f"native: {_missing}")
        self._device = device_of(rows)
        refuse_capture("native", self._device)
        self._keep = [(r.out.detach(), r.zeroshot.detach(), r.finetuned.detach()) for r in rows]
        self._element = _native.Element
        entries = [as_entry(row) for row in rows]
        if self._device.type == "cuda":
            self._table = _native.CudaTable(entries)
            self._resident = Resident(self._device, [as_bytes(self._table)], wait)
        else:
            self._table = _native.Table(entries)

    def write(self, runs: Sequence[tuple[int, int]], request: Requests, isa: str = "") -> None:
        """Write runs of rows. ``isa``: instruction set of the CPU, for tests; empty: the fastest one here."""
        given = [request] if isinstance(request, Request) else request
        elements = [self._element(*as_numbers(each)) for each in given]
        if self._device.type != "cuda":
            self._table.write(runs, elements, torch.get_num_threads(), isa)
            return
        if len(elements) > 1:
            refuse_numbers("native", self._device)
            # Freed on return: torch does not reuse it before the work launched on this stream is done.
            numbers = Resident(self._device, [as_bytes(self._table, elements)], wait=False)
        memory, stream = self._resident.parts[0].data_ptr(), self._resident.stream()
        index, own = self._device.index, numbers.parts[0].data_ptr() if len(elements) > 1 else 0
        with torch.cuda.device(index):  # does not switch back to a device without a context
            self._table.write(memory, runs, elements, own, index, stream)


def squares(rows: Sequence[Row], weight: Weight) -> float:
    """As :func:`reference.squares`, which it calls on a GPU: torch's sums are as fast as memory there."""
    if device_of(rows).type != "cpu" or _native is None:
        return reference.squares(rows, weight)
    table = _native.Table([as_entry(row) for row in rows])
    return float(table.squares(_WEIGHT[weight], torch.get_num_threads()))


def as_bytes(table: Any, elements: Sequence[Any] = ()) -> Tensor:
    """Return a ``CudaTable`` as on the device, or the numbers of its rows: uint8 [bytes], on the host."""
    if elements:
        found = torch.empty(table.number_bytes, dtype=torch.uint8)
        table.fill_numbers(found.data_ptr(), elements)
    else:
        found = torch.empty(table.bytes, dtype=torch.uint8)
        table.fill(found.data_ptr())
    return found


def isas() -> list[str]:
    """Instruction sets that this build and this machine share; the last one is used."""
    return [] if _native is None else list(_native.isas())


def _why_not_on(module: ModuleType, index: int) -> str:
    """Why the kernels do not run on a GPU, in CUDA's words; empty where they do."""
    try:
        with torch.cuda.device(index):
            return str(module.why_not_cuda(index))
    except (RuntimeError, AssertionError) as error:  # without a driver, or in a torch without CUDA
        return str(error).partition("\n")[0]


def why_not(device: torch.device) -> str | None:
    """Why this backend does not work on a device; None where it does."""
    if _native is None:
        return _missing
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the compiled module runs on CPUs and NVIDIA GPUs; the tensors are on {device}"
    if not _native.CUDA:
        note = pathlib.Path(__file__).parents[1] / "_cuda_missing.txt"
        reason = note.read_text(errors="replace").strip() if note.is_file() else "it was built without CUDA"
        return (
            f"no CUDA kernels: {reason}; reinstall where nvcc is on the PATH: "
            "RFT_CUDA=1 pip install --force-reinstall --no-deps ."
        )
    if device in _usable:
        return None
    reason = _why_not_on(_native, device.index or 0)
    if reason:
        return (
            f"CUDA says of {device}: {reason} (if no kernel image fits the device, reinstall with "
            "RFT_CUDA_ARCH set to its compute capability, e.g. 90)"
        )
    _usable.add(device)
    return None
