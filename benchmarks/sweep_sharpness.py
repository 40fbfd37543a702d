"""Layer-wise sharpness against the published practice, at equal draws and at equal standard error.

Ours is the default estimator, noise per image with its control: the contender "gradient", and "two" with two
draws. At equal standard error, a contender costs (seconds per draw) x (variance of one draw). Seconds are
those of the whole request, with the clean pass and the backward pass of the control. Since one draw has no
standard error, the request with the fewest sufficient draws, two or more, is timed, too.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import peers_sweep
import sweep_case
from sweep_bench import Bench, allowed, check_same, turns
from sweep_options import OURS, PUBLISHED_DRAWS, Options

from rft_fast.evaluate import Evaluator
from rft_fast.evaluate.precision import PRECISIONS, exact
from rft_fast.studies import Protocol, layerwise_sharpness

TWO = {"gradient": "two", "image": "two image"}  # contender -> the same with two draws
CONTENDERS = ("peer", "plain", "two", "gradient")  # the most important first
DIGITS = 384  # images of the digits zoo: three batches of the published size


class Sharpness:
    """One request for layer-wise sharpness, for both sides, in one precision.

    Both write the same live model: a study, like the peer, writes all of it before it reads any.

    WAYS: contender with all draws -> its estimator.
    """

    WHAT: ClassVar[str] = "layer-wise sharpness"
    WAYS: ClassVar[Mapping[str, str]] = {"gradient": OURS}

    def __init__(self, bench: Bench, precision: str = "fp32", options: Options | None = None) -> None:
        self.bench, self.precision = bench, precision
        self.options = bench.options if options is None else options
        case = bench.case
        self.path, self.model = case.path(precision), case.live(precision)
        dtype = PRECISIONS[precision]
        size = self.options.batch
        self.batches = bench.shared(("batches", dtype, size), lambda: case.batches(size, dtype))
        weights = {w.name: w.finetuned for w in self.path.weights()}
        self.draw = bench.shared("noise", lambda: peers_sweep.noise(weights))
        self._warm: set[tuple[Any, ...]] = set()

    def ours(
        self, estimator: str, seed: int, names: Sequence[str] | None = None, **other: Any
    ) -> pd.DataFrame:
        """names: of layers; None: as many as the options say."""
        o = replace(self.options, **other)
        return layerwise_sharpness(
            self.path,
            self.bench.evaluator(self.precision, o.samples),
            o.positions,
            [o.rho],
            o.draws,
            list(self.bench.case.some_layers(o.layers) if names is None else names),
            protocol=o.protocol(estimator, seed),
        )

    def peer(self, seed: int, **other: Any) -> dict[tuple[str, float], peers_sweep.Rises]:
        o = replace(self.options, **other)
        with exact(self.precision):
            return peers_sweep.layer_sharpness(
                self.model,
                self.bench.case.zeroshot,
                self.bench.case.finetuned,
                first(self.batches, o.samples),
                self.bench.case.some_layers(o.layers),
                o.positions,
                o.rho,
                o.draws,
                seed,
                self.draw,
                o.noise_batch,
            )

    def warm_up(self, **other: Any) -> None:
        """Make what is made once for each request: workspaces of either side and, on a GPU, recordings.

        Raises TimeIsUp if it is too late to begin.
        """
        on_gpu = self.options.on_gpu
        few = other if on_gpu else {**other, "draws": 2}
        key = tuple(sorted(other.items())) if on_gpu else (other.get("samples"),)
        if key in self._warm:
            return
        # All stages come after the first layer, and before the last.
        names = list(self.bench.case.some_layers(few.get("layers", self.options.layers)))
        for estimator in ("plain", *self.WAYS.values()):
            self.bench.check_time(f"warm-up in {self.precision}")
            self.ours(estimator, 0, names=list(dict.fromkeys([names[0], names[-1]])), **few)
        if not self._warm:
            self.peer(0, layers=1, draws=2)
        self._warm.add(key)

    def runs(self, seed: int) -> dict[str, Callable[[], Any]]:
        """Return contender -> its request, the most important first."""

        def ours(estimator: str, **other: Any) -> Callable[[], Any]:
            return lambda: self.ours(estimator, seed, **other)

        found: dict[str, Callable[[], Any]] = {"peer": lambda: self.peer(seed), "plain": ours("plain")}
        for contender, estimator in self.WAYS.items():
            found |= {TWO[contender]: ours(estimator, draws=2), contender: ours(estimator)}
        return found

    def check(self, ours: pd.DataFrame, peer: dict[tuple[str, float], peers_sweep.Rises]) -> float:
        """Check that means and standard errors agree. ours: of the plain estimator with the peer's draws."""
        mine = {(r.layer, r.alpha): (r.sharpness, r.sharpness_se) for r in ours.itertuples()}
        theirs = {key: mean_and_se(*rises) for key, rises in peer.items()}
        most = allowed(self.precision, float(ours["loss"].max()))
        return check_same(f"{self.WHAT} in {self.precision}", mine, theirs, most)


def request(bench: Bench, precision: str) -> Sharpness:
    """Return the request, the same for all parts of a run."""
    return bench.shared(("sharpness", precision), lambda: Sharpness(bench, precision))


def first(batches: Sequence[peers_sweep.Batch], samples: int) -> list[peers_sweep.Batch]:
    """Return the batches of the first images, the last of them cut."""
    found, left = [], samples
    for images, labels in batches:
        if left > 0:
            found.append((images[:left], labels[:left]))
        left -= len(labels)
    return found


def mean_and_se(values: Sequence[Sequence[float]], shares: Sequence[float]) -> tuple[float, float]:
    """Return the mean over draws and parts, and its standard error: parts have noise of their own.

    values: of each draw and part. shares: of each part in the images.
    """
    table, weights = np.array(values), np.array(shares)
    variances = table.var(axis=0, ddof=1) / len(table)
    return float(table.mean(axis=0) @ weights), math.sqrt(weights**2 @ variances)


def layer_sharpness(bench: Bench) -> None:
    """Measure rounds of peer, plain draws and noise per image in every precision, each with a new seed.

    The number of plain draws that one with noise per image is worth depends on the weights. It is measured on
    the trained weights of the digits zoo after the rounds, and only stated for the random weights here.
    """
    o = bench.options
    found = bench.begin({"layers": list(bench.case.some_layers(o.layers)), "worth": {}, "rounds": []})

    def compare() -> None:
        found.update(compare_sharpness(found["rounds"], o, medians(found["worth"])))

    compare()
    all_rounds(bench, found, lambda precision: request(bench, precision), compare)
    worth_on_digits(bench, found, compare)


def all_rounds(
    bench: Bench,
    found: dict[str, Any],
    made: Callable[[str], Sharpness],
    compare: Callable[[], None],
) -> None:
    """Measure all rounds in every precision. made: returns the request in a precision."""
    o = bench.options
    for seed in range(o.rounds):
        this = {"seed": seed, "seconds": {}, "largest_difference": {}, "sharpness": {}, "sharpness_se": {}}
        found["rounds"].append(this)
        for precision in o.precisions:
            try:
                one_round(bench, this, made(precision), compare)
            except AssertionError as error:  # continue with the other precisions
                bench.failed(error)


def one_round(bench: Bench, this: dict[str, Any], mine: Sharpness, compare: Callable[[], None]) -> None:
    """Measure all contenders in one precision, once."""
    seed, precision = this["seed"], mine.precision
    mine.warm_up()
    mine.warm_up(draws=2)
    peer: Any = None
    for contender, run in mine.runs(seed).items():
        name = f"{contender} {precision}"
        got, seconds = bench.timed(f"{name}, round {seed},", run)
        facts = {}
        if contender == "peer":
            peer = got
        if contender == "plain":
            facts["largest_difference"] = this["largest_difference"][precision] = mine.check(got, peer)
        if contender in ("plain", *mine.WAYS):
            this["sharpness"][name] = column(got, "sharpness")
            this["sharpness_se"][name] = column(got, "sharpness_se")
        this["seconds"][name] = seconds
        compare()
        bench.timing(contender, seconds, precision, round=seed, **facts)


def column(table: pd.DataFrame, name: str) -> list[float]:
    return [float(value) for value in table[name]]


def medians(worth: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {precision: statistics.median(values) for precision, values in worth.items()}


def draws_of_worth(options: Options) -> int:
    """Return the draws that variances on trained weights come from, which cost little."""
    return options.draws if options.arch == "tiny" else max(options.draws, 8)


def worth_on_digits(bench: Bench, found: dict[str, Any], compare: Callable[[], None]) -> None:
    """Measure the plain fp32 draws that one with noise per image is worth, for layers of trained models.

    Both with the study's default: noise anew for every 128 images. It depends on the weights, and hardly on
    the device: on a GPU one model suffices.
    """
    o = bench.options
    bench.check_time("what a draw is worth")
    digits = sweep_case.Digits(bench.device, DIGITS, models=1 if o.on_gpu or o.arch == "tiny" else 3)

    def variances(precision: str, estimator: str) -> np.ndarray:
        squares: list[float] = []
        for model in digits.finetuned:
            path = digits.path(model, precision)
            evaluator = Evaluator(path.model, digits.data[:1], precision=precision)
            layers = sweep_case.spread(sweep_case.in_order(path, evaluator), 10)
            table = layerwise_sharpness(
                path, evaluator, [o.alpha], [o.rho], draws_of_worth(o), layers, protocol=Protocol(estimator)
            )
            squares += column(table, "sharpness_se")
        return np.square(squares)

    plain, _ = bench.timed("what a draw is worth", lambda: variances("fp32", "plain"))
    for precision in o.precisions:
        what = f"what a draw is worth in {precision}"
        here, seconds = bench.timed(what, lambda p=precision: variances(p, OURS))
        found["worth"][precision] = (plain / here).tolist()
        compare()
        bench.timing("worth", seconds, precision)


def compare_sharpness(
    rounds: Sequence[dict[str, Any]], options: Options, worth: Mapping[str, float], way: str = "gradient"
) -> dict[str, Any]:
    """Return the ratios of the rounds; lists have a number per round.

    A round counts for a precision if all contenders of it, and of fp32, were measured.

    worth: for each precision, the plain fp32 draws that one of ours is worth. Without it the ratios at equal
    standard error are left out. way: the contender that is ours.
    """
    names = list(dict.fromkeys(name for r in rounds for name in r["seconds"]))
    every = {name: [r["seconds"][name] for r in rounds if name in r["seconds"]] for name in names}
    fp32 = [r for r in rounds if complete(r, "fp32", way)]
    if not fp32:
        return {"seconds": every, "standard_error_of_20_draws": [], "modes": {}, "fastest": None}
    plain = variance(fp32, "plain fp32", options)
    yardstick = np.sqrt(plain / PUBLISHED_DRAWS)
    modes = {}
    for precision in options.precisions:
        whole = [r for r in fp32 if complete(r, precision, way)]
        if whole:
            modes[precision] = mode(whole, options, precision, yardstick, worth.get(precision), way)
    able = [p for p in modes if modes[p]["error_over_se"] < 1 and "request" in modes[p]]
    fastest = max(able, key=lambda p: statistics.median(modes[p]["request"]), default=None)
    return {
        "seconds": every,
        "standard_error_of_20_draws": yardstick.tolist(),
        "modes": modes,
        "fastest": fastest,
    }


def complete(this: Mapping[str, Any], precision: str, way: str) -> bool:
    return all(f"{name} {precision}" in this["seconds"] for name in ("peer", "plain", TWO[way], way))


def variance(rounds: Sequence[Mapping[str, Any]], name: str, options: Options) -> np.ndarray:
    """Return the variance of one draw, for each layer, over all rounds."""
    return np.mean([np.square(r["sharpness_se"][name]) for r in rounds], axis=0) * options.draws


def mode(
    rounds: Sequence[dict[str, Any]],
    options: Options,
    precision: str,
    yardstick: np.ndarray,
    worth: float | None,
    way: str,
) -> dict[str, Any]:
    """Return the results of one precision's complete rounds."""

    def seconds(name: str) -> np.ndarray:
        return np.array([r["seconds"][name] for r in rounds])

    published, peer = seconds("peer fp32"), seconds(f"peer {precision}")
    plain, two, ours = (seconds(f"{name} {precision}") for name in ("plain", TWO[way], way))
    here = variance(rounds, "plain fp32", options) / variance(rounds, f"{way} {precision}", options)
    relative = precision_errors(rounds, precision, way) / yardstick
    found = {
        "equal_draws": turns(peer.tolist(), plain.tolist()),
        "equal_draws_published": turns(published.tolist(), plain.tolist()),
        "worth_here": here.tolist(),
        "equal_se_here": (published / ours * np.median(here)).tolist(),
        "error_over_se": float(np.median(relative)),
        "error_over_se_largest": float(relative.max()),
        "layers_below_se": float(np.mean(relative < 1)),
    }
    if worth is None:
        return found
    # A request has a fixed cost and one per draw, unknown from two draws alone. Fewer have no standard error.
    needed = max(2, math.ceil(PUBLISHED_DRAWS / worth))
    if needed > 2 and options.draws == 2:
        return found | {"worth": worth, "equal_se": (published / ours * worth).tolist()}
    request = two + (needed - 2) * (ours - two) / max(options.draws - 2, 1)
    # The peer makes one clean pass at a position, whatever the number of draws.
    targets = len(rounds[0]["sharpness"]["plain fp32"])
    passes = (1 + targets * PUBLISHED_DRAWS) / (1 + targets * options.draws)
    return found | {
        "worth": worth,
        "equal_se": (published / ours * worth).tolist(),
        "draws_needed": needed,
        "request": (published * passes / request).tolist(),
    }


def precision_errors(rounds: Sequence[dict[str, Any]], precision: str, way: str) -> np.ndarray:
    """Return each layer's difference to fp32 with the same draws: root mean square over rounds."""
    moved = [np.subtract(r["sharpness"][f"{way} {precision}"], r["sharpness"][f"{way} fp32"]) for r in rounds]
    return np.sqrt(np.mean(np.square(moved), axis=0))


def scaling(bench: Bench) -> None:
    """Measure seconds of layer-wise sharpness over each of its four sizes, the others as in ``base``."""
    o = bench.options
    most = o.samples
    base = {"layers": 2, "draws": 4, "alphas": 1, "samples": max(most // 2, o.batch)}
    axes = {
        "layers": [1, 2, 4],
        "draws": [2, 4, 8],
        "alphas": [1, 2, 4],
        "samples": sorted({max(most // 4, o.batch), base["samples"], most}),
    }
    found = bench.begin({"base": base, "axes": {axis: {} for axis in axes}})
    mine = Sharpness(bench, "fp32", replace(o, alpha=0.0))
    measured: dict[tuple[int, ...], dict[str, list[float]]] = {}
    for axis, values in axes.items():
        for value in values:
            sizes = {**base, axis: value}
            key = tuple(sizes.values())
            new = key not in measured
            found["axes"][axis][str(value)] = seconds = measured.setdefault(key, {})
            if not new:
                continue
            mine.warm_up(**sizes)
            for number in range(o.rounds):
                one_size(bench, mine, number, sizes, seconds)
            said = ", ".join(f"{name} {statistics.median(times):.1f} s" for name, times in seconds.items())
            print(f"scaling, {sizes}: {said}", file=sys.stderr, flush=True)


def one_size(
    bench: Bench,
    mine: Sharpness,
    number: int,
    sizes: Mapping[str, int],
    measured: dict[str, list[float]],
) -> None:
    """Measure one round of all contenders at these sizes."""
    runs = {
        "peer": lambda: mine.peer(0, **sizes),
        "plain": lambda: mine.ours("plain", 0, **sizes),
        "gradient": lambda: mine.ours(OURS, 0, **sizes),
    }
    peer: Any = None
    for name, run in runs.items():
        got, seconds = bench.timed(f"{name} of {dict(sizes)}, round {number},", run)
        facts = {}
        if name == "peer":
            peer = got
        if name == "plain":
            facts["largest_difference"] = mine.check(got, peer)
        measured.setdefault(name, []).append(seconds)
        bench.timing(name, seconds, round=number, **sizes, **facts)
