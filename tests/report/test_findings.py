"""What a run found, as data; and that summary, figures and page draw it from the same facts."""

from __future__ import annotations

import dataclasses
import html
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.tiny_report import CONFIG, FAR, LAYERS, MODELS, make_facts, make_rows, make_run
from support.wording import said

from rft_fast import catalogue, figures, studies
from rft_fast.common import words
from rft_fast.common.fields import Tree
from rft_fast.report import runs, summary
from rft_fast.report.findings import findings, of_correlation, of_path, of_pruning
from rft_fast.report.findings import verdict as verdict_of
from rft_fast.report.phrases import limits
from rft_fast.report.shown import Finding
from rft_fast.settings import Along, Layers, Sharpness
from rft_fast.studies.facts import Facts, as_facts

ANALYSES = (studies.summarize, studies.stragglers, studies.near_zero, studies.pruning_effect,
            studies.best_gains, studies.correlation, studies.zeroshot_chances)  # fmt: skip


def draw_all(facts: Facts, folder: Path) -> None:
    """The figures of a run."""
    for study in shown(facts):
        study.draw(facts, folder / f"{study.name}.png", None)


def shown(facts: Facts) -> list[catalogue.Study]:
    return [study for study in catalogue.studies() if study.done(facts)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each analysis is called, by whatever name and module."""
    calls = Counter[str]()

    def counting(analysis: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            calls[analysis.__name__] += 1
            return analysis(*arguments, **more)

        return call

    both = (*ANALYSES, sys.modules["rft_fast.studies.correlation"].correlate)
    for analysis in both:
        new = counting(analysis)
        for module in [m for name, m in sys.modules.items() if name.startswith("rft_fast")]:
            for name in [name for name, value in vars(module).items() if value is analysis]:
                monkeypatch.setattr(module, name, new)
    return calls


@pytest.mark.slow
def test_each_analysis_is_made_once_for_words_figures_and_page(tmp_path: Path, counted: Counter[str]) -> None:
    report = pytest.importorskip("rft_fast.report.output")
    pytest.importorskip("plotly", reason="the page needs plotly")
    facts = make_facts(studies.frame(make_rows()), {FAR: 2})
    assert summary.report(facts, catalogue.studies()) and not counted["best_gains"]
    draw_all(facts, tmp_path)
    once = {analysis.__name__ for analysis in ANALYSES} - {"correlation"} | {"correlate"}
    assert counted == dict.fromkeys(once, 1)
    counted.clear()
    report.write(make_run(tmp_path / "run"))
    assert counted == dict.fromkeys(once - {"best_gains"}, 1)


@pytest.mark.slow
def test_figures_of_names_that_are_written_out_share_their_facts(
    tmp_path: Path, counted: Counter[str]
) -> None:
    """A dollar begins no formula, and the facts with it escaped are made once for all figures."""
    rows = studies.frame(row | {"model": f"${row['model']}\t"} for row in make_rows())
    facts = make_facts(rows, measured=["layers"])
    draw_all(facts, tmp_path)
    assert [study.name for study in shown(facts)] == [
        "interpolation",
        "layers",
        "sharpness",
        "layer-sharpness",
        "prune",
    ]
    made = ("summarize", "best_gains", "stragglers", "near_zero", "pruning_effect")
    assert counted == dict.fromkeys(made, 1)
    figure = figures.prune(
        facts,
        tmp_path / "x.png",
    )
    assert "\\$bad\\t" in figure.axes[0].get_title()


def test_facts_are_the_analyses() -> None:
    rows = studies.frame(make_rows())
    made = make_facts(rows)
    facts = as_facts(made, straggler_margin=0.4, zero_margin=None)
    assert facts.settings == made.settings.but(dataclasses.replace(made.of(Layers), straggler_margin=0.4))
    assert as_facts(facts) is facts and as_facts(rows).settings == Tree()
    for found, expected in (
        (facts.path, studies.summarize(rows, facts.of(Along).xi)),
        (facts.stragglers, studies.stragglers(rows, 0.4)),
        (facts.near_zero, studies.near_zero(rows, facts.of(Sharpness).zero_margin)),
        (facts.pruning, studies.pruning_effect(rows)),
        (facts.correlation, studies.correlation(rows, margin=0.4)),
    ):
        pd.testing.assert_frame_equal(found, expected)
    assert facts.stragglers["straggler"].sum() == 1 and facts.to_prune("bad") == {"instability": [LAYERS[2]]}
    assert facts.to_prune("good") == {"instability": []}
    assert facts.names == {*MODELS, *LAYERS, "near", FAR, "fog"}
    # What is measured in several ways stays apart.
    part = rows[rows["study"] == "layer-sharpness"]
    noisy = part.assign(noise="uniform", sharpness=5.0)
    alone = studies.near_zero(part, 0.5)
    both = studies.near_zero(pd.concat([part, noisy]), 0.5)
    assert alone["near_zero"].any()
    pd.testing.assert_frame_equal(both[both["noise"] == "normal"].reset_index(drop=True), alone)


def test_findings_are_sentences_with_what_they_are_about() -> None:
    facts = make_facts(studies.frame(make_rows()), {FAR: 2})
    found = findings(facts, catalogue.studies())
    assert [(one.study, one.dataset, one.model) for one in found] == [
        ("interpolation", FAR, None),  # chance
        ("interpolation", FAR, None),  # failures
        ("interpolation", FAR, None),  # gains
        ("interpolation", FAR, None),  # bumps
        ("layers", FAR, "good"),
        ("layers", FAR, "bad"),
        ("prune", FAR, "bad"),
        *[("correlation", FAR, None)] * 2,
        ("correlation", None, None),
    ]
    assert [one.paper for one in found] == [False] * 9 + [True]
    assert all("\n" not in one.text for one in found)
    printed = " ".join(summary.report(facts, catalogue.studies()).partition("In short")[2].split())
    assert printed == " ".join(one.text if one.paper else f"- {one.text}" for one in found)
    assert not [Finding("x", "layers")] == found
    without = make_facts(facts.rows, measured=["layers"], everything=False)
    assert {one.study for one in findings(without, catalogue.studies())} == {
        "interpolation",
        "layers",
        "prune",
    }
    assert "correlation" not in summary.report(without, catalogue.studies())


LONG = [
    "/a/" + "runs-of-seeds/lr1e-3_wd" * 8 + "/end-00000000",  # breaks after hyphens
    "/b/" + "runs of seeds/lr1e 3 wd " * 8 + "end",  # at spaces
    "c" * 200,  # nowhere
]
assert all(len(name) >= 198 for name in LONG)


@pytest.mark.parametrize("name", [*LONG, "x - y", "a-b", "-", "m\u00a0\u2003n"])
def test_a_long_name_stands_whole_in_words_and_page(name: str, tmp_path: Path) -> None:
    """As it is named, in one line, in every text that has room for it."""
    report = pytest.importorskip("rft_fast.report.output")
    pytest.importorskip("plotly", reason="the page needs plotly")
    rows = [row | {"model": name if row["model"] == "bad" else row["model"]} for row in make_rows()]
    run = make_run(tmp_path / "run", rows, finetuned={**CONFIG["finetuned"], name: {"path": "/x"}})
    facts = runs.read(run).facts
    about = [finding.text for finding in findings(facts, catalogue.studies()) if finding.model == name]
    assert len(about) == 2 and all(name in text for text in about)
    text = summary.report(facts, catalogue.studies())
    lines = text.partition("In short")[2].splitlines()
    assert sum(name in line for line in lines) >= 3  # it fails, has a straggler, is pruned
    rest = [line for line in lines if name not in line]
    assert all(len(line) <= 100 for line in rest)
    page = report.write(run).read_text().replace("<wbr>", "")
    items = re.findall(r"<li>(.*?)</li>", page)
    for finding in findings(facts, catalogue.studies()):
        assert html.escape(finding.text) in items
    assert html.escape(text.partition("\n\nlayers:")[0].strip()) in page


def test_names_within_names_and_of_data_sets_are_not_broken() -> None:
    names = ["a-b", "x a-b y", "a\tb", ""]
    text = "word " * 18 + "x a-b y, word-word " + "word " * 15 + words.visible("a\tb") + " a-b."
    lines = words.paragraph(text, names, "- ")
    assert lines[0].startswith("- word") and all(line.startswith("  ") for line in lines[1:])
    assert any("x a-b y" in line for line in lines) and max(map(len, lines)) <= 100
    assert " ".join(" ".join(lines).split())[2:] == " ".join(text.split())


@pytest.mark.parametrize(
    ("change", "error", "verdict"),
    [
        (0.02, 0.0, "had no clear effect"),  # all masks changed the same image
        (0.02, 0.001, "helped"),
        (-0.02, 0.001, "hurt"),
        (0.02, 0.01, "had no clear effect"),
        (0.02, np.nan, "had no clear effect"),
    ],
)
def test_a_verdict_needs_an_error_that_is_known(change: float, error: float, verdict: str) -> None:
    assert verdict_of(change, error, 2, "helped", "hurt") == verdict


def effect(change: float, error: float, seeds: int, control: bool, method: str = "zero") -> dict[str, Any]:
    """Rows of one way of pruning whose changes have this mean and standard error over the masks."""
    about = {"model": "m", "dataset": "far", "criterion": "sharpness", "method": method, "control": control}
    return {**about, "change": change, "change_se": error, "seeds": seeds}


@pytest.mark.slow
@pytest.mark.parametrize("sds", [(1.0, 1.0), (0.1, 1.0), (0.01, 1.0), (1.0, 0.1)])
@pytest.mark.parametrize("masks", [2, 3])
def test_a_control_that_is_no_different_is_seldom_called_so(sds: tuple[float, float], masks: int) -> None:
    """About 5 % of the time, however different the variances."""
    rng, trials = np.random.default_rng(0), 1000
    wrong = 0
    for _ in range(trials):
        facts = []
        for sd, control in zip(sds, (False, True), strict=True):
            changes = rng.normal(0, sd, masks)
            error = float(changes.std(ddof=1) / masks**0.5)
            facts.append(effect(float(changes.mean()), error, masks, control))
        (found,) = of_pruning(pd.DataFrame(facts))
        wrong += "better than the control" in found.text or "worse than the control" in found.text
    assert wrong / trials < 0.085


def test_one_mask_has_no_error_and_no_verdict() -> None:
    facts = [effect(-0.6, np.nan, 1, False, "magnitude"), effect(0.1, np.nan, 1, True, "magnitude")]
    (found,) = of_pruning(pd.DataFrame(facts))
    assert (found.study, found.dataset, found.model) == ("prune", "far", "m")
    said(found.text, "-60.0 points", "-70.0", "one mask")


def test_the_verdict_on_a_correlation_is_by_the_corrected_p() -> None:
    fact = {"measure": "general", "dataset": "far", "outcome": "accuracy", "alpha": 1.0, "rho": 0.5,
            "measured_on": "near", "models": 9, "kendall": -0.8, "p_max": 0.03, "tests": 7, "needed": 0.72,
            "partial": -0.5, "saturated": 0, "circular": False}  # fmt: skip
    loss = {**fact, "measure": "minus clean loss", "kendall": 0.6, "p_max": 0.2, "rho": math.nan}
    found, paper = of_correlation(pd.DataFrame([fact, loss]), "far")
    facts = ("rho = 0.5", "near", "lower accuracy on far", "tau -0.80", "9 models", "p = 0.030", "7 tests")
    said(found.text, *facts, "tau -0.50", "tau +0.60", "p = 0.200")
    said(limits(pd.DataFrame([fact])), "9 models", "0.56", "7 tests", "0.72")
    assert (found.dataset, found.paper, paper.paper) == ("far", False, True)
    for change, word in (
        ({"p_max": 0.06}, "0.72 would be significant"),
        ({"p_max": 0.06, "needed": math.nan}, "no tau could be"),
        ({"kendall": math.nan, "p_max": math.nan}, "undefined"),
        ({"saturated": 4}, "4 of 9"),
        ({"saturated": 4, "kendall": math.nan, "p_max": math.nan}, "flatness"),
        ({"circular": True}, "Circular"),
    ):
        (found, *_) = of_correlation(pd.DataFrame([fact | change]), "far")
        said(found.text, "far", "9 models", word)
        assert "is associated" not in found.text or "circular" in change
        assert "nan" not in found.text
    same = {**loss, "kendall": math.nan, "p_max": math.nan}  # the clean loss is the same for all models
    (found, _) = of_correlation(pd.DataFrame([fact, same]), "far")
    said(found.text, "tau -0.80", "undefined")
    assert "nan" not in found.text


def test_one_model_is_not_counted() -> None:
    fact = {"dataset": "far", "model": "m", "xi": 0.02, "gain": 0.03, "gain_held_out": math.nan,
            "gain_id_alpha": math.nan, "bump": 0.25, "bump_low": 0.1, "barrier_low": 0.2}  # fmt: skip
    for shown, high, word, changes in (
        (0.03, 0.05, "observed", {}),
        (0.01, 0.05, "less", {"gain": 0.015, "bump_low": -0.1}),
        (0.0, 0.05, "undecided", {"bump_low": -0.1, "barrier_low": -0.1}),
        (0.0, 0.01, "failed", {}),
    ):
        bounds = {"gain_shown": shown, "gain_high": high}
        found = of_path(pd.DataFrame([fact | bounds | changes]))
        text = " ".join(one.text for one in found)
        said(text, "far", "m", word)
        assert "of 1" not in text and "nan" not in text


def test_a_set_of_one_class_or_one_image_is_no_evidence() -> None:
    facts = make_facts(studies.frame(make_rows()), {FAR: 1})
    (first, *others) = findings(facts, catalogue.studies())
    said(first.text, FAR)
    assert all(one.dataset != FAR for one in others)
