"""The native backend: ``csrc/`` through raw pointers. C++ on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from types import ModuleType

import torch

from rft_fast.kernels.contract import Row, Write

# Changed together with VERSION in csrc/bindings.cpp whenever the two sides must change together.
VERSION = 1

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


class Table:
    """Raw pointers of the rows. The tensors are kept, so their memory outlives the table."""

    def __init__(self, rows: Sequence[Row]) -> None:
        if _native is None:
            raise RuntimeError(f"native: {_missing}")
        self._keep = [(r.out.detach(), r.zeroshot.detach(), r.finetuned.detach()) for r in rows]
        self._element = _native.Element
        self._table = _native.Table(
            [
                (
                    *(t.data_ptr() for t in tensors),
                    *(_DTYPE[t.dtype] for t in tensors),
                    row.size,
                    row.first_block,
                )
                for row, tensors in zip(rows, self._keep, strict=True)
            ]
        )

    def write(self, runs: Sequence[tuple[int, int]], write: Write, isa: str = "") -> None:
        """isa: the instruction set, for tests; empty: the fastest that this machine has."""
        element = self._element(
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
        self._table.write(runs, element, torch.get_num_threads(), isa)


def isas() -> list[str]:
    """The instruction sets that this build and this machine share, the one in use last."""
    return [] if _native is None else list(_native.isas())


def why_not(device: torch.device) -> str | None:
    if _native is None:
        return _missing
    if device.type != "cpu":
        return f"the compiled module runs on the CPU only; the tensors are on {device}"
    return None
