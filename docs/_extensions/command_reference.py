"""The directive ``{command} NAME``: every option of a command, from the command's own parser."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rft_fast.common import program

HELP = {"-h", "--help", "--help-all", "--version"}  # of every command: said once, on the page of the commands
TITLES = {"positional arguments": "arguments"}
PAGE = re.compile(r"\(?\bdocs/([\w-]+)\.md\)?")


class _Parsed(Exception):
    """Carries the parser of a command out of it."""


@cache
def parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, as it stands when it reads the command line.

    Args:
        name: a key of ``program.COMMANDS``, or ``""`` for ``python -m rft_fast``.
    """

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Parsed(self)

    module = ".".join(filter(None, ["rft_fast", name]))
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        module += ".__main__"
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            importlib.import_module(module).main([])
        except _Parsed as found:
            return found.args[0]
    raise RuntimeError(f"{module} reads its arguments in another way")


def markdown(name: str) -> Iterator[str]:
    """Write the arguments of a command as Markdown, group by group.

    Args:
        name: as for :func:`parser`.
    """
    top = parser(name)
    yield from ["## Usage", "", "```text", top.format_usage().removeprefix("usage: ").strip(), "```", ""]
    for group in top._action_groups:
        actions = [one for one in group._group_actions if not HELP & {*one.option_strings}]
        if not actions:
            continue
        yield from [
            f"## {_sentence(PAGE.sub('', TITLES.get(str(group.title), str(group.title))).strip())}",
            "",
        ]
        if group.description:
            yield from [_linked(_sentence(group.description)), ""]
        for action in actions:
            yield from _action(top, action)


def _sentence(text: str) -> str:
    """Begin with a capital letter, where the first word is no name such as open_clip."""
    return text if re.match(r"\S*[_A-Z\d]", text) else text[:1].upper() + text[1:]


def _action(top: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    formatter = top._get_formatter()
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    if action.option_strings:
        signature = ", ".join(f"{name} {value}".strip() for name in action.option_strings)
    else:
        signature = str(action.metavar or action.dest)
    yield from [f":::{{option}} {signature}", ""]
    text = formatter._expand_help(action) if action.help else ""
    yield from [_linked(_sentence(text)), ":::", ""]


def _linked(text: str) -> str:
    """Escape Markdown, and make links of the pages that a text names."""
    escaped = re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)
    return PAGE.sub(lambda page: f"([{page[1]}](../{page[1]}.md))", escaped.replace("\\_", "_"))


class Command(SphinxDirective):
    """The directive."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown of a command, or without a name the table of all, in place of the directive."""
        if self.arguments:
            written = markdown(self.arguments[0])
            self.env.ref_context["std:program"] = program.called(self.arguments[0])
        else:
            rows = (
                f"| [`{program.called(name)}`](reference/{name}.md) | {what} |"
                for name, what in program.COMMANDS.items()
            )
            written = iter(["| command | what it does |", "| --- | --- |", *rows])
        source = self.env.doc2path(self.env.docname)
        lines = StringList([line for text in written for line in text.split("\n")], source)
        container = nodes.section()
        container.document = self.state.document
        self.state.nested_parse(lines, 0, container, match_titles=True)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    if missing := {"", *program.COMMANDS} - {
        "",
        *(page.stem for page in Path(app.srcdir).glob("reference/*.md")),
    }:
        raise RuntimeError(f"docs/reference has no page for the commands {sorted(missing)}")
    app.add_directive("command", Command)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
