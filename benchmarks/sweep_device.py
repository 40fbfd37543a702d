"""Benchmarks of the device: graphs, stages, streamed images, attention, and how busy a GPU is."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pandas as pd
import sweep_case
import torch
from sweep_bench import Bench, allowed, check_same, turns
from sweep_options import OURS
from sweep_sharpness import request
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rft_fast.evaluate import Evaluator, budget
from rft_fast.evaluate import graphs as recordings
from rft_fast.evaluate.precision import exact
from rft_fast.studies import interpolation, layerwise_sharpness

NO_GPU = "there is no GPU"
REPEATS = 10  # of one attention, which is too short to time


def graphs(bench: Bench) -> None:
    """Compare CUDA graphs of short stages ("on") and of all stages with none ("off").

    The request is plain draws of layer-wise sharpness with few images, where launches matter.
    """
    o, case = bench.options, bench.case
    if not o.on_gpu:
        return bench.not_measured(NO_GPU)
    found = bench.begin({})
    data = [sweep_case.cut(case.data, o.few)]
    layers = list(case.some_layers(2))
    draws = min(4, o.draws)
    for precision in o.types:
        path = case.path(precision)
        bench.check_time(f"recordings in {precision}")
        made = {
            name: Evaluator(path.model, data, o.batch_size, precision, graphs=name == "all")
            for name in ("all", "off")
        }
        sides = {"on": bench.evaluator(precision).on(data), **made}

        def run(name: str, path: Any = path, sides: Any = sides) -> pd.DataFrame:
            longest = sys.maxsize if name == "all" else recordings.SHORT
            with mock.patch.object(recordings, "SHORT", longest):
                return layerwise_sharpness(
                    path, sides[name], [o.alpha], [o.rho], draws, layers, protocol=o.protocol("plain", 0)
                )

        for name in (recordings.WARM + 1) * list(sides):  # after that all graphs are recorded
            bench.check_time(f"recordings in {precision}")
            run(name)
        found[precision] = {"rounds": []}
        in_turns(bench, found[precision], precision, {name: lambda n=name: run(n) for name in sides})
    return None


def in_turns(
    bench: Bench, found: dict[str, Any], precision: str, runs: Mapping[str, Callable[[], pd.DataFrame]]
) -> None:
    """Time contenders whose numbers must agree; record how many times faster each is than the last."""
    *others, base = runs
    found |= {f"{name}_times_faster": [] for name in others}
    for number in range(bench.options.rounds):
        this: dict[str, Any] = {"seconds": {}}
        found["rounds"].append(this)
        losses = {}
        for name, run in runs.items():
            table, seconds = bench.timed(f"{name}, {precision}, round {number},", run)
            losses[name] = {i: (float(loss),) for i, loss in enumerate(table["loss"])}
            this["seconds"][name] = seconds
            facts = {}
            if name == base:
                most = allowed(precision, float(table["loss"].max()))
                same = [
                    check_same(f"{n} and {base} in {precision}", losses[n], losses[base], most)
                    for n in others
                ]
                facts["largest_difference"] = this["largest_difference"] = max(same)
                for n in others:
                    found[f"{n}_times_faster"] += turns([seconds], [this["seconds"][n]])
            bench.timing(name, seconds, precision, round=number, **facts)


def stages(bench: Bench) -> None:
    """Record how many stages the model is cut into; products may have other bits on another device.

    One precision per type of weights suffices: the way of taking products changes nothing.
    """
    found = bench.begin({})
    for precision in bench.options.types:
        bench.check_time(f"stages in {precision}")
        count = len(bench.evaluator(precision).stages.image)
        seconds, why = bench.case.cut[precision]
        found[precision] = {"stages": count, "one_stage": count == 1, "seconds": seconds}
        found[precision] |= {"why": why} if why else {}
        bench.timing("cutting", seconds, precision, stages=count)


def streaming(bench: Bench) -> None:
    """Compare interpolation with images streamed from the host and with images on the device, in turns."""
    o, case = bench.options, bench.case
    if not o.on_gpu:
        return bench.not_measured(NO_GPU)
    found = bench.begin({})
    for precision in o.precisions:
        bench.check_time(f"warm-up in {precision}")
        path = case.path(precision)
        resident = bench.evaluator(precision)
        # The same batches and stages, but no room for images on the device.
        with mock.patch.object(budget, "RESIDENT", 0):
            streamed = resident.on([case.data])
        places = [e.feeds[0].images.device.type for e in (resident, streamed)]
        if places != [bench.device.type, "cpu"]:
            raise RuntimeError(f"streaming: expected images on the device and on the host, found {places}")

        def run(mine: Evaluator, path: Any = path) -> pd.DataFrame:
            return interpolation(path, mine, o.grid)

        runs = {"resident": lambda e=resident: run(e), "streamed": lambda e=streamed: run(e)}
        for warm in runs.values():
            warm()
        found[precision] = {"rounds": []}
        in_turns(bench, found[precision], precision, runs)
    return None


def attention(bench: Bench) -> None:
    """Compare float32 attention by torch's own choice and by plain products, with errors against float64.

    Shapes are those of the architecture, inputs unit normals. Errors are relative to the root mean square of
    the float64 result.
    """
    o, device = bench.options, bench.device
    heads, tokens, size = sweep_case.attention_of(o.arch)
    shape = (min(o.batch, 64), heads, tokens, size)
    bench.check_time("attention in float64")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    with torch.inference_mode(), exact("fp32"):
        with sdpa_kernel(SDPBackend.MATH):
            wanted = scaled_dot_product_attention(*(tensor.double() for tensor in (q, k, v)))
        found = bench.begin({"fp32": {"shape": "x".join(map(str, shape)), "backend": backend(q, k, v)}})[
            "fp32"
        ]
        found |= {"rounds": [], "times_faster": []}

        def math_only() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return scaled_dot_product_attention(q, k, v)

        def many(run: Callable[[], Tensor]) -> Tensor:
            return [run() for _ in range(REPEATS)][-1]

        runs = {"default": lambda: scaled_dot_product_attention(q, k, v), "math": math_only}
        for run in runs.values():
            many(run)
        for number in range(o.rounds):
            seconds: dict[str, float] = {}
            found["rounds"].append({"seconds": seconds})
            for name, run in runs.items():
                got, taken = bench.timed(f"attention, {name}, round {number},", lambda r=run: many(r))
                seconds[name] = taken / REPEATS
                error = (got.double() - wanted).abs() / wanted.square().mean().sqrt()
                facts = {"error_largest": float(error.max()), "error_mean": float(error.mean())}
                found |= {f"{name}_{what}": value for what, value in facts.items()}
                if name == "math":
                    found["times_faster"] += turns([seconds["math"]], [seconds["default"]])
                bench.timing(name, seconds[name], round=number, **facts)


def backend(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the name of torch's choice of attention, if this version of torch tells."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    return "unknown" if choose is None else SDPBackend(choose(q, k, v)).name.lower()


def busy(bench: Bench) -> None:
    """Measure the share of a request's time in which the GPU works, in each precision.

    The profiler gives the time in which at least one kernel, copy or fill runs. The time of the request is
    that of runs without the profiler, which slows the host but not the kernels; the share under the profiler,
    a lower bound, is given too.
    """
    if not bench.options.on_gpu:
        return bench.not_measured(NO_GPU)
    found = bench.begin({})
    for precision in bench.options.precisions:
        mine = request(bench, precision)
        mine.warm_up()

        def run(mine: Any = mine) -> pd.DataFrame:
            return mine.ours(OURS, 0)

        walls: list[float] = []
        for number in range(bench.options.rounds):
            walls.append(bench.timed(f"GPU busy, {precision}, round {number},", run)[1])
            found[precision] = {"seconds": walls}
            bench.timing("gradient", walls[-1], precision, round=number)
        bench.check_time(f"GPU busy, {precision}, profiled")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            _, profiled = bench.timed(f"GPU busy, {precision}, profiled,", run)
        with tempfile.TemporaryDirectory() as scratch:
            trace = pathlib.Path(scratch, "trace.json")
            profiler.export_chrome_trace(str(trace))
            kernels = working(json.loads(trace.read_text()))
        shares = {"busy": kernels / statistics.median(walls), "busy_profiled": kernels / profiled}
        found[precision] |= {"kernels": kernels, **shares}
        bench.timing("gradient, profiled", profiled, precision, kernels=kernels)
    return None


def working(trace: Mapping[str, Any]) -> float:
    """Return the seconds of a profiler's trace in which something ran on the GPU; overlaps count once."""
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
