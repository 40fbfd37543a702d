"""The elements of the page. Text is escaped here and in :mod:`.page`, and nowhere else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence

from ..common.words import many, visible
from . import glossary
from .drawing import RIGHT_TO_LEFT, Chart, Control, Key
from .shown import Download, Look, Section
from .tables import Cell, Table


def escape(text: str) -> str:
    """Escape text for HTML, including control characters and marks that change its direction."""
    return html.escape(visible(text, lines=True))


class Elements:
    """Makes the elements of one page.

    Args:
        names: names of models, data sets and layers, in which no word is explained.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def prose(self, text: str) -> str:
        """A sentence, its words explained."""
        return "".join(
            f'<a class="word" href="#{word.anchor}" data-words="{word.anchor}">{escape(part)}</a>'
            if word
            else _breakable(escape(part))
            for part, word in glossary.split(text, self._names)
        )

    def listed(self, texts: Sequence[str], name: str) -> str:
        """A list of sentences; empty without any."""
        items = "".join(f"<li>{self.prose(text)}</li>" for text in texts)
        return f'<ul class="{name}">{items}</ul>' if texts else ""

    def callout(self, title: str, texts: Sequence[str]) -> str:
        """A box of sentences; empty without any."""
        return f'<div class="callout"><h3>{title}</h3>{self.listed(texts, "notes")}</div>' if texts else ""

    def looks(self, looks: Sequence[Look]) -> str:
        """What to look at first: links to sections, which choose what is shown there."""
        items = "".join(
            f'<li><a href="#{look.section}" data-choose="{escape(json.dumps(look.choose))}">'
            f"{escape(look.title)}</a> {self.prose(look.text)}</li>"
            for look in looks
        )
        return f'<h3>What to look at first</h3><ol class="looks">{items}</ol>' if looks else ""

    def section(self, part: Section) -> str:
        """A section of the page."""
        picture = part.picture
        controls = "".join(_control(part.name, control) for control in picture.controls)
        if part.searched:
            controls += (
                f'<label for="{part.name}-search"><span>Find a layer</span><input type="search" '
                f'id="{part.name}-search" placeholder="part of its name" autocomplete="off">'
                "</label>"
            )
        keys = "".join(map(_key, picture.keys))
        figures = "".join(self._figure(part.name, chart) for chart in picture.charts)
        printed = (
            f'<details class="printed"><summary>As the sweep prints it</summary><pre tabindex="0">'
            f"{escape(part.printed)}</pre></details>"
            if part.printed
            else ""
        )
        tables = "".join(
            self._table(f"{part.name}-table-{number}", table) for number, table in enumerate(part.tables)
        )
        caption = part.caption and (
            f'<p class="figure-text">Caption of the picture in <code>figures</code>: '
            f"{_breakable(escape(part.caption))}</p>"
        )
        return f"""
<section id="{part.name}" class="part" aria-labelledby="{part.name}-title">
<p class="above">{escape(part.above)}</p>
<h2 id="{part.name}-title">{escape(part.title)}</h2>
<p class="lead">{self.prose(part.lead)}</p>
{self.callout("Too wide to conclude", part.warnings)}
{controls and f'<form class="controls" aria-label="What to show: {escape(part.title)}">{controls}</form>'}
{(part.searched and '<p class="found" role="status"></p>') or ""}
{figures and f'<div class="charts">{figures}</div>'}
{keys and f'<ul class="keys" aria-label="Legend">{keys}</ul>'}
{caption}
{tables}
{_downloads(part.downloads)}
{printed}
</section>"""

    def _figure(self, section: str, chart: Chart) -> str:
        name = f"{section}-{chart.name}"
        return (
            f"<figure{' class=wide' if chart.wide else ''}><figcaption>{self.prose(chart.title)}</figcaption>"
            f'<div class="chart" id="{name}" role="group" aria-describedby="{name}-seen" '
            f'aria-label="{escape(chart.alt)}"></div>'
            f'<p class="seen" id="{name}-seen"></p></figure>'
        )

    def _table(self, name: str, table: Table) -> str:
        head = "".join(_heading(table, column) for column in range(len(table.headings)))
        body = []
        for i, row in enumerate(table.rows):
            chosen = f" data-chosen='{escape(json.dumps(table.chosen[i]))}'" if table.chosen else ""
            first, *others = row
            cells = _cell(first, head=True) + "".join(map(_cell, others))
            body.append(f"<tr{chosen}>{cells}</tr>")
        text = (
            f'<div class="table"><div class="bar"><h3 id="{name}">{escape(table.caption)}</h3>'
            f'<p class="count" role="status">{many(f"{len(table.rows):,}", "row")}</p>'
            f'<button type="button" class="save" data-table="{name}">CSV<span class="unseen"> of: '
            f"{escape(table.caption)}</span></button></div>"
            f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
            f'<table aria-labelledby="{name}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div></div>"
        )
        return f"<details><summary>{escape(table.folded)}</summary>{text}</details>" if table.folded else text


def words() -> str:
    """The section that explains all words."""
    entries = "".join(
        f'<div id="{word.anchor}"><dt>{escape(word.name)}</dt><dd>{escape(word.means)}</dd></div>'
        for word in sorted(glossary.WORDS, key=lambda word: word.name.lower())
    )
    return (
        '\n<section id="words" class="part" aria-labelledby="words-title"><p class="above">Glossary</p>'
        '<h2 id="words-title">Words</h2><p class="lead">Underlined words and headings are explained '
        "where you point at them, tap them, or reach them by the tab key.</p>"
        f'<dl class="words">{entries}</dl></section>'
    )


def _downloads(downloads: Sequence[Download]) -> str:
    buttons = "".join(
        f'<button type="button" class="save" data-files="{escape(json.dumps(list(one.parts)))}" '
        f'data-name="{escape(one.name)}">{escape(one.text)}</button>'
        for one in downloads
    )
    return f'<p class="downloads">{buttons}</p>' if buttons else ""


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
    return f"<li>{sign}<span>{escape(key.text)}</span></li>"


def _heading(table: Table, column: int) -> str:
    text = table.headings[column]
    number = ' class="n"' if any(row[column].look == "n" for row in table.rows) else ""
    words = " ".join(word.anchor for word in glossary.words_of(text))
    explained = f' data-words="{words}"' if words else ""
    button = f'<button type="button"{explained}>{escape(text)}</button>'
    return f'<th scope="col"{number} aria-sort="none">{button}</th>'


def _cell(cell: Cell, head: bool = False) -> str:
    """A cell; ``head``: it names its row."""
    value = "" if cell.value is None else f' data-value="{cell.value:.9g}"'
    text = _breakable(escape(cell.text))
    if cell.look == "code":
        text = f"<code>{text}</code>"
    elif cell.look and cell.look != "n":
        text = f'<span class="tag {cell.look}">{text}</span>'
    attributes = (' class="n"' if cell.look == "n" else "") + value
    return f'<th scope="row"{attributes}>{text}</th>' if head else f"<td{attributes}>{text}</td>"


def _breakable(text: str) -> str:
    """Allow line breaks within long dotted names of escaped text, and isolate words from right to left."""
    text = RIGHT_TO_LEFT.sub(r"<bdi>\g<0></bdi>", text)
    return re.sub(r"(?<=[A-Za-z_])\.(?=\w)|(?<=\.\d)\.(?=[a-z])|(?<=[a-z])[/_](?=\w)", r"\g<0><wbr>", text)
