"""What the page of a run does in a real browser: alone, by mouse and by keyboard, in the dark, on paper."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PATIENCE, tiny_browser
from support.tiny_report import CONFIG, LAYERS, MODELS, make_other, make_rows, make_run

from rft_fast import report, results

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("report") / "run")
    report.write(made)
    return made


def test_chromium_is_there_where_it_must_be() -> None:
    if os.environ.get("RFT_REQUIRE_CHROMIUM") == "1":
        assert tiny_browser.find(), f"RFT_REQUIRE_CHROMIUM=1, and none of {tiny_browser.NAMES} is on the PATH"


@pytest.fixture(scope="module")
def tab() -> Iterator[tiny_browser.Browser]:
    if tiny_browser.find() is None:
        pytest.skip("no Chromium found (set RFT_CHROMIUM, or put chromium on the PATH)")
    with tiny_browser.browser() as found:
        yield found


@pytest.fixture(scope="module")
def loaded(tab: tiny_browser.Browser, run: Path) -> tiny_browser.Browser:
    tab.show(1280, 900)
    tab.open(run / "report.html")
    return tab


@pytest.fixture
def opened(loaded: tiny_browser.Browser) -> tiny_browser.Browser:
    """The page as it is at first: loaded once, since that takes longest."""
    loaded.show(1280, 900)
    loaded.run("""localStorage.clear(); delete document.documentElement.dataset.theme;
        for (const select of document.querySelectorAll("select")) select.selectedIndex = 0;
        for (const input of document.querySelectorAll("input")) input.value = "";
        for (const one of document.querySelectorAll("label:first-child select"))
          one.dispatchEvent(new Event("change", { bubbles: true }));""")
    return loaded


TRACES = "document.getElementById('path-accuracy').data.map((t) => t.hovertext?.[0] ?? '')"


def choose(tab: tiny_browser.Browser, select: str, value: str) -> None:
    tab.run(
        f"""{{ const s = document.getElementById({json.dumps(select)}); s.value = {json.dumps(value)};
        s.dispatchEvent(new Event("change", {{ bubbles: true }})); }}"""
    )


def cells(tab: tiny_browser.Browser, section: str, column: int) -> list[str]:
    """The texts of a column's visible rows."""
    return list(
        tab.run(f"""[...document.querySelectorAll("#{section} tbody tr:not([hidden])")]
        .map((row) => row.cells[{column}].textContent)""")
    )


def test_it_loads_alone(opened: tiny_browser.Browser, run: Path) -> None:
    drawn = opened.run("[...document.querySelectorAll('.chart')].map((c) => !!c.querySelector('.main-svg'))")
    assert drawn == [True] * 12
    assert opened.errors == []
    outside = [url for url in opened.requests if not url.startswith("data:")]
    assert outside == [(run / "report.html").absolute().as_uri()]
    assert opened.run("document.title").startswith("zoo <script>")  # as text: it did not run
    assert opened.run("document.getElementById('failed').hidden")
    assert opened.run("document.querySelectorAll('main script, nav script').length") == 0


def test_choosing(opened: tiny_browser.Browser) -> None:
    everyone = [text for text in opened.run(TRACES) if text]
    assert len(everyone) == 3 and all("far &lt;script" in text for text in everyone)
    assert len(cells(opened, "path", 0)) == 3
    choose(opened, "path-dataset", "fog")
    choose(opened, "path-model", MODELS[2])
    (one,) = (text for text in opened.run(TRACES) if text)
    assert "c&amp;amp;%{x}</b> on fog" in one
    assert cells(opened, "path", 0) == [MODELS[2]] and cells(opened, "path", 1) == ["fog"]
    assert len(opened.run(TRACES)) == 3  # zero-shot, its interval, itself
    before = opened.run("document.getElementById('layers-map').data[0].hovertext[2][1]")
    choose(opened, "layers-model", "bad")
    after = opened.run("document.getElementById('layers-map').data[0].hovertext[2][1]")
    assert before != after and "straggler" in after
    assert opened.errors == []


def test_choosing_by_keyboard(opened: tiny_browser.Browser) -> None:
    opened.run("document.getElementById('path-dataset').focus()")
    opened.press("ArrowDown")
    assert opened.run("document.getElementById('path-dataset').value") == "fog"
    assert all(" on fog" in text for text in opened.run(TRACES) if text)
    opened.press("Tab")
    assert opened.run("document.activeElement.id") == "path-model"


def test_hovering_a_layer(opened: tiny_browser.Browser) -> None:
    """The numbers stand beside the pointer, names as text."""
    choose(opened, "layers-model", "bad")
    # Charts above may still be drawn and move this one: each turn asks where it is now.
    find = """(async () => { const chart = document.getElementById("layers-map");
        chart.scrollIntoView({ behavior: "instant", block: "center" });
        await new Promise((done) => requestAnimationFrame(done));
        const box = chart.querySelector(".nsewdrag").getBoundingClientRect();
        return { x: box.left + box.width * 0.48, y: box.top + box.height * 0.85 }; })()"""
    look = """new Promise((done) => setTimeout(() =>
        done(document.querySelector("#layers-map .hoverlayer")?.textContent ?? ""), 100))"""
    text = ""
    until = time.monotonic() + PATIENCE
    while not text and time.monotonic() < until:
        opened.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)  # enters the chart anew
        opened.send("Input.dispatchMouseEvent", type="mouseMoved", **opened.run(find))
        text = opened.run(look)
    assert f"{LAYERS[2]} (straggler), α = 0.5" in text and "rise in loss +0.6 ± 0.196 nats" in text


def test_sorting(opened: tiny_browser.Browser) -> None:
    press = "document.querySelectorAll('#path thead button')[{}].click()"
    opened.run(press.format(9))  # fine-tuned, a number: the largest first
    found = cells(opened, "path", 9)
    assert found == ["55.0", "45.0", "30.0"]
    assert opened.run("document.querySelectorAll('#path thead th')[9].ariaSort") == "descending"
    opened.run(press.format(9))
    assert cells(opened, "path", 9) == found[::-1]
    opened.run(press.format(0))  # a name: from a to z
    assert cells(opened, "path", 0) == sorted(MODELS)
    assert opened.run("document.querySelectorAll('#path thead th[aria-sort=ascending]').length") == 1
    opened.run("document.querySelectorAll('#path thead button')[0].focus()")
    opened.press("Enter")
    assert cells(opened, "path", 0) == sorted(MODELS, reverse=True)


def test_words_are_explained(opened: tiny_browser.Browser) -> None:
    """By the tab key, by a pointer and by a tap; Escape closes."""
    tip = "document.getElementById('tip')"
    opened.run("document.querySelector('#path .lead a.word').focus()")
    first = opened.run(f"{tip}.textContent")
    assert first.startswith("accuracy Share of images") and not opened.run(f"{tip}.hidden")
    assert opened.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    opened.press("Escape")
    assert opened.run(f"{tip}.hidden")
    opened.run("document.activeElement.click()")  # as a tap does; the page does not jump
    assert not opened.run(f"{tip}.hidden") and opened.run("location.hash") == ""
    opened.press("Tab")
    assert opened.run(f"{tip}.textContent").startswith("loss ")
    opened.run("document.querySelectorAll('#path thead button')[4].focus()")
    assert opened.run(f"{tip}.textContent").startswith("best α ")
    assert opened.run("""new Promise((done) => { let tries = 0; const look = () => {
        const box = document.getElementById("tip").getBoundingClientRect();
        const seen = box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight;
        seen || tries++ > 500 ? done(seen) : setTimeout(look, 20); }; look(); })""")
    opened.press("Escape")
    assert opened.errors == []


def search(tab: tiny_browser.Browser, section: str, text: str) -> None:
    tab.run(f"""{{ const i = document.getElementById("{section}-search"); i.value = {json.dumps(text)};
        i.dispatchEvent(new Event("input", {{ bubbles: true }})); }}""")


def test_finding_a_layer(opened: tiny_browser.Browser) -> None:
    choose(opened, "layers-model", "bad")
    search(opened, "layers", " BLOCKS.1 ")
    assert cells(opened, "layers", 0) == [LAYERS[2]]
    assert opened.run("document.querySelector('#layers .found').textContent") == "1 of 3 layers match"
    drawn = opened.run("""["map", "dots"].map((name) => {
        const chart = document.getElementById(`layers-${name}`);
        return [chart.layout.yaxis.ticktext, chart.data[0].z ?? chart.data.map((t) => [t.x, t.y])]; })""")
    (names, heat), (same, points) = drawn
    assert names == same == ["1.mlp"] and len(heat) == 1 and max(heat[0]) > 0
    assert [0.6] in [[round(v, 9) for v in x] for x, y in points if y == [0]]  # its instability
    assert [[0.1, 0.1], [-0.5, 0.5]] in points  # the margin, from top to bottom
    search(opened, "layers", "nothing")
    assert cells(opened, "layers", 0) == []
    assert "No value" in opened.run("document.getElementById('layers-map-seen').textContent")
    search(opened, "layers", "")
    assert len(cells(opened, "layers", 0)) == 3 and opened.errors == []


def test_what_charts_show_in_words(opened: tiny_browser.Browser) -> None:
    choose(opened, "path-dataset", "fog")
    text = opened.run("document.getElementById('path-accuracy-seen').textContent")
    assert text.startswith("Highest: good on fog, α = 0.5, accuracy 60.0 %, against zero-shot: +10.0 ")
    assert "Lowest: bad on fog, α = 1, accuracy 30.0 %, against zero-shot: \N{MINUS SIGN}20.0" in text


def test_what_to_look_at_first_is_chosen(opened: tiny_browser.Browser) -> None:
    opened.run("""document.querySelector('a[href="#layers"][data-choose]').click()""")
    assert opened.run("document.getElementById('layers-model').value") == "bad"
    assert opened.run("document.getElementById('layers-layer').value") == LAYERS[2]
    assert opened.run("location.hash") == "#layers"
    opened.run("history.replaceState(null, '', location.pathname)")


def saved(tab: tiny_browser.Browser, button: str, folder: Path) -> list[list[str]]:
    """Presses a button that saves, and reads the file."""
    folder.mkdir()
    tab.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    tab.run(f"document.querySelector({json.dumps(button)}).click()")
    tab.run("new Promise((done) => setTimeout(done, 50))")
    until = time.monotonic() + PATIENCE
    while not (found := [file for file in folder.iterdir() if file.suffix == ".csv"]):
        assert time.monotonic() < until, "nothing was saved"
        time.sleep(0.05)
    with found[0].open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.reader(stream))


def test_saving_tables_and_rows(opened: tiny_browser.Browser, run: Path, tmp_path: Path) -> None:
    choose(opened, "path-dataset", "fog")
    head, *rows = saved(opened, "#path .bar .save", tmp_path / "table")
    assert head[:5] == ["model", "data set", "gain [95 % bounds]", "gain [95 % bounds]: low",
                        "gain [95 % bounds]: high"]  # fmt: skip
    assert len(rows) == 3
    (good,) = (row for row in rows if row[0] == "good")
    assert [float(text) for text in good[2:5]] == pytest.approx([10, 8, 12])
    assert all(len(row) == len(head) for row in rows)
    with (run / "rows.csv").open(newline="", encoding="utf-8") as stream:
        expected = list(csv.reader(stream))
    everything = saved(opened, "#run .downloads .save", tmp_path / "all")
    assert everything[0] == expected[0] and sorted(everything) == sorted(expected)
    own = saved(opened, "#layers .downloads .save", tmp_path / "own")
    assert {row[0] for row in own[1:]} == {"layers"} and opened.errors == []


def test_tables_show_that_there_is_more(opened: tiny_browser.Browser) -> None:
    shaded = "document.querySelector('#path .table').classList.contains('more-right')"
    assert opened.run(shaded)
    at = "document.querySelector('#path tbody tr:not([hidden])').cells[0].getBoundingClientRect().left"
    before = opened.run(at)
    opened.run("document.querySelector('#path .scroll').scrollLeft = 1e6")
    opened.run(f"""new Promise((done) => {{ let tries = 0; const look = () =>
        !{shaded} || tries++ > 500 ? done() : setTimeout(look, 20); look(); }})""")
    assert not opened.run(shaded) and opened.run(at) == before  # the name of a row stays in view
    opened.run("document.querySelector('#path .scroll').scrollLeft = 0")


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core, which npm installs; RFT_AXE names its file."""
    file = os.environ.get("RFT_AXE")
    if not file:
        pytest.skip("RFT_AXE names no axe.min.js (npm install axe-core)")
    return Path(file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compared(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.compare(run, make_other(tmp_path_factory.mktemp("compared") / "other"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_axe_finds_no_violation(
    opened: tiny_browser.Browser, run: Path, compared: Path, axe: str, page: str, width: int, dark: bool
) -> None:
    opened.show(width, 900, dark=dark, phone=width < 700)
    opened.open(run / "report.html" if page == "report" else compared)
    opened.run(f"void function () {{ {axe} }}.call(window)")
    found = opened.run("""axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) =>
        violations.map(({ id, nodes }) => [id, nodes[0].html.slice(0, 200)]))""")
    opened.errors.clear()  # of axe
    opened.open(run / "report.html")  # which the other tests expect
    assert found == []


def test_light_and_dark(opened: tiny_browser.Browser, run: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    text = "document.getElementById('path-accuracy').layout.font.color"
    assert (opened.run(ground), opened.run(text)) == ("rgb(255, 255, 255)", "#1c1b22")
    opened.run("document.getElementById('theme').click()")
    assert (opened.run(ground), opened.run(text)) == ("rgb(21, 21, 27)", "#ecebf1")
    opened.open(run / "report.html")  # remembered
    assert opened.run(ground) == "rgb(21, 21, 27)"
    opened.run("localStorage.clear(); delete document.documentElement.dataset.theme")
    opened.show(1280, 900)
    opened.show(1280, 900, dark=True)  # the system's
    opened.run("new Promise((done) => setTimeout(done, 100))")
    assert (opened.run(ground), opened.run(text)) == ("rgb(21, 21, 27)", "#ecebf1")
    assert opened.errors == []


CONTRAST = """(() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  let worst = 99;
  const texts = "p, li, td, th button, a, dt, dd, h1, h2, h3, label span, summary, .tag";
  for (const e of document.querySelectorAll(texts)) {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    worst = Math.min(worst, (a + 0.05) / (b + 0.05));
  }
  return worst; })()"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_and_labels(opened: tiny_browser.Browser, dark: bool) -> None:
    opened.show(1280, 900, dark=dark)
    assert opened.run(CONTRAST) >= 4.5  # WCAG AA
    unnamed = """[...document.querySelectorAll("select, button, .chart, nav, .scroll")].filter((e) =>
        !(e.labels?.length || e.ariaLabel || e.textContent.trim())).length"""
    assert opened.run(unnamed) == 0
    assert opened.run("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == opened.run(
        "document.querySelectorAll('[id]').length"
    )


def test_a_phone(opened: tiny_browser.Browser, run: Path) -> None:
    opened.show(390, 844, phone=True)
    opened.open(run / "report.html")  # whether it is one is asked at the start
    assert opened.run("document.documentElement.scrollWidth") == 390
    widths = opened.run(
        "[...document.querySelectorAll('.main-svg')].map((s) => s.getBoundingClientRect().width)"
    )
    assert max(widths) <= 390 - 2 * 16
    assert min(opened.run("[...document.querySelectorAll('select')].map((s) => s.offsetHeight)")) >= 40
    assert opened.errors == []


NAMES = [
    "m" * 200,
    "\u05e9\u05dc\u05d5\u05dd.2",
    "<img src=x onerror=\"document.title='owned'\">",
    "@c0",
    "__proto__",
]
TITLES = ["visual." + "deep." * 40 + "mlp", "\u05e9\u05db\u05d1\u05d4.0", "<i>&amp;</i>"]


def extreme(folder: Path, models: int, layers: int) -> Path:
    """A run of so many models, the first with so many layers; names and values that may break a page."""
    everyone = [*NAMES, *(f"model-{k}" for k in range(models))][:models]
    found = [*TITLES, *(f"visual.transformer.resblocks.{k}.attn" for k in range(layers))][:layers]
    template = list(make_rows())
    of = {study: [row for row in template if row["study"] == study] for study in ("interpolation", "layers")}
    rows = [
        {**row, "model": model, **({"loss": math.nan, "rise": math.nan} if model == NAMES[1] else {})}
        for model in everyone
        for row in of["interpolation"]
        if row["model"] == "good"
    ]
    rows += [
        {
            **row,
            "model": everyone[0],
            "layer": layer,
            **({"loss": math.inf, "rise": math.inf} if lost else {}),
        }
        for number, layer in enumerate(found)
        for row in of["layers"]
        if (row["model"], row["layer"]) == ("bad", LAYERS[2])
        for lost in [number == 2 and row["alpha"] == 0.5]
    ]
    with results.Run(
        folder, {**CONFIG, "measured": list(of), "studies": list(of), "everything": False}
    ) as run:
        for (study, model), group in itertools.groupby(
            rows, lambda row: (str(row["study"]), str(row["model"]))
        ):
            run.add(study, model, 0, list(group))
    return folder


@pytest.mark.slow(only="20")
@pytest.mark.parametrize(("models", "layers"), [(1, 3), (20, 60)])
def test_names_and_values_without_measure(
    tab: tiny_browser.Browser, tmp_path: Path, models: int, layers: int
) -> None:
    """Nothing in a name runs, the page does not scroll sideways, and names stand whole."""
    file = report.write(extreme(tmp_path / "run", models, layers))
    tab.errors.clear()
    tab.show(390, 844, phone=True)
    tab.open(file)
    assert tab.errors == [] and tab.run("document.title").startswith("zoo <script>")
    assert tab.run("document.querySelectorAll('main img, main i, main script').length") == 0
    assert tab.run("document.documentElement.scrollWidth") == 390
    assert set(cells(tab, "path", 0)) == {*NAMES, *(f"model-{k}" for k in range(models))} & set(
        tab.run("[...document.getElementById('path-model').options].map((o) => o.value)")
    )
    assert set(TITLES) <= set(cells(tab, "layers", 0)) and len(cells(tab, "layers", 0)) == layers
    cut = "(e) => e.scrollWidth > e.clientWidth + 1"
    assert tab.run(f"[...document.querySelectorAll('th[scope=row], td')].filter({cut}).length") == 0
    assert (
        tab.run("Math.min(...[...document.querySelectorAll('.chart')].map((c) => c._fullLayout._size.w))")
        > 100
    )
    # What plotly shows beside the pointer is no wider than the chart (at least 6 pixels a letter).
    lines = tab.run("""[...document.querySelectorAll(".chart")]
        .flatMap((chart) => chart.data.flatMap((trace) => trace.hovertext ?? [])).flat(2).filter(Boolean)
        .flatMap((text) => text.replace(/<br>/g, "\\n").replace(/<[^>]*>/g, "").split("\\n"))""")
    assert max(len(html.unescape(text)) for text in lines) <= 358 / 6
    whole = "".join(html.unescape(text) for text in lines)
    assert "m" * 200 in whole and TITLES[0] in whole


def test_on_paper(opened: tiny_browser.Browser) -> None:
    opened.show(1280, 900, dark=True)
    pdf = opened.pdf()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 50_000
    # And the screen is as it was.
    assert opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 27)"
    assert opened.errors == []


def test_the_comparison(tab: tiny_browser.Browser, run: Path, tmp_path: Path) -> None:
    file = report.compare(run, make_other(tmp_path / "other"))
    tab.errors.clear()
    tab.show(1280, 900)
    tab.open(file)
    assert tab.errors == []
    assert "differs" in cells(tab, "measurements", 7)[0]
    before = tab.run("document.getElementById('measurements-both').data.length")
    choose(tab, "measurements-what", "sharpness, sharpness")
    assert set(cells(tab, "measurements", 2)) == {"sharpness, sharpness (nats)"} and before
    head, *rows = saved(tab, "#measurements .downloads .save", tmp_path / "all")
    shown = tab.run("document.querySelectorAll('#measurements tbody tr').length")  # hidden ones, too
    assert len(rows) == shown and {"a", "b", "difference"} < set(head)
