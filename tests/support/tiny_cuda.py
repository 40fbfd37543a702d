"""The kernels for tests: csrc/cuda.cu without a GPU, built against cuda_on_cpu/; csrc/ with sanitizers.

Where ``offered``, the CUDA kernels are one more backend, which takes tensors of the CPU.

    python tests/support/tiny_cuda.py MODULE WHAT    runs a function of ``PROGRAMS`` on a module built before
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, ModuleType

import numpy as np
import pytest
import torch

from rft_fast.kernels import native, registry
from rft_fast.kernels.contract import Request, Requests, Write
from rft_fast.kernels.rows import Row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
NAME = "cuda-on-cpu"
LONG_ROW = 6144  # elements, instead of 4 M: of several tiles for a thread block
# As setup.py has it.
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-pthread"]
_FOLDER = tempfile.TemporaryDirectory()


def compiler() -> list[str]:
    """The C++ compiler's command, found as setup.py finds it; without one the test is skipped."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for command in map(shlex.split, wanted):
        if shutil.which(command[0]):
            return command
    pytest.skip(f"the CUDA kernels are tested by a C++ compiler; found none of {wanted}")


@functools.cache
def built(*flags: str) -> Path:
    """The compiled module with CUDA in it. Raises RuntimeError.

    flags: for all of csrc/ but the bindings. With any, for every instruction set, else the baseline.
    """
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    units = {"cuda": ("-x", "c++", str(CSRC / "cuda.cu")), "cpu": (str(CSRC / "cpu.cpp"),)}
    for name, own in (pieces() if flags else {"baseline": []}).items():
        units[f"piece_{name}"] = (str(CSRC / "cpu_piece.cpp"), *own)
    if "piece_avx2" in units:
        flags = (*flags, "-DRFT_X86")
    made = [folder / f"{name}.o" for name in units]
    with ThreadPoolExecutor() as pool:
        bindings = pool.submit(_bindings)
        list(pool.map(lambda to, unit: _compile(to, *unit, *flags), made, units.values()))
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(*LINK, *flags, *map(str, [*made, bindings.result()]), "-o", str(target))
    return target


@functools.cache
def _bindings() -> Path:
    _compile(made := Path(_FOLDER.name, "bindings.o"), str(CSRC / "bindings.cpp"))
    return made


@functools.cache
def pieces() -> dict[str, list[str]]:
    """The instruction sets that setup.py builds for, and their flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        found: dict[str, list[str]] = runpy.run_path(str(ROOT / "setup.py"))["PIECES"]
    return found


def _compile(made: Path, *arguments: str) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="the CUDA kernels are tested through pybind11")
    _run(
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
        "-Wno-psabi", "-c", *arguments, "-o", str(made),
        # A namespace of its own: the installed module's classes are not this one's.
        "-DRFT_CUDA", "-Drft=rft_cuda_on_cpu", f"-DRFT_LONG_ROW={LONG_ROW}", f"-I{HERE / 'cuda_on_cpu'}",
        f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
    )  # fmt: skip


def _run(*arguments: str) -> None:
    done = subprocess.run([*compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_native", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Table:
    """As ``native.Table``: by the kernels of a GPU, or by those of an instruction set of the CPU."""

    def __init__(self, module: ModuleType, rows: Sequence[Row], isa: str = "") -> None:
        self._element, self._keep, self._isa = module.Element, list(rows), isa
        entries = [native.as_entry(row) for row in rows]
        self._table = module.Table(entries) if isa else module.CudaTable(entries)
        self._memory = None if isa else native.as_bytes(self._table)

    def write(self, runs: Sequence[tuple[int, int]], request: Requests) -> None:
        given = [request] if isinstance(request, Request) else request
        elements = [self._element(*native.as_numbers(each)) for each in given]
        if self._memory is None:
            self._table.write(runs, elements, torch.get_num_threads(), self._isa)
            return
        numbers = native.as_bytes(self._table, elements) if len(elements) > 1 else torch.empty(0)
        self._table.write(self._memory.data_ptr(), runs, elements, numbers.data_ptr(), 0, 0)


@contextlib.contextmanager
def offered(file: Callable[[], Path] = built, isa: str = "") -> Iterator[None]:
    """Within, impl=NAME writes by the module in ``file``, which is asked for when it is first needed.

    isa: by its kernels for this instruction set of the CPU instead of those for GPUs.
    """
    module = functools.cache(lambda: load(file()))
    backend = registry.Backend(
        NAME,
        "csrc, for tests",
        lambda device: None if device.type == "cpu" else "it runs on the CPU only",
        lambda rows, wait=True: Table(module(), rows, isa),
        on_request=("cpu", "cuda"),
    )
    before = registry.BACKENDS, registry.IMPLS
    registry.BACKENDS = MappingProxyType({**registry.BACKENDS, NAME: backend})
    registry.IMPLS = (*registry.IMPLS, NAME)
    try:
        yield
    finally:
        registry.BACKENDS, registry.IMPLS = before


# ---------------------------------------------------------------- watched

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def watch(file: Path, what: str) -> subprocess.CompletedProcess[str]:
    """One of ``PROGRAMS`` in a process of its own, on a module that was built with ``SANITIZERS``."""
    library = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Python itself is not built for it: the library must come first, and Python's leaks are no news.
    ours = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, __file__, str(file), what],
        env=os.environ | ours,
        capture_output=True,
        text=True,
    )


def _check(file: Path, isa: str = "") -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_program

    with offered(lambda: file, isa):
        if gpu_program.check(NAME, torch.device("cpu")):
            sys.exit("wrong results: see the output above")


def check_gpus(file: Path) -> None:
    """What compute-sanitizer runs on a GPU: all kernels, types, sizes, alignments; and empty tables."""
    _check(file)
    module = load(file)
    for rows in ([], [Row(*(torch.zeros(0),) * 3, 0, "empty")]):
        Table(module, rows).write([(0, len(rows))], Write(0.5))


def check_cpus(file: Path) -> None:
    """The same by every instruction set of this machine, and what only the CPU has."""
    module = load(file)
    words = np.random.default_rng(0).integers(0, 2**32, 4 * 1003, dtype=np.uint32)
    words[:64] = (0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1) * 8
    threads = torch.get_num_threads()
    for isa in module.isas():
        _check(file, isa)
        assert tuple(module.philox((0,) * 4, (0,) * 2, isa)) == (
            0x6627E8D5,
            0xE169C58D,
            0xBC57AC4C,
            0x9B00DBD8,
        )
        for kind in native._NOISE.values():
            assert np.array_equal(module.noise(kind, words, isa), module.noise(kind, words, "baseline"))
        # At addresses of bytes; where the high word of the block number changes.
        w0, w1, out = (torch.zeros(3 << 16, dtype=torch.uint8) for _ in range(3))
        for size, at, block in ((1000, 1, 0), (4099, 3, 2**32 - 300), (48000, 2, 2**62)):
            pointers = [tensor.data_ptr() + at for tensor in (out, w0, w1)]
            for dtypes in ((0, 0, 0), (1, 0, 2), (2, 1, 0), (0, 2, 1)):
                element = module.Element(*native.as_numbers(Write(0.7, rho=0.1, keep=0.5, seed=2**64 - 1)))
                module.Table([(*pointers, *dtypes, size, block)]).write([(0, 1)], [element], 1, isa)
        # In threads; and more than the caches hold, stored past them.
        large = Row(*(torch.zeros(1 << 18) for _ in range(3)), 0, "large")
        torch.set_num_threads(3)
        Table(module, [large], isa).write([(0, 1)], Write(0.5, rho=0.1))
        torch.set_num_threads(threads)
        Table(module, [large], isa).write([(0, 1)] * 128, Write(0.5))
    print("right:", *module.isas())


def _too_far(file: Path, *, cpu: bool = False, elements: int = 1, offset: int = 0) -> None:
    module = load(file)
    w0, w1, out = (torch.zeros(4096) for _ in range(3))
    *pointers, size, first_block = native.as_entry(Row(out, w0, w1, 0, "w"))
    entry = (*(p + offset for p in pointers[:3]), *pointers[3:], size + elements, first_block)
    element = module.Element(*native.as_numbers(Write(0.5)))
    if cpu:
        module.Table([entry]).write([(0, 1)], [element], 1)
    else:
        memory = native.as_bytes(table := module.CudaTable([entry]))
        table.write(memory.data_ptr(), [(0, 1)], [element], 0, 0, 0)


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "gpus": check_gpus,
    "cpus": check_cpus,
    # As kernels would that take a tensor for larger than it is, or at an address that its type forbids.
    "gpu-too-far": _too_far,
    "cpu-too-far": functools.partial(_too_far, cpu=True),
    "gpu-misaligned": functools.partial(_too_far, elements=-1, offset=1),
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[2]](Path(sys.argv[1]))
