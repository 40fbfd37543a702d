"""``python -m rft_fast.sweep``: fine-tuned models through the paper's studies, on the command line.

It wires request, checkpoints, data, studies, rows and figures together and computes nothing itself.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__, checkpoints, classifier, datasets, figures, results, studies, summary
from . import path as paths
from .evaluate import Evaluator
from .kernels import registry
from .request import Request, Subset, parser, read


@dataclass(frozen=True)
class Loaded:
    """The live model, one end of its paths, what it is scored on, and SHA-256 of all that.

    whole: all data sets. by_layer, sharpness: the images of those studies.
    """

    live: classifier.ImageClassifier
    zeroshot: dict[str, Tensor]
    whole: Evaluator
    by_layer: Evaluator
    sharpness: Evaluator
    hashes: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; ``argv`` without the program's name, None for the process's own.

    Returns 0 when all is done, 1 when the disk failed on the way, 130 when interrupted; the rows
    measured until then are on disk. Exits with 2, as argparse does, for whatever is refused; that
    is always before the first measurement, with earlier rows untouched.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    run: results.Run | None = None
    try:
        try:
            request = read(argv)
            loaded = _load(request)
            config = _config(request, loaded, argv)
            run = results.Run(request.out, config, overwrite=request.overwrite)
        except (OSError, RuntimeError, ValueError) as error:
            parser().error(str(error))
        with run:
            _measure(request, loaded, run)
            rows = run.rows()
        _draw(request, rows, run)
    except KeyboardInterrupt:
        print(f"\nsweep: interrupted; {_kept(run)}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nsweep: error: {error}; {_kept(run)}", file=sys.stderr)
        return 1
    return 0


# --- from the request to what is measured -----------------------------------------------------


def _load(request: Request) -> Loaded:
    """Models first, each put on its path once, so that none fails later; then data, which takes longer."""
    source = request.zoo
    state = checkpoints.load(source.zeroshot, request.device)
    live = classifier.build(source.arch, state)[0].to(request.device)
    zeroshot = classifier.split(state)[0]
    hashes = {str(source.zeroshot): checkpoints.sha256(source.zeroshot)}
    for file in tqdm(source.finetuned.values(), "checking models", disable=None, leave=False):
        _check_layers(request, _path(request, live, zeroshot, file))
        hashes[str(file)] = checkpoints.sha256(file)
    preprocess = classifier.preprocess(source.arch)
    sets = []
    for name, data in source.data.items():
        with tqdm(desc=f"reading {name}", disable=None, leave=False) as bar:

            def progress(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            sets.append(
                datasets.load(name, data.path, preprocess, request.samples, data.ood, request.seed, progress)
            )
        hashes[name] = _digest(sets[-1])

    def evaluator(chosen: Sequence[datasets.Dataset], normalize_logits: bool = False) -> Evaluator:
        return Evaluator(live, chosen, request.batch_size, normalize_logits=normalize_logits)

    far = [data.name for data in sets if data.ood] or [sets[0].name]
    near = [data.name for data in sets if not data.ood] or [sets[0].name]
    return Loaded(
        live,
        zeroshot,
        evaluator(sets),
        evaluator(_subset(sets, request.layer_images, far, request.seed)),
        evaluator(_subset(sets, request.sharpness_images, near, request.seed), request.normalize_logits),
        hashes,
    )


def _subset(
    sets: Sequence[datasets.Dataset], images: Subset, default: Sequence[str], seed: int
) -> list[datasets.Dataset]:
    """The images of a study: of the data sets named, or of the first by default."""
    names = images.names or default[:1]
    chosen = [data for data in sets if data.name in names]
    return [datasets.subset(data, min(images.samples, len(data.labels)), seed) for data in chosen]


def _check_layers(request: Request, path: paths.Path) -> None:
    """Refuses layers that are not on the path, with the nearest names."""
    for option, layers in (("--layers", request.layers), ("--prune-layers", request.prune_layers)):
        try:
            path.select(layers)
        except ValueError as error:
            raise ValueError(f"argument {option}: {error}") from None


def _path(
    request: Request, live: classifier.ImageClassifier, zeroshot: dict[str, Tensor], file: Path
) -> paths.Path:
    """The live model on the way to one fine-tuned checkpoint."""
    try:
        finetuned = classifier.split(checkpoints.load(file))[0]
        return paths.Path(live, zeroshot, finetuned, request.granularity, impl=request.impl)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _digest(data: datasets.Dataset) -> str:
    """SHA-256 of the images and labels that are scored."""
    digest = hashlib.sha256()
    for tensor in (data.images, data.labels):
        digest.update(tensor.contiguous().numpy().data.cast("B"))
    return digest.hexdigest()


def _config(request: Request, loaded: Loaded, argv: Sequence[str]) -> dict[str, object]:
    """The complete request, with what it ran on, for ``config.json``."""

    def content(path: Path) -> dict[str, str]:
        return {"path": str(path.absolute()), "sha256": loaded.hashes[str(path)]}

    def images(evaluator: Evaluator) -> dict[str, int]:
        return {data.name: len(data.labels) for data in evaluator.datasets}

    source, device = request.zoo, request.device
    asked = asdict(request)
    for name in (
        "zoo",
        "device",
        "impl",
        "out",
        "overwrite",
        "layer_images",
        "sharpness_images",
        "batch_size",
    ):
        del asked[name]
    return {
        "command": shlex.join(["python", "-m", "rft_fast.sweep", *argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "zoo": source.name,
        "options of the zoo": list(source.options),
        "arch": source.arch,
        "zeroshot": content(source.zeroshot),
        "finetuned": {name: content(file) for name, file in source.finetuned.items()},
        "data": {
            data.name: {
                "path": str(source.data[data.name].path.absolute()),
                "ood": data.ood,
                "samples": len(data.labels),
                "sha256 of scored images and labels": loaded.hashes[data.name],
            }
            for data in loaded.whole.datasets
        },
        **asked,
        "layer images": images(loaded.by_layer),
        "sharpness images": images(loaded.sharpness),
        "batch_size": loaded.whole.batch_size,
        "precision": loaded.whole.precision,
        "impl": registry.pick(request.impl, device).name,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "rft_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": version("open_clip_torch"),
            "numpy": version("numpy"),
        },
    }


def _measure(request: Request, loaded: Loaded, run: results.Run) -> None:
    """All studies, one after the other, so that the first ones' rows can choose models and layers."""
    finetuned = request.zoo.finetuned

    def on(name: str) -> paths.Path:
        # A temporary, so that one fine-tuned model is gone when the next is loaded.
        return _path(request, loaded.live, loaded.zeroshot, finetuned[name])

    layers = len(on(next(iter(finetuned))).select(request.layers))

    @contextmanager
    def bar(
        study: str, models: Sequence[str], steps: int | None
    ) -> Iterator[Callable[[str], dict[str, Any]]]:
        total = None if steps is None else len(models) * steps
        with tqdm(total=total, unit="position", disable=None, leave=False) as shown:

            def common(model: str) -> dict[str, Any]:
                shown.set_description(f"{study}: {model}")
                return {"model": model, "sink": run.add, "progress": shown.update}

            yield common

    with bar("interpolation", list(finetuned), len(request.alphas)) as common:
        zeroshot = loaded.whole.scores()  # where every path has just begun
        for name in finetuned:
            studies.interpolation(on(name), loaded.whole, request.alphas, zeroshot=zeroshot, **common(name))

    chosen = summary.choose(request, run.rows())
    if "layers" in request.measured:
        models = chosen["layers"]
        with bar("layers", models, layers * (len(request.layer_alphas) - 1)) as common:
            for name in models:
                studies.layerwise_interpolation(
                    on(name),
                    loaded.by_layer,
                    request.layer_alphas,
                    request.layers,
                    others=request.others,
                    **common(name),
                )
    positions = len(request.sharpness_alphas) * len(loaded.sharpness.datasets)
    if "sharpness" in request.measured:
        models = chosen["sharpness"]
        with bar("sharpness", models, positions) as common:
            for name in models:
                studies.sharpness(
                    on(name),
                    loaded.sharpness,
                    request.sharpness_alphas,
                    request.rhos,
                    request.draws,
                    protocol=request.general,
                    **common(name),
                )
    if "layer-sharpness" in request.measured:
        models = chosen["layer-sharpness"]
        with bar("layer-sharpness", models, positions) as common:
            for name in models:
                studies.layerwise_sharpness(
                    on(name),
                    loaded.sharpness,
                    request.sharpness_alphas,
                    request.rhos,
                    request.layer_draws,
                    request.layers,
                    protocol=request.layerwise,
                    **common(name),
                )
    if "prune" in request.measured:
        rows = run.rows()
        models = chosen["prune"]
        with bar("prune", models, None) as common:
            for name in models:
                stragglers = summary.to_prune(request, rows, name)
                studies.prune_stragglers(
                    on(name),
                    loaded.by_layer,
                    request.alphas,
                    request.keep,
                    layers={criterion: names for criterion, names in stragglers.items() if names},
                    methods=request.methods,
                    seeds=request.mask_seeds,
                    control=request.control,
                    **common(name),
                )


# --- from the rows to pictures and words ------------------------------------------------------


def _draw(request: Request, rows: pd.DataFrame, run: results.Run) -> None:
    table = None
    margins = {
        "layers": {"margin": request.straggler_margin},
        "layer-sharpness": {
            "zero_margin": request.zero_margin,
            "straggler_margin": request.straggler_margin,
        },
    }
    for study in request.measured:
        if study == "correlation":
            table = studies.correlation(rows, margin=request.straggler_margin)
            table.to_csv(run.table(study), index=False)
            figures.correlation(table, run.figure(study))
        else:
            draw = getattr(figures, study.replace("-", "_"))
            draw(rows, run.figure(study), **margins.get(study, {}))
    print(summary.report(request, rows, table))
    print(
        f"\nfigures  {run.figure(request.measured[0]).parent} ({', '.join(request.measured)})\n"
        f"rows     {run.directory / 'rows.csv'} (also rows.sqlite)\n"
        f"request  {run.directory / 'config.json'}"
    )


def _kept(run: results.Run | None) -> str:
    if run is None:
        return "nothing was measured yet"
    return f"the {len(results.load(run.directory))} rows so far are in {run.directory}"


if __name__ == "__main__":
    sys.exit(main())
