"""What a callable costs: its FLOPs and peak memory without running it, and the peak of one that runs."""

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
    """What :func:`measure` found.

    flops: two per multiply-add of matrix products, convolutions and attention, forward and backward;
        additions of biases, norms and other elementwise work are not counted, as is usual.
    peak: the most bytes that tensors made inside held at once, each storage once, however many views of it
        there are. Not in it: what was there before (weights, inputs), and what kernels take for themselves.
    """

    flops: int
    peak: int


def measure(run: Callable[[], object]) -> Reading:
    """Calls ``run`` with tensors that have shapes but no values: nothing is computed, nothing is allocated.

    Tensors that ``run`` finds, such as weights, may lie on any device and stay as they are. Works under
    inference mode and with gradients. The kernels that are assumed are those of an eager run;
    ``nn.MultiheadAttention`` takes its plain path meanwhile, since its fused one knows no such tensors.

    Raises RuntimeError where ``run`` cannot do without values, as in ``.item()``, or calls an operation that
    does not tell the shape of its results; running it on the device is the only way then. Also
    RuntimeError for an error of ``run`` itself; the original is its cause.
    """
    with _plain_attention(), FakeTensorMode(allow_non_fake_inputs=True) as fake, _Ledger(fake) as ledger:
        try:
            run()
        except Exception as error:  # fake tensors refuse in many ways
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"measure: this cannot run on tensors without values ({type(error).__name__}: {reason}); "
                "run it for real and read Peak"
            ) from error
    return Reading(ledger.flops, ledger.peak)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs, and the bytes of the storages that were made inside: those alive, and their maximum.

    Not torch's own ``FlopCounterMode``: it follows modules by hooks that some models do not bear, and takes
    the backward pass of a grouped convolution for that of a full one. Its formulas are used.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.alive = self.peak = 0
        self._fake = fake
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        # What was there before, by identity, with its stand-in: as long as that lives, views of it share a
        # storage that is known.
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # flex attention and the like: a kernel of its own
        if func in _METADATA_QUERIES:
            return NotImplemented
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # an operation that is made of others, which come here in turn
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
        # Not left to the mode below, which would really compute what changes a real tensor in place.
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
    wanted: tuple[bool, bool, bool],
    *,
    out_val: object = None,
) -> int:
    # The gradient of the input and that of the weight each take the multiply-adds of the forward pass.
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return forward * (wanted[0] + wanted[1])


_TORCHS: Any = flop_counter  # untyped in some versions


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(_TORCHS.sdpa_flop_count(list(query.shape), list(key.shape), list(value.shape)))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (list(tensor.shape) for tensor in (grad, query, key, value))
    return int(_TORCHS.sdpa_backward_flop_count(*shapes))


_FORMULAS = {
    # torch before 2.15 knows all attention kernels but those of the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
    torch.ops.aten.convolution_backward: _conv_backward,
}
# Constants such as torch.tensor(1.0), made inside although they come as real tensors.
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
# The tensor answers these itself.
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
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Peak:
    """Peak memory of a stretch of the run: ``with Peak(device) as peak: ...``, then ``peak.bytes``.

    On CUDA: the most that torch's tensors held on the device at once (what its allocator keeps in
    reserve and other libraries take is not in it). Elsewhere: the process's largest resident size, all
    of the program included, its libraries too.

    resets: whether ``bytes`` is of this stretch alone. Only CUDA and Linux can start anew; elsewhere,
        or where Linux forbids it, ``bytes`` is the peak since the process began. Starting anew is for
        the entire process, so stretches do not nest.
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
        """The peak in bytes; inside of the stretch, the peak so far."""
        return self._now() if self._bytes is None else self._bytes

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM") or _peak_since_start()


def _reset_resident() -> bool:
    """Makes Linux count the peak resident size from now on; False where that cannot be done."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(name: str) -> int | None:
    """An entry of /proc/self/status in bytes; None where there is none."""
    return _entry(pathlib.Path("/proc/self/status"), name)


def _peak_since_start() -> int:
    if sys.platform == "win32":
        return 0  # not known
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB


def resident() -> int:
    """Bytes that this process has in memory now; where the system does not tell, the most so far."""
    return _status("VmRSS") or _peak_since_start()


def available(device: torch.device | str) -> int:
    """Bytes that can still be had on a device.

    On CUDA: free memory, and what torch's allocator holds without using it. On the CPU of a Linux
    machine: what the kernel says can be had without swapping, and no more than a container's limit
    (control groups, version 1 or 2) leaves; files in the page cache count as free there, since they
    give way. Elsewhere: all of the machine's memory, for want of something better.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _available(pathlib.Path("/"))


def _available(root: pathlib.Path) -> int:
    """As :func:`available`, for the CPU. ``root``: of the file system."""
    free = _entry(root / "proc/meminfo", "MemAvailable")
    if free is None:
        if not hasattr(os, "sysconf"):
            raise RuntimeError("available: this system does not tell its memory; give a limit instead")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([free, *_left_to_groups(root)]))


def _left_to_groups(root: pathlib.Path) -> Iterator[int]:
    """What each control group above this process leaves it, in bytes; limits hold at every level."""
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
        # A container often sees its own group as the top, though its name says more.
        here = top / group.strip("/")
        while True:
            if (left := _left(here, *names)) is not None:
                yield left
            if here == top or top not in here.parents:
                break
            here = here.parent


def _left(group: pathlib.Path, limit: str, used: str, prefix: str) -> int | None:
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
    """The number after a name in one of the kernel's tables; None where there is none."""
    try:
        text = file.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, *values = line.replace(":", " ").split() or [""]
        if key == name and values:
            return int(values[0]) * unit
    return None
