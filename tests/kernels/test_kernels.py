"""The kernel contract: every backend against known answers, float64, brute force and statistics."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import itertools
import math
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from support import tiny_cuda
from support.wording import refused
from torch._subclasses.fake_tensor import FakeTensorMode

import rft_fast as rft
from rft_fast import _native, env
from rft_fast.kernels import Plan, Write, native, reference, registry, triton
from rft_fast.kernels.places import first_blocks
from rft_fast.kernels.resident import capturing
from rft_fast.kernels.rows import Row, make_rows

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IMPLS = ("reference", "native")
ISAS = native.isas()
GPUS = [device for device in env.devices() if device.type == "cuda"]
SIZES = (0, 1, 3, 4, 7, 15, 16, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4099)

# Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def cuda_on_cpu():
    """impl=tiny_cuda.NAME: the CUDA kernels on the CPU. Built for the first test that writes with it."""
    with tiny_cuda.offered():
        yield


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise equality; names the first place that differs."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    view = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    a, b = actual.contiguous().view(view).flatten(), expected.contiguous().view(view).flatten()
    differ = (a != b).nonzero().flatten()
    if len(differ):
        i = int(differ[0])
        raise AssertionError(
            f"{len(differ)} of {len(a)} differ, first at {i}: "
            f"{actual.flatten()[i].item()!r} != {expected.flatten()[i].item()!r}"
        )


def ends(n: int, dtype0: torch.dtype = F32, dtype1: torch.dtype = F32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(n, generator=generator)
    w1 = w0 + 0.1 * torch.randn(n, generator=generator)
    return w0.to(dtype0), w1.to(dtype1)


# ---------------------------------------------------------------- random words and noise


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    columns = [torch.tensor([c]) for c in counter]
    assert tuple(reference.philox(columns, key[1] << 32 | key[0])[0].tolist()) == words
    for isa in ISAS:
        assert tuple(_native.philox(counter, key, isa)) == words


def special_words() -> np.ndarray:
    """Words where a mapping is likeliest to break: the ends, every quarter turn, every octave."""
    edges = [0, 2**32 - 1, 0x95F61998, 0x95F61999]  # the last two: u around sqrt(1/2) scaled
    edges += [k * 2**29 for k in range(8)] + [2**k for k in range(32)]
    near = {(e + d) % 2**32 for e in edges for d in range(-40, 41)}
    near |= {(e + d) % 2**32 for e in edges for d in (-300, -200, -129, 129, 200, 300)}
    return np.array(sorted(near), dtype=np.uint32)


def float64_normals(x: np.ndarray) -> np.ndarray:
    """The mapping of DESIGN section 2, written out once more, in float64 with log1p near u = 1."""
    x = x.reshape(-1, 2).astype(np.float64)
    below = (2.0**32 - x[:, 0] - 0.5) / 2**32
    log = np.where(x[:, 0] < 2**31, np.log((x[:, 0] + 0.5) / 2**32), np.log1p(-below))
    r, a = np.sqrt(-2 * log), 2 * np.pi * (x[:, 1] + 0.5) / 2**32
    return np.stack((r * np.cos(a), r * np.sin(a)), axis=1).flatten()


def all_pairs(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    pairs = np.stack([g.flatten() for g in np.meshgrid(radius, angle, indexing="ij")], axis=1)
    return np.ascontiguousarray(pairs.flatten(), dtype=np.uint32)


def normal_inputs() -> np.ndarray:
    special = special_words()
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    spread = np.arange(0, 2**32, 2**13 + 1, dtype=np.uint64).astype(np.uint32)
    return np.concatenate(
        (
            all_pairs(special, special[::37]),
            all_pairs(special[::37], special),
            np.stack((spread, spread[::-1]), axis=1).flatten(),
            random,
        )
    )


@pytest.mark.parametrize("isa", ISAS)
def test_native_normals_are_within_2e_6_of_float64(isa):
    x = normal_inputs()
    x = x[: len(x) // 4 * 4]
    error = np.abs(_native.noise(1, x, isa).astype(np.float64) - float64_normals(x))
    assert error.max() < 2e-6, (error.max(), x.reshape(-1, 2)[error.argmax() // 2])


def test_reference_normals_are_rounded_float64():
    x = normal_inputs()
    x = x[: len(x) // 4 * 4]
    got = reference.noise(torch.from_numpy(x.astype(np.int64)).view(-1, 4), "normal").numpy()
    truth = float64_normals(x)
    assert np.all(np.abs(got - truth) <= np.spacing(np.abs(truth).astype(np.float32)) * 0.51 + 1e-9)


@pytest.mark.parametrize("isa", ISAS)
def test_uniform_and_rademacher_map_the_words(isa):
    x = np.concatenate((special_words(), np.arange(0, 2**32, 99991, dtype=np.uint64)))
    x = x[: len(x) // 4 * 4].astype(np.uint32)
    truth = 2 * (x.astype(np.float64) + 0.5) / 2**32 - 1
    words = torch.from_numpy(x.astype(np.int64)).view(-1, 4)
    uniform = reference.noise(words, "uniform")
    assert np.abs(uniform.numpy() - truth).max() <= 2**-24
    same_bits(torch.from_numpy(_native.noise(2, x, isa)), uniform)
    signs = reference.noise(words, "rademacher")
    assert np.array_equal(signs.numpy(), np.where(x >= 2**31, 1.0, -1.0))
    same_bits(torch.from_numpy(_native.noise(3, x, isa)), signs)


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_is_that_of_the_documented_counter(impl):
    """Element e of tensor t reads word e % 4 of the block first(t) + e // 4; key = seed."""
    seed, draw = 0x0123456789ABCDEF, 0xFFFFFFFE
    tensors = [torch.empty(5), torch.empty(0), torch.empty(3, 3)]
    got = rft.noise_like(tensors, seed=seed, draw=draw, noise="uniform", impl=impl)
    kept = rft.keep_mask_like(tensors, 0.3, seed=seed, impl=impl)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for tensor, noise, mask, first in zip(tensors, got, kept, (0, 2, 2), strict=True):
        assert noise.shape == mask.shape == tensor.shape
        for e in range(tensor.numel()):
            x = _native.philox((first + e // 4, 0, draw, 0), key)[e % 4]
            assert noise.flatten()[e] == np.float32(np.float32(x - 2**31) + 0.5) * 2.0**-31
            x = _native.philox((first + e // 4, 0, 0, 1), key)[e % 4]
            assert mask.flatten()[e] == (x < round(0.3 * 2**32))


def test_block_numbers_beyond_32_bits():
    """A model of more than 2**34 weights: the counter's high word, and the step from one to the next."""
    w0, w1 = ends(400)
    for first in (2**32 - 3, 2**32, 2**40 + 5):
        outs = []
        for table in (reference.Table, native.Table):
            row = Row(torch.empty(400), w0, w1, first, "w")
            table([row]).write([(0, 1)], Write(0.3, 0.1, noise="uniform", keep=0.5, seed=3))
            outs.append(row.out)
        same_bits(outs[1], outs[0])
    low = reference.words(3, torch.tensor([2**32]), 0, 0)[0].tolist()
    assert tuple(low) == tuple(_native.philox((0, 1, 0, 0), (3, 0)))


# ---------------------------------------------------------------- the formula


def float64_write(w0, w1, alpha, rho, on, keep, fill, adaptive, sign, eps, kept):
    """The formula of DESIGN section 2 in float64."""
    w0, w1, eps = w0.double(), w1.double(), eps.double()
    w1 = torch.where(kept, w1, w0 if fill == "zeroshot" else torch.zeros_like(w1))
    scale = lambda w: w.abs() if adaptive else torch.ones_like(w)  # noqa: E731
    if on == "finetuned":
        w1 = w1 + sign * rho * scale(w1) * eps
        return (1 - alpha) * w0 + alpha * w1
    v = (1 - alpha) * w0 + alpha * w1
    return v + sign * rho * scale(v) * eps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noise", ["normal", "uniform", "rademacher"])
@pytest.mark.parametrize("on", ["finetuned", "interpolated"])
def test_write_is_the_formula(impl, noise, on):
    w0, w1 = ends(515)
    eps = rft.noise_like(w0, seed=9, draw=4, noise=noise, impl=impl)
    for alpha, rho, keep, fill, adaptive, sign in itertools.product(
        (0, 0.25, 0.9, 1, 1.5), (0, 0.3), (1, 0.4), ("zero", "zeroshot"), (True, False), (1, -1)
    ):
        kept = rft.keep_mask_like(w0, keep, seed=9, impl=impl)
        out = torch.full_like(w0, math.nan)
        rft.write_(out, w0, w1, alpha, rho, on, keep, fill, noise, adaptive, 9, 4, sign, impl=impl)
        truth = float64_write(w0, w1, alpha, rho, on, keep, fill, adaptive, sign, eps, kept)
        size = (w0.abs() + w1.abs() + 1) * (1 + 2 * rho * eps.abs())
        assert ((out.double() - truth).abs() <= 4e-7 * size * max(1, abs(alpha))).all()


@pytest.mark.slow(only="cuda-on-cpu")
@pytest.mark.parametrize("target", [*ISAS, *(map(str, GPUS) if GPUS else [tiny_cuda.NAME])])
@pytest.mark.parametrize("dtypes", list(itertools.product((F32, BF16, F16), repeat=3)))
def test_native_has_the_bits_of_the_reference(target, dtypes):
    """All that does not pass through a normal: interpolation, masks, uniform and Rademacher noise.

    On every instruction set and every GPU; without one, the CUDA kernels run on the CPU.
    """
    device, isa = (target, ()) if target.startswith("cuda:") else ("cpu", (target,) if target in ISAS else ())
    backend = registry.BACKENDS[tiny_cuda.NAME if target == tiny_cuda.NAME else "native"]
    out_dtype, dtype0, dtype1 = dtypes
    w0, w1 = (w.to(device) for w in ends(2051, dtype0, dtype1))
    for alpha, on, (keep, fill), (noise, rho, adaptive, sign) in itertools.product(
        (0, 0.3, 0.7, 1),
        ("finetuned", "interpolated"),
        ((1, "zero"), (0.5, "zero"), (0.5, "zeroshot")),
        (("normal", 0, True, 1), ("uniform", 0.1, True, -1), ("rademacher", 0.2, False, 1)),
    ):
        write = Write(alpha, rho, on, keep, fill, noise, adaptive, 7, 1, sign)
        outs = [torch.full((2051,), math.nan, dtype=out_dtype, device=device) for _ in range(2)]
        reference.Table(make_rows([outs[0]], [w0], [w1])).write([(0, 1)], write)
        backend.table(make_rows([outs[1]], [w0], [w1])).write([(0, 1)], write, *isa)
        same_bits(outs[1], outs[0])


def test_normals_have_the_same_bits_on_every_instruction_set_and_thread_count():
    w0, w1 = ends(300_001)
    write = Write(0.3, 0.1, keep=0.9, seed=5, draw=2)
    outs = []
    before = torch.get_num_threads()
    try:
        for isa, threads in itertools.product(ISAS, (1, 2, 5)):
            torch.set_num_threads(threads)
            outs.append(torch.empty(300_001))
            native.Table(make_rows([outs[-1]], [w0], [w1])).write([(0, 1)], write, isa)
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        same_bits(out, outs[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_ends_are_exact(impl):
    """Bits of w0 at 0 and of w1 at 1, where a blend would lose a sign, overflow or make a NaN."""
    w0 = torch.tensor([-0.0, 3e38, 1e-42, 1.0, -3e38, 0.1])
    w1 = torch.tensor([1.0, -3e38, -1e-42, -0.0, 3e38, 0.3])
    for on in ("finetuned", "interpolated"):
        for alpha, end in ((0, w0), (1, w1)):
            out = torch.empty(6)
            rft.write_(out, w0, w1, alpha, on=on, impl=impl)
            same_bits(out, end)
    out = torch.empty(6)
    rft.write_(out, w0, w1, 0, rho=0.5, impl=impl)  # noise on the fine-tuned end cannot show
    same_bits(out, w0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_reference_keeps_every_bit_of_an_end(dtype):
    """All of a half-precision type's patterns, among them every NaN: other backends may change those."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    w = (patterns.int() << 16 | 1).view(F32) if dtype == F32 else patterns.view(dtype)
    other = torch.zeros_like(w)
    for alpha, ends in ((0, (w, other)), (1, (other, w))):
        out = torch.empty_like(w)
        rft.interpolate_(out, *ends, alpha, impl="reference")
        same_bits(out, w)


@pytest.mark.parametrize("impl", IMPLS)
def test_interpolation_is_as_accurate_as_torch_lerp(impl):
    w0, w1 = ends(100_000)
    for alpha in (0.1, 0.4, 0.5, 0.77):
        truth = (1 - alpha) * w0.double() + alpha * w1.double()
        out = torch.empty_like(w0)
        rft.interpolate_(out, w0, w1, alpha, impl=impl)
        error = (out.double() - truth).abs().max()
        assert error <= 1.01 * max((torch.lerp(w0, w1, alpha).double() - truth).abs().max(), 2e-7)
        equal = torch.empty_like(w0)
        rft.interpolate_(equal, w0, w0, alpha, impl=impl)
        same_bits(equal, w0)


@pytest.mark.parametrize("isa", ISAS)
def test_storage_types_round_to_nearest_even(isa):
    """Every half-precision pattern in, and float32 values around every rounding boundary out."""

    def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=dtype)
        native.Table(make_rows([out], [x], [x])).write([(0, 1)], Write(1), isa)
        return out

    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (F16, BF16):
        halves = patterns.view(dtype)
        finite = halves[~halves.isnan()]
        same_bits(convert(finite, F32), finite.float())
        assert convert(halves[halves.isnan()], F32).isnan().all()
        nan_free = finite.float()
        ties = [nan_free]
        for step in (-1, 0, 1):  # float32 neighbours of the midpoints between adjacent halves
            middle = (nan_free[:-1].double() + nan_free[1:].double()) / 2
            around = middle.float().view(torch.int32) + step
            around = around.view(F32)
            ties.append(around[around.isfinite()])
        x = torch.cat([*ties, torch.tensor([65519.9, 65520.0, 3.3e38, -3.4e38, 1e-45, math.inf])])
        same_bits(convert(x, dtype), x.to(dtype))
        assert convert(torch.tensor([math.nan]), dtype).isnan().all()


def test_flush_denormal_of_the_caller_does_not_change_bits():
    w0 = torch.full((1000,), 1e-40)
    w1 = torch.full((1000,), 3e-40)
    outs = []
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            out = torch.empty(1000)
            rft.interpolate_(out, w0, w1, 0.5, impl="native")
        finally:
            torch.set_flush_denormal(False)
        outs.append(out)
    same_bits(outs[1], outs[0])
    assert outs[0][0] > 0


# ---------------------------------------------------------------- tables, sizes, places


@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_alignment(size):
    base0, base1 = ends(size + 3)
    for offset in (0, 1, 3):
        w0, w1 = base0[offset : offset + size], base1[offset : offset + size]
        outs = []
        for impl in IMPLS:
            room = torch.full((size + 8,), 7.0)
            out = room[offset : offset + size]
            rft.write_(out, w0, w1, 0.3, 0.1, noise="uniform", keep=0.5, seed=1, impl=impl)
            assert (room[:offset] == 7).all() and (room[offset + size :] == 7).all()
            outs.append(out)
        same_bits(outs[1], outs[0])


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1])
def test_writes_larger_than_the_caches(offset):
    """From 2**25 elements on, aligned outputs are stored past the caches."""
    n = (1 << 25) + 1005
    w0, w1 = torch.arange(n) * 1e-7, torch.arange(n).flip(0) * 3e-8
    room = torch.full((n + 8,), 7.0)
    out = room[offset : offset + n]
    rft.interpolate_(out, w0, w1, 0.3, impl="native")
    same_bits(out, w0 + (w1 - w0) * 0.3)  # two roundings, as specified
    assert (room[:offset] == 7).all() and (room[offset + n :] == 7).all()
    rft.interpolate_(w1, w0, w1, 0.3, impl="native")  # in place: through the caches
    same_bits(w1, out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_in_place_on_either_end_or_both(impl, dtype):
    w0, w1 = ends(5000, dtype, dtype)
    expected = torch.empty_like(w0)
    rft.write_(expected, w0, w1, 0.4, 0.1, seed=2, impl=impl)
    for place in (0, 1):
        copies = [w0.clone(), w1.clone()]
        rft.write_(copies[place], copies[0], copies[1], 0.4, 0.1, seed=2, impl=impl)
        same_bits(copies[place], expected)
        same_bits(copies[1 - place], (w0, w1)[1 - place])
    both, apart = w1.clone(), torch.empty_like(w1)
    rft.perturb_(both, 0.1, seed=2, draw=3, impl=impl)
    rft.write_(apart, w1, w1, 1.0, 0.1, seed=2, draw=3, impl=impl)
    same_bits(both, apart)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_run_writes_its_rows_only_and_as_the_whole_would(impl):
    shapes = [(3, 5), (), (257,), (0,), (40_000,), (7, 1)]
    w0 = [ends(math.prod(s), seed=i)[0].view(s) for i, s in enumerate(shapes)]
    w1 = [ends(math.prod(s), BF16, F16, seed=i)[1].view(s) for i, s in enumerate(shapes)]
    whole = [torch.empty(s) for s in shapes]
    Plan(whole, w0, w1, impl).write(0.3, rho=0.1, seed=4, draw=1)
    part = [torch.full(s, 7.0) for s in shapes]
    plan = Plan(part, w0, w1, impl)
    plan.write(0.3, tensors=[(1, 3), (4, 5), (2, 2)], rho=0.1, seed=4, draw=1)
    for index, (a, b) in enumerate(zip(part, whole, strict=True)):
        same_bits(a, b if index in (1, 2, 4) else torch.full_like(a, 7.0))
    assert plan.impl == impl and len(plan) == 6
    for runs in ([(0, 7)], [(-1, 2)], [(3, 2)]):
        with refused(ValueError):
            plan.write(0.3, tensors=runs)
    plan.write(0.9, tensors=((i, i + 1) for i in (5, 0)), rho=0.1, seed=4)
    plan.write(0.3, tensors=((i, i + 1) for i in (5, 3, 0)), rho=0.1, seed=4, draw=1)
    for a, b in zip(part, whole, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_row_is_written_twice_at_once(impl):
    """In place, the second write would start from what the first one left."""
    w = [torch.ones(3) for _ in range(4)]
    plan = Plan(w, w, w, impl)
    for runs, facts in (
        ([(0, 2), (1, 3)], ("(0, 2)", "(1, 3)")),
        ([(3, 4), (1, 2), (0, 4)], ("(0, 4)", "(1, 2)")),
        ([(1, 2), (1, 2)], ("(1, 2)",)),
    ):
        with refused(ValueError, *facts):
            plan.write(1.0, tensors=runs, rho=0.1)
    for runs in ((0, 1), [(0.0, 1)], [(0, 1, 2)], [("0", 1)], 3, "ab"):
        with refused(TypeError):
            plan.write(1.0, tensors=runs, rho=0.1)
    assert all((tensor == 1).all() for tensor in w)
    plan.write(1.0, tensors=[(2, 3), (1, 1), (0, 2), (1, 1)], rho=0.1)  # empty ones overlap nothing
    assert [bool((tensor == 1).all()) for tensor in w] == [False, False, False, True]


def test_equal_shapes_get_different_noise_and_positions_decide():
    """Reseeding per tensor, a known bug elsewhere, would give equal noise to equal shapes."""
    a, b = rft.noise_like([torch.empty(4), torch.empty(4)], seed=1)
    assert not torch.equal(a, b)
    one = rft.noise_like(torch.empty(8), seed=1)
    assert torch.equal(torch.cat((a, b)), one)
    assert first_blocks([torch.empty(n) for n in (1, 4, 5, 0, 3)]) == [0, 1, 2, 4, 4]


def test_many_threads_may_write_at_once():
    w0, w1 = ends(200_000)
    outs = [torch.empty(200_000) for _ in range(6)]
    plan = Plan(outs, [w0] * 6, [w1] * 6, "native")
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for draw in range(20):
                plan.write(0.3, tensors=[(index, index + 1)], rho=0.1, draw=draw)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    alone = [torch.empty(200_000) for _ in range(6)]
    Plan(alone, [w0] * 6, [w1] * 6, "native").write(0.3, rho=0.1, draw=19)
    for a, b in zip(outs, alone, strict=True):
        same_bits(a, b)


def test_a_plan_keeps_its_memory_alive():
    w0, w1 = ends(100_000)
    expected = torch.lerp(w0.double(), w1.double(), 0.5)
    out = torch.empty(100_000)
    plan = Plan([out], [w0.clone()], [w1.clone()], "native")
    gc.collect()
    torch.empty(100_000).fill_(math.nan)  # would reuse the freed copies
    plan.write(0.5)
    assert (out.double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_notices_a_write(impl):
    w = torch.nn.Parameter(torch.ones(10))
    x = torch.ones(10, requires_grad=True)
    loss = (w * x).sum()
    rft.perturb_(w, 0.1, draw=0, impl=impl)
    assert not torch.equal(w.detach(), torch.ones(10)) and w.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- every backend on every device

ON_GPU = [(device, impl) for device in GPUS for impl in ("native", "triton")]
# Without a GPU, Triton is interpreted (conftest.py), and the CUDA kernels run on the CPU (tiny_cuda.py).
EMULATED = [
    pytest.param(torch.device("cpu"), "triton", marks=pytest.mark.emulated),
    # It is built first.
    pytest.param(torch.device("cpu"), tiny_cuda.NAME, marks=[pytest.mark.emulated, pytest.mark.slow]),
]
ON_CPU = [(torch.device("cpu"), "native"), *EMULATED]
EVERYWHERE = [ON_CPU[0], *ON_GPU] if GPUS else ON_CPU
NO_GPU = [pytest.param(None, None, marks=pytest.mark.skip(reason="there is no GPU"))]

FORMS = (
    {"alpha": 0.3},
    {"alpha": 0.7, "keep": 0.5, "fill": "zeroshot", "seed": 2**64 - 1},
    {"alpha": 0.6, "rho": 0.1, "noise": "uniform"},
    {"alpha": 1.0, "rho": 0.1, "noise": "uniform", "keep": 0.5, "draw": 2**32 - 1},
    {"alpha": 0.4, "rho": 0.1, "noise": "rademacher", "on": "interpolated", "adaptive": False, "sign": -1},
)


def mixed(device: torch.device) -> list[list[torch.Tensor]]:
    """out, zeroshot, finetuned: every combination of storage types, many sizes, aligned and not."""
    generator = torch.Generator().manual_seed(0)
    sizes = itertools.cycle((0, 1, 3, 4, 257, 2047, 2048, 2049, 4101))
    roles: list[list[torch.Tensor]] = [[], [], []]
    for dtypes, offset in itertools.product(itertools.product((F32, BF16, F16), repeat=3), (0, 1, 4)):
        size = next(sizes)
        for role, dtype in zip(roles, dtypes, strict=True):
            role.append(torch.randn(size + offset, generator=generator).to(device, dtype)[offset:])
    return roles


def synchronised(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    return [tensor.cpu() for tensor in tensors]


@pytest.mark.slow(only="form[1-4]-.*triton")
@pytest.mark.parametrize("device, impl", EVERYWHERE)
@pytest.mark.parametrize("form", FORMS)
def test_every_device_has_the_bits_of_the_reference_on_the_cpu(device, impl, form):
    expected, *sources = mixed(torch.device("cpu"))
    rft.write_(expected, *sources, **form, impl="reference")
    out, *sources = mixed(device)
    plan = Plan(out, *sources, impl)
    plan.write(**form)
    for got, wanted in zip(synchronised(out), expected, strict=True):
        same_bits(got, wanted)


@pytest.mark.parametrize(
    "device, impl, bound",
    [
        pytest.param(torch.device("cpu"), tiny_cuda.NAME, tiny_cuda.LONG_ROW, marks=EMULATED[1].marks),
        *((device, "native", 4 << 20) for device in GPUS),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_long_rows_have_the_bits_of_the_reference(device, impl, bound, form):
    """A thread block writes four tiles of 2,048 elements of them: sizes around the bound and whole blocks."""
    sources = [[], []]
    for size, dtypes in itertools.product(
        (bound - 1, bound, bound + 2047, bound // 8192 * 8192 + 8192, bound + 8192 + 5),
        ((F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F16)),
    ):
        for role, tensor in zip(sources, ends(size, *dtypes[1:]), strict=True):
            role.append(tensor)
            role.append(tensor[1:])  # element by element
            role.append(tensor[: size // 4 * 4].view(4, -1).t())  # its noise in another order
    dtypes = itertools.cycle((F32,) * 3 + (BF16,) * 3 + (F16,) * 3 + (BF16,) * 3)
    expected = [torch.empty_like(w0, dtype=dtype) for w0, dtype in zip(sources[0], dtypes, strict=False)]
    rft.write_(expected, *sources, **form, impl="reference")
    theirs = [[tensor.to(device) for tensor in role] for role in sources]
    out = [torch.empty_like(tensor).to(device) for tensor in expected]
    Plan(out, *theirs, impl).write(**form)
    for got, wanted in zip(synchronised(out), expected, strict=True):
        same_bits(got, wanted)


@pytest.mark.parametrize("device, impl", EVERYWHERE)
def test_normals_of_every_device_are_within_2e_6_of_float64(device, impl):
    n, seed, draw = (1 << 20 if device.type == "cuda" else 1 << 16), 0xFEDCBA9876543210, 3
    words = reference.words(seed, torch.arange(n // 4), draw, 0)
    truth = float64_normals(words.numpy().astype(np.uint32))
    got = rft.noise_like(torch.empty(n, device=device), seed, draw, impl=impl).cpu().numpy()
    assert np.abs(got - truth).max() < 2e-6


@pytest.mark.slow(only="True-device1-triton")
@pytest.mark.parametrize("device, impl", EVERYWHERE)
@pytest.mark.parametrize(
    "alpha, keep, fill, on, adaptive",
    [
        (0.3, 1, "zero", "finetuned", True),
        (0.8, 0.5, "zero", "finetuned", True),
        (1, 0.5, "zero", "finetuned", True),
        (0.8, 0.5, "zeroshot", "finetuned", True),
        (0.3, 1, "zero", "interpolated", True),
        (0.3, 1, "zero", "finetuned", False),
    ],
)
def test_normals_scale_the_weights_on_every_device(device, impl, alpha, keep, fill, on, adaptive):
    """Through the formula, given the very noise: whole tiles and less, of one storage type and of several."""
    out, w0, w1 = ([], [], [])
    for dtypes, (size, offset) in itertools.product(
        ((F32,) * 3, (BF16,) * 3, (F16,) * 3, (F32, BF16, F16)), ((2051, 0), (301, 1))
    ):
        for role, tensor in zip((w0, w1), ends(size + offset, *dtypes[1:]), strict=True):
            role.append(tensor.to(device)[offset:])
        out.append(torch.empty(size + offset, dtype=dtypes[0], device=device)[offset:])
    eps, kept = rft.noise_like(out, seed=5, impl=impl), rft.keep_mask_like(out, keep, seed=5, impl=impl)
    plan = Plan(out, w0, w1, impl)
    plan.write(alpha, rho=0.2, keep=keep, fill=fill, on=on, adaptive=adaptive, seed=5)
    for got, a, b, e, k in zip(*(synchronised(t) for t in (out, w0, w1, eps, kept)), strict=True):
        truth = float64_write(a, b, alpha, 0.2, on, keep, fill, adaptive, 1, e, k)
        size = (a.double().abs() + b.double().abs() + (0 if adaptive else 1)) * (1 + e.double().abs()) + 1e-30
        assert ((got.double() - truth).abs() <= torch.finfo(got.dtype).eps * size + 1e-7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("device, impl", ON_GPU or NO_GPU)
def test_a_write_is_on_the_current_stream(device, impl):
    """What the stream does before is seen, however late; another stream would read zeros."""
    w0, w1 = ends(100_000)
    expected = torch.empty_like(w0)
    rft.interpolate_(expected, w0, w1, 0.3, impl="reference")
    out, a, b = (torch.zeros(100_000, device=device) for _ in range(3))
    plan = Plan(out, a, b, impl)
    plan.write(0.3)  # Triton compiles
    w0, w1 = w0.to(device), w1.to(device)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        a.copy_(w0)
        b.copy_(w1)
    other = torch.cuda.current_device()
    with torch.cuda.stream(stream):
        plan.write(0.3)
        copy = out.clone()
    assert torch.cuda.current_device() == other
    stream.synchronize()
    same_bits(copy.cpu(), expected)


@pytest.mark.gpu
def test_a_second_gpu():
    if len(GPUS) < 2:
        pytest.skip(f"there are {len(GPUS)} GPUs, and two are needed")
    w0, w1 = ends(5000)
    with torch.cuda.device(GPUS[0]):
        for impl in ("native", "triton"):
            outs = []
            for device in GPUS[:2]:
                out = torch.empty(5000, device=device)
                rft.write_(out, w0.to(device), w1.to(device), 0.3, 0.1, impl=impl)
                outs.append(out.cpu())
            same_bits(*outs)
            assert torch.cuda.current_device() == GPUS[0].index


@pytest.mark.gpu
@pytest.mark.parametrize("device, impl", ON_GPU or NO_GPU)
def test_a_captured_write_follows_the_weights(device, impl):
    request = {"alpha": 0.3, "rho": 0.1, "noise": "uniform", "keep": 0.5, "seed": 6}
    out, w0, w1 = (torch.zeros(70_001, device=device) for _ in range(3))
    plan = Plan(out, w0, w1, impl)
    plan.write(**request)  # Triton compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        plan.write(**request)
    for seed in range(3):
        a, b = ends(70_001, seed=seed)
        w0.copy_(a)
        w1.copy_(b)
        out.zero_()
        graph.replay()
        expected = torch.empty_like(a)
        rft.write_(expected, a, b, **request, impl="reference")
        same_bits(synchronised([out])[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("device, impl", ON_GPU or NO_GPU)
def test_a_table_may_die_while_a_graph_is_captured(device, impl):
    out, w0, w1 = torch.zeros(3, 5000, device=device)
    plan, dying = Plan(out, w0, w1, impl), Plan(w0, w1, w1, impl)
    plan.write(0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        plan.write(0.25)
        del dying
    w1.fill_(4)
    graph.replay()
    assert out.unique().tolist() == [1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("device, impl", ON_GPU or NO_GPU)
@pytest.mark.parametrize("single", [False, True])
def test_a_stream_that_waits_for_no_other_may_write_first(device, impl, single):
    """What was made on another stream, or in one call, and dropped while its writes are on the way."""
    stream = torch.cuda.Stream(device)
    outs = [torch.zeros(50_000, device=device) for _ in range(50)]
    ones = torch.ones(50_000, device=device)
    torch.cuda.synchronize(device)
    for out in outs:
        plan = None if single else Plan(out, out, ones, impl)
        with torch.cuda.stream(stream):
            if plan is None:
                rft.interpolate_(out, out, ones, 0.25, impl=impl)
            else:
                plan.write(0.25)
    stream.synchronize()
    assert all(out.unique().tolist() == [0.25] for out in outs)


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="there is no GPU")
def test_the_first_write_of_a_process_can_be_captured():
    """CUDA loads a kernel when it is first used, here in the capture."""
    code = """
        import torch
        from rft_fast import Plan
        out, w0, w1 = torch.zeros(3, 5000, device="cuda")
        plan = Plan(out, w0, w1, "native")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.write(0.25)
        w1.fill_(4)
        graph.replay()
        print(out.unique().tolist())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.strip() == "[1.0]", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("device, impl", ON_GPU or NO_GPU)
def test_what_cannot_be_captured_is_refused(device, impl):
    w = torch.zeros(100, device=device)
    plan = Plan(w, w, w, impl)
    plan.write(0.5)
    with torch.cuda.device(device):
        with pytest.raises(RuntimeError, match="make the Plan before the capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                w.add_(1)
                rft.interpolate_(w, w, w, 0.5, impl=impl)
        if impl == "triton":
            plan._table._groups[0].ready.clear()
            with pytest.raises(RuntimeError, match="run it once before the capture"):
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    w.add_(1)
                    plan.write(0.5)
    plan.write(0.5)  # and nothing is broken
    torch.cuda.synchronize(device)


@pytest.mark.gpu
@pytest.mark.parametrize("device, impl", ON_GPU or NO_GPU)
def test_more_elements_than_32_bits_count(device, impl):
    size = 2**32 + 4101
    needed, free = 2 * size + 2**30, torch.cuda.mem_get_info(device)[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    w = torch.zeros(size, dtype=BF16, device=device)
    rft.perturb_(w, 1.0, draw=0, adaptive=False, noise="uniform", seed=8, impl=impl)
    for start in (0, 2**31 - 2048, 2**32 - 2048, size // 4 * 4 - 4096):
        got = w[start : start + 4100].cpu()  # the last one ends with the tensor, within a block
        words = reference.words(8, start // 4 + torch.arange(1025), 0, 0)
        same_bits(got, reference.noise(words, "uniform")[: len(got)].to(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("device", GPUS or [pytest.param(None, marks=pytest.mark.skip(reason="no GPU"))])
def test_tensors_on_two_devices_are_refused(device):
    w = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match=f"finetuned of tensor 0 is on cpu, the first output on {device}"):
        rft.interpolate_(w, w, torch.zeros(3), 0.5)


# ---------------------------------------------------------------- statistics


N = 1 << 21


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return rft.noise_like(torch.empty(N), seed=11, impl="native").numpy().astype(np.float64)


def test_normal_moments_and_distribution(normals):
    # Standard errors of the first four moments of N(0, 1); five of them is one failure in 10**6.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normals**power).mean() - mean) < 5 * math.sqrt(variance / N)
    assert stats.kstest(normals, "norm").pvalue > 1e-4
    assert 4.5 < np.abs(normals).max() < 6.7


@pytest.mark.parametrize("noise, cdf", [("uniform", stats.uniform(-1, 2).cdf)])
def test_uniform_distribution(noise, cdf):
    x = rft.noise_like(torch.empty(N), seed=12, noise=noise).numpy()
    assert stats.kstest(x, cdf).pvalue > 1e-4
    assert x.min() >= -1 and x.max() <= 1


def test_rademacher_and_mask_rates():
    x = rft.noise_like(torch.empty(N), seed=13, noise="rademacher")
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(x.mean()) < 5 / math.sqrt(N)
    for keep in (0.001, 0.1, 0.5, 0.999):
        rate = rft.keep_mask_like(torch.empty(N), keep, seed=14).float().mean().item()
        assert abs(rate - keep) < 5 * math.sqrt(keep * (1 - keep) / N)
    assert rft.keep_mask_like(torch.empty(1000), 1.0).all()
    assert not rft.keep_mask_like(torch.empty(1000), 0.0).any()


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).mean() * math.sqrt(len(a)))  # standard normal if independent


def test_neighbours_draws_seeds_and_purposes_are_independent(normals):
    others = {
        **{f"lag {lag}": (normals[:-lag], normals[lag:]) for lag in (1, 2, 3, 4, 5, 8, 16, 1024)},
    }
    for name, arguments in {
        "draw": {"seed": 11, "draw": 1},
        "low word of the seed": {"seed": 12},
        "high word of the seed": {"seed": 11 + 2**32},
    }.items():
        other = rft.noise_like(torch.empty(N), **arguments).numpy().astype(np.float64)
        others[name] = (normals, other)
    mask = rft.keep_mask_like(torch.empty(N), 0.5, seed=11).numpy() * 2.0 - 1
    others["mask"] = (normals, mask)
    others["mask, magnitude"] = ((normals**2 - 1) / math.sqrt(2), mask)
    squares = (normals**2 - 1) / math.sqrt(2)
    others["squares of neighbours"] = (squares[:-1], squares[1:])
    for name, (a, b) in others.items():
        assert abs(correlation(a, b)) < 5, name


def test_a_mask_does_not_depend_on_the_draw():
    w0, w1 = ends(1000)
    outs = [torch.empty(1000) for _ in range(2)]
    for draw, out in enumerate(outs):
        rft.write_(out, w0, w1, 1.0, keep=0.5, seed=3, draw=draw)
    same_bits(outs[0], outs[1])
    assert torch.equal(outs[0] != 0, rft.keep_mask_like(w1, 0.5, seed=3))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"alpha": math.nan}, ValueError),
        ({"alpha": math.inf}, ValueError),
        ({"alpha": "half"}, TypeError),
        ({"alpha": "0.5"}, TypeError),
        ({"alpha": 10**400}, ValueError),
        ({"alpha": -(10**5000)}, ValueError),
        ({"rho": b"1"}, TypeError),
        ({"rho": Fraction(10**400)}, ValueError),
        ({"keep": "1"}, TypeError),
        ({"keep": 10**400}, ValueError),
        ({"rho": -0.1}, ValueError),
        ({"rho": 1e39}, ValueError),
        ({"keep": 1.1}, ValueError),
        ({"keep": -0.1}, ValueError),
        ({"keep": math.nan}, ValueError),
        ({"on": "both"}, ValueError),
        ({"fill": "mean"}, ValueError),
        ({"noise": "cauchy"}, ValueError),
        ({"adaptive": 2}, TypeError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"seed": 1.5}, TypeError),
        ({"draw": 2**32}, ValueError),
        ({"draw": True}, TypeError),
        ({"sign": 0}, ValueError),
        ({"impl": "cuda"}, ValueError),
    ],
)
def test_bad_numbers_are_refused_and_nothing_is_written(arguments, error):
    w0, w1 = ends(10)
    out = torch.full((10,), 7.0)
    with refused(error, *arguments):
        rft.write_(out, w0, w1, **{"alpha": 0.5, **arguments})
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("call", "function"),
    [
        (lambda w: rft.interpolate_(w, w, torch.zeros(4), 0.5), "interpolate_"),
        (lambda w: rft.interpolate_(w, w, w, "half"), "interpolate_"),
        (lambda w: rft.perturb_(w, -1, draw=0), "perturb_"),
        (lambda w: rft.perturb_(w, 0.1, draw=0, impl="cuda"), "perturb_"),
        (
            lambda w: rft.perturb_(None, 0.1, draw=0),
            "perturb_",
        ),
        (
            lambda w: rft.noise_like(None),
            "noise_like",
        ),
        (lambda w: rft.noise_like([w, 3]), "noise_like"),
        (lambda w: rft.noise_like(w, seed=-1), "noise_like"),
        (lambda w: rft.keep_mask_like(None, 0.5), "keep_mask_like"),
        (lambda w: rft.keep_mask_like(w, 2), "keep_mask_like"),
        (lambda w: rft.write_(w, None, w, 0.5), "write"),
    ],
)
def test_errors_begin_with_the_name_of_the_function(call, function):
    with refused((TypeError, ValueError)) as caught:
        call(torch.zeros(3))
    assert str(caught.value).startswith(f"{function}: ")


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_may_come_in_any_iterable(impl):
    model, same = (torch.nn.Linear(3, 5) for _ in range(2))
    same.load_state_dict(model.state_dict())
    rft.perturb_(model.parameters(), 0.5, seed=3, draw=0, impl=impl)
    rft.perturb_(list(same.parameters()), 0.5, seed=3, draw=0, impl=impl)
    assert not torch.equal(rft.noise_like(model.parameters())[0], torch.zeros(5, 3))
    w1 = [torch.randn_like(p) for p in same.parameters()]
    for write in (rft.interpolate_, rft.write_):
        write(model.parameters(), model.parameters(), iter(w1), 0.3, impl=impl)
        write(list(same.parameters()), tuple(same.parameters()), w1, 0.3, impl=impl)
        for a, b in zip(model.parameters(), same.parameters(), strict=True):
            same_bits(a.detach(), b.detach())
    plan = Plan(model.parameters(), iter(w1), dict(enumerate(w1)).values(), impl, names=iter("ab"))
    plan.write(0.5)
    assert len(plan) == 2
    for a, b in zip(model.parameters(), w1, strict=True):
        same_bits(a.detach(), b)


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
@pytest.mark.parametrize("role", ["out", "zeroshot", "finetuned"])
def test_memory_that_was_freed_is_refused(role, impl, left):
    """As FSDP leaves its tensors between uses. The kernels would write into other people's memory."""
    tensors = {name: [torch.ones(4), torch.ones(10)[3:]] for name in ("out", "zeroshot", "finetuned")}
    tensors[role][1].untyped_storage().resize_(left)
    for make in (
        lambda: Plan(*tensors.values(), impl),
        lambda: rft.write_(*tensors.values(), 0.5, impl=impl),
    ):
        with refused(ValueError, f"{role} of tensor 1", "(7,)", left):
            make()
    with refused(ValueError, "perturb_", "0"):
        rft.perturb_(tensors[role][1], 0.1, draw=0, impl=impl)
    assert (tensors["out"][0] == 1).all()
    empty = torch.zeros(0)
    empty.untyped_storage().resize_(0)
    rft.perturb_([empty, torch.ones(4)[2:]], 0.1, draw=0, impl=impl)  # reaches its storage's very end


def test_a_plan_cannot_be_copied():
    w = torch.zeros(3)
    for impl in IMPLS:
        plan = Plan(w, w, w, impl)
        for duplicate in (copy.deepcopy, copy.copy, pickle.dumps):
            with refused(TypeError):
                duplicate(plan)


def overlapping():
    room = torch.zeros(100)
    return room[:50], room[25:75], torch.zeros(50)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (lambda: (torch.zeros(3), torch.zeros(3), torch.zeros(4)), ValueError),
        (lambda: (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3)), ValueError),
        (lambda: ([torch.zeros(3)] * 2, [torch.zeros(3)], [torch.zeros(3)]), ValueError),
        (lambda: (torch.zeros(3).double(), torch.zeros(3), torch.zeros(3)), TypeError),
        (lambda: (torch.zeros(3), torch.zeros(3).int(), torch.zeros(3)), TypeError),
        (lambda: (torch.zeros(3, 4).T, torch.zeros(4, 3), torch.zeros(4, 3)), ValueError),
        (lambda: (torch.zeros(3), torch.zeros(1).expand(3), torch.zeros(3)), ValueError),
        (lambda: ([1.0], [torch.zeros(1)], [torch.zeros(1)]), TypeError),
        (overlapping, ValueError),
        (
            lambda: (torch.zeros(3), torch.zeros(3, device="meta"), torch.zeros(3)),
            ValueError,
        ),
        (
            lambda: [torch.zeros(3, device="meta") for _ in range(3)],
            RuntimeError,
        ),
    ],
)
def test_bad_tensors_are_refused(tensors, error):
    out, w0, w1 = tensors()
    with refused(error):
        rft.interpolate_(out, w0, w1, 0.5)


def test_outputs_may_share_no_byte_with_another_row():
    a, b, c = torch.zeros(10), torch.zeros(10), torch.zeros(10)
    with refused(ValueError):
        Plan([a, a], [b, b], [c, c])  # one output twice
    with refused(ValueError):
        Plan([a, b], [b, c], [c, c])  # row 0's source is row 1's output
    with refused(ValueError):
        half = a.view(torch.float16)[:10]
        Plan([a], [half], [c.half()])  # the same address, another type
    room = torch.zeros(100)
    Plan([room[:50], room[50:]], [room[:50], room[50:]], [c.repeat(5)] * 2).write(0.5)  # adjacent


def test_an_explicit_backend_that_cannot_work_fails_loudly(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_missing", "no compiled module: no C++ compiler was found; reinstall")
    w0, w1 = ends(10)
    with refused(RuntimeError):
        rft.interpolate_(torch.empty(10), w0, w1, 0.5, impl="native")

    monkeypatch.setattr(registry, "_warned", set())
    out = torch.empty(10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            rft.interpolate_(out, w0, w1, 0.5)
            Plan(out, w0, w1).write(0.5)
    same_bits(out, torch.lerp(w0, w1, 0.5))
    (once,) = said
    assert issubclass(once.category, RuntimeWarning) and once.filename == __file__
    assert all(
        words in str(once.message) for words in ("slow reference", "cpu", "no C++ compiler", "reinstall")
    )
    assert "no: no compiled module: no C++ compiler was found; reinstall" in env.report()


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, ModuleNotFoundError("No module named 'rft_fast._native'"), "was never built"),
        ({"_native_missing.txt": "RFT_NATIVE=0 was set\n"}, ModuleNotFoundError(), "RFT_NATIVE=0 was set"),
        (
            {"_native.cpython-39-x.so": ""},
            ModuleNotFoundError(),
            "_native.cpython-39-x.so in .* another Python",
        ),
        (
            {"_native.abi.so": "", "_native_missing.txt": "old"},
            ImportError("GLIBC_2.99 not found"),
            "GLIBC_2.99",
        ),
    ],
)
def test_why_there_is_no_compiled_module(tmp_path, files, error, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert re.search(words, native.why_missing(error, tmp_path))


SETUP = pathlib.Path(__file__).resolve().parents[2] / "setup.py"


@pytest.mark.parametrize(
    ("own", "files", "reason"),
    [
        ({"RFT_NATIVE": "0"}, (), "RFT_NATIVE=0 was set at install time; unset it"),
        (
            {},
            ("bindings.cpp", "cpu.cpp", "cpu.h"),
            "lack csrc/cpu_formats.h, csrc/cpu_grid.h, csrc/cpu_lanes.h, csrc/cpu_norm.h, "
            "csrc/cpu_piece.cpp, csrc/cpu_placed.h, csrc/cpu_tiles.h, csrc/element.h",
        ),
        ({"CXX": "no-such-compiler"}, None, "no C++ compiler was found at install time (looked for no-such-"),
        ({"CXX": "false"}, None, "false could not compile csrc at install time"),
    ],
)
def test_an_install_without_the_module_says_why(tmp_path, own, files, reason):
    (tmp_path / "rft_fast").mkdir()
    shutil.copy(SETUP, tmp_path)
    shutil.copy(SETUP.parent / "rft_fast" / "__init__.py", tmp_path / "rft_fast")  # names the version
    sources = SETUP.parent / "csrc"
    shutil.copytree(sources, tmp_path / "csrc")
    for file in (tmp_path / "csrc").iterdir():
        if files is not None and file.name not in files:
            file.unlink()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RFT_")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=kept | own, capture_output=True, check=True)
    note = (tmp_path / "rft_fast" / "_native_missing.txt").read_text()
    assert reason in note and ";" in note
    insisting = subprocess.run(
        command, cwd=tmp_path, env=kept | {"RFT_NATIVE": "1"} | own, capture_output=True
    )
    assert own.get("RFT_NATIVE") == "0" or insisting.returncode != 0


def test_a_gpu_without_kernels_is_refused_with_the_reason(monkeypatch):
    gpu = torch.device("cuda", torch.cuda.device_count())  # one more than there are
    reason = native.why_not(gpu)
    assert reason is not None and ("CUDA says of cuda:" in reason or "no CUDA kernels:" in reason)
    monkeypatch.setattr(_native, "CUDA", False)
    with refused(RuntimeError, "RFT_CUDA=1"):
        registry.pick("native", gpu)
    assert "the tensors are on mps" in str(native.why_not(torch.device("mps")))
    assert "float64, which MPS does not have" in str(reference.why_not(torch.device("mps")))


@pytest.mark.parametrize("backend", [native, triton], ids=["native", "triton"])
def test_no_table_is_made_while_a_graph_is_captured(monkeypatch, backend):
    with FakeTensorMode():
        w = torch.empty(5, device="cuda")  # of a GPU that need not be there
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with refused(RuntimeError):
        backend.Table([Row(w, w, w, 0, "w")])


@pytest.mark.parametrize("captured", [None, 0, 1])
def test_captures_are_seen_on_the_current_device_and_the_tensors(monkeypatch, captured):
    current = [0]

    @contextlib.contextmanager
    def device(other):
        current.append(other.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == captured)
    assert capturing(torch.device("cuda", 1)) == (captured is not None)
    assert capturing(torch.device("cuda", 0)) == (captured == 0)
    assert not capturing(torch.device("cpu"))


def test_the_native_module_refuses_what_would_corrupt_memory():
    element = _native.Element(
        base=0,
        k=0.5,
        noise=0,
        scale=0,
        factor=1,
        interpolated=False,
        masked=False,
        threshold=0,
        fill_zeroshot=False,
        seed=0,
        draw=0,
    )
    for entry in ((0, 0, 0, 0, 0, 0, 4, 0), (1, 1, 1, 9, 0, 0, 4, 0), (1, 1, 1, 0, 0, 0, -1, 0)):
        with refused(ValueError):
            _native.Table([entry])
    with refused(ValueError):
        _native.Table([]).write([(0, 1)], [element], 1)
    with refused(ValueError, "mmx"):
        _native.Table([]).write([], [element], 1, "mmx")


# --- documentation ------------------------------------------------------------------------------------


def described(function) -> dict[str, str]:
    """Argument -> its text in the docstring's ``Args``."""
    section = inspect.getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    items = re.split(r"^    (?=\w)", section, flags=re.M)[1:]
    return {name: " ".join(text.split()) for name, _, text in (item.partition(":") for item in items)}


@pytest.mark.parametrize(
    "function",
    [
        rft.write_,
        rft.interpolate_,
        rft.perturb_,
        rft.add_,
        rft.noise_like,
        rft.keep_mask_like,
        rft.offsets,
        rft.Plan,
        Plan.write,
    ],
)
def test_every_argument_is_described(function):
    assert list(described(function)) == [
        name for name in inspect.signature(function).parameters if name != "self"
    ]


@pytest.mark.parametrize("function", [rft.write_, Plan.write])
def test_the_numbers_of_a_write_are_described_in_the_same_words(function):
    numbers = described(Write)
    assert {name: text for name, text in described(function).items() if name in numbers} == numbers
