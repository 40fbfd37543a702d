"""The tiers of tests: what runs by default, and what its guard fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiers

ROOT = Path(__file__).parents[2]
CONFTEST = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from support import tiers
os.getloadavg = lambda: (0.0, 0.0, 0.0)

def pytest_configure(config):
    config.pluginmanager.register(tiers.Guard(limit=0.05, shared=0.1), "tiers")
"""
TESTS = """
import subprocess, sys, time
import pytest

SPIN = "import time\\nwhile time.process_time() < 0.6: pass"

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def short():
    spin(0.02)

@pytest.fixture(scope="module")
def long(short):
    spin(1)

@pytest.fixture
def own():
    spin(0.6)

def test_fast(): time.sleep(0.2)
def test_slow(): spin(0.6)
def test_slower_than_it_should_be(): spin(0.12)
@pytest.mark.slow
def test_marked(): spin(0.6)
def test_child(): subprocess.run([sys.executable, "-c", SPIN], check=True)
def test_in_its_fixture(own): pass
def test_shares(short): pass
def test_shares_too_much(long): pass
def test_shares_after_another(long): pass
def test_imports():
    for number in range(tiers.IMPORTS):
        sys.modules[f"made_by_test_{number}"] = sys
    spin(0.6)
def test_fails_itself():
    spin(0.6)
    assert 1 == 2
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """What became of each of TESTS, and what pytest printed."""
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text("from support import tiers\n" + TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    # With CI set, pytest's summary repeats whole messages.
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("test_it.py::")]
    return {words[0].partition("::")[2]: words[1] for words in lines}, done.stdout


@pytest.mark.slow
def test_the_guard_fails_what_takes_long_and_is_not_marked(outcomes: tuple[dict[str, str], str]) -> None:
    found, printed = outcomes
    assert {name for name, outcome in found.items() if outcome == "FAILED"} == {
        *("test_slow", "test_child", "test_in_its_fixture", "test_shares_too_much", "test_fails_itself")
    }, printed
    assert len(found) == 11 and set(found.values()) == {"FAILED", "PASSED"}
    assert re.findall(r"SLOW test_it.py::(\w+): ", printed) == ["test_slower_than_it_should_be"]
    assert printed.count("mark it slow or make it faster") == 5 and printed.count("assert 1 == 2") >= 1


def test_a_slow_machine_has_a_longer_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As slow as it was at the start, or is when a test is over the limit; a fast one has the same limit."""
    slowness = 1.0
    load = 0.0
    monkeypatch.setattr(tiers, "loop", lambda: slowness * tiers.REFERENCE)
    monkeypatch.setattr(tiers.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(tiers.os, "cpu_count", lambda: 2)
    guard = tiers.Guard(limit=2.0)
    guard._cost.own = 5.9
    assert "limit 2.0 s" in guard._excess(1)
    slowness = 3.0
    assert guard._excess(1) == ""
    guard._cost.own, slowness = 6.1, 0.1
    assert "limit 6.0 s" in guard._excess(1)
    fast = tiers.Guard(limit=2.0)
    fast._cost.own = 2.1
    assert "limit 2.0 s" in fast._excess(1)
    load = 10.0
    fast._cost.own = 9.9
    assert fast._excess(1) == ""


@pytest.mark.slow
def test_the_default_tier_leaves_slow_tests_out_unless_one_is_named(tmp_path: Path) -> None:
    """By pyproject.toml's options and the project's own conftest.py."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text().replace('"tests"', '"."'))
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.slow\ndef test_a(): pass\ndef test_b(): pass\n"
    )

    def collected(*words: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *words]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
        return [line.partition("::")[2] for line in printed.splitlines() if "::" in line]

    assert collected() == ["test_b"] and collected("-m", "") == ["test_a", "test_b"]
    assert collected("-m", "slow") == ["test_a"] == collected("test_it.py::test_a")
