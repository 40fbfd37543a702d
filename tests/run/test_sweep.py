"""The command line, on a tiny zoo made here: what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import PATIENCE, tiny_zoo
from support.tiny_zoo import BRIEF, own_models, save, sweep_refused
from support.wording import said

from rft_fast import checkpoints, results, studies, sweep
from rft_fast.config import request
from rft_fast.config import zoo as zoos
from rft_fast.names import STUDIES
from rft_fast.report import runs
from rft_fast.run import trackers, wiring
from rft_fast.settings import Layers, Sharpness
from rft_fast.studies.bands import held_out, simultaneous


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


@pytest.mark.slow
def test_a_zero_shot_end_that_guesses_is_said_at_once(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal, in run.log and in the summary, once each; and what nothing can be concluded from."""
    images = np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "even.npz", images=images, labels=np.arange(60) % 3)
    np.savez(tmp_path / "one.npz", images=images[:1], labels=[2])
    out = tmp_path / "run"
    more = ["--data", f"even={tmp_path / 'even.npz'}", f"one={tmp_path / 'one.npz'}", "--out", str(out)]
    alphas = ["--alphas", "0:1:2", "--device", "cpu"]
    assert sweep.main(["interpolation", *own_models(zoo), *more, *alphas]) == 0
    rows = results.load(out)
    (end, *_) = (e for e in studies.zeroshot_chances(rows, {"even": 3}))
    assert end.verdict == "near" and end.classes == 3
    config = json.loads((out / "config.json").read_text())
    assert config["scored among"] == {"near": 3, "far": 3, "even": 3, "one": 3}
    printed = capsys.readouterr()
    for text in (printed.err, (out / "run.log").read_text()):
        assert " ".join(text.split()).count(end.text) == 1
        assert text.count("On one, only one image is scored") == 1
    for text in (" ".join(printed.out.split()), (out / "run.log").read_text()):
        assert text.count("Accuracies on one (one image) allow no conclusion.") == 1
        assert text.count(f"{100 * end.accuracy:.1f} % on even [95 % interval") == 1
    # Runs of earlier versions, whose configuration does not know the number of classes, go on.
    del config["scored among"]
    assert not results.differences(config, {**config, "scored among": {"even": 3}})


def paragraph(text: str, start: str) -> str:
    (found,) = (part for part in text.split("\n\n") if part.strip().startswith(start))
    return found


@pytest.mark.slow
def test_a_whole_run(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # tables stay whole
    out = tmp_path / "run"
    arguments = ["interpolation", *own_models(zoo), "--alphas", "0:1:3", "0.1", "--samples", "10",
                 "--seed", "3", "--xi", "0.05", "--device", "cpu", "--impl", "reference",
                 "--batch-size", "7", "--out", str(out)]  # fmt: skip
    assert sweep.main(arguments) == 0
    rows = results.load(out)
    assert len(rows) == 2 * 2 * 4
    assert rows["model"].unique().tolist() == ["a", "b"]
    assert rows["dataset"].unique().tolist() == ["near", "far"]
    assert sorted(rows["alpha"].unique()) == [0, 0.1, 0.5, 1]
    assert set(rows["samples"]) == {10}
    assert rows.groupby("dataset")["ood"].first().to_dict() == {"near": False, "far": True}
    csv = pd.read_csv(out / "rows.csv")
    np.testing.assert_allclose(csv["loss"], rows["loss"], rtol=1e-14)
    assert (out / "figures" / "interpolation.png").stat().st_size > 10_000

    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["along"]["alphas"] == [0, 0.1, 0.5, 1]
    along, computed = config["settings"]["along"], config["settings"]["computed"]
    assert (along["samples"], along["seed"], along["xi"]) == (10, 3, 0.05)
    assert (computed["batch_size"], computed["impl"], computed["device"]) == (7, "reference", "cpu")
    assert config["run"]["out"] == str(out) and config["run"]["overwrite"] is False
    assert config["finetuned"]["b"]["sha256"] == checkpoints.sha256(zoo / "b.safetensors")
    assert config["zeroshot"]["path"] == str(zoo / "zeroshot.safetensors")
    assert config["data"]["far"]["samples"] == 10 and config["data"]["near"]["ood"] is False
    assert set(config["versions"]) >= {"python", "torch", "rft_fast", "open_clip"}

    printed = capsys.readouterr()
    said(printed.err, "10 images")  # no progress bar
    for fact in studies.summarize(rows, 0.05).to_dict("records"):
        mode = "-" if pd.isna(fact["mode"]) else fact["mode"]
        (line,) = (
            line.split()
            for part in printed.out.split("\n\n")
            if part.strip().startswith(fact["dataset"] + ":")
            for line in part.splitlines()
            if line.split()[:1] == [fact["model"]]
        )
        assert line[1] == f"{100 * fact['zero_shot']:.1f}"
        assert line[2] == f"{100 * fact['fine_tuned']:.1f}"
        assert float(line[3]) == fact["best_alpha"]
        assert float(line[4]) == pytest.approx(100 * fact["gain"], abs=0.051)
        assert " ".join(line).endswith(mode)
    words = [line for line in printed.out.splitlines() if line.split()[:1] not in (["a"], ["b"])]
    said("\n".join(words), "near: in distribution, 10 images", "5 points", out / "rows.csv")

    # The same directory for something else: refused, and nothing in it changes; then replaced on purpose.
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    other = [*arguments, "--xi", "0.06"]
    sweep_refused(other, "--xi", "0.05", "0.06")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    short = ["interpolation", *own_models(zoo), "--alphas", "0", "1"]
    assert sweep.main([*short, "--out", str(out), "--overwrite"]) == 0
    assert len(results.load(out)) == 2 * 2 * 2


@pytest.fixture(scope="module")
def everything(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory and the output of a run of all studies."""
    out = tmp_path_factory.mktemp("all") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert sweep.main([*own_models(zoo, "abc"), *BRIEF, "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.mark.slow
def test_all_studies(everything: tuple[Path, str]) -> None:
    out, printed = everything
    rows = results.load(out)
    layers = list(rows.loc[rows["study"] == "layers", "layer"].unique())
    assert len(layers) == 13 and set(layers) == set(
        rows.loc[rows["study"] == "layer-sharpness", "layer"].unique()
    )
    counts = rows["study"].value_counts()
    assert counts["interpolation"] == 3 * 5 * 2  # models, alphas, data sets
    assert counts["layers"] == 2 * 13 * 5  # the paper's two models
    assert counts["sharpness"] == 3 * 3 * 2  # models, alphas, rhos
    assert counts["layer-sharpness"] == 3 * 13 * 3 * 2
    part = {study: rows[rows["study"] == study] for study in counts.index}
    assert set(part["layers"]["dataset"]) == set(part["prune"]["dataset"]) == {"far"}
    assert set(part["sharpness"]["dataset"]) == set(part["layer-sharpness"]["dataset"]) == {"near"}
    assert set(part["layers"]["samples"]) == {39} and set(part["sharpness"]["samples"]) == {12}
    assert set(part["sharpness"]["on"]) == {"interpolated"}
    assert set(part["layer-sharpness"]["on"]) == {"finetuned"}
    assert set(part["layer-sharpness"]["draws"]) == {0, 4} and set(part["prune"]["keep"]) == {0.5, 1.0}
    # The models of highest and lowest best gain; there is one out-of-distribution set.
    far = part["interpolation"].query("dataset == 'far' and alpha > 0")
    best = far.groupby("model")["gain"].max().sort_values()
    assert {best.index[0], best.index[-1]} == set(part["layers"]["model"]) == set(part["prune"]["model"])

    for study in (*counts.index, "correlation", "claim"):
        assert (out / "figures" / f"{study}.png").stat().st_size > 10_000
    assert set(pd.read_csv(out / "claim.csv")["layers"]) == {13}
    table = pd.read_csv(out / "correlation.csv")
    assert set(table["measure"]) >= {"general", "layer"} and set(table["models"]) == {3}
    # --straggler-margin reaches the correlation, too.
    unstable = studies.stragglers(rows, 1e-4).query("straggler")["layer"].unique()
    assert len(unstable) and list(studies.stragglers(rows).query("straggler")["layer"].unique()) != list(
        unstable
    )
    assert set(table.loc[table["measure"] == "stragglers", "layer"]) == {", ".join(unstable)}
    config = json.loads((out / "config.json").read_text())
    assert config["sharpness images"] == {"near": 12} and config["layer images"] == {"far": 39}
    assert config["settings"]["sharpness"]["rhos"] == [0.5, 1.0]
    assert config["measured"] == [*STUDIES, "claim"]

    # Every number of the report is one of the rows.
    facts = studies.stragglers(rows, 1e-4)
    for model, group in facts.groupby("model"):
        found = int(group["straggler"].sum())
        are = "is a straggler" if found == 1 else "are stragglers"
        assert f"{model} on far: {found} of 13 layers {are}" in printed
    flat = studies.near_zero(rows)
    for (model, _), group in flat.groupby(["model", "rho"]):
        count = int(group["near_zero"].sum())
        assert f"{model}: {count} of 13 layers {'is' if count == 1 else 'are'} flat" in printed
    for fact in studies.pruning_effect(rows).to_dict("records"):
        assert f"{100 * fact['change']:+.1f}" in printed
    one = table.query("measure == 'general' and dataset == 'far' and outcome == 'accuracy' and alpha == 1")
    assert all(f"{tau:+.2f}" in printed for tau in one["kendall"].dropna())
    assert printed.startswith("In short\n") and "of 3 models beat zero-shot" in " ".join(printed.split())


@pytest.mark.slow
def test_rows_do_not_depend_on_which_other_studies_run(
    everything: tuple[Path, str], zoo: Path, tmp_path: Path
) -> None:
    whole = results.load(everything[0])
    for study, with_it in (
        ("sharpness", {"interpolation"}),
        ("layer-sharpness", {"interpolation"}),
        ("prune", {"interpolation", "layers", "layer-sharpness"}),
    ):
        out = tmp_path / study
        assert sweep.main([study, *own_models(zoo, "abc"), *BRIEF, "--out", str(out)]) == 0
        rows = results.load(out)
        assert set(rows["study"]) == {study, *with_it}
        for name in rows["study"].unique():
            models = rows.loc[rows["study"] == name, "model"].unique()
            then = whole[(whole["study"] == name) & whole["model"].isin(models)]
            pd.testing.assert_frame_equal(
                rows[rows["study"] == name].drop(columns="seconds").reset_index(drop=True),
                then.drop(columns="seconds").reset_index(drop=True),
            )


@pytest.mark.slow
def test_named_models_and_layers(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    named = ["visual.conv1", r"re:.*\.mlp\..*"]
    arguments = ["prune", *own_models(zoo, "abc"), *BRIEF, "--models", "b", "--prune-layers", *named]
    assert sweep.main([*arguments, "--no-control", "--out", str(out)]) == 0
    rows = results.load(out)
    assert set(rows["study"]) == {"interpolation", "prune"}
    pruned = rows[rows["method"].notna()]
    block = "visual.transformer.resblocks.0.mlp"
    assert set(pruned["layer"]) == {f"visual.conv1, {block}.c_fc, {block}.c_proj"}
    assert set(pruned["model"]) == {"b"} and set(pruned["criterion"]) == {"named"}
    assert not pruned["control"].any()
    own = own_models(zoo)
    sweep_refused([*own, "--layers", "visual.conv2"], "visual.conv1")
    sweep_refused([*own, "--prune-layers", "conv1"], "visual.conv1")
    sweep_refused([*own, "--exclude", "re:conv1"], "--exclude", "visual.conv1")
    sweep_refused([*own, "--exclude", "re:["], "--exclude", "unterminated")
    sweep_refused([*own, "--exclude", "re:.*"], "--exclude", "all 13 layers")


@pytest.mark.slow
def test_two_models_have_no_correlation(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_refused(["correlation", *own_models(zoo)], "3")
    out = tmp_path / "run"
    assert sweep.main([*own_models(zoo), *BRIEF, "--layers", "visual.conv1", "--out", str(out)]) == 0
    assert not (out / "correlation.csv").exists()
    said(paragraph(capsys.readouterr().out, "correlation"), "3")


@pytest.mark.slow
def test_nothing_out_of_distribution_has_no_correlation(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [word for word in own_models(zoo, "abc") if word != "--data" and not word.startswith("far=")]
    sweep_refused(["correlation", *own])
    out = tmp_path / "run"
    assert sweep.main([*own, *BRIEF, "--layers", "visual.conv1", "--out", str(out)]) == 0
    assert not (out / "correlation.csv").exists()
    said(paragraph(capsys.readouterr().out, "correlation"))


def test_options_that_take_lists_add_up_or_are_refused(zoo: Path) -> None:
    """None of them silently replaces what it was given before."""
    kinds = ["--data-kind", "near=folder", "--data-kind", "far=npz"]
    asked = request.read(["interpolation", *own_models(zoo), *kinds])
    assert {name: source.kind for name, source in asked.zoo.data.items()} == {"near": "folder", "far": "npz"}
    # A zoo's own options are no first time.
    assert request.read(["--layer-data", "uci"]).of(Layers).data == ("uci",)


@pytest.mark.slow
def test_a_tracker_that_does_not_open_is_refused(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("no key")

    monkeypatch.setattr(trackers, "WeightsAndBiases", closed)
    own = ["interpolation", *own_models(zoo), "--alphas", "0", "1", "--out", str(tmp_path / "run")]
    sweep_refused([*own, "--track", "wandb"], "RuntimeError")
    assert results.load(tmp_path / "run").empty
    assert sweep.main(own) == 0  # and it goes on without


def test_a_part_that_was_chosen_is_said(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        shutil.copytree(zoo / "near", tmp_path / "data" / part)
    own = [f"near={tmp_path / 'data'}" if word.startswith("near=") else word for word in own_models(zoo)]
    assert sweep.main(["interpolation", *own, "--alphas", "0", "1", "--out", str(tmp_path / "run")]) == 0
    (told,) = (line for line in capsys.readouterr().err.splitlines() if str(tmp_path / "data") in line)
    said(told, "near", tmp_path / "data" / "val")
    assert told in (tmp_path / "run" / "run.log").read_text()
    assert (results.load(tmp_path / "run").query("dataset == 'near'")["samples"] == 12).all()


@pytest.mark.slow
def test_several_sets_are_told_apart_in_words(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # tables stay whole
    own = [*own_models(zoo, "abc"), "--alphas", "0", "1", "--draws", "2", "--mask-seeds", "2"]
    both = ["--layer-data", "near", "far", "--sharpness-data", "near", "far", "--layers", "visual.conv1"]
    asked = ["layers", "correlation", "prune", "--prune-layers", "visual.conv1", "--models", *"abc"]
    assert sweep.main([*asked, *own, *both, "--out", str(tmp_path / "run")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "others zero-shot; 12 images of near, 40 images of far, 2 alphas" in printed
    kept = "50 % of the weights of named layers kept, 2 masks, 12 images of near, 40 images of far"
    assert kept in printed
    first = printed.partition(" near: in distribution")[0]
    assert "the named layers of" in first and "pruning" in first.lower() and "flat layers of" not in first
    table = pd.read_csv(tmp_path / "run" / "correlation.csv").query("measure == 'general' and alpha == 1")
    for fact in table.to_dict("records"):
        tau = "-" if np.isnan(fact["kendall"]) else f"{fact['kendall']:+.2f}"
        on = fact["measured_on"] + (" (circular)" if fact["circular"] else "")
        where = f"{fact['dataset']} {fact['outcome']} all weights {on} 1 1 {tau}"
        assert where in printed


@pytest.mark.slow
def test_a_goal_that_is_not_reached_is_said(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    goal = ["--goal-se", "1e-9", "--max-draws", "8", "--estimator", "plain"]
    assert sweep.main(["sharpness", *own_models(zoo), *BRIEF, *goal, "--out", str(out)]) == 0
    rows = results.load(out).query("study == 'sharpness'")
    # Those of the pilot are not among them.
    assert len(rows) == 2 * 3 * 2 and not rows["reached"].any() and set(rows["draws"]) == {4}
    said("\n".join(line for line in capsys.readouterr().out.splitlines() if "6 rows" in line))


@pytest.mark.slow
def test_the_digits_zoo_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["interpolation", "--alphas", "0:1:6", "--samples", "16"]) == 0
    (out,) = (tmp_path / "rft-runs").iterdir()
    assert out.name.startswith("digits-")
    rows = results.load(out)
    assert rows["model"].nunique() == 9 and len(rows) == 9 * 6 * rows["dataset"].nunique()
    assert str(out.relative_to(tmp_path)) in capsys.readouterr().out


def test_options_of_a_zoo_are_defaults() -> None:
    ours = zoos.digits()
    assert ours.options["layer-draws"] == 3 and ours.options["rhos"] == (0.1, 1.0)
    asked = request.read(["--out", "nowhere"])
    assert (asked.of(Sharpness).layer_draws, asked.of(Layers).data) == (3, ("rotated",))
    assert asked.of(Sharpness).rhos == (0.1, 1.0)
    assert asked.of(Sharpness).max_draws == 1000
    asked = request.read(["--out", "nowhere", "--layer-draws", "7", "--layer-data", "uci"])
    assert (asked.of(Sharpness).layer_draws, asked.of(Layers).data) == (7, ("uci",))


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["interpolatoin"], ("interpolation",)),
        (["layer-sharpnes"], ("layer-sharpness",)),
        (["xyz"], ()),
        (["--alphas"], ()),
        (["--alphas", "0:1"], ()),
        (["--alphas", "0:1:1"], ()),
        (["--alphas", "half"], ()),
        (["--alphas", "0", "nan", "1"], ("[0, 1]",)),
        (["--alphas", "-1", "0", "1"], ("[0, 1]", "-1.0")),
        (["--alphas", "0.5"], ("0.0", "1.0")),
        (["--alphas", "0:1:3", "0.5"], ("0.5",)),
        (["--samples", "0"], ()),
        (["--samples", "2.5"], ()),
        (["--batch-size", "-1"], ()),
        (["--seed", "4294967296"], ("4294967295",)),
        (["--xi", "2"], ("0.02",)),
        (["--xi", "nan"], ("0.02",)),
        (["--layer-alphas", "0.5"], ("--layer-alphas",)),
        (["--sharpness-alphas", "0.55"], ("0.55", "--alphas")),
        (["--granularity", "atom"], ("module", "block")),
        (["--models", "lr4e-3"], ()),
        (["--layer-data", "rotatde"], ("rotatde",)),
        (["--sharpness-data", "mnist", "mnist"], ()),
        (["--rhos", "0"], ("0",)),
        (["--rhos", "1", "1"], ()),
        (["--draws", "0"], ()),
        (["--draws", "5", "--estimator", "per-image-antithetic"], ("5", "6")),
        (["--estimator", "best"], ("best",)),
        (["--estimator", "apgd-l2", "--goal-se", "0.1"], ()),
        (
            ["--goal-se", "0.1", "--max-draws", "7"],
            ("--max-draws", "--draws", "--layer-draws", "8", "7"),
        ),
        (["--sharpness-alphas", "0"], ("--sharpness-alphas",)),
        (["--plan", "--json"], ("--json", "--plan")),
        (["--layers", "visual.proj", "--layers", "visual.conv1"], ("--layers",)),
        (["--rhos", "1", "--seed", "1", "--rhos", "2"], ("--rhos",)),
        (["--data-kind", "uci=npz", "--data-kind", "uci=wds"], ("--data-kind",)),
        (["--noise-batch", "0"], ("0",)),
        (["--noise-batch", "some"], ("some",)),
        (["--keep", "0"], ()),
        (["--keep", "1"], ()),
        (["--criteria", "luck"], ("luck",)),
        (["--zero-margin", "-1"], ()),
        (["--device", "cuda:99"], ("cuda:99",)),
        (["--device", "gpu"], ("gpu",)),
        (["--device", "meta"], ("meta",)),
        (["--impl", "magic"], ("magic",)),
        (["--arch", "ViT-B-32"], ("--zeroshot", "--finetuned", "--data", "--id-data")),
        (["--data", "x"], ("--arch", "--zeroshot", "--finetuned")),
        (["--data", "x="], ("NAME=PATH", "x=")),
        (["--nonsense"], ("--nonsense",)),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(
    arguments: list[str],
    facts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wiring.Models, "load", forbidden)
    sweep_refused(arguments, *facts)
    assert not list(tmp_path.iterdir())


def forbidden(*_: Any) -> None:
    raise AssertionError("something was loaded")


@pytest.mark.parametrize(
    "change",
    [
        ["--zeroshot", "{zoo}/none.pt"],
        ["--finetuned", "{zoo}/none.pt"],
        ["--finetuned", "{zoo}/near"],
        ["--finetuned", "{zoo}/a.safetensors"],
        ["--data", "off={zoo}/none.npz"],
        ["--data", "near={zoo}/far.npz"],
        ["--arch", "ViT-B-23"],
        ["--out", "{zoo}/tiny.json"],
        ["--out", "{zoo}/tiny.json/run"],
    ],
)
def test_bad_paths_are_refused_before_anything_is_loaded(
    change: list[str],
    zoo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wiring.Models, "load", forbidden)
    out = [] if "--out" in change else ["--out", str(zoo / "never")]
    sweep_refused([*own_models(zoo), *out, *(x.format(zoo=zoo) for x in change)])
    assert not (zoo / "never").exists()


def test_what_cannot_be_scored_is_refused_and_earlier_rows_stay(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    short = ["--alphas", "0", "1", "--out", str(out), "--overwrite"]
    own = ["interpolation", *own_models(zoo)]
    assert sweep.main([*own, *short]) == 0
    capsys.readouterr()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    sound = checkpoints.load(zoo / "b.safetensors")
    name = "classification_head.weight"
    save({**sound, name: sound[name] * float("nan")}, tmp_path / "nan.safetensors")
    save({**sound, name: sound[name][:, :5]}, tmp_path / "narrow.safetensors")
    (tmp_path / "empty.pt").write_bytes(b"")
    for bad in ("nan.safetensors", "narrow.safetensors", "empty.pt"):
        sweep_refused([*own, *short, "--finetuned", str(tmp_path / bad)], *bad.split())
    sweep_refused([*own, *short, "--samples", "41"], "12")
    shutil.copytree(zoo / "near", tmp_path / "more")
    (tmp_path / "more" / "1" / "cut.png").write_bytes(b"\x89PNG cut off")
    sweep_refused([*own, *short, "--data", f"m={tmp_path / 'more'}"], "cut.png")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_models_of_the_same_file_name_are_told_apart(zoo: Path, tmp_path: Path) -> None:
    twins = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        twins.append(str(shutil.copy(zoo / "a.safetensors", tmp_path / run / "final.safetensors")))
    own = ["interpolation", *own_models(zoo)]
    own[own.index("--finetuned") + 1 : own.index("--data")] = twins
    assert sweep.main([*own, "--alphas", "0", "1", "--out", str(tmp_path / "run")]) == 0
    assert results.load(tmp_path / "run")["model"].unique().tolist() == twins


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--help-all"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for word in ("examples:", "--alphas", *STUDIES, "digits", "--overwrite", "0:1:11"):
        assert word in printed


@pytest.mark.slow
def test_ctrl_c_keeps_the_rows(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Python ignores SIGINT where its parent does (a shell's background job), so it is set here.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from rft_fast.sweep import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "interpolation",
            *own_models(zoo),
            "--alphas",
            "0:1:2001",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not (out / "config.json").exists() or len(results.load(out)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    rows = results.load(out)
    assert 3 <= len(rows) == len(pd.read_csv(out / "rows.csv"))
    assert printed == "" and f"the {len(rows)} rows" in errors
    said(errors.replace(f"the {len(rows)} rows", "the 3 rows"), out)
    assert rows["alpha"].is_monotonic_increasing and rows["alpha"].iloc[0] == 0


@pytest.mark.slow
def test_gains_are_bounded_by_the_single_images_of_the_run(everything: tuple[Path, str]) -> None:
    out, printed = everything
    path = runs.read(out).facts.path
    assert set(path["gain_method"]) == {"max-t"} and "by max-T" in " ".join(printed.split())
    for fact in path.to_dict("records"):
        own = results.images(out, model=fact["model"], dataset=fact["dataset"])
        bounds = simultaneous(own.hits)
        assert (fact["gain_low"], fact["gain_high"]) == (bounds.low[1:].max(), bounds.high[1:].max())
        assert (fact["gain_held_out"], fact["gain_held_out_se"]) == held_out(own.hits)
