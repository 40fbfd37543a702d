"""Which models each study of a sweep takes."""

from __future__ import annotations

import pandas as pd

from .. import catalogue, studies
from ..config.request import Request
from ..settings import Layers
from ..studies.interpolate import extremes


def choose(request: Request, rows: pd.DataFrame) -> dict[str, list[str]]:
    """Study -> names of the models that it takes, by the rows of the interpolation.

    These are the models that gain most and least (:func:`rft_fast.studies.best_gains`), as many as
    :func:`how_many` says, or the models that the request names.
    """
    everyone, named = list(request.zoo.finetuned), request.of(Layers).models
    gains = studies.best_gains(rows)

    def chosen(count: int) -> list[str]:
        if count < len(everyone) and named is not None:
            return list(named)
        return extremes(everyone, gains, count)

    return {study: chosen(count) for study, count in how_many(request).items()}


def how_many(request: Request) -> dict[str, int]:
    """Study that is measured -> how many models it takes."""
    measured = [catalogue.study(name) for name in request.measured]
    return {study.name: study.models(request) for study in measured if study.measures}
