"""A run of bench_sweep.py in words and as a picture, from its JSON alone."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from rft_fast.figures.style import CURVES, canvas, key, legend, plain, wrap

NAMES = {"peer": "state dict for every draw", "plain": "plain draws", "gradient": "gradient control variate"}


def ratio(values: Sequence[float]) -> str:
    """Median and quartiles."""
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{statistics.median(values):.3g} ({q1:.3g} to {q3:.3g})"


def text(run: Mapping[str, Any]) -> str:
    about, options = run["about"], run["options"]
    cuda = f", CUDA {about['cuda']}, driver {about['driver']}" if "cuda" in about else ""
    head = (
        f"{about['device']}{cuda}, torch {about['versions']['torch']}, {about['date'][:10]}\n"
        f"{options['arch']}, {options['samples']} images in batches of {options['batch']}, "
        f"{options['draws']} draws at rho = {options['rho']:g}, {options['layers']} layers, "
        f"{options['rounds']} rounds in turns; median (quartiles)"
    )
    parts = [lines for part, found in run["parts"].items() for lines in WRITERS[part](found, options)]
    return "\n".join([head, *parts, *goals(run)])


def sharpness(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield "\n**layer-wise sharpness**: times faster than a state dict for every draw in fp32\n"
    yield (
        "| | equal draws, both in this precision | equal draws | plain draws that one with the control "
        "variate is worth | equal standard error | draws needed for 20 | that request |"
    )
    yield "| --- |" + " ---: |" * 6
    for precision, mode in found["modes"].items():
        cells = [ratio(mode["equal_draws"]), ratio(mode["equal_draws_published"]), f"{mode['worth']:.3g}"]
        cells += [ratio(mode["equal_se"]), str(mode["draws_needed"]), ratio(mode["request"])]
        yield f"| {precision} | {' | '.join(cells)} |"
    yield "\nWorth: by variances on trained weights, the digits zoo's layers, the median of these."
    for precision, mode in found["modes"].items():
        yield (
            f"{precision}: on the random weights here one is worth "
            f"{statistics.median(mode['worth_here']):.3g}; error over the standard error of 20 plain draws: "
            f"{mode['error_over_se']:.2g} in the median layer, "
            f"{mode['error_over_se_largest']:.2g} in the worst, below one in {mode['layers_below_se']:.0%}"
        )
    yield f"fastest with an error below the standard error: {found['fastest']}"
    yield "seconds: " + ", ".join(f"{name} {ratio(s)}" for name, s in found["seconds"].items())
    yield f"largest difference between numbers of ours and of the peer: {largest(found)}"


def layers(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n**layer-wise interpolation**, {options['alphas']} positions: times faster than state dicts\n"
    yield from seconds_of(found["rounds"])
    yield f"ratio: {ratio(found['ratio'])}"


def whole_path(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n**interpolation** from {options['files']} image files, {options['alphas']} positions\n"
    for size, sweep in found.items():
        yield f"{size}: cold {ratio(sweep['cold'])}, warm {ratio(sweep['warm'])}"
        yield from seconds_of(sweep["rounds"])


def scaling(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    base = ", ".join(f"{value} {name}" for name, value in found["base"].items())
    yield f"\n**how the cost grows**: median seconds; the rest as in {base}\n"
    yield "| | " + " | ".join(NAMES.values()) + " |\n| --- |" + " ---: |" * len(NAMES)
    for axis, points in found["axes"].items():
        for value, seconds in points.items():
            cells = [f"{statistics.median(seconds[name]):.3g}" for name in NAMES]
            yield f"| {value} {axis} | {' | '.join(cells)} |"


def busy(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield "\n**GPU busy**, gradient control variate\n"
    if "not measured" in found:
        yield f"not measured: {found['not measured']}"
        return
    for precision, share in found.items():
        yield f"{precision}: {share['busy']:.1%} ({share['busy_profiled']:.1%} under the profiler)"


WRITERS = {
    "layer-sharpness": sharpness,
    "layers": layers,
    "interpolation": whole_path,
    "scaling": scaling,
    "busy": busy,
}


def seconds_of(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = rounds[0]["seconds"]
    yield "seconds: " + ", ".join(f"{name} {ratio([r['seconds'][name] for r in rounds])}" for name in names)
    yield f"largest difference of a loss: {max(r['largest_difference'] for r in rounds):.1e}"


def largest(found: Mapping[str, Any]) -> str:
    precisions = found["modes"]
    return ", ".join(
        f"{p} {max(r['largest_difference'][p] for r in found['rounds']):.1e}" for p in precisions
    )


def goals(run: Mapping[str, Any]) -> Iterator[str]:
    yield "\ngoals:" if run["goals"] else "\ngoals: none for this device and architecture"
    for goal in run["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        yield f"  {goal['what']}: {goal['got']:.3g}, goal {goal['goal']:g}: {verdict}"


def figure(run: Mapping[str, Any], file: str | os.PathLike[str]) -> Figure:
    """Seconds of layer-wise sharpness against layers, draws, alphas and images, a panel each."""
    found, about, options = (run["parts"]["scaling"], run["about"], run["options"])
    styles = dict(zip(NAMES, [CURVES[1], CURVES[0], CURVES[2]]))
    picture = canvas(7.0, 2.5)
    panels = picture.subplots(1, len(found["axes"]), sharey=True)
    for panel, (axis, points) in zip(panels, found["axes"].items()):
        sizes = [int(value) for value in points]
        for name, style in styles.items():
            rounds = [seconds[name] for seconds in points.values()]
            panel.plot(sizes, [statistics.median(r) for r in rounds], **style)
            panel.fill_between(
                sizes,
                [min(r) for r in rounds],
                [max(r) for r in rounds],
                color=style["color"],
                alpha=0.2,
                lw=0,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        for minor in (panel.xaxis, panel.yaxis):
            minor.set_minor_formatter(NullFormatter())
        panel.set_xlabel("images" if axis == "samples" else axis, fontsize=9)
        plain(panel)
    panels[0].set_ylabel("seconds", fontsize=9)
    base = found["base"]
    note = wrap(
        picture,
        f"Layer-wise sharpness, {options['arch']} on {about['device']}.",
        f"Unless varied: {base['layers']} layers, {base['draws']} draws, {base['alphas']} position,",
        f"{base['samples']} images. Lines: medians of {options['rounds']} rounds; bands: all rounds.",
    )
    marks = [key(NAMES[name], style, color=style["color"]) for name, style in styles.items()]
    picture.set_figheight(2.4 + legend(picture, "outside upper center", marks, note))
    picture.savefig(file)
    return picture
