"""The backends in one frozen table, and the choice among them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from rft_fast.kernels import native, reference, triton
from rft_fast.kernels.contract import Requests
from rft_fast.kernels.rows import Row
from rft_fast.names import IMPLS, Impl, Weight


class Table(Protocol):
    """A backend's own form of the rows, made once. Several threads may call ``write``."""

    def write(self, runs: Sequence[tuple[int, int]], request: Requests) -> None: ...


@dataclass(frozen=True)
class Backend:
    """A backend, as one line of the table.

    Attributes:
        name: As in ``impl=``.
        what: Description for people.
        why_not: Device -> None where the backend works, else the reason and the remedy.
        table: ``table(rows, wait=True)`` makes a table; with ``wait`` it may be written from any stream,
            otherwise from the current one alone.
        squares: ``squares(rows, weight)`` is the sum of ``(factor(finetuned) * zeroshot)**2`` in float64.
        on_request: Device types on which only an explicit ``impl=`` selects it, never "auto".
    """

    name: Impl
    what: str
    why_not: Callable[[torch.device], str | None]
    table: Callable[..., Table]
    squares: Callable[[Sequence[Row], Weight], float] = reference.squares
    on_request: tuple[str, ...] = ()

    def write(self, rows: Sequence[Row], request: Requests) -> None:
        """Write all rows once, on the current stream, without waiting."""
        self.table(rows, False).write(((0, len(rows)),), request)


_ALL = (
    Backend("native", "C++ (CPU) and CUDA (NVIDIA GPUs)", native.why_not, native.Table, native.squares),
    Backend(
        "triton",
        "Triton (NVIDIA and AMD GPUs)",
        triton.why_not,
        triton.Table,
        on_request=("cpu",),  # where it is interpreted, for tests
    ),
    Backend(
        "reference",
        "plain torch, the specification (any device)",
        reference.why_not,
        reference.Table,
    ),
)

# In the order in which "auto" prefers them, as in IMPLS.
BACKENDS = MappingProxyType({backend.name: backend for backend in _ALL})

_warned: set[str] = set()


def check_name(impl: str) -> None:
    """Raise ValueError for a name that no backend has."""
    if impl not in IMPLS:
        raise ValueError(f"write: impl must be one of {', '.join(IMPLS)}; got {impl!r}")


def pick(impl: Impl, device: torch.device) -> Backend:
    """Return the backend of a name; for "auto" the fastest one that works on the device.

    "auto" warns once per type of device when only the reference is left.

    Args:
        impl: Name of a backend, or "auto".
        device: Device of the tensors.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend does not work here; the message names the reason and the remedy.
    """
    check_name(impl)
    reasons: list[str] = []
    for backend in BACKENDS.values():
        if impl not in ("auto", backend.name):
            continue
        if impl == "auto" and device.type in backend.on_request:
            continue
        reason = backend.why_not(device)
        if reason is None:
            if reasons and backend.name == "reference":
                _warn_slow(device, reasons)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"write: no backend for {device} with impl={impl!r}. " + "; ".join(reasons))


def _warn_slow(device: torch.device, reasons: list[str]) -> None:
    if device.type in _warned:
        return
    _warned.add(device.type)
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].startswith("rft_fast."):  # show the caller's line
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"rft_fast: using the slow reference backend on {device.type}. " + "; ".join(reasons),
        RuntimeWarning,
        stacklevel=level,
    )
