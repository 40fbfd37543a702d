"""The best point of each model's path, by its accuracy, as a checkpoint in the directory of the run."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from ..checkpoints import activation
from ..clip import architectures
from ..common import disk
from ..common.words import visible
from ..config.request import Request
from ..config.settings import Running
from ..merge import metadata, provenance
from ..merge.sources import view
from ..merge.writing import Entry, writing
from ..names import BestBy
from .wiring import Models

FOLDER = "best"
_KINDS = {"id": "in distribution", "ood": "out of distribution"}


@dataclass(frozen=True)
class Best:
    """The best measured position of a model.

    Attributes:
        alpha: the position; of equal ones the smallest.
        accuracy: the mean over the data sets there.
        datasets: whose accuracies decided.
    """

    alpha: float
    accuracy: float
    datasets: tuple[str, ...]


def check(request: Request) -> None:
    """Refuse a request whose best points cannot be known or written. (Every study needs interpolation.)

    Raises:
        ValueError: no data set is of the chosen kind, or the files cannot be written.
    """
    how = request.of(Running)
    if not how.save_best:
        if how.best_by != "id":
            raise ValueError("argument --best-by: it selects what --save-best writes; add --save-best")
        return
    if not _deciding(request):
        other = "ood" if how.best_by == "id" else "id"
        raise ValueError(
            f"argument --save-best: no data set is {_KINDS[how.best_by]}; add one, or use --best-by {other}"
        )
    _check_targets(targets(request.out, request.zoo.finetuned))


def targets(folder: pathlib.Path, models: Iterable[str]) -> dict[str, pathlib.Path]:
    """Return the file of each model.

    Args:
        folder: directory of the run.
        models: names of the models. They may be paths, so each ``/`` becomes ``-``.

    Raises:
        ValueError: two models have one file, or a name is too long for a file.
    """
    found: dict[str, pathlib.Path] = {}
    for model in models:
        name = f"{visible(model).replace('/', '-')}.safetensors"
        if len(os.fsencode(name)) > disk.LONGEST_NAME:
            raise ValueError(
                f"argument --save-best: the name of {visible(model)} is too long for a file name; "
                "give the model a shorter name in a zoo file"
            )
        file = folder / FOLDER / name
        if other := [visible(each) for each in found if found[each] == file]:
            raise ValueError(
                f"argument --save-best: {other[0]} and {visible(model)} would both be written to "
                f"{name}; give them different names in a zoo file"
            )
        found[model] = file
    return found


def _check_targets(files: dict[str, pathlib.Path]) -> None:
    disk.check_targets(files.values(), folders={file.parent for file in files.values()})
    if others := [file for file in files.values() if file.exists() and not _is_ours(file)]:
        raise ValueError(
            f"argument --save-best: {others[0]} exists, and was not written by --save-best; move it, or "
            "choose another --out"
        )


def _is_ours(file: pathlib.Path) -> bool:
    """Return whether a file is the best point of a path, by its header."""
    try:
        return "selection" in (provenance(file) or {})
    except (OSError, ValueError):
        return False


def remove_earlier(folder: pathlib.Path) -> None:
    """Remove the best points of an earlier run, which another one replaces; other files stay.

    Args:
        folder: directory of the run.

    Raises:
        OSError: a file cannot be removed.
    """
    if (folder / FOLDER).is_symlink():
        return
    for file in (folder / FOLDER).glob("*.safetensors"):
        if not file.is_symlink() and _is_ours(file):
            file.unlink()


def best(rows: pd.DataFrame, model: str, datasets: tuple[str, ...]) -> Best:
    """Find the position with the highest mean accuracy over data sets.

    Args:
        rows: of a run.
        model: name of the fine-tuned model.
        datasets: names of the data sets; each counts the same.

    Raises:
        ValueError: no position was measured on all of them.
    """
    own = rows[(rows["study"] == "interpolation") & (rows["model"] == model) & rows["dataset"].isin(datasets)]
    table = own.pivot_table("accuracy", "alpha", "dataset", dropna=False).reindex(columns=list(datasets))
    means = table.mean(axis=1, skipna=False).dropna().sort_index()
    if means.empty:
        raise ValueError(f"no position of {model} was measured on all of {', '.join(datasets)}")
    return Best(float(means.idxmax()), float(means.max()), datasets)  # idxmax: the first, so the smallest


def save(request: Request, models: Models, rows: pd.DataFrame, folder: pathlib.Path) -> list[str]:
    """Write the best point of each model to its file (:func:`targets`).

    Tensors have the live model's names and dtype, head included: the very weights that were measured.

    Args:
        request: of the run.
        models: its models.
        rows: what was measured.
        folder: directory of the run.

    Returns:
        For each model a sentence on what was written.

    Raises:
        ValueError: as :func:`best`.
        OSError: the disk is full, or a file has changed.
    """
    files = targets(folder, request.zoo.finetuned)
    _check_targets(files)
    (folder / FOLDER).mkdir(exist_ok=True)
    found = []
    for name, file in files.items():
        chosen = best(rows, name, _deciding(request))
        with models.unchanged(name):
            _write(request, models, name, chosen, file)
        found.append(
            f"{file}: alpha {chosen.alpha:g}, accuracy {chosen.accuracy:.4f} "
            f"({_KINDS[request.of(Running).best_by]}: {', '.join(chosen.datasets)})"
        )
    return found


def _deciding(request: Request) -> tuple[str, ...]:
    ood = request.of(Running).best_by == "ood"
    return tuple(name for name, data in request.zoo.data.items() if data.ood is ood)


def _write(request: Request, models: Models, name: str, chosen: Best, file: pathlib.Path) -> None:
    path = models.path(name)
    path.write(chosen.alpha)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in path.model.state_dict().items()}
    ordered = sorted(state.items(), key=lambda item: -item[1].dtype.itemsize)
    entries = [Entry(key, tuple(tensor.shape), tensor.dtype) for key, tensor in ordered]
    by: BestBy = request.of(Running).best_by
    zoo = request.zoo
    sources = [
        metadata.source(weights.source, models.hashes[weights.source], role, key=weights.key)
        for weights, role in ((zoo.zeroshot, "zero-shot"), (zoo.finetuned[name], "fine-tuned"))
    ]
    selection = {"by": by, "datasets": list(chosen.datasets), "accuracy": chosen.accuracy}
    _, model_cfg, _ = architectures.config(zoo.arch)
    quick = activation.of_model_cfg(model_cfg)
    texts = metadata.texts("interpolate", {"alpha": [chosen.alpha]}, sources, [], quick, selection=selection)
    with writing(file, entries, texts, overwrite=True) as writer:
        for _, tensor in ordered:
            writer.write(view(tensor))
        writer.finish(texts)
