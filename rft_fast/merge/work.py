"""A request -> a file: what is read, computed and written, run by run."""

from __future__ import annotations

import json
import math
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from rft_fast.checkpoints import containers, folders, huggingface
from rft_fast.checkpoints.stored import PROVENANCE
from rft_fast.common import files
from rft_fast.common.pickles import Unreadable
from rft_fast.common.threads import few_threads
from rft_fast.path import layers as layering

from . import alphas, fit, formulas, greedy, metadata, sources
from .greedy import Measures
from .settings import MEASURING, Request
from .sources import Source, view
from .writing import Entry, Writer, writing

_RUN = 1 << 19  # elements that are read, computed and written at a time


@dataclass(frozen=True)
class Outcome:
    """What a merge made.

    Attributes:
        out: the file.
        merged: number of tensors that were computed.
        copied: number of tensors that were copied.
        notes: what to know of the result.
        provenance: what its metadata say: method, numbers, sources and their SHA-256.
    """

    out: pathlib.Path
    merged: int
    copied: int
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Job:
    """A tensor of the result: its canonical name, whether it is merged, and what it becomes in the file."""

    name: str
    merged: bool
    dtype: torch.dtype
    entries: tuple[Entry, ...]
    transposed: bool


def run(request: Request, measures: Measures | None = None) -> Outcome:
    """Merge models and write the result.

    Tensors are read, computed and written in runs of elements, or one after the other where the method needs
    whole ones; no model is ever in memory. The result appears under its name when it is complete and on disk.

    Args:
        request: what is merged, how, and where it goes.
        measures: measurements on data, for ``greedy-soup`` and ``fisher``.

    Raises:
        ValueError: the method needs measurements, and there are none; the files cannot be merged; the result
            exists; or a tensor of the result is not finite.
        Changed: a file changed meanwhile.
        OSError: a file cannot be read or written, or the disk is full.
    """
    fit.check_out(request)
    if not request.measures:
        measures = None
    elif measures is None:
        raise ValueError(f"merge: {request.method} needs data to measure models on")
    if not request.recalibrate or measures is None:
        return _run(request, measures)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=request.out.parent) as folder:
        draft = pathlib.Path(folder, f"draft{request.out.suffix}")
        outcome = _run(replace(request, out=draft), measures if request.method in MEASURING else None)
        merged = outcome.provenance["sources"]
        differences = [pathlib.Path(each["file"]) for each in merged if each.get("difference")]
        return _recalibrated(request, outcome, measures.statistics(draft, differences), measures.about)


def _run(request: Request, measures: Measures | None) -> Outcome:
    inputs = files.Inputs()
    with ExitStack() as stack:
        zeroshot = None
        if request.zeroshot is not None:
            zeroshot = stack.enter_context(sources.opened(request.zeroshot, inputs, request.zeroshot_key))
        finetuned = every = [
            stack.enter_context(sources.opened(file, inputs, request.key, zeroshot))
            for file in request.finetuned
        ]
        opened = [*([] if zeroshot is None else [zeroshot]), *every]
        found = fit.fit(zeroshot, finetuned, request.method, request.unrelated)
        if request.recalibrate and not any(name.endswith(".running_mean") for name in found.merged):
            raise ValueError(f"merge: {found.reference.file} has no BatchNorm; leave --recalibrate out")
        if request.method == "greedy-soup" and measures is not None:
            finetuned, notes = _greedy(finetuned, measures)
            found = fit.fit(None, finetuned, request.method, request.unrelated)
            found.notes += notes
        if request.method == "fisher" and measures is not None:
            formula = formulas.fisher([measures.fisher(source.file) for source in finetuned])
        else:
            formula = _formula(request, found, finetuned)
        jobs = _jobs(request, found)
        hashing = stack.enter_context(ThreadPoolExecutor(2))
        digests = [hashing.submit(_sha256, inputs, source.file) for source in opened]
        stack.callback(_cancel, digests)
        data = {} if measures is None else {"data": measures.about}
        texts = _metadata(request, opened, found, ["0" * 64] * len(opened), data)
        entries = [entry for job in jobs for entry in job.entries]
        with writing(request.out, entries, texts, request.overwrite) as writer:
            work = _Work(request, zeroshot, finetuned, found.reference, formula)
            # Runs are short, and hashing has the other cores: threads of torch would only wait, busily.
            with nullcontext() if work.whole else few_threads():
                for job in jobs:
                    work.do(job, writer)
            hexes = [each.result() for each in digests]
            fit.refuse_equal(every, hexes[-len(every) :])
            texts = _metadata(request, opened, found, hexes, data)
            writer.finish(texts)
            inputs.check()
    return Outcome(
        request.out, len(found.merged), len(found.copied), tuple(found.notes), json.loads(texts[PROVENANCE])
    )


def provenance(path: str | PathLike[str]) -> dict[str, Any] | None:
    """Read what a merged file says of its origin; nothing in it is executed.

    Args:
        path: a safetensors file, or a file of torch.save.

    Returns:
        Method, numbers, sources with their SHA-256, and notes; None if the file was not written by
        :func:`run`.

    Raises:
        ValueError: it is no file of tensors, or its entry ``rft_fast.merge`` is damaged.
        OSError: it cannot be read.
    """
    file = pathlib.Path(path)
    try:
        with files.opened(file) as stream:
            container = containers.read(stream, file)
    except Unreadable as error:
        raise ValueError(f"merge: {file} {error}") from error
    if (text := container.metadata.get(PROVENANCE)) is None:
        return None
    try:
        origin = json.loads(text)
    except (ValueError, RecursionError):
        origin = None
    if not isinstance(origin, dict):
        got = f"expected a JSON object, got {text[:40]!a}"
        raise ValueError(f"merge: the entry {PROVENANCE} of {file} is damaged: {got}; merge again")
    return origin


def _recalibrated(
    request: Request, draft: Outcome, statistics: Mapping[str, Tensor], data: Mapping[str, object]
) -> Outcome:
    """Write a result again, with other statistics of BatchNorm. data: that they were estimated on."""
    modules = sum(name.endswith(".running_mean") for name in statistics)
    note = f"the statistics of {modules} BatchNorm modules are estimated again"
    notes = [*(each for each in draft.notes if not each.endswith((fit.STATISTICS, fit.COUNTERS))), note]
    with sources.opened(draft.out, files.Inputs()) as source:
        found = fit.Fit(source, copied=[*source.items])
        jobs = _jobs(replace(request, format=None, dtype=None), found)
        quick = {tower: known.quick for tower, known in source.activation.items()}
        texts = metadata.rewritten({**draft.provenance, "data": data}, notes, quick)
        work = _Work(request, None, [], source, formulas.soup())
        entries = [entry for job in jobs for entry in job.entries]
        with writing(request.out, entries, texts, request.overwrite) as writer:
            for job in jobs:
                if job.name in statistics:
                    writer.write(view(statistics[job.name].to(job.dtype).contiguous()))
                else:
                    work.do(job, writer)
            writer.finish(texts)
    return replace(draft, out=request.out, notes=tuple(notes), provenance=json.loads(texts[PROVENANCE]))


def _sha256(inputs: files.Inputs, file: pathlib.Path) -> str:
    """Return the SHA-256 of a checkpoint, of one file or several."""
    return folders.digest({part: inputs.sha256(part) for part in folders.parts(file)})


def _greedy(finetuned: list[Source], measures: Measures) -> tuple[list[Source], list[str]]:
    """Choose the models of a greedy soup; return them, the best first, and notes on how."""
    chosen = greedy.greedy_soup([source.file for source in finetuned], measures.accuracy)
    notes = []
    for file, accuracy in chosen.alone.items():
        what = "kept" if file in chosen.kept else "left out"
        notes.append(f"{file}: accuracy {accuracy:.4f}, {what}")
    notes.append(f"soup of {len(chosen.kept)} models: accuracy {chosen.accuracy:.4f}")
    by_file = {source.file: source for source in finetuned}
    return [by_file[file] for file in chosen.kept], notes


def _cancel(digests: list[Future[str]]) -> None:
    for each in digests:
        each.cancel()


# --- what is computed ---------------------------------------------------------------------------------


def _formula(request: Request, found: fit.Fit, finetuned: list[Source]) -> formulas.Formula:
    layers = layering.group([*found.merged])
    names = found.merged

    def by_tensor(table: Mapping[str, float]) -> dict[str, float]:
        return {names[index]: table[layer] for layer, indices in layers.items() for index in indices}

    if (several := _combined(request, [source in found.differences for source in finetuned])) is not None:
        return several
    if request.lines is not None:
        table = alphas.lines([*layers], *request.lines)
    else:
        table = alphas.table(request.alphas, [*layers])
    chosen: list[str] = []
    if request.layers:
        chosen = layering.select(layers, list(request.layers), operation="merge: layers")
    if request.method == "hold":
        table |= dict.fromkeys(chosen, 0.0)
    if request.method == "slerp":
        return formulas.slerp(by_tensor(table), request.least_angle)
    if request.method == "prune":
        pruned = frozenset(names[index] for layer in chosen for index in layers[layer])
        return formulas.prune(by_tensor(table), pruned, request.keep, request.fill, request.seed)
    return formulas.interpolate(by_tensor(table))


def _combined(request: Request, differences: list[bool]) -> formulas.Formula | None:
    """Return the formula of a method that has one for all layers; None: it has an alpha for each layer."""
    scales, drop = request.scales(), request.drop or 0.0
    if request.method in ("soup", "greedy-soup"):
        return formulas.soup()
    if request.method == "model-stock":
        return formulas.model_stock()
    if request.method == "task-arithmetic":
        return formulas.task_arithmetic(scales, differences)
    if request.method == "ties":
        return formulas.ties(scales[0], request.density, request.agreeing, differences)
    if request.method == "dare":
        return formulas.dare(scales, drop, request.seed, differences)
    if request.method == "dare-ties":
        return formulas.dare_ties(scales[0], drop, request.seed, request.agreeing, differences)
    return None


def _jobs(request: Request, found: fit.Fit) -> list[_Job]:
    """List the tensors of the result in the reference's order; in safetensors, wider elements first."""
    merged = frozenset(found.merged)
    jobs = []
    for name, item in found.reference.items.items():
        dtype = item.dtype
        if request.dtype is not None and dtype.is_floating_point:
            dtype = getattr(torch, request.dtype)
        place = _place(request, found.reference, name)
        shapes = _shapes(item.shape, len(place.names), place.transposed)
        entries = [Entry(each, shape, dtype) for each, shape in zip(place.names, shapes, strict=True)]
        jobs.append(_Job(name, name in merged, dtype, tuple(entries), place.transposed))
    if twice := {e.name for j in jobs for e in j.entries if e.name == PROVENANCE}:
        raise ValueError(f"merge: no tensor may be called {twice.pop()}")
    if request.out.suffix == ".safetensors":  # aligned
        jobs.sort(key=lambda job: -job.dtype.itemsize)
    return jobs


def _place(request: Request, reference: Source, name: str) -> huggingface.Place:
    """Decide on the names in the result."""
    if request.format is None:
        return huggingface.Place(reference.items[name].names, reference.items[name].transposed)
    if request.format == "huggingface":
        if (place := huggingface.place(name)) is None:
            raise ValueError(
                f"merge: CLIP of transformers has no place for {name}; leave --format huggingface out"
            )
        return place
    soup = request.format == "soup" and not name.startswith("classification_head.")
    return huggingface.Place((f"model.{name}" if soup else name,))


def _shapes(shape: torch.Size, count: int, transposed: bool) -> list[tuple[int, ...]]:
    if transposed:
        return [tuple(reversed(shape))]
    if count == 1:
        return [tuple(shape)]
    return [(shape[0] // count, *shape[1:])] * count


class _Work:
    """Reads, computes and writes one tensor after the other, in buffers that are used again."""

    def __init__(
        self,
        request: Request,
        zeroshot: Source | None,
        finetuned: list[Source],
        reference: Source,
        formula: formulas.Formula,
    ) -> None:
        self.zeroshot, self.finetuned, self.reference = zeroshot, finetuned, reference
        self.formula = formula
        self.whole = request.method in formulas.WHOLE
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def do(self, job: _Job, writer: Writer) -> None:
        """Make a tensor and write it."""
        numel = self.reference.items[job.name].numel
        step = numel if job.transposed or (self.whole and job.merged) else _RUN
        for start, count in _runs(numel, step):
            out = self._merged(job, start, count) if job.merged else self._copied(job, start, count)
            if job.transposed:
                rows, columns = job.entries[0].shape
                out = out.view(columns, rows).T.reshape(-1)
            writer.write(view(out))

    def _merged(self, job: _Job, start: int, count: int) -> Tensor:
        read = [self._read(k, each, job.name, start, count) for k, each in enumerate(self.finetuned)]
        base = self.zeroshot
        zeroshot = None if base is None else self._read(-1, base, job.name, start, count)
        out = self._buffer(-2, job.dtype, count)
        self.formula(formulas.Run(job.name, out, zeroshot, read))
        total = out.sum(dtype=torch.promote_types(out.dtype, torch.float32)).item()
        if not math.isfinite(total) and not torch.isfinite(out).all():
            raise ValueError(
                f"merge: {job.name} would have NaN or infinity: an input has, or a value exceeds the "
                f"range of {str(job.dtype).removeprefix('torch.')}"
            )
        return out

    def _copied(self, job: _Job, start: int, count: int) -> Tensor:
        found = self._read(-1, self.reference, job.name, start, count)
        out = found.to(job.dtype)
        if out.dtype != found.dtype and torch.isinf(out).sum() > torch.isinf(found).sum():
            raise ValueError(
                f"merge: {job.name}, which is copied, has values that exceed the range of "
                f"{str(job.dtype).removeprefix('torch.')}; choose another --dtype"
            )
        return out

    def _read(self, key: int, source: Source, name: str, start: int, count: int) -> Tensor:
        out = self._buffer(key, source.items[name].dtype, count)
        source.read(name, out, start)
        return out

    def _buffer(self, key: int, dtype: torch.dtype, count: int) -> Tensor:
        """Return memory that is used again: one buffer for each input, one for the result."""
        if count > _RUN:
            return torch.empty(count, dtype=dtype)
        if (key, dtype) not in self._buffers:
            self._buffers[key, dtype] = torch.empty(_RUN, dtype=dtype)
        return self._buffers[key, dtype][:count]


def _runs(numel: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, max(step, 1)):
        yield start, min(step, numel - start)


# --- metadata -----------------------------------------------------------------------------------------


def _metadata(
    request: Request,
    opened: list[Source],
    found: fit.Fit,
    digests: list[str],
    more: Mapping[str, object],
) -> dict[str, str]:
    described = [
        metadata.source(
            source.file,
            digest,
            "zero-shot" if request.zeroshot and source is opened[0] else "fine-tuned",
            source in found.differences,
            source.key,
        )
        for source, digest in zip(opened, digests, strict=True)
    ]
    # Files that show different activations were refused before.
    quick = {tower: known.quick for source in opened for tower, known in source.activation.items()}
    return metadata.texts(request.method, request.numbers(), described, found.notes, quick, **more)
