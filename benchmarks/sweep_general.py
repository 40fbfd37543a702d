"""Sharpness of all weights against the published practice, at equal draws and at equal standard error.

Two contenders are ours, since either may need less time, by rho: noise per image ("image") and the same with
its control ("gradient"). The rest is as in sweep_sharpness.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import peers_sweep
import sweep_case
from sweep_bench import Bench
from sweep_options import OURS
from sweep_sharpness import (
    DIGITS,
    Sharpness,
    all_rounds,
    column,
    compare_sharpness,
    draws_of_worth,
    first,
    medians,
)

from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.precision import exact
from rft_fast.studies import Protocol, sharpness

ALL = "all weights"
CONTENDERS = ("peer", "plain", "two image", "image", "two", "gradient")
MODELS = 9  # of the digits zoo, at both positions of POSITIONS
POSITIONS = [0.5, 1.0]


class General(Sharpness):
    """One request for general sharpness, for both sides, in one precision."""

    WHAT: ClassVar[str] = "general sharpness"
    WAYS: ClassVar[Mapping[str, str]] = {"image": "per-image", "gradient": OURS}

    def ours(self, estimator: str, seed: int, names: Any = None, **other: Any) -> pd.DataFrame:
        """names: not used."""
        o = replace(self.options, **other)
        evaluator = self.bench.evaluator(self.precision, o.samples)
        table = sharpness(
            self.path, evaluator, o.positions, [o.rho], o.draws, protocol=o.protocol(estimator, seed)
        )
        return table.assign(layer=ALL)

    def peer(self, seed: int, **other: Any) -> dict[tuple[str, float], peers_sweep.Rises]:
        o = replace(self.options, **other)
        with exact(self.precision):
            found = peers_sweep.general_sharpness(
                self.model,
                self.bench.case.zeroshot,
                self.bench.case.finetuned,
                first(self.batches, o.samples),
                o.positions,
                o.rho,
                o.draws,
                seed,
                self.draw,
                [weight.name for weight in self.path.weights()],
                o.noise_batch,
            )
        return {(ALL, alpha): values for alpha, values in found.items()}


def general_sharpness(bench: Bench) -> None:
    """Measure rounds of peer, plain draws and noise per image without and with its control.

    What a draw is worth is measured on the trained weights of the digits zoo, as for single layers.
    """
    o = bench.options
    found = bench.begin({"worth": {way: {} for way in General.WAYS}, "rounds": []})

    def compare() -> None:
        ways = {
            way: compare_sharpness(found["rounds"], o, medians(found["worth"][way]), way)
            for way in General.WAYS
        }
        found.update(ways=ways, seconds=ways["gradient"]["seconds"])

    def made(precision: str) -> General:
        return bench.shared(("general", precision), lambda: General(bench, precision))

    compare()
    all_rounds(bench, found, made, compare)
    worth_on_digits(bench, found, compare)


def worth_on_digits(bench: Bench, found: dict[str, Any], compare: Callable[[], None]) -> None:
    """Measure the plain fp32 draws that one of ours is worth, for trained models.

    Both with the study's default: noise anew for every 128 images.
    """
    o = bench.options
    bench.check_time("what a draw is worth")
    digits = sweep_case.Digits(bench.device, DIGITS, 2 if o.on_gpu or o.arch == "tiny" else MODELS)

    def variances(precision: str, estimator: str) -> np.ndarray:
        squares: list[float] = []
        for model in digits.finetuned:
            path = digits.path(model, precision)
            evaluator = Evaluator(path.model, digits.data[:1], precision=precision)
            table = sharpness(
                path, evaluator, POSITIONS, [o.rho], draws_of_worth(o), protocol=Protocol(estimator)
            )
            squares += column(table, "sharpness_se")
        return np.square(squares)

    plain, _ = bench.timed("what a draw is worth", lambda: variances("fp32", "plain"))
    for precision in o.precisions:
        for way, estimator in General.WAYS.items():
            what = f"what a draw is worth, {way}, in {precision}"
            here, seconds = bench.timed(what, lambda p=precision, e=estimator: variances(p, e))
            found["worth"][way][precision] = (plain / here).tolist()
            compare()
            bench.timing(f"worth {way}", seconds, precision)
