"""The Triton backend: on the GPU where there is one, else in Triton's interpreter.

What the interpreter cannot show (that the compiler accepts the kernel, makes wide accesses, fuses nothing and
compiles a variant once) is shown by compiling for a GPU that need not be there, in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.wording import refused

import rft_fast as rft
from rft_fast.kernels import Plan, reference, registry, triton_kernel
from rft_fast.kernels import triton as backend
from rft_fast.kernels.contract import DTYPES, Write
from rft_fast.kernels.rows import Row

pytestmark = pytest.mark.emulated

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = DTYPES
SIZES = (0, 1, 7, 255, 256, 257, backend.TILE - 1, backend.TILE, 4099)


@triton.jit
def philox_kernel(counter, key, out):
    lane = tl.arange(0, 4)
    x0, x1, x2, x3 = triton_kernel.philox(
        tl.load(counter + lane).to(tl.uint32, bitcast=True),
        tl.load(counter + 4 + lane).to(tl.uint32, bitcast=True),
        tl.load(counter + 8 + lane).to(tl.uint32, bitcast=True),
        tl.load(counter + 12 + lane).to(tl.uint32, bitcast=True),
        tl.load(key + lane).to(tl.uint32, bitcast=True),
        tl.load(key + 4 + lane).to(tl.uint32, bitcast=True),
    )
    lane = tl.arange(0, 16)
    tl.store(out + lane, triton_kernel.in_order(x0, x1, x2, x3).to(tl.int32, bitcast=True))


@triton.jit
def noise_kernel(words, out, pairs, N: tl.constexpr, NOISE: tl.constexpr):
    pair = tl.program_id(0) * N + tl.arange(0, N)
    xa = tl.load(words + 2 * pair, mask=pair < pairs, other=0).to(tl.uint32)
    xb = tl.load(words + 2 * pair + 1, mask=pair < pairs, other=0).to(tl.uint32)
    a, b = triton_kernel.noise_pair(xa, xb, NOISE)
    tl.store(out + 2 * pair, a, mask=pair < pairs)
    tl.store(out + 2 * pair + 1, b, mask=pair < pairs)


def kernel_noise(x: torch.Tensor, kind: str) -> torch.Tensor:
    """reference.noise, by the kernel's own mapping."""
    x = x.contiguous()
    out = torch.empty(x.numel(), device=x.device)
    pairs = x.numel() // 2
    n = 1 << 14
    if pairs:
        noise_kernel[(math.ceil(pairs / n),)](x, out, pairs, N=n, NOISE=kind, enable_fp_fusion=False)
    return out


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normals are specified to 2e-6 only; given the same ones, the reference must agree to the bit."""
    specified = reference.noise
    monkeypatch.setattr(
        reference,
        "noise",
        lambda x, kind: kernel_noise(x, kind) if kind == "normal" else specified(x, kind),
    )


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise equality; names the first place that differs."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    wrong = (got.view(bits) != expected.view(bits)).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        pytest.fail(f"{len(wrong)} of {len(got)} differ, first [{i}]: {got[i]} != {expected[i]}")


def random(size: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(
    sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (F32, F32, F32), **request: object
) -> None:
    """Triton's bits against the reference's."""
    out, zeroshot, finetuned = dtypes
    w0 = [random(n, zeroshot, seed=2 * i) for i, n in enumerate(sizes)]
    w1 = [random(n, finetuned, seed=2 * i + 1) for i, n in enumerate(sizes)]
    got, expected = ([torch.full((n,), 9.0).to(DEVICE, out) for n in sizes] for _ in range(2))
    rft.write_(got, w0, w1, **request, impl="triton")  # type: ignore[arg-type]
    rft.write_(expected, w0, w1, **request, impl="reference")  # type: ignore[arg-type]
    for a, b in zip(got, expected, strict=True):
        same_bits(a, b)


def test_known_answers_of_philox() -> None:
    f = 0xFFFFFFFF
    counters = [[0] * 4, [f] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0] * 4]
    keys = [[0] * 2, [f] * 2, [0xA4093822, 0x299F31D0], [0] * 2]
    words = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ]

    def as_int32(x: list[list[int]]) -> torch.Tensor:
        return torch.from_numpy(np.array(x, dtype=np.uint32).view(np.int32)).to(DEVICE)

    out = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    counter, key = as_int32(counters).T.contiguous(), as_int32(keys).T.contiguous()
    philox_kernel[(1,)](counter, key, out)
    assert torch.equal(out.view(4, 4), as_int32(words))


def test_normals_are_close_to_float64() -> None:
    """Random words, and those where cancellation, quarter turns and the tail are worst."""
    edges = [0, 2**29, 2**30, 2**31, 3 * 2**29, 3 * 2**30, 5 * 2**29, 7 * 2**29, 2**32]
    special = [e + d for e in edges for d in range(-64, 64) if 0 <= e + d < 2**32]
    special += range(4096)
    generator = torch.Generator().manual_seed(0)
    random_words = torch.randint(0, 2**32, (4 * len(special),), generator=generator)
    words = torch.tensor(special, dtype=torch.int64)
    x = torch.cat(
        (
            torch.stack((words, random_words[: len(special)]), 1).flatten(),
            torch.stack((random_words[: len(special)], words), 1).flatten(),
            random_words[2 * len(special) :],
        )
    )
    u = (x.double() + 0.5) / 2**32
    distance = (2.0**32 - x.double() - 0.5) / 2**32  # 1 - u without cancellation
    log = torch.where(x < 2**31, torch.log(u), torch.log1p(-distance))
    radius, angle = torch.sqrt(-2 * log[0::2]), 2 * math.pi * u[1::2]
    truth = torch.stack((radius * angle.cos(), radius * angle.sin()), 1).flatten()
    got = kernel_noise(x.to(DEVICE), "normal").cpu()
    assert (got.double() - truth).abs().max() < 2e-6


@pytest.mark.parametrize("noise", ["uniform", "rademacher"])
def test_other_noise_is_the_reference_to_the_bit(noise: str) -> None:
    x = torch.cat((torch.arange(512), 2**31 - 256 + torch.arange(512), 2**32 - 512 + torch.arange(512)))
    x = x.to(DEVICE).view(-1, 4)
    same_bits(kernel_noise(x, noise), reference.noise(x, noise))


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)))
def test_every_combination_of_storage_types(exact: None, dtypes: tuple[torch.dtype, ...]) -> None:
    check((257,), dtypes, alpha=0.3, rho=0.3, seed=1)
    check((257,), dtypes, alpha=0.7, rho=0.2, noise="uniform", on="interpolated", keep=0.4)
    check((257,), dtypes, alpha=1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0, -0.5, 1e-50])
@pytest.mark.parametrize("noise", ["none", "normal", "uniform", "rademacher"])
def test_every_form_of_the_formula(exact: None, noise: str, alpha: float) -> None:
    rho = {} if noise == "none" else {"rho": 0.2, "noise": noise}
    for on in ("finetuned", "interpolated"):
        check((257,), alpha=alpha, on=on, **rho, seed=2**64 - 3, draw=2**32 - 1, sign=-1)
        check((257,), alpha=alpha, on=on, **rho, keep=0.5, adaptive=False)
        check((257,), alpha=alpha, on=on, **rho, keep=0.25, fill="zeroshot", draw=5)


@pytest.mark.parametrize("keep", [0.0, 2.0**-32, 1 - 2.0**-32])
def test_extreme_masks(keep: float) -> None:
    check((4099,), alpha=0.7, keep=keep)


def test_all_sizes(exact: None) -> None:
    check(SIZES, alpha=0.3)
    check(SIZES, alpha=0.7, rho=0.1, keep=0.5)


def test_no_tensors() -> None:
    check((), alpha=0.5)
    check((0, 0), alpha=0.5)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_and_exact_ends(dtype: torch.dtype) -> None:
    """Every 16-bit pattern but NaN: kept at the ends; halfway between neighbours, to the even one."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()].to(DEVICE)
    other = torch.ones_like(every)
    for alpha in (0.0, 1.0):
        out = torch.zeros_like(every)
        rft.write_(out, *((every, other) if alpha == 0 else (other, every)), alpha, impl="triton")
        same_bits(out, every)
    halfway = every[:-1].float() / 2 + every[1:].float() / 2  # consecutive patterns are neighbours
    halfway = halfway[halfway.isfinite()]
    got, expected = (torch.zeros_like(halfway, dtype=dtype) for _ in range(2))
    rft.write_(got, halfway, halfway, 0.25, impl="triton")
    rft.write_(expected, halfway, halfway, 0.25, impl="reference")
    same_bits(got, expected)


def test_float32_subnormals_and_negative_zero_survive() -> None:
    w = torch.tensor([-0.0, 1e-45, -1e-40, 1.17e-38, 3e38, -3e38], device=DEVICE)
    out = torch.ones_like(w)
    for alpha in (0.0, 1.0):
        rft.write_(out, w, w, alpha, impl="triton")
        same_bits(out, w)
    expected = torch.ones_like(w)
    rft.write_(out, w, w / 2, 0.3, rho=0.5, noise="uniform", impl="triton")
    rft.write_(expected, w, w / 2, 0.3, rho=0.5, noise="uniform", impl="reference")
    same_bits(out, expected)


@pytest.mark.slow
def test_unaligned_views() -> None:
    """Every offset of each tensor, all in one table: aligned rows and others."""
    offsets = list(itertools.product((0, 1, 2, 4), repeat=3))
    size = 37
    base = [random(size + 4, seed=s) for s in range(3)]
    w0, w1 = ([base[i][o[i] : o[i] + size] for o in offsets] for i in (1, 2))
    results = []
    for impl in ("triton", "reference"):
        store = torch.zeros(len(offsets), size + 8, device=DEVICE)
        out = [store[i, o[0] : o[0] + size] for i, o in enumerate(offsets)]
        rft.write_(out, w0, w1, 0.3, rho=0.1, noise="uniform", impl=impl)
        results.append(store.flatten())
    same_bits(*results)  # the margins too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ["zeroshot", "finetuned", "both"])
def test_in_place(role: str, dtype: torch.dtype) -> None:
    results = []
    for impl in ("triton", "reference"):
        w, other = random(3000, dtype, seed=1), random(3000, dtype, seed=2)
        zeroshot, finetuned = {"zeroshot": (w, other), "finetuned": (other, w), "both": (w, w)}[role]
        rft.write_(w, zeroshot, finetuned, 0.7, rho=0.1, noise="uniform", keep=0.5, impl=impl)
        results.append(w)
    same_bits(*results)


def test_runs_of_rows() -> None:
    """Runs write their rows and no others, whatever groups these belong to; noise stays in its place."""
    dtypes = (F32, BF16, F32, F32, BF16, F16)
    sizes = (300, 5, 0, 2050, 9, 12)
    w0 = [random(n, d, seed=i) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))]
    w1 = [random(n, seed=10 + i) for i, n in enumerate(sizes)]
    out = [torch.full_like(w, 9) for w in w0]
    whole = [torch.full_like(w, 9) for w in w0]
    plan = Plan(out, w0, w1, impl="triton")
    assert plan.impl == "triton"
    request = {"rho": 0.1, "noise": "rademacher", "seed": 4}
    rft.write_(whole, w0, w1, 0.6, **request, impl="reference")  # type: ignore[arg-type]
    for runs in ([], [(0, 0)], [(1, 3)], [(0, 2), (4, 6)], [(2, 3)], [(5, 6)], [(0, 6)]):
        for tensor in out:
            tensor.fill_(9)
        plan.write(0.6, tensors=runs, **request)  # type: ignore[arg-type]
        written = {row for first, last in runs for row in range(first, last)}
        for row, tensor in enumerate(out):
            same_bits(tensor, whole[row] if row in written else torch.full_like(tensor, 9))


def test_a_run_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = backend.Table._launch

    def counting(self, group, begin, end, *rest):  # type: ignore[no-untyped-def]
        launches.append(end - begin)
        launch(self, group, begin, end, *rest)

    monkeypatch.setattr(backend.Table, "_launch", counting)
    w = [random(n) for n in (10, 0, 2049, 1, 7)]
    plan = Plan(w, w, w, impl="triton")
    plan.write(0.5)
    plan.write(0.5, tensors=[(1, 4)])
    plan.write(0.5, tensors=[(1, 2)])
    assert launches == [5, 3]


@pytest.mark.parametrize("first_block", [2**32 - 3, 2**32, 2**40 + 5, 2**63 - 1000])
def test_blocks_beyond_32_bits(first_block: int) -> None:
    w = random(100)
    write = Write(0.8, rho=0.1, noise="uniform", keep=0.5, seed=9)
    results = []
    for module in (backend, reference):
        out = torch.zeros_like(w)
        module.Table([Row(out, w, w, first_block, "w")]).write([(0, 1)], write)
        results.append(out)
    same_bits(*results)


def test_elements_beyond_31_bits() -> None:
    """The last two tiles of more than 2^31 elements. (On a CPU, untouched memory costs nothing.)"""
    size = 2**31 + backend.TILE + 5
    if DEVICE.type == "cuda":
        w = torch.zeros(size, dtype=BF16, device=DEVICE)
    else:
        w = torch.from_numpy(np.zeros(size, dtype=np.int16)).view(BF16)
    table = backend.Table([Row(w, w, w, 0, "w")])
    write = Write(1.0, rho=1.0, noise="uniform", adaptive=False)
    group = table._groups[0]
    _, end = group.range(0, 1)
    table._launch(group, end - 2, end, backend.form(write), backend.numbers(write))
    blocks = math.ceil((size - 2**31) / 4)
    words = reference.words(0, 2**29 + torch.arange(blocks, device=DEVICE), 0, 0)
    same_bits(w[2**31 :], reference.noise(words, "uniform")[: size - 2**31].to(BF16))
    assert not w[: 2 * backend.TILE].any() and not w[2**31 - backend.TILE : 2**31].any()


def test_one_table_from_two_threads(exact: None) -> None:
    w0, w1 = [random(600, seed=i) for i in range(4)], [random(600, seed=9 + i) for i in range(4)]
    out, expected = [torch.zeros_like(w) for w in w0], [torch.zeros_like(w) for w in w0]
    plan = Plan(out, w0, w1, impl="triton")
    runs = ([(0, 2)], [(2, 4)])
    threads = [
        threading.Thread(target=plan.write, args=(0.4,), kwargs={"tensors": r, "rho": 0.1}) for r in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rft.write_(expected, w0, w1, 0.4, rho=0.1, impl="reference")
    for got, wanted in zip(out, expected, strict=True):
        same_bits(got, wanted)


def test_numbers_never_change_type() -> None:
    """Every integer fits int32 and every other number is a float, whatever the request."""
    for seed, draw, keep in itertools.product(
        (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1), (0, 2**31, 2**32 - 1), (0, 0.5, 1)
    ):
        k, scale, *words = backend.numbers(Write(0.5, rho=1, keep=keep, seed=seed, draw=draw))
        assert type(k) is type(scale) is float
        assert all(type(word) is int and -(2**31) <= word < 2**31 for word in words)
        assert [word % 2**32 for word in words[1:]] == [seed % 2**32, seed >> 32, draw]


def test_auto_never_interprets() -> None:
    cpu = torch.device("cpu")
    assert registry.pick("auto", cpu).name != "triton"
    if DEVICE == cpu:
        assert registry.pick("triton", cpu).name == "triton"


def test_other_devices_are_refused() -> None:
    reason = backend.why_not(torch.device("meta"))
    assert reason is not None and "meta" in reason


def test_no_gpu_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interpreted", lambda kernel: False)
    with refused(RuntimeError, "TRITON_INTERPRET=1"):
        rft.write_(torch.ones(2), torch.ones(2), torch.ones(2), 0.5, impl="triton")


def test_interpreter_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interpreted", lambda kernel: True)
    reason = backend.why_not(torch.device("cuda"))
    assert reason is not None and "unset" in reason


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interpreted", lambda kernel: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = backend.why_not(torch.device("cuda"))
    assert reason is not None and "8.0" in reason and "7.5" in reason


def test_a_form_that_has_not_run_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(9)
    plan = Plan(w, w, w, impl="triton")
    plan.write(0.5, rho=0.1)
    monkeypatch.setattr(backend, "capturing", lambda device: True)
    plan.write(0.75, rho=0.3, seed=5)  # other numbers are the same form
    plan._table._groups[0].ready.clear()  # type: ignore[attr-defined]
    with refused(RuntimeError):
        plan.write(0.5, rho=0.1)


def in_new_process(code: str, **environment: str) -> str:
    """Runs Python code where Triton is not interpreted; returns what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_without_triton_the_package_works() -> None:
    printed = in_new_process(
        """
        import sys
        sys.modules["triton"] = None
        import torch, rft_fast
        from rft_fast.kernels import triton
        print(triton.why_not(torch.device("cpu")))
        w = torch.ones(3)
        rft_fast.interpolate_(w, w, w, 0.5)
        """
    )
    assert "cannot be imported" in printed and "pip install" in printed


@pytest.mark.slow
def test_compiled_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Through Table and Triton's own launcher, up to the launch; for Hopper, by the bundled ptxas."""
    printed = in_new_process(
        """
        import json, re, types
        import torch
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from rft_fast.kernels import triton as backend
        from rft_fast.kernels.contract import Add, Write
        from rft_fast.kernels.rows import make_rows

        class Hopper:
            def get_current_target(self): return GPUTarget("cuda", 90, 32)
            def get_current_device(self): return 0
            def get_current_stream(self, device=None): return 0
            def get_active_torch_device(self): return torch.device("cpu")

        driver.set_active(Hopper())
        kernel = backend._load()[0].write
        compiled = []

        class Warmup:
            def __getitem__(self, grid):
                return lambda *a, **k: compiled.append(kernel.warmup(*a, grid=grid, **k))

        def compile(tensors, *writes, runs=((0, 1),)):
            compiled.clear()
            table = backend.Table(make_rows(*tensors))
            table._kernel = types.SimpleNamespace(write=Warmup())
            for write in writes:
                table.write(runs, write)
            ptx = compiled[-1].asm["ptx"]
            return {
                "kernels": len({id(k) for k in compiled}),
                "wide": len(re.findall(r"(?:ld|st)\\.global[.a-z0-9]*\\.v[24]\\.b(?:32|16)", ptx)),
                "bits": sorted(set(re.findall(r"(?:ld|st)\\.global[.a-z0-9]*(\\.v[24]\\.b\\d+)", ptx))),
                "fused": len(re.findall(r"fma\\.", ptx)),
                "loosely": len(re.findall(r"\\b(?:add|sub|mul)\\.(?:ftz\\.)?f32", ptx)),
                "shared": compiled[-1].metadata.shared,
            }

        def three(dtype): return [[torch.zeros(5000, dtype=dtype) for _ in range(2)] for _ in range(3)]

        print(json.dumps({
            "interpolate": compile(three(torch.float32), Write(.3)),
            "bfloat16": compile(three(torch.bfloat16), Write(.3, .1)),
            "all": compile(three(torch.float32), Write(.3, .1, keep=.5)),
            "numbers": compile(
                three(torch.float32),
                Write(.3, .1), Write(.25, 1., seed=1, draw=1),
                Write(-7, 2., seed=2**64 - 1, draw=2**32 - 1, sign=-1),
                Write(.1, .2, seed=16 + (16 << 32), draw=16),
                runs=((0, 1), (1, 2), (0, 2)),
            ),
            "add": compile(three(torch.float32), Add(.3, "square")),
            "by row": compile(
                three(torch.float32), [Write(.3, .1, keep=.5), Write(1.)], [Write(0.), Write(.7, .2, keep=.1)]
            ),
            "elsewhere": compile(
                [[w.view(50, 100).T for w in role] for role in three(torch.bfloat16)], Write(.3, .1, keep=.5)
            ),
        }))
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    found = json.loads(printed)
    # The formula is rounded operation by operation; only the normals' polynomials fuse.
    assert found["interpolate"]["fused"] == found["interpolate"]["loosely"] == 0
    assert found["all"]["fused"] > 0 and found["all"]["loosely"] == 0
    # Two accesses of four elements to each of three tensors: 16 bytes of float32, 8 of bfloat16.
    assert found["interpolate"]["bits"] == [".v4.b32"] and found["interpolate"]["wide"] == 6
    assert found["bfloat16"]["bits"] == [".v2.b32"] and found["bfloat16"]["wide"] == 6
    # Nothing passes between threads, where a thread computes the noise of the elements that it writes.
    assert [name for name, case in found.items() if case["shared"]] in ([], ["elsewhere"])
    # Other numbers, rows and runs are no other kernel, nor are numbers of each row.
    assert found["numbers"]["kernels"] == found["by row"]["kernels"] == 1
    # What is added is one of the three tensors, and nothing is random.
    assert found["add"]["fused"] == found["add"]["loosely"] == 0
    assert found["add"]["bits"] == [".v4.b32"] and found["add"]["wide"] == 6
    assert found["by row"]["loosely"] == found["elsewhere"]["loosely"] == 0
