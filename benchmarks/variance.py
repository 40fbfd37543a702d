"""Variance reduction on the digits zoo: the number of plain draws that one draw of each estimator is worth.

    python benchmarks/variance.py [--draws 40] [--samples 128] [--out FILE.json]

For each model, position and rho, general sharpness (Eq. 3) is measured with the same draws by each estimator.
The ratio is (standard error of plain / standard error of the other) ** 2 at the same number of forward
passes: that many times fewer draws reach the same standard error. The column of seconds shows the cost of the
extra backward pass.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
from datetime import date

import pandas as pd
import torch

import rft_fast as rft
from rft_fast import checkpoints, datasets
from rft_fast.clip import architectures
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.config import zoo
from rft_fast.evaluate import Evaluator
from rft_fast.studies import Protocol, sharpness

RHOS = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
GOALS = {0.02: 40, 0.05: 8}  # of the gradient control variate, median over models and positions


def measure(draws: int, samples: int) -> pd.DataFrame:
    """Return one row per (model, alpha, rho, estimator); ``ratio``: plain draws that one draw is worth."""
    source = zoo.digits()
    ends = Ends(Setup(source.arch), checkpoints.load(source.zeroshot.source))
    data = datasets.load("mnist", source.data["mnist"].path, architectures.preprocess(source.arch), samples)
    evaluator = Evaluator(ends.live, [data])
    rows = []
    for name, weights in source.finetuned.items():
        path = rft.Path(ends.live, *ends.pair(checkpoints.load(weights.source)))
        for estimator in ("plain", "antithetic", "gradient"):
            found = sharpness(
                path, evaluator, [0.5, 1.0], RHOS, draws, protocol=Protocol(estimator), model=name
            )
            rows.append(found[["model", "alpha", "rho", "estimator", "sharpness", "sharpness_se", "seconds"]])
    table = pd.concat(rows)
    plain = table[table["estimator"] == "plain"].set_index(["model", "alpha", "rho"])["sharpness_se"]
    keys = table.set_index(["model", "alpha", "rho"]).index
    return table.assign(ratio=(plain.loc[keys].to_numpy() / table["sharpness_se"].to_numpy()) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    table = measure(arguments.draws, arguments.samples)
    spread = table[table["estimator"] != "plain"].groupby(["rho", "estimator"])["ratio"]
    print(
        f"digits zoo, nine models at alpha .5 and 1, {arguments.draws} draws, {arguments.samples} images "
        "of mnist"
    )
    print("plain draws that one draw is worth:")
    print(spread.describe()[["min", "25%", "50%", "75%", "max"]].round(1).to_string())
    medians = spread.median()
    for rho, goal in GOALS.items():
        got = medians[rho, "gradient"]
        print(f"goal at rho = {rho}: {goal}, median {got:.1f}: {'met' if got >= goal else 'MISSED'}")
    if arguments.out:
        about = {
            "date": date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "draws": arguments.draws,
            "samples": arguments.samples,
        }
        rows = json.loads(table.to_json(orient="records"))
        arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
