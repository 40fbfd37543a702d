"""Whole sweeps against common practice: the same draws and numbers, timed in turns.

    python benchmarks/bench_sweep.py --device cpu --arch ViT-B-32 --out sweep.json --figure sweep.png
    python benchmarks/bench_sweep.py --device cuda --arch ViT-L-14 --part layer-sharpness busy
    python benchmarks/bench_sweep.py --device cuda --arch tiny ViT-B-32 --part stages graphs attention
    python benchmarks/bench_sweep.py --redraw sweep.json --figure sweep.png

Against a peer: layer-sharpness and general-sharpness (of all weights), both by the default estimator at the
standard error of the published 20 draws, layers (layer-wise interpolation), interpolation (from image files),
scaling (how the cost grows). Of the device: stages (number that the model is cut into), attention (in
float32, compared with float64), and on a GPU graphs (CUDA graphs on and off), streaming (images from the
host) and busy (share of the time in which it works). The numbers of both sides are compared in every round; a
difference fails the run. The peers are in peers_sweep.py, models and images in sweep_case.py, the parts in
sweep_sharpness.py, sweep_general.py, sweep_parts.py and sweep_device.py.

Results are written as they are measured: --out is a whole file after every timing, however the run ends. With
a DEADLINE in the environment (see record.py) nothing begins shortly before it, and what is left out is
reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import machine
import record
import sweep_case
import sweep_device
import sweep_general
import sweep_parts
import sweep_report
import sweep_sharpness
import torch
from sweep_bench import Bench, Log
from sweep_options import Options, defaults

from rft_fast.evaluate import precision as formats

PARTS: dict[str, Callable[[Bench], None]] = {
    "layer-sharpness": sweep_sharpness.layer_sharpness,
    "general-sharpness": sweep_general.general_sharpness,
    "layers": sweep_parts.layers,
    "interpolation": sweep_parts.whole_path,
    "scaling": sweep_sharpness.scaling,
    "stages": sweep_device.stages,
    "attention": sweep_device.attention,
    "graphs": sweep_device.graphs,
    "streaming": sweep_device.streaming,
    "busy": sweep_device.busy,
}
FEW = {"stages", "attention", "graphs"}  # parts that need few images


def measure(options: Options, parts: Sequence[str], log: Log) -> bool:
    """Measure all parts of one architecture. Returns whether all succeeded; a failed part does not stop the
    next.
    """
    device = torch.device(options.device)

    images = options.few if set(parts) <= FEW else options.samples

    def case() -> sweep_case.Case:
        return sweep_case.make_case(options.arch, images, device, options.batch_size)

    bench = Bench(case, options, log, machine.about(device))
    for part in parts:
        try:
            bench.measure(part, PARTS[part])
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
            bench.run.setdefault("failed", []).append({"part": part, "why": why})
            record.row("failed", arch=options.arch, part=part, why=why)
            log.save()
    return "failed" not in bench.run


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", nargs="+", choices=sweep_case.ARCHS, default=["ViT-B-32"])
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"])
    parser.add_argument("--samples", type=at_least(1), help="images that are scored")
    parser.add_argument("--batch", type=at_least(1), help="images of a batch of the peers")
    parser.add_argument("--draws", type=at_least(2))
    parser.add_argument("--layers", type=at_least(1), help="so many layers, spread evenly")
    parser.add_argument("--alphas", type=at_least(2), help="positions of an interpolation")
    parser.add_argument("--rounds", type=at_least(1))
    parser.add_argument("--rho", type=float)
    parser.add_argument("--files", type=at_least(1), help="JPEG images of each size for the interpolation")
    parser.add_argument("--few", type=at_least(1), help="images of the part graphs")
    parser.add_argument("--precisions", nargs="+", choices=formats.PRECISIONS)
    parser.add_argument("--out", type=pathlib.Path, help="JSON with every round, whole after each timing")
    parser.add_argument("--figure", type=pathlib.Path, help="how the cost grows, of the part scaling")
    parser.add_argument(
        "--redraw", type=pathlib.Path, help="measure nothing; table and figure of this JSON file"
    )
    asked = parser.parse_args(argv)
    if asked.redraw:
        return asked
    try:
        device = torch.device(asked.device)
        torch.empty(0, device=device)
        for precision in asked.precisions or ():
            formats.check(precision, device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])
    if asked.rho is not None and not 0 < asked.rho < float("inf"):
        parser.error(f"--rho: expected a number above 0, got {asked.rho}")
    if asked.figure and len(asked.arch) > 1:
        parser.error("--figure: a figure is of one architecture")
    for file in (asked.out, asked.figure):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no folder {file.parent}")
    return asked


def at_least(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {word!r}")
        return int(word)

    return number


def main(argv: Sequence[str] | None = None) -> None:
    record.start()
    asked = arguments(argv)
    if asked.redraw:
        found = json.loads(asked.redraw.read_text())
        report(found.get("runs", [found]), asked.figure)
        return
    names = "samples batch draws layers alphas rounds rho files few precisions".split()
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if "precisions" in given:  # the others are compared with fp32
        given["precisions"] = tuple(dict.fromkeys(["fp32", *given["precisions"]]))
    parts = list(PARTS) if "all" in asked.part else list(dict.fromkeys(asked.part))
    log, right, interrupted = Log(asked.out), True, False
    try:
        for arch in dict.fromkeys(asked.arch):
            right &= measure(replace(defaults(asked.device, arch), **given), parts, log)
            gc.collect()  # frees the models before the next architecture
            if torch.device(asked.device).type == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        interrupted = True
    report(log.runs, asked.figure)
    if interrupted:
        sys.exit(130)
    if not right:
        sys.exit("bench_sweep: not all parts succeeded")
    if not log.timings:
        sys.exit("bench_sweep: nothing was measured")


def report(runs: Sequence[dict[str, Any]], figure: pathlib.Path | None) -> None:
    """Print tables of the results, and draw the figure if that part was measured."""
    for run in runs:
        print(sweep_report.text(run))
        if figure and "scaling" in run["parts"]:
            sweep_report.figure(run, figure)


if __name__ == "__main__":
    main()
