"""The wording of messages: whole, in one file, tests/wording.txt (CONTRIBUTING.md, Tests).

`refused`, `warned`, `command_refused` and `said` compare a text with the entry of the running test. A test's
first text has the test's name, its second one the name and a 2. What varies between runs and machines is
replaced first: paths, addresses, durations. ``...`` in an entry stands for any text. Space and line breaks do
not count.

``pytest --accept-wording [TESTS]`` writes the entries of the tests that ran and passed.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
import shlex
import socket
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = "tests/wording.txt"
HEAD = "What the package says, by test. Written by `pytest --accept-wording`; `...` stands for any text.\n"
WIDTH = 110

# Of one test file: the text of each name.
Entries = dict[str, str]


# --- what tests call -------------------------------------------------------------------------------


class refused:
    """Expects an error, compares its message with the snapshot, and looks for the facts in it.

    Args:
        error: its class, or several.
        facts: what the message must name, each as a whole word: names, files and numbers that the test knows.
    """

    # No generator: the error's traceback would hold its frame, and so the error itself.
    def __init__(self, error: type[BaseException] | tuple[type[BaseException], ...], *facts: object) -> None:
        self._raises, self._facts = pytest.raises(error), facts

    def __enter__(self) -> pytest.ExceptionInfo[Any]:
        return self._raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        __tracebackhide__ = True
        if not self._raises.__exit__(*error):
            return False
        _check(str(error[1]), self._facts)
        return True


@contextlib.contextmanager
def warned(category: type[Warning], *facts: object) -> Iterator[pytest.WarningsRecorder]:
    """The same of warnings: each distinct message of the category, on a line of its own."""
    __tracebackhide__ = True
    with pytest.warns(category) as caught:
        yield caught
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, category)]
    _check("\n".join(dict.fromkeys(messages)), facts)


def command_refused(
    main: Callable[[list[str]], Any], arguments: Sequence[object], *facts: object, silent: bool = True
) -> str:
    """Expects that a command ends with status 2 and a message on stderr, which is compared; returns it.

    Args:
        main: the command's function.
        arguments: its words.
        facts: what the message must name, as for `refused`.
        silent: it prints nothing on stdout.
    """
    __tracebackhide__ = True
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main([str(word) for word in arguments])
        except SystemExit as ended:
            status = ended.code
    assert status == 2 and not (silent and out.getvalue()), out.getvalue() + err.getvalue()
    _check(err.getvalue(), facts)
    return err.getvalue()


def said(text: str, *facts: object) -> None:
    """Compares printed text with the snapshot. Decimal numbers are # there: assert them in the test."""
    __tracebackhide__ = True
    _check(text, facts, numbers=False)


# --- texts -----------------------------------------------------------------------------------------


def normal(text: str, base: str = "", numbers: bool = True) -> str:
    """The text without what varies between runs and machines.

    Args:
        text: a message, or what a command printed.
        base: the folder of pytest's temporary folders.
        numbers: keep decimal numbers.
    """
    # argparse's usage is not ours.
    text = re.sub(r"^usage: .*?\n(?=\S[^\n]*: error: )", "", text, flags=re.DOTALL | re.MULTILINE)
    for path in {base, os.path.realpath(base)} if base else ():
        text = re.sub(re.escape(path) + r"/[^/\s'\",;:)]+", "TMP", text)
    for folder in {tempfile.gettempdir(), os.path.realpath(tempfile.gettempdir())}:
        text = re.sub(re.escape(folder) + r"/tmp\w{8}\b", "TMP", text)
    for path, name in ((str(ROOT), "REPOSITORY"), (os.path.expanduser("~"), "~")):
        if path not in ("/", "~"):
            text = re.sub(re.escape(path) + r"(?![\w.-])", name, text)
    text = re.sub(r"\b0x[0-9a-fA-F]{4,}\b", "0x#", text)
    text = re.sub(
        r"(?<![0-9a-zA-Z])(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{12,}(?![0-9a-zA-Z])", "#", text
    )  # hashes
    text = re.sub(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S*?(?=[;,.]?(?:\s|$))", "#", text)
    text = re.sub(r"\b(process|pid|PID) \d+", r"\1 #", text)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", text)
    text = re.sub(r"\b\d+(?:\.\d+)?(?= ?(?:s|ms|µs|seconds|min|minutes)\b)", "#", text)
    if not numbers:
        text = re.sub(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+|\b\d{4}-\d\d-\d\d|\d+:\d\d(?::\d\d)?", "#", text)
    return "\n".join(line.rstrip() for line in text.expandtabs().splitlines() if line.strip())


def matches(entry: str, text: str) -> bool:
    """Whether they are the same words, where ``...`` of the entry is any text."""
    entry, text = " ".join(entry.split()), " ".join(text.split())
    first, *parts = (part.strip() for part in entry.split("..."))
    if not parts:
        return entry == text
    last, place = parts.pop(), len(first)
    if not text.startswith(first) or not text.endswith(last):
        return False
    for part in parts:
        if (found := text.find(part, place)) < 0:
            return False
        place = found + len(part)
    return place <= len(text) - len(last)


def carried(entry: str, text: str) -> str:
    """The text with each ``...`` of an entry whose neighbouring words it has."""
    found = text
    for left, right in itertools.pairwise(entry.split("...")):
        near = left.split()[-3:], right.split()[:2]
        before, after = (r"\s+".join(map(re.escape, words)) for words in near)
        pattern = f"({before})(.+?)({after})" if after else f"({before})(.+)"
        if before and (place := re.search(pattern, found, re.DOTALL)):
            some = f"{' ' * left[-1:].isspace()}...{' ' * right[:1].isspace()}"
            found = found[: place.end(1)] + some + found[place.end(2) :]
    return found if matches(found, text) else text


def missing(text: str, facts: Sequence[object]) -> list[str]:
    """The facts that do not stand in the text as whole words; 6 is not in 16, -6 or 0.6."""

    def found(fact: str) -> bool:
        before = r"(?<![\w.-])" if fact[:1].isdigit() else r"(?<!\w)" if fact[:1].isalpha() else ""
        after = r"(?!\w|\.\d)" if fact[-1:].isdigit() else r"(?!\w)" if fact[-1:].isalpha() else ""
        return re.search(before + re.escape(fact) + after, text) is not None

    return [str(fact) for fact in facts if not found(str(fact))]


# --- the file --------------------------------------------------------------------------------------


def parse(text: str) -> dict[str, Entries]:
    """By test file. A text is indented; above it are the names of the tests whose text it is."""
    files: dict[str, Entries] = {}
    names: list[str] = []
    for line in text.removeprefix(HEAD).splitlines():
        if line.startswith("=== "):
            entries, names = files.setdefault(line[4:], {}), []
        elif line.startswith("    "):
            for name in names:
                entries[name] = f"{entries[name]}\n{line[4:]}" if name in entries else line[4:]
        elif line:
            test, first, last = _parts(line)
            names = [name for name in names if name not in entries]  # their text is still to come
            names += [_name(test, ordinal) for ordinal in range(first, last + 1)]
    return files


def render(files: dict[str, Entries]) -> str:
    """What parse reads, sorted. Texts of one test that are the same stand together."""
    lines = [HEAD]
    for file, entries in sorted(files.items()):
        groups: dict[tuple[str, str], list[str]] = {}
        for name in sorted(entries, key=_order):
            groups.setdefault((_function(name), entries[name]), []).append(name)
        if groups:
            lines += [f"=== {file}", ""]
        for (_, text), names in groups.items():
            lines += [*_ranges(names), *(line for words in text.splitlines() for line in _wrapped(words)), ""]
    return "\n".join(lines)


def _ranges(names: Sequence[str]) -> list[str]:
    """Texts of one test that follow each other are one line: test_it 2-4."""
    tests: dict[str, list[int]] = {}
    for name in names:
        test, ordinal, _ = _parts(name)
        tests.setdefault(test, []).append(ordinal)
    lines = []
    for test, ordinals in tests.items():
        for first in sorted(ordinals):
            if first - 1 not in ordinals:
                last = next(
                    number for number in range(first, max(ordinals) + 1) if number + 1 not in ordinals
                )
                lines.append(_name(test, first) if first == last else f"{test} {first}-{last}")
    return lines


def _wrapped(line: str) -> list[str]:
    if len(line) + 4 <= WIDTH:
        return ["    " + line]
    indent = "    " + " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line.strip(),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _function(name: str) -> str:
    return re.split(r"[\[ ]", name, maxsplit=1)[0]


def _order(name: str) -> tuple[str, int, list[tuple[int, int | str]]]:
    """By function, then by the place of the text in its test, then by parameters: 10 after 9."""
    test, ordinal, _ = _parts(name)
    parts = re.split(r"(\d+)", test)
    return (
        _function(name),
        ordinal,
        [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part],
    )


# --- pytest ----------------------------------------------------------------------------------------


class Wording:
    """A plugin of pytest: which test runs, what it said, and what is accepted.

    With pytest-xdist, its processes send what they saw to the one that writes.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.accept = bool(config.getoption("accept_wording", default=False))
        self.file = config.rootpath / FILE
        self.collected: dict[str, list[str]] = {}  # by file, of files collected whole: the tests' names
        self._entries: dict[str, Entries] | None = None
        self._test = ("", "")
        self._texts: list[str] = []
        self._passed: dict[str, dict[str, list[str]]] = {}  # by file and test

    @property
    def entries(self) -> dict[str, Entries]:
        if self._entries is None:
            self._entries = parse(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        return self._entries

    def check(self, text: str, facts: Sequence[object], numbers: bool) -> None:
        __tracebackhide__ = True
        if lost := missing(text, facts):
            pytest.fail(f"expected {lost} in the text, got:\n{text}")
        base = str(self.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
        text = normal(text, base, numbers)
        assert text, "there is no text"
        self._texts.append(text)
        file, test = self._test
        name = _name(test, len(self._texts))
        entries = self.entries.get(file, {})
        if self.accept or matches(entries.get(name, ""), text) or self._of_another(entries, name, text):
            return
        raise AssertionError(self._difference(f"{file}::{test}", name, entries.get(name), text))

    @staticmethod
    def _of_another(entries: Entries, name: str, text: str) -> bool:
        """A parameter of another machine, such as a backend: without entry, but said under another one."""
        return name not in entries and any(
            _function(other) == _function(name) and matches(said, text) for other, said in entries.items()
        )

    @staticmethod
    def _difference(test: str, name: str, entry: str | None, text: str) -> str:
        what = f"{FILE} has no entry {name}" if entry is None else f"not the entry {name} of {FILE}"
        pair = [
            [line for words in one.splitlines() for line in _wrapped(words)] for one in (entry or "", text)
        ]
        return "\n".join(
            [
                f"{what}:",
                *(line.rstrip() for line in difflib.ndiff(*pair)),
                f"If it is right: pytest --accept-wording {shlex.quote(test)}",
            ]
        )

    @pytest.hookimpl(tryfirst=True)  # before -m and -k select
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        named = {word.partition("::")[0] for word in self.config.args if "::" in word}
        for item in items:
            file, _, test = item.nodeid.partition("::")
            if not any(file.endswith(Path(name).name) for name in named):
                self.collected.setdefault(file, []).append(test)
        if self.config.getoption("lf", default=False):
            self.collected = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        file, _, test = item.nodeid.partition("::")
        self._test, self._texts = (file, test), []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and report.nodeid == "::".join(self._test):
            file, test = self._test
            self._passed.setdefault(file, {})[test] = self._texts

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process of pytest-xdist has ended."""
        passed, self.collected = getattr(node, "workeroutput", {}).get("wording", ({}, self.collected))
        for file, tests in passed.items():
            self._passed.setdefault(file, {}).update(tests)

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workerinput"):
            self.config.workeroutput["wording"] = (self._passed, self.collected)
        elif self.accept:
            text = render(accepted(self.entries, self._passed, self.collected))
            self.file.write_text(text, encoding="utf-8")

    def stale(self) -> list[str]:
        """Entries of files that are gone, and of tests that are gone from files collected whole."""
        return [
            f"{file}::{name}"
            for file, entries in self.entries.items()
            for name in entries
            if not (self.config.rootpath / file).exists()
            or (file in self.collected and _test(name) not in self.collected[file])
        ]


def accepted(
    entries: dict[str, Entries], passed: dict[str, dict[str, list[str]]], collected: dict[str, list[str]]
) -> dict[str, Entries]:
    """The entries after a run: new where tests passed, unless they match; without tests that are gone.

    Args:
        entries: those of before.
        passed: by file and test, its texts.
        collected: by file, of files collected whole, all tests.
    """
    result: dict[str, Entries] = {}
    for file in sorted({*entries, *passed}):
        if file not in passed and not (ROOT / file).exists():
            continue
        ran, known = passed.get(file, {}), collected.get(file)
        old = entries.get(file, {})
        kept = {name: text for name, text in old.items() if _test(name) not in ran}
        if known is not None:
            kept = {name: text for name, text in kept.items() if _test(name) in known}
        for test, texts in ran.items():
            for ordinal, text in enumerate(texts, 1):
                name = _name(test, ordinal)
                known_text = old.get(name, "")
                kept[name] = known_text if matches(known_text, text) else carried(known_text, text)
        result[file] = kept
    return result


def _name(test: str, ordinal: int) -> str:
    return test if ordinal == 1 else f"{test} {ordinal}"


def _parts(name: str) -> tuple[str, int, int]:
    """An entry's test, and the first and last of its texts."""
    found = re.fullmatch(r"(.*[\w\]]) (\d+)(?:-(\d+))?", name)
    if found is None:
        return name, 1, 1
    return found[1], int(found[2]), int(found[3] or found[2])


def _test(name: str) -> str:
    return _parts(name)[0]


_plugin: Wording | None = None


def install(config: pytest.Config) -> None:
    """Registers the plugin. tests/conftest.py calls it."""
    global _plugin
    _plugin = Wording(config)
    config.pluginmanager.register(_plugin, "wording")


def stale() -> list[str]:
    """Entries of tests that are gone."""
    assert _plugin is not None
    return _plugin.stale()


def _check(text: str, facts: Sequence[object], numbers: bool = True) -> None:
    __tracebackhide__ = True
    assert _plugin is not None, "only in a test"
    _plugin.check(text, facts, numbers)
