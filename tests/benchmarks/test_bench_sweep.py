"""The benchmark of whole sweeps: a side that measures other numbers must be caught, not be timed."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_sweep
import machine
import pandas as pd
import peers_sweep
import precision
import pytest
import record
import sweep_bench
import sweep_case
import sweep_device
import sweep_general
import sweep_goals
import sweep_options
import sweep_parts
import sweep_report
import sweep_sharpness
import torch
from support import PATIENCE
from support.wording import command_refused, refused, said
from sweep_bench import Bench
from sweep_options import Options

import rft_fast as rft
from rft_fast.clip.endpoints import Ends, Setup

CPU = torch.device("cpu")
SMALL = replace(
    sweep_options.defaults("cpu", "tiny"), samples=24, batch=10, draws=3, layers=2, rounds=2, files=8
)
WORDS = "--arch tiny --samples 24 --batch 10 --draws 3 --layers 2 --rounds 1 --files 8 --alphas 3".split()


@pytest.fixture(scope="module")
def case() -> sweep_case.Case:
    return sweep_case.make_case("tiny", SMALL.samples, CPU, SMALL.batch_size)


@pytest.fixture(autouse=True)
def no_deadline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test makes of the time, the next has as much as it wants."""
    for name in ("ROWS", "STEP", "DEADLINE"):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    record.start()


@dataclass
class Whole:
    """What the whole script left: its file, its figure, its rows, and the file after every measurement."""

    out: Path
    figure: Path
    rows: list[dict[str, Any]]
    states: list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    out, rows, figure = (folder / name for name in ("run.json", "rows.jsonl", "run.png"))
    states: list[dict[str, Any]] = []
    right = sweep_bench.Log.save

    def save(log: sweep_bench.Log, done: bool = False) -> None:
        right(log, done)
        states.append(json.loads(out.read_text()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWS", str(rows))
        patch.setattr(sweep_bench.Log, "save", save)
        bench_sweep.main([*WORDS, "--out", str(out), "--figure", str(figure)])
    return Whole(out, figure, record.read(rows), states)


@pytest.mark.slow
def test_the_whole_script(whole: Whole, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = json.loads(whole.out.read_text())
    assert set(run["parts"]) == set(bench_sweep.PARTS) and run["goals"] == []
    assert {"date", "device", "versions", "threads"} <= set(run["about"])

    sharp = run["parts"]["layer-sharpness"]
    assert [r["seed"] for r in sharp["rounds"]] == [0]
    assert all(r["largest_difference"]["fp32"] < 1e-4 for r in sharp["rounds"])
    assert all(len(r["sharpness"]["plain fp32"]) == 2 for r in sharp["rounds"])
    # Noise per image takes most of the variance, on random and on trained weights.
    assert statistics.median(sharp["modes"]["fp32"]["worth_here"]) > 2 and sharp["modes"]["fp32"]["worth"] > 2
    assert len(sharp["worth"]["fp32"]) == 10
    assert sharp["fastest"] == "fp32" and sharp["modes"]["fp32"]["draws_needed"] >= 2
    general = run["parts"]["general-sharpness"]
    assert all(r["largest_difference"]["fp32"] < 1e-4 for r in general["rounds"])
    for way, facts in general["ways"].items():
        assert len(general["worth"][way]["fp32"]) == 4  # two models at two positions
        assert facts["modes"]["fp32"]["worth"] > 2 and len(facts["modes"]["fp32"]["request"]) == 1
    assert len(run["parts"]["layers"]["ratio"]) == 1
    assert set(run["parts"]["interpolation"]) == {"60x45", "400x300"}
    for sweep in run["parts"]["interpolation"].values():
        assert all(set(r["seconds"]) == {"cold", "peer", "warm"} for r in sweep["rounds"])
    axes = run["parts"]["scaling"]["axes"]
    assert list(axes) == ["layers", "draws", "alphas", "samples"]
    assert all(set(seconds) == set(sweep_report.NAMES) for p in axes.values() for seconds in p.values())
    for part in ("busy", "graphs", "streaming"):
        assert run["parts"][part] == {"not measured": "there is no GPU"}
    stages = run["parts"]["stages"]["fp32"]
    assert stages["stages"] > 4 and stages["seconds"] > 0 and "why" not in stages
    attention = run["parts"]["attention"]["fp32"]
    assert attention["shape"] == "10x2x17x32"
    for name in ("default", "math"):
        assert 0 < attention[f"{name}_error_mean"] < attention[f"{name}_error_largest"] < 1e-4

    # From the JSON alone: a table and the same picture.
    again = tmp_path / "again.png"
    bench_sweep.main(["--redraw", str(whole.out), "--figure", str(again)])
    assert again.read_bytes() == whole.figure.read_bytes()
    printed = capsys.readouterr().out
    for words in (
        "**layer-wise sharpness**",
        "**general sharpness**",
        "| noise per image |",
        "warm",
        "| 4 layers |",
        "not measured: there is no GPU",
    ):
        assert words in printed


@pytest.mark.slow
def test_the_file_says_all_that_is_known_after_every_measurement(whole: Whole) -> None:
    """A run that is killed ends between two of these."""
    assert all(sweep_report.text(state) for state in whole.states)  # in words, whatever is missing
    rounds = [state["parts"]["layer-sharpness"]["rounds"] for state in whole.states]
    assert [sum(len(r["seconds"]) for r in state) for state in rounds[:5]] == [1, 2, 3, 4, 4]
    assert whole.states[-1] == json.loads(whole.out.read_text())


@pytest.mark.slow
def test_every_timing_is_a_row_and_so_is_every_result(whole: Whole) -> None:
    timings = [row for row in whole.rows if row["kind"] == "timing"]
    assert all(row["seconds"] > 0 and row["arch"] == "tiny" for row in timings)
    contenders = [row["contender"] for row in timings if row["part"] == "layer-sharpness"]
    assert contenders == ["peer", "plain", "two", "gradient", "worth"]
    contenders = [row["contender"] for row in timings if row["part"] == "general-sharpness"]
    assert contenders == [*sweep_general.CONTENDERS, "worth image", "worth gradient"]
    assert all(row["largest_difference"] < 1e-4 for row in timings if row["contender"] == "plain")
    assert {row["part"] for row in whole.rows if row["kind"] == "not measured"} == {
        "busy", "graphs", "streaming"
    }  # fmt: skip
    results = {(r["part"], r["name"]): r["value"] for r in whole.rows if r["kind"] == "result"}
    run = json.loads(whole.out.read_text())
    mode = run["parts"]["layer-sharpness"]["modes"]["fp32"]
    assert results["layer-sharpness", "request"] == pytest.approx(statistics.median(mode["request"]))
    assert results["layer-sharpness", "worth"] == mode["worth"]
    assert results["stages", "stages"] == run["parts"]["stages"]["fp32"]["stages"]
    assert {part for part, _ in results} == set(run["parts"]) - {"busy", "graphs", "streaming"}
    assert all(len(json.dumps(row)) < 1000 for row in whole.rows)


@pytest.mark.slow
@pytest.mark.parametrize("checks", [0, 1, 3, 4, 6, 8, 13])
def test_nothing_begins_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], checks: int
) -> None:
    """The time is up after so many checks, each right before something that takes long."""
    left, begun = [checks], []

    def time_is_up() -> bool:
        left[0] -= 1
        return left[0] < 0

    def ours(self: Any, estimator: str, seed: int, **other: Any) -> Any:
        begun.append(left[0])
        losses = {"layer": ["a", "b"], "alpha": 0.5, "sharpness": [0.1, 0.2], "sharpness_se": [0.1, 0.2]}
        return pd.DataFrame({**losses, "loss": 1.0})

    def peer(self: Any, seed: int, **other: Any) -> Any:
        begun.append(left[0])
        spread = [-(1.5**0.5), 0.0, 1.5**0.5]  # of three draws, whose standard error is 1 / sqrt(2)
        means = {"a": 0.1, "b": 0.2}
        return {(n, 0.5): ([[m * (1 + 2**0.5 * x)] for x in spread], [1.0]) for n, m in means.items()}

    monkeypatch.setattr(record, "time_is_up", time_is_up)
    monkeypatch.setattr(sweep_sharpness.Sharpness, "ours", ours)
    monkeypatch.setattr(sweep_sharpness.Sharpness, "peer", peer)
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    out = tmp_path / "out.json"
    words = "--part layer-sharpness layers --precisions bf16 --out".split()
    try:
        bench_sweep.main([*WORDS, *words, str(out)])
    except SystemExit as error:
        said(str(error.code))
        assert not record_of(tmp_path, "timing")
    else:
        assert record_of(tmp_path, "timing")
    assert min(begun, default=0) >= 0  # nothing that takes long begins later
    timings = [f"{row['contender']} {row['precision']}" for row in record_of(tmp_path, "timing")]
    order = [f"{c} {p}" for p in ("fp32", "bf16") for c in ("peer", "plain", "two", "gradient")]
    assert timings == [*order, "worth fp32", "worth bf16"][: len(timings)] and len(timings) < 9
    left_out = [row["what"] for row in record_of(tmp_path, "left out")]
    assert [what.split(", ")[1].partition(":")[0] for what in left_out] == ["layer-sharpness", "layers"]
    assert capsys.readouterr().out.count("left out") >= 2
    modes = json.loads(out.read_text())["parts"]["layer-sharpness"]["modes"] if timings else {}
    assert list(modes) == [p for n, p in ((4, "fp32"), (8, "bf16")) if len(timings) >= n]


def record_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in record.read(folder / "rows") if row["kind"] == kind]


@pytest.mark.slow
def test_a_signal_leaves_what_was_measured(tmp_path: Path) -> None:
    """Of 400 rounds some are there, in the rows and in a file that can be read, whatever ends the run."""
    script = Path(bench_sweep.__file__)
    running = {}
    for sent in (signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / sent.name
        folder.mkdir()
        words = "--arch tiny --samples 4 --draws 2 --layers 1 --rounds 400 --part layers --out".split()
        environment = {**os.environ, "ROWS": str(folder / "rows"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), *words, str(folder / "out.json")]
        running[sent] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    waiting = dict(running)
    while waiting:
        for sent, process in list(waiting.items()):
            assert process.poll() is None
            if len(record_of(tmp_path / sent.name, "timing")) >= 5:
                waiting.pop(sent).send_signal(sent)
        time.sleep(0.02)
    for sent, process in running.items():
        printed, _ = process.communicate(timeout=PATIENCE)
        rows = record_of(tmp_path / sent.name, "timing")
        found = json.loads((tmp_path / sent.name / "out.json").read_text())
        rounds = found["parts"]["layers"]["rounds"]
        # Of the one that was in flight there may be the row alone, or the number alone.
        assert abs(len(rows) - sum(len(r["seconds"]) for r in rounds)) <= 1 and 5 <= len(rows) < 800
        assert "layer-wise interpolation" in sweep_report.text(found)
        assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
        assert ("layer-wise interpolation" in printed) == (sent == signal.SIGINT)


@pytest.mark.slow
def test_several_architectures_in_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_case.file_of("tiny")
    monkeypatch.setattr(sweep_case, "file_of", lambda arch: file)  # another name for a small model
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    out = tmp_path / "out.json"
    words = "--arch tiny ViT-B-32 --part stages attention --samples 4 --rounds 1 --out".split()
    bench_sweep.main([*words, str(out)])
    assert [run["options"]["arch"] for run in json.loads(out.read_text())["runs"]] == ["tiny", "ViT-B-32"]
    assert {row["arch"] for row in record_of(tmp_path, "timing")} == {"tiny", "ViT-B-32"}
    printed = capsys.readouterr().out
    bench_sweep.main(["--redraw", str(out)])
    assert capsys.readouterr().out == printed and printed.count("**attention**") == 2


@pytest.mark.parametrize(
    "words, fact",
    [
        ("--rounds 0", "--rounds"),
        ("--draws 1", "--draws"),
        ("--alphas 1", "--alphas"),
        ("--samples -3", "--samples"),
        ("--rho nan", "--rho"),
        ("--device cpu --precisions tf32", "tf32"),
        ("--device nothing", "device"),
        ("--arch ViT", "--arch"),
        ("--out nowhere/out.json", "nowhere"),
        ("--arch tiny ViT-B-32 --figure x.png", "--figure"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(words: str, fact: str) -> None:
    command_refused(bench_sweep.main, words.split(), fact)


@pytest.mark.slow
def test_what_a_gpu_measures_runs(case: sweep_case.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which has no graphs and streams nothing: the numbers agree up to rounding."""
    monkeypatch.setattr(Options, "on_gpu", True)
    profile, cpu = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=cpu))
    about = machine.about(CPU)
    bench = Bench(case, replace(SMALL, rounds=1, noise_batch=True, precisions=("fp32", "bf16")), about=about)
    contenders = {"graphs": ("on", "all"), "streaming": ("resident",)}
    for part, names in contenders.items():
        found = bench.measure(part, bench_sweep.PARTS[part])
        assert set(found) == {"fp32", "bf16"}
        for facts in found.values():
            assert facts["rounds"][0]["largest_difference"] < 1e-6
            assert all(len(facts[f"{name}_times_faster"]) == 1 for name in names)
    found = bench.measure("busy", sweep_device.busy)
    assert all(facts["kernels"] == 0 and len(facts["seconds"]) == 1 for facts in found.values())
    assert sweep_report.text(bench.run).count("times faster") == 2


def test_models_are_made_once_and_without_random_weights(
    case: sweep_case.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(3, 3, 28, 28)
    ours = sweep_case.live("tiny", case.zeroshot, "fp32")
    theirs = Ends(Setup(sweep_case.file_of("tiny")), case.zeroshot).live
    theirs.load_state_dict(case.zeroshot)
    assert torch.equal(ours(images), theirs(images)) and not ours.training
    assert case.path().model is case.live() and case.evaluator().model is case.live()
    half = case.path("bf16").model
    assert half is not case.live() and half.visual.conv1.weight.dtype == torch.bfloat16
    assert half.classification_head.weight.dtype == torch.float32


@pytest.mark.slow
def test_a_difference_in_one_precision_does_not_stop_the_others(
    case: sweep_case.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sweep_sharpness.Sharpness.check

    def check(self: Any, *sides: Any) -> float:
        if self.precision == "fp32":
            raise AssertionError("other numbers")
        return right(self, *sides)

    monkeypatch.setattr(sweep_sharpness.Sharpness, "check", check)
    monkeypatch.setattr(sweep_sharpness, "worth_on_digits", lambda *_: None)
    bench = Bench(case, replace(SMALL, rounds=1, precisions=("fp32", "bf16")))
    with pytest.raises(AssertionError, match="other numbers"):
        bench.measure("layer-sharpness", sweep_sharpness.layer_sharpness)
    (this,) = bench.run["parts"]["layer-sharpness"]["rounds"]
    assert list(this["seconds"]) == ["peer fp32", *(f"{c} bf16" for c in sweep_sharpness.CONTENDERS)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [sweep_sharpness.Sharpness, sweep_general.General])
def test_noise_for_every_batch_is_the_same_on_both_sides(
    case: sweep_case.Case, kind: type[sweep_sharpness.Sharpness]
) -> None:
    all_images = replace(SMALL, noise_batch=False)
    once, anew = (kind(Bench(case, options)) for options in (all_images, SMALL))
    for request in (once, anew):
        assert request.check(request.ours("plain", 5), request.peer(5)) < 1e-5
    with refused(AssertionError, "fp32"):
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
        modules = {"layerwise_sharpness": sweep_sharpness, "sharpness": sweep_general}
        module = modules.get(study, sweep_parts)
        right = getattr(module, study)

        def wrong(*arguments: Any, **options: Any) -> Any:
            table = right(*arguments, **options)
            return table.assign(**{column: table[column] * factor})

        monkeypatch.setattr(module, study, wrong)

    return patch


@pytest.mark.slow(but="^layers-patch")
@pytest.mark.parametrize(
    "part, broken, facts",
    [
        ("layer-sharpness", wrong_noise, ["fp32"]),
        ("layer-sharpness", wrong_merge, ["fp32"]),
        ("layer-sharpness", wrong_ours("layerwise_sharpness", "sharpness", 1.1), ["fp32"]),
        ("layer-sharpness", wrong_ours("layerwise_sharpness", "sharpness_se", 2), ["fp32"]),
        ("general-sharpness", wrong_noise, ["fp32"]),
        ("general-sharpness", wrong_merge, ["fp32"]),
        ("general-sharpness", wrong_ours("sharpness", "sharpness", 1.1), ["fp32"]),
        ("general-sharpness", wrong_ours("sharpness", "sharpness_se", 2), ["fp32"]),
        ("scaling", wrong_noise, ["fp32"]),
        ("layers", wrong_layer, []),
        ("layers", wrong_ours("layerwise_interpolation", "loss", 1.0001), ["loss"]),
        ("layers", wrong_ours("layerwise_interpolation", "accuracy", 0.8), ["accuracy"]),
        ("interpolation", wrong_images, []),
        ("interpolation", wrong_merge, []),
        ("interpolation", wrong_ours("interpolation", "loss", float("nan")), ["loss", "nan"]),
    ],
)
def test_other_numbers_are_refused(
    case: sweep_case.Case, monkeypatch: pytest.MonkeyPatch, part: str, broken: Any, facts: list[str]
) -> None:
    broken(monkeypatch)
    with refused(AssertionError, *facts):
        Bench(case, replace(SMALL, rounds=1)).measure(part, bench_sweep.PARTS[part])


def test_same_means_the_same_keys_and_finite_numbers() -> None:
    ours = {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    assert sweep_bench.check_same("x", ours, {"a": (1.0, 2.5), "b": (3.0, 4.0)}, 0.6) == 0.5
    for peer, facts in (
        ({"a": (1.0, 2.0)}, ["{'b'}"]),
        ({"a": (1.0, float("nan")), "b": (3.0, 4.0)}, ["a", "2.0", "nan"]),
        ({"a": (1.0, 2.0), "b": (3.0, 4.7)}, ["b", "4.0", "4.7", "6.0e-01"]),
    ):
        with refused(AssertionError, "x", *facts):
            sweep_bench.check_same("x", ours, peer, 0.6)


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
    again = sweep_case.make_case("tiny", SMALL.samples, CPU, SMALL.batch_size)
    for first, second in ((case.zeroshot, again.zeroshot), (case.finetuned, again.finetuned)):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(case.data.images, again.data.images)
    one = sweep_case.make_case("tiny", 1, CPU)
    assert all(tensor.isfinite().all() for tensor in one.zeroshot.values())
    case.path().write(0.0)
    scores = case.evaluator().scores()["images"]
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
    assert sweep_device.working({"traceEvents": events}) == pytest.approx(75e-6)


def made_rounds() -> list[dict[str, Any]]:
    """Two layers, 20 draws. On these weights one draw of ours is worth 16 and 4 plain ones."""
    seconds = {"peer fp32": 20.0, "plain fp32": 8.0, "gradient fp32": 10.0, "two fp32": 5.5}
    seconds |= {"peer bf16": 4.0, "plain bf16": 1.0, "gradient bf16": 2.0, "two bf16": 0.2}
    errors = {"plain fp32": [0.4, 0.2], "gradient fp32": [0.1, 0.1]}
    errors |= {"plain bf16": [0.4, 0.2], "gradient bf16": [0.1, 0.1]}
    sharpness = {name: [1.0, 2.0] for name in errors} | {"gradient bf16": [1.1, 2.25]}
    return [{"seconds": seconds, "sharpness_se": errors, "sharpness": sharpness}]


WORTH = {"fp32": 6.0, "bf16": 100.0}
TWO = Options(draws=20, precisions=("fp32", "bf16"))


def test_ratios_at_equal_standard_error() -> None:
    found = sweep_sharpness.compare_sharpness(made_rounds(), TWO, WORTH)
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
    assert sweep_sharpness.compare_sharpness(off, TWO, WORTH)["fastest"] == "fp32"


def test_as_many_published_draws_are_compared_as_were_published() -> None:
    """Ten draws stand for twenty: 41 passes of the peer, not 21; the variance is ten squared errors."""
    half = sweep_sharpness.compare_sharpness(made_rounds(), replace(TWO, draws=10), WORTH)
    assert half["modes"]["bf16"]["request"] == pytest.approx([41 / 21 * 20 / 0.2])
    assert half["standard_error_of_20_draws"] == pytest.approx([0.4 / 2**0.5, 0.2 / 2**0.5])


def test_goals_are_met_or_missed() -> None:
    sharp = sweep_sharpness.compare_sharpness(made_rounds(), TWO, WORTH)
    rounds = [
        {
            "seconds": {"peer fp32": 20.0, "plain fp32": 18.0, **ours},
            "sharpness_se": {f"{way} fp32": [0.1] for way in ("plain", "image", "gradient")},
            "sharpness": {f"{way} fp32": [1.0] for way in ("plain", "image", "gradient")},
        }
        for ours in [{"two image fp32": 4.0, "image fp32": 40.0, "two fp32": 5.0, "gradient fp32": 50.0}]
    ]
    general = {
        way: sweep_sharpness.compare_sharpness(rounds, Options(draws=20), {"fp32": worth}, way)
        for way, worth in {"image": 10.0, "gradient": 5.0}.items()
    }
    parts = {
        "layer-sharpness": sharp,
        "general-sharpness": {"ways": general},
        "layers": {"ratio": [1.0, 1.8, 2.5]},
        "interpolation": {"500x375": {"cold": [1.2], "warm": [1.9]}},
        "busy": {"fp32": {"busy": 0.95}, "bf16": {"busy": 0.5}},
    }
    run: dict[str, Any] = {"options": {"arch": "ViT-B-32", "device": "cpu", "rho": 1.0}, "parts": parts}
    got = {goal["what"].partition(", ")[2]: goal["met"] for goal in sweep_goals.goals(run)}
    assert got == {
        "layer-wise sharpness, equal draws, fp32": True,
        "layer-wise sharpness at rho 1, 4 draws for 20, fp32": False,
        "general sharpness at rho 1, 2 draws for 20, image, fp32": False,  # 5, and 20 / 9 with the control
        "layer-wise interpolation": False,
        "interpolation of 500x375 images, cold": True,
        "interpolation of 500x375 images, warm cache": False,
    }
    run["goals"] = list(sweep_goals.goals(run))
    assert "layer-wise interpolation: 1.8, goal 1.9: MISSED" in "\n".join(sweep_report.goals(run))
    run["options"] = {"arch": "ViT-L-14", "device": "cuda", "rho": 0.05}
    got = {goal["what"].partition(", ")[2]: goal["met"] for goal in sweep_goals.goals(run)}
    assert got["layer-wise sharpness at rho 0.05, 2 draws for 20, bf16"]
    assert not got["layer-wise sharpness at rho 0.05, 4 draws for 20, fp32"]
    assert got["GPU busy, fp32"] and not got["GPU busy, bf16"] and "layer-wise interpolation" not in got
    run["options"]["rho"] = 0.3  # of which no goal is stated
    assert not any(goal["what"].endswith("fp32") and "layer-wise sharpness at" in goal["what"]
                   for goal in sweep_goals.goals(run))  # fmt: skip


# ---------------------------------------------------------------- benchmarks/precision.py


@pytest.mark.slow
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


@pytest.mark.slow(only="^interrupted$")
@pytest.mark.parametrize("ended", ["interrupted", "out of time", "out of time at once"])
def test_precisions_that_were_measured_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ended: str
) -> None:
    right, asked = precision.of_path, []

    def of_path(source: Any, model: str, name: str) -> Any:
        asked.append(name)
        if ended == "interrupted" and name == "bf16":
            raise KeyboardInterrupt
        return right(source, model, name)

    monkeypatch.setattr(precision, "of_path", of_path)
    monkeypatch.setattr(precision, "ALPHAS", [0.0])
    limit = {"interrupted": 9, "out of time": 2, "out of time at once": 0}[ended]
    monkeypatch.setattr(record, "time_is_up", lambda: len(asked) >= limit)
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    out = tmp_path / "out.json"
    words = "--samples 8 --models 1 --precisions bf16 --out".split()
    try:
        precision.main([*words, str(out)])
    except SystemExit as error:
        assert error.code == (130 if ended == "interrupted" else "precision: nothing was measured")
    timings = [row["precision"] for row in record_of(tmp_path, "timing")]
    assert timings == (["fp32", "fp64"] if limit else []) and out.exists() == bool(limit)
    if limit:
        rows = json.loads(out.read_text())["path"]
        assert {(row["precision"], row["against"]) for row in rows} == {("fp32", "fp64")}
        assert "| fp32 against float64 |" in capsys.readouterr().out
    assert bool(record_of(tmp_path, "left out")) == ended.startswith("out of time")


def test_a_device_offers_what_it_can() -> None:
    assert precision.offered(CPU) == ["fp32", "ieee", "bf16x3", "bf16", "fp16"]
