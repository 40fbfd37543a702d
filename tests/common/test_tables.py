"""Tables of text: widths, long names, wide characters."""

from __future__ import annotations

import random
import unicodedata

import pytest

from rft_fast.common.tables import aligned, display_width, labelled, shortened

LONG = "runs/" + "a-very-long-folder-name/" * 5


def width_of(text: str) -> int:
    """By the standard's own table, without the package's library."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1
        for one in text
    )


def test_columns_are_aligned_by_what_is_shown() -> None:
    rows = [["model", "gain", "mode"], ["模型甲", "+1.0", "gain"], ["e\u0301te\u0301", "-12.5", "failure"]]
    lines = aligned(rows, last=True)
    assert lines == [
        "  model    gain  mode",
        "  模型甲   +1.0  gain",
        "  e\u0301te\u0301     -12.5  failure",
    ]
    assert {
        width_of(line[: line.index(row[1])]) + len(row[1]) for line, row in zip(lines, rows, strict=True)
    } == {15}


@pytest.mark.parametrize("size", [40, 60, 80, 100])
def test_a_table_is_never_wider_than_the_terminal(size: int) -> None:
    rng = random.Random(size)
    alphabet = "abcdef-_/ 漢字e\u0301"
    for _ in range(60):
        names = [
            "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 90))).strip() or "x" for _ in range(5)
        ]
        count = rng.randint(2, 10)
        rows = [["model", *(f"column {place}" for place in range(count))]]
        rows += [[name, *(f"{rng.uniform(-99, 99):+.3f}" for _ in range(count))] for name in names]
        lines = aligned(rows, size=size)
        legend = {line.strip().partition(": ")[2] for line in lines if ": " in line}
        for line in lines:
            assert width_of(line) <= size or line.partition(": ")[2] in names
        text = "\n".join(lines)
        for row in rows[1:]:
            assert row[0] in legend or row[0] in text, "every name is there in full"
            assert all(number in text for number in row[1:]), "no number is shortened"


def test_names_that_differ_in_their_middle_stay_different() -> None:
    names = [f"{LONG}{number}/model_of_one_run/checkpoint.pt" for number in range(3)]
    lines = aligned([["model", "gain"], *([name, "+1.0"] for name in names)], size=60)
    shown = [line.split()[0] for line in lines[1:4]]
    assert len(set(shown)) == 3 and max(map(len, lines[:4])) <= 60
    assert [line.partition(": ") for line in lines[4:]] == [
        (f"  {short}", ": ", name) for short, name in zip(shown, names, strict=True)
    ]


def test_a_table_that_fits_is_left_as_it_is() -> None:
    assert aligned([["a", "b"], [LONG, "1"]], size=200) == [f"  a{' ' * (len(LONG) - 1)}  b", f"  {LONG}  1"]


@pytest.mark.parametrize("text", ["", "short", LONG, "漢字" * 20, "e\u0301" * 30, "👩‍🔬" * 15])
def test_shortened_texts_keep_both_ends(text: str) -> None:
    short = shortened(text, 12)
    assert display_width(short) <= 12 and (short == text or (short[0] == text[0] and short[-1] == text[-1]))
    head, dots, tail = short.partition("...")
    assert short == text or (dots and text.startswith(head) and text.endswith(tail))


@pytest.mark.parametrize("size", [40, 80])
def test_labelled_texts_continue_at_a_space(size: int) -> None:
    texts = {"short": "one word", "文字": "漢字 e\u0301te\u0301 " * 20, "path": LONG, "": "a  b " * 30}
    lines = labelled(texts.items(), indent="  ", size=size)
    for line in lines:
        assert width_of(line) <= size or line.strip().rpartition(" ")[2] == LONG
    assert " ".join(lines).split() == " ".join(f"{label} {text}" for label, text in texts.items()).split()
    whole = labelled(texts.items(), size=size, wrap=False)
    assert len(whole) == len(texts) and whole[2] == f"path   {LONG}"


def test_control_characters_of_names_are_escaped() -> None:
    assert "\x1b" not in "\n".join(aligned([["model", "x"], ["\x1b[31mred", "1"]]))
