"""Whole sweeps beside what people run today: same draws, same numbers out, in turns.

    python benchmarks/bench_sweep.py --device cpu --arch ViT-B-32 --out sweep.json --figure sweep.png
    python benchmarks/bench_sweep.py --device cuda --arch ViT-L-14 --part layer-sharpness
    python benchmarks/bench_sweep.py --redraw sweep.json --figure sweep.png

The parts: layer-sharpness, layers (layer-wise interpolation), interpolation (from image files), scaling
(how the cost grows), busy (of a GPU). The numbers of both sides are compared in every round; where they
differ, the run fails. The peers are in peers_sweep.py, models and images in sweep_case.py.

At equal standard error, a contender costs (seconds per draw) x (variance of one draw). Seconds are those of
the whole request, with the clean pass and, for the gradient control variate, the backward pass. Since fewer
than two draws have no standard error, the request that needs as many draws as it takes is timed, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import peers_sweep
import sweep_case
import sweep_report
import torch
from sweep_case import Case

import rft_fast as rft
from rft_fast import architectures, datasets, env
from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.precision import PRECISIONS, exact
from rft_fast.kernels import native
from rft_fast.studies import Protocol, interpolation, layerwise_interpolation, layerwise_sharpness

T = TypeVar("T")
# Largest difference of two losses that are the same number, as a share of 1 + loss: batches of other
# sizes round differently. In fewer bits that is all that can be asked for.
SAME = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}
PUBLISHED_DRAWS = 20


@dataclass(frozen=True)
class Options:
    """samples, batch: images that are scored, and how many at a time by the peers; ours takes batches of
    that size on the CPU, and on a GPU chooses. draws, rho, alpha: of the sharpness. layers: how many, evenly
    spread over the model. alphas: positions of the interpolations. noise_batch: noise anew for every batch,
    as published. files: JPEG images of each size for the interpolation. precisions: fp32 first.
    """

    arch: str = "ViT-B-32"
    device: str = "cpu"
    samples: int = 16
    batch: int = 8
    draws: int = 20
    layers: int = 6
    rounds: int = 3
    alphas: int = 11
    alpha: float = 0.5
    rho: float = 0.05
    noise_batch: bool = False
    files: int = 32
    precisions: tuple[str, ...] = ("fp32",)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def grid(self) -> list[float]:
        return [i / (self.alphas - 1) for i in range(self.alphas)]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of the image files: ImageNet's, and photographs such as ObjectNet's (12 megapixels)."""
        tiny = {"60x45": (45, 60), "400x300": (300, 400)}
        return tiny if self.arch == "tiny" else {"500x375": (375, 500), "4000x3000": (3000, 4000)}

    def protocol(self, estimator: str, seed: int) -> Protocol:
        return Protocol(estimator, seed=seed, noise_batch=self.batch if self.noise_batch else None)

    def evaluator(self, path: rft.Path, data: datasets.Dataset, precision: str = "fp32") -> Evaluator:
        return Evaluator(path.model, [data], None if self.on_gpu else self.batch, precision)


def defaults(device: str, arch: str) -> Options:
    """What a quiet machine measures in a quarter of an hour, and a GPU in minutes."""
    base = Options(arch, device)
    if arch == "tiny":
        base = replace(base, samples=40, batch=16, draws=4, layers=3, rounds=2, alphas=3, files=12)
    if not base.on_gpu:
        return base
    base = replace(base, noise_batch=True, precisions=tuple(PRECISIONS))
    if arch == "tiny":
        return base
    base = replace(base, samples=1024, batch=128, files=128)
    return replace(base, samples=512, draws=8, layers=3) if arch == "ViT-L-14" else base


# --- time and sameness ------------------------------------------------------------------------------


def timed(device: torch.device, run: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the seconds until the device is done."""
    synchronize(device)
    start = perf_counter()
    found = run()
    synchronize(device)
    return found, perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_same(
    what: str, ours: Mapping[Any, Sequence[float]], peer: Mapping[Any, Sequence[float]], allowed: float
) -> float:
    """The largest difference between numbers under the same keys.

    Raises AssertionError where one is larger than allowed or not finite, and for other keys.
    """
    if set(ours) != set(peer):
        raise AssertionError(f"{what}: ours and the peer measured different things: {set(ours) ^ set(peer)}")
    largest = 0.0
    for key in ours:
        for mine, theirs in zip(ours[key], peer[key], strict=True):
            if not abs(mine - theirs) <= allowed:  # a NaN is not
                raise AssertionError(
                    f"{what}: {key}: ours {mine}, the peer's {theirs}, allowed {allowed:.1e}"
                )
            largest = max(largest, abs(mine - theirs))
    return largest


# --- layer-wise sharpness -----------------------------------------------------------------------------


class Sharpness:
    """One request for layer-wise sharpness, of both sides, in one precision."""

    def __init__(self, case: Case, options: Options, precision: str = "fp32") -> None:
        self.case, self.options, self.precision = case, options, precision
        self.path = case.path(precision)
        self.evaluators: dict[int, Evaluator] = {}
        self.model = case.live(precision)
        self.batches = case.batches(options.batch, PRECISIONS[precision])
        self.draw = peers_sweep.noise({w.name: w.finetuned for w in self.path.weights()})

    def ours(self, estimator: str, seed: int, **other: Any) -> pd.DataFrame:
        o = replace(self.options, **other)
        if o.samples not in self.evaluators:  # which warm_up makes
            data = sweep_case.cut(self.case.data, o.samples)
            self.evaluators[o.samples] = o.evaluator(self.path, data, self.precision)
        return layerwise_sharpness(
            self.path,
            self.evaluators[o.samples],
            positions(o),
            [o.rho],
            o.draws,
            list(self.case.some_layers(o.layers)),
            protocol=o.protocol(estimator, seed),
        )

    def peer(self, seed: int, **other: Any) -> dict[tuple[str, float], list[float]]:
        o = replace(self.options, **other)
        with exact(self.precision):
            return peers_sweep.layer_sharpness(
                self.model,
                self.case.zeroshot,
                self.case.finetuned,
                first(self.batches, o.samples),
                self.case.some_layers(o.layers),
                positions(o),
                o.rho,
                o.draws,
                seed,
                self.draw,
                o.noise_batch,
            )

    def warm_up(self, **other: Any) -> None:
        """What is made once, on either side: workspaces and, on a GPU, recordings, one for each request."""
        few = other if self.options.on_gpu else {**other, "draws": 2}
        for estimator in ("plain", "gradient"):
            self.ours(estimator, 0, **few)
        self.peer(0, layers=1, draws=2)

    def check(self, ours: pd.DataFrame, peer: dict[tuple[str, float], list[float]]) -> float:
        """ours: of the plain estimator with the peer's draws. Means and standard errors must agree."""
        mine = {(r.layer, r.alpha): (r.sharpness, r.sharpness_se) for r in ours.itertuples()}
        theirs = {key: (float(np.mean(values)), se(values)) for key, values in peer.items()}
        allowed = SAME[self.precision] * (1 + float(ours["loss"].max()))
        return check_same(f"layer-wise sharpness in {self.precision}", mine, theirs, allowed)


def positions(o: Options) -> list[float]:
    """Where layer-wise sharpness is measured: scaling asks for several positions."""
    return [o.alpha] if o.alpha else [(i + 1) / o.alphas for i in range(o.alphas)]


def first(batches: Sequence[peers_sweep.Batch], samples: int) -> list[peers_sweep.Batch]:
    """The batches of the first images, the last of them cut."""
    found, left = [], samples
    for images, labels in batches:
        if left > 0:
            found.append((images[:left], labels[:left]))
        left -= len(labels)
    return found


def se(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def layer_sharpness(case: Case, options: Options) -> dict[str, Any]:
    """Rounds of the peer, plain draws and the control variate in every precision, each with a new seed.

    How many plain draws one with the control variate is worth depends on the weights, so it is measured on
    trained ones, of the digits zoo, and only stated for the random ones here.
    """
    requests = {precision: Sharpness(case, options, precision) for precision in options.precisions}
    contenders: dict[str, Callable[[int], Any]] = {}
    for precision, request in requests.items():
        contenders[f"peer {precision}"] = request.peer
        for estimator in ("plain", "gradient"):
            contenders[f"{estimator} {precision}"] = lambda seed, r=request, e=estimator: r.ours(e, seed)
        contenders[f"two {precision}"] = lambda seed, r=request: r.ours("gradient", seed, draws=2)
        request.warm_up()
        request.warm_up(draws=2)
    rounds = []
    for seed in range(options.rounds):
        found, seconds = {}, {}
        for name, run in contenders.items():
            found[name], seconds[name] = timed(case.device, lambda run=run, seed=seed: run(seed))
        largest = {p: r.check(found[f"plain {p}"], found[f"peer {p}"]) for p, r in requests.items()}
        tables = {name: found[name] for name in found if name.startswith(("plain", "gradient"))}
        rounds.append(
            {
                "seed": seed,
                "seconds": seconds,
                "largest_difference": largest,
                "sharpness": {n: column(table, "sharpness") for n, table in tables.items()},
                "sharpness_se": {n: column(table, "sharpness_se") for n, table in tables.items()},
            }
        )
    worth = worth_on_digits(options, case.device)
    ratios = compare_sharpness(rounds, options, {p: statistics.median(w) for p, w in worth.items()})
    return {"layers": list(case.some_layers(options.layers)), "worth": worth, "rounds": rounds, **ratios}


def column(table: pd.DataFrame, name: str) -> list[float]:
    return [float(value) for value in table[name]]


def worth_on_digits(options: Options, device: torch.device) -> dict[str, list[float]]:
    """Plain fp32 draws that one with the control variate is worth, for layers of trained models."""
    digits = sweep_case.Digits(device, samples=64, models=3)

    def variances(precision: str, estimator: str) -> np.ndarray:
        found = []
        for model in digits.finetuned:
            path = digits.path(model, precision)
            evaluator = Evaluator(path.model, digits.data[:1], precision=precision)
            layers = sweep_case.spread(sweep_case.in_order(path, evaluator), 10)
            table = layerwise_sharpness(
                path,
                evaluator,
                [options.alpha],
                [options.rho],
                options.draws,
                layers,
                protocol=Protocol(estimator),
            )
            found += column(table, "sharpness_se")
        return np.square(found)

    plain = variances("fp32", "plain")
    return {p: (plain / variances(p, "gradient")).tolist() for p in options.precisions}


def compare_sharpness(
    rounds: list[dict[str, Any]], options: Options, worth: Mapping[str, float]
) -> dict[str, Any]:
    """The ratios that the rounds show; lists have a number for each round.

    worth: for each precision, the plain fp32 draws that one with the control variate is worth.
    """
    seconds = {name: [r["seconds"][name] for r in rounds] for name in rounds[0]["seconds"]}

    def variance(name: str) -> np.ndarray:
        """Of one draw, for each layer, over all rounds."""
        return np.mean([np.square(r["sharpness_se"][name]) for r in rounds], axis=0) * options.draws

    published, plain = np.array(seconds["peer fp32"]), variance("plain fp32")
    yardstick = np.sqrt(plain / PUBLISHED_DRAWS)
    modes = {}
    for precision in options.precisions:
        here = plain / variance(f"gradient {precision}")
        ours, two = (np.array(seconds[f"{name} {precision}"]) for name in ("gradient", "two"))
        relative = precision_errors(rounds, precision) / yardstick
        # A request takes some time, and more for each draw. Fewer than two have no standard error.
        needed = max(2, math.ceil(PUBLISHED_DRAWS / worth[precision]))
        request = two + (needed - 2) * (ours - two) / max(options.draws - 2, 1)
        modes[precision] = {
            "equal_draws": turns(seconds[f"peer {precision}"], seconds[f"plain {precision}"]),
            "equal_draws_published": turns(seconds["peer fp32"], seconds[f"plain {precision}"]),
            "worth": worth[precision],
            "equal_se": (published / ours * worth[precision]).tolist(),
            "draws_needed": needed,
            "request": (published / options.draws * PUBLISHED_DRAWS / request).tolist(),
            "worth_here": here.tolist(),
            "equal_se_here": (published / ours * np.median(here)).tolist(),
            "error_over_se": float(np.median(relative)),
            "error_over_se_largest": float(relative.max()),
            "layers_below_se": float(np.mean(relative < 1)),
        }
    able = [p for p in modes if modes[p]["error_over_se"] < 1]
    fastest = max(able, key=lambda p: statistics.median(modes[p]["request"]))
    return {
        "seconds": seconds,
        "standard_error_of_20_draws": yardstick.tolist(),
        "modes": modes,
        "fastest": fastest,
    }


def precision_errors(rounds: list[dict[str, Any]], precision: str) -> np.ndarray:
    """How far from fp32's each layer's sharpness is, with the same draws: root mean square over rounds."""
    moved = [
        np.subtract(r["sharpness"][f"gradient {precision}"], r["sharpness"]["gradient fp32"]) for r in rounds
    ]
    return np.sqrt(np.mean(np.square(moved), axis=0))


def turns(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]


# --- layer-wise interpolation -------------------------------------------------------------------------


def layers(case: Case, options: Options) -> dict[str, Any]:
    chosen = case.some_layers(options.layers)
    path, model = case.path(), case.live()
    evaluator = options.evaluator(path, case.data)
    batches = case.batches(options.batch)

    def ours() -> pd.DataFrame:
        return layerwise_interpolation(path, evaluator, options.grid, list(chosen))

    def peer() -> dict[tuple[str, float], tuple[float, float]]:
        with exact("fp32"):
            return peers_sweep.layer_interpolation(
                model, case.zeroshot, case.finetuned, batches, chosen, options.grid
            )

    ours()
    rounds = []
    for _ in range(options.rounds):
        (table, mine), (found, theirs) = timed(case.device, ours), timed(case.device, peer)
        largest = check_scores(
            "layer-wise interpolation",
            {(r.layer, r.alpha): (r.loss, r.accuracy) for r in table.itertuples()},
            found,
            options.samples,
        )
        rounds.append({"seconds": {"ours": mine, "peer": theirs}, "largest_difference": largest})
    ratios = [r["seconds"]["peer"] / r["seconds"]["ours"] for r in rounds]
    return {"layers": list(chosen), "rounds": rounds, "ratio": ratios}


def check_scores(
    what: str, ours: Mapping[Any, Sequence[float]], peer: Mapping[Any, Sequence[float]], samples: int
) -> float:
    """Losses must agree; of the accuracies one image may be a tie that rounds either way."""
    losses, peers = ({key: value[:1] for key, value in side.items()} for side in (ours, peer))
    hits, peers_hits = ({key: value[1:] for key, value in side.items()} for side in (ours, peer))
    largest = max((value[0] for value in ours.values()), default=0.0)
    check_same(f"{what}: accuracy", hits, peers_hits, 1.001 / samples)
    return check_same(f"{what}: loss", losses, peers, SAME["fp32"] * (1 + largest))


# --- the whole path, from image files -----------------------------------------------------------------


def whole_path(case: Case, options: Options) -> dict[str, Any]:
    """From weights in memory and images on disk to rows; the files are in the page cache, for everyone."""
    workers = os.cpu_count() or 1
    preprocess = architectures.preprocess(sweep_case.file_of(case.arch))
    model, live = case.live(), case.live()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (height, width) in options.sizes.items():
            folder = Path(scratch, name)
            sweep_case.write_folder(folder, case.arch, options.files, height, width)

            def ours(cache: Path, folder: Path = folder) -> pd.DataFrame:
                data = datasets.load("files", folder, preprocess, cache=cache)
                # The head has more classes than there are folders.
                data = replace(data, class_names=())
                path = rft.Path(live, case.zeroshot, case.finetuned)
                return interpolation(path, options.evaluator(path, data), options.grid)

            def peer(folder: Path = folder) -> dict[float, tuple[float, float]]:
                with exact("fp32"):
                    return peers_sweep.interpolation(
                        model,
                        case.zeroshot,
                        case.finetuned,
                        str(folder),
                        preprocess,
                        options.grid,
                        options.batch,
                        workers,
                    )

            found[name] = in_rounds(case, options, Path(scratch), ours, peer)
    return found


def in_rounds(
    case: Case,
    options: Options,
    scratch: Path,
    ours: Callable[[Path], pd.DataFrame],
    peer: Callable[[], dict[float, tuple[float, float]]],
) -> dict[str, Any]:
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            results, seconds = {}, {}
            results["cold"], seconds["cold"] = timed(case.device, lambda c=cache: ours(Path(c)))
            found, seconds["peer"] = timed(case.device, peer)
            results["warm"], seconds["warm"] = timed(case.device, lambda c=cache: ours(Path(c)))
        largest = 0.0
        for name, table in results.items():
            mine = {r.alpha: (r.loss, r.accuracy) for r in table.itertuples()}
            largest = max(largest, check_scores(f"interpolation, {name}", mine, found, options.files))
        rounds.append({"round": number, "seconds": seconds, "largest_difference": largest})
    ratios = {name: [r["seconds"]["peer"] / r["seconds"][name] for r in rounds] for name in ("cold", "warm")}
    return {"rounds": rounds, **ratios}


# --- how the cost grows -------------------------------------------------------------------------------


def scaling(case: Case, options: Options) -> dict[str, Any]:
    """Seconds of layer-wise sharpness against each of its four sizes, the others as in ``base``."""
    most = options.samples
    base = {"layers": 2, "draws": 4, "alphas": 1, "samples": max(most // 2, options.batch)}
    axes = {
        "layers": [1, 2, 4],
        "draws": [2, 4, 8],
        "alphas": [1, 2, 4],
        "samples": sorted({max(most // 4, options.batch), base["samples"], most}),
    }
    request = Sharpness(case, replace(options, alpha=0.0, precisions=("fp32",)))
    measured: dict[tuple[int, ...], dict[str, list[float]]] = {}
    wanted = [{**base, axis: value} for axis, values in axes.items() for value in values]
    for sizes in wanted:
        key = tuple(sizes.values())
        if key in measured:
            continue
        # On a CPU, what is made once serves all requests of so many images.
        if options.on_gpu or sizes["samples"] not in request.evaluators:
            request.warm_up(**sizes)
        measured[key] = {"peer": [], "plain": [], "gradient": []}
        for _ in range(options.rounds):
            found, seconds = timed(case.device, lambda s=sizes: request.peer(0, **s))
            measured[key]["peer"].append(seconds)
            for estimator in ("plain", "gradient"):
                table, seconds = timed(case.device, lambda s=sizes, e=estimator: request.ours(e, 0, **s))
                measured[key][estimator].append(seconds)
                if estimator == "plain":
                    request.check(table, found)
        said = ", ".join(f"{name} {statistics.median(found):.1f} s" for name, found in measured[key].items())
        print(f"scaling, {sizes}: {said}", file=sys.stderr, flush=True)
    return {
        "base": base,
        "axes": {
            axis: {str(v): measured[tuple({**base, axis: v}.values())] for v in values}
            for axis, values in axes.items()
        },
    }


# --- how busy the GPU is ------------------------------------------------------------------------------


def busy(case: Case, options: Options) -> dict[str, Any]:
    """Share of a request's time in which the GPU works, in each precision.

    The time in which at least one kernel, copy or fill runs is what the profiler saw. The time of the request
    is that of runs without it, since it slows the host but not the kernels; the share under the profiler, a
    lower bound, is given too.
    """
    if case.device.type != "cuda":
        return {"not measured": "there is no GPU"}
    found = {}
    for precision in options.precisions:
        request = Sharpness(case, options, precision)
        request.warm_up()
        walls = [timed(case.device, lambda r=request: r.ours("gradient", 0))[1] for _ in range(3)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            _, profiled = timed(case.device, lambda r=request: r.ours("gradient", 0))
        with tempfile.TemporaryDirectory() as scratch:
            trace = Path(scratch, "trace.json")
            profiler.export_chrome_trace(str(trace))
            kernels = working(json.loads(trace.read_text()))
        wall = statistics.median(walls)
        found[precision] = {
            "seconds": walls,
            "kernels": kernels,
            "busy": kernels / wall,
            "busy_profiled": kernels / profiled,
        }
    return found


def working(trace: Mapping[str, Any]) -> float:
    """Seconds of a profiler's trace in which something ran on the GPU; overlaps count once."""
    spans = sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    total, reached = 0.0, -math.inf
    for start, stop in spans:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total / 1e6


# --- all together -------------------------------------------------------------------------------------

PARTS = {
    "layer-sharpness": layer_sharpness,
    "layers": layers,
    "interpolation": whole_path,
    "scaling": scaling,
    "busy": busy,
}


def measure(options: Options, parts: Sequence[str]) -> dict[str, Any]:
    """One run as the JSON file holds it: about, options, parts, goals."""
    device = torch.device(options.device)
    case = sweep_case.make_case(options.arch, options.samples, device)
    found = {part: PARTS[part](case, options) for part in parts}
    run = {"about": about(device), "options": asdict(options), "parts": found}
    return run | {"goals": list(goals(run))}


def about(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": env.versions(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        facts |= {"driver": done.stdout.split("\n")[0], "cuda": torch.version.cuda}
    else:
        isa = (native.isas() or ["no compiled kernels"])[-1]
        facts["device"] = f"{processor()}, {torch.get_num_threads()} threads, {isa}"
    return facts


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def goals(run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was promised of this device and architecture, what was got, and whether that is enough."""
    options, parts = run["options"], run["parts"]
    on_gpu = torch.device(options["device"]).type == "cuda"
    if options["arch"] == "tiny" or (not on_gpu and options["arch"] != "ViT-B-32"):
        return

    def goal(what: str, got: Sequence[float] | float, least: float) -> dict[str, Any]:
        value = statistics.median(got) if isinstance(got, Sequence) else got
        return {"what": f"{options['arch']}, {what}", "got": value, "goal": least, "met": value >= least}

    if sharp := parts.get("layer-sharpness"):
        fp32 = sharp["modes"]["fp32"]
        yield goal("layer-wise sharpness, equal draws, fp32", fp32["equal_draws"], 2.5 if on_gpu else 1.9)
        fastest = [(sharp["fastest"], 50)] if on_gpu else []
        for precision, least in [("fp32", 20 if on_gpu else 10), *fastest]:
            mode = sharp["modes"][precision]
            yield goal(f"layer-wise sharpness, equal standard error, {precision}", mode["equal_se"], least)
            what = f"layer-wise sharpness, {mode['draws_needed']} draws for 20, {precision}"
            yield goal(what, mode["request"], least)
    if "layers" in parts and not on_gpu:
        yield goal("layer-wise interpolation", parts["layers"]["ratio"], 1.9)
    for size, sweep in parts.get("interpolation", {}).items():
        yield goal(f"interpolation of {size} images, cold", sweep["cold"], 1.0)
        yield goal(f"interpolation of {size} images, warm cache", sweep["warm"], 2.0)
    if on_gpu:
        for precision, share in parts.get("busy", {}).items():
            yield goal(f"GPU busy, {precision}", share["busy"], 0.9)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", choices=sweep_case.ARCHS, default="ViT-B-32")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"])
    parser.add_argument("--samples", type=int, help="images that are scored")
    parser.add_argument("--batch", type=int, help="images of a batch of the peers")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--layers", type=int, help="so many layers, spread evenly")
    parser.add_argument("--alphas", type=int, help="positions of an interpolation")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rho", type=float)
    parser.add_argument("--files", type=int, help="JPEG images of each size for the interpolation")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--out", type=Path, help="JSON with every round")
    parser.add_argument("--figure", type=Path, help="how the cost grows, of the part scaling")
    parser.add_argument("--redraw", type=Path, help="measure nothing; table and figure of this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    asked = arguments(argv)
    if asked.redraw:
        run = json.loads(asked.redraw.read_text())
    else:
        names = "samples batch draws layers alphas rounds rho files precisions".split()
        given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
        if "precisions" in given:  # fp32 is what the others are compared with
            given["precisions"] = tuple(dict.fromkeys(["fp32", *given["precisions"]]))
        options = replace(defaults(asked.device, asked.arch), **given)
        run = measure(options, list(PARTS) if "all" in asked.part else list(dict.fromkeys(asked.part)))
        if asked.out:
            asked.out.write_text(json.dumps(run, indent=1) + "\n")
    print(sweep_report.text(run))
    if asked.figure and "scaling" in run["parts"]:
        sweep_report.figure(run, asked.figure)


if __name__ == "__main__":
    main()
