"""The documentation against what is there: links, anchors, commands, options, and the README's promises.

The strict build of the site (.ci/run) finds dead links as well; these tests need no more than pytest.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

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


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_scripts_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w/])(?:benchmarks|examples)/[\w./-]*?\.(?:py|ipynb|sh)\b", text(page))
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_page_is_in_the_menu() -> None:
    docs = ROOT / "docs"
    listed = {"index"}
    for page in docs.glob("**/*.md"):
        for menu in re.findall(r"^```{toctree}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE):
            listed |= {line for line in menu.splitlines() if line and not line.startswith(":")}
    assert {page.relative_to(docs).with_suffix("").as_posix() for page in docs.glob("**/*.md")} == listed


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The directive that writes the reference of the commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "docutils", mock.MagicMock())
        for name in (
            "docutils.statemachine",
            "sphinx",
            "sphinx.application",
            "sphinx.util",
            "sphinx.util.docutils",
        ):
            patch.setitem(sys.modules, name, mock.MagicMock())
        path = ROOT / "docs" / "_extensions" / "command_reference.py"
        spec = importlib.util.spec_from_file_location("command_reference", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options(reference: ModuleType) -> dict[str, set[str]]:
    """Command -> its options."""
    return {name: set(reference.parser(name)._option_string_actions) for name in ("", *program.COMMANDS)}


@pytest.mark.parametrize("name", program.COMMANDS)
def test_the_reference_has_every_option(
    name: str, reference: ModuleType, options: dict[str, set[str]]
) -> None:
    page = text(ROOT / "docs" / "reference" / f"{name}.md")
    assert f"```{{command}} {name}\n" in page
    written = "\n".join(reference.markdown(name))
    shown = re.findall(r"^:::\{option\} (.*)$", written, re.MULTILINE)
    found = {word for line in shown for word in re.findall(r"(?:^|, )(--?[a-zA-Z][\w-]*)", line)}
    assert found == options[name] - {"-h", "--help", "--help-all", "--version"}


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "reference").glob("api-*.md")), ids=lambda page: page.stem
)
def test_the_reference_has_every_public_function_and_class(page: Path) -> None:
    module = importlib.import_module(f"rft_fast.{page.stem.removeprefix('api-')}")
    shown = re.findall(r"^\.\. auto(?:function|class):: rft_fast\.(?:\w+\.)?(\w+)$", text(page), re.MULTILINE)
    things = {name: getattr(module, name) for name in module.__all__}
    public = [name for name, thing in things.items() if callable(thing) and "rft_fast" in thing.__module__]
    assert sorted(shown) == sorted(public)


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


def test_the_messages_of_the_questions_are_those_of_the_program() -> None:
    said = " ".join((ROOT / "tests" / "wording.txt").read_text("utf-8").split())
    shown = re.findall(r"^```text\n(.*?)^```", text(ROOT / "docs" / "faq.md"), re.DOTALL | re.MULTILINE)
    parts = [" ".join(part.split()) for message in shown for part in message.split("...")]
    assert len(shown) > 20 and not [part for part in parts if part not in said]


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


def test_continuous_integration_runs_what_the_readme_says() -> None:
    """A command that README.md no longer has would end .ci/run before its tests."""
    commands = re.findall(r"^readme '(.*)'", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(commands) == 2 and all(command in lines for command in commands)
