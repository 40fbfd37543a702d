"""The CUDA kernels without a GPU: csrc/cuda.cu, built by the C++ compiler against tests/cuda_on_cpu.

Where ``offered``, they are one more backend, which takes tensors of the CPU.

    python tests/tiny_cuda.py MODULE [--too-far]    runs benchmarks/gpu_program.py on a module built before
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
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

import pytest
import torch

from rft_fast.kernels import native, registry
from rft_fast.kernels.contract import Row, Write

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
NAME = "cuda-on-cpu"
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
    """The compiled module with CUDA in it; flags: those of csrc/cuda.cu. Raises RuntimeError."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    others = _others()
    _compile(made := folder / "cuda.o", "-x", "c++", str(CSRC / "cuda.cu"), *flags)
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(*LINK, *flags, str(made), *map(str, others), "-o", str(target))
    return target


@functools.cache
def _others() -> list[Path]:
    """The rest of the module, for the baseline instruction set alone."""
    sources = ("bindings.cpp", "cpu.cpp", "cpu_piece.cpp")
    objects = [Path(_FOLDER.name, f"{source}.o") for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_compile, objects, (str(CSRC / source) for source in sources)))
    return objects


def _compile(made: Path, *arguments: str) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="the CUDA kernels are tested through pybind11")
    _run(
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
        "-Wno-psabi", "-c", *arguments, "-o", str(made),
        # A namespace of its own: the installed module's classes are not this one's.
        "-DRFT_CUDA", "-Drft=rft_cuda_on_cpu", f"-I{HERE / 'cuda_on_cpu'}",
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
    """As ``native.Table`` on a GPU."""

    def __init__(self, module: ModuleType, rows: Sequence[Row]) -> None:
        self._element, self._keep = module.Element, list(rows)
        self._table = module.CudaTable([native.as_entry(row) for row in rows])
        self._memory = native.as_bytes(self._table)

    def write(self, runs: Sequence[tuple[int, int]], write: Write) -> None:
        element = self._element(*native.as_numbers(write))
        self._table.write(self._memory.data_ptr(), runs, element, 0, 0)


@contextlib.contextmanager
def offered(file: Callable[[], Path] = built) -> Iterator[None]:
    """Within, impl=NAME writes by the module in ``file``, which is asked for when it is first needed."""
    module = functools.cache(lambda: load(file()))
    backend = registry.Backend(
        NAME,
        "csrc/cuda.cu, for tests",
        lambda device: None if device.type == "cpu" else "it runs on the CPU only",
        lambda rows, wait=True: Table(module(), rows),
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


def watch(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """This file's program in a process of its own, on a module that was built with AddressSanitizer."""
    library = subprocess.run(
        [*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Python itself is not built for it: the library must come first, and Python's leaks are no news.
    ours = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, __file__, str(file), *arguments],
        env=os.environ | ours,
        capture_output=True,
        text=True,
    )


def write_too_far(module: ModuleType) -> None:
    """As a kernel would that takes a tensor for one element larger than it is."""
    w0, w1, out = (torch.zeros(4096) for _ in range(3))
    *others, size, first_block = native.as_entry(Row(out, w0, w1, 0, "w"))
    table = module.CudaTable([(*others, size + 1, first_block)])
    memory = native.as_bytes(table)
    table.write(memory.data_ptr(), [(0, 1)], module.Element(*native.as_numbers(Write(0.5))), 0, 0)


def main() -> None:
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import gpu_program

    file = Path(sys.argv[1])
    if "--too-far" in sys.argv:
        write_too_far(load(file))
    with offered(lambda: file):
        gpu_program.check(NAME, torch.device("cpu"))


if __name__ == "__main__":
    main()
