"""The cost of a zoo on many GPUs, simulated: the pieces of a run are dealt to clocks instead of workers.

    python benchmarks/cluster_plan.py [--models 72] [--arch ViT-B-32] [--tflops 30] [--out FILE.json]

Counted: the FLOPs of every measurement of all five studies (rft_fast.run.pieces), on the six data sets of the
paper with their published sizes. Assumed, and printed: FLOPs per second of a GPU, seconds until a worker has
loaded and to change to another model, and seconds of the main process to store a measurement (4 ms measured
on a local disk). Pieces are cut and dealt as in rft_fast.run.cluster, except that a worker is not preferred
for the model it has loaded. A piece that begins in the middle of a position pays again for what precedes its
first layer.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import sweep_case
import torch

from rft_fast import catalogue
from rft_fast.config.request import Request, read
from rft_fast.evaluate import Evaluator
from rft_fast.run import cost, pieces
from rft_fast.run.cluster.driver import EACH
from rft_fast.run.pieces import Counter, Measurement, Piece
from rft_fast.settings import Along, Layers, Prune, Sharpness

SETS = {
    "imagenet": (50_000, False),
    "v2": (10_000, True),
    "r": (30_000, True),
    "a": (7_500, True),
    "sketch": (50_889, True),
    "objectnet": (18_574, True),
}
GPUS = (1, 8, 64, 512, 4096)


def request() -> Request:
    """Return the defaults of the sweep, but with every study on all six data sets and all models."""
    names = tuple(SETS)
    with tempfile.TemporaryDirectory() as folder:
        asked = read(["--out", f"{folder}/run", "--device", "cpu"])
    return asked.but(Along(), Layers(data=names), Sharpness(data=names), Prune())


class Zoo:
    """The costs of all measurements of a zoo of equal models."""

    def __init__(self, arch: str, models: int) -> None:
        asked = request()
        case = sweep_case.make_case(arch, 8, torch.device("cpu"))
        path = case.path()
        evaluator = Evaluator(path.model, [case.data])
        counter = Counter(asked, evaluator, SETS)
        flops = cost.flops(evaluator)
        self.models = models
        self.forward = flops.forward
        self.found: dict[str, list[tuple[Measurement, float]]] = {}
        self.other: dict[str, list[tuple[Measurement, float]]] = {}
        for study in (study for phase in catalogue.phases() for study in phase):
            for found in (self.found, self.other):  # for the second model, shared measurements exist
                measurements = counter.count(study.name, path, study.guess(asked, path.layers))
                if found is self.other and study.same_at_zeroshot:
                    measurements = [m for m in measurements if not m.zero]
                found[study.name] = [(m, float(flops.of(m.work))) for m in measurements]

    def pieces(self, phase: Sequence[str]) -> list[Piece]:
        made = []
        for study in (each.name for each in phase):
            for model in range(self.models):
                found = (self.other if model else self.found)[study]
                for ahead in (True, False) if study == "interpolation" and not model else (None,):
                    part = [(m.number, c) for m, c in found if ahead is None or m.zero is ahead]
                    numbers, costs = zip(*part, strict=True)
                    made.append(Piece(study, str(model), numbers, costs, ahead=ahead is True))
        return made

    def again(self, piece: Piece) -> float:
        """Return FLOPs that a piece repeats because it starts its own walk."""
        images = 1024 * self.forward
        return {"layers": 0.5 * images, "layer-sharpness": (0.5 + 1 + 3) * images}.get(piece.study, 0.0)


def deal(zoo: Zoo, gpus: int, rate: float, load: float, change: float, commit: float) -> dict[str, Any]:
    """Return the hours of a whole run on so many GPUs, and where they go."""
    wall, busy, count, longest, limited = load, 0.0, 0, 0.0, False
    for phase in catalogue.phases():
        todo = zoo.pieces(phase)
        total = sum(piece.cost for piece in todo)
        for ahead in (True, False):
            most = 0.0 if ahead else total / (EACH * gpus)
            split = [
                (part, zoo.again(part) if place else 0.0)
                for piece in todo
                if piece.ahead is ahead
                for place, part in enumerate(pieces.split(piece, most))
            ]
            split.sort(key=lambda pair: -pair[0].cost)
            clocks = [(0.0, "")] * gpus
            heapify(clocks)
            for part, again in split:
                at, model = heappop(clocks)
                took = (part.cost + again) / rate
                busy, count = busy + took, count + 1
                longest = max(longest, took)
                heappush(clocks, (at + took + (change if part.model != model else 0.0), part.model))
            measuring = max(at for at, _ in clocks)
            writing = commit * sum(len(part.numbers) for part, _ in split)
            limited = limited or writing > measuring
            wall += max(measuring, writing)
    found = {"gpus": gpus, "hours": wall / 3600, "pieces": count, "longest": longest}
    return {**found, "busy": busy / wall / gpus, "limited": limited}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--arch", default="ViT-B-32", choices=sweep_case.ARCHS)
    options.add_argument("--models", type=int, default=72)
    options.add_argument("--tflops", type=float, default=30.0, help="that a GPU does, assumed")
    options.add_argument("--load", type=float, default=60.0, help="seconds until a worker begins, assumed")
    options.add_argument(
        "--change", type=float, default=2.0, help="seconds to change to another model, assumed"
    )
    options.add_argument("--commit", type=float, default=0.004, help="seconds to write a measurement down")
    options.add_argument("--out", type=pathlib.Path)
    asked = options.parse_args()
    zoo = Zoo(asked.arch, asked.models)
    print(f"{asked.models} models {asked.arch}, {len(SETS)} data sets; FLOPs of each study:")
    counted = {
        study: sum(c for _, c in zoo.found[study]) + (asked.models - 1) * sum(c for _, c in zoo.other[study])
        for study in zoo.found
    }
    for study, flops in counted.items():
        numbers = len(zoo.found[study]) + (asked.models - 1) * len(zoo.other[study])
        print(f"  {study:16} {flops:.3g} in {numbers:,} measurements")
    rows = [deal(zoo, gpus, asked.tflops * 1e12, asked.load, asked.change, asked.commit) for gpus in GPUS]
    print(f"\nat {asked.tflops:g} TFLOP/s a GPU, {asked.load:g} s to load, {asked.change:g} s to change")
    print(f"models, {1000 * asked.commit:g} ms to write a measurement down:")
    print("  GPUs       hours  times faster  busy   pieces  longest piece")
    for row in rows:
        print(
            f"  {row['gpus']:5} {row['hours']:11,.2f} {rows[0]['hours'] / row['hours']:13,.1f} "
            f"{100 * row['busy']:4.0f} % {row['pieces']:8,} {row['longest']:12,.1f} s"
            + ("  (writing down takes longer)" if row["limited"] else "")
        )
    if asked.out:
        asked.out.write_text(
            json.dumps({"options": {**vars(asked), "out": None}, "flops": counted, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
