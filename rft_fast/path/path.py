"""``Path``: a live model on the straight line between its zero-shot and fine-tuned weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import NoReturn

from torch import Tensor, nn

from rft_fast.common.words import some
from rft_fast.kernels import Write
from rft_fast.names import Fill, Impl, Names, Noise, On
from rft_fast.path.checksum import checksum
from rft_fast.path.fit import fit, refuse_negative, state
from rft_fast.path.layers import select
from rft_fast.path.slots import Part, Slot, Weight, join, layers_of, slots_of
from rft_fast.path.writer import InPlace, Writer


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
    slots: tuple[Slot, ...]  # every tensor that a whole-model write writes, with its ends
    writer: Writer

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
        ends = {label: state(end, label) for label, end in named.items()}
        slots = slots_of(model)
        layers, self.inert = layers_of(slots, granularity)
        unwanted = select([*layers, *self.inert], inert, operation="Path: inert")
        fit(slots, ends)
        for name, members in layers.items():
            if all(slot.largest == (0, 0) for slot in members if slot.is_float):
                self.inert[name] = "it is zero at both ends, and so is its adaptive noise"
        self.inert.update(dict.fromkeys(unwanted, "left out by inert="))

        self.model = model
        writer = InPlace(slots, impl)
        self.writer, self.impl = writer, writer.impl
        self.slots = tuple(slots)
        self._whole = Part(slots)
        self._parts = {
            name: Part(members, name) for name, members in layers.items() if name not in self.inert
        }
        self.layers = list(self._parts)
        self._rest = len(slots) > sum(len(part.slots) for part in self._parts.values())

        # How the live weights came about: the last whole-model write, and the layers that have been
        # written otherwise since. None stands for a write that was begun but did not end.
        self._base: Write | None = None
        self._apart: dict[str, Write | None] = {}
        self.write(0.0)
        if all(slot.is_unchanged() for slot in slots):
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
        return tuple(
            name for name, part in self._parts.items() if all(slot.is_unchanged() for slot in part.slots)
        )

    def warn(self, text: str) -> None:
        """Warns of what a study found out about this path."""
        self.writer.warn(text)

    def written_by(self, writer: Writer) -> Path:
        """This path in its present state, with another writer; what that writes is not known to this one."""
        other = object.__new__(Path)
        vars(other).update(vars(self))
        other.writer, other._apart = writer, dict(self._apart)
        return other

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
            yield self.writer.borrowed(self._floats(layers))

    def weights(self, layers: Names | None = None) -> list[Weight]:
        """The float parameters of ``layers``, in the model's order; None: all, those of inert layers too.

        That is the order of their noise: ``noise_like([w.live for w in path.weights()], ...)`` is what
        a write with the same seed and draw uses. Raises as ``write`` does.
        """
        return self.writer.weights(self._floats(layers))

    def _floats(self, layers: Names | None) -> list[Slot]:
        """The float parameters of ``layers``, in the model's order."""
        rows = self._whole if layers is None else join(self._select(layers))
        return sorted((s for s in rows.slots if s.is_float and s.is_parameter), key=lambda s: s.row)

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

    def checksum(self) -> int:
        """A 64-bit hash of the names, dtypes, shapes and bits of all live parameters and buffers.

        The same on every device. Equal before and after means that nothing has changed in between;
        swapped and moved values are noticed, too. Takes less than 1 MB of temporary memory.
        """
        return checksum(self.model)

    def _select(self, layers: Sequence[str]) -> list[Part]:
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

    def _write(self, request: Write, parts: Sequence[Part] | None, buffers: bool = True) -> None:
        """``parts``: the layers to write, or None for the whole model."""
        self.writer.check([self._whole] if parts is None else parts)
        rows = self._whole if parts is None else join(parts)
        if buffers and not 0 <= request.alpha <= 1:
            refuse_negative(rows.variances, request.alpha)
        before = self._base, dict(self._apart)
        # An interrupted write must not pass for a finished one, so the state is unknown meanwhile.
        self._forget(parts)

        if lost := self.writer.write(request, rows, buffers):
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

    def _forget(self, parts: Sequence[Part] | None) -> None:
        """From here on the weights of ``parts`` (None: all) come from no write that is known."""
        if parts is None:
            self._base, self._apart = None, {}
        else:
            self._apart.update((part.name, None) for part in parts)

    @contextmanager
    def _restored(self, parts: Sequence[Part] | None) -> Iterator[None]:
        """On exit ``parts`` (None: all), and what was written inside, are as before entry."""
        self.writer.check([self._whole] if parts is None else parts)
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
        back: dict[Write, list[Part]] = {}
        for name in {**self._apart, **apart}:
            was = apart.get(name, base)
            if self._apart.get(name, base) != was and was is not None:
                back.setdefault(was, []).append(self._parts[name])
        for request, parts in back.items():
            self._write(request, parts)
