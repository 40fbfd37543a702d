"""Render sections as HTML. Text is escaped here and nowhere else."""

from __future__ import annotations

import base64
import functools
import gzip
import html
import importlib
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from .. import __version__
from ..common.words import visible
from ..figures import style
from ..figures.looks import MUTED
from .drawing import Chart, Control, Key
from .shown import Section
from .tables import Cell, Table


def escape(text: str) -> str:
    """Escape text for HTML, including control characters and marks that change its direction."""
    return html.escape(visible(text, lines=True))


MARK = '<meta name="generator" content="rft_fast.report'
# MUTED, lightened for a dark background (contrast of at least 4.5 to 1).
_ON_DARK = "#9D8FF0 #F08FA0 #5CC8B6 #D9649A #E6D98A #45B86F #98D5F2 #D98BCB #C2C25A".split()


@functools.cache
def library() -> str:
    """Return plotly.js, compressed and encoded in base64: two fifths of its size.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    try:
        offline = importlib.import_module("plotly.offline")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "report: it needs plotly, which is not installed; pip install 'rft-fast[report]'"
        ) from None
    return _packed(offline.get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def render(
    *,
    title: str,
    above: str,
    about: str,
    commands: Sequence[str],
    tiles: Sequence[tuple[str, str]],
    findings: Sequence[str],
    notes: Sequence[str],
    parts: Sequence[Section],
    models: int,
) -> str:
    """Render the whole page as HTML that needs no other file.

    Args:
        title: heading of the page.
        above: small text above the title.
        about: line below the title.
        commands: command lines of the runs.
        tiles: large numbers, each with a caption.
        findings: paragraphs under "In short".
        notes: sentences on what is missing.
        parts: the sections.
        models: number of models, each of which has a colour.
    """
    charts = {f"{part.name}-{chart.name}": _chart(chart) for part in parts for chart in part.picture.charts}
    data = _packed(_json({"charts": charts, "palette": palette(models)}))
    links = "".join(
        f'<a href="#{part.name}" title="{escape(part.title)}">{part.name.replace("-", " ").capitalize()}</a>'
        for part in parts
    )
    body = "".join(map(_section, parts))
    assets = files(__package__)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK} {escape(__version__)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · {escape(above)}</title>
<link rel="icon" href="data:,">
<style>
{assets.joinpath("page.css").read_text(encoding="utf-8")}
{_colours(models)}
</style>
</head>
<body>
<a class="skip" href="#short">Skip to the summary</a>
<nav aria-label="Sections"><div><a href="#short">In short</a>{links}</div>
<button id="theme" type="button" aria-label="Switch between light and dark">
<span aria-hidden="true">◐</span></button></nav>
<main>
<header>
<p class="above">{escape(above)}</p>
<h1>{escape(title)}</h1>
<p class="about">{escape(about)}</p>
{"".join(f'<pre class="command" tabindex="0"><code>{escape(text)}</code></pre>' for text in commands)}
</header>
<section id="short" aria-labelledby="short-title">
<h2 id="short-title">In short</h2>
<dl class="tiles">{"".join(f"<div><dd>{escape(n)}</dd><dt>{escape(of)}</dt></div>" for n, of in tiles)}</dl>
{_list(findings, "findings")}
{_callout("What is missing", notes)}
<noscript><p class="callout">Charts and sorting need JavaScript; all numbers are in the tables, and the run's
<code>figures</code> folder has the pictures.</p></noscript>
<p id="failed" class="callout" hidden>The charts cannot be drawn: this browser is too old to decompress
them. All numbers are in the tables, and the run's <code>figures</code> folder has the pictures.</p>
</section>
{body}
<footer><p>Written by rft_fast {escape(__version__)}. This file is self-contained: it needs no network and no
other files.</p></footer>
</main>
<script type="application/octet-stream" id="data">{data}</script>
<script type="application/octet-stream" id="library">{library()}</script>
<script>
{assets.joinpath("page.js").read_text(encoding="utf-8")}
</script>
</body>
</html>
"""


def _section(part: Section) -> str:
    picture = part.picture
    controls = "".join(_control(part.name, control) for control in picture.controls)
    keys = "".join(map(_key, picture.keys))
    figures = "".join(_figure(part.name, chart) for chart in picture.charts)
    printed = (
        f'<details class="printed"><summary>As the sweep prints it</summary><pre tabindex="0">'
        f"{escape(part.printed)}</pre></details>"
        if part.printed
        else ""
    )
    return f"""
<section id="{part.name}" class="part" aria-labelledby="{part.name}-title">
<p class="above">{escape(part.above)}</p>
<h2 id="{part.name}-title">{escape(part.title)}</h2>
<p class="lead">{escape(part.lead)}</p>
{_callout("Too wide to conclude", part.warnings)}
{controls and f'<form class="controls" aria-label="What to show: {escape(part.title)}">{controls}</form>'}
{figures and f'<div class="charts">{figures}</div>'}
{keys and f'<ul class="keys" aria-label="Legend">{keys}</ul>'}
{
        part.caption
        and f'<p class="figure-text">Caption of the picture in <code>figures</code>: '
        f"{_breakable(escape(part.caption))}</p>"
    }
{"".join(map(_table, part.tables))}
{printed}
</section>"""


def _list(texts: Sequence[str], name: str) -> str:
    return (
        f'<ul class="{name}">' + "".join(f"<li>{_breakable(escape(text))}</li>" for text in texts) + "</ul>"
        if texts
        else ""
    )


def _callout(title: str, texts: Sequence[str]) -> str:
    return f'<aside class="callout"><h3>{title}</h3>{_list(texts, "notes")}</aside>' if texts else ""


def _control(section: str, control: Control) -> str:
    name = f"{section}-{control.key}"
    options = "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in control.options
    )
    alone = " disabled" if len(control.options) < 2 else ""
    return (
        f'<label for="{name}"><span>{escape(control.label)}</span>'
        f'<select id="{name}" data-key="{control.key}"{alone}>{options}</select></label>'
    )


def _figure(section: str, chart: Chart) -> str:
    name = f"{section}-{chart.name}"
    return (
        f"<figure{' class=wide' if chart.wide else ''}><figcaption>{escape(chart.title)}</figcaption>"
        f'<div class="chart" id="{name}" role="img" '
        f'aria-label="{escape(chart.alt)}. The numbers are in the table below."></div></figure>'
    )


# Plotly's symbols as SVG paths in a box of 12 by 12, for the legend.
_PATHS = {
    "circle": "M6 2a4 4 0 1 0 .01 0z",
    "star": "M6 1.2l1.2 3.2 3.4.1-2.7 2.1 1 3.3L6 8 3.1 9.9l1-3.3L1.4 4.5l3.4-.1z",
    "square": "M2.5 2.5h7v7h-7z",
    "triangle-up": "M6 2l4.4 7.6H1.6z",
    "triangle-down": "M6 10L1.6 2.4h8.8z",
    "diamond": "M6 1.2L10.8 6 6 10.8 1.2 6z",
    "cross": "M4.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "x": "M3 1.2l3 3 3-3 1.8 1.8-3 3 3 3L9 10.8l-3-3-3 3L1.2 9l3-3-3-3z",
    "triangle-left": "M2 6l7.6-4.4v8.8z",
    "triangle-right": "M10 6L2.4 1.6v8.8z",
}


def _key(key: Key) -> str:
    symbol, hollow, _ = key.symbol.partition("-open")
    colour = f"var(--{key.colour[1:]})"
    dash = {"dash": "5 3", "dot": "1.5 3"}.get(key.dash, "")
    stroke = f'<path d="M0 6h26" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
    shape = ""
    if symbol:
        fill = "var(--paper)" if hollow else colour
        shape = f'<path transform="translate(7 0)" d="{_PATHS[symbol]}" fill="{fill}" stroke="{colour}"/>'
    sign = f'<svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">{stroke}{shape}</svg>'
    return f"<li>{sign}{escape(key.text)}</li>"


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" class="{"" if _textual(table, i) else "n"}" aria-sort="none">'
        f'<button type="button">{escape(text) or "&nbsp;"}</button></th>'
        for i, text in enumerate(table.headings)
    )
    body = []
    for i, row in enumerate(table.rows):
        chosen = f" data-chosen='{escape(json.dumps(table.chosen[i]))}'" if table.chosen else ""
        body.append(f"<tr{chosen}>{''.join(map(_cell, row))}</tr>")
    text = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    return f"<details><summary>{escape(table.folded)}</summary>{text}</details>" if table.folded else text


def _textual(table: Table, column: int) -> bool:
    return not any(row[column].look == "n" for row in table.rows)


def _cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value:.9g}"'
    text = escape(cell.text)
    if cell.look == "code":
        return f"<td{value}><code>{_breakable(text)}</code></td>"
    if cell.look == "n":
        return f'<td class="n"{value}>{text}</td>'
    if cell.look:
        return f'<td{value}><span class="tag {cell.look}">{text}</span></td>'
    return f"<td{value}>{text}</td>"


def _breakable(text: str) -> str:
    """Allow line breaks within long dotted names of escaped text."""
    return re.sub(r"(?<=[A-Za-z_])\.(?=\w)|(?<=\.\d)\.(?=[a-z])|(?<=[a-z])[/_](?=\w)", r"\g<0><wbr>", text)


def _chart(chart: Chart) -> dict[str, Any]:
    return {"traces": chart.traces, "layout": chart.layout}


def palette(models: int) -> dict[str, list[str]]:
    """Return the models' colours by theme, "light" or "dark"; for more than nine, an even scale."""
    light = [to_hex(colour) for colour in style.colours(models)]
    if models <= len(MUTED):
        return {"light": list(MUTED), "dark": list(_ON_DARK)}
    return {
        "light": light,
        "dark": [to_hex(colormaps["viridis"](0.25 + 0.75 * i / (models - 1))) for i in range(models)],
    }


def _colours(models: int) -> str:
    scales = palette(models)
    light, dark = (
        "".join(f"--c{i}:{colour};" for i, colour in enumerate(scales[theme])) for theme in ("light", "dark")
    )
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{{dark}}}"
    )


def _json(data: Any) -> str:
    """Encode as JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
