"""The commands as processes: pipes that break, terminals that close, signals, missing folders, odd names."""

from __future__ import annotations

import importlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import PATIENCE
from support.wording import refused

import rft_fast
from rft_fast.common import program
from rft_fast.config import zoo

PACKAGE = Path(rft_fast.__file__).parent
# A command in a moment: program.py needs nothing of what the package imports.
START = f"""
import os, signal, sys, time, types
from pathlib import Path
sys.modules["rft_fast"] = types.ModuleType("rft_fast")
sys.modules["rft_fast"].__path__ = [{str(PACKAGE)!r}]
from rft_fast.common import program
@program.command("sweep")
def main(argv):
"""
END = "\nsys.exit(main())"


def start(body: str, *words: str, **more: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *words, "-c", START + body + END], **more)  # type: ignore[call-overload]


def wait_for(file: Path) -> None:
    for _ in range(2000):
        if file.exists():
            return
        time.sleep(0.01)
    pytest.fail(f"{file} was never written")


def test_every_command_is_listed_and_runs_through_one_door(capsys: pytest.CaptureFixture[str]) -> None:
    starts = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    found = {
        file.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__main__")
        for file in PACKAGE.rglob("*.py")
        if starts.search(file.read_text("utf-8"))
    }
    assert found == {*program.COMMANDS, "__main__"}
    for name in found:
        within = f"{name}.__main__" if (PACKAGE / name).is_dir() else name
        main = importlib.import_module(f"rft_fast.{within}").main
        for words, status in ((["--version"], 0), (["--help"], 0), (["a\0b"], 2), (["--no-such-option"], 2)):
            with pytest.raises(SystemExit) as caught:
                main(words)
            assert caught.value.code == status
            printed = capsys.readouterr()
            if words == ["--version"]:
                assert printed.out == f"rft_fast {rft_fast.__version__}\n"
            if words == ["a\0b"]:
                assert "NUL" in printed.err and printed.err.count("\n") == 1 and "\0" not in printed.err


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("rft_fast.__main__").main
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, what in program.COMMANDS.items():
        assert any(line.split(maxsplit=3)[2:] == [f"rft_fast.{name}", what] for line in lines)


def parsers() -> dict[str, program.Parser]:
    """The parsers whose short help leaves options out."""
    found = ("config.options", "finetune.__main__", "merge.__main__")
    return {module: importlib.import_module(f"rft_fast.{module}").parser() for module in found}


@pytest.mark.parametrize("module", parsers())
def test_the_short_help_fits_a_screen_and_the_complete_one_has_every_option(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = parsers()[module]
    printed = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([option])
        assert caught.value.code == 0
        printed[option] = capsys.readouterr().out
        assert max(map(len, printed[option].splitlines())) <= 80
        assert printed[option].rstrip().splitlines()[-1].startswith("      "), "examples come last"
    every = {string for action in parser._actions for string in action.option_strings}
    shown = {option: {*re.findall(r"^  (?:-h, )?(--[a-z-]+)", printed[option], re.M)} for option in printed}
    assert shown["--help-all"] == every - {"-h"}
    assert len(every) > 20 and shown["--help"] < shown["--help-all"]
    common = printed["--help"].partition("common options:\n")[2].partition("\n\n")[0].splitlines()
    assert 8 <= len(common) <= 22 and all(line.startswith("  --") for line in common), "a line each"
    assert f"all {len(every) - 4} options" in printed["--help"]  # but -h, --help, --help-all, --version


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_ends_nothing(tmp_path: Path, stream: str, unbuffered: bool) -> None:
    done = tmp_path / "done"
    body = f"""
    for _ in range(3000):
        print("a line of thirty characters ...", file=sys.{stream})
    open({str(done)!r}, "w")
    return 0
"""
    read, write = os.pipe()
    process = start(body, *["-u"] * unbuffered, **{"stdout": -1, "stderr": -1, stream: write})
    os.close(write)
    os.read(read, 10)
    os.close(read)
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out or b"", errors or b"") == (0, b"", b"") and done.exists()


@pytest.mark.parametrize("unbuffered", [False, True])
def test_output_that_does_not_fit_is_an_error_after_the_work(tmp_path: Path, unbuffered: bool) -> None:
    body = f"""
    print("x" * 20000)
    open({str(tmp_path / "done")!r}, "w")
    return 0
"""
    with open("/dev/full", "w") as full:
        process = start(body, *["-u"] * unbuffered, stdout=full, stderr=subprocess.PIPE)
        errors = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 1 and "No space left" in errors and errors.count("\n") == 1
    assert (tmp_path / "done").exists()


def test_what_the_encoding_lacks_is_written_out() -> None:
    process = start(
        '    print("\u03b1 = 1")\n    return 0\n', stdout=-1, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert process.communicate(timeout=PATIENCE)[0] == b"\\u03b1 = 1\n" and process.returncode == 0


def test_signal_handlers_can_write_while_the_command_does() -> None:
    body = """
    count = 0
    def handler(*_):
        nonlocal count
        count += 1
        print("handler", flush=True)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    while count < 100:
        print("a line", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return 0
"""
    process = start(body, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and errors == b"" and out.count(b"handler") >= 100


def test_closed_streams_are_not_given_to_files(tmp_path: Path) -> None:
    """A file that is opened as number 2 would get the warnings of every library."""
    body = f"""
    print("out"), print("err", file=sys.stderr)
    with open({str(tmp_path / "file")!r}, "w") as file:
        file.write(str(file.fileno()))
    return 0
"""
    program_ = START + body + END
    (tmp_path / "main.py").write_text(program_)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {tmp_path}/main.py <&- >&- 2>&-"], timeout=PATIENCE
    )
    assert done.returncode == 0 and int((tmp_path / "file").read_text()) > 2


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_work_in_order(tmp_path: Path) -> None:
    ready, kept = tmp_path / "ready", tmp_path / "kept"
    body = f"""
    import fcntl, termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    with program.Stop(print) as stop:
        open({str(ready)!r}, "w")
        while not stop.requested:
            time.sleep(0.01)
    for stream in (sys.stdout, sys.stderr):
        print("nobody sees this", file=stream, flush=True)
    Path({str(kept)!r}).write_text("all of it")
    return 130
"""
    ours, theirs = pty.openpty()
    process = start(body, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    wait_for(ready)
    os.close(ours)
    assert process.wait(PATIENCE) == 130 and kept.read_text() == "all of it"


def test_ctrl_c_is_no_traceback(tmp_path: Path) -> None:
    body = "    signal.raise_signal(signal.SIGINT)\n    time.sleep(60)\n"
    process = start(
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n" + body, stderr=subprocess.PIPE
    )
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130 and errors == b"\nsweep: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_after_the_step_and_then_at_once(number: signal.Signals) -> None:
    before, texts = signal.signal(number, signal.default_int_handler), list[str]()
    try:
        with program.Stop(texts.append, "epoch") as stop:
            stop.check()
            signal.raise_signal(number)
            with pytest.raises(program.Interrupted):
                stop.check()
            signal.raise_signal(signal.SIGHUP)  # the shell's, after the kernel's
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        assert signal.getsignal(number) is signal.default_int_handler
        assert len(texts) == 1 and "epoch" in texts[0]
        signal.signal(number, signal.SIG_IGN)  # as under nohup
        with program.Stop(texts.append) as stop:
            signal.raise_signal(number)
            stop.check()
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("command", ["sweep", ""])
def test_a_deleted_working_directory_is_named(tmp_path: Path, command: str) -> None:
    """Before torch is imported, which would end the process."""
    gone = tmp_path / "gone"
    gone.mkdir()
    module = ".".join(filter(None, ["rft_fast", command]))
    code = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m {module} --version"
    done = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "working directory" in done.stderr and done.stderr.count("\n") == 1


def test_a_directory_that_is_deleted_later_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("rft_fast.cache").main
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(SystemExit) as caught:
            main([])
    assert caught.value.code == 2 and "working directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        'name = "a\\u0000b"',
        '[finetuned]\n"a\\u0000b" = "x.pt"',
        '[finetuned]\na = { path = "x\\u0000.pt" }',
        '[data]\nd = { path = "d\\u0000", labels = "x" }',
        '[options]\nlayer-data = ["a", "a\\u0000b"]',
    ],
)
def test_nul_bytes_in_zoos_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "zoo.toml").write_text(text)
    with refused(ValueError) as caught:
        zoo.read(tmp_path)
    assert "\0" not in str(caught.value)
