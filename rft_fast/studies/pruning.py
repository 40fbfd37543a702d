"""Figure 5 of the paper, Algorithm 1: prune flat layers, or stragglers, then interpolate.

The paper calls both stragglers. Here a straggler is a layer whose own interpolation is unstable
(Def. 1.2), and a flat layer one whose sharpness is near zero (Alg. 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..names import CRITERIA, METHODS, Criterion, Fill, Method, Names, never
from .estimators import Protocol
from .images import Kept
from .interpolate import check_alphas, check_evaluator
from .layers import layerwise_interpolation, stragglers
from .rows import Measured, Sink, as_number, of_study, scored
from .sharpness import layerwise_sharpness, near_zero

if TYPE_CHECKING:
    from ..evaluate import Evaluator, Scores
    from ..path import Path

STUDY = "prune"
NAMED = "named"  # stands for the criterion if the caller chose the layers


def kind(criterion: str) -> str:
    """What the layers that a criterion picks are called."""
    return {"sharpness": "flat layers", "instability": "stragglers"}.get(criterion, f"{criterion} layers")


@dataclass(frozen=True)
class _Variant:
    """One way of pruning; ``method`` None is the unpruned path."""

    method: Method | None = None
    criterion: str | None = None
    layers: tuple[str, ...] = ()
    seed: int | None = None
    control: bool | None = None


def prune_stragglers(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    keep: float = 0.5,
    criterion: Criterion = "sharpness",
    draws: int = 5,
    layers: Names | Mapping[str, Names] | None = None,
    *,
    methods: list[Method] | tuple[Method, ...] = ("zero",),
    seeds: Sequence[int] = (0, 1, 2),
    control: bool = True,
    rho: float = 1.0,
    protocol: Protocol | None = None,
    model: str = "",
    unpruned: MutableMapping[tuple[str, float], Scores] | None = None,
    only: Collection[int] | None = None,
    sink: Sink | None = None,
    images: Kept | None = None,
) -> pd.DataFrame:
    """Measure the path with flat layers or stragglers of the fine-tuned weights pruned (Alg. 1, Figure 5).

    On return, and on any error, the live model is restored bit for bit.

    Args:
        path: the live model between its two ends.
        evaluator: scores the live model of ``path`` on one or more data sets.
        alphas: positions in [0, 1], including 0 and 1.
        keep: fraction of a pruned layer's weights that survives, in (0, 1).
        criterion: how to find the layers if ``layers`` is None. ``"sharpness"`` (Alg. 1): flat on
            every data set (:func:`rft_fast.studies.near_zero`). ``"instability"`` (Def. 1.2): straggler on
            at least one data set (:func:`rft_fast.studies.stragglers`).
        draws: draws of noise per layer for the sharpness criterion.
        layers: names or ``re:`` patterns of the layers to prune, instead of a criterion; the column
            ``criterion`` of the rows is then ``"named"``. For several selections, a mapping from the value of
            that column to layers.
        methods: replacements of a pruned weight w1:

            - ``"zero"`` (the paper's): 0;
            - ``"zeroshot"``: w0;
            - ``"rescale"`` (DARE, Yu et al. 2024): w0, while survivors move 1 / keep times as far from w0;
            - ``"magnitude"``: 0, for the weights of smallest ``|w1|`` in each tensor.

            All but the last prune each weight independently at random.
        seeds: seeds of the random masks and of the control's choice of layers, one curve each; distinct
            integers in [0, 2**32).
        control: also prune as many of the other layers, chosen at random; all of them, with a warning, if
            they are fewer.
        rho: noise scale for the sharpness criterion.
        protocol: how the sharpness of the criterion is measured; None: ``Protocol()``.
        model: name of the fine-tuned model, written into the rows.
        unpruned: scores on the unpruned path by (data set, alpha), if known; missing ones are measured and
            added. Models fine-tuned from the same checkpoint share only those at alpha = 0.
        only: numbers of the measurements to make; None: all. There is one per (curve, alpha), numbered from
            0, the unpruned curve first, in ascending order of alpha. The layers to prune determine the
            curves, so
            give ``layers`` together with this.
        sink: called with the number and the rows of each measurement as soon as it is made.
        images: a dictionary that receives the results of single images: number of a measurement -> those of
            each of its rows (:func:`rft_fast.studies.image_results`). None: they are not kept.

    Returns:
        One row per (curve, alpha, data set), with the columns of :data:`rft_fast.studies.COLUMNS`;
        ``method`` is missing on the unpruned path. ``gain`` and ``rise`` are differences to zero-shot,
        ``change`` is the difference in accuracy to the unpruned path at the same alpha; all are paired over
        samples. A criterion that no layer meets has no rows, and a warning says so.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: :func:`rft_fast.studies.check_alphas` refuses the positions, ``keep``, ``criterion``, a
            method or a seed is out of range, a layer is unknown or inert, the evaluator belongs to another
            model, or
            ``only`` holds a number that no measurement has.
    """
    grid = check_alphas(alphas)
    check_evaluator(path, evaluator, STUDY)
    _check(keep, criterion, methods, seeds)
    if layers is None:
        chosen: dict[str, list[str]] = {
            criterion: _find(path, evaluator, grid, criterion, rho, draws, protocol)
        }
    else:
        named = layers if isinstance(layers, Mapping) else {NAMED: layers}
        chosen = {label: path.select(names) for label, names in named.items()}
    variants = [_Variant()]
    for label, names in chosen.items():
        if not names:
            of = f" of {model}" if model else ""
            warnings.warn(f"prune: there are no {kind(label)}{of}, so none is pruned", stacklevel=2)
        variants += _variants(path.layers, label, names, methods, seeds, control)
    unpruned = {} if unpruned is None else unpruned
    record = Measured(STUDY, len(variants) * len(grid), only, sink, images)
    places = enumerate((variant, alpha) for variant in variants for alpha in grid)
    for number, (variant, alpha) in places:
        if not record.wants(number):
            continue
        start = perf_counter()
        base, here = (_unpruned(path, evaluator, at, unpruned) for at in (0.0, alpha))
        scores = here
        if variant.method is not None and alpha != 0:  # at 0, fine-tuned weights have no effect
            start = perf_counter()
            with path.at(alpha), _pruned(path, alpha, keep, variant):
                scores = evaluator.scores()
        seconds = perf_counter() - start
        rows = []
        for name, score in scores.items():
            row = scored(STUDY, evaluator, name, scores, seconds)
            row |= {"model": model, "alpha": alpha, "rho": 0.0, "keep": 1.0}
            row["gain"], row["gain_se"] = score.gain_over(base[name])
            row["rise"], row["rise_se"] = score.rise_over(base[name])
            row["change"], row["change_se"] = score.gain_over(here[name])
            if variant.method is not None:
                row |= {"keep": keep, "layer": ", ".join(variant.layers), "seed": variant.seed}
                row |= {name: getattr(variant, name) for name in ("method", "criterion", "control")}
            rows.append(row)
        record.add(number, rows, scores.values())
    return record.frame()


def _unpruned(
    path: Path, evaluator: Evaluator, alpha: float, known: MutableMapping[tuple[str, float], Scores]
) -> dict[str, Scores]:
    """Scores of the unpruned model at alpha; missing ones are measured and added to ``known``."""
    names = [data.name for data in evaluator.datasets]
    if not all((name, alpha) in known for name in names):
        with path.at(alpha):
            for name, scores in evaluator.scores().items():
                if (name, alpha) not in known:
                    known[name, alpha] = scores
    return {name: known[name, alpha] for name in names}


def _check(keep: float, criterion: Criterion, methods: Sequence[Method], seeds: Sequence[int]) -> None:
    if not 0 < as_number("prune: keep", keep) < 1:
        raise ValueError(f"prune: keep must lie between 0 and 1, the fraction that survives; got {keep}")
    if criterion not in CRITERIA:
        raise ValueError(f"prune: criterion must be one of {', '.join(CRITERIA)}; got {criterion!r}")
    if isinstance(methods, str) or not methods or not set(methods) <= set(METHODS):
        raise ValueError(f"prune: methods must be some of {', '.join(METHODS)}; got {methods!r}")
    wrong = [s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**32]
    if not seeds or wrong or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"prune: seeds must be distinct integers in [0, 2**32), at least one; got {seeds} "
            "(numpy.random.RandomState, which chooses the layers of the control, accepts no "
            "others)"
        )


def _find(
    path: Path,
    evaluator: Evaluator,
    grid: Sequence[float],
    criterion: Criterion,
    rho: float,
    draws: int,
    protocol: Protocol | None,
) -> list[str]:
    if criterion == "instability":
        facts = stragglers(layerwise_interpolation(path, evaluator, grid))
        return list(facts.loc[facts["straggler"], "layer"].unique())
    if criterion == "sharpness":
        facts = near_zero(layerwise_sharpness(path, evaluator, grid, [rho], draws, protocol=protocol))
        everywhere = facts.groupby("layer", sort=False)["near_zero"].all()
        return list(everywhere.index[everywhere])
    never(criterion)


def _variants(
    layers: Sequence[str],
    criterion: str,
    chosen: Sequence[str],
    methods: Sequence[Method],
    seeds: Sequence[int],
    control: bool,
) -> list[_Variant]:
    if not chosen:
        return []
    others = [layer for layer in layers if layer not in set(chosen)]
    if control and len(others) < len(chosen):
        warnings.warn(
            (
                f"prune: the control to {len(chosen)} layers by {criterion} has only {len(others)} "
                "other layers to choose from"
            ),
            stacklevel=3,
        )
    found = []
    for method in methods:
        # Pruning by magnitude is not random, so one curve is enough.
        masks = seeds[:1] if method == "magnitude" else seeds
        found += [_Variant(method, criterion, tuple(chosen), seed, False) for seed in masks]
        if control and others:
            picked = [random_layers(others, len(chosen), seed) for seed in seeds]
            found += [
                _Variant(method, criterion, names, seed, True)
                for names, seed in zip(picked, seeds, strict=True)
            ]
    return found


def random_layers(layers: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """Return so many layers, or all if they are fewer, chosen at random, in their order."""
    # RandomState's stream is frozen, so a seed selects the same layers everywhere.
    picked = np.random.RandomState(seed).permutation(len(layers))[:count]
    return tuple(layers[index] for index in sorted(picked))


@contextmanager
def _pruned(path: Path, alpha: float, keep: float, variant: _Variant) -> Iterator[None]:
    """Prune the variant's layers of the model, which is at alpha, until the caller's block ends."""
    layers = list(variant.layers)
    if variant.method is None:
        yield
    elif variant.method == "magnitude":
        with path.borrowed(layers) as weights:
            for weight in weights:
                _interpolate(weight.live, weight.zeroshot, _largest(weight.finetuned, keep), alpha)
            yield
    elif variant.method == "zero" or variant.method == "zeroshot" or variant.method == "rescale":
        # (1 - alpha) w0 + alpha (w0 + mask (w1 - w0) / keep) is the masked path at alpha / keep.
        at = alpha / keep if variant.method == "rescale" else alpha
        fill: Fill = "zero" if variant.method == "zero" else "zeroshot"
        # Buffers are already at alpha.
        path.write(at, layers=layers, keep=keep, fill=fill, seed=variant.seed or 0, buffers=False)
        yield
    else:
        never(variant.method)


@torch.no_grad()
def _interpolate(live: Tensor, zeroshot: Tensor, finetuned: Tensor, alpha: float) -> None:
    live.copy_(torch.lerp(zeroshot.float(), finetuned.float(), alpha))


def _largest(values: Tensor, keep: float) -> Tensor:
    """Zero all but the ``round(keep * n)`` values of largest magnitude."""
    flat = values.detach().flatten()
    kept = flat.abs().topk(round(keep * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(values)


def pruning_effect(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarize the effect of pruning on accuracy, over mask seeds.

    Args:
        rows: rows of :func:`prune_stragglers`; rows of other studies are ignored.

    Returns:
        One row per (model, data set, criterion, method, keep, control):

        - ``layers`` (of the first seed), ``seeds`` (their number);
        - ``change``: mean over seeds and over alpha > 0 of A(pruned) - A(unpruned), with ``change_se``, its
          standard error over seeds for the given images (NaN for one seed);
        - ``gain``: maximum over alpha of the mean over seeds of A(alpha) - A(0), reached at ``best_alpha``;
          ``unpruned_gain``: the same without pruning. Choosing alpha on the same images makes both gains
          optimistic, but not ``change``.

    Raises:
        TypeError: ``rows`` is not a table of rows.
        ValueError: there are no rows of the study.
    """
    rows = of_study(rows, STUDY, "pruning_effect")
    keys = ["model", "dataset", "criterion", "method", "keep", "control"]
    plain = rows[rows["method"].isna()].groupby(["model", "dataset"])["gain"].max()
    found = []
    for key, group in rows[rows["method"].notna()].groupby(keys, sort=False):
        fact = dict(zip(keys, key, strict=True))
        changes = group[group["alpha"] > 0].groupby("seed")["change"].mean()
        gains = group.groupby("alpha")["gain"].mean()
        fact |= {
            "layers": str(group["layer"].iloc[0]).split(", "),
            "seeds": len(changes),
            "change": changes.mean(),
            "change_se": changes.sem(),
            "gain": gains.max(),
            "best_alpha": gains.idxmax(),
            "unpruned_gain": plain[fact["model"], fact["dataset"]],
        }
        found.append(fact)
    columns = [*keys, "layers", "seeds", "change", "change_se", "gain", "best_alpha", "unpruned_gain"]
    return pd.DataFrame(found, columns=columns)
