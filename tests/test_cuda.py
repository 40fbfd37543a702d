"""The CUDA kernels where there is no GPU: csrc/cuda.cu built for the CPU (see tiny_cuda.py).

That they compute what every backend computes is shown in test_kernels.py, where they are one more backend.
"""

from __future__ import annotations

import shutil

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
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))

    def call(*answers: str):
        left = list(answers)

        def once() -> str:
            if "error" in (answer := left.pop(0)):
                raise RuntimeError(answer)
            return answer

        return once

    memory = "error: write: CUDA failed while allocating the table: out of memory"
    assert native.with_memory(call(memory, "done")) == "done"
    assert native.with_memory(call("done")) == "done" and given_back == [True]
    with pytest.raises(RuntimeError, match="out of memory"):
        native.with_memory(call(memory, memory))
    with pytest.raises(RuntimeError, match="invalid argument"):
        native.with_memory(call("error: invalid argument"))
    assert given_back == [True] * 2


def test_rows_that_are_written_once(plain):
    """Without a table of their own: the same bits, and nothing for no rows and for empty ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = (5000, 0, 3, 2048)
    tensors = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(3)]
    firsts = (0, 1250, 1250, 1251)
    rows = [Row(*parts, first, "w") for *parts, first in zip(*tensors, firsts, strict=True)]
    element = plain.Element(*native.as_numbers(Write(0.3, 0.1, keep=0.5, seed=4)))
    plain.write_once([], element, 0, 0)
    plain.write_once([native.as_entry(rows[1])], element, 0, 0)
    plain.write_once([native.as_entry(row) for row in rows], element, 0, 0)
    once = [row.out.clone() for row in rows]
    for row in rows:
        row.out.fill_(float("nan"))
    plain.CudaTable([native.as_entry(row) for row in rows], 0).write([(0, 4)], element, 0)
    assert all(torch.equal(a, row.out) for a, row in zip(once, rows, strict=True))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        plain.write_once([native.as_entry(row) for row in rows], element, 2, 0)
    with pytest.raises(ValueError, match="null pointer"):
        plain.write_once([(0, 0, 0, 0, 0, 0, 4, 0)], element, 0, 0)


def test_runs_outside_of_the_table_are_refused(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows, 0)
    element = plain.Element(*native.as_numbers(Write(1)))
    for run in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="a run lies outside the table"):
            table.write([run], element, 0)
    table.write([(0, 0), (1, 1)], element, 0)  # nothing to do
