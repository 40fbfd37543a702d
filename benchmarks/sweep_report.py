"""A run of bench_sweep.py as text and as a figure, from its JSON alone."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from sweep_options import PUBLISHED_DRAWS

from rft_fast.figures.style import canvas, curve_styles, key, legend, plain, wrap

MISSING = "–"  # there was no time to measure it
NAMES = {
    "peer": "state dict for every draw",
    "plain": "plain draws",
    "gradient": "noise per image, control",
}
WAYS = {"image": "noise per image", "gradient": NAMES["gradient"]}


def ratio(values: Sequence[float]) -> str:
    """Format median and quartiles."""
    if not values:
        return MISSING
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
    parts: list[str] = []
    for part, found in run["parts"].items():
        if "not measured" in found:
            parts.append(f"\n**{part}**: not measured: {found['not measured']}")
        else:
            parts += WRITERS[part](found, options)
    failed = [f"FAILED: {failure['part']}: {failure['why']}" for failure in run.get("failed", [])]
    return "\n".join([head, *parts, *goals(run), *failed])


def sharpness(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield "\n**layer-wise sharpness**: times faster than a state dict for every draw in fp32"
    yield from modes(found, WAYS["gradient"], "layer")
    yield "Worth: by variances on trained weights, the digits zoo's layers, the median of these."
    yield f"fastest with an error below the standard error: {found['fastest'] or 'not known'}"
    yield from checked(found, found["modes"])


def general(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield "\n**general sharpness**: times faster than a state dict for every draw in fp32"
    for way, facts in found["ways"].items():
        yield from modes(facts, WAYS[way], "")
    yield "Worth: by variances on trained weights, the digits zoo's models, the median of these."
    yield from checked(found, found["ways"]["gradient"]["modes"] or found["ways"]["image"]["modes"])


def modes(found: Mapping[str, Any], way: str, what: str) -> Iterator[str]:
    """Yield the table of one estimator of ours. what: the part's targets, if there are several."""
    yield (
        f"\n| {way} | equal draws of the same noise, both in this precision | equal draws of the same noise "
        f"| published draws that one is worth | equal standard error | draws needed for {PUBLISHED_DRAWS} "
        "| that request |"
    )
    yield "| --- |" + " ---: |" * 6
    for precision, mode in found["modes"].items():
        cells = [ratio(mode["equal_draws"]), ratio(mode["equal_draws_published"])]
        if "worth" in mode:
            cells += [f"{mode['worth']:.3g}", ratio(mode["equal_se"])]
            cells += [str(mode.get("draws_needed", MISSING)), ratio(mode.get("request", []))]
        else:
            cells += [MISSING] * 4
        yield f"| {precision} | {' | '.join(cells)} |"
    yield ""
    for precision, mode in found["modes"].items():
        several = (
            f" in the median {what}, {mode['error_over_se_largest']:.2g} in the worst, below one in "
            f"{mode['layers_below_se']:.0%}"
        )
        yield (
            f"{precision}: on the random weights here one is worth "
            f"{statistics.median(mode['worth_here']):.3g}; error over the standard error of "
            f"{PUBLISHED_DRAWS} plain draws: {mode['error_over_se']:.2g}{several if what else ''}"
        )


def checked(found: Mapping[str, Any], precisions: Iterable[str]) -> Iterator[str]:
    yield "seconds: " + ", ".join(f"{name} {ratio(s)}" for name, s in found["seconds"].items())
    said = []
    for precision in precisions:
        differences = [r["largest_difference"].get(precision, 0.0) for r in found["rounds"]]
        said.append(f"{precision} {max(differences):.1e}")
    yield f"largest difference between numbers of ours and of the peer: {', '.join(said) or MISSING}"


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
            cells = [f"{statistics.median(seconds[n]):.3g}" if n in seconds else MISSING for n in NAMES]
            yield f"| {value} {axis} | {' | '.join(cells)} |"


def busy(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n**GPU busy**, {NAMES['gradient']}\n"
    for precision, share in found.items():
        if "busy" in share:
            yield f"{precision}: {share['busy']:.1%} ({share['busy_profiled']:.1%} under the profiler)"


def graphs(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"\n**CUDA graphs** of short stages (on) and of all, plain draws of {options['few']} images: times "
        "faster than without\n"
    )
    yield from in_turns(found)


def streaming(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"\n**images on the device**, interpolation of {options['alphas']} positions: times faster than "
        "streamed from the host\n"
    )
    yield from in_turns(found)


def stages(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    yield "\n**stages** that the model is cut into\n"
    for precision, cut in found.items():
        why = f": {cut['why']}" if "why" in cut else ""
        yield f"{precision}: {cut['stages']} in {cut['seconds']:.2g} s{why}"


def attention(found: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    for _, facts in found.items():
        yield (
            f"\n**attention** in float32, {facts['shape']}: torch's choice ({facts['backend']}), times "
            "faster than its plain products\n"
        )
        yield f"ratio: {ratio(facts['times_faster'])}"
        yield from seconds_of(facts["rounds"])
        for name in ("default", "math"):
            if f"{name}_error_largest" in facts:
                errors = [facts[f"{name}_error_{what}"] for what in ("largest", "mean")]
                yield (
                    f"{name}: error against float64, over its root mean square: {errors[0]:.1e} at most, "
                    f"{errors[1]:.1e} in the mean"
                )


WRITERS = {
    "layer-sharpness": sharpness,
    "general-sharpness": general,
    "layers": layers,
    "interpolation": whole_path,
    "scaling": scaling,
    "busy": busy,
    "graphs": graphs,
    "stages": stages,
    "streaming": streaming,
    "attention": attention,
}


def in_turns(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield contenders in each precision, relative to the last of them."""
    for precision, facts in found.items():
        ratios = {name.partition("_")[0]: values for name, values in facts.items() if name != "rounds"}
        yield f"{precision}: " + ", ".join(f"{name} {ratio(values)}" for name, values in ratios.items())
        yield from seconds_of(facts["rounds"])


def seconds_of(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the seconds of all contenders. The last round may be incomplete."""
    times: dict[str, list[float]] = {}
    for this in rounds:
        for name, seconds in this["seconds"].items():
            times.setdefault(name, []).append(seconds)
    yield "seconds: " + ", ".join(f"{name} {ratio(seconds)}" for name, seconds in times.items())
    differences = [this["largest_difference"] for this in rounds if "largest_difference" in this]
    if differences:
        yield f"largest difference of a loss: {max(differences):.1e}"


def goals(run: Mapping[str, Any]) -> Iterator[str]:
    yield "\ngoals:" if run["goals"] else "\ngoals: none for what was measured here"
    for goal in run["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        yield f"  {goal['what']}: {goal['got']:.3g}, goal {goal['goal']:g}: {verdict}"


def figure(run: Mapping[str, Any], file: str | os.PathLike[str]) -> Figure:
    """Draw seconds of layer-wise sharpness over layers, draws, alphas and images, a panel each."""
    found, about, options = (run["parts"]["scaling"], run["about"], run["options"])
    whole = {
        axis: {size: seconds for size, seconds in points.items() if set(seconds) >= set(NAMES)}
        for axis, points in found["axes"].items()
    }
    first, second, third, *_ = curve_styles()
    styles = dict(zip(NAMES, [second, first, third]))
    picture = canvas(7.0, 2.5)
    panels = picture.subplots(1, len(whole), sharey=True)
    for panel, (axis, points) in zip(panels, whole.items()):
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
