"""Interpolations against common practice: layer by layer, and the whole path from image files."""

from __future__ import annotations

import os
import pathlib
import tempfile
from dataclasses import replace
from typing import Any

import pandas as pd
import peers_sweep
import sweep_case
from sweep_bench import Bench, check_scores, turns

import rft_fast as rft
from rft_fast import datasets
from rft_fast.clip import architectures
from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.precision import exact
from rft_fast.studies import interpolation, layerwise_interpolation


def layers(bench: Bench) -> None:
    """Compare layer-wise interpolation with a state dict and a forward pass per layer and position."""
    case, o = bench.case, bench.options
    chosen = case.some_layers(o.layers)
    path, model = case.path(), case.live()
    batches = case.batches(o.batch)
    found = bench.begin({"layers": list(chosen), "rounds": [], "ratio": []})

    def ours() -> pd.DataFrame:
        return layerwise_interpolation(path, bench.evaluator(), o.grid, list(chosen))

    def peer() -> dict[tuple[str, float], tuple[float, float]]:
        with exact("fp32"):
            return peers_sweep.layer_interpolation(
                model, case.zeroshot, case.finetuned, batches, chosen, o.grid
            )

    bench.check_time("warm-up")
    ours()
    for number in range(o.rounds):
        this: dict[str, Any] = {"seconds": {}}
        found["rounds"].append(this)
        table, this["seconds"]["ours"] = bench.timed(f"ours, round {number},", ours)
        bench.timing("ours", this["seconds"]["ours"], round=number)
        theirs, seconds = bench.timed(f"the peer, round {number},", peer)
        mine = {(r.layer, r.alpha): (r.loss, r.accuracy) for r in table.itertuples()}
        largest = check_scores("layer-wise interpolation", mine, theirs, o.samples)
        this["seconds"]["peer"], this["largest_difference"] = seconds, largest
        found["ratio"] += turns([seconds], [this["seconds"]["ours"]])
        bench.timing("peer", seconds, round=number, largest_difference=largest)


def whole_path(bench: Bench) -> None:
    """From weights in memory and images on disk to rows; files are in the page cache for both sides."""
    case, o = bench.case, bench.options
    workers = os.cpu_count() or 1
    preprocess = architectures.preprocess(sweep_case.file_of(case.arch))
    live = case.live()
    found = bench.begin({})
    with tempfile.TemporaryDirectory() as scratch:
        for name, (height, width) in o.sizes.items():
            folder = pathlib.Path(scratch, name)
            bench.check_time(f"images of {name}")
            sweep_case.write_folder(folder, case.patterns, o.files, height, width)

            def ours(cache: str, folder: pathlib.Path = folder) -> pd.DataFrame:
                data = datasets.load("files", folder, preprocess, cache=pathlib.Path(cache))
                # The head has more classes than there are folders.
                data = replace(data, class_names=())
                path = rft.Path(live, case.zeroshot, case.finetuned)
                return interpolation(path, Evaluator(path.model, [data], o.batch_size), o.grid)

            def peer(folder: pathlib.Path = folder) -> dict[float, tuple[float, float]]:
                with exact("fp32"):
                    return peers_sweep.interpolation(
                        live,
                        case.zeroshot,
                        case.finetuned,
                        str(folder),
                        preprocess,
                        o.grid,
                        o.batch,
                        workers,
                    )

            found[name] = {"rounds": [], "cold": [], "warm": []}
            for number in range(o.rounds):
                with tempfile.TemporaryDirectory(dir=scratch) as cache:
                    runs = {"cold": lambda c=cache: ours(c), "peer": peer, "warm": lambda c=cache: ours(c)}
                    from_files(bench, name, found[name], number, runs)


def from_files(bench: Bench, size: str, found: dict[str, Any], number: int, runs: dict[str, Any]) -> None:
    """Measure one round: with an empty cache, the peer, with a full cache."""
    this: dict[str, Any] = {"round": number, "seconds": {}}
    found["rounds"].append(this)
    got: dict[str, dict[float, tuple[float, float]]] = {}
    seconds = this["seconds"]
    for name, run in runs.items():
        table, taken = bench.timed(f"{size}, {name}, round {number},", run)
        if name != "peer":
            table = {r.alpha: (r.loss, r.accuracy) for r in table.itertuples()}
        got[name] = table
        facts = {}
        checked = {"peer": "cold", "warm": "warm"}.get(name)  # when both sides are measured
        if checked:
            files = bench.options.files
            largest = check_scores(f"interpolation, {checked}", got[checked], got["peer"], files)
            this["largest_difference"] = max(largest, this.get("largest_difference", 0.0))
            facts["largest_difference"] = largest
        seconds[name] = taken
        if checked:
            found[checked] += turns([seconds["peer"]], [seconds[checked]])
        bench.timing(name, taken, round=number, size=size, **facts)
