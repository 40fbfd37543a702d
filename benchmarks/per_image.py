"""Noise per image on the digits zoo: how many draws that all images share one pass over the images is worth.

    python benchmarks/per_image.py [--draws 12] [--samples 384] [--models NAME ...] [--out FILE.json]

For all weights (Eq. 3) and for some layers (Sec. 3.1) of two models, the sharpness is measured with noise
that all images share and with noise of its own for each image, without and with the gradient as a control
variate. The worth is the variance of one shared draw without control over that of one pass: at the same
number of forward passes. The backward pass of the control serves all draws and rhos.
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
from rft_fast.studies import Protocol, layerwise_sharpness, sharpness

# Fine-tuned model -> position: one that gains on the path, and one that fails.
MODELS = {"lr1e-3-ep6-aug-smooth": 1.0, "lr4e-3-ep8": 0.5}
RHOS = [0.2, 1.0]
BLOCKS = "visual.transformer.resblocks"
LAYERS = [
    "visual.conv1",
    f"{BLOCKS}.2.mlp.c_fc",
    "classification_head",
]
# What is compared -> its protocol.
WAYS = {
    "shared": Protocol("plain"),
    "per batch": Protocol("plain", noise_batch=128),
    "shared, control": Protocol("gradient"),
    "per image": Protocol("plain", coupling="image"),
    "per image, control": Protocol("gradient", coupling="image"),
}


def measure(draws: int, samples: int, models: list[str]) -> pd.DataFrame:
    """One row per (model, layer, rho, way); ``worth``: shared plain draws that one pass is worth."""
    source = zoo.digits()
    ends = Ends(Setup(source.arch), checkpoints.load(source.zeroshot.source))
    data = datasets.load("mnist", source.data["mnist"].path, architectures.preprocess(source.arch), samples)
    evaluator = Evaluator(ends.live, [data])
    rows = []
    for model in models:
        alpha = MODELS[model]
        path = rft.Path(ends.live, *ends.pair(checkpoints.load(source.finetuned[model].source)))
        for way, protocol in WAYS.items():
            found = [
                sharpness(path, evaluator, [alpha], RHOS, draws, protocol=protocol, model=model),
                layerwise_sharpness(
                    path, evaluator, [alpha], RHOS, draws, LAYERS, protocol=protocol, model=model
                ),
            ]
            rows += [table.assign(way=way) for table in found]
            print(f"{model}, {way}: {sum(table['seconds'].sum() for table in found):.1f} s", flush=True)
    columns = "model layer alpha rho way estimator sharpness sharpness_se seconds".split()
    table = pd.concat(rows)[columns].fillna({"layer": "all weights"}).reset_index(drop=True)
    keys = ["model", "layer", "rho"]
    plain = table[table["way"] == "shared"].set_index(keys)["sharpness_se"]
    own = table.set_index(keys).index
    return table.assign(worth=(plain.loc[own].to_numpy() / table["sharpness_se"].to_numpy()) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    table = measure(arguments.draws, arguments.samples, arguments.models)
    print(f"digits zoo, {arguments.draws} draws, {arguments.samples} images of mnist; worth of a pass:")
    wide = table.pivot_table(index=["model", "layer"], columns=["rho", "way"], values="worth", sort=False)
    print(wide[[(rho, way) for rho in RHOS for way in list(WAYS)[1:]]].round(1).to_string())
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
