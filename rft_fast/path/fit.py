"""Checks of a Path: that the ends fit the live model, and that no variance becomes negative."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rft_fast.common.parametrised import factors
from rft_fast.common.words import some
from rft_fast.kernels.contract import DTYPES
from rft_fast.kernels.rows import lacks_memory
from rft_fast.path.slots import Slot, dtype_name


class _Problems(dict[str, list[str]]):
    """Problem -> the tensors that have it."""

    def note(self, what: str, name: str) -> None:
        self.setdefault(what, []).append(name)

    def refuse(self) -> None:
        if self:
            lines = [f"\n  {what} ({len(names)}): {some(names, 4)}" for what, names in self.items()]
            raise ValueError("Path: the live model and its ends do not fit." + "".join(lines))


def state(end: object, label: str) -> Mapping[str, Tensor]:
    """Return the state dict of an end.

    Args:
        end: A state dict or a module.
        label: Name of the end in the error message.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(end, nn.Module):
        end = end.state_dict()
    if not isinstance(end, Mapping):
        raise TypeError(f"Path: {label} must be a state dict or an nn.Module, got {type(end).__name__}")
    return end


def fit(slots: Sequence[Slot], ends: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check both ends against the live model, then set the ends and magnitudes of the slots.

    Args:
        slots: All tensors of the live model.
        ends: "zeroshot" and "finetuned" -> state dict.

    Raises:
        ValueError: The ends do not fit; the message lists all problems.
    """
    problems = _Problems()
    for what, names in factors(name for slot in slots if slot.is_float for name in slot.names).items():
        problems[f"the live model has {what}"] = names
    live = [slot for slot in slots if not _unfit(slot.tensor, "the live model", slot.name, problems)]
    devices = {slot.tensor.device: slot.name for slot in reversed(live) if slot.is_float}
    if len(devices) > 1:
        for device, name in devices.items():
            problems.note("the live model is on several devices; move it to one", f"{name}: {device}")

    largest: dict[str, list[float]] = {slot.name: [] for slot in slots}
    fits: dict[str, dict[str, Tensor]] = {}
    known = {name for slot in slots for name in slot.names}
    for label, end in ends.items():
        for name in end:
            if name not in known:
                problems.note(f"{label} has unexpected names", name)
        fits[label] = fit = {
            name: end[name]
            for slot in slots
            for name in slot.names
            if not _unlike(slot, name, end, label, problems)
        }
        for slot in slots:
            for name in slot.names:
                if name in fit:
                    largest[slot.name].append(_scan(name, slot.tensor, fit[name], label, problems))
            for first, name in pairwise(name for name in slot.names if name in fit):
                if not _same(fit[first], fit[name]):
                    what = f"{label} differs between names that are tied in the live model"
                    problems.note(what, f"{first} and {name}")
    _check_sharing(live, fits, problems)
    problems.refuse()

    for slot in slots:
        slot.ends = tuple(end[slot.name].detach().to(slot.tensor.device) for end in ends.values())
        slot.largest = tuple(largest[slot.name][:: len(slot.names)])
        if slot.is_float:
            zeroshot, finetuned, one = (v / torch.finfo(slot.tensor.dtype).max for v in (*slot.largest, 1.0))
            slot.shares = (zeroshot, finetuned, one)


def _unfit(tensor: Tensor, where: str, name: str, problems: _Problems) -> bool:
    """Whether a tensor, live or at an end, is unusable; the problem is noted."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    if nn.parameter.is_lazy(tensor):
        what = f"{where} has uninitialised parameters; run one forward pass first"
    elif tensor.is_meta:
        what = f"{where} has meta tensors, which hold no data; load it on a real device"
    elif tensor.layout is not torch.strided or not tensor.is_contiguous():
        what = (
            f"{where} has tensors that are not contiguous; replace them with tensor.contiguous(), "
            "or a channels-last module with module.to(memory_format=torch.contiguous_format)"
        )
    elif lacks_memory(tensor):
        what = (
            f"{where} has tensors whose storage was freed or cut short, as FSDP does between uses; gather "
            "the full weights first"
        )
    elif floating and tensor.dtype not in DTYPES:
        name = f"{name} ({dtype_name(tensor)})"
        what = f"{where} has dtypes other than float32, bfloat16 and float16; convert with .float()"
    else:
        return False
    problems.note(what, name)
    return True


def _unlike(slot: Slot, name: str, end: Mapping[str, Tensor], label: str, problems: _Problems) -> bool:
    """Whether an end has no tensor that matches the live one; the problem is noted."""
    if name not in end:
        problems.note(f"{label} lacks", name)
        return True
    tensor = end[name]
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        problems.note(f"{label} holds something other than tensors", f"{name} ({kind})")
        return True
    if _unfit(tensor, label, name, problems):
        return True
    if nn.parameter.is_lazy(slot.tensor):
        return True
    if tensor.shape != slot.tensor.shape:
        shapes = f"{name} (expected {list(slot.tensor.shape)}, got {list(tensor.shape)})"
        problems.note(f"{label} has other shapes than the live model", shapes)
        return True
    if tensor.is_floating_point() != slot.is_float or not (
        slot.is_float or tensor.dtype == slot.tensor.dtype
    ):
        kinds = f"{name} (expected {dtype_name(slot.tensor)}, got {dtype_name(tensor)})"
        problems.note(f"{label} has other kinds of numbers than the live model", kinds)
        return True
    return False


def _scan(name: str, live: Tensor, tensor: Tensor, label: str, problems: _Problems) -> float:
    """Note NaN, infinity and values beyond the live dtype; return the largest magnitude."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    # One pass without temporaries; a NaN anywhere makes both of them NaN.
    low, high = (float(extreme) for extreme in tensor.detach().aminmax())
    largest = max(abs(low), abs(high))
    if not (math.isfinite(low) and math.isfinite(high)):
        problems.note(f"{label} has NaN or infinite weights", name)
    elif live.dtype in DTYPES and not bool(torch.tensor(largest).to(live.dtype).isfinite()):
        problems.note(
            f"{label} has weights that exceed the range of the live model's {dtype_name(live)}", name
        )
    return largest


@torch.no_grad()
def refuse_negative(slots: Sequence[Slot], alpha: float) -> None:
    """Raise ValueError if a variance that is not negative at the ends would be negative at alpha."""
    low, high, names = -math.inf, math.inf, []
    for slot in slots:
        w0, w1 = (end.float() for end in slot.ends)
        change = w1 - w0
        if not slot.tensor.numel() or bool((w0 < 0).any() or (w1 < 0).any()):
            continue
        if bool((w0 + change * alpha < 0).any()):
            names.append(slot.name)
        # w0 + alpha * change is zero there.
        root = -w0 / change
        low = max(low, float(root.where(change > 0, -math.inf).max()))
        high = min(high, float(root.where(change < 0, math.inf).min()))
    if names:
        raise ValueError(
            f"Path.write: at alpha = {alpha:g}, {some(names, 4)} would be negative, which a "
            f"variance cannot be: the model would give NaN. For alpha from {low:.4g} to "
            f"{high:.4g} none is negative; stay in that range, or leave the buffers unchanged "
            "(buffers=False)"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    return (a.device == b.device and a.data_ptr() == b.data_ptr()) or torch.equal(a, b.to(a.device))


def _check_sharing(
    live: Sequence[Slot], ends: Mapping[str, Mapping[str, Tensor]], problems: _Problems
) -> None:
    """Note live tensors that overlap, and tensors of an end that share memory with a live one."""
    taken = sorted((*_span(slot.tensor), slot.name) for slot in live if slot.tensor.numel())
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(taken):
        if device == other_device and start < stop:
            problems.note("the live model has tensors that overlap in memory", f"{name} and {other}")
    for label, tensors in ends.items():
        for name, tensor in tensors.items():
            device, start, stop = _span(tensor)
            # The last live tensor that starts before this one ends.
            at = bisect_left(taken, (device, stop)) - 1
            if tensor.numel() and at >= 0 and taken[at][0] == device and taken[at][2] > start:
                problems.note(
                    f"{label} shares memory with the live model, which is overwritten: give the live "
                    "model its own storage, for example with copy.deepcopy",
                    name,
                )


def _span(tensor: Tensor) -> tuple[str, int, int]:
    start = tensor.data_ptr()
    return str(tensor.device), start, start + tensor.nbytes
