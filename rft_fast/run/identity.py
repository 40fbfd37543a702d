"""What a run is: its complete request, with everything that its numbers depend on, for ``config.json``."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, checkpoints, results
from ..clip import architectures
from ..common import files
from ..config import zoo
from ..config.request import Request
from ..config.settings import Computed, Running, builder
from ..evaluate import Evaluator
from ..kernels import registry
from ..results.loading import remedy
from ..studies.chance import AMONG
from . import wiring
from .bench import Bench
from .wiring import Models

# What a run finds out where its request leaves it open.
_FOUND = ("device", "impl", "batch_size", "memory_limit")


def asked(request: Request) -> dict[str, Any]:
    """What a request says of its numbers, as JSON has it: what is known before anything is loaded."""
    known: dict[str, Any] = {
        "everything": request.everything,
        "studies": request.studies,
        "measured": request.measured,
        **builder().as_json(request.settings),
    }
    for name in _FOUND:
        del known["settings"]["computed"][name]
    source = request.zoo
    # A file goes by its content, and not by where it lies.
    arch, file = source.arch, Path(source.arch)
    content = files.sha256(file) if file.is_file() else None
    known |= {
        "zoo": source.name,
        "arch": file.name if content else arch,
        "sha256 of the architecture": content,
    }
    if arch.startswith(architectures.HUB):
        # A repository goes by its configuration: the commit, which may change another file, is only recorded.
        pinned = {"path": arch, "sha256": _digest(architectures.config(arch)[1:])}
        known |= {"arch": arch.partition("@")[0], "repository of the architecture": pinned}
    found: dict[str, Any] = json.loads(json.dumps(known))
    return found


def known(models: Models) -> dict[str, Any]:
    """What is known of the complete request once its models are loaded, before any image is decoded."""
    request = models.request
    source, device = request.zoo, request.device

    def content(weights: zoo.Weights) -> dict[str, object]:
        file = Path(weights.source)
        where = str(file.absolute()) if file.exists() else weights.source
        if weights is source.zeroshot and (commit := checkpoints.commit(models.common[0])):
            where = f"{where.partition('@')[0]}@{commit}"
        key = {} if weights.key is None else {"key": weights.key}
        return {"path": where, "format": weights.format, **key, "sha256": models.hashes[weights.source]}

    found = asked(request)
    found["settings"]["computed"] |= {
        "device": str(device),
        "impl": registry.pick(request.of(Computed).impl, device).name,
    }
    return {
        **found,
        **({"resize_positions": True} if source.resize_positions else {}),
        "zeroshot": content(source.zeroshot),
        "finetuned": {name: content(weights) for name, weights in source.finetuned.items()},
        "head": {
            **asdict(source.head),
            "given": _file(models, source.head.given),
            "sha256 of the prompts": wiring.digest_prompts(models),
        },
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "versions": {
            "rft_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": version("open_clip_torch"),
            "timm": version("timm"),
            "numpy": version("numpy"),
        },
    }


def complete(models: Models, bench: Bench) -> dict[str, Any]:
    """The complete request, with what it runs on; neither command nor date."""
    request = models.request
    source, whole = request.zoo, bench.evaluators["all images"]

    def images(evaluator: Evaluator) -> dict[str, int]:
        return {data.name: len(data.labels) for data in evaluator.datasets}

    early = known(models)
    computed = replace(
        request.of(Computed),
        **{name: early["settings"]["computed"][name] for name in ("device", "impl")},
        memory_limit=whole.memory_limit,
    )
    found: dict[str, Any] = {
        **early,
        **builder().as_json(request.settings.but(computed)),
        "data": {
            data.name: {
                "path": str(source.data[data.name].path.absolute()),
                "kind": source.data[data.name].kind,
                "labels": _labels(source.data[data.name].labels),
                "classes": None if data.classes is None else len(data.classes),
                "ood": data.ood,
                "samples": len(data.labels),
                "sha256 of scored images, labels and classes": wiring.digest(data),
            }
            for data in whole.datasets
        },
        AMONG: {data.name: wiring.scored_among(data, models.rows.count) for data in whole.datasets},
        "layer images": images(bench.evaluators["images of layers and prune"]),
        "sharpness images": images(bench.evaluators["images of sharpness"]),
        "threads": torch.get_num_threads(),
        "threads of a batch": whole.threads_of_a_batch,
        "platform": platform.platform(),
    }
    return found


def command(argv: Sequence[str]) -> str:
    """A command line as people type it."""
    return shlex.join(["python", "-m", "rft_fast.sweep", *argv])


def dated(config: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """With the command, and the time now."""
    return {
        "command": command(argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **config,
    }


def resumed(request: Request) -> Request:
    """The request, with what the run in its directory found out for itself where this one leaves it open.

    Batch size and memory limit decide which images are computed together, and so the last bits of losses.

    Raises ValueError or OSError where the directory cannot be written to or resumed.
    """
    running, computed = request.of(Running), request.of(Computed)
    try:
        results.check(request.out, running.overwrite, asked(request))
    except results.Damaged as error:
        # A plan writes nothing, so it only says how to save what can be read.
        cure = remedy(request.out) if running.plan else results.recover(request.out)
        raise ValueError(f"{error}; {cure}") from error
    there = None if running.overwrite else results.recorded(request.out)
    if there is None:
        return request
    found = there["settings"]["computed"]
    sizes = {name: found[name] for name in ("batch_size", "memory_limit") if getattr(computed, name) is None}
    for name, size in sizes.items():
        if not (size is None or (type(size) is int and 0 < size < sys.maxsize)):
            raise ValueError(
                f"results: the run in {request.out} has {name} {size!r}; expected a number above 0"
            )
    return request.but(replace(computed, **sizes))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(models: Models, file: Path | None) -> dict[str, str] | None:
    if file is None:
        return None
    return {"path": str(file.absolute()), "sha256": models.inputs.sha256(file)}


def _labels(labels: Path | Mapping[str, object] | str | None) -> object:
    """What they come to is in the hash of the data."""
    return {"path": str(labels.absolute())} if isinstance(labels, Path) else labels
