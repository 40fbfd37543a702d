"""``python -m rft_fast.sweep``: fine-tuned models through the paper's studies, on the command line.

It wires request, checkpoints, data, studies, rows and figures together and computes nothing itself.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from tqdm import tqdm

from . import __version__, figures, meter, planning, results, studies, summary, wiring, zoo
from .evaluate import Evaluator
from .kernels import registry
from .options import parser
from .request import Request, read
from .wiring import Models, Studies


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
            if request.plan:
                print(planning.plan(request))
                return 0
            models = wiring.Models.load(request)
            sets = wiring.load_images(request, models.rows)
            work = wiring.make(models, sets)
            config = _config(models, work, argv)
            run = results.Run(request.out, config, overwrite=request.overwrite)
        except (OSError, RuntimeError, ValueError) as error:
            parser().error(str(error))
        with run:
            took = _measure(models, work, run)
            rows = run.rows()
        _draw(request, rows, run, took)
    except KeyboardInterrupt:
        print(f"\nsweep: interrupted; {_kept(run)}", file=sys.stderr)
        return 130
    except (OSError, MemoryError) as error:
        print(f"\nsweep: error: {error}; {_kept(run)}", file=sys.stderr)
        return 1
    return 0


# --- what is measured ------------------------------------------------------------------------


def _config(models: Models, work: Studies, argv: Sequence[str]) -> dict[str, object]:
    """The complete request, with what it ran on, for ``config.json``."""
    request = models.request

    def content(weights: zoo.Weights) -> dict[str, object]:
        file = Path(weights.source)
        where = str(file.absolute()) if file.is_file() else weights.source
        return {"path": where, "format": weights.format, "sha256": models.hashes[weights.source]}

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
        "cache",
        "plan",
    ):
        del asked[name]
    return {
        "command": shlex.join(["python", "-m", "rft_fast.sweep", *argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "zoo": source.name,
        "options of the zoo": list(source.options),
        "arch": source.arch,
        "zeroshot": content(source.zeroshot),
        "finetuned": {name: content(weights) for name, weights in source.finetuned.items()},
        "head": {
            **asdict(source.head),
            "given": None if source.head.given is None else str(source.head.given.absolute()),
            "sha256 of the prompts": wiring.digest_prompts(models),
        },
        "data": {
            data.name: {
                "path": str(source.data[data.name].path.absolute()),
                "kind": source.data[data.name].kind,
                "labels": _plain(source.data[data.name].labels),
                "classes": None if data.classes is None else len(data.classes),
                "ood": data.ood,
                "samples": len(data.labels),
                "sha256 of scored images, labels and classes": wiring.digest(data),
            }
            for data in work.whole.datasets
        },
        **asked,
        "layer images": images(work.by_layer),
        "sharpness images": images(work.sharpness),
        "batch_size": work.whole.batch_size,
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


def _plain(labels: Path | Mapping[str, object] | None) -> object:
    return str(labels.absolute()) if isinstance(labels, Path) else labels


def _measure(models: Models, work: Studies, run: results.Run) -> list[dict[str, object]]:
    """All studies, one after the other, so that the first ones' rows can choose models and layers.

    Returns what each study took: models, seconds, peak memory in bytes.
    """
    request, took = models.request, []
    chosen = {"interpolation": list(request.zoo.finetuned)}
    for study in request.measured:
        if study == "correlation":
            continue  # made of the others' rows
        start = perf_counter()
        with meter.Peak(request.device) as peak, tqdm(unit="position", disable=None, leave=False) as bar:
            for name in chosen[study]:
                path = models.path(name)
                bar.set_description(f"{study}: {name}")
                steps = work.steps(study, path)
                bar.total = None if steps is None else steps * len(chosen[study])
                stragglers = None
                if study == "prune":
                    found = summary.to_prune(request, run.rows(), name)
                    stragglers = {criterion: layers for criterion, layers in found.items() if layers}
                work.run(study, path, stragglers, model=name, sink=run.add, progress=bar.update)
                del path  # one fine-tuned model is gone before the next is loaded
        took.append(
            {
                "study": study,
                "models": len(chosen[study]),
                "seconds": perf_counter() - start,
                "peak_memory": peak.bytes,
            }
        )
        if study == "interpolation":
            chosen |= summary.choose(request, run.rows())
    return took


# --- from the rows to pictures and words ------------------------------------------------------


def _draw(
    request: Request, rows: pd.DataFrame, run: results.Run, took: Sequence[Mapping[str, object]]
) -> None:
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
    pd.DataFrame(took).to_csv(run.table("cost"), index=False)
    print(summary.report(request, rows, table))
    print("\n" + summary.took(took))
    print(
        f"\nfigures  {run.figure(request.measured[0]).parent} ({', '.join(request.measured)})\n"
        f"rows     {run.directory / 'rows.csv'} (also rows.sqlite)\n"
        f"request  {run.directory / 'config.json'}; time and memory in cost.csv"
    )


def _kept(run: results.Run | None) -> str:
    if run is None:
        return "nothing was measured yet"
    return f"the {len(results.load(run.directory))} rows so far are in {run.directory}"


if __name__ == "__main__":
    sys.exit(main())
