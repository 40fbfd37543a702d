"""What the page of a run does in a real browser: alone, by mouse and by keyboard, in the dark, on paper."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_browser
from support.tiny_report import LAYERS, MODELS, make_other, make_run

from rft_fast import report

pytestmark = pytest.mark.browser

pytest.importorskip("plotly", reason="the report needs plotly: pip install 'rft-fast[report]'")


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
    spot = opened.run("""(async () => { const chart = document.getElementById("layers-map");
        chart.scrollIntoView({ behavior: "instant", block: "center" });
        await new Promise((done) => requestAnimationFrame(done));
        const box = chart.querySelector(".nsewdrag").getBoundingClientRect();
        return { x: box.left + box.width * 0.48, y: box.top + box.height * 0.85 }; })()""")
    for shift in (0, 1):
        opened.send("Input.dispatchMouseEvent", type="mouseMoved", x=spot["x"] + shift, y=spot["y"])
    text = opened.run("""new Promise((done) => { let tries = 0; const look = () => {
        const found = document.querySelector("#layers-map .hoverlayer")?.textContent;
        found || tries++ > 100 ? done(found) : setTimeout(look, 20); }; look(); })""")
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
