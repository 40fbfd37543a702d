"""``Path``: a live model on the straight line between its zero-shot and fine-tuned weights."""

from __future__ import annotations

import math
import re
import warnings
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rft_fast.common.parametrised import factors
from rft_fast.common.words import some
from rft_fast.kernels import Plan, Write
from rft_fast.kernels.contract import DTYPES, lacks_memory
from rft_fast.names import Fill, Impl, Names, Noise, On
from rft_fast.path.layers import group, layer_of, select


@dataclass(frozen=True, eq=False)
class Weight:
    """One float parameter on the path: the live tensor, and its two ends, all of one shape.

    The ends are those that the path reads, so leave them as they are.
    """

    name: str
    live: Tensor
    zeroshot: Tensor
    finetuned: Tensor


class Path:
    """A live model at ``theta(alpha) = (1 - alpha) * theta_0 + alpha * theta_1``, written in place.

    (The paper's formulas write the mirrored ``alpha * theta_0 + (1 - alpha) * theta_1``; its
    figures and the WiSE-FT code agree with this one: 0 is zero-shot, 1 is fine-tuned.)

    model: the live module. Its weights are overwritten, at once with alpha = 0; their storage never
        moves, so CUDA graphs, compiled models and optimisers that hold them stay valid.
    zeroshot, finetuned: state dicts, or modules, whose ``state_dict()`` is taken; names and shapes
        are those of the model's own state dict, float tensors each float32, bfloat16 or float16.
        An end that lies elsewhere is copied to the live model's device; one that is there already
        is used as it is, so leave it unchanged. Resident are the two ends and the live model,
        nothing else.
    granularity: how parameters form layers, see :mod:`rft_fast.path.layers`.
    impl: the kernel backend, see :class:`rft_fast.Plan`; ``path.impl`` tells which one was picked.
    inert: layers to leave out of ``path.layers``: names, or ``re:`` patterns of whole names.

    What a write does to each tensor:

    - float parameters are interpolated, and perturbed or pruned as asked. A parameter tied to
      several names is one tensor, written once, with the layer of its first name;
    - float buffers are interpolated, never perturbed or pruned. They are written with the layer of
      their module's first parameter, so that BatchNorm statistics follow their layer;
    - integer and bool tensors are copied from the nearer end (zero-shot for alpha < 0.5), because
      a number between two counts or two indices means nothing;
    - non-persistent buffers, which state dicts do not hold, are left alone.

    ``path.layers`` lists the layers in parameter order; ``path.inert`` maps what is left out of it
    to the reason. Whole-model writes reach inert layers too. ``path.unchanged`` lists those of
    ``path.layers`` that are the same at both ends; where that is the whole model, a warning says so.

    Noise depends on seed, draw and a weight's place among the model's float parameters, not on
    which layers are written together. Not for several threads at once: they would share one model.

    Raises ValueError, listing together all that does not fit: missing or unexpected names, shapes,
    dtypes, NaN or infinite weights, and those that the live model's dtype cannot hold, tied names that
    disagree, memory shared between the live model and an end, tensors that are not contiguous or hold
    no data, adapters that are not merged (LoRA) and parametrised weights. TypeError for other types, and for
    copying or pickling a Path. RuntimeError for a backend that does not work here.
    """

    layers: list[str]
    inert: dict[str, str]

    def __init__(
        self,
        model: nn.Module,
        zeroshot: Mapping[str, Tensor] | nn.Module,
        finetuned: Mapping[str, Tensor] | nn.Module,
        granularity: str = "module",
        impl: Impl = "auto",
        inert: Names = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Path: model must be an nn.Module, got {type(model).__name__}")
        named = {"zeroshot": zeroshot, "finetuned": finetuned}
        ends = {label: _state(end, label) for label, end in named.items()}
        slots = _slots(model)
        layers, self.inert = _layers(slots, granularity)
        unwanted = select([*layers, *self.inert], inert, operation="Path: inert")
        _check(slots, ends)
        for name, members in layers.items():
            if all(slot.largest == (0, 0) for slot in members if slot.is_float):
                self.inert[name] = "it is zero at both ends, and so is its adaptive noise"
        self.inert.update(dict.fromkeys(unwanted, "left out by inert="))

        self.model = model
        self._parameters = _plan([s for s in slots if s.is_float and s.is_parameter], impl)
        self._buffers = _plan([s for s in slots if s.is_float and not s.is_parameter], impl)
        self.impl: Impl = self._parameters.impl
        self._whole = _Part(slots)
        self._parts = {
            name: _Part(members, name) for name, members in layers.items() if name not in self.inert
        }
        self.layers = list(self._parts)
        self._rest = len(slots) > sum(len(part.slots) for part in self._parts.values())

        # How the live weights came about: the last whole-model write, and the layers that have been
        # written otherwise since. None stands for a write that was begun but did not end.
        self._base: Write | None = None
        self._apart: dict[str, Write | None] = {}
        self.write(0.0)
        if all(map(_is_unchanged, slots)):
            warnings.warn(
                "Path: the two ends are the same weights, so nothing changes along this path; is the "
                "fine-tuned end the right file?",
                stacklevel=2,
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Path: it writes to the memory of one live model, so it cannot be copied or pickled; copy the "
            "model (copy.deepcopy(path.model)), then make a Path of the copy and the two ends"
        )

    @property
    def alpha(self) -> float | None:
        """Where the live model is on the path; None when its layers, inert ones too, differ in alpha."""
        writes = list(self._apart.values())
        if self._rest or len(self._apart) < len(self._parts):  # something is as the whole was written
            writes.append(self._base)
        alphas = {None if write is None else write.alpha for write in writes}
        return alphas.pop() if len(alphas) == 1 else None

    @cached_property
    def unchanged(self) -> tuple[str, ...]:
        """The layers whose tensors, buffers among them, all have the same values at both ends.

        Interpolating them changes nothing; perturbing and pruning do.
        """
        return tuple(name for name, part in self._parts.items() if all(map(_is_unchanged, part.slots)))

    def warn(self, text: str) -> None:
        """Warns of what a study found out about this path."""
        warnings.warn(text, stacklevel=3)

    def write(
        self,
        alpha: float,
        rho: float = 0.0,
        layers: Names | None = None,
        seed: int = 0,
        draw: int = 0,
        on: On = "finetuned",
        keep: float = 1.0,
        fill: Fill = "zero",
        noise: Noise = "normal",
        adaptive: bool = True,
        sign: int = 1,
        *,
        buffers: bool = True,
    ) -> None:
        """Writes the live weights anew from the two ends.

        layers: None writes the whole model; a list of names or ``re:`` patterns writes those layers
        and leaves the rest as they are (an empty list writes nothing). The numbers are those of
        :class:`rft_fast.kernels.Write`: alpha any finite number; rho >= 0 (relative to the weights
        when adaptive); keep in [0, 1]. buffers: False leaves all buffers as they are, as suits an alpha
        beyond the ends that is meant for weights; until these layers are written again with them,
        ``path.alpha`` is None, and ``at`` and ``perturbed`` have nothing to come back to.

        Raises ValueError or TypeError before anything is written: a bad number, an unknown layer
        (with the nearest names), an inert one (with the reason), an alpha outside [0, 1] at which a
        variance (``running_var``) would be negative. ValueError, with the weights as before, where the result
        is beyond what a live tensor's dtype holds. RuntimeError when a tensor of the live
        model or of an end no longer is where, and laid out as, this Path found it.
        """
        request = Write(alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
        self._write(request, None if layers is None else self._select(layers), buffers)

    @contextmanager
    def perturbed(
        self,
        alpha: float,
        rho: float,
        layers: Names | None = None,
        seed: int = 0,
        draw: int = 0,
        on: On = "finetuned",
        keep: float = 1.0,
        fill: Fill = "zero",
        noise: Noise = "normal",
        adaptive: bool = True,
        sign: int = 1,
    ) -> Iterator[Path]:
        """``write`` with the same arguments; on exit the weights are as before entry, bit for bit.

        Also after an exception, also after further writes inside, and nested to any depth. Nothing
        is stored or subtracted: ``layers``, whatever has become of them (in training, BatchNorm moves
        its statistics), and what else was written inside are written again from the two ends, as
        they were. Changes that are no writes are not seen in other layers: pass None where there may be some.

        Raises as ``write`` does, and RuntimeError where there is no state to come back to, because weights
        are borrowed or an earlier write was interrupted.
        """
        request = Write(alpha, rho, on, keep, fill, noise, adaptive, seed, draw, sign)
        parts = None if layers is None else self._select(layers)
        with self._restored(parts):
            self._write(request, parts)
            yield self

    def at(self, alpha: float, layers: Names | None = None) -> AbstractContextManager[Path]:
        """``with path.at(alpha):`` the model, or only ``layers``, at alpha; restored on exit.

        As :meth:`perturbed` with rho = 0.
        """
        return self.perturbed(alpha, 0.0, layers)

    @contextmanager
    def borrowed(self, layers: Names | None = None) -> Iterator[list[Weight]]:
        """The weights of ``layers`` (None: all), whose live tensors may be changed at will, in place.

        For what :meth:`write` cannot express. On exit the live model is as before entry, bit for bit;
        until then ``path.alpha`` is None, and ``at`` and ``perturbed`` have nothing to come back to.

        Raises as ``write`` does.
        """
        parts = None if layers is None else self._select(layers)
        with self._restored(parts):
            self._forget(parts)
            yield self.weights(layers)

    def weights(self, layers: Names | None = None) -> list[Weight]:
        """The float parameters of ``layers``, in the model's order; None: all, those of inert layers too.

        That is the order of their noise: ``noise_like([w.live for w in path.weights()], ...)`` is what
        a write with the same seed and draw uses. Raises as ``write`` does.
        """
        part = self._whole if layers is None else _join(self._select(layers))
        slots = sorted((s for s in part.slots if s.is_float and s.is_parameter), key=lambda s: s.row)
        return [Weight(slot.name, slot.tensor, *slot.ends) for slot in slots]

    def select(self, layers: Names | None) -> list[str]:
        """The names of ``layers`` (names or ``re:`` patterns; None: all), as ``write`` reads them.

        Raises as ``write`` does.
        """
        if layers is None:
            return list(self.layers)
        return list(dict.fromkeys(part.name for part in self._select(layers)))

    def tensors(self, layer: str) -> list[Tensor]:
        """All live tensors that are written with a layer: its parameters, and its modules' buffers."""
        return [slot.tensor for slot in self._select([layer])[0].slots]

    @torch.no_grad()
    def checksum(self) -> int:
        """A 64-bit hash of the names, dtypes, shapes and bits of all live parameters and buffers.

        The same on every device. Equal before and after means that nothing has changed in between;
        swapped and moved values are noticed, too. Takes less than 1 MB of temporary memory.
        """
        total = 0
        weights: dict[torch.device, Tensor] = {}
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            if tensor.device not in weights:
                weights[tensor.device] = _hash_weights(tensor.device)
            label = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            total = _mix(total, zlib.crc32(label.encode()))
            for part in _hash_chunks(tensor, weights[tensor.device]):
                total = _mix(total, part)
        return total

    def _select(self, layers: Sequence[str]) -> list[_Part]:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"Path.write: layers must be a list of names, got {layers!r}")
        layers = list(layers)
        try:
            return [self._parts[name] for name in layers]
        except (KeyError, TypeError):  # a pattern, or a mistake: find out which
            for name, reason in self.inert.items():
                if name in layers:
                    raise ValueError(f"Path.write: {name!r} is left out of path.layers: {reason}") from None
        return [self._parts[name] for name in select(self.layers, layers, operation="Path.write")]

    def _write(self, request: Write, parts: Sequence[_Part] | None, buffers: bool = True) -> None:
        """``parts``: the layers to write, or None for the whole model."""
        self._check_places(parts)
        part = self._whole if parts is None else _join(parts)
        if buffers and not 0 <= request.alpha <= 1:
            _refuse_negative(part.variances, request.alpha)
        before = self._base, dict(self._apart)
        # An interrupted write must not pass for a finished one, so the state is unknown meanwhile.
        self._forget(parts)

        self._parameters.submit(request, part.parameters)
        if part.buffers and buffers:
            self._buffers.submit(Write(request.alpha), part.buffers)
        for slot in part.integers:
            if buffers or slot.is_parameter:
                slot.tensor.copy_(slot.ends[0 if request.alpha < 0.5 else 1])
        if part.may_overflow(request) and (lost := part.not_finite()):
            base, apart = before
            if base is not None and None not in apart.values():
                self._restore(base, apart)
            raise ValueError(
                f"Path.write: alpha = {request.alpha:g} and rho = {request.rho:g} take {some(lost, 4)} "
                "beyond what their dtypes hold; choose smaller ones, or a wider dtype"
            )
        if not buffers:
            return  # these layers are of no single alpha now

        if parts is None:
            self._base = request
        else:
            for p in parts:
                if request == self._base:
                    self._apart.pop(p.name, None)
                else:
                    self._apart[p.name] = request

    def _check_places(self, parts: Sequence[_Part] | None) -> None:
        """Raises RuntimeError unless all is where it was when this Path was made."""
        for part in [self._whole] if parts is None else parts:
            part.check()

    def _forget(self, parts: Sequence[_Part] | None) -> None:
        """From here on the weights of ``parts`` (None: all) come from no write that is known."""
        if parts is None:
            self._base, self._apart = None, {}
        else:
            self._apart.update((part.name, None) for part in parts)

    @contextmanager
    def _restored(self, parts: Sequence[_Part] | None) -> Iterator[None]:
        """On exit ``parts`` (None: all), and what was written inside, are as before entry."""
        self._check_places(parts)
        base, apart = self._base, dict(self._apart)
        if base is None or None in apart.values():
            raise RuntimeError(
                "Path: an earlier write was interrupted, or weights are borrowed, so there is no known "
                "state to come back to; write the whole model first"
            )
        try:
            yield
        finally:
            self._forget(parts)  # whatever was written there last, it may have been changed since
            self._restore(base, apart)

    def _restore(self, base: Write, apart: Mapping[str, Write | None]) -> None:
        if self._base != base:
            self._write(base, None)
        back: dict[Write, list[_Part]] = {}
        for name in {**self._apart, **apart}:
            was = apart.get(name, base)
            if self._apart.get(name, base) != was and was is not None:
                back.setdefault(was, []).append(self._parts[name])
        for request, parts in back.items():
            self._write(request, parts)


# --- the live model's tensors -------------------------------------------------------------------


@dataclass(eq=False)
class _Slot:
    """One tensor of the live model, under all the names that it goes by."""

    tensor: Tensor
    is_parameter: bool
    names: list[str] = field(default_factory=list)
    # (dictionary of a module, key, what it must still hold) for the tensor and the modules above it
    homes: list[tuple[dict[str, Any], str, object]] = field(default_factory=list)
    ends: tuple[Tensor, ...] = ()  # zero-shot, fine-tuned; once they are checked
    largest: tuple[float, ...] = ()  # magnitudes at either end, likewise; of floats
    shares: tuple[float, float, float] = (0.0, 0.0, 0.0)  # these, and 1, as shares of the dtype's largest
    row: int = -1  # in its Plan

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_float(self) -> bool:
        return self.tensor.is_floating_point() or self.tensor.is_complex()


# What is asked of live tensors before every write: by map, since each question takes .1 us a tensor.
_LIVE: tuple[Callable[[Tensor], object], ...] = (
    Tensor.data_ptr, Tensor.is_contiguous, attrgetter("nbytes"), attrgetter("dtype"),
)  # fmt: skip


class _Rows:
    """Some slots as one write: rows of the two plans, and integers."""

    def __init__(self, slots: Iterable[_Slot]) -> None:
        self.slots = list(slots)
        floats = [slot for slot in self.slots if slot.is_float]
        self.parameters = _runs(slot.row for slot in floats if slot.is_parameter)
        self.buffers = _runs(slot.row for slot in floats if not slot.is_parameter)
        self.integers = [slot for slot in self.slots if not slot.is_float]
        self.variances = [slot for slot in floats if not slot.is_parameter and _VARIANCE.search(slot.name)]

    @cached_property
    def _shares(self) -> tuple[float, ...]:
        """The largest magnitudes at either end, and of unit noise, as shares of what the live dtype holds."""
        found = [(0.0, 0.0, 0.0), *(slot.shares for slot in self.slots if slot.is_float)]
        return tuple(map(max, zip(*found, strict=True)))

    def may_overflow(self, request: Write) -> bool:
        """Whether a write could leave the range of a live dtype, by the largest magnitudes; rarely true."""
        zeroshot, finetuned, one = self._shares
        noise = request.rho * _LARGEST_NOISE
        reached = abs(1 - request.alpha) * zeroshot + abs(request.alpha) * finetuned
        reached += noise * (reached if request.adaptive else one * max(1.0, abs(request.alpha)))
        return max(reached, zeroshot + finetuned) > 0.99

    def not_finite(self) -> list[str]:
        """The live float tensors that hold NaN or infinity, with their dtypes."""
        lost = [s for s in self.slots if s.is_float and not bool(s.tensor.isfinite().all())]
        return [f"{slot.name} ({_dtype(slot.tensor)})" for slot in lost]


class _Part(_Rows):
    """A layer, or the whole model, and what of it must hold still."""

    def __init__(self, slots: Iterable[_Slot], name: str = "") -> None:
        super().__init__(slots)
        self.name = name
        homes = {(id(home[0]), home[1]): home for slot in self.slots for home in slot.homes}
        self._homes = list(homes.values())
        self._live = [slot.tensor for slot in self.slots]
        self._ends = [[slot.ends[end].untyped_storage() for slot in self.slots] for end in (0, 1)]
        self._found = self._look()

    def _look(self) -> list[list[object]]:
        """Where the live tensors and their ends are, and how they lie there: a list for each question."""
        live = [list(map(question, self._live)) for question in _LIVE]
        return live + [list(map(torch.UntypedStorage.data_ptr, end)) for end in self._ends]

    def check(self) -> None:
        """Raises RuntimeError unless the live model still holds these tensors, and all are as they were."""
        for home, key, held in self._homes:
            if home.get(key) is not held:
                break
        else:
            if self._look() == self._found:
                return
        now, before = (zip(*answers, strict=True) for answers in (self._look(), self._found))
        moved = [
            slot.name
            for slot, answers, expected in zip(self.slots, now, before, strict=True)
            if answers != expected or any(home.get(key) is not held for home, key, held in slot.homes)
        ]
        raise RuntimeError(
            f"Path.write: {some(moved, 4)} of the live model, or of its ends, are not where this Path found "
            "them any more, or not laid out so (model.to(), load_state_dict(assign=True), replacing a "
            "module, another .data and FSDP's freeing of storages do that); move and change the models "
            "first, then make a Path"
        )


def _join(parts: Sequence[_Part]) -> _Rows:
    return parts[0] if len(parts) == 1 else _Rows({s: None for part in parts for s in part.slots})


def _runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Rows as half-open (first, last) runs."""
    runs: list[tuple[int, int]] = []
    for row in sorted(rows):
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _slots(model: nn.Module) -> list[_Slot]:
    """The persistent state in ``named_parameters`` order, then buffers; tied tensors once."""
    parameters: dict[int, _Slot] = {}
    buffers: dict[int, _Slot] = {}
    above: dict[str, list[tuple[dict[str, Any], str, object]]] = {"": []}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, child in module._modules.items():
            above[prefix + key] = [*above[path], (module._modules, key, child)]
        for slots, held, skip in (
            (parameters, module._parameters, ()),
            (buffers, module._buffers, module._non_persistent_buffers_set),
        ):
            for key, tensor in held.items():
                if tensor is None or key in skip:
                    continue
                slot = slots.setdefault(id(tensor), _Slot(tensor, slots is parameters))
                slot.names.append(prefix + key)
                slot.homes += [*above[path], (held, key, tensor)]
    return [*parameters.values(), *buffers.values()]


def _layers(slots: Sequence[_Slot], granularity: str) -> tuple[dict[str, list[_Slot]], dict[str, str]]:
    """Layer -> its slots, buffers last; and what forms no layer -> why."""
    parameters = [slot for slot in slots if slot.is_parameter]
    if not any(slot.is_float for slot in parameters):
        raise ValueError("Path: the live model has no float parameters: there is nothing to write")
    layers: dict[str, list[_Slot]] = {}
    inert: dict[str, str] = {}
    layer_at = {}  # index of a parameter -> its layer
    for layer, indices in group([slot.name for slot in parameters], granularity).items():
        layer_at.update(dict.fromkeys(indices, layer))
        members = [parameters[index] for index in indices]
        if any(slot.is_float for slot in members):
            layers[layer] = members
        else:
            inert[layer] = "it holds integers only; whole-model writes copy them"
    of_module: dict[str, str] = {}  # module -> layer of its first parameter
    for index, slot in enumerate(parameters):
        for name in slot.names:
            of_module.setdefault(name.rpartition(".")[0], layer_at[index])
    for slot in parameters:
        for name in slot.names[1:]:
            layer = layer_of(name, granularity)
            if layer not in layers:
                inert.setdefault(layer, f"it is {slot.name} by another name, written there")
    for slot in slots:
        if not slot.is_parameter:
            layer = of_module.get(slot.name.rpartition(".")[0], layer_of(slot.name, granularity))
            if layer in layers:
                layers[layer].append(slot)
            else:
                inert[slot.name] = "its module has no parameters; whole-model writes reach it"
    return layers, inert


def _plan(slots: Sequence[_Slot], impl: Impl) -> Plan:
    for row, slot in enumerate(slots):
        slot.row = row
    zeroshot, finetuned = ([slot.ends[end] for slot in slots] for end in (0, 1))
    return Plan([s.tensor for s in slots], zeroshot, finetuned, impl, [s.name for s in slots])


# --- what is refused ----------------------------------------------------------------------------


class _Faults(dict[str, list[str]]):
    """What is wrong -> the tensors concerned."""

    def note(self, what: str, name: str) -> None:
        self.setdefault(what, []).append(name)

    def refuse(self) -> None:
        if self:
            lines = [f"\n  {what} ({len(names)}): {some(names, 4)}" for what, names in self.items()]
            raise ValueError("Path: the live model and its ends do not fit." + "".join(lines))


def _state(end: object, label: str) -> Mapping[str, Tensor]:
    if isinstance(end, nn.Module):
        end = end.state_dict()
    if not isinstance(end, Mapping):
        raise TypeError(f"Path: {label} must be a state dict or an nn.Module, got {type(end).__name__}")
    return end


def _check(slots: Sequence[_Slot], ends: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuses, all together, what a write could not do right; else gives the slots their ends."""
    faults = _Faults()
    for what, names in factors(name for slot in slots if slot.is_float for name in slot.names).items():
        faults[f"the live model has {what}"] = names
    live = [slot for slot in slots if not _unfit(slot.tensor, "the live model", slot.name, faults)]
    devices = {slot.tensor.device: slot.name for slot in reversed(live) if slot.is_float}
    if len(devices) > 1:
        for device, name in devices.items():
            faults.note("the live model is on several devices; move it to one", f"{name}: {device}")

    largest: dict[str, list[float]] = {slot.name: [] for slot in slots}
    fits: dict[str, dict[str, Tensor]] = {}
    known = {name for slot in slots for name in slot.names}
    for label, end in ends.items():
        for name in end:
            if name not in known:
                faults.note(f"{label} has unexpected names", name)
        fits[label] = fit = {
            name: end[name]
            for slot in slots
            for name in slot.names
            if not _unlike(slot, name, end, label, faults)
        }
        for slot in slots:
            for name in slot.names:
                if name in fit:
                    largest[slot.name].append(_scan(name, slot.tensor, fit[name], label, faults))
            for first, name in pairwise(name for name in slot.names if name in fit):
                if not _same(fit[first], fit[name]):
                    what = f"{label} differs between names that are tied in the live model"
                    faults.note(what, f"{first} and {name}")
    _check_sharing(live, fits, faults)
    faults.refuse()

    for slot in slots:
        slot.ends = tuple(end[slot.name].detach().to(slot.tensor.device) for end in ends.values())
        slot.largest = tuple(largest[slot.name][:: len(slot.names)])
        if slot.is_float:
            zeroshot, finetuned, one = (v / torch.finfo(slot.tensor.dtype).max for v in (*slot.largest, 1.0))
            slot.shares = (zeroshot, finetuned, one)


def _unfit(tensor: Tensor, where: str, name: str, faults: _Faults) -> bool:
    """Notes what makes a tensor unusable, live or at an end."""
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
        name = f"{name} ({_dtype(tensor)})"
        what = f"{where} has dtypes other than float32, bfloat16 and float16; convert with .float()"
    else:
        return False
    faults.note(what, name)
    return True


def _unlike(slot: _Slot, name: str, end: Mapping[str, Tensor], label: str, faults: _Faults) -> bool:
    """Notes what makes an end's tensor no counterpart of the live one."""
    if name not in end:
        faults.note(f"{label} lacks", name)
        return True
    tensor = end[name]
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        faults.note(f"{label} holds something other than tensors", f"{name} ({kind})")
        return True
    if _unfit(tensor, label, name, faults):
        return True
    if nn.parameter.is_lazy(slot.tensor):
        return True
    if tensor.shape != slot.tensor.shape:
        shapes = f"{name} (expected {list(slot.tensor.shape)}, got {list(tensor.shape)})"
        faults.note(f"{label} has other shapes than the live model", shapes)
        return True
    if tensor.is_floating_point() != slot.is_float or not (
        slot.is_float or tensor.dtype == slot.tensor.dtype
    ):
        kinds = f"{name} (expected {_dtype(slot.tensor)}, got {_dtype(tensor)})"
        faults.note(f"{label} has other kinds of numbers than the live model", kinds)
        return True
    return False


def _scan(name: str, live: Tensor, tensor: Tensor, label: str, faults: _Faults) -> float:
    """Notes NaN, infinity and what the live tensor cannot hold. Returns the largest magnitude of floats."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    # One pass without temporaries; a NaN anywhere makes both of them NaN.
    low, high = (float(extreme) for extreme in tensor.detach().aminmax())
    largest = max(abs(low), abs(high))
    if not (math.isfinite(low) and math.isfinite(high)):
        faults.note(f"{label} has NaN or infinite weights", name)
    elif live.dtype in DTYPES and not bool(torch.tensor(largest).to(live.dtype).isfinite()):
        faults.note(f"{label} has weights beyond what the live model's {_dtype(live)} holds", name)
    return largest


# Noise reaches sqrt(-2 ln(2**-33)) = 6.8 at most.
_LARGEST_NOISE = 6.8
# Buffers that are variances or standard deviations, by the last part of their names.
_VARIANCE = re.compile(r"(?:^|[._])(?:var|variance|std|stddev|sigma)$")
_PIECE = 1 << 20


def _is_unchanged(slot: _Slot) -> bool:
    """Whether both ends have the same values. Ends of two dtypes are compared in float32, piece by piece."""
    zeroshot, finetuned = slot.ends
    if zeroshot.dtype == finetuned.dtype:
        return zeroshot.data_ptr() == finetuned.data_ptr() or torch.equal(zeroshot, finetuned)
    parts = (torch.split(end.reshape(-1), _PIECE) for end in slot.ends)
    return all(torch.equal(a.float(), b.float()) for a, b in zip(*parts, strict=True))


@torch.no_grad()
def _refuse_negative(slots: Sequence[_Slot], alpha: float) -> None:
    """Refuses an alpha at which a variance that is not negative at the ends would be."""
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
            f"Path.write: at alpha = {alpha:g}, {some(names, 4)} would be negative, and a variance cannot "
            f"be: the model would give NaN. None is negative for alpha between {low:.4g} and {high:.4g}; "
            "stay within, or leave the buffers as they are (buffers=False)"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    return (a.device == b.device and a.data_ptr() == b.data_ptr()) or torch.equal(a, b.to(a.device))


def _check_sharing(live: Sequence[_Slot], ends: Mapping[str, Mapping[str, Tensor]], faults: _Faults) -> None:
    """Notes live tensors that overlap, and those of an end that share memory with a live one."""
    taken = sorted((*_span(slot.tensor), slot.name) for slot in live if slot.tensor.numel())
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(taken):
        if device == other_device and start < stop:
            faults.note("the live model has tensors that overlap in memory", f"{name} and {other}")
    for label, tensors in ends.items():
        for name, tensor in tensors.items():
            device, start, stop = _span(tensor)
            # The last live tensor that starts before this one ends.
            at = bisect_left(taken, (device, stop)) - 1
            if tensor.numel() and at >= 0 and taken[at][0] == device and taken[at][2] > start:
                faults.note(
                    f"{label} shares memory with the live model, which is overwritten: give the "
                    "live model its own storage, e.g. copy.deepcopy",
                    name,
                )


def _span(tensor: Tensor) -> tuple[str, int, int]:
    start = tensor.data_ptr()
    return str(tensor.device), start, start + tensor.nbytes


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- checksum -----------------------------------------------------------------------------------

# Part of the hash's definition, so the same on every device. At this size torch works on one thread
# and in cache: 1.7 ns an element on a busy two-core CPU, against 13 to 150 from 2**16 on.
_CHUNK = 1 << 15
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mix(total: int, part: int) -> int:
    return (total * 0x9E3779B97F4A7C15 + part + 1) % 2**64


def _hash_weights(device: torch.device) -> Tensor:
    """A pseudo-random odd number for every position in a chunk: int64 [_CHUNK]."""
    x = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device)
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):  # products wrap modulo 2**64
        x = x * factor
        x = x ^ (x >> 29)
    return x | 1


def _hash_chunks(tensor: Tensor, weights: Tensor) -> list[int]:
    """One sum of (bits * weight of the position), modulo 2**64, for each chunk of a tensor."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    # An odd weight is invertible modulo 2**64, so no change of one value goes unnoticed.
    sums = [(chunk.long() * weights[: chunk.numel()]).sum() for chunk in torch.split(bits, _CHUNK)]
    return [int(part) % 2**64 for part in torch.stack(sums).tolist()] if flat.numel() else []
