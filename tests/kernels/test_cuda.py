"""The CUDA kernels where there is no GPU: csrc/cuda.cu and its headers built for the CPU (see tiny_cuda.py).

That they compute what every backend computes is shown in test_kernels.py, where they are one more backend.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import tiny_cuda
from support.wording import refused
from torch._subclasses.fake_tensor import FakeTensorMode

from rft_fast.evaluate import feed
from rft_fast.kernels import native, registry
from rft_fast.kernels.contract import Write
from rft_fast.kernels.resident import Resident
from rft_fast.kernels.rows import Row

# The kernels are built first.
pytestmark = [pytest.mark.emulated, pytest.mark.slow]


@pytest.fixture(scope="module")
def plain():
    return tiny_cuda.load(tiny_cuda.built())


@pytest.fixture(scope="module")
def watched():
    """The module's file, with AddressSanitizer and UndefinedBehaviorSanitizer in it."""
    if sys.platform != "linux" or tiny_cuda.compiler() != ["g++"]:
        pytest.skip("the sanitizers are taken from g++ on Linux")
    return tiny_cuda.built(*tiny_cuda.SANITIZERS)


def entries(size: int) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    tensors = [torch.zeros(size) for _ in range(3)]
    return tensors, [native.as_entry(Row(*tensors, 0, "w"))]


@pytest.mark.parametrize("kernels", ["gpus", "cpus"])
def test_no_kernel_leaves_its_tensors_or_the_language(watched, kernels):
    """All kernels, instruction sets, types, sizes and alignments: no stray access, no undefined behaviour."""
    done = tiny_cuda.watch(watched, kernels)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "are right" in done.stdout
    assert kernels == "gpus" or done.stdout.split("right: ")[1].split() == native.isas()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gpu-too-far", ("heap-buffer-overflow", "cuda_memory.cuh")),
        ("cpu-too-far", ("heap-buffer-overflow", "cpu_piece.cpp")),
        ("gpu-misaligned", ("misaligned address", "cuda_memory.cuh")),
    ],
)
def test_what_the_sanitizers_are_there_for_is_noticed(watched, what, words):
    done = tiny_cuda.watch(watched, what)
    assert done.returncode != 0 and all(word in done.stderr for word in words), done.stderr[-3000:]


def test_cudas_own_words_reach_the_caller(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows)
    memory, element = native.as_bytes(table), plain.Element(*native.as_numbers(Write(1)))
    with refused(RuntimeError):
        table.write(memory.data_ptr(), [(0, 1)], [element], 0, 0, 2**64 - 1)
    assert plain.why_not_cuda(0) == ""


def test_a_device_that_is_not_current_is_refused_not_chosen(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows)
    memory, element = native.as_bytes(table), plain.Element(*native.as_numbers(Write(1)))
    with refused(ValueError, "cuda:1", "cuda:0"):
        table.write(memory.data_ptr(), [(0, 1)], [element], 0, 1, 0)
    assert "must be cuda:1" in plain.why_not_cuda(1)
    # cuda_on_cpu has no cudaSetDevice, so csrc/cuda.cu would not compile with a call of it.


@pytest.mark.parametrize("index", [0, 1])
def test_a_write_runs_within_torchs_guard_of_its_device(monkeypatch, index):
    """Only torch's guard knows whether going back to the caller's device would create a context there."""
    current = [0]

    @contextlib.contextmanager
    def device(other):
        current.append(other)
        yield
        current.pop()

    writes = []

    class CudaTable:
        def __init__(self, rows):
            pass

        def write(self, memory, runs, elements, numbers, device, stream):
            writes.append((current[-1], device, stream))

    module = SimpleNamespace(
        CUDA=True,
        CudaTable=CudaTable,
        Element=lambda *numbers: numbers,
        why_not_cuda=lambda i: f"{current[-1]}, {i}",
    )
    there = SimpleNamespace(parts=[torch.zeros(1)], stream=lambda: 7)
    monkeypatch.setattr(native, "_native", module)
    monkeypatch.setattr(native, "as_entry", lambda row: ())
    monkeypatch.setattr(native, "as_bytes", lambda table: None)
    monkeypatch.setattr(native, "Resident", lambda device, parts, wait: there)
    monkeypatch.setattr(native, "refuse_capture", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        w = torch.empty(5, device=f"cuda:{index}")  # of a GPU that need not be there
    native.Table([Row(w, w, w, 0, "w")]).write([(0, 1)], Write(0.5))
    assert writes == [(index, index, 7)] and current == [0]
    assert f"CUDA says of cuda:{index}: {index}, {index}" in str(native.why_not(torch.device("cuda", index)))


def test_streams_are_left_within_torchs_guard_of_their_device(monkeypatch):
    """Going back from a stream, torch chooses the device that was current before, which creates a context."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device(other):
        current.append(other.index)
        yield
        current.pop()

    @contextlib.contextmanager
    def stream(side):
        before = current[-1]
        yield
        seen.append((before, side))

    side = SimpleNamespace(record_event=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    pinned = SimpleNamespace(to=lambda device, non_blocking: None)
    feed._Stream(torch.device("cuda", 1)).start({0: SimpleNamespace(pin_memory=lambda: pinned)}, 0)
    assert seen == [(1, side)] and current == [0]


CONTEXTS = """
import ctypes, sys, torch, rft_fast as rft
sys.path.insert(0, sys.argv[2])
from support.tiny_models import dataset, transformer
from rft_fast.evaluate import Evaluator
device, what = "cuda:1", sys.argv[1]
cuda, flags = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint()

def contexts():
    found = []
    for index in (0, 1):
        active = ctypes.c_int()
        assert cuda.cuDevicePrimaryCtxGetState(index, ctypes.byref(flags), ctypes.byref(active)) == 0
        found.append(active.value)
    return found

def write():
    plan = rft.kernels.Plan([w], [w], [w], what)
    for _ in range(2):
        plan.write(0.5, rho=0.1)
    rft.write_(w, w, w, 0.5, impl=what)

def evaluate():
    model, data = transformer(2).to(device), dataset(count=300)
    for limit in (None, 2 * data.images.nbytes):  # images on the device, then streamed
        evaluator = Evaluator(model, [data], batch_size=16, memory_limit=limit)
        for _ in range(4):
            evaluator.scores()
        evaluator.gradient(list(model.parameters()))
        evaluator.runtime.images.relieve()

w = torch.ones(5000, device=device)
before = contexts()
evaluate() if what == "evaluator" else write()
torch.cuda.synchronize(device)
print(before, contexts(), torch.cuda.current_device())
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("what", ["native", "triton", "evaluator"])
def test_no_context_is_created_on_another_gpu(what):
    command = [sys.executable, "-c", CONTEXTS, what, str(tiny_cuda.HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "[0, 1] [0, 1] 0", done.stderr[-2000:]


def test_a_gpu_that_is_not_there_is_no_error(plain, monkeypatch):
    """Torch's guard refuses it, in words that change from one version and build to another."""
    monkeypatch.setattr(native, "_native", plain)
    missing = torch.device("cuda", torch.cuda.device_count())
    reason = native.why_not(missing)
    assert reason is not None and reason.startswith(f"CUDA says of {missing}: ") and "\n" not in reason
    with refused(RuntimeError, missing, missing):
        registry.pick("native", missing)


def test_what_would_corrupt_memory_is_refused(plain):
    _kept, rows = entries(8)
    table = plain.CudaTable(rows)
    memory, element = native.as_bytes(table), plain.Element(*native.as_numbers(Write(1)))
    for run in ((0, 2), (-1, 1), (1, 0)):
        with refused(ValueError):
            table.write(memory.data_ptr(), [run], [element], 0, 0, 0)
    with refused(ValueError, "16"):
        table.write(memory.data_ptr() + 8, [(0, 1)], [element], 0, 0, 0)
    with refused(ValueError):
        plain.CudaTable([(0, 0, 0, 0, 0, 0, 4, 0)])
    table.write(memory.data_ptr(), [(0, 0), (1, 1)], [element], 0, 0, 0)  # nothing to do
    nothing = plain.CudaTable([])
    assert nothing.bytes == 0
    nothing.write(native.as_bytes(nothing).data_ptr(), [(0, 0)], [element], 0, 0, 0)


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
