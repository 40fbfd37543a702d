"""The best point of a path, written as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from support import tiny_zoo
from support.wording import refused

from rft_fast import checkpoints, merge, sweep
from rft_fast.run.saving import best, remove_earlier, targets


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def swept(zoo: Path, out: Path, *more: str) -> pd.DataFrame:
    words = ["interpolation", *tiny_zoo.own_models(zoo), "--alphas", "0:1:5", "--device", "cpu", "--quiet"]
    assert sweep.main([*words, "--out", str(out), *more]) == 0
    return pd.read_csv(out / "rows.csv")


@pytest.mark.slow
@pytest.mark.parametrize(("by", "name"), [("id", "near"), ("ood", "far")])
def test_the_best_point_is_written_and_is_a_point_of_a_sweep(
    zoo: Path, tmp_path: Path, by: str, name: str
) -> None:
    rows = swept(zoo, tmp_path / "run", "--save-best", "--best-by", by)
    zero = checkpoints.load(zoo / "zeroshot.safetensors")
    for model in "ab":
        accuracy = rows[(rows.model == model) & (rows.dataset == name)].set_index("alpha").accuracy
        alpha = min(a for a, value in accuracy.items() if value == accuracy.max())
        file = tmp_path / "run" / "best" / f"{model}.safetensors"
        origin = merge.provenance(file)
        assert origin is not None and origin["numbers"]["alpha"] == [alpha]
        assert origin["selection"] == {"by": by, "datasets": [name], "accuracy": accuracy.max()}
        assert [s["sha256"] for s in origin["sources"]] == [
            checkpoints.sha256(zoo / f"{source}.safetensors") for source in ("zeroshot", model)
        ]
        tuned, got = checkpoints.load(zoo / f"{model}.safetensors"), checkpoints.load(file)
        assert set(zero) - set(got) == {"logit_scale"}
        for key, tensor in got.items():
            truth = (1 - alpha) * zero[key].double() + alpha * tuned[key].double()
            torch.testing.assert_close(tensor.double(), truth, rtol=0, atol=1e-6)
    words = tiny_zoo.own_models(zoo)
    words[words.index("--finetuned") + 1 : words.index("--data")] = [str(file)]
    if alpha:
        again = swept_with(words, tmp_path / "again")
        end = again[(again.dataset == name) & (again.alpha == 1)].accuracy.item()
        assert end == accuracy[alpha]


def swept_with(models: list[str], out: Path) -> pd.DataFrame:
    words = ["interpolation", *models, "--alphas", "0", "1", "--device", "cpu", "--quiet"]
    assert sweep.main([*words, "--out", str(out)]) == 0
    return pd.read_csv(out / "rows.csv")


def rows_of(*entries: tuple[str, float, str, float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"study": "interpolation", "model": m, "alpha": a, "dataset": d, "accuracy": x}
            for m, a, d, x in entries
        ]
    )


def test_the_mean_over_data_sets_decides_and_of_equal_ones_the_smallest_alpha() -> None:
    rows = rows_of(
        *(("m", alpha, "p", x) for alpha, x in ((1.0, 0.9), (0.5, 0.7), (0.0, 0.1), (0.75, 0.6))),
        *(("m", alpha, "q", x) for alpha, x in ((1.0, 0.1), (0.5, 0.5), (0.0, 0.9), (0.75, 0.6))),
        ("other", 1.0, "p", 1.0),
        ("m", 0.25, "p", 1.0),  # not measured on q
        ("m", 1.0, "r", 1.0),
    )
    found = best(rows, "m", ("p", "q"))
    assert (found.alpha, found.accuracy) == (0.5, pytest.approx(0.6))
    with refused(ValueError, "m", "p", "s"):
        best(rows, "m", ("p", "s"))


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["interpolation", "--best-by", "ood"], ["--save-best"]),
        (["interpolation", "--save-best", "--id-data", "none"], ["--best-by"]),
    ],
)
def test_what_cannot_be_saved_is_refused_before(
    zoo: Path, tmp_path: Path, words: list[str], facts: list[object]
) -> None:
    models = tiny_zoo.own_models(zoo)
    if "none" in words:
        words, models = words[:2], models[: models.index("--id-data")]
    tiny_zoo.sweep_refused([*words, *models, "--out", str(tmp_path / "run"), "--device", "cpu"], *facts)
    assert not (tmp_path / "run").exists()


def test_files_lie_in_the_run_whatever_the_models_are_called() -> None:
    run = Path("run")
    names = ["a", "/data/one/model.pt", "../up", "a b.c"]
    assert [file.parent for file in targets(run, names).values()] == [run / "best"] * 4
    assert len({file.name for file in targets(run, names).values()}) == 4
    with refused(ValueError, "x/y", "x-y"):
        targets(run, ["x/y", "x-y"])
    targets(run, ["m" * 220])  # with .safetensors 232 bytes, the most that leaves room for a temporary name
    with refused(ValueError, "m" * 221):
        targets(run, ["m" * 221])


@pytest.mark.slow
def test_models_of_one_file_name_are_written_to_the_run(zoo: Path, tmp_path: Path) -> None:
    """Such models are called by their paths."""
    words = tiny_zoo.own_models(zoo)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes((zoo / f"{name}.safetensors").read_bytes())
        words[words.index(str(zoo / f"{name}.safetensors"))] = str(tmp_path / name / "model.safetensors")
    before = {*tmp_path.rglob("*")}
    words = ["interpolation", *words, "--alphas", "0", "1", "--device", "cpu", "--quiet", "--save-best"]
    assert sweep.main([*words, "--out", str(tmp_path / "run")]) == 0
    made = [file for file in {*tmp_path.rglob("*.safetensors")} - before]
    assert len(made) == 2 and {file.parent for file in made} == {tmp_path / "run" / "best"}


def test_a_folder_that_cannot_be_written_to_is_refused_before(zoo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to(tmp_path)
    words = ["interpolation", "--save-best", *tiny_zoo.own_models(zoo), "--device", "cpu"]
    tiny_zoo.sweep_refused([*words, "--out", str(run)], run / "best", tmp_path)
    assert not (run / "rows.sqlite").exists()


def best_point(file: Path, **more: object) -> None:
    """A file as --save-best writes it, as far as its header goes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    origin = {"method": "interpolate", "numbers": {}, "sources": [], **more}
    save_file({"visual.x": torch.ones(1)}, file, {"rft_fast.merge": json.dumps(origin)})


def test_the_best_points_of_a_run_that_is_replaced_go_with_it(tmp_path: Path) -> None:
    """Only those: files of other merges, and what is no merge, are someone's own."""
    folder = tmp_path / "run" / "best"
    best_point(folder / "a.safetensors", selection={"by": "id"})
    best_point(folder / "b.safetensors")
    (folder / "c.safetensors").write_text("no tensors")
    (folder / "d.pt").write_bytes(b"")
    best_point(tmp_path / "else.safetensors", selection={"by": "id"})
    (folder / "e.safetensors").symlink_to(tmp_path / "else.safetensors")
    remove_earlier(tmp_path / "run")
    assert sorted(file.name for file in folder.iterdir()) == [f"{name}.safetensors" for name in "bc"] + [
        "d.pt",
        "e.safetensors",
    ]
    remove_earlier(tmp_path / "no run")


@pytest.mark.slow
def test_overwriting_a_run_removes_its_best_points(zoo: Path, tmp_path: Path) -> None:
    swept(zoo, tmp_path / "run", "--save-best")
    swept(zoo, tmp_path / "run", "--overwrite", "--seed", "1")
    assert not [*(tmp_path / "run" / "best").iterdir()]


def test_a_file_of_someone_else_is_not_replaced(zoo: Path, tmp_path: Path) -> None:
    best_point(tmp_path / "run" / "best" / "a.safetensors", selection={"by": "id"})
    (tmp_path / "run" / "best" / "b.safetensors").write_text("mine")
    words = ["interpolation", "--save-best", *tiny_zoo.own_models(zoo), "--device", "cpu"]
    tiny_zoo.sweep_refused([*words, "--out", str(tmp_path / "run")], "b.safetensors")


@pytest.mark.slow
def test_it_is_no_setting_that_resuming_compares(zoo: Path, tmp_path: Path) -> None:
    swept(zoo, tmp_path / "run")
    swept(zoo, tmp_path / "run", "--save-best")
    assert (tmp_path / "run" / "best" / "a.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())
