"""The version of a build, and that of the citation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rft_fast

ROOT = Path(__file__).resolve().parents[2]
NAMED = "0.7.0.dev0"


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "tag.gpgSign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def version(folder: Path) -> str:
    """What setup.py computes there. Without pyproject.toml it needs nothing else of the project."""
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_build_has_the_version_of_its_tag(tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    (origin / "rft_fast").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", origin)
    named = origin / "rft_fast" / "__init__.py"
    named.write_text(f'__version__ = "{NAMED}"\n')
    assert version(origin) == NAMED  # an archive without git
    git(origin, "init", "-q")
    git(origin, "add", ".")
    git(origin, "commit", "-q", "-m", "one")
    git(origin, "tag", "-a", "v0.7.0rc1", "-m", "a release")
    git(origin, "tag", "other")
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    assert version(clone) == "0.7.0rc1"
    with (clone / "setup.py").open("a") as stream:
        stream.write("# changed\n")
    assert version(clone) == NAMED
    git(clone, "commit", "-q", "-a", "-m", "after the release")
    assert version(clone) == NAMED
    git(clone, "tag", "vnext")
    assert version(clone) == NAMED


def test_the_citation_names_the_last_release_or_else_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    cited, dated = (re.findall(rf"^{key}: (.+)$", text, re.M) for key in ("version", "date-released"))
    released = re.search(
        r"^## \[(\d.*?)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )
    if released:
        assert (cited, dated) == ([released[1]], [released[2]])
    else:
        assert (cited, dated) == ([rft_fast.__version__], [])
