"""The page of a run: what it says, read back, and what is refused."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import os
import random
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support.tiny_report import (
    ALPHAS,
    CONFIG,
    EVIL,
    FAR,
    LAYERS,
    MODELS,
    SETS,
    SHORT,
    make_facts,
    make_other,
    make_rows,
    make_run,
)
from support.wording import command_refused, refused, said

from rft_fast import __version__, catalogue, report, results, studies
from rft_fast.report import comparison, files, matching, runs, sections, summary, tables
from rft_fast.report.__main__ import main
from rft_fast.report.findings import findings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    assert report.write(run) == run / "report.html"
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_other(tmp_path_factory.mktemp("other") / "run")


def plain(text: str) -> str:
    """The words of HTML, its spaces made one."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text.replace("<wbr>", ""))).split())


def listed(page: str) -> str:
    """The points of its lists, one a line."""
    return "\n".join(plain(item) for item in re.findall(r"<li>(.*?)</li>", page))


def charts(page: str) -> dict[str, Any]:
    (packed,) = re.findall(r'id="data">([^<]+)</script>', page)
    return dict(json.loads(gzip.decompress(base64.b64decode(packed)))["charts"])


# --- what it says ---------------------------------------------------------------------------------


def test_the_summary_is_the_sweeps(run: Path, page: str) -> None:
    read = runs.read(run)
    printed = summary.report(read.facts, catalogue.studies())
    for study in [study for study in catalogue.studies() if study.done(read.facts)]:
        section = summary.sections(read.facts, [study]).strip("\n")
        assert section in printed
        assert html.escape(section) in page
    found = [finding.text for finding in findings(read.facts, catalogue.studies())]
    (items,) = re.findall(r'<ul class="findings">(.*?)</ul>', page, flags=re.S)
    assert found and listed(items).split("\n") == [plain(html.escape(tables.minus(text))) for text in found]
    assert plain(html.escape(CONFIG["command"])) in plain(page)
    for text in ("0" * 64, "1" * 64, "d" * 64, __version__, "n = 1,234", "n = 77 images"):
        assert text in plain(page)


def test_a_zero_shot_end_that_guesses_is_reported(tmp_path: Path) -> None:
    among = {FAR: 2, "near": 2}  # .5 and .8 of 1,234 images
    read = runs.read(make_run(tmp_path / "run", SHORT, measured=["interpolation"], **{"scored among": among}))
    found = [
        finding.text for finding in findings(read.facts, catalogue.studies()) if "chance" in finding.text
    ]
    ends = [end for end in studies.zeroshot_chances(read.facts.rows, among) if end.text]
    assert [end.dataset for end in ends] == [FAR]
    assert len(found) == 1
    said(found[0], FAR, "50.0 %", "1,234", "chance is 50 %")
    report.write(tmp_path / "run")
    assert plain(html.escape(found[0])) in plain((tmp_path / "run" / "report.html").read_text())
    earlier = {name: {**data, "classes": 2 if name == FAR else None} for name, data in CONFIG["data"].items()}
    read = runs.read(make_run(tmp_path / "earlier", SHORT, measured=["interpolation"], data=earlier))
    assert [
        finding.text for finding in findings(read.facts, catalogue.studies()) if "chance" in finding.text
    ] == found


def test_saturated_sharpness_is_flagged_and_concludes_nothing(tmp_path: Path) -> None:
    """Two classes, of which half the answers are right: chance."""
    run = make_run(tmp_path / "run", **{"scored among": {"near": 2}})
    facts = runs.read(run).facts
    general = facts.part("sharpness")
    assert facts.saturated(general).all()
    assert {row[3].text for row in tables.sharpness(facts, "sharpness").rows} == {"saturated: at chance"}
    layers = facts.part("layer-sharpness")
    assert (facts.saturated(layers) == (layers["alpha"] > 0)).all()  # at 0 nothing is perturbed
    assert facts.correlation.loc[facts.correlation["measure"] == "general", "p_max"].isna().all()
    page = plain(report.write(run).read_text(encoding="utf-8"))
    for text in ("9 of 9 values are saturated", "18 of 27 values are saturated",
                 "3 of 3 perturbed models at rho = 0.5 answered at chance (saturated)",
                 "in 9 of 9 rows the perturbed model answers at chance"):  # fmt: skip
        assert text in page
    drawn = charts((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    curves = next(chart for name, chart in drawn.items() if name.startswith("sharpness"))
    assert {sign for trace in curves["traces"] for sign in trace["marker"]["symbol"]} == {"star-open"}


def test_what_is_too_wide_to_conclude(run: Path, page: str) -> None:
    read = runs.read(run)
    gains = {(row[0].text, row[1].text): row[3].text for row in tables.path(read.facts).rows}
    assert gains["good", "fog"] == "high gain"  # +10 +- 2 points
    assert gains[MODELS[2], "fog"] == "undecided"  # +1 +- 2
    assert gains["bad", "fog"] == "failure"  # -10 +- 2 at best
    assert gains["good", "near"] == "–"  # a mode is of out-of-distribution data
    verdicts = {(row[9].text, row[0].text): row[2].text for row in tables.layers(read.facts).rows}
    assert verdicts["bad", LAYERS[2]] == "straggler"
    assert verdicts["bad", LAYERS[1]] == tables.WIDE  # 0.3 +- 0.2, corrected: below the margin of 0.1
    assert set(verdicts["good", layer] for layer in (LAYERS[0], LAYERS[2])) == {"no straggler"}
    words = {row[4].text for row in tables.prune(read.facts).rows}
    assert words == {"helped", "hurt"}
    said(listed(page), "95 %", MODELS[2], "fog")


def test_only_paths_out_of_distribution_are_undecided() -> None:
    """In distribution a path has no mode."""
    facts = make_facts(studies.frame(make_rows()), {FAR: 2})
    facts.path = facts.path.assign(gain_shown=0.0, gain_high=1.0)
    assert {text.split()[1] for text in sections.path(facts).warnings} == {FAR.split()[0], "fog"}


def test_only_numbers_have_the_minus_sign() -> None:
    text = "lr1e-3-ep6 on x-2 (run 1-2): -1.5 points [-2, +0.1], a-b_-3"
    assert tables.minus(text) == "lr1e-3-ep6 on x-2 (run 1-2): \u22121.5 points [\u22122, +0.1], a-b_-3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("-0.000", "0.000"), ("+0.0", "0.0"), ("-0", "0"), ("-1.50", "−1.50"), ("-0.05", "−0.05"),
     ("+0.1 [-0.0, +0.2]", "+0.1 [0.0, +0.2]"), ("-10", "−10")],
)  # fmt: skip
def test_zeros_have_no_sign(text: str, expected: str) -> None:
    assert tables.signed(text) == expected


def test_intervals_are_those_of_the_rows(run: Path) -> None:
    rows = results.load(run)
    (row,) = (r for r in tables.path(runs.read(run).facts).rows if (r[0].text, r[1].text) == ("good", "fog"))
    assert row[2].text == "+10.0 [+8.0, +12.0]" and row[2].value == pytest.approx(0.1)
    shown = {
        (r[0].text, r[1].text, r[2].text): r[3].text
        for r in tables.sharpness(runs.read(run).facts, "layer-sharpness").rows
    }
    assert len(shown) == len(MODELS) * len(LAYERS) * 2  # nothing is perturbed at alpha = 0
    value = rows.query(
        "study == 'layer-sharpness' and model == 'good' and layer == @LAYERS[1] and alpha == 1"
    )
    half = 2.7764451 * float(value["sharpness_se"].iloc[0])  # Student's t, four degrees of freedom
    centre = float(value["sharpness"].iloc[0])
    expected = f"{centre:+.3g} [{centre - half:+.3g}, {centre + half:+.3g}]"
    assert shown[LAYERS[1], "good", "1"] == expected


def test_charts_have_the_numbers(page: str) -> None:
    found = charts(page)
    assert set(found) == {
        "path-accuracy", "path-loss", "layers-map", "layers-dots", "layers-loss", "layers-accuracy",
        "sharpness-along", "sharpness-against", "layer-sharpness-map", "layer-sharpness-dots", "prune-pruned",
        "correlation-forest",
    }  # fmt: skip
    (good,) = (t for t in found["path-accuracy"]["traces"]
               if t["show"] == {"dataset": ["fog"], "model": ["*", "good"]})  # fmt: skip
    assert good["x"] == ALPHAS and good["y"] == pytest.approx([50, 60, 55])
    assert "against zero-shot: +10.0 ± 2.0 points (95 %)" in good["hovertext"][1]
    heats = [
        t for t in found["layers-map"]["traces"] if t["type"] == "heatmap" and t["show"]["model"] == ["bad"]
    ]
    assert np.array(heats[0]["z"]).shape == (3, 3) and np.argmax(heats[0]["z"]) == 7
    assert f"<b>{LAYERS[2]}</b> (straggler), α = 0.5" in heats[0]["hovertext"][2][1]


def test_names_are_escaped(page: str) -> None:
    assert EVIL not in page and "<b>c" not in page
    assert html.escape(EVIL) in page
    drawn = json.dumps(
        [{**trace, "show": {}} for chart in charts(page).values() for trace in chart["traces"]]
    )
    assert "<script" not in drawn and "&lt;script" in drawn and "<b>c&" not in drawn
    # Nothing is asked of others: no address of one outside of the library and of what is said.
    shell = re.sub(r'<script type="application/octet-stream".*?</script>', "", page, flags=re.S)
    assert not re.findall(r"""(?:src|href)=["']?(?!#|data:,)[^"'> ]+""", shell)
    assert "http" not in shell and "@import" not in shell


class _Tags(HTMLParser):
    """The tags of a page with their attributes' names, and the values of those that could act."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[object, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        acting = {name: value for name, value in attributes if name in ("id", "href", "src", "style", "type")}
        if tag != "wbr":
            self.found.append((tag, [name for name, _ in attributes], acting))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_names_add_no_tag(tmp_path: Path, seed: int) -> None:
    """A page of hostile names has the tags of one with plain names, in their order."""
    rng = random.Random(seed)
    words = [
        *("</script>", "<img src=x onerror=alert(1)>", "' onmouseover='x", '" autofocus onfocus="x', "<!--"),
        *(
            "-->",
            "]]>",
            "&lt;",
            "\x1b[31m",
            "\u202e",
            "</pre></title>",
            "<svg/onload=x>",
            "`",
            "\\u003c",
            "$",
        ),
        *("<a href='javascript:x'>", "%{x}", "<style>*{}</style>", "\n"),
    ]
    names = [*MODELS, *SETS, *LAYERS]
    evil = {name: "".join(rng.choices(words, k=4)) + str(i) for i, name in enumerate(names)}
    pages = {}
    for which, called in (("plain", {name: f"name{i}" for i, name in enumerate(names)}), ("evil", evil)):
        rows = [
            {key: called.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
            for row in make_rows()
        ]
        changes = {
            part: {called[name]: entry for name, entry in CONFIG[part].items()}
            for part in ("finetuned", "data")
        }
        title = "zoo" if which == "plain" else f"zoo {evil['good']}"
        made = make_run(tmp_path / which, rows, **changes, zoo=title, command=title)
        pages[which] = report.write(made).read_text()
    assert _Tags(pages["plain"]).found == _Tags(pages["evil"]).found
    assert not {"\x1b", "\u202e"} & set(pages["evil"])


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    rows = [dict(row) for row in make_rows()]
    for row in rows:
        if (
            row["study"] in ("layers", "layer-sharpness")
            and row["layer"] == LAYERS[0]
            and row["alpha"] == 0.5
        ):
            row |= {
                name: float("nan") for name in ("loss", "rise", "instability", "sharpness") if name in row
            }
    text = report.write(make_run(tmp_path / "run", rows)).read_text()
    assert "mean losses are not finite" in plain(text)
    heats = [t for t in charts(text)["layers-map"]["traces"] if t["type"] == "heatmap"]
    assert heats[0]["z"][0][1] is None


def test_an_interrupted_run(tmp_path: Path) -> None:
    rows = list(make_rows())
    cut = next(i for i, row in enumerate(rows) if row["study"] == "layers" and row["model"] == "bad") + 4
    text = report.write(make_run(tmp_path / "run", rows[:cut])).read_text()
    said(listed(text), "layers", "bad", "4 rows", "sharpness, layer-sharpness, prune", "correlation")
    assert 'id="layers"' in text and 'id="prune"' not in text
    only_a_part = runs.read(make_run(tmp_path / "short", rows[:10]))
    said("\n".join(only_a_part.notes), "interpolation", "bad", "1 row")
    with refused(ValueError):
        runs.read(make_run(tmp_path / "shorter", rows[:2]))


def test_many_models_have_colours_of_their_own() -> None:
    from rft_fast.report import page as pages

    for count in (1, 9, 10, 40):
        found = pages.palette(count)
        for colours in found.values():
            assert len(set(colours)) == len(colours) >= count
            assert all(re.fullmatch(r"#[0-9A-Fa-f]{6}", colour) for colour in colours)


# --- what is refused ------------------------------------------------------------------------------


def refuses(*arguments: object, facts: tuple[object, ...] = ()) -> str:
    return command_refused(main, arguments, *facts)


def test_bad_input(tmp_path: Path, run: Path) -> None:
    refuses(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty")
    refuses(run / "config.json")
    refuses(make_run(tmp_path / "fresh", []))
    only_rows = make_run(tmp_path / "rows")
    config = only_rows / "config.json"
    whole = config.read_text()
    config.unlink()
    refuses(
        only_rows,
        facts=(
            "rows.sqlite",
            "config.json",
        ),
    )
    for text, *facts in [
        ("{", "JSON"),
        ("[]",),
        ("{}",),
        (whole.replace(f'"rft_fast": "{__version__}"', '"rft_fast": "99.0"'), "99.0"),
        (whole.replace('"settings"', '"setings"'), "settings"),
    ]:
        config.write_text(text)
        refuses(only_rows, facts=tuple(facts))
    config.write_text(whole)
    (only_rows / "rows.sqlite").write_bytes(b"not a database" * 100)
    refuses(only_rows, facts=("rows.sqlite",))
    assert not list(tmp_path.rglob("*.html*"))


def test_places_that_cannot_be_written(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses(run, "--out", tmp_path / "none" / "x.html")
    refuses(run, "--out", tmp_path)
    short = make_run(tmp_path / "short", SHORT)
    csv = run / "rows.csv"
    before = csv.read_bytes()
    refuses(run, "--out", csv)
    assert csv.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        refuses(run, "--out", tmp_path / "x.html")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", _full)
        refuses(short, "--out", tmp_path / "x.html")
        assert not list(tmp_path.glob("x.html*"))  # which would keep the disk full


def _full(file: Path, *_: object, **__: object) -> int:
    file.write_bytes(b"a beginning")
    raise OSError(28, "No space left on device")


def test_without_plotly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rft_fast.report import page as pages

    pages.library.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    refuses(run, facts=("plotly",))
    pages.library.cache_clear()


# --- two runs ---------------------------------------------------------------------------------------


def test_differences(run: Path, pair: Path) -> None:
    found = matching.matched(results.load(run), results.load(pair))
    apart = found[found["apart"]]
    assert set(apart["model"]) == {"bad"} and set(apart["alpha"]) == {1.0} and len(apart) == len(SETS)
    assert set(apart["value"]) == {"accuracy"}
    np.testing.assert_allclose(apart["difference"], 0.06)
    freedom = apart["n_a"] + apart["n_b"] - 2  # of equal errors
    np.testing.assert_allclose(apart["half"], stats.t.ppf(0.975, freedom) * 0.02**0.5 / 10, rtol=1e-6)
    counts = results.load(pair)["study"].value_counts()
    # Accuracy and loss, once for the zero-shot rows of both models; sharpness.
    expected = 2 * (counts["interpolation"] - len(SETS) + counts["layers"] + counts["prune"])
    assert len(found) == expected + counts["sharpness"] + counts["layer-sharpness"]


@pytest.mark.slow(only="^plain-20$")
@pytest.mark.parametrize(("estimator", "draws"), [("plain", 2), ("plain", 20), ("antithetic", 6)])
def test_few_draws_of_the_same_differ_as_seldom_as_many(estimator: str, draws: int) -> None:
    """About 5 % by chance, and none when corrected for all of them: the errors, too, are of few draws."""
    rng = np.random.default_rng(0)
    count = draws // 2 if estimator == "antithetic" else draws

    def run() -> pd.DataFrame:
        values = rng.normal(size=(2000, count))
        return studies.frame(
            {
                **{"study": "sharpness", "model": f"m{k}", "dataset": "x", "ood": False, "alpha": 0.5},
                **{"rho": 0.1, "estimator": estimator, "draws": draws, "samples": 1000},
                **{"sharpness": own.mean(), "sharpness_se": own.std(ddof=1) / count**0.5},
            }
            for k, own in enumerate(values)
        )

    found = matching.matched(run(), run())
    assert len(found) == 2000 and 0.01 < found["apart"].mean() < 0.07
    assert found["corrected"].sum() <= 1


def test_the_comparison_page(run: Path, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(pair)]) == 0
    said(capsys.readouterr().out, "comparison.html")
    text = (pair / "comparison.html").read_text()
    assert "seed07" in plain(text)  # the one setting that differs, in A and B
    said(listed(text), "Only A", MODELS[2], "3 of 30", "3 of 120")  # bad's accuracies at 1, by 6 points
    nothing = make_run(pair.parent / "nothing", [{**row, "dataset": "x"} for row in SHORT])
    refuses(run, nothing)


def test_without_a_name_the_newest_run_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(facts=("rft-runs",))
    made = [make_run(tmp_path / "rft-runs" / name, SHORT) for name in "cab"]
    (tmp_path / "rft-runs" / "no run").mkdir()
    for when, one in enumerate(made):
        os.utime(one / "rows.sqlite", (1e9 + when, 1e9 + when))
    os.utime(made[0], (2e9, 2e9))
    assert main([]) == 0
    said(capsys.readouterr().out, "rft-runs/b", "report.html")
    assert [one.name for one in made if (one / "report.html").exists()] == ["b"]
    # A pattern that names several is no report of one of them.
    refuses(*made, facts=(3, "rft-runs/a", "rft-runs/b", "rft-runs/c"))
    assert main([str(one) for one in made[:2]]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"compared {made[0]} (A) with {made[1]} (B)"


def test_runs_of_older_versions_are_reported_and_compared(run: Path, tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", SHORT)
    file = old / "config.json"
    file.write_text(file.read_text().replace(f'"rft_fast": "{__version__}"', '"rft_fast": "0.0.1"'))
    assert "rft_fast 0.0.1" in plain(report.write(old).read_text())
    page = plain(report.compare(old, run).read_text())
    assert "0.0.1" in page and __version__ in page


def test_all_matched_values_are_a_file(run: Path, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value once, and the three that differ; more than the table shows."""
    monkeypatch.setattr(comparison, "_SHOWN", 5)
    made = comparison.compare(runs.read(run), runs.read(pair))["parts"][-1]
    (table,) = made.tables
    lines = list(csv.DictReader(io.StringIO(made.files["matched"])))
    assert len(table.rows) == 5 and len(lines) == len(matching.matched(results.load(run), results.load(pair)))
    assert len({tuple(line[key] for key in [*matching.KEYS, "value"]) for line in lines}) == len(lines)
    stored = {
        (row["model"], row["dataset"], row["alpha"]): float(str(row["accuracy"]))
        for row in SHORT
        if row["model"] == "bad" and row["alpha"] == 1.0
    }
    apart = [line for line in lines if line["apart"] == "True"]
    found = {(line["model"], line["dataset"], float(line["alpha"])): line for line in apart}
    assert found.keys() == stored.keys() and {line["value"] for line in apart} == {"accuracy"}
    for key, accuracy in stored.items():
        assert float(found[key]["a"]) == accuracy and float(found[key]["b"]) == accuracy + 0.06
    monkeypatch.setattr(files, "MOST", len(lines) - 1)
    made = comparison.compare(runs.read(run), runs.read(pair))["parts"][-1]
    assert not made.files and not made.downloads and f"{len(lines):,}" in made.lead


def test_no_model_is_a_formula_in_that_file(tmp_path: Path) -> None:
    rows = [{**row, "model": "=1+1"} for row in SHORT if row["model"] == "bad"]
    a, b = (runs.read(make_run(tmp_path / name, rows, measured=["interpolation"])) for name in "ab")
    lines = csv.DictReader(io.StringIO(comparison.compare(a, b)["parts"][-1].files["matched"]))
    assert {line["model"] for line in lines} == {"zero-shot", "'=1+1"}


def test_sharpness_of_other_estimators_is_not_compared(run: Path, tmp_path: Path) -> None:
    rows = [
        row | ({"estimator": "antithetic"} if row["study"] == "layer-sharpness" else {})
        for row in make_rows()
    ]
    other = runs.read(make_run(tmp_path / "run", rows))
    notes = comparison.compare(runs.read(run), other)["notes"]
    (found,) = [note for note in notes if "estimator" in note]
    said(found, "layer-sharpness", "plain", "antithetic")


def test_a_run_against_itself(run: Path) -> None:
    rows = results.load(run)
    found = matching.matched(rows, rows)
    assert not found["apart"].any() and (found["difference"] == 0).all()
    lost = rows.assign(loss=rows["loss"].where(rows["alpha"] < 1, np.inf))
    assert matching.matched(rows, lost)["apart"].any()  # not finite on one side


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report", str(make_run(tmp_path / "run", SHORT)), "--out", str(out)])
    monkeypatch.delitem(sys.modules, "rft_fast.report.__main__")
    with pytest.raises(SystemExit) as done:
        runpy.run_module("rft_fast.report", run_name="__main__")
    assert done.value.code == 0
    said(capsys.readouterr().out, out, "2.0")
