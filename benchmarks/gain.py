"""How often a gain is declared where there is none, and how often bounds hold: simulated on the digits zoo.

    python benchmarks/gain.py [--resamples 2000] [--images 500 1500] [--models NAME ...] [--out FILE.json]

The images of a set, with the hits of a model at each position, are the population; samples are drawn from it
with replacement. Two truths are simulated:

- ``null``: each image drawn is taken as it is, or with all of its hits exchanged for misses and the reverse,
  each with probability 1/2. So no position gains or loses anything, and images flip as they do in the zoo.
- ``zoo``: images are taken as they are. The gain is that of the population.

A row counts, for one model, set, truth and number of images: how often a gain is declared by the highest
accuracy (``naive``, the paper's definition), by the pointwise 95 % interval at that position
(``pointwise``), by simultaneous bounds (``max_t``) and by Bonferroni's (``bonferroni``); how often failure is
declared by simultaneous bounds (no gain of two points is possible); how often the lower and the upper bound
of the gain hold; mean bias of the naive and of the held-out gain. In the truth ``zoo`` some images of a
sample are drawn twice and may be in two folds, so the held-out gain is judged in ``null`` alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
from collections import Counter
from datetime import date

import numpy as np
import pandas as pd

import rft_fast as rft
from rft_fast import checkpoints, datasets
from rft_fast.clip import architectures
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.config import zoo
from rft_fast.evaluate import Evaluator
from rft_fast.names import XI
from rft_fast.studies.bands import bonferroni, held_out, simultaneous
from rft_fast.studies.interpolate import Z95

# One that gains and flips few images, one that gains little, one that fails.
MODELS = ["lr3e-4-ep4-aug", "lr1e-3-ep3", "lr4e-3-ep8"]
SET = "rotated"


def path_hits(models: list[str], alphas: np.ndarray) -> dict[str, np.ndarray]:
    """Model -> hits [positions, images]."""
    source = zoo.digits()
    ends = Ends(Setup(source.arch), checkpoints.load(source.zeroshot.source))
    data = datasets.load(SET, source.data[SET].path, architectures.preprocess(source.arch))
    evaluator = Evaluator(ends.live, [data])
    found = {}
    for model in models:
        path = rft.Path(ends.live, *ends.pair(checkpoints.load(source.finetuned[model].source)))
        hits = []
        for alpha in alphas:
            with path.at(float(alpha)):
                hits.append(evaluator.scores()[SET].correct.numpy())
        found[model] = np.array(hits)
    return found


def simulate(hits: np.ndarray, truth: str, images: int, resamples: int) -> dict[str, float]:
    """Shares and biases of one population over its resamples."""
    random = np.random.RandomState(0)
    gain = 0.0 if truth == "null" else float((hits[1:].mean(1) - hits[0].mean()).max())
    count: Counter[str] = Counter()
    bias = {"naive_bias": 0.0, "held_out_bias": 0.0}
    for _ in range(resamples):
        sample = hits[:, random.randint(hits.shape[1], size=images)]
        if truth == "null":
            sample = sample ^ (random.random_sample(images) < 0.5)
        bounds = simultaneous(sample)
        differences = sample.astype(float) - sample[0]
        error = differences.std(1, ddof=1) / np.sqrt(images)
        best = int(np.argmax(bounds.gain))
        low, high = bounds.low[1:].max(), bounds.high[1:].max()
        count["naive"] += bounds.gain[best] > 0
        count["pointwise"] += bounds.gain[best] - Z95 * error[best] > 0
        count["max_t"] += low > 0
        count["bonferroni"] += bonferroni(bounds.gain, error, images).low[1:].max() > 0
        count["failure"] += low <= 0 and high < XI
        count["low_holds"] += low <= gain
        count["high_holds"] += high >= gain
        bias["naive_bias"] += bounds.gain[1:].max() - gain
        bias["held_out_bias"] += held_out(sample)[0] if truth == "null" else np.nan
    shares = {name: int(number) / resamples for name, number in count.items()}
    return {"gain": gain, **shares, **{name: total / resamples for name, total in bias.items()}}


def measure(models: list[str], sizes: list[int], resamples: int) -> pd.DataFrame:
    """One row per model, truth and number of images."""
    populations = path_hits(models, np.linspace(0, 1, 11))
    rows = []
    for model, hits in populations.items():
        for truth in ("null", "zoo"):
            for images in sizes:
                found = simulate(hits, truth, images, resamples)
                rows.append({"model": model, "dataset": SET, "truth": truth, "images": images, **found})
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 1500])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    table = measure(args.models, args.images, args.resamples)
    print(table.round(4).to_string(index=False))
    if args.out:
        found = {
            "date": date.today().isoformat(), "machine": platform.machine(), "resamples": args.resamples,
            "rows": json.loads(table.round(5).to_json(orient="records")),
        }  # fmt: skip
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
