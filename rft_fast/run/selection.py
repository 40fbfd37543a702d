"""Which models each study of a sweep takes."""

from __future__ import annotations

import pandas as pd

from .. import studies
from ..config.request import Request
from ..names import Study


def choose(request: Request, rows: pd.DataFrame) -> dict[Study, list[str]]:
    """Study -> the models that it takes, by the rows of the interpolation.

    Those that gain most and least (:func:`rft_fast.studies.best_gains`), as many as :func:`how_many` has.
    Models that were named are taken instead, layer by layer.
    """
    everyone = list(request.zoo.finetuned)
    ranked = list(studies.best_gains(rows).sort_values(ascending=False, kind="stable").index)

    def chosen(count: int) -> list[str]:
        if count < len(everyone) and request.models is not None:
            return request.models
        picked = set(ranked[: (count + 1) // 2]) | set(ranked[len(ranked) - count // 2 :])
        return [name for name in everyone if name in picked]

    return {study: chosen(count) for study, count in how_many(request).items()}


def how_many(request: Request) -> dict[Study, int]:
    """Study -> how many models it takes.

    As many as the paper shows: all for the path and general sharpness, four layer by layer (all where the
    correlation needs them), two for layer-wise interpolation and pruning; or those that were named.
    """
    everyone = len(request.zoo.finetuned)
    layerwise = 4 if "layer-sharpness" in request.studies else 2
    if "correlation" in request.studies:
        layerwise = everyone
    few: dict[Study, int] = {"layers": 2, "layer-sharpness": layerwise, "prune": 2}
    if request.models is not None:
        few = dict.fromkeys(few, len(request.models))
    every: dict[Study, int] = {"interpolation": everyone, "sharpness": everyone}
    return every | {study: min(count, everyone) for study, count in few.items()}
