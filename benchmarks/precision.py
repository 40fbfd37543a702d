"""What fewer bits do to loss, accuracy and sharpness, beside the standard error: on the digits zoo.

    python benchmarks/precision.py [--device cuda] [--draws 20] [--samples 256] [--models 3] [--out FILE.json]

Trained weights: the first few of nine models. Along the path, every precision that the device offers is
compared with fp32 on the same images, and fp32 with float64 on the same (float32) weights. Sharpness, general
and layer by layer, is compared with fp32's for the same draws of noise, and the difference set beside the
standard error of as many draws: a precision is good enough where that ratio stays well below one.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import bench_sweep
import pandas as pd
import sweep_case
import torch
from sweep_case import Digits

import rft_fast as rft
from rft_fast import datasets
from rft_fast.evaluate import Evaluator, Scores
from rft_fast.evaluate.precision import PRECISIONS, check
from rft_fast.studies import Protocol, layerwise_sharpness, sharpness

ALPHAS = [i / 10 for i in range(11)]
POSITIONS = [0.5, 1.0]  # of the sharpness
RHOS = [0.02, 0.05, 0.1, 0.5, 1.0]
LAYERS = 6
ESTIMATORS = ("plain", "gradient")
KEYS = ["model", "study", "layer", "alpha", "rho", "estimator"]


def offered(device: torch.device) -> list[str]:
    """fp32, and what else the device can do."""
    found = []
    for precision in PRECISIONS:
        try:
            check(precision, device)
        except ValueError:
            continue
        found.append(precision)
    return found


def along_the_path(source: Digits, precisions: Sequence[str]) -> pd.DataFrame:
    """One row per (model, data set, alpha, precision): differences to fp32, and of fp32 to float64.

    loss, accuracy: of the whole set. image: the largest difference of one image's loss.
    """
    rows = []
    for model in source.finetuned:
        scores = {precision: of_path(source, model, precision) for precision in [*precisions, "fp64"]}
        for precision in scores:
            # fp64's own row says how far fp32 is from it.
            base, other = ("fp64", "fp32") if precision == "fp64" else ("fp32", precision)
            if other == base:
                continue
            for key, got in scores[other].items():
                wanted = scores[base][key]
                moved = (got.losses.double() - wanted.losses.double()).abs()
                rows.append(
                    {"model": model, "alpha": key[0], "dataset": key[1]}
                    | {"precision": "fp32" if precision == "fp64" else precision, "against": base}
                    | {"loss": abs(got.loss - wanted.loss), "image": float(moved.max())}
                    | {"accuracy": abs(got.accuracy - wanted.accuracy), "loss_se": wanted.loss_se}
                    | {"accuracy_se": wanted.accuracy_se}
                )
    return pd.DataFrame(rows)


def of_path(source: Digits, model: str, precision: str) -> dict[tuple[float, str], Scores]:
    path = source.path(model, "fp32" if precision == "fp64" else precision)
    if precision == "fp64":
        found = {}
        for alpha in ALPHAS:
            path.write(alpha)
            found |= {(alpha, name): score for name, score in in_float64(path, source.data).items()}
        return found
    evaluator = Evaluator(path.model, source.data, precision=precision)
    found = {}
    for alpha in ALPHAS:
        path.write(alpha)
        found |= {(alpha, name): score for name, score in evaluator.scores().items()}
    return found


@torch.inference_mode()
def in_float64(path: rft.Path, data: Sequence[datasets.Dataset]) -> dict[str, Scores]:
    """The live float32 weights, and all arithmetic in float64."""
    model = copy.deepcopy(path.model).double().cpu()
    found = {}
    for dataset in data:
        mean, std = (torch.tensor(x).double().view(-1, 1, 1) for x in (dataset.mean, dataset.std))
        logits = model((dataset.images.double() / 255 - mean) / std)
        losses = torch.nn.functional.cross_entropy(logits, dataset.labels, reduction="none")
        found[dataset.name] = Scores(losses, logits.argmax(1) == dataset.labels)
    return found


def of_sharpness(source: Digits, precisions: Sequence[str], draws: int) -> pd.DataFrame:
    """One row per (model, study, layer, alpha, rho, estimator, precision), with fp32's of the same draws."""
    rows = []
    for model in source.finetuned:
        layers = None
        for precision in precisions:
            path = source.path(model, precision)
            evaluator = Evaluator(path.model, source.data[:1], precision=precision)
            if layers is None:
                layers = sweep_case.spread(sweep_case.in_order(path, evaluator), LAYERS)
            for estimator in ESTIMATORS:
                options = {"protocol": Protocol(estimator), "model": model}
                rows += [
                    sharpness(path, evaluator, POSITIONS, RHOS, draws, **options),
                    layerwise_sharpness(path, evaluator, POSITIONS, RHOS, draws, layers, **options),
                ]
    columns = [*KEYS, "precision", "sharpness", "sharpness_se", "seconds"]
    table = pd.concat([part[columns] for part in rows], ignore_index=True).fillna({"layer": "all"})
    base = table[table["precision"] == "fp32"].set_index(KEYS)
    matching = base.loc[pd.MultiIndex.from_frame(table[KEYS])]
    table["fp32"] = matching["sharpness"].to_numpy()
    table["fp32_se"] = matching["sharpness_se"].to_numpy()
    return table.assign(error=(table["sharpness"] - table["fp32"]).abs())


def tables(path_rows: pd.DataFrame, sharpness_rows: pd.DataFrame, draws: int) -> Iterator[str]:
    yield (
        "| along the path | loss: median (largest) | one image's loss: largest | accuracy: median (largest), "
        "points | standard errors of loss, accuracy |"
    )
    yield "| --- | ---: | ---: | ---: | ---: |"
    for (precision, against), rows in path_rows.groupby(["precision", "against"], sort=False):
        accuracy = 100 * rows["accuracy"]
        yield (
            f"| {precision} against {'float64' if against == 'fp64' else against} | "
            f"{rows['loss'].median():.1e} ({rows['loss'].max():.1e}) | {rows['image'].max():.1e} | "
            f"{accuracy.median():.2g} ({accuracy.max():.2g}) | "
            f"{rows['loss_se'].median():.1e}, {100 * rows['accuracy_se'].median():.2g} points |"
        )
    few = [p for p in sharpness_rows["precision"].unique() if p != "fp32"]
    if not few:
        return
    heads = [f"{p}: {what}" for p in few for what in ("plain", "gradient")]
    yield ""
    yield (
        f"| sharpness | fp32, median | standard error of {draws} draws: plain | gradient | "
        + " | ".join(heads)
        + " |"
    )
    yield "| --- |" + " ---: |" * (3 + len(heads))
    for (study, rho), rows in sharpness_rows.groupby(["study", "rho"], sort=False):
        by = dict(list(rows.groupby(["precision", "estimator"], sort=False)))
        cells = [f"{by['fp32', 'gradient']['sharpness'].median():.1e}"]
        cells += [f"{by['fp32', estimator]['sharpness_se'].median():.1e}" for estimator in ESTIMATORS]
        for precision in few:
            for estimator in ESTIMATORS:
                group = by[precision, estimator]
                ratio = group["error"] / group["fp32_se"]
                cells.append(
                    f"{group['error'].median():.1e} ({group['error'].max():.1e}), "
                    f"{ratio.median():.2g} ({ratio.max():.2g}) se"
                )
        name = "general" if study == "sharpness" else "layer-wise"
        yield f"| {name}, rho = {rho:g} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of those that the device offers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    wanted = ["fp32", *(options.precisions or PRECISIONS)]
    precisions = [precision for precision in offered(options.device) if precision in wanted]
    source = Digits(options.device, options.samples, options.models)
    path_rows = along_the_path(source, precisions)
    sharpness_rows = of_sharpness(source, precisions, options.draws)
    about = bench_sweep.about(options.device)
    about |= {"draws": options.draws, "samples": options.samples, "models": list(source.finetuned)}
    print(
        f"digits zoo on {about['device']}, {date.today()}; fine-tuned models: {len(source.finetuned)}, "
        f"images of each set: {options.samples}\n"
        "medians (largest) of absolute differences to fp32; of a sharpness with the same "
        f"{options.draws} draws,\nalso in units of the standard error of the estimator of its column\n"
    )
    print("\n".join(tables(path_rows, sharpness_rows, options.draws)))
    if options.out:
        found: dict[str, Any] = {"about": about}
        found["path"] = json.loads(path_rows.to_json(orient="records"))
        found["sharpness"] = json.loads(sharpness_rows.to_json(orient="records"))
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
