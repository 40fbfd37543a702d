"""The results of a run of bench_sweep.py: goals met or missed, and a row per result."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

STAGES = 41  # of ViT-L/14 on a GPU; fewer: a cut that works on the CPU failed there
# By rho: times faster than the published practice at its standard error of 20 draws.
LAYER_GOALS = {0.05: 10, 0.2: 30, 1.0: 15}
GENERAL_GOAL = 6
SOME = 10  # most numbers that a row lists


def goals(run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each goal for this device and architecture, the measured value, and whether it is met.

    Goals that were not measured are left out.
    """
    options, parts = run["options"], run["parts"]
    on_gpu = torch.device(options["device"]).type == "cuda"
    if options["arch"] == "tiny" or (not on_gpu and options["arch"] != "ViT-B-32"):
        return

    def goal(what: str, got: Sequence[float] | float | None, least: float) -> Iterator[dict[str, Any]]:
        if got is None or got == []:
            return
        value = statistics.median(got) if isinstance(got, Sequence) else got
        yield {"what": f"{options['arch']}, {what}", "got": value, "goal": least, "met": value >= least}

    sharp = parts.get("layer-sharpness", {"modes": {}, "fastest": None})
    fp32 = sharp["modes"].get("fp32", {})
    equal = fp32.get("equal_draws")
    yield from goal("layer-wise sharpness, equal draws, fp32", equal, 2.5 if on_gpu else 1.9)
    wanted = [("fp32", LAYER_GOALS.get(options["rho"]))]
    wanted += [(sharp["fastest"], 50)] if on_gpu and options["rho"] == 0.05 and sharp["fastest"] else []
    for precision, least in wanted:
        mode = sharp["modes"].get(precision, {})
        if least is not None:
            what = f"layer-wise sharpness at rho {options['rho']:g}, {mode.get('draws_needed')} draws for 20"
            yield from goal(f"{what}, {precision}", mode.get("request"), least)
    ways = parts.get("general-sharpness", {"ways": {}})["ways"]
    modes = {way: facts["modes"]["fp32"] for way, facts in ways.items() if "fp32" in facts["modes"]}
    able = {way: mode for way, mode in modes.items() if "request" in mode}
    if able and len(able) == len(ways):
        # The study's default chooses between them by itself.
        way = max(able, key=lambda name: statistics.median(able[name]["request"]))
        what = f"general sharpness at rho {options['rho']:g}, {able[way]['draws_needed']} draws for 20"
        yield from goal(f"{what}, {way}, fp32", able[way]["request"], GENERAL_GOAL)
    if "layers" in parts and not on_gpu:
        yield from goal("layer-wise interpolation", parts["layers"]["ratio"], 1.9)
    for size, sweep in parts.get("interpolation", {}).items():
        yield from goal(f"interpolation of {size} images, cold", sweep["cold"], 1.0)
        yield from goal(f"interpolation of {size} images, warm cache", sweep["warm"], 2.0)
    if on_gpu:
        for precision, share in parts.get("busy", {}).items():
            yield from goal(f"GPU busy, {precision}", share.get("busy"), 0.9)
        for precision, cut in parts.get("stages", {}).items():
            if options["arch"] == "ViT-L-14":
                yield from goal(f"stages, {precision}", cut["stages"], STAGES)


def rows(run: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield (key, facts) of each result and goal; the key begins with the kind.

    A later row replaces an earlier one with the same key.
    """
    arch = run["options"]["arch"]
    for part, found in run["parts"].items():
        for precision, name, value in RESULTS[part](found):
            facts: dict[str, Any] = {"arch": arch, "part": part, "precision": precision, "name": name}
            if isinstance(value, list) and not value:
                continue
            facts["value"] = statistics.median(value) if isinstance(value, list) else value
            if isinstance(value, list) and len(value) > 1:
                facts["values"] = value[:SOME]
            yield ("result", arch, part, precision, name), facts
    for goal in run["goals"]:
        yield ("goal", goal["what"]), {"arch": arch, **goal}


Result = tuple[str, str, Any]  # precision, name, a number or one per round


def sharpness(found: Mapping[str, Any]) -> Iterator[Result]:
    for precision, mode in found["modes"].items():
        for name, value in mode.items():
            yield precision, name, statistics.median(value) if name == "worth_here" else value
    if found["fastest"]:
        yield found["fastest"], "fastest", found["fastest"]


def general(found: Mapping[str, Any]) -> Iterator[Result]:
    for way, facts in found["ways"].items():
        for precision, name, value in sharpness(facts):
            yield precision, f"{way}, {name}", value


def layers(found: Mapping[str, Any]) -> Iterator[Result]:
    yield "fp32", "ratio", found["ratio"]


def interpolation(found: Mapping[str, Any]) -> Iterator[Result]:
    for size, sweep in found.items():
        for name in ("cold", "warm"):
            yield "fp32", f"{size}, {name}", sweep[name]


def scaling(found: Mapping[str, Any]) -> Iterator[Result]:
    for axis, points in found["axes"].items():
        for size, seconds in points.items():
            for contender, values in seconds.items():
                yield "fp32", f"{size} {axis}, {contender}, seconds", values


def by_precision(found: Mapping[str, Any]) -> Iterator[Result]:
    """Yield the results of a part in each precision, without its rounds."""
    for precision, facts in found.items():
        if precision != "not measured":
            yield from ((precision, name, fact) for name, fact in facts.items() if name != "rounds")


RESULTS = {
    "layer-sharpness": sharpness,
    "general-sharpness": general,
    "layers": layers,
    "interpolation": interpolation,
    "scaling": scaling,
    "busy": by_precision,
    "graphs": by_precision,
    "stages": by_precision,
    "streaming": by_precision,
    "attention": by_precision,
}
