"""Figures 3 and 4 of the paper: how much the loss rises under noise, for the model and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # Student's t, inverted; scipy.stats takes ten times as long to load

from ..names import ZERO_MARGIN, Names, On
from .estimators import WORST_CASE, Estimate, Protocol, Target, estimate, together
from .interpolate import check_evaluator
from .rows import COLUMNS, Measured, Sink, as_number, ascending, of_study

if TYPE_CHECKING:
    from ..evaluate import Evaluator
    from ..path import Path

STUDY = "sharpness"
LAYER_STUDY = "layer-sharpness"
MARGIN = ZERO_MARGIN


def sharpness(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    rhos: Iterable[float],
    draws: int = 20,
    *,
    protocol: Protocol | None = None,
    model: str = "",
    only: Collection[int] | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame:
    """General sharpness along the path (Eq. 3): ``E[L(w + delta)] - L(w)``, all layers perturbed.

    ``delta ~ N(0, rho^2 diag(c^2))``, ``c = |w|`` when adaptive, at ``w = theta(alpha)``. The live model
    is as it was before once the study ends, also when it fails.

    Args:
        path: the live model between its two ends.
        evaluator: scores the path's live model, with its own loss.
        alphas: finite positions, each once.
        rhos: noise scales above 0, each once; the paper's Figure 3 has 1.0.
        draws: of noise, for each (alpha, rho, data set); what else they are, see
            :class:`rft_fast.studies.Protocol`.
        protocol: how it is measured; None: Protocol(). Where its ``on`` is None,
            ``"interpolated"``.
        model: name of the fine-tuned model, written into the rows.
        only: numbers of the measurements to make; None: all. There is one for each (alpha, data set),
            numbered in ascending order of alpha and, for each alpha, in the evaluator's order of its sets.
            At alpha = 0 they are the same for all models fine-tuned from one.
        sink: called with each measurement's number and rows as soon as it is made.

    Returns:
        One row per (alpha, rho, data set) with the columns of :data:`rft_fast.studies.COLUMNS`. ``loss`` is
        the clean loss plus ``sharpness``: of the estimators ``"plain"`` and ``"antithetic"`` that is the mean
        over the draws, of ``"gradient"`` over draws less <gradient, delta>, of ``"hessian"`` the limit for
        small rho, and of the worst case the loss there. ``accuracy`` is the mean over the draws; of
        ``"hessian"`` that of the clean model. Standard errors are those of the draws, for the images at
        hand. ``reached`` tells whether a wanted standard error was.

    Raises:
        TypeError: arguments of other types; draws, alphas or rhos that are no numbers.
        ValueError: bad alphas, rhos or draws, an evaluator of another model, numbers that there are none of.
    """
    protocol = _on(protocol, "interpolated")
    check_evaluator(path, evaluator, STUDY)
    targets = [Target(None, 0, evaluator.stations - 1)]
    return _study(path, evaluator, alphas, rhos, draws, targets, protocol, STUDY, model, only, sink)


def layerwise_sharpness(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    rhos: Iterable[float],
    draws: int = 20,
    layers: Names | None = None,
    *,
    protocol: Protocol | None = None,
    model: str = "",
    only: Collection[int] | None = None,
    sink: Sink | None = None,
) -> pd.DataFrame:
    """Sharpness of each layer along the path (Sec. 3.1).

    One layer of the *fine-tuned* weights is perturbed, then the whole model interpolated as usual, so
    that at alpha = 0 it is exactly zero; ``Protocol(on="interpolated")`` perturbs the interpolated
    weights instead. Layers are taken in the order in which the model runs them, so that what comes
    before a layer runs once for all of its draws. The live model is as it was before once the
    study ends, also when it fails.

    Args:
        layers: names or ``re:`` patterns of layers of the path; None: all of them.
        protocol: how it is measured; None: Protocol(). Where its ``on`` is None, ``"finetuned"``.

        only: as in :func:`sharpness`, but there is a measurement for each (alpha, data set, layer), numbered
            in that order; with the estimator ``"hessian"``, whose products serve all layers, for each (alpha,
            data set).

    The other arguments are those of :func:`sharpness`.

    Returns:
        One row per (alpha, data set, layer, rho), as :func:`sharpness`.

    Raises:
        TypeError: as :func:`sharpness`.
        ValueError: as :func:`sharpness`, and an unknown layer (with the nearest names) or an inert one
            (with the reason).
    """
    protocol = _on(protocol, "finetuned")
    check_evaluator(path, evaluator, LAYER_STUDY)
    targets = [Target(layer, *evaluator.span(path.tensors(layer))) for layer in path.select(layers)]
    targets.sort(key=lambda target: target.stage)
    return _study(path, evaluator, alphas, rhos, draws, targets, protocol, LAYER_STUDY, model, only, sink)


def _on(protocol: Protocol | None, default: On) -> Protocol:
    """The protocol with the study's own ``on`` where it has none."""
    protocol = Protocol() if protocol is None else protocol
    if not isinstance(protocol, Protocol):
        raise TypeError(f"sharpness: protocol: expected a rft_fast.studies.Protocol, got {protocol!r}")
    return protocol if protocol.on else replace(protocol, on=default)


def _study(
    path: Path,
    evaluator: Evaluator,
    alphas: Iterable[float],
    rhos: Iterable[float],
    draws: int,
    targets: Sequence[Target],
    protocol: Protocol,
    study: str,
    model: str,
    only: Collection[int] | None,
    sink: Sink | None,
) -> pd.DataFrame:
    protocol.check_draws(draws)
    positions, scales = _numbers("alphas", alphas), _numbers("rhos", rhos)
    if not all(rho > 0 for rho in scales):
        raise ValueError(f"{study}: rhos must be above 0; got {scales}")
    units = together(targets, protocol)
    places = [(alpha, data) for alpha in positions for data in evaluator.datasets]
    record = Measured(study, len(places) * len(units), only, sink)
    for place, (alpha, data) in enumerate(places):
        wanted = {n: unit for n, unit in enumerate(units, place * len(units)) if record.wants(n)}
        if not wanted:
            continue
        numbers = {target: n for n, unit in wanted.items() for target in unit}
        parts = evaluator.parts(protocol.noise_batch, data.name)
        with closing(estimate(path, parts, alpha, list(numbers), scales, draws, protocol)) as found:
            for results in found:
                rows = []
                for (target, rho), result in results.items():
                    row = {"study": study, "model": model, "dataset": data.name, "ood": data.ood}
                    row |= {"layer": target.layer, "alpha": alpha, "rho": rho, "keep": 1.0}
                    row |= {"samples": len(data.labels), "skipped": data.skipped}
                    row |= {"normalized": evaluator.normalize_logits}
                    row |= {"precision": evaluator.precision, **_asked(protocol), **_measured(result)}
                    rows.append(row)
                record.add(numbers[target], rows)
    return record.frame()


def _asked(protocol: Protocol) -> dict[str, object]:
    names = ["on", "adaptive", "estimator", "noise_batch"]
    if protocol.estimator not in WORST_CASE:  # which draws nothing
        names += ["noise", "seed"]
    return {name: getattr(protocol, name) for name in names}


def _measured(found: Estimate) -> dict[str, object]:
    names = "sharpness sharpness_se loss loss_se accuracy accuracy_se draws nonfinite reached seconds"
    return {name: getattr(found, name) for name in names.split()}


def _numbers(name: str, values: Iterable[float]) -> list[float]:
    """Finite numbers in ascending order, each once."""
    numbers = ascending(name, values)
    if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}: expected finite numbers, each once and at least one; got {numbers}")
    return numbers


def near_zero(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Which layers have no sharpness to speak of, Algorithm 1's criterion, by a stated rule.

    A layer counts as near zero when at every alpha > 0 the whole two-sided 95 % interval of its sharpness
    lies within ``margin`` of zero: ``|S| + t * se < margin``, with Student's t for ``draws - 1`` (pairs - 1)
    degrees of freedom. A wide interval is no evidence, so a layer without a finite standard error
    is never near zero.

    Args:
        rows: of :func:`layerwise_sharpness`; rows of other studies among them are left aside.
        margin: in nats.

    Returns:
        One row per (model, data set, on, rho, estimator, noise, adaptive, noise_batch, normalized, layer) in
        the order of measurement, with what was found where the interval reaches furthest from zero:
        ``sharpness``, ``sharpness_se``, its far end ``bound``, ``alpha``, ``draws``; and ``near_zero``,
        ``margin``.

    Raises:
        TypeError: no table of rows, a margin that is no number.
        ValueError: no rows of the study with alpha > 0, a margin that is not above 0.
    """
    if not as_number("near_zero: margin", margin) > 0:
        raise ValueError(f"near_zero: expected a margin above 0 nats, got {margin}")
    rows = of_study(rows, LAYER_STUDY, "near_zero")
    rows = rows[rows["alpha"] > 0]
    if rows.empty:
        raise ValueError(f"near_zero: expected rows of the study {LAYER_STUDY!r} with alpha > 0, got none")
    keys = "model dataset on rho estimator noise adaptive noise_batch normalized layer".split()
    found = []
    for key, group in rows.groupby(keys, sort=False, dropna=False):
        bounds = group["sharpness"].abs() + student_t(group) * group["sharpness_se"]
        bounds = bounds.to_numpy(dtype=float, na_value=np.nan)
        at = int(np.argmax(bounds))  # argmax finds a NaN, max would hide it
        worst = group.iloc[at]
        fact = {name: worst[name] for name in ("sharpness", "sharpness_se", "alpha", "draws")}
        near = bool(bounds[at] < margin)
        found.append({**dict(zip(keys, key, strict=True)), **fact, "bound": bounds[at], "near_zero": near})
    return pd.DataFrame(found).assign(margin=margin).astype({name: COLUMNS[name] for name in keys})


def student_t(rows: pd.DataFrame) -> pd.Series:
    """For each row of a sharpness, Student's t of its two-sided 95 % interval; NaN for a single draw."""
    pairs = (rows["estimator"] == "antithetic").to_numpy(dtype=bool, na_value=False)
    freedom = (rows["draws"] // np.where(pairs, 2, 1) - 1).astype("float64")
    return pd.Series(stdtrit(freedom.where(freedom > 0), 0.975), index=rows.index)
