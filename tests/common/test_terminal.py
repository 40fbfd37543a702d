"""What commands print on a terminal: colours, and the line that says what to run next."""

from __future__ import annotations

import importlib
import io
import shlex
from pathlib import Path

import pytest
from support import tiny_zoo

from rft_fast.common import program
from rft_fast.common.terminal import Escaping, colours, escaped, styled


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "shown"),
    [
        (Screen(), {}, True),
        (io.StringIO(), {}, False),
        (Screen(), {"NO_COLOR": "1"}, False),
        (Screen(), {"NO_COLOR": ""}, True),
        (Screen(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        (None, {"FORCE_COLOR": "1"}, False),
    ],
)
def test_where_colours_are_shown(
    stream: io.StringIO | None, variables: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert colours(stream) is shown
    if stream is not None:
        text = styled("gain", "good", Escaping(stream))  # type: ignore[arg-type]
        assert (text == "gain") is not shown


@pytest.mark.parametrize("terminal", [True, False])
def test_no_name_asks_for_a_colour(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Screen() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)

    @escaped
    def main() -> None:
        print(styled("next:", "heading"), "\x1b[31mname", "\x1b0123456789abcdef[31mname")

    main()
    assert out.getvalue().count("\x1b") == (2 if terminal else 0)
    assert out.getvalue().startswith("\x1b[1mnext:\x1b[0m " if terminal else "next: ")
    assert "\\u001b[31mname \\u001b0123456789abcdef[31mname" in out.getvalue()


def test_the_next_line_is_quoted_for_the_shell() -> None:
    line = program.next_step("results", "a run's; folder", 0.5)
    assert shlex.split(line) == ["next:", "python", "-m", "rft_fast.results", "a run's; folder", "0.5"]
    assert shlex.split(program.next_step("report", Path("./-run"), -1))[4:] == ["./-run", "-1"]


def test_the_next_command_runs_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checkpoints; then their merge; then the check of its result."""
    zoo = tiny_zoo.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["rft_fast.checkpoints", str(zoo / "zeroshot.safetensors"), str(zoo / "a.safetensors")]
    ran = []
    for _ in range(3):
        ran.append(words[0])
        main = importlib.import_module(f"{words[0]}.__main__").main
        assert main(words[1:]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
        assert len(lines) == 1
        words = shlex.split(lines[0])[3:]
    assert ran == ["rft_fast.checkpoints", "rft_fast.merge", "rft_fast.checkpoints"]
    assert Path("merged.safetensors").is_file()
