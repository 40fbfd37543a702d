"""The same bits on other CPUs: csrc/ compiled for Arm, and by another compiler, against this machine's.

Programs for Arm run in qemu-user. Debian's packages are g++-aarch64-linux-gnu, qemu-user and clang; the
workflow of CI installs them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = [ROOT / "csrc" / "cpu.cpp", ROOT / "csrc" / "cpu_piece.cpp", ROOT / "tests" / "support" / "bits.cpp"]
FLAGS = "-std=c++17 -O2 -fno-math-errno -Wall -Wextra -Wno-psabi -pthread -static".split()
# Of DESIGN.md: all zero, all ones, digits of pi.
KNOWN = [
    "philox 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "philox 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "philox d16cfe09 94fdcceb 5001e420 24126ea1",
]
ARM, QEMU = ["aarch64-linux-gnu-g++"], ["qemu-aarch64"]


def bits(
    folder: Path, compiler: Sequence[str], runner: Sequence[str] = (), contract: str = "off"
) -> list[str]:
    """The lines of bits.cpp; the test is skipped where a program is missing."""
    for program in (compiler[0], *runner):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    program = folder / "bits"
    command = [*compiler, *FLAGS, f"-ffp-contract={contract}", f"-I{ROOT / 'csrc'}", *map(str, UNITS)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return subprocess.run(
        [*runner, str(program)], check=True, capture_output=True, text=True
    ).stdout.splitlines()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return bits(tmp_path_factory.mktemp("here"), ["g++"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "runner"),
    [(ARM, QEMU), (["clang++"], []), (["clang++", "--target=aarch64-linux-gnu"], QEMU)],
    ids=["gcc for Arm", "clang", "clang for Arm"],
)
def test_noise_and_writes_have_the_same_bits(tmp_path, here, compiler, runner):
    there = bits(tmp_path, compiler, runner)
    assert there[:3] == here[:3] == KNOWN
    assert len(there) > 200 and there == here


@pytest.mark.slow
def test_fused_multiply_adds_would_be_noticed(tmp_path, here):
    """Arm has them in its baseline: what the comparison is for."""
    fused = bits(tmp_path, ARM, QEMU, contract="fast")
    assert fused[:3] == KNOWN and fused != here
