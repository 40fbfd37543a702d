"""Rules that choose alpha without labels from elsewhere, and their regrets, against answers known by hand."""

from __future__ import annotations

import math
from pathlib import Path as File

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student
from support import tiny_zoo
from support.tiny_models import dataset, deep
from support.wording import refused

from rft_fast import results, studies, sweep
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path
from rft_fast.report.__main__ import main as report
from rft_fast.studies.bands import dealt
from rft_fast.studies.choice import RULES, cross_fitted
from rft_fast.studies.choice import _interval as interval
from rft_fast.studies.images import ImageResults

ALPHAS = [0.0, 0.2, 0.6, 1.0]


def path_rows(
    accuracy: list[float], model: str = "m", dataset: str = "far", images: int = 1000, **more: object
) -> pd.DataFrame:
    """Rows of a path of these accuracies. more: other columns, of which lists have a value per position."""
    columns = {
        "loss": 1.0,
        "bump": 0.0,
        "ood": dataset == "far",
        "alpha": ALPHAS,
        "accuracy": accuracy,
    } | more
    return studies.frame(
        {"study": "interpolation", "model": model, "dataset": dataset, "samples": images}
        | {name: value[place] if isinstance(value, list) else value for name, value in columns.items()}
        for place in range(len(ALPHAS))
    )


class Kept:
    """Results of single images of the data set "far", with the positions in another order than the rows."""

    def __init__(self, hits: dict[str, np.ndarray], predictions: dict[str, np.ndarray] | None = None) -> None:
        self.hits, self.predictions = hits, predictions or {}

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        assert study == "interpolation" and dataset == "far"
        if model not in self.hits:
            return None
        hits, predictions = self.hits[model][::-1], self.predictions.get(model)
        rows = pd.DataFrame({"alpha": ALPHAS[::-1]})
        losses = np.zeros(hits.shape, dtype=np.float16)
        return ImageResults(rows, hits, losses, None if predictions is None else predictions[::-1])


def test_each_rule_chooses_by_its_own_measure() -> None:
    rows = pd.concat(
        [
            path_rows([0.5, 0.52, 0.55, 0.4]),
            # Means over two data sets: accuracy .5, .6, .6, .55; loss 1, 2, .75, .5; bump 0, -.3, -.2, 0.
            path_rows(
                [0.6, 0.6, 0.7, 0.6], dataset="x", loss=[1.0, 2.0, 0.5, 0.5], bump=[0.0, -0.6, -0.2, 0.0]
            ),
            path_rows(
                [0.4, 0.6, 0.5, 0.5], dataset="y", loss=[1.0, 2.0, 1.0, 0.5], bump=[0.0, 0.0, -0.2, 0.0]
            ),
        ]
    )
    found = studies.choice(rows.sample(frac=1, random_state=0)).set_index("rule")
    assert list(found.index) == [rule for rule in RULES if rule not in ("agreement", "confidence")]
    assert found["alpha"].to_dict() == {
        "ID accuracy": 0.2, "ID loss": 1.0, "ID bump": 0.2, "alpha 0.5": 0.6, "fine-tuned": 1.0,
        "zero-shot": 0.0,
    }  # fmt: skip
    np.testing.assert_allclose(found["regret"], [0.03, 0.15, 0.03, 0.0, 0.15, 0.05])
    np.testing.assert_allclose(found["gain"], [0.02, -0.1, 0.02, 0.05, -0.1, 0.0])
    assert (found["best_alpha"] == 0.6).all() and not found["cross_fitted"].any()
    assert found["regret_se"].isna().all()


def test_a_loss_that_is_not_a_number_is_never_chosen() -> None:
    broken = [1.0, math.nan, 0.8, math.inf]
    rows = [path_rows([0.5] * 4), path_rows([0.5] * 4, dataset="x", loss=broken, bump=broken)]
    found = studies.choice(pd.concat(rows)).set_index("rule")["alpha"]
    assert found["ID loss"] == 0.6 == found["ID bump"]
    other = path_rows([0.5] * 4, dataset="y", loss=[1.0, 0.1, 0.9, 0.9], bump=[0.0, -0.8, -0.1, 0.0])
    found = studies.choice(pd.concat([rows[0], rows[1], other])).set_index("rule")["alpha"]
    assert found["ID loss"] == 0.6 == found["ID bump"]  # not 0.2, where only one of two has a loss


def test_the_agreement_with_both_ends() -> None:
    """It falls from 10 to 0 images of ten with zero-shot, and rises from 0 to 10 with fine-tuned."""
    predictions = np.array([[0] * 10, [0] * 7 + [1] * 3, [0] * 4 + [1] * 6, [1] * 10], dtype=np.uint16)
    hits = np.ones((4, 10), dtype=bool)
    rows = pd.concat([path_rows([1.0] * 4, images=10), path_rows([0.5] * 4, dataset="x")])
    found = studies.choice(rows, Kept({"m": hits}, {"m": predictions})).set_index("rule")
    assert found.loc["agreement", "alpha"] == 0.6 and (found["regret"] == 0).all()


def test_confidence_is_the_lowest_entropy_on_the_images_themselves() -> None:
    far, near = path_rows([0.5] * 4, entropy=[0.7, 0.9, 0.2, 0.3]), path_rows([0.5] * 4, dataset="x")
    found = studies.choice(pd.concat([far, near])).set_index("rule")
    assert found.loc["confidence", "alpha"] == 0.6
    far["entropy"] = [math.nan, 0.9, 0.2, 0.3]
    assert "confidence" not in set(studies.choice(pd.concat([far, near]))["rule"])  # not known everywhere
    far["loss"] = [math.nan, 1.0, 1.0, 1.0]  # not a number at all
    assert "confidence" in set(studies.choice(pd.concat([far, near]))["rule"])


@pytest.mark.parametrize("batch", [4, 64])
def test_rows_of_the_path_have_the_entropy_of_its_predictions(batch: int) -> None:
    model = deep().eval()
    draw = torch.Generator().manual_seed(0)
    zero = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw) for name, tensor in zero.items()}
    data = dataset("a", 21)
    rows = studies.interpolation(
        Path(model, zero, one), Evaluator(model, [data], batch_size=batch), [0, 0.5, 1]
    )
    for alpha, entropy in zip(rows["alpha"], rows["entropy"], strict=True):
        model.load_state_dict({name: torch.lerp(zero[name], one[name], alpha) for name in zero})
        with torch.no_grad():
            pixels = (data.images.float() / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(
                data.std
            ).view(3, 1, 1)
            p = model(pixels).double().softmax(1)
        assert entropy == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=1e-6)


def test_parts_of_noted_images_note_their_own() -> None:
    model = deep().eval()
    noted = Evaluator(model, [dataset("a", 21)], batch_size=4).noting()
    whole = noted.scores()["a"].entropies
    parts = [part.scores()["a"].entropies for part in noted.parts(8, "a")]
    assert whole is not None and len(whole) == 21
    torch.testing.assert_close(torch.cat([part for part in parts if part is not None]), whole)


def test_a_best_position_that_is_chance_costs_nothing() -> None:
    """All positions are right with probability one half: the regret of each is 0 on average, or less."""
    draw = np.random.default_rng(0)
    observed, fitted = [], []
    for _ in range(200):
        hits = draw.random((4, 100)) < 0.5
        observed.append(hits.mean(axis=1).max() - hits[0].mean())
        fitted.append(cross_fitted(hits).mean() - hits[0].mean())
    error = np.std(fitted, ddof=1) / math.sqrt(200)
    assert abs(np.mean(fitted)) < 3 * error and np.mean(observed) > 10 * error


def test_cross_fitting_by_brute_force() -> None:
    draw = np.random.default_rng(1)
    hits = draw.random((4, 53)) < draw.random((4, 1))
    fold = dealt(53)
    for image in range(53):
        others = [hits[position, fold != fold[image]].mean() for position in range(4)]
        assert cross_fitted(hits)[image] == hits[int(np.argmax(others)), image]


def test_means_over_models() -> None:
    draw = np.random.default_rng(2)
    rate = draw.random((3, 4, 1))
    hits = {str(model): draw.random((4, 60)) < rate[model] for model in range(3)}
    rows = [path_rows([*table.mean(axis=1)], model, images=60) for model, table in hits.items()]
    rows += [path_rows([0.5, 0.6, 0.5, 0.5], model, "x") for model in hits]
    kept = Kept(hits)
    each = studies.choice(pd.concat(rows), kept)
    found = studies.choice_means(pd.concat(rows), kept).set_index("rule")
    for rule, own in each.groupby("rule"):
        fact = found.loc[rule]
        assert fact["models"] == 3 and fact["largest"] == own["regret"].max()
        assert fact["regret"] == pytest.approx(own["regret"].mean())
        usual = found.loc["ID accuracy", "regret"]
        assert fact["beyond_id"] == pytest.approx(fact["regret"] - usual)
        # The best positions are the same for all rules, so they cancel, and what is left is known.
        chosen = [int(np.flatnonzero(np.array(ALPHAS) == alpha)[0]) for alpha in own["alpha"]]
        table = np.stack(
            [hits[m][1].astype(float) - hits[m][at] for m, at in zip(own["model"], chosen, strict=True)]
        )
        half = (fact["beyond_id_high"] - fact["beyond_id_low"]) / 2
        error = interval(table.mean(axis=1).tolist(), table)[1]
        if rule == "ID accuracy":
            assert fact["beyond_id"] == 0 and math.isnan(half)
        else:  # five rules beside it: 99 %
            assert half == pytest.approx(error * student.ppf(1 - 0.025 / 5, 2))
    alone = studies.choice_means(pd.concat([own for own in rows if (own["model"] == "0").all()]), kept)
    assert alone["regret_se"].isna().all() and alone["beyond_id_low"].isna().all()


def test_a_rule_that_not_all_models_know_is_compared_model_by_model() -> None:
    draw = np.random.default_rng(4)
    hits = {model: draw.random((4, 40)) < 0.5 for model in "abc"}
    predictions = {model: draw.integers(0, 3, (4, 40)).astype(np.uint16) for model in "bc"}
    rows = [path_rows([*table.mean(axis=1)], model, images=40) for model, table in hits.items()]
    rows += [path_rows([0.5, 0.6, 0.5, 0.5], model, "x") for model in hits]
    kept = Kept(hits, predictions)
    each = studies.choice(pd.concat(rows), kept).set_index(["rule", "model"])["regret"]
    found = studies.choice_means(pd.concat(rows), kept).set_index("rule").loc["agreement"]
    assert found["models"] == 2 and "a" not in each["agreement"]
    assert found["beyond_id"] == pytest.approx((each["agreement"] - each["ID accuracy"][["b", "c"]]).mean())
    assert found["beyond_id_low"] < found["beyond_id"]


def test_equal_regrets_are_no_certainty() -> None:
    hits = {model: np.ones((4, 20), dtype=bool) for model in "abc"}
    rows = [path_rows([1.0] * 4, model, dataset, 20) for model in hits for dataset in ("far", "x")]
    found = studies.choice_means(pd.concat(rows), Kept(hits))
    assert (found["regret"] == 0).all() and (found["regret_se"] == 0).all()
    assert found[["regret_low", "regret_high", "beyond_id_low"]].isna().all(axis=None)


@pytest.mark.parametrize(("of_models", "of_images"), [(0.0, 0.1), (0.07, 0.0), (0.07, 0.1)])
def test_intervals_cover_the_mean_of_their_population(of_models: float, of_images: float) -> None:
    """Regrets with effects of model and of image, which all entries of a row or of a column share."""
    draw = np.random.default_rng(3)
    covered, models, images = 0, 9, 100
    for _ in range(1000):
        effects = draw.normal(0, of_models, (models, 1)) + draw.normal(0, of_images, (1, images))
        table = (draw.random((models, images)) < 0.3 + effects).astype(float)
        _, _, low, high = interval(table.mean(axis=1).tolist(), table)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 1000 <= 0.99


@pytest.mark.parametrize("missing", ["far", "x"])
def test_data_that_are_missing_are_named(missing: str) -> None:
    rows = pd.concat([path_rows([0.5] * 4), path_rows([0.5] * 4, dataset="x")])
    for call in (studies.choice, studies.choice_means):
        with refused(ValueError, {"far": "--data", "x": "--id-data"}[missing]):
            call(rows[rows["dataset"] != missing])


def test_paths_that_cannot_be_compared_are_refused() -> None:
    far, near = path_rows([0.5] * 4), path_rows([0.5] * 4, dataset="x")
    with refused(ValueError, "other", "in-distribution"):
        studies.choice(pd.concat([far, path_rows([0.5] * 4, "other"), near]))
    near["alpha"] = near["alpha"].replace(0.2, 0.3)
    near["accuracy"] = near["alpha"].map({0.3: 0.9}).fillna(0.5)
    with refused(ValueError, "m", "0.3", "far"):
        studies.choice(pd.concat([far, near]))
    with refused(TypeError):
        studies.choice(far, images=3)  # type: ignore[arg-type]
    with refused(ValueError):
        studies.choice(far.iloc[:2])


@pytest.mark.slow
def test_a_run(tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, figure, words and page of a run; the same again from its directory."""
    zoo = tiny_zoo.make(tmp_path)
    out = tmp_path / "run"
    command = ["choice", *tiny_zoo.own_models(zoo, "abc"), "--alphas", "0:1:5", "--out", str(out)]
    assert sweep.main(command) == 0 and report([str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Choosing alpha by accuracy in distribution costs" in printed
    table = pd.read_csv(out / "choice.csv")
    expected = studies.choice(results.load(out), results.Stored(out))
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert set(table["rule"]) == set(RULES) and table["cross_fitted"].all()
    path = results.load(out).query("study == 'interpolation'")
    assert path["entropy"].notna().all()  # at the ends, too, whose scores are kept on disk
    assert {file.name for file in (out / "figures").glob("choice.*")} == {"choice.png", "choice.txt"}
    assert "Which alpha, without labels from elsewhere?" in (out / "report.html").read_text()


def test_a_run_without_data_in_distribution_is_refused(tmp_path: File) -> None:
    words = tiny_zoo.own_models(tiny_zoo.make(tmp_path), "a")
    tiny_zoo.sweep_refused(["choice", *words[: words.index("--id-data")]], "--id-data")
