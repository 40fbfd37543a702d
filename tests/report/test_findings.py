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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from support.tiny_report import CONFIG, FAR, LAYERS, MODELS, make_facts, make_rows, make_run
from support.wording import said

from rft_fast import catalogue, figures, studies
from rft_fast.common import words
from rft_fast.common.fields import Tree
from rft_fast.report import runs, sections, sentences, summary, tables
from rft_fast.report.findings import findings
from rft_fast.report.phrases import limits
from rft_fast.report.shown import Attempts, Rank
from rft_fast.settings import Along, Layers, Prune, Sharpness
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


def sentences_of(facts: Facts) -> list[str]:
    return [finding.text for finding in findings(facts, catalogue.studies())]


def test_a_summary_begins_with_at_most_eight_sentences_in_order() -> None:
    facts = make_facts(studies.frame(make_rows()), {FAR: 2})
    found = findings(facts, catalogue.studies())
    assert [one.rank for one in found] == [
        Rank.CHANCE, Rank.GAIN, Rank.NO_GAIN, Rank.STRAGGLERS, Rank.SHARPNESS, Rank.PRUNING,
        Rank.CORRELATION, Rank.BUMP,
    ]  # fmt: skip
    for one in found:
        assert one.text[0].isupper() and one.text.endswith(".") and "\n" not in one.text
        assert not re.search(r"[.?!] [A-Z]|nan|inf", one.text)
    printed = summary.report(facts, catalogue.studies())
    assert printed.startswith("In short\n- ")
    lines = " ".join(printed.partition("\n\n")[0].split())
    assert lines == " ".join(["In short", *(f"- {one.text}" for one in found)])
    without = make_facts(facts.rows, measured=["layers"], everything=False)
    assert {one.study for one in findings(without, catalogue.studies())} == {
        "interpolation", "layers", "sharpness", "layer-sharpness", "prune",
    }  # fmt: skip
    assert "correlation" not in summary.report(without, catalogue.studies())


def path_rows(
    accuracies: dict[str, list[float]],
    ood: bool = True,
    samples: int = 1000,
    sets: tuple[str, ...] = ("far",),
) -> pd.DataFrame:
    """Rows of paths at three positions, whose gains have a standard error of a point."""
    return studies.frame(
        {
            "study": "interpolation", "model": model, "dataset": where, "ood": ood, "alpha": alpha,
            "rho": 0.0, "keep": 1.0, "samples": samples, "accuracy": accuracy, "accuracy_se": 0.01,
            "loss": 1.0, "loss_se": 0.01, "gain": accuracy - curve[0], "gain_se": 0.01 * (alpha > 0),
            "rise": 0.0, "rise_se": 0.01 * (alpha > 0), "bump": 0.0, "bump_se": 0.01 * (alpha == 0.5),
        }
        for where in sets
        for model, curve in accuracies.items()
        for alpha, accuracy in zip((0.0, 0.5, 1.0), curve, strict=True)
    )  # fmt: skip


GAINS, FAILS, UNDECIDED = [0.5, 0.7, 0.6], [0.5, 0.4, 0.3], [0.5, 0.515, 0.5]


@pytest.mark.parametrize(
    ("curves", "counts"),
    [
        ({"a": GAINS, "b": GAINS}, (2, 0, 0)),
        ({"a": GAINS, "b": FAILS, "c": UNDECIDED}, (1, 1, 1)),
        ({"a": FAILS, "b": FAILS}, (0, 2, 0)),
        ({"a": UNDECIDED, "b": UNDECIDED}, (0, 0, 2)),
    ],
)
def test_sentences_count_models_that_gain_fail_or_neither(
    curves: dict[str, list[float]], counts: tuple[int, int, int]
) -> None:
    """Each with its bounds, right when no model, one, or all do it."""
    n, (gaining, failing, undecided) = len(curves), counts
    found = sentences_of(Facts(path_rows(curves)))
    assert f"far, {gaining} of {n} models beat" in found[0] and "95 %" in found[0]
    said(" ".join(found))
    assert ("+20.0 points" in found[0]) == (gaining > 0)
    assert any(f"far, {failing} of {n} models" in text and "failed" in text for text in found[1:]) == (
        failing > 0
    )
    if undecided and failing:
        assert f"undecided: {undecided} on far" in found[1]
    elif undecided:
        assert f"far, {undecided} of {n} models" in found[1] and "neither" in found[1]
    # On a second data set, the same is said in the same sentences.
    both = sentences_of(Facts(path_rows(curves, sets=("far", "fog"))))
    assert len(both) == len(found) and f"on fog {gaining} of {n}" in both[0]


@pytest.mark.parametrize(
    ("curve", "word", "gain"),
    [(GAINS, "beat", "+20.0"), (FAILS, "failed", "points"), (UNDECIDED, "neither", "+1.5")],
)
def test_one_model_is_not_counted(curve: list[float], word: str, gain: str) -> None:
    for sets in (("far",), ("far", "fog")):
        text = " ".join(sentences_of(Facts(path_rows({"m": curve}, sets=sets))))
        said(text, "far", "m", word, gain)
        assert "of 1" not in text and "nan" not in text


def test_in_distribution_no_path_fails() -> None:
    found = sentences_of(Facts(path_rows({"a": GAINS, "b": FAILS}, ood=False)))
    said(" ".join(found), "In distribution", "1 of 2")
    assert not any("fail" in text for text in found)


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
    about = [text for text in sentences_of(facts) if name in text]
    assert len(about) >= 3  # it fails, has a straggler, is pruned
    text = summary.report(facts, catalogue.studies())
    lines = text.partition("\n\n")[0].splitlines()
    assert sum(name in line for line in lines) >= 3
    rest = [line for line in lines if name not in line]
    assert all(len(line) <= 100 for line in rest)
    page = report.write(run).read_text().replace("<wbr>", "")
    items = re.findall(r"<li>(.*?)</li>", re.sub(r"</?a\b[^>]*>", "", page))
    for finding in findings(facts, catalogue.studies()):
        assert html.escape(tables.minus(finding.text)) in items
    section = text.partition("\n\n")[2].partition("\n\nlayers:")[0].strip()
    assert html.escape(section) in page


def test_names_within_names_and_of_data_sets_are_not_broken() -> None:
    names = ["a-b", "x a-b y", "a\tb", ""]
    text = "word " * 18 + "x a-b y, word-word " + "word " * 15 + words.visible("a\tb") + " a-b."
    lines = words.paragraph(text, names, "- ")
    assert lines[0].startswith("- word") and all(line.startswith("  ") for line in lines[1:])
    assert any("x a-b y" in line for line in lines) and max(map(len, lines)) <= 100
    assert " ".join(" ".join(lines).split())[2:] == " ".join(text.split())


def effect(
    change: float, error: float, seeds: int, control: bool = False, method: str = "zero", model: str = "m"
) -> dict[str, Any]:
    """A way of pruning whose changes have this mean and standard error over the masks."""
    about = {"model": model, "dataset": "far", "criterion": "sharpness", "method": method, "keep": 0.5}
    return {**about, "control": control, "change": change, "change_se": error, "seeds": seeds}


def pruned(*effects: dict[str, Any]) -> str:
    facts: Any = SimpleNamespace(pruning=pd.DataFrame(effects))
    (found,) = sentences.prune(facts)
    assert (found.study, found.rank) == ("prune", Rank.PRUNING) and "nan" not in found.text
    return found.text


@pytest.mark.parametrize(
    ("change", "error", "verdict"),
    [
        (0.02, 0.0, "did not clearly change"),  # all masks changed the same image
        (0.02, 0.001, "raised"),
        (-0.02, 0.001, "lowered"),
        (0.02, 0.01, "did not clearly change"),
        (0.02, np.nan, "did not clearly change"),
    ],
)
def test_a_verdict_needs_an_error_that_is_known(change: float, error: float, verdict: str) -> None:
    text = pruned(effect(change, error, 3), effect(-0.1, 0.01, 3, control=True))
    assert verdict in text and f"{100 * change:+.1f} points" in text and "against -10.0" in text


@pytest.mark.slow
@pytest.mark.parametrize("masks", [2, 5])
def test_pruning_without_effect_is_seldom_called_one(masks: int) -> None:
    """In 5 % of runs of eight cases: the intervals are corrected for their number."""
    rng, trials, wrong = np.random.default_rng(0), 1000, 0
    for _ in range(trials):
        changes = rng.normal(0, 1, (8, masks))
        errors = changes.std(1, ddof=1) / masks**0.5
        text = pruned(
            *(
                effect(*each, masks, model=f"{n}")
                for n, each in enumerate(zip(changes.mean(1), errors, strict=True))
            )
        )
        wrong += "raised accuracy in 0 and lowered it in 0 of 8" not in text
    assert wrong / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_one_mask_has_no_error_and_no_verdict() -> None:
    text = pruned(effect(-0.6, np.nan, 1, method="magnitude"), effect(0.1, np.nan, 1, True, "magnitude"))
    said(text, "m", "far", "-60.0 points", "+10.0", "one mask")


def correlated(*facts: dict[str, Any]) -> str:
    made: Any = SimpleNamespace(correlation=pd.DataFrame(facts), deciding=pd.DataFrame({"dataset": ["far"]}))
    (found,) = sentences.correlation(made)
    assert "nan" not in found.text
    return found.text


def test_the_verdict_on_a_correlation_is_by_the_corrected_p() -> None:
    fact = {"measure": "general", "dataset": "far", "outcome": "accuracy", "alpha": 1.0, "rho": 0.5,
            "measured_on": "near", "models": 9, "kendall": -0.8, "p_max": 0.03, "tests": 7, "needed": 0.72,
            "partial": -0.5, "saturated": 0, "circular": False, "without_low": -0.9,
            "without_high": -0.7}  # fmt: skip
    loss = {**fact, "measure": "minus clean loss", "kendall": 0.6, "p_max": 0.2, "rho": math.nan}
    words = (
        "rho = 0.5",
        "lower accuracy on far",
        "tau -0.80",
        "-0.90 to -0.70",
        "9 models",
        "p = 0.030",
        "7 tests",
    )
    said(correlated(fact, loss), *words, "tau +0.60")
    said(limits(pd.DataFrame([fact])), "9 models", "0.56", "7 tests", "0.72")
    for change, word in (
        ({"p_max": 0.06}, "no significant"),
        ({"p_max": 0.06, "needed": math.nan}, "so few models"),
        ({"kendall": math.nan, "p_max": math.nan}, "undefined"),
        ({"saturated": 4, "p_max": math.nan}, "saturated"),
        ({"circular": True}, "circular"),
    ):
        text = correlated(fact | change)
        said(text, "far", "9 models", word)
        assert "went with" not in text or "circular" in change
    # Of several rhos, the one that decides is named; a saturated one does not.
    several = correlated(
        fact | {"rho": 1.0, "saturated": 9, "p_max": math.nan}, fact, fact | {"rho": 0.1, "p_max": 0.5}
    )
    assert "rho = 0.5" in several and "p = 0.030" in several


def test_a_set_of_one_class_or_one_image_is_no_evidence() -> None:
    facts = make_facts(studies.frame(make_rows()), {FAR: 1})
    first, *others = sentences_of(facts)
    said(first, FAR)
    assert others and all(FAR not in text for text in others)
    nothing = make_facts(studies.frame(make_rows()), dict.fromkeys(("near", FAR, "fog"), 1))
    assert len(sentences_of(nothing)) == 1


def test_one_draw_has_no_interval_and_supports_no_verdict() -> None:
    """No layer is called flat, or not flat, and no model sharp."""
    rows = studies.frame(make_rows())
    one = rows["study"].isin(["sharpness", "layer-sharpness"])
    rows.loc[one, "sharpness_se"] = np.nan
    facts = make_facts(rows.assign(draws=rows["draws"].mask(one & (rows["draws"] > 0), 1)))
    assert facts.untested
    (text,) = (one.text for one in findings(facts, catalogue.studies()) if one.rank == Rank.SHARPNESS)
    said(text, "near", "0.600 to 1.000 nats", "without intervals")
    printed = summary.sections(facts, catalogue.studies())
    assert "flatness is not tested" in printed and "are flat" not in printed and "is flat" not in printed


def test_saturated_models_alone_are_named_and_conclude_nothing() -> None:
    facts = make_facts(studies.frame(make_rows()), {"near": 2})
    (text,) = (one.text for one in findings(facts, catalogue.studies()) if one.rank == Rank.SHARPNESS)
    said(text, "3 of 3", "rho = 0.5", "saturated")
    assert "[" not in text


class Broken(Exception):
    """An error that no study is expected to raise."""


def test_an_error_of_one_study_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with its error, in findings and sections."""
    facts = make_facts(studies.frame(make_rows()), {FAR: 2})
    whole = findings(facts, catalogue.studies())

    def fails(*_: object) -> Any:
        raise Broken("too few moons")

    study = catalogue.study("prune")
    for method in ("say", "findings", "section"):
        monkeypatch.setattr(type(study), method, fails)
    attempts = Attempts()
    first, *rest = findings(facts, catalogue.studies(), attempts)
    assert attempts.failed == {"prune": "Broken: too few moons"}
    assert first.rank == Rank.FAILED and rest == [one for one in whole if one.study != "prune"]
    said(first.text, "prune", "too few moons")
    printed = summary.report(facts, catalogue.studies())
    assert "too few moons" in printed.partition("\n\n")[2] and "correlation over models" in printed
    pytest.importorskip("plotly", reason="the page needs plotly")
    made = {section.name: section for section in sections.studied(facts, catalogue.studies(), {})}
    assert made["prune"].warnings == ["Broken: too few moons"] and made["correlation"].tables

    def disk_full(*_: object) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(type(study), "findings", disk_full)
    with pytest.raises(OSError, match="no space"):  # of the system
        findings(facts, catalogue.studies())


def of_sharpness(*rows: dict[str, Any]) -> str:
    """The sentence on sharpness of all weights at alpha = 1."""
    base = {"study": "sharpness", "dataset": "near", "ood": False, "alpha": 1.0, "rho": 0.5, "keep": 1.0,
            "on": "interpolated", "asked": "plain", "estimator": "plain", "noise": "normal", "draws": 9,
            "samples": 500, "loss": 1.0, "accuracy": 0.6, "sharpness": 0.25,
            "sharpness_se": 0.01, "sharpness_df": 8.0}  # fmt: skip
    (found,) = sentences.sharpness(Facts(studies.frame(base | row for row in rows)))
    assert "nan" not in found.text and "1 models" not in found.text
    return found.text


def test_the_sentence_on_sharpness_says_what_raised_the_loss() -> None:
    """Noise, the limit of small noise, or the worst case; one model or several, with or without an error."""
    half = 0.01 * float(scipy.stats.t.ppf(0.975, 8))  # of one model: not corrected
    interval = f"[95 % interval: {0.25 - half:.3f}, {0.25 + half:.3f}]"
    assert of_sharpness({"model": "m"}) == (
        f"Noise on all weights (rho = 0.5, on near) changed the loss at alpha = 1 by 0.250 nats {interval}."
    )
    alone = of_sharpness({"model": "m", "sharpness_se": math.nan, "draws": 1})
    said(alone, "by 0.250 nats, without an interval")
    several = of_sharpness({"model": "m"}, {"model": "k", "sharpness": 0.5})
    said(several, "0.250 nats [", "(m) to 0.500 nats [", "(k) over 2 models", "corrected for 2 models]")
    limit = of_sharpness({"model": "m", "estimator": "hessian", "asked": "hessian"})
    said(limit, "Noise on all weights", "rho = 0.5, in the limit of small rho")
    worst = of_sharpness({"model": "m", "estimator": "apgd-l2", "asked": "apgd-l2", "noise": None})
    said(worst, "The worst perturbation found of all weights")
    assert "Noise" not in worst


def test_what_was_not_pruned_is_named() -> None:
    for criteria, told in (
        (("sharpness",), "no flat layers"),
        (("sharpness", "instability"), "no stragglers"),
    ):
        facts: Any = SimpleNamespace(
            pruning=pd.DataFrame(), of=lambda _, chosen=criteria: Prune(criteria=chosen)
        )
        (found,) = sentences.prune(facts)
        said(found.text, told)
