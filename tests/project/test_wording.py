"""The snapshot of wording: what fails, and what --accept-wording writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import wording

ROOT = Path(__file__).parents[2]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from support import wording

def pytest_addoption(parser):
    parser.addoption("--accept-wording", action="store_true")

def pytest_configure(config):
    wording.install(config)
"""
TESTS = """
import sys
import pytest
from support.wording import command_refused, refused, said, warned

@pytest.mark.parametrize("size", [3, 14])
def test_size(size, tmp_path):
    with refused(ValueError, size, "shape"):
        raise ValueError(f"{tmp_path / 'x'}: expected the shape [{size}], it took {size / 7} s")
    said(f"gain {size / 7}  of\\n all, {size} images")

def test_command():
    def main(words):
        print("error:", *words, file=sys.stderr)
        raise SystemExit(2)
    command_refused(main, ["a", 1], "a 1")

def test_fails():
    with refused(ValueError):
        raise ValueError("accepted by no run")
    assert False
"""
WRITTEN = """
=== tests/test_it.py

test_command
    error: a 1

test_size[3]
    TMP/x: expected the shape [3], it took # s

test_size[14]
    TMP/x: expected the shape [14], it took # s

test_size[3] 2
    gain #  of
     all, 3 images

test_size[14] 2
    gain #  of
     all, 14 images
"""


class Project:
    """A project of one test file, run by pytest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.tests = folder, folder / wording.FILE, folder / "tests" / "test_it.py"
        self.tests.parent.mkdir()
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\n")
        self.tests.write_text(TESTS)

    def run(self, *words: str, xdist: bool = False) -> str:
        more = ["-n", "2"] if xdist else ["-p", "no:xdist"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more, *words]
        environment = {name: value for name, value in os.environ.items() if name != "CI"}
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=environment
        ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("xdist", [False, True])
def test_what_is_accepted_passes_and_other_words_do_not(tmp_path: Path, xdist: bool) -> None:
    pytest.importorskip("xdist")
    project = Project(tmp_path)
    assert "4 failed" in project.run(xdist=xdist)
    assert "3 passed" in project.run("--accept-wording", xdist=xdist)
    assert project.file.read_text() == wording.HEAD + WRITTEN
    assert "1 failed, 3 passed" in project.run(xdist=xdist)
    project.tests.write_text(TESTS.replace("the shape", "a shape"))
    printed = project.run(xdist=xdist)
    assert "3 failed, 1 passed" in printed and "+     TMP/x: expected a shape [3], it took # s" in printed
    assert "pytest --accept-wording 'tests/test_it.py::test_size[3]'" in printed
    project.tests.write_text(TESTS.replace('"shape"', '"form"'))
    assert "3 failed, 1 passed" in project.run(xdist=xdist)  # a fact is no matter of wording


@pytest.mark.slow
def test_entries_of_other_tests_are_kept_and_those_of_none_are_not(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.run("--accept-wording")
    project.file.write_text(project.file.read_text().replace("[14], it took", "[14]..."))
    project.tests.write_text(TESTS.replace("the shape", "a shape").replace("test_command", "test_other"))
    kept = re.sub(
        r"test_size\[3\](.*?)the shape", r"test_size[3]\1a shape", WRITTEN, count=1, flags=re.DOTALL
    )
    project.run("--accept-wording", "tests/test_it.py::test_size[3]")
    assert project.file.read_text() == wording.HEAD + kept.replace("[14], it took", "[14]...")
    project.tests.write_text(TESTS.replace("test_command", "test_other"))
    project.run("--accept-wording")
    assert project.file.read_text() == wording.HEAD + WRITTEN.replace("test_command", "test_other").replace(
        "[14], it took", "[14]..."
    )


@pytest.mark.parametrize(
    ("entry", "text", "same"),
    [
        ("a b", "a\n  b", True),
        ("a b", "a b c", False),
        ("a...c", "a b c", True),
        ("a ... c", "a c", True),
        ("...c", "c d", False),
        ("a...b...c", "a c b c", True),
        ("a...b...c", "a c", False),
        ("ab...b", "ab", False),
    ],
)
def test_entries_match_whole_texts(entry: str, text: str, same: bool) -> None:
    assert wording.matches(entry, text) is same


@pytest.mark.parametrize("text", ["16 a", "-6 a", "0.6 a", "6.5 a", "x6 a", "6_a"])
def test_a_fact_is_a_whole_word(text: str) -> None:
    assert wording.missing(text, [6]) == ["6"]
    assert (
        wording.missing("of 6, a", [6, "a"]) == [] == wording.missing("it's 'x.y' [3, 4]", ["x.y", "[3, 4]"])
    )


def test_the_file_is_sorted_and_written_as_the_option_writes_it() -> None:
    text = (ROOT / wording.FILE).read_text(encoding="utf-8")
    assert wording.render(wording.parse(text)) == text


def test_no_entry_is_of_a_test_that_is_gone() -> None:
    """Of the files that this run collects."""
    assert wording.stale() == []


@pytest.mark.parametrize(
    ("entry", "text", "expected"),
    [
        ("a: no image of the formats ...); replace it", "b: no image of the formats PNG); replace it, or go",
         "b: no image of the formats ...); replace it, or go"),
        ("old: cannot be read as JSON: ...", "cannot be read as JSON: line 1", "cannot be read as JSON: ..."),
        ("made by 99, this is ...; upgrade", "it is made by 99, this is 0.2; upgrade\nor\nnot",
         "it is made by 99, this is ...; upgrade\nor\nnot"),
        ("x took ... and y took ... MB", "now x took 3 and y took 4 MB", "now x took ... and y took ... MB"),
        ("one ... two", "three four", "three four"),
        ("... two", "one two", "one two"),
        ("one", "two", "two"),
    ],
)  # fmt: skip
def test_wildcards_stay_where_their_neighbours_do(entry: str, text: str, expected: str) -> None:
    assert wording.carried(entry, text) == expected
