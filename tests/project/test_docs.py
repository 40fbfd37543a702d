"""The documentation against what is there: links, anchors, commands, options, and the README's promises."""

from __future__ import annotations

import argparse
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from rft_fast.common import program

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
)
FOR_USERS = [page for page in PAGES if page.parent.name != "benchmarks"]
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^(```+)[^\n]*\n(.*?)^\1|(?<!`)`([^`]+)`", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"python -m rft_fast(?:\.(\w+))?([^\n`|;&#)]*)")
# Options of other programs that the pages name.
OTHERS = {"--benchmark-json", "--benchmark-autosave", "--seed"}


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


@cache
def text(page: Path) -> str:
    return page.read_text("utf-8")


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found: list[str] = []
    for heading in re.findall(
        r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    ):
        plain = re.sub(r"\]\([^)]*\)", "]", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return {*found, *re.findall(r'<a id="([^"]+)">', text(page))}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in LINK.findall(CODE.sub("", text(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            # Large results are no part of a source distribution.
            if not ((ROOT / "PKG-INFO").exists() and target.parent.name == "results"):
                wrong.append(link)
        elif anchor and anchor not in anchors(target):
            wrong.append(link)
    assert not wrong


def test_every_page_is_listed() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(text(index))}
    assert {page for page in (ROOT / "docs").glob("*.md") if page != index} <= listed


class Options(Exception):
    """The parser of a command, which it was about to use."""


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Command -> its options."""

    def give(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Options(set(parser._option_string_actions))

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", give)
        for name in ("", *program.COMMANDS):
            folder = (ROOT / "rft_fast" / name / "__main__.py").exists() or not name
            module = ".".join(filter(None, ["rft_fast", name, "__main__" * folder]))
            with pytest.raises(Options) as caught:
                importlib.import_module(module).main([])
            found[name] = caught.value.args[0]
    return found


def commands(page: Path) -> list[tuple[str, str]]:
    """Names and arguments of the commands on a page, in blocks and in running text."""
    code = "\n".join(block or span for _, block, span in CODE.findall(text(page)))
    return COMMAND.findall(re.sub(r"\\\n\s*", " ", code))


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_and_their_options_exist(page: Path, options: dict[str, set[str]]) -> None:
    wrong = [
        (name, option)
        for name, arguments in commands(page)
        for option in ["", *re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", arguments)]
        if name not in options or (option and option not in options[name])
    ]
    assert not wrong


@pytest.mark.parametrize("page", FOR_USERS, ids=names(FOR_USERS))
def test_options_in_the_text_are_some_command_s(page: Path, options: dict[str, set[str]]) -> None:
    known = set.union(*options.values()) | OTHERS
    spans = [span for _, _, span in CODE.findall(text(page)) if span.startswith("--")]
    wrong = {word for span in spans for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)} - known
    assert not wrong


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A b: `c`\n## A b: `c`\n[x](page.md#a-b-c-1) `python -m rft_fast.sweep a \\\n --no`\n"
        "```\n# no [y](z)\n```\n"
    )
    assert anchors(page) == {"a-b-c", "a-b-c-1"}
    assert LINK.findall(CODE.sub("", text(page))) == ["page.md#a-b-c-1"]
    assert commands(page) == [("sweep", " a  --no")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(ROOT / "README.md"), re.DOTALL | re.MULTILINE)


def test_the_readme_is_short_and_its_commands_are_one_line_each() -> None:
    assert len(text(ROOT / "README.md").splitlines()) <= 120
    assert blocks("bash")[:2] == [
        "pip install . && python -m rft_fast.sweep\n",
        'pip install ".[test]" && pytest\n',
    ]


def test_the_readme_s_loop_is_the_first_recipe() -> None:
    (code,) = (block for block in blocks("python") if "mezo_step" in block)
    imports, function = code.split("\n\n\n")
    recipe = text(ROOT / "docs" / "recipes" / "mezo.py")
    assert imports + "\n" in recipe and function in recipe
