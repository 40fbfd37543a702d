"""The CUDA kernels where there is no GPU: csrc/cuda.cu built for the CPU (see tiny_cuda.py).

That they compute what every backend computes is shown in test_kernels.py, where they are one more backend.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import tiny_cuda
import torch

from rft_fast.kernels import native
from rft_fast.kernels.contract import Row, Write
from rft_fast.kernels.resident import Resident


@pytest.fixture(scope="module")
def plain():
    return tiny_cuda.load(tiny_cuda.built())


@pytest.fixture(scope="module")
def watched():
    """The module's file, with AddressSanitizer in it."""
    if sys.platform != "linux" or tiny_cuda.compiler() != ["g++"]:
        pytest.skip("AddressSanitizer is taken from g++ on Linux")
    return tiny_cuda.built("-fsanitize=address", "-g")


def entries(size: int) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    tensors = [torch.zeros(size) for _ in range(3)]
    return tensors, [native.as_entry(Row(*tensors, 0, "w"))]


def test_no_kernel_leaves_its_tensors(watched):
    """All kernels, types, sizes and alignments of the program that compute-sanitizer runs on a GPU."""
    done = tiny_cuda.watch(watched)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "are right" in done.stdout


def test_one_element_too_far_is_noticed(watched):
    done = tiny_cuda.watch(watched, "--too-far")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "cuda.cu" in done.stderr


def test_cudas_own_words_reach_the_caller(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows)
    memory, element = native.as_bytes(table), plain.Element(*native.as_numbers(Write(1)))
    with pytest.raises(RuntimeError, match="CUDA failed while choosing the device: invalid device ordinal"):
        table.write(memory.data_ptr(), [(0, 1)], element, 2, 0)
    assert plain.why_not_cuda(2) == "write: CUDA failed while choosing the device: invalid device ordinal"
    assert plain.why_not_cuda(1) == ""


def test_what_would_corrupt_memory_is_refused(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows)
    memory, element = native.as_bytes(table), plain.Element(*native.as_numbers(Write(1)))
    for run in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="a run lies outside the table"):
            table.write(memory.data_ptr(), [run], element, 0, 0)
    with pytest.raises(ValueError, match="not aligned to 16 bytes"):
        table.write(memory.data_ptr() + 8, [(0, 1)], element, 0, 0)
    with pytest.raises(ValueError, match="null pointer"):
        plain.CudaTable([(0, 0, 0, 0, 0, 0, 4, 0)])
    table.write(memory.data_ptr(), [(0, 0), (1, 1)], element, 0, 0)  # nothing to do
    nothing = plain.CudaTable([])
    assert nothing.bytes == 0
    nothing.write(native.as_bytes(nothing).data_ptr(), [(0, 0)], element, 0, 0)


def test_data_on_a_device_is_held_for_every_stream_that_reads_it(monkeypatch):
    """With stand-ins for torch's: a stream is told of once, and the host does not wait."""
    events = []

    class Part:
        def pin_memory(self):
            events.append("pinned")
            return self

        def to(self, device, non_blocking):
            events.append(("sent", non_blocking))
            return self

        def record_stream(self, stream):
            events.append(("held for", stream.cuda_stream))

    current = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    there = Resident(torch.device("cuda", 0), [Part()], wait=False)
    assert there.stream() == 0 and there.stream() == 0
    current.cuda_stream = 7
    assert there.stream() == 7
    assert events == ["pinned", ("sent", True), ("held for", 0), ("held for", 7)]
    events.clear()
    Resident(torch.device("cuda", 0), [Part()])
    assert events == [("sent", False)]
