"""Builds rft_fast._native from csrc/ with ninja; needs neither torch nor a GPU.

Without a C++17 compiler the package installs as pure Python; `python -m rft_fast.env` then tells why, and
how to change it. RFT_NATIVE=1 turns a failed build into a failed install, RFT_NATIVE=0 skips it.

Where nvcc is found, the CUDA kernels are built, too. RFT_CUDA=1 insists on them, RFT_CUDA=0 leaves them out.
RFT_CUDA_ARCH names the architectures, e.g. "80 90"; by default those from Ampere on that nvcc knows, and PTX
of the newest for what comes later.

The source distribution (`python -m build --sdist`) is the same file, bit for bit, whenever and by whomever it
is made from the same sources.

What is built from a commit with a tag v1.2.3 has the version 1.2.3. Everything else has the version that
rft_fast/__init__.py names: a clone, with or without tags, an archive without git.
"""

import gzip
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# What the module is built for, which is not always what builds it: "macosx-11.0-arm64" -> arm64.
MACHINE = sysconfig.get_platform().rpartition("-")[2].lower()
X86 = (platform.machine().lower() if MACHINE == "universal2" else MACHINE) in ("x86_64", "amd64")

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
if sys.platform == "darwin":  # the architecture, as Python's own builds name it there
    CXXFLAGS += shlex.split(os.environ.get("ARCHFLAGS", ""))
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


SOURCES = (
    "bindings.cpp",
    "cpu.cpp",
    "cpu.h",
    "cpu_formats.h",
    "cpu_grid.h",
    "cpu_lanes.h",
    "cpu_norm.h",
    "cpu_piece.cpp",
    "cpu_placed.h",
    "cpu_tiles.h",
    "element.h",
)
CUDA_SOURCES = (
    "cuda.cu",
    "cuda.h",
    "cuda_kernel.cuh",
    "cuda_lanes.cuh",
    "cuda_layout.cuh",
    "cuda_memory.cuh",
)

# The GPU generations that differ in machine code and in use: Ampere, Ada, Hopper, Blackwell.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# No fused multiply-adds but those that are written out, as on the CPU. --threads: architectures side by side.
# -v: registers and spills, for CI.
NVCCFLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--threads=0",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
]


class NotBuilt(Exception):
    """Why there will be no native module, and what would change that, in words for the user."""


def check_sources(names: tuple[str, ...]) -> None:
    """Raises NotBuilt where the sources are incomplete, as in a source distribution made without them."""
    if missing := [name for name in names if not (CSRC / name).is_file()]:
        raise NotBuilt(
            f"the sources that it was installed from lack csrc/{', csrc/'.join(missing)}; install from a "
            "clone or a complete source distribution"
        )


def compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if shutil.which(name.split()[0]):
            return name
    raise NotBuilt(
        f"no C++ compiler was found at install time (looked for {', '.join(wanted)}); put g++ or clang++ "
        "(C++17) on the PATH, or name one in CXX"
    )


def cuda_compiler() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if not nvcc:
        raise NotBuilt("nvcc was not found at install time (neither on the PATH nor in CUDA_HOME)")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    wanted = re.split(r"[\s,;]+", os.environ.get("RFT_CUDA_ARCH", "").replace(".", "").strip())
    if wanted == [""]:
        wanted = [arch for arch in CUDA_ARCHS if arch in known]
    if unknown := [arch for arch in wanted if arch not in known]:
        raise NotBuilt(f"RFT_CUDA_ARCH: {nvcc} does not know {', '.join(unknown)}, only {', '.join(known)}")
    newest = max(wanted, key=int)
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


def quoted(path: Path) -> str:
    """A path as ninja reads it."""
    return "".join("$" + c if c in "$ :" else c for c in str(path))


def ninja_file(cxx: str, nvcc: str, build: Path, target: Path) -> str:
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    link = ["-shared", "-pthread"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup", *shlex.split(os.environ.get("ARCHFLAGS", ""))]
    objects = {f"piece_{name}": ("cpu_piece.cpp", flags) for name, flags in PIECES.items()}
    objects["cpu"] = ("cpu.cpp", [])
    objects["bindings"] = ("bindings.cpp", [f"-isystem {shlex.quote(path)}" for path in includes])
    linker = f"{cxx} $in {' '.join(link)}"
    if nvcc:
        objects["bindings"][1].append("-DRFT_CUDA")
        # nvcc links CUDA's runtime statically: the module needs no CUDA and imports without a driver.
        linker = f"{nvcc} -ccbin {cxx} -shared -cudart=static $in"
    lines = [
        "rule cxx",
        f"  command = {cxx} {' '.join(CXXFLAGS)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} -o $out",
    ]
    names = [*objects, "cuda"] if nvcc else list(objects)
    if nvcc:
        flags = [*NVCCFLAGS, *cuda_archs(nvcc)]
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -ccbin {cxx} {' '.join(flags)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"build {quoted(build / 'cuda')}.o: nvcc {quoted(CSRC / 'cuda.cu')}",
        ]
    for name, (source, flags) in objects.items():
        lines += [
            f"build {quoted(build / name)}.o: cxx {quoted(CSRC / source)}",
            f"  flags = {' '.join(flags)}",
        ]
    lines += [f"build {quoted(target)}: link {' '.join(quoted(build / name) + '.o' for name in names)}", ""]
    return "\n".join(lines)


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1; got {value!r}")
    return value


class NativeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = target.parent
        package.mkdir(parents=True, exist_ok=True)
        notes = {part: package / f"_{part}_missing.txt" for part in ("native", "cuda")}
        # What an earlier build left here would otherwise be packed again.
        for stale in (target, *notes.values()):
            stale.unlink(missing_ok=True)
        try:
            self.build_native(target, notes)
        finally:
            self.put_beside(target, notes)

    def build_native(self, target: Path, notes: dict) -> None:
        """The module at ``target``, or a note of why there is none; exits where one is insisted on."""
        native, cuda = switch("RFT_NATIVE"), switch("RFT_CUDA")
        try:
            if native == "0":
                raise NotBuilt("RFT_NATIVE=0 was set at install time; unset it")
            check_sources(SOURCES)
            cxx = compiler()
            try:
                if cuda == "0":
                    raise NotBuilt("RFT_CUDA=0 was set at install time")
                check_sources(CUDA_SOURCES)
                self.compile(cxx, cuda_compiler(), target)
            except NotBuilt as error:
                if cuda == "1":
                    raise SystemExit(f"rft_fast: RFT_CUDA=1, but {error}") from None
                self.compile(cxx, "", target)
                notes["cuda"].write_text(str(error))
        except NotBuilt as error:
            if native == "1":
                raise SystemExit(f"rft_fast: RFT_NATIVE=1, but {error}") from None
            notes["native"].write_text(str(error))
            print(f"rft_fast: installing without the native kernels: {error}", file=sys.stderr)

    def put_beside(self, target: Path, notes: dict) -> None:
        """A checkout that was installed from is also what Python imports when it runs there, or is installed
        as editable: without a copy it would fall back to the slow backend, and could not say why."""
        beside = ROOT / "rft_fast" / target.name
        if beside == target:
            return
        for note in notes.values():
            (beside.parent / note.name).unlink(missing_ok=True)
            if note.exists():
                shutil.copy2(note, beside.parent)
        if target.exists():
            # Replaced, not overwritten: a running Python may have the old one mapped.
            shutil.copy2(target, fresh := beside.with_suffix(".new"))
            os.replace(fresh, beside)

    def compile(self, cxx: str, nvcc: str, target: Path) -> None:
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        try:
            import ninja

            tool: str | None = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            tool = shutil.which("ninja")
        if not tool or not importlib.util.find_spec("pybind11"):
            raise NotBuilt("ninja or pybind11 was missing at install time; install both, or let pip do it")
        (build / "build.ninja").write_text(ninja_file(cxx, nvcc, build, target))
        done = subprocess.run(
            [tool, "-C", str(build)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout)
        (build / "build.log").write_text(done.stdout)
        if done.returncode:
            last = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout[-300:])
            raise NotBuilt(
                f"{nvcc or cxx} could not compile csrc at install time: {last.strip()}; "
                "RFT_NATIVE=1 shows all of its output"
            )

    def get_outputs(self) -> list:
        return [path for path in super().get_outputs() if Path(path).exists()]


VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
INIT = Path("rft_fast", "__init__.py")


def version() -> str:
    """That of the tag on this commit if nothing was changed; else the one in rft_fast/__init__.py."""
    named = VERSION.search((ROOT / INIT).read_text("utf-8"))
    if named is None:
        raise SystemExit(f'{INIT}: expected a line __version__ = "..."; there is none')
    git = ["git", "-C", str(ROOT), "describe", "--tags", "--exact-match", "--dirty", "--match", "v[0-9]*"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return named[1]
    tag = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return tag[1:] if tag and not tag.endswith("-dirty") else named[1]


def stamp(copy: Path, version: str) -> None:
    """Name the version in a copy of rft_fast/__init__.py, which may be a hard link to the original."""
    text = VERSION.sub(f'__version__ = "{version}"', copy.read_text("utf-8"))
    copy.unlink()
    copy.write_text(text, "utf-8")


class StampedBuild(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which copies nothing
            stamp(Path(self.build_lib) / INIT, self.distribution.get_version())


# The time of everything in the source distribution, unless SOURCE_DATE_EPOCH gives another: 1 January 2020.
EPOCH = 1577836800
# Bytes: larger results of benchmarks stay in the repository.
LARGE_RESULT = 100_000


class ReproducibleSdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        results = os.path.join("benchmarks", "results", "")
        small = [f for f in files if not f.startswith(results) or os.path.getsize(f) <= LARGE_RESULT]
        super().make_release_tree(base_dir, small)
        stamp(Path(base_dir) / INIT, self.distribution.get_version())

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None) -> str:
        """The archive without what depends on the checkout: times, owners, permissions, order."""
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        epoch = int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))

        def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = epoch
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        top = Path(base_dir)
        name = f"{base_name}.tar.gz"
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", 9, file, mtime=epoch) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT, dereference=True) as archive,
        ):
            for path in [top, *sorted(top.rglob("*"))]:
                archive.add(path, recursive=False, filter=anonymous)
        return name


setup(
    version=version(),
    ext_modules=[Extension("rft_fast._native", sources=[], optional=True)],
    cmdclass={"build_ext": NativeBuild, "build_py": StampedBuild, "sdist": ReproducibleSdist},
)
