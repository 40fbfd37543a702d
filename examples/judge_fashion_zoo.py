"""Test the hypotheses of `fashion_recipe.toml` on the runs of the Fashion zoo, as that file says.

    python examples/judge_fashion_zoo.py DIR [--tables FILE]
    python examples/judge_fashion_zoo.py FILE

DIR is the directory of `make_fashion_zoo.py`, with the runs of all its studies. Prints two lines for each
hypothesis: the verdict, then the mean of the statistic over the blocks, its value in each block, a 95 %
interval, p, and p corrected by Holm's method. The interval is of the mean, from 2,000 bootstrap samples of
the models of each block; it decides nothing. The same runs give the same lines. `--tables` keeps the recipe
and the numbers of each model in a JSON file, of which these lines can be computed again without models,
images and runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from rft_fast import results, studies
from rft_fast.common import disk
from rft_fast.studies.permutation import signs, tau

Recipe = dict[str, Any]
Values = list[np.ndarray]  # one array [models] for each block


@dataclass
class Block:
    """What one block has measured: tables with a row for each model."""

    models: pd.DataFrame  # gain, share, stragglers, flat, general, clean, choice, ensemble, hold
    sharpness: pd.DataFrame  # of each layer, in a column of its name
    straggling: pd.DataFrame  # likewise: whether the layer is a straggler
    zeroshot: float = math.nan  # accuracy of the zero-shot model on plain images


def read_block(run: Path, hold: Path) -> Block:
    """Read the two runs of a block. Outcomes are means over the styles, the data sets out of distribution."""
    rows, images = results.load(run), results.Stored(run)
    path = studies.summarize(rows, images=images)
    far = path[path["ood"]].assign(share=lambda t: t["mode"].isin(["gain", "high gain"]).astype(float))
    models = far.groupby("model", sort=False)[["gain_held_out", "share"]].mean()
    models = models.rename(columns={"gain_held_out": "gain"})

    found = studies.stragglers(rows)
    straggling = found.pivot(index="model", columns="layer", values="straggler").astype(bool)
    counts = studies.claim(rows)
    own = counts[
        (counts["at"] == "finetuned") & (counts["unit"] == "nats") & np.isclose(counts["margin"], 0.02)
    ]
    flat = own[np.isclose(own["rho"], 1)].drop_duplicates("model").set_index("model")["flat"]

    noisy = rows[rows["alpha"] == 1]
    general = noisy[(noisy["study"] == "sharpness") & np.isclose(noisy["rho"], 0.1)].set_index("model")
    single = noisy[(noisy["study"] == "layer-sharpness") & np.isclose(noisy["rho"], 1)]
    chosen = studies.choice(rows, images=images).pivot_table("regret", "model", "rule")
    averaged = studies.ensemble_difference(rows, images=images)
    averaged = averaged[averaged["ood"]].groupby("model")["difference"].mean()
    models = models.assign(
        stragglers=straggling.sum(axis=1),
        flat=flat,
        general=general["sharpness"],
        clean=general["loss"] - general["sharpness"],
        choice=chosen["ID accuracy"] - chosen["ID bump"],
        ensemble=averaged,
        hold=held(hold),
    )
    start = rows[(rows["study"] == "interpolation") & (rows["dataset"] == "plain") & (rows["alpha"] == 0)]
    order = list(dict.fromkeys(found["layer"]))  # of execution
    sharpness = single.pivot(index="model", columns="layer", values="sharpness")
    return Block(
        models.astype(float),
        sharpness.loc[models.index, [layer for layer in order if layer in sharpness]].astype(float),
        straggling.loc[models.index, order],
        float(start["accuracy"].iloc[0]),
    )


def held(run: Path) -> pd.Series:
    """By model: accuracy with the stragglers held, beyond that with as many others; some models have none."""
    effects = studies.coefficient_effects(results.load(run), images=results.Stored(run))
    if effects.empty:
        return pd.Series(dtype=float)  # no model has stragglers
    return effects[~effects["control"].astype(bool)].groupby("model")["beyond"].mean()


def straggler_sharpness(blocks: Sequence[Block], number: int) -> np.ndarray:
    """Mean sharpness over the stragglers of the *other* blocks, which were found on other models."""
    others = pd.concat([block.straggling for place, block in enumerate(blocks) if place != number])
    sharpness = blocks[number].sharpness
    shares = others.mean()[list(sharpness)]
    most = shares.index[shares > 0.5]
    chosen = most if len(most) else shares.sort_values(ascending=False, kind="stable").index[:3]
    return sharpness[chosen].mean(axis=1).to_numpy()


# ------------------------------------------------------------------------------------------ tests

Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Outcome:
    """A statistic in each block, and the p of their mean."""

    blocks: Sequence[float]
    p: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.blocks))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b."""
    return float(tau(signs(x), signs(y)))


def remaining(x: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Normal scores of x, without what a straight line on those of `given` explains."""
    a, b = (stats.norm.ppf((stats.rankdata(v) - 0.375) / (len(v) + 0.25)) for v in (x, given))
    a, b = a - a.mean(), b - b.mean()
    return a - b * (a @ b) / max(b @ b, 1e-12)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN if a side is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / size if size > 1e-9 else math.nan


def by_permutation(x: Values, y: Values, of: Statistic, count: int, seed: int) -> Outcome:
    """Test the mean over blocks of a correlation: y is permuted within each block."""
    rng = np.random.default_rng(seed)
    found = [of(*block) for block in zip(x, y, strict=True)]
    if not np.isfinite(found).all():
        return Outcome(found, 1.0)
    extreme = 0
    for _ in range(count):
        drawn = [of(a, rng.permutation(b)) for a, b in zip(x, y, strict=True)]
        extreme += bool(abs(np.mean(drawn)) >= abs(np.mean(found)) - 1e-12)
    return Outcome(found, (extreme + 1) / (count + 1))


def by_signs(values: Values, count: int, seed: int) -> Outcome:
    """Test the mean over blocks of the mean over models: the models' values get random signs."""
    rng = np.random.default_rng(seed)
    found = [float(block.mean()) if len(block) else math.nan for block in values]
    if not np.isfinite(found).all():
        return Outcome(found, 1.0)
    drawn = [(rng.choice((-1.0, 1.0), (count, len(block))) * block).mean(1) for block in values]
    extreme = int((np.abs(np.mean(drawn, axis=0)) >= abs(np.mean(found)) - 1e-12).sum())
    return Outcome(found, (extreme + 1) / (count + 1))


def by_bootstrap(x: Values, other: Values, y: Values, z: Values, count: int, seed: int) -> Outcome:
    """Test the mean over blocks of |r(x, y)| - |r(other, y)|, partial given z; draws models in each block."""
    rng = np.random.default_rng(seed)

    def differences(draw: bool) -> list[float]:
        found = []
        for a, b, c, d in zip(x, other, y, z, strict=True):
            which = rng.integers(len(a), size=len(a)) if draw else np.arange(len(a))
            a, b, c, d = a[which], b[which], c[which], d[which]
            a, b, c = (remaining(values, d) for values in (a, b, c))
            found.append(abs(pearson(a, c)) - abs(pearson(b, c)))
        return found

    found = differences(draw=False)
    if not np.isfinite(found).all():
        return Outcome(found, 1.0)
    means = np.array([np.mean(differences(draw=True)) for _ in range(count)])
    wrong = min((means <= 0).sum(), (means >= 0).sum()) + int(np.isnan(means).sum())
    return Outcome(found, min(1.0, 2 * (int(wrong) + 1) / (count + 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p values for their number by Holm's method."""
    order, corrected, highest = np.argsort(ps, kind="stable"), [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = highest
    return corrected


def verdict(outcome: Outcome, sign: int, p: float, level: float) -> str:
    if not p < level:
        return "not shown"
    if outcome.mean * sign < 0:
        return "refuted"
    return "supported" if all(value * sign > 0 for value in outcome.blocks) else "not shown"


def outcomes(blocks: Sequence[Block], count: int, seed: int) -> dict[str, Outcome]:
    """The statistic and p of each hypothesis."""

    def column(name: str) -> Values:
        return [block.models[name].to_numpy() for block in blocks]

    def known(name: str) -> Values:
        return [values[~np.isnan(values)] for values in column(name)]

    gain, clean = column("gain"), column("clean")

    def beyond(values: Values) -> Values:
        return [remaining(*both) for both in zip(values, clean, strict=True)]

    stragglers = [straggler_sharpness(blocks, number) for number in range(len(blocks))]
    return {
        "H1": by_signs([share - 0.25 for share in column("share")], count, seed),
        "H2": by_permutation(column("stragglers"), gain, kendall, count, seed),
        "H3": by_permutation(column("flat"), gain, kendall, count, seed),
        "H4": by_permutation(beyond(stragglers), beyond(gain), pearson, count, seed),
        "H5": by_bootstrap(stragglers, column("general"), gain, clean, count, seed),
        "H6": by_signs(known("hold"), count, seed),
        "H7": by_signs(known("choice"), count, seed),
        "H8": by_signs(known("ensemble"), count, seed),
    }


INTERVAL = 2000  # bootstrap samples


def intervals(blocks: Sequence[Block], seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of the mean over blocks of each statistic: models are drawn again within each block."""
    tables = [
        block.models.assign(sharp=straggler_sharpness(blocks, n)).reset_index(drop=True)
        for n, block in enumerate(blocks)
    ]
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(INTERVAL):
        drawn = [statistics(table.iloc[rng.integers(len(table), size=len(table))]) for table in tables]
        for name in drawn[0]:
            found.setdefault(name, []).append(float(np.mean([each[name] for each in drawn])))
    known = {name: np.array(values)[np.isfinite(values)] for name, values in found.items()}
    ends = {n: np.percentile(v, (2.5, 97.5)) if len(v) else (math.nan, math.nan) for n, v in known.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def statistics(models: pd.DataFrame) -> dict[str, float]:
    """The statistic of each hypothesis for some models of a block; NaN where they are too much alike."""
    gain, clean = models["gain"].to_numpy(), models["clean"].to_numpy()
    sharp, general, beyond = (
        remaining(values, clean)
        for values in (models["sharp"].to_numpy(), models["general"].to_numpy(), gain)
    )
    return {
        "H1": float(models["share"].mean() - 0.25),
        "H2": kendall(models["stragglers"].to_numpy(), gain),
        "H3": kendall(models["flat"].to_numpy(), gain),
        "H4": pearson(sharp, beyond),
        "H5": abs(pearson(sharp, beyond)) - abs(pearson(general, beyond)),
        "H6": float(models["hold"].mean()),
        "H7": float(models["choice"].mean()),
        "H8": float(models["ensemble"].mean()),
    }


def unfit(how: dict[str, Any], number: int, block: Block) -> str:
    """Why a block is not analysed by the recipe; empty if it is."""
    count, least = len(block.models), how["models"]
    if count < least:
        return f"block {number} has {count} models, the recipe needs {least}"
    if block.zeroshot < (least := how["zero-shot"]):
        return (
            f"the zero-shot model of block {number} has an accuracy of {block.zeroshot:.3f}, the recipe "
            f"needs {least}"
        )
    return ""


# ----------------------------------------------------------------------------------------- tables


def write_tables(recipe: Recipe, blocks: Sequence[Block], file: Path) -> None:
    """Keep what the tests need, as JSON; numbers as they are."""
    content = {
        "recipe": recipe,
        "blocks": [
            {name: v if name == "zeroshot" else v.to_dict("split") for name, v in vars(block).items()}
            for block in blocks
        ],
    }
    disk.replace(file, (json.dumps(content) + "\n").encode())  # NaN is kept as NaN


def read_tables(file: Path) -> tuple[Recipe, list[Block]]:
    """Read what :func:`write_tables` has written."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["recipe"], [
        Block(**{name: v if name == "zeroshot" else pd.DataFrame(**v) for name, v in block.items()})
        for block in content["blocks"]
    ]


def read_runs(out: Path) -> tuple[Recipe, list[Block]]:
    """Read the runs of all blocks."""
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    numbers = range(len(recipe["pretraining"]["seeds"]))
    return recipe, [read_block(out / f"run{n}", out / f"run{n}-hold") for n in numbers]


def main() -> int:
    parser = argparse.ArgumentParser(description="Test the hypotheses of the Fashion zoo.")
    parser.add_argument(
        "out", type=Path, metavar="DIR", help="directory of make_fashion_zoo.py, or what --tables has written"
    )
    parser.add_argument("--tables", type=Path, metavar="FILE", help="keep the numbers of each model here")
    wanted = parser.parse_args()
    try:
        recipe, blocks = read_tables(wanted.out) if wanted.out.is_file() else read_runs(wanted.out)
        if wanted.tables is not None:
            write_tables(recipe, blocks, wanted.tables)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    how = recipe["analysis"]
    problems = [text for number, block in enumerate(blocks) if (text := unfit(how, number, block))]
    if problems:
        print("not analysed: " + "; ".join(problems))
        return 1
    found = outcomes(blocks, how["permutations"], how["seed"])
    bounds = intervals(blocks, how["seed"])
    corrected = dict(zip(found, holm([each.p for each in found.values()]), strict=True))
    for hypothesis in recipe["hypotheses"]:
        name = hypothesis["name"]
        outcome, p = found[name], corrected[name]
        each = ", ".join(f"{value:+.3f}" for value in outcome.blocks)
        said = verdict(outcome, hypothesis["sign"], p, how["level"])
        print(f"{name} {said}: {hypothesis['says']}")
        low, high = bounds[name]
        print(
            f"   {hypothesis['test']}: {outcome.mean:+.3f} ({each}), 95 % [{low:+.3f}, {high:+.3f}], "
            f"p {outcome.p:.4f}, corrected {p:.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
