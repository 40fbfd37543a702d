"""The page as a whole: its frame, its charts and files as data, its colours."""

from __future__ import annotations

import base64
import functools
import gzip
import importlib
import json
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from .. import __version__
from ..figures import style
from ..figures.looks import MUTED
from . import elements
from .drawing import Chart
from .elements import Elements, escape
from .shown import Look, Section

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
            "report: it needs plotly, which is not installed; pip install 'plotly>=6'"
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
    looks: Sequence[Look] = (),
    names: Iterable[str] = (),
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
        looks: what to look at first.
        names: names of models, data sets and layers, which are not words of the glossary.
    """
    made = Elements(names)
    charts = {f"{part.name}-{chart.name}": _chart(chart) for part in parts for chart in part.picture.charts}
    data = _packed(_json({"charts": charts, "palette": palette(models)}))
    rows = _packed(_json({name: text for part in parts for name, text in part.files.items()}))
    links = "".join(
        f'<a href="#{part.name}" title="{escape(part.title)}">{part.name.replace("-", " ").capitalize()}</a>'
        for part in parts
    )
    body = "".join(map(made.section, parts))
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
<nav aria-label="Sections"><div><a href="#short">In short</a>{links}<a href="#words">Words</a></div>
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
<dl class="tiles">{"".join(f"<div><dt>{escape(of)}</dt><dd>{escape(n)}</dd></div>" for n, of in tiles)}</dl>
{made.looks(looks)}
{(looks and "<h3>Findings</h3>") or ""}
{made.listed(findings, "findings")}
{made.callout("What is missing", notes)}
<noscript><p class="callout">Charts, sorting, search and downloads need JavaScript; all numbers are in the
tables, and the run's <code>figures</code> folder has the pictures.</p></noscript>
<p id="failed" class="callout" hidden>The charts and the files cannot be read: this browser is too old to
decompress them. All numbers are in the tables, and the run's <code>figures</code> folder has the
pictures.</p>
</section>
{body}
{elements.words()}
<footer><p>Written by rft_fast {escape(__version__)}. This file is self-contained: it needs no network and no
other files.</p></footer>
</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/octet-stream" id="data">{data}</script>
<script type="application/octet-stream" id="rows">{rows}</script>
<script type="application/octet-stream" id="library">{library()}</script>
<script>
{assets.joinpath("page.js").read_text(encoding="utf-8")}
</script>
</body>
</html>
"""


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
