"""FLOPs and memory: of a callable without running it, of the process, and available on a device."""

from __future__ import annotations

import os
import pathlib
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

_KIB = 1024


@dataclass(frozen=True)
class Reading:
    """What a callable needs, as :func:`measure` determines it.

    Attributes:
        flops: two per multiply-add of matrix products, convolutions and attention, forward and backward;
            biases, norms and other elementwise work are not counted, as is usual.
        peak: most bytes that tensors created inside occupied at once, each storage counted once. Neither
            tensors from outside (weights, inputs) nor workspaces of kernels are counted.
    """

    flops: int
    peak: int


def measure(run: Callable[[], object]) -> Reading:
    """Count FLOPs and peak memory of a callable by fake tensors: nothing is computed or allocated.

    Tensors from outside, such as weights, may be on any device and stay unchanged. Works in inference mode
    and with gradients. Counts the kernels of an eager run; ``nn.MultiheadAttention`` uses its plain
    implementation, because the fused one does not support fake tensors.

    Args:
        run: the callable; its result is dropped.

    Returns:
        FLOPs and peak memory in bytes.

    Raises:
        RuntimeError: ``run`` needs values, as for ``.item()``, uses an operation without shape inference, or
            raises an error itself, which is the cause. To measure it, run it on the device with
            :class:`Peak`.
    """
    with _plain_attention(), FakeTensorMode(allow_non_fake_inputs=True) as fake, _Ledger(fake) as ledger:
        try:
            run()
        except Exception as error:  # fake tensors raise many kinds of errors
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"measure: the callable does not run on fake tensors ({type(error).__name__}: "
                f"{reason}); run it on the device, inside Peak"
            ) from error
    return Reading(ledger.flops, ledger.peak)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs, and the bytes of storages created inside: those alive, and their maximum.

    Not torch's ``FlopCounterMode``, whose module hooks some models do not support, and which counts the
    backward pass of a grouped convolution as a full one. Its formulas are used.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.alive = self.peak = 0
        self._fake = fake
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        # Tensors from outside by id, each with its fake, which must stay alive: views of the tensor then
        # share the fake's storage.
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # flex attention and the like: higher-order operators
        if func in _METADATA_QUERIES:
            return NotImplemented
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # a composite operation: its parts are dispatched here
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func not in _LIFTS:
            args, kwargs = tree_map_only(Tensor, self._stand_in, (args, kwargs))
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        for value in tree_leaves(out):
            if isinstance(value, FakeTensor) and value.layout is torch.strided:
                self._add(value.untyped_storage())
        return out

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Return the fake of a tensor; one from outside counts as seen."""
        # Not left to FakeTensorMode, which would execute in-place operations on a real tensor.
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._before:
            fake: Tensor = self._fake.from_tensor(tensor)
            self._before[id(tensor)] = (tensor, fake)
            if fake.layout is torch.strided:
                self._seen.add(fake.untyped_storage())
        return self._before[id(tensor)][1]

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.alive -= size


def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    output_mask: tuple[bool, bool, bool],
    *,
    out_val: object = None,
) -> int:
    # The gradient of the input and that of the weight each take the multiply-adds of the forward pass.
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return forward * (output_mask[0] + output_mask[1])


_flop_counter: Any = flop_counter  # untyped in some versions


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(_flop_counter.sdpa_flop_count(list(query.shape), list(key.shape), list(value.shape)))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (list(tensor.shape) for tensor in (grad, query, key, value))
    return int(_flop_counter.sdpa_backward_flop_count(*shapes))


_FORMULAS = {
    # torch before 2.15 has formulas for all attention kernels except those of the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
    torch.ops.aten.convolution_backward: _conv_backward,
}
# Constants such as torch.tensor(1.0): created inside, yet real tensors.
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
# Answered by the tensor itself.
_METADATA_QUERIES = {
    torch.ops.aten.sym_is_contiguous.default,
    torch.ops.aten.is_contiguous.default,
    torch.ops.aten.is_contiguous.memory_format,
    torch.ops.aten.is_strides_like_format.default,
    torch.ops.aten.is_non_overlapping_and_dense.default,
    torch.ops.aten.size.default,
    torch.ops.aten.sym_size.default,
    torch.ops.aten.stride.default,
    torch.ops.aten.sym_stride.default,
    torch.ops.aten.storage_offset.default,
    torch.ops.aten.sym_storage_offset.default,
    torch.ops.aten.numel.default,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.dim.default,
    torch.ops.prim.device.default,
    torch.ops.prim.layout.default,
}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable the fused path of ``nn.MultiheadAttention``."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Peak:
    """Peak memory inside a context: ``with Peak(device) as peak: ...``, then ``peak.bytes``.

    On CUDA: most bytes of torch's tensors on the device at once, without the allocator's reserve and other
    libraries. Elsewhere: largest resident size of the process, program and libraries included. The reset on
    entry affects the whole process, so contexts do not nest.

    Args:
        device: whose memory is measured.

    Attributes:
        resets: whether ``bytes`` covers this context alone. Only CUDA and Linux can reset the peak;
            elsewhere, or where Linux forbids it, ``bytes`` is the peak since the process started.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.resets = True
        self._bytes: int | None = None

    def __enter__(self) -> Peak:
        self._bytes = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.resets = _reset_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes = self._now()

    @property
    def bytes(self) -> int:
        """Peak in bytes; inside the context, the peak so far."""
        return self._now() if self._bytes is None else self._bytes

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM") or _peak_since_start()


def _reset_resident() -> bool:
    """Reset Linux's peak resident size; False where that is not possible."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(name: str) -> int | None:
    """Return an entry of /proc/self/status in bytes; None where it is missing."""
    return _entry(pathlib.Path("/proc/self/status"), name)


def _peak_since_start() -> int:
    if sys.platform == "win32":
        return 0  # not known
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB


def resident() -> int:
    """Return the resident size of this process in bytes; its peak where the system reports only that."""
    return _status("VmRSS") or _peak_since_start()


def available(device: torch.device | str) -> int:
    """Return the bytes that can still be allocated on a device.

    On CUDA: free memory plus the unused reserve of torch's allocator. On the CPU under Linux: what the kernel
    estimates to be available without swapping, at most what the limits of control groups (versions 1 and 2)
    leave; the page cache counts as free. On other systems: all memory of the machine.

    Args:
        device: a CUDA device or the CPU.

    Raises:
        RuntimeError: the system does not report its memory.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _available(pathlib.Path("/"))


def _available(root: pathlib.Path) -> int:
    """Return the bytes available on the CPU; ``root`` is that of the file system."""
    free = _entry(root / "proc/meminfo", "MemAvailable")
    if free is None:
        if not hasattr(os, "sysconf"):
            raise RuntimeError("available: this system does not report its free memory; set a limit instead")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([free, *_left_to_groups(root)]))


def _left_to_groups(root: pathlib.Path) -> Iterator[int]:
    """Yield what each control group above this process leaves it, in bytes; limits hold at every level."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # A container often sees its own group as the root, whatever its name.
        here = top / group.strip("/")
        while True:
            if (left := _left(here, *names)) is not None:
                yield left
            if here == top or top not in here.parents:
                break
            here = here.parent


def _left(group: pathlib.Path, limit: str, used: str, prefix: str) -> int | None:
    """Return what one control group leaves, page cache included; None without a limit."""
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        if most == "max":
            return None
        cached = sum(_entry(group / "memory.stat", f"{prefix}{kind}_file", 1) or 0 for kind in _CACHED)
        return int(most) - now + cached
    except (OSError, ValueError):
        return None


_CACHED = ("active", "inactive")


def _entry(file: pathlib.Path, name: str, unit: int = _KIB) -> int | None:
    """Return the number after a name in a table of the kernel, times ``unit``; None where it is missing."""
    try:
        text = file.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, *values = line.replace(":", " ").split() or [""]
        if key == name and values:
            return int(values[0]) * unit
    return None
