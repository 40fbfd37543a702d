"""The CUDA kernels where there is no GPU: csrc/cuda.cu built for the CPU (see tiny_cuda.py).

That they compute what every backend computes is shown in test_kernels.py, where they are one more backend.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import tiny_cuda
import torch

from rft_fast.kernels import native
from rft_fast.kernels.contract import Row, Write


@pytest.fixture(scope="module")
def plain():
    return tiny_cuda.load(tiny_cuda.built())


@pytest.fixture(scope="module")
def watched():
    """The module's file, with AddressSanitizer in it."""
    if not shutil.which("g++"):
        pytest.skip("AddressSanitizer is taken from g++, which is not here")
    return tiny_cuda.built("-fsanitize=address", "-g")


def entries(size: int) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    tensors = [torch.zeros(size) for _ in range(3)]
    return tensors, [native.as_entry(Row(*tensors, 0, "w"))]


def test_no_kernel_leaves_its_tensors(watched):
    """All forms, storage types, sizes and alignments of the program that compute-sanitizer runs on a GPU."""
    done = tiny_cuda.watch(watched)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "are right" in done.stdout


def test_one_element_too_far_is_noticed(watched):
    done = tiny_cuda.watch(watched, "--too-far")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "cuda.cu" in done.stderr


def test_cudas_own_words_reach_the_caller(plain):
    _kept, rows = entries(8)
    with pytest.raises(RuntimeError, match="CUDA failed while choosing the device: invalid device ordinal"):
        plain.CudaTable(rows, 2)
    assert plain.why_not_cuda(2) == "write: CUDA failed while choosing the device: invalid device ordinal"
    assert plain.why_not_cuda(1) == ""


def test_memory_that_torch_keeps_is_asked_back(monkeypatch):
    given_back, answers = [], ["allocating the table: out of memory", None]

    def table(rows, device):
        if (refused := answers.pop(0)) is not None:
            raise RuntimeError(f"write: CUDA failed while {refused}")
        return rows, device

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    module = SimpleNamespace(CudaTable=table)
    assert native.table_on_gpu(module, [(1,)], 3) == ([(1,)], 3)
    assert given_back == [True]
    answers = ["allocating the table: out of memory"] * 2
    with pytest.raises(RuntimeError, match="out of memory"):
        native.table_on_gpu(module, [], 0)
    answers = ["copying the table: invalid argument"]
    with pytest.raises(RuntimeError, match="invalid argument"):
        native.table_on_gpu(module, [], 0)
    assert given_back == [True] * 2


def test_runs_outside_of_the_table_are_refused(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows, 0)
    element = plain.Element(*native.as_numbers(Write(1)))
    for run in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="a run lies outside the table"):
            table.write([run], element, 0)
    table.write([(0, 0), (1, 1)], element, 0)  # nothing to do
