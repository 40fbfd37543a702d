"""The benchmark of whole sweeps: a side that measures other numbers must be caught, not be timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_sweep
import peers_sweep
import precision
import pytest
import sweep_case
import sweep_report
import torch
from bench_sweep import Options

import rft_fast as rft

CPU = torch.device("cpu")
SMALL = replace(
    bench_sweep.defaults("cpu", "tiny"), samples=24, batch=10, draws=3, layers=2, rounds=2, files=8
)


@pytest.fixture(scope="module")
def case() -> sweep_case.Case:
    return sweep_case.make_case("tiny", SMALL.samples, CPU)


def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "run.json", tmp_path / "run.png"
    words = "--arch tiny --samples 24 --batch 10 --draws 3 --layers 2 --rounds 2 --files 8 --alphas 3".split()
    bench_sweep.main([*words, "--out", str(out), "--figure", str(figure)])
    printed = capsys.readouterr().out
    run = json.loads(out.read_text())
    assert set(run["parts"]) == set(bench_sweep.PARTS) and run["goals"] == []
    assert {"date", "device", "versions", "threads"} <= set(run["about"])

    sharp = run["parts"]["layer-sharpness"]
    assert [r["seed"] for r in sharp["rounds"]] == [0, 1]
    assert all(r["largest_difference"]["fp32"] < 1e-4 for r in sharp["rounds"])
    assert all(len(r["sharpness"]["plain fp32"]) == 2 for r in sharp["rounds"])
    # The control variate takes most of the variance, on random and on trained weights.
    assert min(sharp["modes"]["fp32"]["worth_here"]) > 2 and sharp["modes"]["fp32"]["worth"] > 2
    assert len(sharp["worth"]["fp32"]) == 3 * 10
    assert sharp["fastest"] == "fp32" and sharp["modes"]["fp32"]["draws_needed"] >= 2
    assert len(run["parts"]["layers"]["ratio"]) == 2
    assert set(run["parts"]["interpolation"]) == {"60x45", "400x300"}
    for sweep in run["parts"]["interpolation"].values():
        assert all(set(r["seconds"]) == {"cold", "peer", "warm"} for r in sweep["rounds"])
    axes = run["parts"]["scaling"]["axes"]
    assert list(axes) == ["layers", "draws", "alphas", "samples"] and "not measured" in run["parts"]["busy"]
    for words in ("**layer-wise sharpness**", "warm", "| 4 layers |", "not measured: there is no GPU"):
        assert words in printed

    # From the JSON alone: the same table and the same picture.
    again = tmp_path / "again.png"
    bench_sweep.main(["--redraw", str(out), "--figure", str(again)])
    assert capsys.readouterr().out == printed
    assert again.read_bytes() == figure.read_bytes()


def test_noise_for_every_batch_is_the_same_on_both_sides(case: sweep_case.Case) -> None:
    each = replace(SMALL, noise_batch=True)
    once, anew = (bench_sweep.Sharpness(case, options) for options in (SMALL, each))
    for request in (once, anew):
        assert request.check(request.ours("plain", 5), request.peer(5)) < 1e-5
    with pytest.raises(AssertionError, match="layer-wise sharpness in fp32"):
        once.check(once.ours("plain", 5), anew.peer(5))


# ---------------------------------------------------------------- what is broken must be found


def wrong_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers_sweep.noise

    def noise(weights: peers_sweep.State) -> peers_sweep.Draw:
        draw = right(weights)
        return lambda names, seed, number: draw(names, seed, number + 1)

    monkeypatch.setattr(peers_sweep, "noise", noise)


def wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers_sweep.merge
    monkeypatch.setattr(peers_sweep, "merge", lambda a, b, alpha: right(a, b, 0.98 * alpha))


def wrong_images(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers_sweep.interpolation

    def interpolation(model: Any, a: Any, b: Any, folder: str, preprocess: Any, *other: Any) -> Any:
        return right(model, a, b, folder, replace(preprocess, interpolation="bicubic"), *other)

    monkeypatch.setattr(peers_sweep, "interpolation", interpolation)


def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers_sweep.layer_interpolation

    def interpolation(*arguments: Any) -> Any:
        *first, layers, alphas = arguments
        return right(*first, dict(zip(layers, reversed(list(layers.values())), strict=True)), alphas)

    monkeypatch.setattr(peers_sweep, "layer_interpolation", interpolation)


def wrong_ours(study: str, column: str, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(bench_sweep, study)

        def wrong(*arguments: Any, **options: Any) -> Any:
            table = right(*arguments, **options)
            return table.assign(**{column: table[column] * factor})

        monkeypatch.setattr(bench_sweep, study, wrong)

    return patch


@pytest.mark.parametrize(
    "part, broken, message",
    [
        ("layer-sharpness", wrong_noise, "layer-wise sharpness in fp32"),
        ("layer-sharpness", wrong_merge, "layer-wise sharpness in fp32"),
        ("layer-sharpness", wrong_ours("layerwise_sharpness", "sharpness", 1.1), "layer-wise sharpness"),
        ("layer-sharpness", wrong_ours("layerwise_sharpness", "sharpness_se", 2), "layer-wise sharpness"),
        ("scaling", wrong_noise, "layer-wise sharpness in fp32"),
        ("layers", wrong_layer, "layer-wise interpolation: "),
        ("layers", wrong_ours("layerwise_interpolation", "loss", 1.0001), "interpolation: loss"),
        ("layers", wrong_ours("layerwise_interpolation", "accuracy", 0.8), "interpolation: accuracy"),
        ("interpolation", wrong_images, "interpolation, cold: "),
        ("interpolation", wrong_merge, "interpolation, cold: "),
        ("interpolation", wrong_ours("interpolation", "loss", float("nan")), "interpolation, cold: loss"),
    ],
)
def test_other_numbers_are_refused(
    case: sweep_case.Case, monkeypatch: pytest.MonkeyPatch, part: str, broken: Any, message: str
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        bench_sweep.PARTS[part](case, replace(SMALL, rounds=1))


def test_same_means_the_same_keys_and_finite_numbers() -> None:
    ours = {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    assert bench_sweep.check_same("x", ours, {"a": (1.0, 2.5), "b": (3.0, 4.0)}, 0.6) == 0.5
    for peer, message in (
        ({"a": (1.0, 2.0)}, "x: ours and the peer measured different things: {'b'}"),
        ({"a": (1.0, float("nan")), "b": (3.0, 4.0)}, "x: a: ours 2.0, the peer's nan"),
        ({"a": (1.0, 2.0), "b": (3.0, 4.7)}, "x: b: ours 4.0, the peer's 4.7, allowed 6.0e-01"),
    ):
        with pytest.raises(AssertionError, match=message):
            bench_sweep.check_same("x", ours, peer, 0.6)


# ---------------------------------------------------------------- peers, case, arithmetic


def test_the_peers_noise_is_that_of_the_kernels(case: sweep_case.Case) -> None:
    weights = {weight.name: weight.finetuned for weight in case.path().weights()}
    draw = peers_sweep.noise(weights)
    expected = dict(zip(weights, rft.noise_like(list(weights.values()), 7, 3), strict=True))
    for names in case.some_layers(5).values():
        got = draw(names, 7, 3)
        assert set(got) == set(names)
        for name in names:
            assert torch.equal(got[name], expected[name])


def test_the_case_is_the_same_each_time_and_sane(case: sweep_case.Case) -> None:
    again = sweep_case.make_case("tiny", SMALL.samples, CPU)
    for first, second in ((case.zeroshot, again.zeroshot), (case.finetuned, again.finetuned)):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(case.data.images, again.data.images)
    path = case.path()
    scores = bench_sweep.Evaluator(path.model, [case.data]).scores()["images"]
    # Chance is a tenth, and log(10) nats.
    assert scores.accuracy > 0.4 and scores.loss < 2.3
    names = list(case.layers)
    assert names[0].startswith("visual.") and len(case.some_layers(99)) == len(names)
    blocks = [name.split("resblocks.")[1][0] for name in names if "resblocks." in name]
    assert blocks == sorted(blocks)
    (middle,) = case.some_layers(1)
    assert middle == names[len(names) // 2]


def test_time_counts_once_where_kernels_overlap() -> None:
    def event(start: float, length: float, category: str = "kernel") -> dict[str, Any]:
        return {"ts": start, "dur": length, "cat": category}

    events = [event(100, 50), event(120, 10), event(140, 30, "gpu_memcpy"), event(300, 5, "gpu_memset")]
    events += [event(0, 1e6, "cpu_op"), {"ph": "M", "name": "process_name"}]
    assert bench_sweep.working({"traceEvents": events}) == pytest.approx(75e-6)


def made_rounds() -> list[dict[str, Any]]:
    """Two layers, 20 draws. On these weights one draw of the control variate is worth 16 and 4 plain ones."""
    seconds = {"peer fp32": 20.0, "plain fp32": 8.0, "gradient fp32": 10.0, "two fp32": 5.5}
    seconds |= {"peer bf16": 4.0, "plain bf16": 1.0, "gradient bf16": 2.0, "two bf16": 0.2}
    errors = {"plain fp32": [0.4, 0.2], "gradient fp32": [0.1, 0.1]}
    errors |= {"plain bf16": [0.4, 0.2], "gradient bf16": [0.1, 0.1]}
    sharpness = {name: [1.0, 2.0] for name in errors} | {"gradient bf16": [1.1, 2.25]}
    return [{"seconds": seconds, "sharpness_se": errors, "sharpness": sharpness}]


WORTH = {"fp32": 6.0, "bf16": 100.0}
TWO = Options(draws=20, precisions=("fp32", "bf16"))


def test_ratios_at_equal_standard_error() -> None:
    found = bench_sweep.compare_sharpness(made_rounds(), TWO, WORTH)
    modes = found["modes"]
    assert modes["fp32"]["equal_draws"] == [2.5] and modes["bf16"]["equal_draws"] == [4.0]
    assert modes["bf16"]["equal_draws_published"] == [20.0]
    assert modes["fp32"]["equal_se"] == pytest.approx([20 / 10 * 6])
    assert modes["bf16"]["equal_se"] == pytest.approx([20 / 2 * 100])
    assert modes["fp32"]["worth_here"] == pytest.approx([16, 4])
    assert modes["fp32"]["equal_se_here"] == pytest.approx([2 * 10])  # the median of 16 and 4
    # 20 / 6 draws are four. Each costs (10 - 5.5) / 18 beyond the first two.
    assert modes["fp32"]["draws_needed"] == 4
    assert modes["fp32"]["request"] == pytest.approx([20 / (5.5 + 2 * 0.25)])
    # 20 / 100 is less than a draw, and two it must be.
    assert modes["bf16"]["draws_needed"] == 2 and modes["bf16"]["request"] == pytest.approx([20 / 0.2])
    # The standard error of 20 plain draws is .4 and .2; bf16 is off by .1 and .25.
    assert found["standard_error_of_20_draws"] == pytest.approx([0.4, 0.2])
    assert modes["bf16"]["error_over_se"] == pytest.approx((0.25 + 1.25) / 2)
    assert modes["bf16"]["error_over_se_largest"] == pytest.approx(1.25)
    assert modes["bf16"]["layers_below_se"] == 0.5 and found["fastest"] == "bf16"

    off = made_rounds()
    off[0]["sharpness"]["gradient bf16"] = [2.0, 2.3]
    assert bench_sweep.compare_sharpness(off, TWO, WORTH)["fastest"] == "fp32"


def test_as_many_published_draws_are_compared_as_were_published() -> None:
    """A run of ten draws stands for twenty: the peer's time doubles, the variance is ten squared errors."""
    half = bench_sweep.compare_sharpness(made_rounds(), replace(TWO, draws=10), WORTH)
    assert half["modes"]["bf16"]["request"] == pytest.approx([2 * 20 / 0.2])
    assert half["standard_error_of_20_draws"] == pytest.approx([0.4 / 2**0.5, 0.2 / 2**0.5])


def test_goals_are_met_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    sharp = bench_sweep.compare_sharpness(made_rounds(), TWO, WORTH)
    parts = {
        "layer-sharpness": sharp,
        "layers": {"ratio": [1.0, 1.8, 2.5]},
        "interpolation": {"500x375": {"cold": [1.2], "warm": [1.9]}},
        "busy": {"fp32": {"busy": 0.95}, "bf16": {"busy": 0.5}},
    }
    run: dict[str, Any] = {"options": {"arch": "ViT-B-32", "device": "cpu"}, "parts": parts}
    got = {goal["what"].partition(", ")[2]: goal["met"] for goal in bench_sweep.goals(run)}
    assert got == {
        "layer-wise sharpness, equal draws, fp32": True,
        "layer-wise sharpness, equal standard error, fp32": True,
        "layer-wise sharpness, 4 draws for 20, fp32": False,
        "layer-wise interpolation": False,
        "interpolation of 500x375 images, cold": True,
        "interpolation of 500x375 images, warm cache": False,
    }
    run["goals"] = list(bench_sweep.goals(run))
    assert "layer-wise interpolation: 1.8, goal 1.9: MISSED" in "\n".join(sweep_report.goals(run))
    run["options"] = {"arch": "ViT-L-14", "device": "cuda"}
    got = {goal["what"].partition(", ")[2]: goal["met"] for goal in bench_sweep.goals(run)}
    assert got["layer-wise sharpness, equal standard error, bf16"]
    assert got["layer-wise sharpness, 2 draws for 20, bf16"]
    assert not got["layer-wise sharpness, equal standard error, fp32"]
    assert got["GPU busy, fp32"] and not got["GPU busy, bf16"] and "layer-wise interpolation" not in got


# ---------------------------------------------------------------- benchmarks/precision.py


def test_precisions_beside_the_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "ALPHAS", [0.0, 1.0])
    monkeypatch.setattr(precision, "POSITIONS", [1.0])
    monkeypatch.setattr(precision, "RHOS", [0.5])
    monkeypatch.setattr(precision, "LAYERS", 2)
    out = tmp_path / "precision.json"
    words = "--samples 16 --draws 3 --models 1 --precisions bf16".split()
    precision.main([*words, "--out", str(out)])
    found = json.loads(out.read_text())
    path = {name: [row for row in found["path"] if row["precision"] == name] for name in ("fp32", "bf16")}
    assert {row["against"] for row in path["fp32"]} == {"fp64"} and len(path["bf16"]) == 2 * 4
    assert max(row["image"] for row in path["fp32"]) < 1e-4 < max(row["image"] for row in path["bf16"]) < 1
    rows = found["sharpness"]
    assert {row["study"] for row in rows} == {"sharpness", "layer-sharpness"}
    assert all(row["error"] == 0 for row in rows if row["precision"] == "fp32")
    assert all(0 < row["error"] < 0.1 for row in rows if row["precision"] == "bf16")
    printed = capsys.readouterr().out
    assert "| bf16 against fp32 |" in printed and "| fp32 against float64 |" in printed
    assert "| layer-wise, rho = 0.5 |" in printed


def test_a_device_offers_what_it_can() -> None:
    assert precision.offered(CPU) == ["fp32", "bf16", "fp16"]
