"""Sharpness on the digits zoo: what one draw of each estimator is worth, and whether its intervals hold.

    python benchmarks/variance.py [--part general layers coverage ...] [--draws 4] [--samples N] [--out FILE]
        [--resume FILE]

``general``, ``layers``: the same forward passes by each estimator. The worth of a draw is the variance of the
published protocol (plain draws, noise anew for every 128 images) over that of the estimator: so many times
fewer draws reach the same standard error. ``cost`` is the time of a draw over that of a published one, with
the backward pass of the control, on one thread.

``coverage``: intervals of many seeds against the mean of many plain draws with other seeds.
``general-coverage``: those of all weights together at more rhos, of a fixed number of draws. With
``--resume FILE`` each seed is appended to FILE once it is measured, and seeds in FILE are not measured again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import record
import torch
from scipy.special import stdtrit

import rft_fast as rft
from rft_fast import checkpoints, datasets
from rft_fast.clip import architectures
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.config import zoo
from rft_fast.evaluate import Evaluator
from rft_fast.studies import Protocol, layerwise_sharpness, sharpness

PUBLISHED = Protocol("plain")
ESTIMATORS = ("per-image", "auto")
RHOS = [0.1, 0.2, 0.5, 1.0]
LAYER_RHOS = [0.2, 1.0]
# Fine-tuned model -> position: one that gains on the path, and one that fails.
MODELS = {"lr1e-3-ep6-aug-smooth": 0.6, "lr4e-3-ep8": 0.6}
LAYERS = ["visual.conv1", "visual.ln_pre"]  # of coverage: a matrix, and signs by element
COVERAGE_RHOS = [0.05, 1.0]
BATCH = 64  # images of a noise batch there, so that 128 images have two
GOALS = {"general": {0.1: 8, 0.2: 8, 1.0: 8}, "layers": {0.2: 20, 1.0: 6}}


class Setting:
    """The digits zoo with some images of mnist."""

    def __init__(self, samples: int) -> None:
        self._zoo, self._samples = zoo.digits(), samples

    @cached_property
    def ends(self) -> Ends:
        return Ends(Setup(self._zoo.arch), checkpoints.load(self._zoo.zeroshot.source))

    @cached_property
    def evaluator(self) -> Evaluator:
        preprocess = architectures.preprocess(self._zoo.arch)
        images = datasets.load("mnist", self._zoo.data["mnist"].path, preprocess, self._samples)
        return Evaluator(self.ends.live, [images])

    @property
    def models(self) -> list[str]:
        return list(self._zoo.finetuned)

    def path(self, model: str) -> rft.Path:
        return rft.Path(self.ends.live, *self.ends.pair(checkpoints.load(self._zoo.finetuned[model].source)))


def protocols() -> Iterator[tuple[str, Protocol]]:
    """Name -> protocol."""
    yield "published", PUBLISHED
    yield "one draw for all", replace(PUBLISHED, noise_batch=None)
    for estimator in ESTIMATORS:
        yield estimator, Protocol(estimator)


COLUMNS = "model layer alpha rho way estimator sharpness sharpness_se sharpness_df draws seconds".split()


def worth(setting: Setting, part: str, draws: int) -> pd.DataFrame:
    """One row per (model, layer, alpha, rho, way), with ``worth`` and ``cost`` of a draw."""
    tables = []
    places = (
        [(model, alpha) for model in setting.models for alpha in (0.5, 1.0)]
        if part == "general"
        else list(MODELS.items())
    )
    for seed, (model, alpha) in enumerate(places):  # which else would share their luck with the draws
        path = setting.path(model)
        for way, protocol in protocols():
            how: dict[str, Any] = {"protocol": replace(protocol, seed=seed), "model": model}
            if part == "general":
                rows = sharpness(path, setting.evaluator, [alpha], RHOS, draws, **how)
            else:
                rows = layerwise_sharpness(path, setting.evaluator, [alpha], LAYER_RHOS, draws, **how)
            tables.append(rows.assign(way=way)[[*COLUMNS]])
        print(f"{part}: {model} at {alpha:g}", flush=True)
    table = pd.concat(tables).fillna({"layer": "all weights"}).reset_index(drop=True)
    keys = ["model", "layer", "alpha", "rho"]
    base = table[table["way"] == "published"].set_index(keys)
    own = base.loc[table.set_index(keys).index]
    return table.assign(
        worth=(own["sharpness_se"].to_numpy() / table["sharpness_se"].to_numpy()) ** 2,
        cost=table["seconds"].to_numpy() / own["seconds"].to_numpy(),
    )


def coverage(setting: Setting, seeds: int, draws: int) -> pd.DataFrame:
    """One row per (layer, rho, way): what 95 % intervals cover, bias, and the error over the stated one."""
    model, alpha = next(iter(MODELS.items()))
    path, evaluator = setting.path(model), setting.evaluator
    found = []
    for layer in [*LAYERS, None]:
        for rho in COVERAGE_RHOS:

            def rows(protocol: Protocol, draws: int, layer: Any = layer, rho: float = rho) -> pd.Series:
                if layer is None:
                    return sharpness(path, evaluator, [alpha], [rho], draws, protocol=protocol).iloc[0]
                return layerwise_sharpness(
                    path, evaluator, [alpha], [rho], draws, [layer], protocol=protocol
                ).iloc[0]

            # The strongest estimator with noise that is otherwise numbered: its own error is small.
            truth = rows(Protocol("per-image-gradient", seed=10**6, noise_batch=16), 8 * draws)
            pilot = rows(Protocol(seed=10**6 + 1, noise_batch=BATCH), 4 * draws)
            ways = {
                "auto": (Protocol(noise_batch=BATCH), draws),
                "auto, goal": (Protocol(noise_batch=BATCH, goal=pilot["sharpness_se"]), 20),
            }
            for way, (protocol, count) in ways.items():
                made = pd.DataFrame([rows(replace(protocol, seed=seed), count) for seed in range(seeds)])
                values, errors = made["sharpness"].to_numpy(), made["sharpness_se"].to_numpy()
                # Around the mean over seeds, whose own error is counted in the bias.
                half = stdtrit(made["sharpness_df"].to_numpy(dtype=float), 0.975) * errors
                bias = values.mean() - truth["sharpness"]
                found.append(
                    {
                        "layer": layer or "all weights", "rho": rho, "way": way, "seeds": seeds,
                        "draws": float(made["draws"].mean()), "sharpness": values.mean(),
                        "covered": float(np.mean(np.abs(values - values.mean()) <= half)),
                        "bias": bias / truth["sharpness"],
                        "bias_se": float(
                            np.hypot(values.std(ddof=1) / seeds**0.5, truth["sharpness_se"])
                        ) / abs(truth["sharpness"]),
                        "spread": float(values.std(ddof=1) / np.sqrt((errors**2).mean())),
                    }
                )  # fmt: skip
                fact = found[-1]
                print(
                    f"{fact['layer']}, rho {rho:g}, {way}: {100 * fact['covered']:.1f} % covered, bias "
                    f"{100 * fact['bias']:+.2f} +- {100 * fact['bias_se']:.2f} %",
                    flush=True,
                )
    return pd.DataFrame(found)


def general_coverage(setting: Setting, seeds: int, draws: int, kept: pathlib.Path | None) -> pd.DataFrame:
    """One row per rho: what 95 % intervals of all weights together cover, around the mean over seeds."""
    model, alpha = next(iter(MODELS.items()))
    path, request = setting.path(model), {"model": model, "alpha": alpha, "draws": draws, "batch": BATCH}
    lines = [line for line in (record.read(kept) if kept else []) if line["request"] == request]
    made = {line["seed"]: line["rows"] for line in lines}
    for seed in range(seeds):
        if seed not in made:
            protocol = Protocol(noise_batch=BATCH, seed=seed)
            table = sharpness(path, setting.evaluator, [alpha], RHOS, draws, protocol=protocol)
            made[seed] = table[["rho", "sharpness", "sharpness_se", "sharpness_df"]].to_dict("records")
            if kept:
                record.append(kept, {"request": request, "seed": seed, "rows": made[seed]})
    found = []
    for rho, rows in pd.DataFrame([row for seed in range(seeds) for row in made[seed]]).groupby("rho"):
        values, errors = rows["sharpness"].to_numpy(), rows["sharpness_se"].to_numpy()
        half = stdtrit(rows["sharpness_df"].to_numpy(dtype=float), 0.975) * errors
        covered = float(np.mean(np.abs(values - values.mean()) <= half))
        spread = float(values.std(ddof=1) / np.sqrt((errors**2).mean()))
        found.append({"way": "auto", "rho": rho, "seeds": seeds, "covered": covered, "spread": spread})
        print(f"all weights, rho {rho:g}: {100 * covered:.1f} % covered", flush=True)
    return pd.DataFrame(found)


def show(part: str, table: pd.DataFrame) -> None:
    """Print medians, and whether goals are met."""
    if "coverage" in part:
        for way, own in table.groupby("way", sort=False):
            low, mean, high = (100 * own["covered"].agg(what) for what in ("min", "mean", "max"))
            print(f"{way}: {low:.1f} to {high:.1f} % covered, mean {mean:.1f}")
        return
    groups = table.groupby(["way", "rho"], sort=False)
    spread = groups["worth"].agg(["min", "median", "max"]).join(groups["cost"].median())
    print(spread.round(2).unstack("rho").swaplevel(axis=1).sort_index(axis=1, level=0).to_string())
    auto = table[table["way"] == "auto"]
    for rho, goal in GOALS[part].items():
        own = auto[auto["rho"] == rho]
        median, least = own["worth"].median(), own["worth"].min()
        met = "met" if median >= goal else "MISSED"
        print(f"{part}, rho {rho:g}: goal {goal} in the median, {median:.1f}: {met}; least {least:.2f}")
        print(f"  auto took {own['estimator'].value_counts().to_dict()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("general", "layers", "coverage", "general-coverage")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=200, help="of coverage (with 128 images, 4 draws)")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--resume", type=pathlib.Path, metavar="FILE", help="of general-coverage")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    for part in arguments.part:
        setting = Setting(min(arguments.samples, 128) if "coverage" in part else arguments.samples)
        if part == "coverage":
            tables[part] = coverage(setting, arguments.seeds, 4)
        elif part == "general-coverage":
            tables[part] = general_coverage(setting, arguments.seeds, 4, arguments.resume)
        else:
            tables[part] = worth(setting, part, arguments.draws)
        show(part, tables[part])
    if arguments.out:
        about = {
            "date": date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "draws": arguments.draws,
            "samples": arguments.samples,
        }
        rows = {part: json.loads(table.to_json(orient="records")) for part, table in tables.items()}
        arguments.out.write_text(json.dumps({"about": about, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
