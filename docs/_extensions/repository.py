"""Pages that are files elsewhere in the repository, and links to such files.

A page whose only line is ``<!-- page: ../FILE.md -->`` shows that file. Links keep the form that works in
the repository: a link to a Markdown file that has a page here leads to the page; any other file is a
download.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

SHOWN = re.compile(r"\A<!-- page: (\S+) -->\s*\Z")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^()\s#]+)(#[^()\s]*)?\)")
CODE = re.compile(r"^(```+).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def pages(docs: Path) -> dict[Path, Path]:
    """Return the files that pages show -> the page of each."""
    found = {}
    for page in docs.glob("*.md"):
        if shown := SHOWN.match(page.read_text("utf-8")):
            found[(page.parent / shown[1]).resolve()] = page
    return found


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace the text of a page by that of the file that it shows, and its links by those of the site."""
    docs = Path(app.srcdir).resolve()
    page = docs / f"{name}.md"
    file = page
    if shown := SHOWN.match(source[0]):
        file = (page.parent / shown[1]).resolve()
        app.env.note_dependency(str(file))
        source[0] = file.read_text("utf-8")
    known = pages(docs)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (file.parent / target).resolve()
        if path.is_dir():
            return text
        path = known.get(path, path)
        where = os.path.relpath(path, page.parent)
        if path.suffix == ".md" and docs not in path.parents:
            return f"{{download}}`{text.replace('`', '')} <{where}>`"
        return f"[{text}]({where}{anchor or ''})"

    parts, end = [], 0
    for code in CODE.finditer(source[0]):
        # A link's text may hold code: only links that begin and end outside of blocks are changed.
        if code[1]:
            parts += [LINK.sub(link, source[0][end : code.start()]), code[0]]
            end = code.end()
    source[0] = "".join([*parts, LINK.sub(link, source[0][end:])])


def docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Take ``|w|`` of docstrings as it stands: reStructuredText has another use for it."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[number] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect both to the build."""
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
