"""Walks against whole forward passes: stages, variants, two towers, pieces, memory that runs out."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import PATIENCE
from support.tiny_models import (
    CLASSES,
    STARTS,
    Told,
    assert_plain,
    close,
    counted,
    dataset,
    deep,
    linears,
    plain,
    shaken,
    staged,
    transformer,
    two_towers,
)
from support.wording import refused, warned
from torch import Tensor, nn

from rft_fast import Path, studies
from rft_fast.clip.classifier import ZeroShotClassifier
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator, feed
from rft_fast.evaluate.batches import Batches, Need

pytestmark = pytest.mark.usefixtures("one_thread")

# --- stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [1, 2])
def test_scores_are_the_same_bits_from_every_stage(jump: int) -> None:
    model, sets = staged().train(), [dataset("a"), dataset("b", count=11)]
    evaluator = Evaluator(model, sets, batch_size=10)
    assert evaluator.stations == 3
    walk = evaluator.walk()
    for stage in range(0, 3, jump):
        walk.advance(stage)
        walk.advance(stage)  # no step is no harm
        assert walk.stage == stage
        with torch.no_grad():  # from here on what changes lies ahead
            for parameter in model[STARTS[stage] :].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(2):
            scores = walk.scores()
            for data in sets:
                assert torch.equal(scores[data.name].losses, plain(model, data, 10)), (stage, data.name)
                assert not scores[data.name].losses.is_inference()
    assert all(module.training for module in model.modules())
    assert torch.equal(evaluator.scores()["a"].losses, plain(model, sets[0], 10))


def test_a_walk_runs_no_stage_twice_and_does_not_turn_back() -> None:
    model = staged()
    evaluator = Evaluator(model, [dataset(count=20)], batch_size=10)
    with counted(*(model[start] for start in STARTS)) as batches:
        walk = evaluator.walk()
        walk.advance(1)
        walk.advance(2)
        assert batches == [[10, 10], [10, 10], []]
        for _ in range(2):
            walk.scores()
    assert batches == [[10, 10], [10, 10], [10, 10] * 2]
    for stage in (1, 3, -1):
        with refused(ValueError, "Walk.advance", 2, stage):
            walk.advance(stage)
        with refused(ValueError, "Walk.variants", stage):
            walk.variants(lambda k: None, 1, stage)
    assert walk.stage == 2


@pytest.mark.parametrize("start", [1, 2])
def test_modules_that_work_in_place_leave_what_a_walk_holds(start: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.LeakyReLU(0.5, inplace=True),
        nn.Flatten(),
        nn.ELU(inplace=True),
        nn.Linear(144, 20),
        nn.SiLU(inplace=True),
        nn.Linear(20, 6),
    )
    data = dataset()
    evaluator = Evaluator(model, [data], batch_size=10)
    assert evaluator.stations == 3
    walk = evaluator.walk()
    walk.advance(start)
    for _ in range(3):
        assert torch.equal(walk.scores()["set"].losses, plain(model, data, 10))
        walk.variants(lambda k: None, 3, start)
    walk.advance(2)
    assert torch.equal(walk.scores()["set"].losses, plain(model, data, 10))


def test_what_is_behind_a_walk_is_not_seen() -> None:
    """So that the tests of stages could fail: held activations do not follow the weights."""
    model, data = staged(), dataset()
    walk = Evaluator(model, [data], batch_size=10).walk()
    walk.advance(1)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.allclose(walk.scores()["set"].losses, plain(model, data, 10))


def test_images_that_are_a_file_in_memory_are_scored(tmp_path: File) -> None:
    model, data = deep(), dataset()
    data.images.numpy().tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "c", shape=(37, 3, 8, 8))
    images = torch.from_numpy(mapped)
    evaluator = Evaluator(model, [dataset("set", images=images), dataset("b", count=5)], batch_size=10)
    assert evaluator.feeds[0].images.data_ptr() == mapped.ctypes.data  # no copy
    walk = evaluator.walk()
    walk.advance(2)
    close(walk.scores()["set"].losses, plain(model, data))
    close(evaluator.parts(20, "set")[1].scores()["set"].losses, plain(model, data)[20:])
    assert (tmp_path / "images").read_bytes() == data.images.numpy().tobytes()


def test_an_evaluator_leaves_memory_when_it_is_let_go() -> None:
    gc.collect()
    gc.disable()
    try:
        evaluator = Evaluator(deep(), [dataset()])
        evaluator.scores()
        gone = weakref.ref(evaluator)
        del evaluator
        assert gone() is None
    finally:
        gc.enable()


# --- variants -------------------------------------------------------------------------------------


def setter(model: nn.Module, stations: range) -> tuple[Callable[[int], None], list[list[Tensor]]]:
    """A write of different weights for each k into all stages of ``deep`` among the stations."""
    chosen = [p for station in stations for p in linears(model)[station].parameters()]
    generator = torch.Generator().manual_seed(7)
    values = [[torch.randn(p.shape, generator=generator) for p in chosen] for _ in range(30)]

    @torch.no_grad()
    def write(k: int) -> None:
        for parameter, value in zip(chosen, values[k], strict=True):
            parameter.copy_(value)

    return write, values


SETS = {
    "smaller than a batch": (5,),
    "unequal": (5, 12, 1),
    "a full batch": (16,),
    "more than a batch": (37, 3),
}


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("counts", SETS.values(), ids=SETS)
def test_variants_are_those_of_writing_and_scoring_one_by_one(first: int, counts: tuple[int, ...]) -> None:
    model = deep()
    sets = [dataset(f"set{i}", count, seed=i) for i, count in enumerate(counts)]
    evaluator = Evaluator(model, sets, batch_size=16)
    assert evaluator.stations == 4
    walk = evaluator.walk()
    walk.advance(first)
    for last in range(first, 4):
        write, _ = setter(model, range(first, last + 1))
        for count in (1, 2, 7, 30):
            found = walk.variants(write, count, last)
            assert len(found) == count
            for k, scores in enumerate(found):
                write(k)
                assert_plain(scores, model, sets)
                assert not any(s.losses.is_inference() or s.correct.is_inference() for s in scores.values())
    assert walk.variants(write, 0, 3) == []


def test_hits_of_variants_belong_to_their_images() -> None:
    model, sets = deep(), [dataset("a", 7), dataset("b", 9)]
    walk = Evaluator(model, sets, batch_size=16).walk()
    write, _ = setter(model, range(1))
    found = walk.variants(write, 5, 0)
    for k in range(5):
        write(k)
        alone = Evaluator(model, sets, batch_size=16).scores()
        for name in ("a", "b"):
            assert torch.equal(found[k][name].correct, alone[name].correct)
    assert len({tuple(scores["a"].correct.tolist()) for scores in found}) > 1


def test_what_is_before_runs_once_and_what_follows_in_shared_batches() -> None:
    model, data = deep(), dataset(count=5)
    evaluator = Evaluator(model, [data], batch_size=16)
    walk = evaluator.walk()
    one, two, three, four = linears(model)
    write, _ = setter(model, range(1, 3))
    with counted(one, two, three, four) as (first, second, third, fourth):
        walk.advance(1)
        walk.variants(write, 24, 2)
    assert first == [5]
    assert second == third == [5] * 24  # of every variant
    assert fourth == [16] * 7 + [8]  # 24 * 5 images; full batches keep 8 cores busy, so all are one group
    # A set that fills a batch goes alone, and so does the last stage.
    full = Evaluator(model, [dataset(count=128)], batch_size=16).walk()
    with counted(two, four) as (second, fourth):
        full.advance(1)
        second.clear()
        full.variants(write, 3, 2)
    assert second == fourth == [16] * 24
    with counted(three, four) as (third, fourth):
        walk.variants(write, 3, 3)
    assert third == fourth == [5] * 3


def test_a_write_of_later_stages_would_be_noticed() -> None:
    """So that the tests of groups could fail: what follows takes the weights that the last variant left."""
    model, data = deep(), dataset(count=5)
    walk = Evaluator(model, [data], batch_size=16).walk()
    write, values = setter(model, range(0, 4))
    found = walk.variants(write, 3, 1)
    write(0)
    assert not torch.allclose(found[0]["set"].losses, plain(model, data))
    write(2)
    close(found[2]["set"].losses, plain(model, data))
    with torch.no_grad():
        for parameter, value in zip(linears(model)[0].parameters(), values[0][:2], strict=True):
            parameter.copy_(value)
        for parameter, value in zip(linears(model)[1].parameters(), values[0][2:4], strict=True):
            parameter.copy_(value)
    close(found[0]["set"].losses, plain(model, data))


def test_without_room_for_a_group_variants_go_one_by_one() -> None:
    model, data = deep(), dataset(count=5)
    # (12 + 8) * 4 bytes are held of an image at worst, for which 30 % of the limit is meant.
    evaluator = Evaluator(model, [data], batch_size=16, memory_limit=2000)
    assert evaluator.pieces() == [evaluator]
    walk = evaluator.walk()
    walk.advance(1)
    write, _ = setter(model, range(1, 2))
    with counted(*linears(model)) as batches:
        found = walk.variants(write, 4, 1)
    assert batches[1:] == [[5] * 4] * 3
    for k in range(4):
        write(k)
        assert_plain(found[k], model, [data])


def test_groups_do_not_depend_on_the_number_of_threads() -> None:
    model, data = transformer(layers=2), dataset(count=9)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            walk = Evaluator(model, [data]).walk()
            walk.advance(1)
            found.append([scores["set"].losses for scores in walk.variants(lambda k: None, 11, 1)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_masks_of_the_input_reach_across_variants() -> None:
    """A stage that looks at the chain's input again gets that of its own image, in any copy."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            x = self.two(self.one(images.flatten(1)).relu())
            # Derived from the input without weights, so that nothing but x need go on.
            bright = (images.amax((1, 2, 3)) > 3.1).float() + images.amin((1, 2, 3))
            out: Tensor = self.three(x) * bright[:, None]
            return out

    torch.manual_seed(0)
    model, sets = Late(), [dataset("a", 5), dataset("b", 3)]
    evaluator = Evaluator(model, sets, batch_size=7)
    assert evaluator.stations == 3 and evaluator.stages.image[-1].reads_inputs
    walk = evaluator.walk()
    walk.advance(1)

    @torch.no_grad()
    def write(k: int) -> None:
        model.two.weight.fill_(0.1 * k)

    with counted(model.three) as (batches,):
        found = walk.variants(write, 5, 1)
    assert 7 in batches
    for k in range(5):
        write(k)
        assert_plain(found[k], model, sets)


# --- two towers -----------------------------------------------------------------------------------


@contextmanager
def towers(model: ZeroShotClassifier) -> Iterator[tuple[list[int], list[int]]]:
    """Sizes of the batches that the first layers of the image tower and of the text tower take."""
    with counted(model.visual.conv1, model.text.token_embedding) as (image, text):  # type: ignore[arg-type]
        yield image, text


def shake(tensors: list[Tensor], k: int = 0) -> None:
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)


@pytest.mark.slow
def test_both_towers_at_every_station() -> None:
    model, sets = two_towers(), [dataset("a", 11), dataset("b", 4)]
    evaluator = Evaluator(model, sets, batch_size=5)
    images, text = len(evaluator.stages.image), len(evaluator.stages.text)
    assert evaluator.stations == images + text + 2 and images > 3 and text > 2
    assert_plain(evaluator.scores(), model, sets)
    chains = [*evaluator.stages.text, *evaluator.stages.image]
    for jump in (1, 3):
        walk = evaluator.walk()
        for station in range(0, evaluator.stations, jump):
            walk.advance(station)
            assert_plain(walk.scores(), model, sets)
            if station == 0:
                continue
            own = list(chains[station - 1].tensors) if station <= len(chains) else [model.logit_scale]
            own = [t for t in own if t.is_floating_point()]
            kept = [tensor.clone() for tensor in own]
            assert evaluator.stage_of(own) <= station  # some tensors may be read by earlier ones, too
            if evaluator.stage_of(own) == station:
                for count in (1, 5):
                    found = walk.variants(lambda k, own=own: shake(own, k), count, evaluator.span(own)[1])
                    for k, scores in enumerate(found):
                        shake(own, k)
                        assert_plain(scores, model, sets)
            with torch.no_grad():
                for tensor, value in zip(own, kept, strict=True):
                    tensor.copy_(value)
        walk.advance(evaluator.stations - 1)
        assert_plain(walk.scores(), model, sets)


def test_a_change_in_one_tower_does_not_run_the_other() -> None:
    model, data = two_towers(), dataset(count=11)
    evaluator = Evaluator(model, [data], batch_size=50)
    late_text = list(model.text.transformer.resblocks[1].parameters())
    late_image = list(model.visual.transformer.resblocks[1].parameters())
    (t0, t1), (i0, i1) = evaluator.span(late_text), evaluator.span(late_image)
    text = len(evaluator.stages.text)
    assert 1 < t0 <= t1 <= text < i0 <= i1 < evaluator.stations - 1
    walk = evaluator.walk()
    with towers(model) as (image, prompts):
        walk.advance(t0)
        assert image == [11] and prompts == [12]
        found = walk.variants(lambda k: shake(late_text, k), 3, t1)
        assert image == [11] and prompts == [12]
    for k in range(3):
        shake(late_text, k)
        assert_plain(found[k], model, [data])
    with towers(model) as (image, prompts):
        walk.advance(i0)  # turns to the images: up to there once, from the start; the text goes on
        assert image == [11] and prompts == []
        found = walk.variants(lambda k: shake(late_image, k), 3, i1)
        assert image == [11] and prompts == []
    for k in range(3):
        shake(late_image, k)
        assert_plain(found[k], model, [data])
    with towers(model) as (image, prompts):
        walk.advance(evaluator.stations - 1)
        blocks = list(evaluator.span([model.logit_scale]))
        found = walk.variants(lambda k: shake([model.logit_scale], k), 3, evaluator.stations - 1)
        assert image == prompts == []
    assert blocks == [evaluator.stations - 1] * 2
    for k in range(3):
        shake([model.logit_scale], k)
        assert_plain(found[k], model, [data])


def test_variants_of_an_image_stage_share_the_rest_with_two_towers() -> None:
    model = two_towers()
    evaluator = Evaluator(model, [dataset(count=11)], batch_size=50)
    block = model.visual.transformer.resblocks[0]
    station, last = evaluator.span(block.attn.parameters())
    assert station == last and last + 1 == evaluator.stage_of(block.mlp.parameters())
    walk = evaluator.walk()
    walk.advance(station)
    with counted(block.attn, block.mlp.c_fc) as (varied, after):
        walk.variants(lambda k: None, 3, last)
    assert varied == [11] * 3 and after == [33]


def test_stations_of_tensors_of_both_towers() -> None:
    model = two_towers()
    evaluator = Evaluator(model, [dataset(count=3)])
    last = evaluator.stations - 1
    text, image = model.text.transformer.resblocks[0], model.visual.transformer.resblocks[0]
    of_text, of_image = list(text.parameters()), list(image.parameters())
    first = evaluator.stage_of(of_text)
    assert 0 < first <= len(evaluator.stages.text) < evaluator.stage_of(of_image)
    assert evaluator.span([*of_text, *of_image]) == (0, last)
    assert evaluator.span([*of_text, *of_image, model.logit_scale]) == (0, last)
    assert evaluator.span([*of_text, model.logit_scale]) == (first, last)
    assert evaluator.span([*of_image, model.logit_scale])[1] == last
    assert evaluator.span([model.logit_scale]) == (last, last)
    walk = evaluator.walk()
    walk.advance(first)
    stage = evaluator.stage_of(of_image)
    with refused(ValueError, first, len(evaluator.stages.text), last, stage):
        walk.variants(lambda k: None, 1, stage)
    both = [*of_text, model.logit_scale]
    found = walk.variants(lambda k: shake(both, k), 3, last)
    for k in range(3):
        shake(both, k)
        assert_plain(found[k], model, evaluator.datasets)
    whole = [*of_text, *of_image]
    found = evaluator.walk().variants(lambda k: shake(whole, k), 3, last)
    for k in range(3):
        shake(whole, k)
        assert_plain(found[k], model, evaluator.datasets)


def test_a_text_tower_too_large_to_hold_runs_from_its_beginning() -> None:
    model, data = two_towers(), dataset(count=3)
    evaluator = Evaluator(model, [data], batch_size=50, memory_limit=5000)
    weights = list(model.text.transformer.resblocks[1].parameters())
    first, last = evaluator.span(weights)
    walk = evaluator.walk()
    with warned(UserWarning, 12):
        walk.advance(first)
    with towers(model) as (image, text):
        found = walk.variants(lambda k: shake(weights, k), 2, last)
    assert image == [] and text == [12, 12]
    for k in range(2):
        shake(weights, k)
        assert_plain(found[k], model, [data])
    walk.advance(evaluator.stations - 1)
    assert_plain(walk.scores(), model, [data])


def test_few_prompts_are_run_to_check_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of prompts would take minutes before anything is scored."""
    model = two_towers(templates=50)
    with counted(model.text.token_embedding) as (prompts,):
        Evaluator(model, [dataset("a", 3), dataset("b", 3)])
    assert prompts and max(prompts) <= 3
    with refused(ValueError, "Evaluator", "set", "3x16x16"):
        Evaluator(model, [dataset(images=torch.zeros(37, 3, 16, 16).byte())])
    with refused(ValueError, "Evaluator", "set", CLASSES):
        Evaluator(model, [dataset(labels=torch.full((37,), CLASSES))])


# --- pieces ---------------------------------------------------------------------------------------


def studied(limit: int | None) -> tuple[Path, Evaluator]:
    zeroshot, finetuned = transformer(layers=2), shaken(transformer(layers=2), 0.2)
    path = Path(transformer(layers=2), zeroshot, finetuned)
    sets = [dataset("a", 23), dataset("b", 10, seed=4)]
    return path, Evaluator(path.model, sets, batch_size=8, memory_limit=limit)


STUDIES: dict[str, Callable[..., pd.DataFrame]] = {
    "layers": lambda p, e, **k: studies.layerwise_interpolation(p, e, [0, 0.5, 1], **k),
    "layers around the fine-tuned": lambda p, e, **k: studies.layerwise_interpolation(
        p, e, [0, 0.5, 1], others="finetuned", **k
    ),
    "cumulative": lambda p, e, **k: studies.cumulative_interpolation(
        p, e, [0, 0.5, 1], directions=["first", "last"], **k
    ),
    "sharpness": lambda p, e, **k: studies.sharpness(p, e, [0, 0.5], [0.1, 0.2], 4, **k),
    "layer sharpness": lambda p, e, **k: studies.layerwise_sharpness(p, e, [0, 0.5], [0.1, 0.2], 4, **k),
    "parts": lambda p, e, **k: studies.layerwise_sharpness(
        p, e, [0.5], [0.1], 4, protocol=studies.Protocol(noise_batch=7), **k
    ),
    "gradient": lambda p, e, **k: studies.layerwise_sharpness(
        p, e, [0.5], [0.05], 4, protocol=studies.Protocol(estimator="gradient"), **k
    ),
    "plain, until": lambda p, e, **k: studies.sharpness(
        p, e, [0.5], [0.2], 4, protocol=studies.Protocol(estimator="plain", goal=1e-3, most=8), **k
    ),
}


@pytest.mark.slow(but="^plain, until$")
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_pieces_change_no_row(study: Callable[..., pd.DataFrame]) -> None:
    rows, told = [], []
    for limit in (None, 8_000):
        path, evaluator = studied(limit)
        assert (len(evaluator.pieces()) == 1) == (limit is None)
        assert [len(p) for p in evaluator.pieces()[-1].feeds][-1] <= 10
        told.append(Told())
        before = path.checksum()
        rows.append(study(path, evaluator, model="m", sink=told[-1]))
        assert path.checksum() == before
    df = ["sharpness_df", "sharpness_change_df"]  # ratios of variances, which magnify roundings
    pd.testing.assert_frame_equal(*(frame[df] for frame in rows), rtol=1e-2, check_exact=False)
    whole, pieced = (frame.drop(columns=["seconds", *df]) for frame in rows)
    assert len(whole) and told[0].numbers == told[1].numbers
    pd.testing.assert_frame_equal(whole, pieced, rtol=1e-6, atol=1e-6, check_exact=False)


def test_pieces_cover_every_image_once_in_order() -> None:
    _, evaluator = studied(8_000)
    pieces = evaluator.pieces()
    for data in evaluator.datasets:
        images = [p.datasets[0].images for p in pieces if p.datasets[0].name == data.name]
        assert len(images) > 1 and torch.equal(torch.cat(images), data.images)
    held = [0, 0]
    x = evaluator.feeds[0].prepare(slice(0, 1))
    for stage in evaluator.stages.image:
        x = stage.run(x, x)
        held.append(x.nbytes)
    # While activations change their shape, there are two of them.
    assert max(len(p.feeds[0]) for p in pieces) * (max(held) + 1) <= 0.3 * 8_000
    part = evaluator.parts(9, "a")[0]
    assert torch.cat([p.datasets[0].images for p in part.pieces()]).equal(part.datasets[0].images)


# --- memory that runs out -------------------------------------------------------------------------

ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words"),
    "CPU": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@contextmanager
def no_more_than(images: int, modules: list[nn.Linear], error: Exception) -> Iterator[list[int]]:
    """Batches that go through the modules; larger ones find no memory."""
    seen: list[int] = []

    def check(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(len(arguments[0]))
        if seen[-1] > images:
            raise type(error)(*error.args)

    handles = [module.register_forward_pre_hook(check) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def advance_in_place(evaluator: Evaluator) -> list[Tensor]:
    walk = evaluator.walk()
    walk.advance(1)
    held = walk.flows[0].held
    assert held is not None
    walk.advance(2)
    assert walk.flows[0].held is held  # the same shape: overwritten
    return [scores.losses for scores in walk.scores().values()]


def advance_anew(evaluator: Evaluator) -> list[Tensor]:
    walk = evaluator.walk()
    walk.advance(3)
    return [scores.losses for scores in walk.scores().values()]


def vary(evaluator: Evaluator) -> list[Tensor]:
    write, _ = setter(evaluator.model, range(1, 3))
    walk = evaluator.walk()
    walk.advance(1)
    found = [scores.losses for variant in walk.variants(write, 9, 2) for scores in variant.values()]
    write(0)
    return found


def weights(evaluator: Evaluator) -> list[Tensor]:
    return list(evaluator.model.parameters())


PLACES: dict[str, Callable[[Evaluator], list[Tensor]]] = {
    "scores": lambda e: [scores.losses for scores in e.scores().values()],
    "advance in place": advance_in_place,
    "advance to another shape": advance_anew,
    "variants": vary,
    "gradient": lambda e: e.gradient(weights(e))[1],
    "curvature": lambda e: [e.curvature(weights(e), [torch.ones_like(w) for w in weights(e)])],
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_batches_that_do_not_fit_are_halved(
    place: Callable[[Evaluator], list[Tensor]], error: Exception, layer: int
) -> None:
    sets = [dataset("a", 45), dataset("b", 3)]
    model = deep()
    expected = [tensor.clone() for tensor in place(Evaluator(model, sets, batch_size=16))]
    model = deep()
    evaluator = Evaluator(model, sets, batch_size=16)
    with (
        no_more_than(5, [linears(model)[layer]], error) as seen,
        warned(UserWarning, "16 images", "8 images", "cpu", 4, "--batch-size") as caught,
    ):
        found = place(evaluator)
        failed = [n for n in seen if n > 5]
        seen.clear()
        place(evaluator)
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
    assert failed == [16, 8] and max(seen) == 4  # no larger one was tried again
    assert len(caught) == 2


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_one_image_that_does_not_fit(place: Callable[[Evaluator], list[Tensor]]) -> None:
    model = deep()
    evaluator = Evaluator(model, [dataset("a", 20)], batch_size=2)
    with (
        no_more_than(0, [linears(model)[1]], ERRORS["GPU"]),
        warnings.catch_warnings(),
        refused(MemoryError, "Evaluator", "cpu"),
    ):
        warnings.simplefilter("ignore")
        place(evaluator)
    assert not any(hasattr(w, "grad") and w.grad is not None for w in weights(evaluator))


def test_what_does_not_fit_is_said_when_the_evaluator_is_made() -> None:
    model = deep()
    for error in ERRORS.values():
        with (
            no_more_than(0, linears(model)[:1], error),
            refused(MemoryError, "cpu"),
        ):
            Evaluator(model, [dataset()])


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_other_errors_pass_untouched(place: Callable[[Evaluator], list[Tensor]]) -> None:
    model = deep()
    evaluator = Evaluator(model, [dataset("a", 20)], batch_size=16)
    error = RuntimeError("something else")
    with (
        no_more_than(5, [linears(model)[1]], error) as seen,
        pytest.raises(RuntimeError, match="something else"),
    ):
        place(evaluator)
    assert seen == [16]


def test_what_is_held_may_not_fit_either(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Evaluator(deep(), [dataset()]).walk()

    def fail(*_: Any) -> Tensor:
        raise ERRORS["GPU"]

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", fail)
        with refused(MemoryError):
            walk.advance(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("text", [False, True])
def test_a_walk_that_was_interrupted_can_go_on(error: type[BaseException], text: bool) -> None:
    """Half of the activations had been replaced by later ones."""
    model = two_towers() if text else deep()
    sets = [dataset("a", 20), dataset("b", 7)]
    evaluator = Evaluator(model, sets, batch_size=4)
    walk = evaluator.walk()
    start = evaluator.stage_of(model.visual.transformer.resblocks[0].parameters()) if text else 1
    stop = model.visual.transformer.resblocks[0].attn if text else linears(model)[1]
    walk.advance(start)
    calls = 0

    def strike(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the second set
            raise error

    handle = stop.register_forward_pre_hook(strike)
    with pytest.raises(error):
        walk.advance(start + 1)
    handle.remove()
    assert walk.stage == start
    assert_plain(walk.scores(), model, sets)
    with torch.no_grad():
        for parameter in stop.parameters():
            parameter.mul_(1.5)
    assert_plain(walk.scores(), model, sets)
    walk.advance(start + 1)
    assert_plain(walk.scores(), model, sets)


def test_all_threads_rest_when_one_fails() -> None:
    """A forward pass that goes on would change batch statistics as soon as the model trains again."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, CLASSES)).train()
    before = torch.get_num_threads()
    calls, lock, failed, another = 0, threading.Lock(), threading.Event(), threading.Event()
    trained: list[bool] = []

    def hook(module: nn.Module, arguments: Any) -> None:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls
        if mine == 1:
            assert another.wait(PATIENCE)  # on a busy machine the first may fail before another begins
            failed.set()
            raise ValueError("the first")
        another.set()
        failed.wait()
        threading.Event().wait(0.3)
        trained.append(module.training)

    evaluator = Evaluator(model, [dataset(count=40)], batch_size=2)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        torch.set_num_threads(3)
        _ = evaluator.runtime.images.need  # the meter, too, calls hooks
        handle = model[0].register_forward_pre_hook(hook)
        with pytest.raises(ValueError, match="the first"):
            evaluator.scores()
        assert torch.get_num_threads() == 3
        assert len(trained) == calls - 1 > 0 and not any(trained)  # all that had begun have ended
        handle.remove()
        for name, value in model.state_dict().items():
            assert torch.equal(value, statistics[name]), name
        assert all(module.training for module in model.modules())
        assert_plain(evaluator.scores(), model, evaluator.datasets)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3])
def test_batches_are_halved_side_by_side_too(threads: int) -> None:
    model, data = deep(), dataset(count=64)
    expected = plain(model, data)
    evaluator = Evaluator(model, [data], batch_size=16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with (
            no_more_than(5, [linears(model)[1]], ERRORS["CPU"]) as seen,
            warned(UserWarning, 16, 8, 4) as caught,
        ):
            losses = evaluator.scores()["set"].losses
            tried = len(seen)
            evaluator.scores()
    finally:
        torch.set_num_threads(before)
    close(losses, expected)
    assert len(caught) == 2 and max(seen[tried:]) == 4


# --- batches --------------------------------------------------------------------------------------


def test_automatic_batches_fit_the_memory_limit() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, CLASSES))
    data = dataset(count=600)
    # The convolution's result and the ReLU's, 64 * 8 * 8 float32 each: 32 KiB an image.
    image = 2 * 64 * 64 * 4
    for limit, size in ((None, 128), (10**9, 128), (image * 50 * 5, 50), (image * 5, 1), (1, 1)):
        evaluator = Evaluator(wide, [data], memory_limit=limit)
        assert abs(evaluator.runtime.images.size(600) - size) <= size // 10, limit
    assert Evaluator(wide, [data]).runtime.images.size(511) == 64
    stated = Evaluator(wide, [data], batch_size=100, memory_limit=image * 50)
    assert stated.runtime.images.size(600) == stated.runtime.images.size(5) == 100
    with counted(wide[0]) as (batches,):
        scores = stated.scores()
    assert batches == [100] * 6
    close(scores["set"].losses, plain(wide, data))


@pytest.mark.slow
def test_derivatives_have_smaller_batches_where_memory_is_scarce() -> None:
    model, data = transformer(layers=2), dataset(count=600)
    tight = Evaluator(model, [data], memory_limit=3_000_000)
    plenty = Evaluator(model, [data])
    b, p = tight.runtime, plenty.runtime
    scores, slopes, curves = (batches.size(600) for batches in (b.images, b.slopes, b.curvatures))
    assert 1 <= curves < slopes < scores <= p.slopes.size(600) == p.curvatures.size(600) == 128
    loss, gradient = tight.gradient(list(model.parameters()))
    other, expected = plenty.gradient(list(model.parameters()))
    assert loss == pytest.approx(other, rel=1e-5)
    for got, truth in zip(gradient, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-3, atol=1e-5)


def test_batches_do_not_depend_on_threads_and_threads_fit_in_memory() -> None:
    def batches(room: int) -> Batches:
        need = Need(fixed=100, each=10)
        return Batches(torch.device("cpu"), None, 1000, room, lambda: need, lambda: None)

    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append([batches(room).size(n) for room in (1, 700, 10**6) for n in (5, 600)])
            assert batches(10**6).workers(100, 64) == threads
            assert batches(10**6).workers(3, 64) == min(3, threads)
            assert batches(2 * (100 + 640)).workers(100, 64) == min(2, threads)
            assert batches(1).workers(100, 64) == 1
            assert batches(10**6).together(64, 0) == threads  # whose one batch keeps one worker busy
            assert batches(10**6).together(100, 0) == -(-threads // 2)
            assert batches(10**6).together(6000, 0) == 1
            assert batches(2 * (900 + 740)).together(64, 900) == min(2, threads)
            assert batches(900 + 740).together(64, 900) == batches(1).together(64, 900) == 1
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == [1, 1, 60, 60, 64, 128]
    unknown = Batches(torch.device("cpu"), None, 1, 5, Need, lambda: None)
    assert unknown.size(600) == 128


class Listed:
    """A source of samples that tells in which order it is asked."""

    def __init__(self, name: str, samples: int, log: list[str]) -> None:
        self.name, self.samples, self.log = name, samples, log

    def __len__(self) -> int:
        return self.samples

    def ahead(self, batch: slice) -> None:
        self.log.append(f"ahead {self.name}{batch.start}:{batch.stop}")


def test_each_batch_is_sent_for_while_the_one_before_is_computed() -> None:
    log: list[str] = []
    batches = Batches(torch.device("cpu"), 4, 1, 10**6, Need, lambda: None)

    def work(source: Listed, batch: slice) -> int:
        log.append(f"work {source.name}{batch.start}:{batch.stop}")
        if batch.stop - batch.start > 3:
            raise ERRORS["GPU"]
        return batch.start

    with warned(UserWarning, 4, 2):
        batches.map([Listed("a", 5, log), Listed("b", 4, log)], work, lambda s, b, r: log.append("take"))
    assert log == [
        "work a0:4",
        *("work a0:2", "ahead a2:4", "take"),
        *("work a2:4", "ahead a4:5", "take"),
        *("work a4:5", "ahead b0:2", "take"),  # as large as it will be asked for
        *("work b0:2", "ahead b2:4", "take"),
        *("work b2:4", "take"),
    ]


class Arriving:
    """Stands in for the stream to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.started: list[tuple[int, int]] = []
        self.taken: list[tuple[int, int]] = []

    def start(self, images: Tensor, batch: slice) -> None:
        self.started.append((batch.start, batch.stop))

    def take(self, images: Tensor, batch: slice) -> Tensor:
        self.taken.append((batch.start, batch.stop))
        return images[batch]


def test_streamed_images_are_asked_for_ahead_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_Stream", Arriving)
    model, data = deep(), dataset(count=10)
    evaluator = Evaluator(model, [data], batch_size=4)
    evaluator.feeds[0]._stream = stream = Arriving(evaluator.device)  # type: ignore[assignment]
    walk = evaluator.walk()
    walk.advance(1)
    assert stream.started == [(4, 8), (8, 10)] and stream.taken == [(0, 4), (4, 8), (8, 10)]
    close(walk.scores()["set"].losses, plain(model, data))
    assert len(stream.taken) == 3  # held by now
    part = evaluator.parts(6, "set")[1]
    close(part.scores()["set"].losses, plain(model, data)[6:])
    assert len(stream.taken) == 3 and part.feeds[0]._stream.taken == [(0, 4)]  # type: ignore[union-attr]


def test_a_dataset_is_not_written_to() -> None:
    data: Dataset = dataset()
    before = data.images.clone()
    Evaluator(deep(), [data]).scores()
    assert torch.equal(data.images, before)
