"""Builds rft_fast._native from csrc/ with ninja; needs neither torch nor a GPU.

Without a C++17 compiler the package installs as pure Python; `python -m rft_fast.env` then tells why, and
how to change it. RFT_NATIVE=1 turns a failed build into a failed install, RFT_NATIVE=0 skips it.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# No fused multiply-adds: the same bits on every instruction set. No -ffast-math for the same reason.
CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
# One translation unit, compiled once for each instruction set.
PIECES = {"baseline": []}
if X86:
    CXXFLAGS += ["-DRFT_X86"]
    PIECES["avx2"] = ["-DRFT_AVX2", "-mavx2", "-mf16c"]
    # GCC 12 takes its own AVX-512 header for uninitialised reads.
    PIECES["avx512"] = [
        "-DRFT_AVX512",
        "-mavx512f",
        "-mavx512dq",
        "-mf16c",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]


class NotBuilt(Exception):
    """Why there will be no native module, in words for the user."""


def compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if shutil.which(name.split()[0]):
            return name
    raise NotBuilt(f"no C++ compiler was found at install time (looked for {', '.join(wanted)})")


def quoted(path: Path) -> str:
    """A path as ninja reads it."""
    return "".join("$" + c if c in "$ :" else c for c in str(path))


def ninja_file(cxx: str, build: Path, target: Path) -> str:
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    link = ["-shared", "-pthread"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup"]
    objects = {f"piece_{name}": ("cpu_piece.cpp", flags) for name, flags in PIECES.items()}
    objects["cpu"] = ("cpu.cpp", [])
    objects["bindings"] = ("bindings.cpp", [f"-isystem {shlex.quote(path)}" for path in includes])
    lines = [
        "rule cxx",
        f"  command = {cxx} {' '.join(CXXFLAGS)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in {' '.join(link)} -o $out",
    ]
    for name, (source, flags) in objects.items():
        lines += [
            f"build {quoted(build / name)}.o: cxx {quoted(CSRC / source)}",
            f"  flags = {' '.join(flags)}",
        ]
    lines += [f"build {quoted(target)}: link {' '.join(quoted(build / name) + '.o' for name in objects)}", ""]
    return "\n".join(lines)


class NativeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = target.parent
        package.mkdir(parents=True, exist_ok=True)
        reason = package / "_native_missing.txt"
        # What an earlier build left here would otherwise be packed again.
        reason.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        switch = os.environ.get("RFT_NATIVE", "auto")
        if switch not in ("auto", "0", "1"):
            raise SystemExit(f"RFT_NATIVE must be auto, 0 or 1; got {switch!r}")
        try:
            if switch == "0":
                raise NotBuilt("RFT_NATIVE=0 was set at install time")
            self.compile(target)
        except NotBuilt as error:
            if switch == "1":
                raise SystemExit(f"rft_fast: RFT_NATIVE=1, but {error}") from None
            reason.write_text(str(error))
            print(f"rft_fast: installing without the native kernels: {error}", file=sys.stderr)
            return
        # A checkout that was installed from is also what Python imports when it runs there: without this copy
        # it would fall back to the slow backend.
        beside = ROOT / "rft_fast" / target.name
        if beside != target:
            # Replaced, not overwritten: a running Python may have the old one mapped.
            shutil.copy2(target, fresh := beside.with_suffix(".new"))
            os.replace(fresh, beside)

    def compile(self, target: Path) -> None:
        cxx = compiler()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(cxx, build, target))
        try:
            import ninja

            tool = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            tool = "ninja"
        done = subprocess.run(
            [tool, "-C", str(build)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout)
        if done.returncode:
            last = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout[-300:])
            raise NotBuilt(f"{cxx} could not compile csrc at install time: {last.strip()}")

    def get_outputs(self) -> list:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[Extension("rft_fast._native", sources=[], optional=True)],
    cmdclass={"build_ext": NativeBuild},
)
