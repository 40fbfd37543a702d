"""Effect of precision on loss, accuracy and sharpness, relative to the standard error, on the digits zoo.

    python benchmarks/precision.py [--device cuda] [--draws 20] [--samples 256] [--models 3] [--out FILE.json]
        [--estimators plain gradient ...] [--rhos 0.02 ...]

The weights are trained: the first few of nine models. Along the path, every precision of the device is
compared with fp32 on the same images, and fp32 with float64 on the same (float32) weights. Sharpness, general
and layer-wise, is compared with that of fp32 for the same draws, and the difference with the standard error
of as many draws: a precision is good enough where that ratio is well below one.

Results are written as they are measured: --out is a whole file after every measurement, however the run ends.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import product
from time import perf_counter
from typing import Any

import machine
import pandas as pd
import record
import sweep_case
import torch
from sweep_case import Digits

import rft_fast as rft
from rft_fast import datasets, names
from rft_fast.common import disk
from rft_fast.evaluate import Evaluator, Scores
from rft_fast.evaluate.precision import PRECISIONS, check
from rft_fast.studies import Protocol, layerwise_sharpness, sharpness

ALPHAS = [i / 10 for i in range(11)]
POSITIONS = [0.5, 1.0]  # of the sharpness
RHOS = [0.02, 0.05, 0.1, 0.5, 1.0]
LAYERS = 6
ESTIMATORS = ("plain", "gradient")
STUDIES = {"sharpness": sharpness, "layer-sharpness": layerwise_sharpness}
KEYS = ["model", "study", "layer", "alpha", "rho", "estimator"]


def offered(device: torch.device) -> list[str]:
    """Return the precisions of the device, fp32 first."""
    found = []
    for precision in PRECISIONS:
        try:
            check(precision, device)
        except ValueError:
            continue
        found.append(precision)
    return found


class Findings:
    """The results so far: rows of both tables, on disk after every measurement.

    out: a JSON file that always holds what is known.
    """

    def __init__(self, about: dict[str, Any], out: pathlib.Path | None) -> None:
        self.about, self.out, self.measurements = about, out, 0
        self.path = pd.DataFrame()
        self.sharpness = pd.DataFrame()

    def measured(self, part: str, seconds: float, **facts: Any) -> None:
        """Record a measurement whose rows are in the tables."""
        self.measurements += 1
        record.row("timing", part=part, seconds=seconds, **facts)
        if self.out:
            tables = {"path": self.path, "sharpness": self.sharpness}
            found = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
            disk.replace(self.out, (json.dumps({"about": self.about, **found}, indent=1) + "\n").encode())


def along_the_path(source: Digits, precisions: Sequence[str], findings: Findings) -> None:
    """Add one row per (model, data set, alpha, precision): differences to fp32, and of fp32 to float64.

    loss, accuracy: of the whole set. image: the largest difference of one image's loss.
    """
    for model in source.finetuned:
        scores: dict[str, dict[tuple[float, str], Scores]] = {}
        for precision in ["fp32", "fp64", *(p for p in precisions if p != "fp32")]:
            if record.time_is_up():
                record.left_out(f"losses along the path of {model} from {precision} on")
                return
            start = perf_counter()
            scores[precision] = of_path(source, model, precision)
            if precision != "fp32":
                rows = pd.DataFrame(differences(model, precision, scores))
                findings.path = pd.concat([findings.path, rows], ignore_index=True)
            findings.measured("path", perf_counter() - start, model=model, precision=precision)


def differences(
    model: str, precision: str, scores: Mapping[str, Mapping[tuple[float, str], Scores]]
) -> Iterator[dict[str, Any]]:
    """Yield differences of a precision to fp32; rows of fp64 compare fp32 with it."""
    base, other = ("fp64", "fp32") if precision == "fp64" else ("fp32", precision)
    for (alpha, dataset), got in scores[other].items():
        wanted = scores[base][alpha, dataset]
        moved = (got.losses.double() - wanted.losses.double()).abs()
        yield (
            {"model": model, "alpha": alpha, "dataset": dataset, "precision": other, "against": base}
            | {"loss": abs(got.loss - wanted.loss), "image": float(moved.max())}
            | {"accuracy": abs(got.accuracy - wanted.accuracy), "loss_se": wanted.loss_se}
            | {"accuracy_se": wanted.accuracy_se}
        )


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
    """Score the live float32 weights with all arithmetic in float64."""
    model = copy.deepcopy(path.model).double().cpu()
    found = {}
    for dataset in data:
        mean, std = (torch.tensor(x).double().view(-1, 1, 1) for x in (dataset.mean, dataset.std))
        logits = model((dataset.images.double() / 255 - mean) / std)
        losses = torch.nn.functional.cross_entropy(logits, dataset.labels, reduction="none")
        found[dataset.name] = Scores(losses, logits.argmax(1) == dataset.labels)
    return found


def of_sharpness(
    source: Digits,
    precisions: Sequence[str],
    draws: int,
    findings: Findings,
    estimators: Sequence[Any] = ESTIMATORS,
    rhos: Sequence[float] = RHOS,
) -> None:
    """Add one row per (model, study, layer, alpha, rho, estimator, precision), with fp32's of those draws."""
    layers: list[str] = []
    for model in source.finetuned:
        for precision in precisions:
            if record.time_is_up():
                record.left_out(f"sharpness of {model} from {precision} on")
                return
            path = source.path(model, precision)
            evaluator = Evaluator(path.model, source.data[:1], precision=precision)
            layers = layers or sweep_case.spread(sweep_case.in_order(path, evaluator), LAYERS)
            for estimator, (study, measure) in product(estimators, STUDIES.items()):
                if record.time_is_up():
                    record.left_out(f"{study} of {model} from {precision}, {estimator} on")
                    return
                start = perf_counter()
                which = [layers] if study == "layer-sharpness" else []
                how = {"protocol": Protocol(estimator), "model": model}
                rows = measure(path, evaluator, POSITIONS, rhos, draws, *which, **how)
                seconds = perf_counter() - start
                rows = rows[[*KEYS, "precision", "sharpness", "sharpness_se", "seconds"]]
                rows = beside_fp32(rows.fillna({"layer": "all"}), findings.sharpness)
                findings.sharpness = pd.concat([findings.sharpness, rows], ignore_index=True)
                facts = {"model": model, "precision": precision, "estimator": estimator}
                findings.measured(study, seconds, **facts)


def beside_fp32(rows: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Join rows of one precision with those of fp32, which come first."""
    base = rows if (rows["precision"] == "fp32").all() else before[before["precision"] == "fp32"]
    matching = base.set_index(KEYS).loc[pd.MultiIndex.from_frame(rows[KEYS])]
    rows = rows.assign(fp32=matching["sharpness"].to_numpy(), fp32_se=matching["sharpness_se"].to_numpy())
    return rows.assign(error=(rows["sharpness"] - rows["fp32"]).abs())


def path_table(rows: pd.DataFrame) -> Iterator[str]:
    yield (
        "| along the path | loss: median (largest) | one image's loss: largest | accuracy: median (largest), "
        "points | standard errors of loss, accuracy |"
    )
    yield "| --- | ---: | ---: | ---: | ---: |"
    for (precision, against), group in rows.groupby(["precision", "against"], sort=False):
        accuracy = 100 * group["accuracy"]
        yield (
            f"| {precision} against {'float64' if against == 'fp64' else against} | "
            f"{group['loss'].median():.1e} ({group['loss'].max():.1e}) | {group['image'].max():.1e} | "
            f"{accuracy.median():.2g} ({accuracy.max():.2g}) | "
            f"{group['loss_se'].median():.1e}, {100 * group['accuracy_se'].median():.2g} points |"
        )


def sharpness_table(table: pd.DataFrame, draws: int) -> Iterator[str]:
    few = [p for p in table["precision"].unique() if p != "fp32"]
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
    for (study, rho), rows in table.groupby(["study", "rho"], sort=False):
        by = dict(list(rows.groupby(["precision", "estimator"], sort=False)))

        def cell(precision: str, estimator: str, say: Callable[[pd.DataFrame], str], by: Any = by) -> str:
            group = by.get((precision, estimator))
            return "–" if group is None else say(group)

        cells = [cell("fp32", "gradient", lambda group: f"{group['sharpness'].median():.1e}")]
        cells += [
            cell("fp32", estimator, lambda group: f"{group['sharpness_se'].median():.1e}")
            for estimator in ESTIMATORS
        ]
        cells += [cell(precision, estimator, errors) for precision in few for estimator in ESTIMATORS]
        name = "general" if study == "sharpness" else "layer-wise"
        yield f"| {name}, rho = {rho:g} | {' | '.join(cells)} |"


def estimators_table(table: pd.DataFrame, draws: int) -> Iterator[str]:
    """Yield one row for each estimator; a worst case has no standard error."""
    few = [p for p in table["precision"].unique() if p != "fp32"]
    if not few:
        return
    yield ""
    heads = ["sharpness", f"estimator, {draws} draws", "fp32, median", "standard error, median", *few]
    yield f"| {' | '.join(heads)} |"
    yield "| --- | --- | ---: | ---: |" + " ---: |" * len(few)
    for (study, estimator, rho), rows in table.groupby(["study", "estimator", "rho"], sort=False):
        by = dict(list(rows.groupby("precision", sort=False)))
        name, se = "general" if study == "sharpness" else "layer-wise", by["fp32"]["fp32_se"].median()
        cells = [f"{by['fp32']['sharpness'].median():.1e}", "–" if pd.isna(se) else f"{se:.1e}"]
        cells += [errors(by[precision]) if precision in by else "–" for precision in few]
        yield f"| {name}, rho = {rho:g} | {estimator} | {' | '.join(cells)} |"


def errors(group: pd.DataFrame) -> str:
    """Format median and largest error, as numbers and in standard errors; without these, relative to fp32."""
    if group["fp32_se"].isna().all():
        relative = group["error"] / group["fp32"].abs()
        return (
            f"{group['error'].median():.1e} ({group['error'].max():.1e}), "
            f"{relative.median():.1e} ({relative.max():.1e}) of it"
        )
    ratio = group["error"] / group["fp32_se"]
    return (
        f"{group['error'].median():.1e} ({group['error'].max():.1e}), "
        f"{ratio.median():.2g} ({ratio.max():.2g}) se"
    )


def results(findings: Findings) -> Iterator[dict[str, Any]]:
    """Yield the facts of a row for each median that the tables show."""
    if len(findings.path):
        for (precision, against), rows in findings.path.groupby(["precision", "against"], sort=False):
            for name in ("loss", "image", "accuracy"):
                what = f"{name} against {against}"
                yield {"part": "path", "precision": precision, "name": what, "value": rows[name].median()}
    if len(findings.sharpness):
        for (study, rho, precision, estimator), rows in findings.sharpness.groupby(
            ["study", "rho", "precision", "estimator"], sort=False
        ):
            if precision != "fp32":
                value = (rows["error"] / rows["fp32_se"]).median()
                name = f"error over the standard error, {estimator}, rho {rho:g}"
                yield {"part": study, "precision": precision, "name": name, "value": value}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of those that the device offers")
    parser.add_argument("--estimators", nargs="+", choices=names.ESTIMATORS, default=ESTIMATORS)
    parser.add_argument("--rhos", nargs="+", type=float, default=RHOS)
    parser.add_argument("--out", type=pathlib.Path)
    record.start()
    options = parser.parse_args(argv)
    wanted = ["fp32", *(options.precisions or PRECISIONS)]
    precisions = [precision for precision in offered(options.device) if precision in wanted]
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"{options.out}: there is no folder {options.out.parent}")
    source = Digits(options.device, options.samples, options.models)
    about = machine.about(options.device)
    about |= {"draws": options.draws, "samples": options.samples, "models": list(source.finetuned)}
    findings, interrupted = Findings(about, options.out), False
    try:
        along_the_path(source, precisions, findings)
        of_sharpness(source, precisions, options.draws, findings, options.estimators, options.rhos)
    except KeyboardInterrupt:
        interrupted = True
    print(
        f"digits zoo on {about['device']}, {date.today()}; fine-tuned models: {len(source.finetuned)}, "
        f"images of each set: {options.samples}\n"
        "medians (largest) of absolute differences to fp32; of a sharpness with the same "
        f"{options.draws} draws,\nalso in units of the standard error of the estimator of its column\n"
    )
    if len(findings.path):
        print("\n".join(path_table(findings.path)))
    if len(findings.sharpness):
        table = sharpness_table if tuple(options.estimators) == ESTIMATORS else estimators_table
        print("\n".join(table(findings.sharpness, options.draws)))
    for facts in results(findings):
        record.row("result", **facts)
    if interrupted:
        sys.exit(130)
    if not findings.measurements:
        sys.exit("precision: nothing was measured")


if __name__ == "__main__":
    main()
