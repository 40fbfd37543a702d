"""Charts over layers: layer-wise interpolation (Figure 2) and layer-wise sharpness (Figure 4)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ..common.words import many, signed
from ..figures.captions import short
from ..settings import Layers, Sharpness
from ..studies.facts import Facts
from ..studies.interpolate import Z95
from ..studies.verdicts import straggling
from .charts import ACCURACY, LOSS, along, points
from .drawing import (
    ALL,
    SATURATED,
    Chart,
    Control,
    Key,
    Picture,
    Trace,
    band,
    choices,
    heat,
    layout,
    line,
    marks,
    of_layers,
    rows_height,
    rule,
    safe,
)
from .tables import STRAGGLING, sharpnesses

_WORST = 3


def interpolation(facts: Facts) -> Picture:
    """Draw the effect of each layer alone: a map of the loss, instabilities with intervals, curves."""
    part = facts.part("layers").sort_values("alpha", kind="stable")
    layers = list(facts.part("layers")["layer"].unique())
    place = {layer: row for row, layer in enumerate(layers)}
    names = short(layers)
    known, edge = facts.stragglers, facts.of(Layers).straggler_margin
    largest = largest_of(part["rise"], edge)
    maps: list[Trace] = []
    dots: list[Trace] = [rule([edge, edge], [-0.5, len(layers) - 0.5])]
    curves: dict[str, list[Trace]] = {"loss": [], "accuracy": []}
    for (model, dataset), group in part.groupby(["model", "dataset"], sort=False):
        own = known[(known["model"] == model) & (known["dataset"] == dataset)]
        show = {"model": [model], "dataset": [dataset]}
        worst = set(own[own["straggler"]]["layer"])
        maps += heat_map(group, "rise", "rise_se", layers, edge, largest, "rise in loss", worst, show)
        dots += _instabilities(own, place, show)
        top = list(own.sort_values("instability", ascending=False, kind="stable")["layer"][:_WORST])
        for layer, curve in group.groupby("layer", sort=False):
            n = top.index(layer) if layer in top else 0
            here = show | {"layer": [ALL, layer] if layer in top else [layer]}
            for what in (LOSS, ACCURACY):
                alphas, y, half, hover = along(curve, what, f"<b>{safe(layer)}</b>", "α = 0")
                curves[what.value].append(band(alphas, list(y - half), list(y + half), here, f"@c{n}"))
                symbol = ("circle", "square", "triangle-up")[n]
                trace = line(alphas, y.tolist(), hover, here, f"@c{n}", symbol, name=names[layer])
                curves[what.value].append(trace | {"showlegend": True})
    height = rows_height(len(layers))
    legend = {"showlegend": True, "legend": {"orientation": "h", "y": -0.24, "yanchor": "top"}}
    every = [(ALL, f"the {_WORST} most unstable")] + [(layer, names[layer]) for layer in layers]
    shared = of_layers(layers, [names[layer] for layer in layers])
    return Picture(
        [
            choices("model", "Model", part["model"]),
            choices("dataset", "Data set", part["dataset"]),
            Control("layer", "Curves of", every),
        ],
        [
            Chart(
                "map",
                "Rise in loss",
                "Map of the rise in loss: layers down, alpha across",
                maps,
                layout("α of the layer", "", height, **shared, **across(part)),
            ),
            Chart(
                "dots",
                "Instability, with its 95 % interval",
                "Instability of each layer with its interval, and the margin of a straggler",
                dots,
                layout("instability (nats)", "", height, **shared),
            ),
            Chart(
                "loss",
                "Loss of one layer on the path",
                "Loss over alpha of single layers",
                curves["loss"],
                layout("α of the layer", "loss (nats)", 340, **legend),
            ),
            Chart(
                "accuracy",
                "Accuracy of one layer on the path",
                "Accuracy over alpha of single layers",
                curves["accuracy"],
                layout("α of the layer", "accuracy (%)", 340, **legend),
            ),
        ],
        [
            Key("straggler", "@bad", "triangle-left"),
            Key("too wide to conclude", "@grey", "circle-open"),
            Key(f"margin, {edge:g} nats", "@grey", "", "dot"),
        ],
    )


def sharpness(facts: Facts) -> Picture:
    """Draw the sharpness of each layer: a map along the path, and values with intervals at one alpha."""
    part = sharpnesses(facts, "layer-sharpness").sort_values("alpha", kind="stable")
    layers = list(facts.part("layer-sharpness")["layer"].unique())
    place = {layer: row for row, layer in enumerate(layers)}
    names = short(layers)
    edge = facts.of(Sharpness).zero_margin
    said = {"unclear": "<br>interval includes 0", "saturated": "<br>saturated: at chance"}
    maps: list[Trace] = []
    dots: list[Trace] = [rule([x, x], [-0.5, len(layers) - 0.5]) for x in (-edge, edge)]
    for (model, where), group in part.groupby(["model", "setting"], sort=False):
        largest = largest_of(part.loc[part["setting"] == where, "sharpness"], edge)
        show = {"model": [model], "setting": [where]}
        flat = set(group.loc[group["near_zero"], "layer"])
        maps += heat_map(
            group, "sharpness", "half", layers, edge, largest, "sharpness", flat, show,
            half=1.0, symbol="circle-open", label="flat layer",
        )  # fmt: skip
        for alpha, column in group[group["alpha"] > 0].groupby("alpha"):
            maybe = column["verdict"].isin(["unclear", "unknown"])
            colour = [
                "@good" if x in flat else "@grey" if m else "@c0"
                for x, m in zip(column["layer"], maybe, strict=True)
            ]
            symbol = ["circle-open" if m else "circle" for m in maybe]
            symbol = [
                SATURATED if v == "saturated" else s for v, s in zip(column["verdict"], symbol, strict=True)
            ]
            hover = [
                f"<b>{safe(layer)}</b>, α = {alpha:g}<br>sharpness {points(v, h, 1, '.3g')} nats (95 %)<br>"
                f"{many(d, 'draw')}, n = {n:,} images" + said.get(verdict, "")
                for layer, v, h, d, n, verdict in zip(
                    column["layer"], column["sharpness"], column["half"], column["draws"], column["samples"],
                    column["verdict"], strict=True,
                )
            ]  # fmt: skip
            trace = line(
                column["sharpness"].tolist(), [place[layer] for layer in column["layer"]], hover,
                show | {"alpha": [f"{alpha:g}"]}, "@c0", across=column["half"].tolist(), mode="markers",
            )  # fmt: skip
            trace["marker"] = {
                "color": colour,
                "symbol": symbol,
                "size": 8,
                "line": {"width": 1.2, "color": colour},
            }
            dots.append(trace)
    height = rows_height(len(layers))
    shared = of_layers(layers, [names[layer] for layer in layers])
    alphas = sorted((a for a in part["alpha"].unique() if a > 0), reverse=True)
    return Picture(
        [
            choices("setting", "Measured", part["setting"]),
            choices("model", "Model", part["model"]),
            Control("alpha", "Values at α", [(f"{a:g}", f"{a:g}") for a in alphas]),
        ],
        [
            Chart(
                "map",
                "Sharpness along the path",
                "Map of layer-wise sharpness: layers down, alpha across",
                maps,
                layout("α", "", height, **shared, **across(part)),
            ),
            Chart(
                "dots",
                "Values, with 95 % intervals",
                "Sharpness of each layer at one alpha with its interval",
                dots,
                layout("sharpness (nats)", "", height, **shared),
            ),
        ],
        [
            Key("flat layer: near zero at every α", "@good", "circle-open"),
            Key("interval includes 0", "@grey", "circle-open"),
            *([Key("saturated", "@c0", SATURATED)] if (part["verdict"] == "saturated").any() else []),
            Key(f"± {edge:g} nats", "@grey", "", "dot"),
        ],
    )


def largest_of(values: pd.Series, small: float) -> float:
    """Return the largest finite magnitude, for a scale that all models share."""
    sizes = values.abs().to_numpy(dtype=float)
    return float(max(sizes[np.isfinite(sizes)], default=0.0)) or small or 1.0


def across(part: pd.DataFrame) -> dict[str, dict[str, object]]:
    """Create the axis of a map's alphas, with room for marks on the right."""
    alphas = sorted(part["alpha"].unique())
    return {
        "xaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(alphas))),
            "ticktext": [f"{alpha:g}" for alpha in alphas],
            "range": [-0.5, len(alphas) - 0.5 + 0.06 * len(alphas)],
            "showgrid": False,
            "zeroline": False,
        }
    }


def heat_map(
    group: pd.DataFrame,
    value: str,
    error: str,
    layers: list[str],
    small: float,
    largest: float,
    what: str,
    marked: set[str],
    show: dict[str, list[str]],
    half: float = Z95,
    symbol: str = "triangle-left",
    label: str = "straggler",
) -> list[Trace]:
    """Create a heat map of one model, with marks on values that are not finite and beside marked layers."""
    values = group.pivot(index="layer", columns="alpha", values=value).reindex(layers).sort_index(axis=1)
    halves = half * group.pivot(index="layer", columns="alpha", values=error).reindex_like(values)
    hover = [
        [
            f"<b>{safe(layer)}</b>{f' ({label})' if layer in marked else ''}, α = {alpha:g}<br>"
            f"{what} {points(v, h, 1, '+.3g')} nats (95 %)"
            for alpha, v, h in zip(values.columns, line_, halves_, strict=True)
        ]
        for layer, line_, halves_ in zip(
            layers, values.to_numpy(dtype=float), halves.to_numpy(dtype=float), strict=True
        )
    ]
    finite = values.where(np.isfinite(values.to_numpy(dtype=float)))
    traces = [heat(finite, small or largest, largest, hover, f"{what} (nats)")]
    places = [(a, b) for b, a in np.argwhere(~np.isfinite(values.to_numpy(dtype=float)))]
    if places:
        texts = [hover[b][a] for a, b in places]
        traces.append(marks([a for a, _ in places], [b for _, b in places], "x", texts))
    rows = [row for row, layer in enumerate(layers) if layer in marked]
    edge = values.shape[1] - 0.5 + 0.03 * values.shape[1]
    colour = "@good" if label == "flat layer" else "@bad"
    traces.append(
        marks([edge] * len(rows), rows, symbol, [f"{safe(layers[r])}: {label}" for r in rows], colour=colour)
    )
    return [{**trace, "show": show} for trace in traces]


def _instabilities(facts: pd.DataFrame, place: dict[str, int], show: dict[str, list[str]]) -> list[Trace]:
    traces = []
    judged = [(fact, STRAGGLING[straggling(fact)]) for fact in facts.to_dict("records")]
    for look, colour, symbol in (
        ("bad", "@bad", "triangle-left"),
        ("wide", "@grey", "circle-open"),
        ("", "@c0", "circle"),
    ):
        here = [fact for fact, cell in judged if cell.look == look]
        if not here:
            continue
        halves = [Z95 * fact["instability_se"] for fact in here]
        hover = [
            f"<b>{safe(fact['layer'])}</b>: {STRAGGLING[straggling(fact)].text}<br>instability "
            f"{points(fact['instability'], half, 1, '+.3f')} nats (95 %), at α = "
            f"{fact['alpha']:g}<br>corrected lower "
            f"end {signed(format(fact['instability_low'], '+.3f'))}, loss against α = 0: "
            f"{points(fact['rise'], Z95 * fact['rise_se'], 1, '+.3f')}<br>n = {fact['samples']:,} images"
            for fact, half in zip(here, halves, strict=True)
        ]
        x = [fact["instability"] if math.isfinite(fact["instability"]) else math.nan for fact in here]
        y = [place[fact["layer"]] for fact in here]
        traces.append(line(x, y, hover, show, colour, symbol, across=halves, mode="markers"))
    return traces
