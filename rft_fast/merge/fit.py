"""Which files belong together; what is refused before anything is written."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from rft_fast.checkpoints import activation, folders, lineage
from rft_fast.checkpoints.canonical import HEAD, HEAD_WEIGHT, INERT
from rft_fast.common import disk
from rft_fast.common.threads import few_threads
from rft_fast.common.words import many, some
from rft_fast.names import MergeMethod

from .settings import VECTORS, Request
from .sources import Source, towers

_SAMPLE = 1 << 16  # elements of each matrix that show whether two models are related
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COUNTER = ".num_batches_tracked"
_STATISTICS = (".running_mean", ".running_var")
COUNTERS = "which count training steps"
STATISTICS = "merged statistics may be wrong for the merged weights; --recalibrate estimates them on data"


@dataclass
class Fit:
    """How files go together.

    Attributes:
        reference: the file that names, dtypes and copied tensors are from.
        merged: canonical names of tensors that are computed, in the reference's order.
        copied: those that are copied from the reference.
        differences: files that are differences (task vectors) instead of models.
        notes: what to know of the result.
    """

    reference: Source
    merged: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    differences: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@few_threads()  # on samples of tensors, the others would only wait, busily
def fit(zeroshot: Source | None, finetuned: Sequence[Source], method: MergeMethod, unrelated: bool) -> Fit:
    """Check that files can be merged.

    Args:
        zeroshot: the zero-shot model, if the method has one.
        finetuned: the other files.
        method: of merging.
        unrelated: accept models of which neither was fine-tuned from the other.

    Returns:
        What is merged and what is copied.

    Raises:
        ValueError: they cannot be; every problem is named.
    """
    sources = [*finetuned] if zeroshot is None else [zeroshot, *finetuned]
    _refuse_twice(sources)
    first, *others = sources
    differences = []
    for other in others:
        _refuse_different(first, other)
        if _is_difference(first, other, method, unrelated):
            differences.append(other)
    for pair in itertools.combinations(others, 2):
        if problems := _contradictions(*pair):
            _refuse(*pair, problems)
    models = [source for source in finetuned if source not in differences]
    found = Fit(models[0] if models else first, differences=differences)
    for name in differences:
        found.notes.append(f"{name.file} is a difference (task vector) and is added as one")
    _sort(found, sources)
    return found


def _refuse_twice(sources: Sequence[Source]) -> None:
    for place, source in enumerate(sources):
        for other in sources[:place]:
            if os.path.samefile(source.file, other.file) and source.key == other.key:
                raise ValueError(
                    f"merge: {other.file} and {source.file} are the same file; name each model once"
                )


def _refuse_different(a: Source, b: Source) -> None:
    """Refuse two files that differ in names, shapes, kinds or activations."""
    shared = [name for name in a.items if name in b.items]
    if not shared:
        raise ValueError(f"merge: {a.file} and {b.file} have no tensor names in common")
    problems = []
    shapes = [name for name in shared if a.items[name].shape != b.items[name].shape]
    if heads := [name for name in shapes if name.startswith(HEAD)]:
        counts = [len(x.items[heads[0]].shape) and x.items[heads[0]].shape[0] for x in (a, b)]
        problems.append(f"their heads have {counts[0]} and {counts[1]} classes")
    if others := [name for name in shapes if not name.startswith(HEAD)]:
        listed = [f"{n} {list(a.items[n].shape)} and {list(b.items[n].shape)}" for n in others]
        have = many(len(others), "tensor has", "tensors have")
        problems.append(f"{have} different shapes: {some(listed)}")
    for one, other in ((a, b), (b, a)):
        if alone := [name for name in one.items if name not in other.items and not _is_inert(name)]:
            head = " (a head for both can be copied into the other file)" if alone[0].startswith(HEAD) else ""
            are = many(len(alone), "tensor is", "tensors are")
            problems.append(f"{are} in {one.file} only: {some(alone)}{head}")
    kinds = [n for n in shared if _computed(a.items[n].dtype) != _computed(b.items[n].dtype)]
    if kinds:
        are = many(len(kinds), "tensor is an integer", "tensors are integers")
        problems.append(f"{are} in one file only: {some(kinds)}")
    for source in (a, b):
        items = source.items.items()
        unfit = [n for n, i in items if _computed(i.dtype) and i.dtype not in _FLOATS]
        if unfit:
            have = many(len(unfit), f"tensor of {source.file} has", f"tensors of {source.file} have")
            problems.append(
                f"{have} a dtype other than float64, float32, bfloat16 and float16: {some(unfit)}"
            )
    if problems := [*problems, *_contradictions(a, b)]:
        _refuse(a, b, problems)


def _contradictions(a: Source, b: Source) -> list[str]:
    """Describe towers whose activations differ."""
    return [
        f"their {tower} towers have different activations: {activation.NAMES[known.quick]} "
        f"({known.source}) and {activation.NAMES[counter.quick]} ({counter.source})"
        for tower, known in a.activation.items()
        if (counter := b.activation.get(tower)) is not None and known.quick != counter.quick
    ]


def _refuse(a: Source, b: Source, problems: Sequence[str]) -> NoReturn:
    raise ValueError(f"merge: {a.file} and {b.file} cannot be merged: {'; '.join(problems)}")


def _computed(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_inert(name: str) -> bool:
    return name.partition(".")[0] in INERT


def _is_difference(a: Source, b: Source, method: MergeMethod, unrelated: bool) -> bool:
    """Return whether b is a difference; refuse it where models are expected, and models without relation."""
    names = [
        name
        for name in towers(a.items)
        if name in b.items and len(a.items[name].shape) > 1 and a.items[name].dtype.is_floating_point
    ]
    one, other = ({name: _sample(source, name) for name in names} for source in (a, b))
    kin = lineage.kinship(one, other, lambda name: True)
    if not kin.cosine < lineage.UNRELATED:
        if (problem := _moved(a, b)) is not None:
            rows = problem.partition(", so ")[0]  # the rest is the remedy of a sweep
            raise ValueError(f"merge: {b.file} has {rows}; reorder its rows first")
        return False
    if kin.ratio < 0.5:
        if method in VECTORS:
            return True
        raise ValueError(
            f"merge: {b.file} is a difference (task vector), not a model: the norm of its "
            f"matrices is {kin.ratio:.2g} times that of {a.file}, the cosine {kin.cosine:.2f}; "
            f"{method} needs models. Use task-arithmetic, which adds differences"
        )
    if not unrelated:
        raise ValueError(
            f"merge: {a.file} and {b.file} are unrelated: the cosine between their matrices is "
            f"{kin.cosine:.2f}, but models fine-tuned from the same start stay close (expected: "
            f"at least {lineage.UNRELATED:g}). --unrelated merges them anyway"
        )
    return False


def _moved(a: Source, b: Source) -> str | None:
    """Describe heads whose rows are in another order."""
    heads: list[dict[str, Tensor]] = []
    for source in (a, b):
        if HEAD_WEIGHT not in source.items:
            return None
        heads.append({HEAD_WEIGHT: source.tensor(HEAD_WEIGHT)})
    return lineage.moved_rows(*heads)


def _sample(source: Source, name: str) -> Tensor:
    item = source.items[name]
    out = torch.empty(min(item.numel, _SAMPLE), dtype=item.dtype)
    source.read(name, out)
    return out[None]


def _sort(found: Fit, sources: Sequence[Source]) -> None:
    """Sort the reference's tensors into merged and copied ones, with notes."""
    reference = found.reference
    alone = []
    for name, item in reference.items.items():
        if not all(name in source.items for source in sources):
            alone.append(name)
            found.copied.append(name)
        elif item.dtype.is_floating_point:
            found.merged.append(name)
        else:
            found.copied.append(name)
            _refuse_differing(name, [source for source in sources if source not in found.differences])
    if alone:
        found.notes.append(
            f"copied from {reference.file}, because another file lacks these tensors: {some(alone, 3)}"
        )
    left = dict.fromkeys(n for source in sources for n in source.items if n not in reference.items)
    if left:
        found.notes.append(f"left out, because {reference.file} lacks these tensors: {some(list(left), 3)}")
    if counters := [name for name in found.copied if name.endswith(_COUNTER)]:
        found.notes.append(f"copied from {reference.file}: {some(counters, 3)}, {COUNTERS}")
    if statistics := [name for name in found.merged if name.endswith(_STATISTICS)]:
        found.notes.append(
            f"{len(statistics)} statistics of BatchNorm are merged like weights ({some(statistics, 2)}); "
            f"{STATISTICS}"
        )


def _refuse_differing(name: str, sources: Sequence[Source]) -> None:
    """Refuse integer tensors that differ, but for counters of training steps."""
    if name.endswith(_COUNTER):
        return
    first, *others = sources
    expected = first.tensor(name)
    for other in others:
        got = other.tensor(name)
        if got.dtype != expected.dtype:
            raise ValueError(
                f"merge: {name} is {expected.dtype} in {first.file} and {got.dtype} in {other.file}; "
                "integers are copied, not merged, so they must be of one dtype"
            )
        if not torch.equal(got, expected):
            raise ValueError(
                f"merge: {name} differs between {first.file} and {other.file}; integers are copied, "
                "so they must be equal"
            )


def check_out(request: Request) -> None:
    """Refuse a result that cannot be written, exists, or would replace a file of an input.

    Raises:
        ValueError: it is one of these; the message says what to do.
    """
    out = request.out
    disk.check_targets(files=[out])
    if (length := len(os.fsencode(out.name))) > disk.LONGEST_NAME:
        raise ValueError(
            f"merge: the name of {out} has {length} bytes; files can be written with names of at most "
            f"{disk.LONGEST_NAME}"
        )
    if not out.parent.is_dir():
        raise ValueError(f"merge: the folder of the result, {out.parent}, does not exist; create it first")
    if out.exists():
        for file in (request.zeroshot, *request.finetuned):
            if file is not None and any(part.samefile(out) for part in _parts(file)):
                raise ValueError(
                    f"merge: {out} is one of the models ({file}); write the result to another file"
                )
        if not request.overwrite:
            raise ValueError(f"merge: {out} exists; choose another file, or replace it with --overwrite")


def _parts(file: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Return the files of a checkpoint; none if it cannot be read, which is refused when it is opened."""
    try:
        return folders.parts(file)
    except ValueError:
        return ()


def refuse_equal(opened: Sequence[Source], digests: Sequence[str]) -> None:
    """Refuse two copies of one fine-tuned model.

    Args:
        opened: the fine-tuned models.
        digests: SHA-256 of each.

    Raises:
        ValueError: two are equal; the message names them.
    """
    known: dict[str, Source] = {}
    for source, digest in zip(opened, digests, strict=True):
        if (other := known.setdefault(digest, source)) is not source:
            raise ValueError(
                f"merge: {other.file} and {source.file} have the same content (SHA-256 "
                f"{digest[:12]}...); name each model once"
            )
