"""What the page of a run offers: words explained, rows to download, what to look at first."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import json
import re
from pathlib import Path

import pytest
from support.tiny_report import FAR, LAYERS, SHORT, make_facts, make_run

from rft_fast import catalogue, report, studies
from rft_fast.report import files, glossary, provenance, runs, sections
from rft_fast.report.first import looks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report.write(run).read_text(encoding="utf-8")


# --- words ------------------------------------------------------------------------------------------

# Headings that say everything themselves.
PLAIN = {"model", "data set", "zero-shot %", "setting", "value", "file", "study", "time", "A", "B", "what"}


def test_every_heading_is_explained(run: Path) -> None:
    read = runs.read(run)
    parts = [*sections.studied(read.facts, catalogue.studies(), {}), provenance.provenance(read)]
    headings = {heading for part in parts for table in part.tables for heading in table.headings}
    assert len(headings) > 40
    assert {heading for heading in headings if not glossary.words_of(heading)} <= PLAIN


def test_no_form_has_two_meanings() -> None:
    forms = [form for word in glossary.WORDS for form in (word.name, *word.forms)]
    assert len(set(forms)) == len(forms)
    anchors = [word.anchor for word in glossary.WORDS]
    assert len(set(anchors)) == len(anchors) and all(re.fullmatch(r"[a-z0-9-]+", one) for one in anchors)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the gain, and the gain again", ["gain"]),  # once
        ("pre-gain, gain.x, a/gain, again", []),  # parts of names
        ("layer-wise sharpness of flat layers", ["layer-wise sharpness", "flat layer"]),  # the longest
        ("Gain at the best α", ["gain", "best α"]),
        ("gain and gain 2", ["gain"]),
        ("against zero-shot", ["zero-shot"]),  # "against" is a word of headings only
    ],
)
def test_words_in_sentences(text: str, expected: list[str]) -> None:
    parts = list(glossary.split(text, ["gain 2"]))
    assert "".join(part for part, _ in parts) == text
    assert [word.name for _, word in parts if word] == expected


def test_names_are_no_words() -> None:
    parts = list(glossary.split("bump of gain on rho\x1b had a bump", ["gain", "rho\x1b"]))
    assert [(part, word.name) for part, word in parts if word] == [("bump", "bump")]


def test_every_reference_to_a_word_exists(page: str) -> None:
    used = {one for words in re.findall(r'data-words="([^"]+)"', page) for one in words.split()}
    assert used and used <= set(re.findall(r'<div id="(word-[a-z0-9-]+)">', page))


# --- rows -------------------------------------------------------------------------------------------


def packed(page: str) -> dict[str, str]:
    (text,) = re.findall(r'id="rows">([^<]+)</script>', page)
    return dict(json.loads(gzip.decompress(base64.b64decode(text))))


def test_the_rows_are_those_of_the_run(run: Path, page: str) -> None:
    parts = packed(page)
    with (run / "rows.csv").open(newline="", encoding="utf-8") as stream:
        headings, *rows = csv.reader(stream)
    found = []
    for study, text in parts.items():
        first, *own = csv.reader(text.splitlines())
        assert first == headings and {row[headings.index("study")] for row in own} == {study}
        found += own
    assert sorted(found) == sorted(rows)
    (offered,) = re.findall(r'data-files="([^"]+)" data-name="rows.csv"', page)
    assert json.loads(html.unescape(offered)) == list(parts)


def test_too_many_rows_are_not_within_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = runs.read(run)
    monkeypatch.setattr(files, "MOST", read.count - 1)
    (part,) = files.with_rows(read, [provenance.provenance(read)])
    assert not part.files and not part.downloads
    assert f"{read.count:,} rows" in part.lead and "rows.csv" in part.lead


# --- what to look at first --------------------------------------------------------------------------


def test_what_to_look_at_first(run: Path) -> None:
    facts = runs.read(run).facts
    parts = sections.studied(facts, catalogue.studies(), {})
    found = {look.section: look for look in reversed(looks(facts, parts))}  # the first of each
    # far: good gains 10 points at 0.5, bad fails; the last layer of bad rises by 0.6 nats.
    assert found["path"].choose == {"dataset": FAR, "model": "*"}
    assert "+10.0 points at alpha = 0.5 (good)" in found["path"].text and "bad" in found["path"].text
    assert found["layers"].choose == {"model": "bad", "dataset": FAR, "layer": LAYERS[2]}
    chosen = {part.name: {c.key: dict(c.options) for c in part.picture.controls} for part in parts}
    for look in found.values():
        assert all(value in chosen[look.section][key] for key, value in look.choose.items())


def test_a_run_of_one_study_has_something_to_look_at() -> None:
    facts = make_facts(studies.frame(SHORT), measured=["interpolation"])
    parts = sections.studied(facts, catalogue.studies(), {})
    assert [look.section for look in looks(facts, parts)] == ["path", "path"]  # and what is undecided


def test_an_analysis_that_fails_hides_no_other(run: Path) -> None:
    facts = runs.read(run).facts
    parts = sections.studied(facts, catalogue.studies(), {})
    facts.__dict__["stragglers"] = None  # as of a study that fails
    assert {look.section for look in looks(facts, parts)} >= {"path", "correlation"}


# --- titles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zoo", "arch", "expected"),
    [
        ("digits", "model.json", "digits"),
        ("ViT-B-32", "ViT-B-32", "3 fine-tuned models of ViT-B-32"),
        ("tiny", "tiny.json", "3 fine-tuned models"),  # the stem of a file
    ],
)
def test_the_title_is_no_name_of_a_file(tmp_path: Path, zoo: str, arch: str, expected: str) -> None:
    read = runs.read(make_run(tmp_path / "run", SHORT, zoo=zoo, arch=arch, measured=["interpolation"]))
    assert provenance.title(read) == expected


def test_charts_say_what_they_show(page: str) -> None:
    labels = re.findall(r'<div class="chart"[^>]*aria-label="([^"]+)"', page)
    assert len(labels) == len(set(labels)) == 12
