"""Charts over models: the path (Figure 1), general sharpness (Figure 3), pruning (Figure 5), correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from ..common.words import many, signed
from ..figures.captions import measures
from ..studies.correlation import COMPETITORS
from ..studies.facts import Facts
from ..studies.interpolate import Z95
from ..studies.pruning import kind
from ..studies.verdicts import Association, association, mode
from .drawing import (
    ALL,
    SATURATED,
    SYMBOLS,
    Chart,
    Control,
    Key,
    Picture,
    Trace,
    band,
    choices,
    layout,
    line,
    of_layers,
    rows_height,
    rule,
    safe,
)
from .phrases import MEASURES, p_value
from .tables import sharpnesses

ALPHA = "α (0 zero-shot, 1 fine-tuned)"


def colours(facts: Facts) -> dict[str, int]:
    """Number the models in the order of measurement; the number selects colour and symbol."""
    return {model: place for place, model in enumerate(facts.rows["model"].unique())}


def model_keys(numbers: Mapping[str, int]) -> list[Key]:
    """Create the legend entries of the models."""
    return [Key(model, f"@c{n}", SYMBOLS[n % len(SYMBOLS)]) for model, n in numbers.items()]


def points(value: float, half: float, scale: float = 100, form: str = ".1f") -> str:
    """Format a value with the half-width of its interval."""
    text = signed(format(scale * value, form))
    return text if pd.isna(half) or not half else f"{text} ± {scale * half:{form.lstrip('+')}}"


@dataclass(frozen=True)
class Quantity:
    """A quantity along a path, and its change, whose standard error is paired over images."""

    value: str  # column of the rows
    change: str  # column of the rows, with <change>_se
    scale: float
    form: str
    unit: str
    unit_of_change: str


ACCURACY = Quantity("accuracy", "gain", 100, "+.1f", "%", "points")
LOSS = Quantity("loss", "rise", 1, "+.3f", "nats", "nats")


def along(
    curve: pd.DataFrame, what: Quantity, title: str, zero: str
) -> tuple[list[float], pd.Series, pd.Series, list[str]]:
    """Prepare a curve with intervals.

    Args:
        curve: rows of one curve, by alpha.
        what: the quantity.
        title: name of the curve, escaped for plotly.
        zero: name of what the change is relative to.

    Returns:
        Positions, values, half-widths of the pointwise 95 % intervals, and hover texts.
    """
    alphas, scale, form = curve["alpha"].tolist(), what.scale, what.form
    y, halves = scale * curve[what.value], scale * Z95 * curve[f"{what.change}_se"]
    hover = [
        f"{title}, α = {a:g}<br>{what.value} {v:{form[1:]}} {what.unit}<br>"
        f"against {zero}: {points(c, h, 1, form)} {what.unit_of_change} (95 %)<br>n = {n:,} images"
        for a, v, c, h, n in zip(alphas, y, scale * curve[what.change], halves, curve["samples"], strict=True)
    ]
    return alphas, y, halves, hover


def path(facts: Facts) -> Picture:
    """Draw accuracy and loss along the path."""
    part = facts.part("interpolation").sort_values("alpha", kind="stable")
    numbers = colours(facts)
    modes = {(fact["model"], fact["dataset"]): mode(fact) for fact in facts.path.to_dict("records")}
    bounds = facts.bounds.set_index(["model", "dataset"])
    accuracy: list[Trace] = []
    loss: list[Trace] = []
    for (model, dataset), curve in part.groupby(["model", "dataset"], sort=False):
        n = numbers[model]
        judged = modes[model, dataset]
        style = {
            "colour": f"@c{n}",
            "symbol": SYMBOLS[n % len(SYMBOLS)] + ("-open" if judged == "failure" else ""),
            "dash": {"failure": "dash", "undecided": "dashdot"}.get(judged, "solid"),
            "name": model,
        }
        show = {"dataset": [dataset], "model": [ALL, model]}
        alone = {"dataset": [dataset], "model": [model]}
        title = f"<b>{safe(model)}</b> on {safe(dataset)}"
        for traces, what in ((accuracy, ACCURACY), (loss, LOSS)):
            alphas, y, half, hover = along(curve, what, title, "zero-shot")
            low, high = y - half, y + half
            if what is ACCURACY:
                low, high = (
                    y.iloc[0] + 100 * bounds.loc[(model, dataset), end].to_numpy()
                    for end in ("gain_low", "gain_high")
                )
            traces.append(band(alphas, list(low), list(high), alone, f"@c{n}"))
            traces.append(line(alphas, y.tolist(), hover, show, **style))
    for dataset, curve in part[part["alpha"] == 0].groupby("dataset", sort=False):
        here = {"dataset": [dataset]}
        accuracy.insert(0, rule([0, 1], [100 * curve["accuracy"].iloc[0]] * 2, here))
        loss.insert(0, rule([0, 1], [curve["loss"].iloc[0]] * 2, here))
    far = part.sort_values("ood", ascending=False, kind="stable")["dataset"].unique()
    return Picture(
        [choices("dataset", "Data set", far), choices("model", "Model", numbers, "all models")],
        [
            Chart(
                "accuracy",
                "Accuracy",
                "Accuracy over alpha, a curve for each model",
                accuracy,
                layout(ALPHA, "accuracy (%)", 400),
            ),
            Chart(
                "loss",
                "Loss",
                "Loss over alpha, a curve for each model",
                loss,
                layout(ALPHA, "loss (nats)", 400),
            ),
        ],
        [
            *model_keys(numbers),
            Key("failure: no gain of that size is possible", "@grey", "circle-open", "dash"),
            Key("undecided", "@grey", "circle", "dashdot"),
            Key("zero-shot", "@grey", "", "dot"),
        ],
    )


def sharpness(facts: Facts) -> Picture:
    """Draw general sharpness over alpha, and accuracy against it."""
    part = sharpnesses(facts, "sharpness").sort_values("alpha", kind="stable")
    numbers = colours(facts)
    path_rows = facts.part("interpolation")
    path_rows = path_rows.assign(position=path_rows["alpha"].round(9)).set_index(
        ["model", "dataset", "position"]
    )
    far = path_rows.loc[path_rows["ood"].fillna(False)].index.get_level_values("dataset").unique()
    curves: list[Trace] = []
    against: list[Trace] = []
    for (model, where), curve in part.groupby(["model", "setting"], sort=False):
        n = numbers[model]
        style = {"colour": f"@c{n}", "symbol": SYMBOLS[n % len(SYMBOLS)], "name": model}
        show = {"model": [ALL, model], "setting": [where]}
        head = [f"<b>{safe(model)}</b>, α = {a:g}<br>sharpness " for a in curve["alpha"]]
        values = [
            f"{points(s, h, 1, '.3g')} nats (95 %)<br>{many(d, 'draw')}, n = {m:,} images"
            + ("<br>saturated: at chance" if verdict == "saturated" else "")
            for s, h, d, m, verdict in zip(
                *(curve[name] for name in ("sharpness", "half", "draws", "samples", "verdict")), strict=True
            )
        ]
        crossed = [SATURATED if verdict == "saturated" else style["symbol"] for verdict in curve["verdict"]]
        hover = [a + b for a, b in zip(head, values, strict=True)]
        y, half = curve["sharpness"].tolist(), curve["half"].tolist()
        curves.append(line(curve["alpha"].tolist(), y, hover, show, error=half, **style))
        curves[-1]["marker"]["symbol"] = crossed
        for dataset in far:
            at = [(model, dataset, round(a, 9)) for a in curve["alpha"]]
            if not all(place in path_rows.index for place in at):
                continue
            here = path_rows.loc[at]
            percent = (100 * here["accuracy"]).tolist()
            up = (100 * Z95 * here["accuracy_se"]).tolist()
            texts = [
                f"{text}<br>accuracy on {safe(dataset)} {points(p, u, 1)} %"
                for text, p, u in zip(hover, percent, up, strict=True)
            ]
            against.append(
                line(y, percent, texts, show | {"dataset": [dataset]}, error=up, across=half, **style)
            )
            against[-1]["line"]["width"] = 0.8
            against[-1]["marker"]["symbol"] = crossed
            against[-1]["marker"]["size"] = [11 if a == 1 else 7 for a in curve["alpha"]]
    charts = [
        Chart(
            "along",
            "Along the path",
            "General sharpness over alpha, a curve for each model",
            curves,
            layout(ALPHA, "general sharpness (nats)", 380),
        )
    ]
    controls = [
        choices("setting", "Measured", part["setting"]),
        choices("model", "Model", numbers, "all models"),
    ]
    if against:
        controls.append(choices("dataset", "Accuracy on", far))
        charts.append(
            Chart(
                "against",
                "Accuracy against it",
                "Accuracy out of distribution against general sharpness",
                against,
                layout("general sharpness (nats)", "accuracy (%)", 380),
            )
        )
    keys = [*model_keys(numbers), Key("larger sign: fine-tuned, α = 1", "@grey", "circle")]
    keys += [Key("saturated", "@grey", SATURATED)] if (part["verdict"] == "saturated").any() else []
    return Picture(controls, charts, keys)


def prune(facts: Facts) -> Picture:
    """Draw accuracy along the path: unpruned, pruned, and with other layers pruned."""
    part = facts.part("prune").sort_values("alpha", kind="stable")
    variants = {
        key: n
        for n, key in enumerate(
            dict.fromkeys(
                zip(
                    *(part.loc[part["method"].notna(), name] for name in ("criterion", "method")), strict=True
                )
            )
        )
    }
    traces: list[Trace] = []
    for (model, dataset), group in part.groupby(["model", "dataset"], sort=False):
        show = {"model": [model], "dataset": [dataset]}
        plain = group[group["method"].isna()]
        half = 100 * Z95 * plain["gain_se"]
        y = 100 * plain["accuracy"]
        alphas = plain["alpha"].tolist()
        traces.append(band(alphas, list(y - half), list(y + half), show, "@ink"))
        hover = [
            f"unpruned, α = {a:g}<br>accuracy {v:.1f} %<br>against zero-shot: {points(g, h, 100, '+.1f')} "
            "points "
            "(95 %)"
            for a, v, g, h in zip(alphas, y, plain["gain"], half / 100, strict=True)
        ]
        traces.append(line(alphas, y.tolist(), hover, show, "@ink", mode="lines+markers", symbol="circle"))
        pruned = group[group["method"].notna()]
        ways = ["criterion", "method", "control"]
        for (criterion, method, control), rows in pruned.groupby(ways, sort=False):
            n = variants[criterion, method]
            seeds = 100 * rows.pivot_table(index="alpha", columns="seed", values="accuracy", dropna=False)
            low, high, mean = seeds.min(axis=1), seeds.max(axis=1), seeds.mean(axis=1)
            who = "as many others, at random" if control else kind(criterion)
            where = seeds.index.tolist()
            hover = [
                f"<b>{safe(who)}</b> ({safe(method)}), α = {a:g}<br>accuracy {m:.1f} %, mean of "
                f"{many(seeds.shape[1], 'mask')}"
                f"<br>lowest and highest {lo:.1f} and {hi:.1f} %"
                for a, m, lo, hi in zip(where, mean, low, high, strict=True)
            ]
            traces.append(band(where, low.tolist(), high.tolist(), show, f"@c{n}"))
            symbol = SYMBOLS[n % 9] + ("-open" if control else "")
            dash = "dot" if control else "solid"
            traces.append(line(where, mean.tolist(), hover, show, f"@c{n}", symbol, dash))
    chart = Chart(
        "pruned",
        "Accuracy along the path",
        "Accuracy over alpha: unpruned, flat layers or stragglers pruned, and as many other layers pruned",
        traces,
        layout(ALPHA, "accuracy (%)", 420),
        wide=True,
    )
    keys = [Key("unpruned", "@ink", "circle")]
    for (criterion, method), n in variants.items():
        keys.append(Key(f"{kind(criterion)} ({method})", f"@c{n}", SYMBOLS[n % 9]))
        keys.append(
            Key(f"control of {kind(criterion)} ({method})", f"@c{n}", SYMBOLS[n % 9] + "-open", "dot")
        )
    # Models of which something was pruned come first.
    models = [*facts.pruning["model"], *part["model"]]
    return Picture(
        [choices("model", "Model", models), choices("dataset", "Data set", part["dataset"])], [chart], keys
    )


def correlation(table: pd.DataFrame) -> tuple[Picture, list[str]]:
    """Draw rank correlations as a forest plot.

    Returns:
        The picture, and text for the measure of each row of the table.
    """
    labels = list(measures(table, MEASURES, "ρ = "))
    table = table.assign(name=labels)
    order = [*dict.fromkeys(table.sort_values("measure", key=lambda m: m.map(_ORDER), kind="stable")["name"])]
    place = {name: row for row, name in enumerate(order)}
    traces: list[Trace] = [rule([0, 0], [-0.5, len(order) - 0.5])]
    for (dataset, outcome, alpha), group in table.groupby(["dataset", "outcome", "alpha"], sort=False):
        show = {"dataset": [dataset], "outcome": [outcome], "alpha": [f"{alpha:g}"]}
        for name, letter, colour, symbol, shift in (
            ("kendall", "Kendall's τ", "@c0", "circle-open", -0.17),
            ("spearman", "Spearman's ρ", "@c1", "diamond-open", 0.17),
        ):
            low, value, high = (group[f"{name}{end}"] for end in ("_low", "", "_high"))
            hover = [
                f"<b>{safe(what)}</b>, α = {alpha:g}<br>{letter} with {outcome} on {safe(dataset)}<br>"
                + signed(f"{v:+.2f} [{a:+.2f}, {b:+.2f}]" if pd.notna(a) else f"{v:+.2f}, no interval")
                + f"<br>over {fact['models']} models, p = {p_value(fact['p_max'])} corrected"
                + ("<br>saturated: says nothing about flatness" if fact["saturated"] else "")
                for what, v, a, b, fact in zip(
                    group["name"], value, low, high, group.to_dict("records"), strict=True
                )
            ]
            y = [place[what] + shift for what in group["name"]]
            trace = line(value.tolist(), y, hover, show, colour, symbol, mode="markers", name=letter)
            if name == "kendall":
                judged = [association(fact) for fact in group.to_dict("records")]
                trace["marker"]["symbol"] = [_JUDGED.get(verdict, symbol) for verdict in judged]
            trace["error_x"] = {
                "symmetric": False,
                "array": (high - value).tolist(),
                "arrayminus": (value - low).tolist(),
                "color": f"{colour}/.7",
                "thickness": 1.3,
                "width": 0,
            }
            traces.append(trace)
    alphas = sorted(map(float, table["alpha"].unique()), reverse=True)
    chart = Chart(
        "forest",
        "Rank correlation over models",
        "Kendall's tau and Spearman's rho with 95 % intervals, a line for each measure of sharpness",
        traces,
        layout(
            "rank correlation",
            "",
            rows_height(len(order)) + 20,
            **of_layers(order, order),
            xaxis={"range": [-1.05, 1.05], "zeroline": False},
        ),
        wide=True,
    )
    controls = [
        choices("dataset", "Data set", table["dataset"]),
        choices("outcome", "Sharpness against", table["outcome"]),
        Control("alpha", "At α", [(f"{a:g}", f"{a:g}") for a in alphas]),
    ]
    keys = [
        Key("Kendall's τ", "@c0", "circle-open"),
        Key("p at most 0.05, corrected", "@c0", "circle"),
        Key("saturated", "@c0", SATURATED),
        Key("Spearman's ρ", "@c1", "diamond-open"),
    ]
    return Picture(controls, [chart], keys), labels


_ORDER = {"general": 0, "stragglers": 1, **dict.fromkeys(COMPETITORS, 2), "layer": 3}
_JUDGED: dict[Association, str] = {"above": "circle", "below": "circle", "saturated": SATURATED}
