"""Results of single images that studies fill into a dictionary, against float64 by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.wording import refused
from torch import nn

from rft_fast import studies
from rft_fast.datasets import Dataset
from rft_fast.evaluate import Evaluator
from rft_fast.path import Path
from rft_fast.studies.facts import Facts
from rft_fast.studies.images import Kept

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHAS = [0.0, 0.3, 1.0]
Study = Callable[..., pd.DataFrame]


def a_set(name: str, count: int, ood: bool) -> Dataset:
    draw = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 5, (count,), generator=draw)
    return Dataset(name, images, labels, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ood=ood)


class Setting:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5))
        draw = torch.Generator().manual_seed(3)
        shapes = {name: weight.shape for name, weight in self.model.state_dict().items()}
        self.ends = [
            {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()} for _ in "01"
        ]
        self.path = Path(self.model, *self.ends)
        self.sets = {data.name: data for data in (a_set("far", 97, True), a_set("near", 41, False))}
        self.evaluator = Evaluator(self.model, [*self.sets.values()], batch_size=16)

    def brute(self, alphas: dict[str, float], data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Losses and predictions in float64, each layer at its alpha."""
        zero, one = ({name: tensor.double() for name, tensor in end.items()} for end in self.ends)
        w = {name: torch.lerp(zero[name], one[name], alphas[name[0]]) for name in zero}
        mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (data.mean, data.std))
        x = ((data.images.double() / 255 - mean) / std).flatten(1)
        logits = torch.tanh(x @ w["1.weight"].T + w["1.bias"]) @ w["3.weight"].T + w["3.bias"]
        losses = logits.logsumexp(1) - logits[torch.arange(len(x)), data.labels]
        return losses.numpy(), logits.argmax(1).numpy()


def interpolation(s: Setting, **more: Any) -> pd.DataFrame:
    return studies.interpolation(s.path, s.evaluator, ALPHAS, **more)


def layers(s: Setting, **more: Any) -> pd.DataFrame:
    return studies.layerwise_interpolation(s.path, s.evaluator, ALPHAS, **more)


def prune(s: Setting, **more: Any) -> pd.DataFrame:
    return studies.prune_stragglers(s.path, s.evaluator, ALPHAS, layers=["1"], seeds=[4], **more)


@pytest.mark.parametrize("study", [interpolation, layers, prune])
def test_each_row_has_the_results_of_its_images(study: Study) -> None:
    s, kept = Setting(), dict[int, Any]()
    rows = study(s, images=kept)
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), study(Setting()).drop(columns="seconds"))
    for name, data in s.sets.items():
        found = studies.image_results(rows, kept, name)
        here = rows[rows["dataset"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(found.rows, here)
        assert found.alphas.tolist() == here["alpha"].tolist()
        assert found.hits.mean(1).tolist() == here["accuracy"].tolist()
        assert found.predictions is not None
        assert ((found.predictions == data.labels.numpy()) == found.hits).all()
        np.testing.assert_allclose(found.losses.astype(float).mean(1), here["loss"], rtol=2**-11)
        for k, row in enumerate(here.to_dict("records")):
            if pd.isna(row["method"]):
                at = {"1": row["alpha"], "3": row["alpha"]}
                if row["study"] == "layers":
                    at = {"1": 0.0, "3": 0.0} | {row["layer"]: row["alpha"]}
                losses, predictions = s.brute(at, data)
                np.testing.assert_allclose(found.losses[k], losses, rtol=2**-10, atol=2**-23)
                assert found.predictions[k].tolist() == predictions.tolist()


def test_they_are_there_before_the_sink_is_called() -> None:
    kept: Kept = {}
    told: list[int] = []

    def sink(number: int, rows: list[dict[str, object]]) -> None:
        told.append(number)
        assert len(kept.pop(number)) == len(rows)

    prune(Setting(), images=kept, sink=sink, only=[0, 2, 5])
    assert told == [0, 2, 5] and not kept


def test_what_does_not_belong_together_is_refused() -> None:
    s, kept = Setting(), dict[int, Any]()
    rows = interpolation(s, images=kept)
    with refused(ValueError, "other", "far", "near"):
        studies.image_results(rows, kept, "other")
    with refused(ValueError, 6, 5):
        studies.image_results(rows, {number: kept[number] for number in range(5)}, "far")


def test_facts_give_them_by_the_names_that_are_shown() -> None:
    s, kept = Setting(), dict[int, Any]()
    rows = interpolation(s, images=kept, model="$a")
    asked = []

    class Images:
        def of(self, study: str, model: str, dataset: str) -> studies.ImageResults:
            asked.append((study, model, dataset))
            return studies.image_results(rows, kept, dataset)

    facts = Facts(rows, images=Images())
    shown = rows.assign(model="a", dataset=rows["dataset"].map({"far": "FAR", "near": "near"}))
    for each in (facts.renamed(shown), facts.but(rows).renamed(shown)):
        assert each.images is not None
        found = each.images.of("interpolation", "a", "FAR")
        assert found is not None and found.hits.shape == (3, 97)
        assert each.images.of("interpolation", "a", "other") is None
    assert asked == [("interpolation", "$a", "far")] * 2
    assert facts.but(settings=None).images is facts.images and Facts(rows).images is None
