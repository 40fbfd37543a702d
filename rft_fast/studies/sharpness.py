"""Figures 3 and 4 of the paper: the rise of the loss under noise, of the whole model and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # quantiles of Student's t; scipy.stats takes ten times as long to load

from ..names import ZERO_MARGIN, Names, On
from .estimators import WORST_CASE, Estimate, Protocol, Target, estimate, together
from .interpolate import check_evaluator
from .rows import COLUMNS, Measured, Sink, as_number, ascending, of_study
from .saturation import saturated

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
    """Measure general sharpness along the path (Eq. 3, Figure 3): ``E[L(w + delta)] - L(w)``.

    All layers of ``w = theta(alpha)`` are perturbed by ``delta ~ N(0, rho^2 diag(c^2))``, with ``c = |w|`` if
    adaptive (the default), otherwise 1. On return, and on any error, the live model is restored bit for bit.

    Args:
        path: the live model between its two ends.
        evaluator: scores the live model of ``path`` on one or more data sets.
        alphas: positions on the path, finite and distinct; 0 is zero-shot, 1 is fine-tuned.
        rhos: noise scales, above 0 and distinct; the paper's Figure 3 uses 1.0.
        draws: draws of noise per (alpha, rho, data set); Hessian products or steps with the estimators that
            :class:`rft_fast.studies.Protocol` describes.
        protocol: estimator, noise and stopping rule; None: ``Protocol()``. Its ``on`` defaults to
            ``"interpolated"`` here.
        model: name of the fine-tuned model, written into the rows.
        only: numbers of the measurements to make; None: all. There is one per (alpha, data set), numbered
            from 0 in ascending order of alpha and, for each alpha, in the evaluator's order of data sets.
            Those at alpha = 0 are the same for all models fine-tuned from one checkpoint.
        sink: called with the number and the rows of each measurement as soon as it is made.

    Returns:
        One row per (alpha, rho, data set), with the columns of :data:`rft_fast.studies.COLUMNS`:

        - ``sharpness``, in nats, with ``sharpness_se`` and ``draws``. Standard errors are over draws, for the
          given images; NaN for a single draw and for the worst case;
        - ``loss``: the clean loss plus ``sharpness``. This is the mean loss over draws for ``"plain"`` and
          ``"antithetic"``, that mean without the part linear in delta for ``"gradient"``, the limit of small
          rho for ``"hessian"``, and the highest loss found for the worst case;
        - ``accuracy``: the mean over draws, a fraction; of the clean model for ``"hessian"``;
        - ``reached``: whether the standard error requested by ``protocol.goal`` was reached.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: alphas, rhos or draws out of range, the evaluator belongs to another model, or ``only``
            holds a number that no measurement has.
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
    """Measure the sharpness of each layer along the path (Sec. 3.1, Figure 4).

    One layer i of the *fine-tuned* weights is perturbed, ``w1 + rho * |w1| * eps``, then the whole model is
    interpolated as usual: ``S_i(alpha) = E[L(theta(alpha; w1 perturbed in i))] - L(theta(alpha))``, exactly
    zero at alpha = 0. ``Protocol(on="interpolated")`` perturbs layer i of ``theta(alpha)`` instead. Layers
    are measured in the order of execution, so the stages before a layer run once for all of its draws. On
    return, and on any error, the live model is restored bit for bit.

    Args:
        path: the live model between its two ends.
        evaluator: scores the live model of ``path`` on one or more data sets.
        alphas: positions on the path, finite and distinct; 0 is zero-shot, 1 is fine-tuned.
        rhos: noise scales, above 0 and distinct.
        draws: draws of noise per (alpha, data set, layer, rho); Hessian products or steps with the estimators
            that :class:`rft_fast.studies.Protocol` describes.
        layers: names or ``re:`` patterns of layers of the path; None: all of them.
        protocol: estimator, noise and stopping rule; None: ``Protocol()``. Its ``on`` defaults to
            ``"finetuned"`` here.
        model: name of the fine-tuned model, written into the rows.
        only: numbers of the measurements to make; None: all. There is one per (alpha, data set, layer),
            numbered from 0 in that order; with the estimator ``"hessian"``, whose products serve all layers,
            one per (alpha, data set).
        sink: called with the number and the rows of each measurement as soon as it is made.

    Returns:
        One row per (alpha, data set, layer, rho), with the columns of :data:`rft_fast.studies.COLUMNS`.
        ``sharpness`` is in nats; :func:`sharpness` describes it and ``loss``, ``accuracy``, ``reached`` and
        their standard errors.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: alphas, rhos or draws out of range, a layer that is unknown (the message lists the nearest
            names) or inert (with the reason), an evaluator of another model, or a number in ``only`` that no
            measurement has.

    Example:
        >>> rows = rft.studies.layerwise_sharpness(path, evaluator, alphas=[0.0, 0.5, 1.0], rhos=[1.0])
        >>> rft.studies.near_zero(rows).query("near_zero")["layer"]
    """
    protocol = _on(protocol, "finetuned")
    check_evaluator(path, evaluator, LAYER_STUDY)
    targets = [Target(layer, *evaluator.span(path.tensors(layer))) for layer in path.select(layers)]
    targets.sort(key=lambda target: target.stage)
    return _study(path, evaluator, alphas, rhos, draws, targets, protocol, LAYER_STUDY, model, only, sink)


def _on(protocol: Protocol | None, default: On) -> Protocol:
    """The protocol, with the study's default for ``on`` if it has none."""
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
    classes = {feed.name: feed.among for feed in evaluator.feeds}
    record = Measured(study, len(places) * len(units), only, sink)
    for place, (alpha, data) in enumerate(places):
        wanted = {n: unit for n, unit in enumerate(units, place * len(units)) if record.wants(n)}
        if not wanted:
            continue
        numbers = {target: n for n, unit in wanted.items() for target in unit}
        parts = evaluator.parts(protocol.images_per_noise, data.name)
        with closing(estimate(path, parts, alpha, list(numbers), scales, draws, protocol)) as found:
            for results in found:
                rows = []
                for (target, rho), result in results.items():
                    row = {"study": study, "model": model, "dataset": data.name, "ood": data.ood}
                    row |= {"layer": target.layer, "alpha": alpha, "rho": rho, "keep": 1.0}
                    row |= {"samples": len(data.labels), "skipped": data.skipped}
                    row |= {"normalized": evaluator.normalize_logits}
                    row |= {"precision": evaluator.precision, **_asked(protocol), **_measured(result)}
                    if result.coupling == "image":
                        row["estimator"] = f"{protocol.estimator}-image"
                    row["saturated"] = saturated(row, classes[data.name])
                    rows.append(row)
                record.add(numbers[target], rows)
    return record.frame()


def _asked(protocol: Protocol) -> dict[str, object]:
    names = ["on", "adaptive", "estimator"]
    if protocol.estimator not in WORST_CASE:  # which draws nothing
        names += ["noise", "seed"]
    asked = {name: getattr(protocol, name) for name in names}
    return {**asked, "noise_batch": protocol.images_per_noise}


def _measured(found: Estimate) -> dict[str, object]:
    names = "sharpness sharpness_se loss loss_se accuracy accuracy_se draws nonfinite reached seconds"
    return {name: getattr(found, name) for name in names.split()}


def _numbers(name: str, values: Iterable[float]) -> list[float]:
    """Sort finite, distinct numbers; refuse others."""
    numbers = ascending(name, values)
    if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}: expected finite numbers, each once and at least one; got {numbers}")
    return numbers


def near_zero(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Find the flat layers, those of near-zero sharpness (the criterion of Alg. 1), by an equivalence test.

    A layer is near zero if, at every alpha > 0, the two-sided 95 % interval of its sharpness lies within
    ``margin`` of zero: ``|S| + t * se < margin``, with Student's t for ``draws - 1`` degrees of freedom
    (``pairs - 1`` for antithetic draws). A wide interval is no evidence, so a layer without a finite
    standard error is never near zero.

    Args:
        rows: rows of :func:`layerwise_sharpness`; rows of other studies are ignored.
        margin: largest sharpness that counts as zero, in nats, above 0.

    Returns:
        One row per (model, data set, on, rho, estimator, noise, adaptive, noise_batch, normalized, layer), in
        the order of measurement: ``near_zero`` and ``margin``, and, from the alpha whose interval reaches
        furthest from zero, ``alpha``, ``sharpness``, ``sharpness_se``, ``bound`` (the far end, in nats) and
        ``draws``.

    Raises:
        TypeError: ``rows`` is not a table of rows, or ``margin`` is not a number.
        ValueError: ``margin`` is not above 0, or there are no rows of the study with alpha > 0.
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
        at = int(np.argmax(bounds))  # unlike max, argmax finds a NaN
        worst = group.iloc[at]
        fact = {name: worst[name] for name in ("sharpness", "sharpness_se", "alpha", "draws")}
        near = bool(bounds[at] < margin)
        found.append({**dict(zip(keys, key, strict=True)), **fact, "bound": bounds[at], "near_zero": near})
    return pd.DataFrame(found).assign(margin=margin).astype({name: COLUMNS[name] for name in keys})


def student_t(rows: pd.DataFrame) -> pd.Series:
    """Student's t of the two-sided 95 % interval of each row's sharpness; NaN for a single draw."""
    pairs = rows["estimator"].str.startswith("antithetic").to_numpy(dtype=bool, na_value=False)
    freedom = (rows["draws"] // np.where(pairs, 2, 1) - 1).astype("float64")
    return pd.Series(stdtrit(freedom.where(freedom > 0), 0.975), index=rows.index)
