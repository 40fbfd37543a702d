"""``python -m rft_fast.sweep``: fine-tuned models through the paper's studies, on the command line.

It wires checkpoints, data, studies, rows and figures together and computes nothing itself.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__, checkpoints, classifier, datasets, figures, results, studies, zoo
from . import path as paths
from .evaluate import Evaluator
from .kernels import registry

STUDIES = ("interpolation",)
ALPHAS = "0:1:11"
BATCH_SIZE = 512

DESCRIPTION = """\
Walk the straight line in weight space from a zero-shot CLIP model (alpha = 0) to models fine-tuned
from it (alpha = 1), measure what happens on the way, and leave rows and figures in a directory.

studies (none named: all of them):
  interpolation   accuracy and loss along the path: gain, barrier, instability, mode (Figure 1)
"""

EXAMPLES = """\
examples:
  python -m rft_fast.sweep
  python -m rft_fast.sweep interpolation --alphas 0:1:21 --samples 200 --out runs/digits
  python -m rft_fast.sweep --arch ViT-B-32-quickgelu \\
      --zeroshot zeroshot.pt --finetuned soup/model_*.pt \\
      --id-data imagenet=imagenet/val --data v2=imagenetv2 sketch=sketch --samples 5000
"""

LEGEND = """\
Accuracies, gain and instability in accuracy in points (%), barrier and instability in loss in nats.
Gain (Eq. 2): highest accuracy on the path minus zero-shot; in brackets its pointwise 95 % normal
interval at that alpha, paired over images. Choosing the best alpha on the same images makes the
gain optimistic. Barrier (Eq. 1): highest loss minus zero-shot. Instability (Def. 1): how much worse
the worst position is than the mean of the two ends. Mode, on out-of-distribution data: failure when
no alpha beats zero-shot, gain when one does, high gain from {xi:g} points on (--xi)."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for, found valid. Nothing is loaded yet."""

    studies: list[str]
    zoo: zoo.Zoo
    alphas: list[float]
    samples: int | None
    batch_size: int
    seed: int
    device: torch.device
    impl: str
    xi: float
    out: Path
    overwrite: bool


@dataclass(frozen=True)
class Loaded:
    """The live model, one end of its paths, what it is scored on, and SHA-256 of all that."""

    live: classifier.ImageClassifier
    zeroshot: dict[str, Tensor]
    evaluator: Evaluator
    hashes: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; ``argv`` without the program's name, None for the process's own.

    Returns 0 when all is done, 1 when the disk failed on the way, 130 when interrupted; the rows
    measured until then are on disk. Exits with 2, as argparse does, for whatever is refused; that
    is always before the first measurement, with earlier rows untouched.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    arguments = parser.parse_args(argv)
    run: results.Run | None = None
    try:
        try:
            request = _request(arguments)
            loaded = _load(request)
            config = _config(request, loaded, argv)
            run = results.Run(request.out, config, overwrite=request.overwrite)
        except (OSError, RuntimeError, ValueError) as error:
            parser.error(str(error))
        with run:
            _measure(request, loaded, run)
            rows = run.rows()
        figure = run.figure("interpolation")
        figures.interpolation(rows, figure)
        print(report(rows, request.xi))
        print(
            f"\nfigure   {figure}\nrows     {run.directory / 'rows.csv'} (also rows.sqlite)\n"
            f"request  {run.directory / 'config.json'}"
        )
    except KeyboardInterrupt:
        print(f"\nsweep: interrupted; {_kept(run)}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nsweep: error: {error}; {_kept(run)}", file=sys.stderr)
        return 1
    return 0


def report(rows: pd.DataFrame, xi: float) -> str:
    """The rows of a run in words: one table per data set, then what its columns mean."""
    header = [
        ["", "zero-", "fine-", "best", "", "", "instability", "", ""],
        ["model", "shot", "tuned", "alpha", "gain [95 %]", "barrier", "loss", "accuracy", "mode"],
    ]
    lines = []
    for dataset, facts in studies.summarize(rows, xi).groupby("dataset", sort=False):
        first = facts.iloc[0]
        where = "out of" if first["ood"] else "in"
        lines += [f"\n{dataset}: {where} distribution, {first['samples']:,} images, {first['alphas']} alphas"]
        table = [*header, *map(_cells, facts.fillna({"mode": "-"}).to_dict("records"))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, *middle, mode in table:
            cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
            lines.append("  ".join([f"  {name:<{widths[0]}}", *cells, mode]))
    lost = int((~np.isfinite(rows["loss"])).sum())
    lines += ["", LEGEND.format(xi=100 * xi)]
    lines += [f"{lost} mean losses are not finite; nothing was left out of them."] if lost else []
    return "\n".join(lines)


def _cells(fact: dict[Any, Any]) -> list[str]:
    gain, low, high = (100 * fact[name] for name in ("gain", "gain_low", "gain_high"))
    interval = f" [{low:+.1f}, {high:+.1f}]"
    return [
        fact["model"],
        f"{100 * fact['zero_shot']:.1f}",
        f"{100 * fact['fine_tuned']:.1f}",
        f"{fact['best_alpha']:g}",
        f"{gain:+.1f}{interval}" if gain else "0.0" + " " * len(interval),
        f"{fact['barrier']:.3f}",
        f"{fact['instability_loss']:.3f}",
        f"{100 * fact['instability_accuracy']:.1f}",
        fact["mode"],
    ]


# --- the command line ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rft_fast.sweep",
        usage="python -m rft_fast.sweep [STUDY ...] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", type=_study, help=argparse.SUPPRESS)

    models = parser.add_argument_group(
        "models and data", "all of these, or none for the digits zoo that comes with rft_fast"
    )
    models.add_argument(
        "--arch", metavar="NAME", help="open_clip model name, or a JSON file in open_clip's format"
    )
    models.add_argument(
        "--zeroshot", metavar="PATH", type=Path, help="zero-shot checkpoint: image encoder and head"
    )
    models.add_argument(
        "--finetuned",
        metavar="PATH",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="checkpoints fine-tuned from it",
    )
    models.add_argument(
        "--data",
        metavar="NAME=PATH",
        type=_named_path,
        nargs="+",
        action="extend",
        default=[],
        help="out-of-distribution data: a folder of class folders, or an .npz with images and labels",
    )
    models.add_argument(
        "--id-data",
        metavar="NAME=PATH",
        type=_named_path,
        nargs="+",
        action="extend",
        default=[],
        help="in-distribution data, shown beside the others; no mode is given there",
    )

    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--alphas",
        metavar="ALPHA",
        type=_alphas,
        nargs="+",
        action="extend",
        help=f"positions, as numbers or start:stop:count (default: {ALPHAS})",
    )
    what.add_argument(
        "--samples",
        metavar="N",
        type=_positive,
        help="images of each data set, drawn at random (default: all)",
    )
    what.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        default=0,
        help="chooses the images of --samples (default: 0)",
    )
    what.add_argument(
        "--xi",
        metavar="X",
        type=_fraction,
        default=studies.XI,
        help="gain in accuracy that counts as high, as a fraction (default: %(default)s)",
    )

    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="directory for rows and figures (default: a new one in rft-runs/)",
    )
    how.add_argument("--overwrite", action="store_true", help="replace the rows of an earlier run in DIR")
    how.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    how.add_argument(
        "--impl",
        choices=registry.IMPLS,
        default="auto",
        help="kernels that write the weights (default: auto, the fastest that works)",
    )
    how.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        default=BATCH_SIZE,
        help="images per forward pass (default: %(default)s)",
    )
    return parser


def _study(text: str) -> str:
    if text not in STUDIES:
        near = difflib.get_close_matches(text, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(STUDIES)}"
        raise argparse.ArgumentTypeError(f"no study is called {text!r}; {hint}")
    return text


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, Path(path)


def _alphas(text: str) -> list[float]:
    """One number, or start:stop:count evenly spaced ones with both ends."""
    try:
        if ":" not in text:
            return [float(text)]
        start, stop, count = text.split(":")
        if int(count) < 2:
            raise ValueError("a range needs both ends")
        # Rounded, so that tenths are written as people write them.
        return [round(x, 12) for x in np.linspace(float(start), float(stop), int(count)).tolist()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or start:stop:count with a count of at least 2, got {text!r}"
        ) from None


def _positive(text: str) -> int:
    return _integer(text, 1, sys.maxsize)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)


def _integer(text: str, low: int, high: int) -> int:
    if not (text.isdecimal() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a fraction from 0 to below 1 (two points of accuracy are 0.02), got {text!r}"
        )
    return value


# --- from the command line to what is measured ------------------------------------------------


def _request(arguments: argparse.Namespace) -> Request:
    """Checks what argparse cannot, without loading anything."""
    chosen = [a for part in arguments.alphas or [_alphas(ALPHAS)] for a in part]
    try:
        alphas = studies.check_alphas(chosen)
    except ValueError as error:
        raise ValueError(f"argument --alphas: {error}") from None
    its_zoo = _zoo(arguments)
    device = _device(arguments.device)
    try:
        registry.pick(arguments.impl, device)
    except RuntimeError as error:
        raise ValueError(f"argument --impl: {error}") from None
    classifier.preprocess(its_zoo.arch)  # refuses an unknown architecture
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = arguments.out or Path("rft-runs", f"{its_zoo.name}-{stamp}")
    results.check(out, arguments.overwrite)
    return Request(
        studies=list(dict.fromkeys(arguments.studies)) or list(STUDIES),
        zoo=its_zoo,
        alphas=alphas,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=device,
        impl=arguments.impl,
        xi=arguments.xi,
        out=out,
        overwrite=arguments.overwrite,
    )


def _zoo(arguments: argparse.Namespace) -> zoo.Zoo:
    given = {
        "--arch": arguments.arch,
        "--zeroshot": arguments.zeroshot,
        "--finetuned": arguments.finetuned,
        "--data or --id-data": arguments.data or arguments.id_data,
    }
    if not any(given.values()):
        return zoo.digits()
    if missing := [option for option, value in given.items() if not value]:
        raise ValueError(
            f"a sweep of your own models needs {', '.join(given)}; missing: {', '.join(missing)} "
            "(leave all of them out for the digits zoo)"
        )
    for file in (arguments.zeroshot, *arguments.finetuned):
        if not file.is_file():
            raise ValueError(f"argument --zeroshot, --finetuned: there is no file {file}")
    sources = [(name, zoo.DataSource(path, ood=False)) for name, path in arguments.id_data]
    sources += [(name, zoo.DataSource(path, ood=True)) for name, path in arguments.data]
    for name, source in sources:
        if not source.path.exists():
            raise ValueError(f"argument --data, --id-data: {name}: there is no {source.path}")
    _distinct("--data, --id-data", [name for name, _ in sources])
    # Stems are the shortest names; files such as */final.pt need their whole paths.
    names = [file.stem for file in arguments.finetuned]
    if len(set(names)) < len(names):
        names = [str(file) for file in arguments.finetuned]
    _distinct("--finetuned", names)
    return zoo.Zoo(
        name=Path(arguments.arch).stem,
        arch=arguments.arch,
        zeroshot=arguments.zeroshot,
        finetuned=dict(zip(names, arguments.finetuned, strict=True)),
        data=dict(sources),
    )


def _distinct(option: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"argument {option}: given more than once: {', '.join(twice)}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # backends differ in how they say no
        reason = str(error).partition("\n")[0]
        raise ValueError(f"argument --device: {name!r} cannot be used: {reason}") from None
    return device


def _load(request: Request) -> Loaded:
    """Models first, each put on its path once, so that none fails later; then data, which takes longer."""
    source = request.zoo
    state = checkpoints.load(source.zeroshot, request.device)
    live = classifier.build(source.arch, state)[0].to(request.device)
    zeroshot = classifier.split(state)[0]
    hashes = {str(source.zeroshot): checkpoints.sha256(source.zeroshot)}
    for file in tqdm(source.finetuned.values(), "checking models", disable=None, leave=False):
        _path(request, live, zeroshot, file)
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
    return Loaded(live, zeroshot, Evaluator(live, sets, request.batch_size), hashes)


def _path(
    request: Request, live: classifier.ImageClassifier, zeroshot: dict[str, Tensor], file: Path
) -> paths.Path:
    """The live model on the way to one fine-tuned checkpoint."""
    try:
        finetuned = classifier.split(checkpoints.load(file))[0]
        return paths.Path(live, zeroshot, finetuned, impl=request.impl)
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

    source, device = request.zoo, request.device
    return {
        "command": shlex.join(["python", "-m", "rft_fast.sweep", *argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "studies": request.studies,
        "zoo": source.name,
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
            for data in loaded.evaluator.datasets
        },
        "alphas": request.alphas,
        "samples": request.samples,
        "seed": request.seed,
        "xi": request.xi,
        "batch_size": request.batch_size,
        "precision": loaded.evaluator.precision,
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
    finetuned = request.zoo.finetuned
    positions = len(finetuned) * len(request.alphas)
    with tqdm(total=positions, unit="position", disable=None) as bar:
        for name, file in finetuned.items():
            bar.set_description(name)
            # The path is a temporary, so that one fine-tuned model is gone when the next is loaded.
            studies.interpolation(
                _path(request, loaded.live, loaded.zeroshot, file),
                loaded.evaluator,
                request.alphas,
                model=name,
                sink=run.add,
                progress=bar.update,
            )


def _kept(run: results.Run | None) -> str:
    if run is None:
        return "nothing was measured yet"
    return f"the {len(results.load(run.directory))} rows so far are in {run.directory}"


if __name__ == "__main__":
    sys.exit(main())
