"""Where noise starts: offsets, layouts and shards have the noise of their place in the whole model."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_cuda
from support.wording import refused
from torch import Tensor, nn

import rft_fast as rft
from rft_fast import _native
from rft_fast.kernels import Plan, native, reference
from rft_fast.kernels.contract import Write
from rft_fast.kernels.places import Place, place_of
from rft_fast.kernels.rows import Row

IMPLS = [
    "reference",
    "native",
    pytest.param("triton", marks=pytest.mark.emulated),
    pytest.param(tiny_cuda.NAME, marks=[pytest.mark.emulated, pytest.mark.slow]),
]


@pytest.fixture(autouse=True, scope="module")
def cuda_on_cpu() -> Any:
    with tiny_cuda.offered():
        yield


def words(block: int, purpose: int, seed: int, draw: int) -> tuple[int, ...]:
    counter = (block & 0xFFFFFFFF, block >> 32, draw if purpose == 0 else 0, purpose)
    return tuple(_native.philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))


def uniforms(positions: Any, seed: int = 0, draw: int = 0) -> Tensor:
    """The noise at positions of a model, element by element from the counter (DESIGN section 1)."""
    found = [words(int(p) // 4, 0, seed, draw)[int(p) % 4] for p in np.asarray(positions).flatten()]
    values = [np.float32(np.float32(x - 2**31) + 0.5) * np.float32(2.0**-31) for x in found]
    return torch.tensor(np.array(values, np.float32)).view(np.asarray(positions).shape)


def kept(positions: Any, keep: float, seed: int = 0) -> Tensor:
    found = [words(int(p) // 4, 1, seed, 0)[int(p) % 4] for p in np.asarray(positions).flatten()]
    return torch.tensor([x < round(keep * 2**32) for x in found]).view(np.asarray(positions).shape)


# ---------------------------------------------------------------- offsets


def test_offsets_are_sums_of_sizes_rounded_up_to_four() -> None:
    tensors = [torch.empty(5), torch.empty(0), torch.empty(2, 2), torch.empty(3, 3), torch.empty(())]
    assert rft.offsets(tensors) == [0, 8, 8, 12, 24]
    assert rft.offsets(tensors[0]) == 0
    assert rft.offsets(dict(zip("abcde", tensors, strict=True))) == dict(
        zip("abcde", (0, 8, 8, 12, 24), strict=True)
    )
    assert rft.offsets(nn.Linear(3, 5)) == {"weight": 0, "bias": 16}


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_of_a_part_is_that_part_of_the_whole(impl: Any) -> None:
    whole = [torch.empty(n) for n in (5, 9, 0, 33, 4)]
    at = rft.offsets(whole)
    eps = rft.noise_like(whole, seed=3, draw=2, impl=impl)
    mask = rft.keep_mask_like(whole, 0.4, seed=3, impl=impl)
    for i, tensor in enumerate(whole):
        assert torch.equal(rft.noise_like(tensor, seed=3, draw=2, offset=at[i], impl=impl), eps[i])
        assert torch.equal(rft.keep_mask_like(tensor, 0.4, seed=3, offset=at[i], impl=impl), mask[i])
    some = [3, 0, 4]
    picked = rft.noise_like([whole[i] for i in some], seed=3, draw=2, offset=[at[i] for i in some], impl=impl)
    assert all(torch.equal(a, eps[i]) for a, i in zip(picked, some, strict=True))
    follow = rft.noise_like(whole[3:], seed=3, draw=2, offset=at[3], impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(follow, eps[3:], strict=True))
    assert torch.equal(rft.noise_like(whole[3][8:], 3, 2, offset=at[3] + 8, impl=impl), eps[3][8:])


@pytest.mark.parametrize("impl", IMPLS)
def test_parameter_groups_get_the_noise_of_the_whole_model(impl: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    before = [p.detach().clone() for p in model.parameters()]
    rft.perturb_(model, 0.1, draw=4, impl=impl)
    expected = [p.detach().clone() for p in model.parameters()]
    decay = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim == 1]
    at = dict(zip(model.parameters(), rft.offsets(list(model.parameters())), strict=True))
    rft.interpolate_(model, before, before, 0)
    for group in (decay, other):
        rft.perturb_(group, 0.1, draw=4, offset=[at[p] for p in group], impl=impl)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    rft.interpolate_(model, before, before, 0)
    Plan(decay, decay, decay, impl, offsets=[at[p] for p in decay]).write(1.0, rho=0.1, draw=4)
    rft.write_(other, other, other, 1.0, rho=0.1, draw=4, offset=[at[p] for p in other], impl=impl)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_offsets_by_name_give_parts_the_noise_of_the_whole_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    at = rft.offsets(model)
    whole = rft.noise_like(model, draw=2)
    parts = {name: p for name, p in reversed(list(model.named_parameters())) if name != "0.bias"}
    for name, noise in rft.noise_like(parts, draw=2, offset=at).items():
        assert torch.equal(noise, whole[name])
    before = {name: p.detach().clone() for name, p in parts.items()}
    Plan(parts, before, before, offsets=at).write(1.0, rho=0.1, adaptive=False, draw=2)
    for name, p in parts.items():
        torch.testing.assert_close(p.detach().double(), before[name].double() + 0.1 * whole[name].double())
    with refused(TypeError, "offset"):
        rft.perturb_(list(parts.values()), 0.1, draw=0, offset=at)
    with refused(ValueError, "offset", "1.weight"):
        rft.perturb_(parts, 0.1, draw=0, offset={name: 0 for name in at if name != "1.weight"})
    with refused(TypeError, "rho"):  # of a whole model the dict has hundreds of entries
        rft.perturb_(model, dict.fromkeys(map(str, range(999)), 0.1), draw=0)


@pytest.mark.parametrize(
    ("offset", "error", "fact"),
    [
        (2, ValueError, 2),
        (-4, ValueError, -4),
        (2**65, ValueError, 2**65),
        (2**65 - 4, ValueError, 2**65 - 4),
        (4.0, TypeError, 4.0),
        (True, TypeError, True),
        ([0], ValueError, 2),
        ([0, 6], ValueError, "offset[1]"),
        ([0, 8], ValueError, "tensor 1"),
        ([8, 8], ValueError, "tensor 1"),
        ([16, 0], None, None),
        ([2**65 - 16, 2**65 - 32], None, None),
    ],
)
def test_offsets_that_are_refused(offset: Any, error: Any, fact: Any) -> None:
    w = [torch.ones(9), torch.ones(9)]
    if error is None:
        rft.perturb_(w, 0.1, draw=0, offset=offset)
        return
    with refused(error, "perturb_", fact):
        rft.perturb_(w, 0.1, draw=0, offset=offset)
    with pytest.raises(error):
        Plan(w, w, w, offsets=offset)
    with pytest.raises(error):
        rft.noise_like(w, offset=offset)
    assert all((x == 1).all() for x in w)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_numbers_of_the_counter_are_offered(impl: Any) -> None:
    for tensor in (torch.empty(12), torch.empty(3, 4).T, torch.empty(5)):
        start = 2**65 - 4 * (-(-tensor.numel() // 4))
        at = [start + i for i in range(tensor.numel())]
        got = rft.noise_like([tensor], 3, 2, "uniform", impl=impl, offset=[start])[0].flatten()
        assert torch.equal(got, uniforms(np.array(at, dtype=object), 3, 2))
        w = torch.ones_like(tensor)
        rft.write_(w, w, w, 1.0, keep=0.4, seed=3, impl=impl, offset=start)
        assert torch.equal(w.flatten() == 1, kept(np.array(at, dtype=object), 0.4, 3))


def test_offsets_may_be_an_array_or_a_tensor() -> None:
    w = [torch.empty(5), torch.empty(3)]
    expected = rft.noise_like(w, offset=[8, 0])
    for offset in (np.array([8, 0]), torch.tensor([8, 0])):
        got = rft.noise_like(w, offset=offset)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- layouts


def layouts() -> list[tuple[Tensor, Tensor]]:
    """Tensors in other orders of memory, and the position of each element."""
    found = []
    for shape, order in (
        ((3, 5, 2, 3), (0, 2, 3, 1)),  # channels_last
        ((2, 3, 2, 2, 5), (0, 2, 3, 4, 1)),  # channels_last_3d
        ((7, 5), (1, 0)),
        ((4, 1, 6), (2, 0, 1)),
        ((3, 2, 5, 2), (3, 2, 1, 0)),
        ((50, 45), (1, 0)),
    ):
        back = [order.index(axis) for axis in range(len(shape))]
        tensor = torch.randn([shape[axis] for axis in order]).permute(back)
        assert tensor.shape == shape
        found.append((tensor, torch.arange(tensor.numel()).view(shape)))
    return found


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_and_masks_follow_the_logical_index(impl: Any) -> None:
    tensors, positions = zip(*layouts(), strict=True)
    at = rft.offsets(tensors)
    for dtype in (torch.float32, torch.bfloat16):
        w1 = [t.to(dtype) for t in tensors]
        w0 = [torch.randn_like(t) for t in w1]
        out = [torch.empty_like(t) for t in w1]
        assert all(t.stride() == w.stride() for t, w in zip(out, tensors, strict=True))
        request: dict[str, Any] = {"rho": 0.2, "noise": "uniform", "keep": 0.7, "seed": 2**40 + 5, "draw": 9}
        rft.write_(out, w0, w1, 1.0, **request, impl=impl)
        for got, w, place, offset in zip(out, w1, positions, at, strict=True):
            masked = w.float() * kept(place + offset, 0.7, 2**40 + 5)
            eps = uniforms(place + offset, 2**40 + 5, 9)
            expected = masked + masked.abs() * torch.tensor(0.2) * eps
            assert torch.equal(got, expected.to(dtype))


@pytest.mark.slow(only="triton")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_a_permuted_copy_gets_the_bits_of_the_contiguous_one(impl: Any, noise: Any) -> None:
    tensors = [t for t, _ in layouts()]
    permuted, plain = [t.clone() for t in tensors], [t.contiguous() for t in tensors]
    for on in ("finetuned", "interpolated"):
        for w in (permuted, plain):
            out = [torch.empty_like(t) for t in w]
            rft.write_(out, [t / 2 for t in w], w, 0.3, 0.1, on, 0.5, "zeroshot", noise, impl=impl)  # type: ignore[arg-type]
            w[:] = out
        assert permuted[0].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(a, b) for a, b in zip(permuted, plain, strict=True))


def test_layouts_that_are_refused() -> None:
    w = torch.zeros(2, 3, 4, 5)
    last = w.contiguous(memory_format=torch.channels_last)
    with refused(ValueError, "zeroshot", "channels_last"):
        rft.interpolate_(last, w, last, 0.5)
    with refused(ValueError, "params"):
        rft.perturb_(torch.zeros(4, 6)[:, ::2], 0.1, draw=0)
    with refused(ValueError, "params", "resolve_neg"):
        rft.perturb_(torch.ones(4, dtype=torch.complex64).conj().imag.view(2, 2), 0.1, draw=0)
    with refused(ValueError, "(2, 3, 2, 3, 2)", 5):
        rft.perturb_(torch.zeros(2, 3, 2, 3, 2).permute(4, 3, 2, 1, 0), 0.1, draw=0)


def brute(place: Place, count: int) -> list[int]:
    """The position of each element in the order of memory."""
    indices = itertools.islice(itertools.product(*map(range, place.sizes)), count)
    return [place.start + sum(i * s for i, s in zip(index, place.strides, strict=True)) for index in indices]


def test_places_of_parts_are_the_indices_of_the_full_tensor() -> None:
    source = random.Random(0)
    for _ in range(200):
        shape = [source.randint(1, 6) for _ in range(source.randint(1, 4))]
        starts = [source.randrange(n) for n in shape]
        stops = [source.randint(a + 1, n) for a, n in zip(starts, shape, strict=True)]
        order = source.sample(range(len(shape)), len(shape))
        full = torch.arange(int(np.prod(shape))).view(shape)
        part = full[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))]
        back = [order.index(axis) for axis in range(len(shape))]
        local = part.permute(order).contiguous().permute(back)
        skipped, place = place_of(local, shape, starts)
        memory = local.as_strided((local.numel(),), (1,)).tolist()
        if place is None:
            assert memory == list(range(4 * skipped, 4 * skipped + len(memory)))
        else:
            assert skipped == 0 and memory == brute(place, len(memory))


@pytest.mark.parametrize("isa", native.isas())
def test_tiles_of_every_shape_have_the_noise_of_the_full_tensor(isa: str) -> None:
    """Parts of permuted tensors: runs of noise that are short, adjacent or unaligned, or in order."""
    source = random.Random(1)
    shapes = [(40, 3, 8, 8), (70, 90), (33, 37, 9), (5, 64, 3, 3), (1030, 3), (3, 1300), (2, 3, 4, 200)]
    for shape in [*shapes, *([source.randint(1, 30) for _ in range(3)] for _ in range(20))]:
        full = torch.empty(shape)
        at = 4 * source.choice([0, 2**32 - 7, 2**40 + 1])
        eps, mask = (
            rft.noise_like(full, 3, 2, "uniform", offset=at),
            rft.keep_mask_like(full, 0.4, 3, offset=at),
        )
        starts = [source.choice([0, source.randrange(n)]) for n in shape]
        cut = tuple(
            slice(a, source.choice([n, max(a + 1, n - 1)])) for a, n in zip(starts, shape, strict=True)
        )
        order = source.sample(range(len(shape)), len(shape))
        back = [order.index(axis) for axis in range(len(shape))]
        local = torch.ones_like(full)[cut].permute(order).contiguous().permute(back)
        skipped, place = place_of(local, shape, starts)
        out = torch.full_like(local, 7)
        row = Row(out, local, local, at // 4 + skipped, "w", place)
        native.Table([row]).write([(0, 1)], Write(1.0, 0.5, noise="uniform", seed=3, draw=2), isa)
        assert torch.equal(out, 1 + torch.tensor(0.5) * eps[cut])
        native.Table([row]).write([(0, 1)], Write(1.0, keep=0.4, seed=3), isa)
        assert torch.equal(out == 1, mask[cut])


@pytest.mark.parametrize("place", [None, Place(1, (4, 5), (1, 4))])
def test_the_reference_reads_no_data_while_it_writes(place: Any) -> None:
    """Hence it waits for no GPU and can be captured in a CUDA graph. Tensors on meta have no data."""
    w = torch.empty(20, device="meta")
    table = reference.Table([Row(torch.empty_like(w), w, w, 0, "w", place)])
    for noise in ("normal", "uniform", "rademacher"):
        table.write([(0, 1)], Write(0.5, 0.1, keep=0.5, noise=noise))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 1023, 5000])
def test_positions_where_the_high_word_of_the_block_changes(size: int) -> None:
    w = torch.randn(size)
    rows, expected = [], None
    for place in (Place(3, (size,), (1,)), Place(2, (size,), (7,))):
        for table in (reference.Table, native.Table):
            row = Row(torch.empty(size), w, w, 2**32 - 50, "w", place)
            table([row]).write([(0, 1)], Write(1.0, 0.1, noise="uniform", keep=0.5, seed=3))
            rows.append(row.out)
        assert torch.equal(rows[-1], rows[-2])
        eps = uniforms(4 * (2**32 - 50) + np.array(brute(place, size))[-20:], 3)
        mask = kept(4 * (2**32 - 50) + np.array(brute(place, size))[-20:], 0.5, 3)
        expected = w[-20:] * mask
        assert torch.equal(rows[-1][-20:], expected + expected.abs() * torch.tensor(0.1) * eps)
