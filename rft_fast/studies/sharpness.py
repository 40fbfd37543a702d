"""Figures 3 and 4 of the paper: the rise of the loss under noise, of the whole model and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # quantiles of Student's t; scipy.stats takes ten times as long to load

from ..names import ZERO_MARGIN, Names, On
from .estimators import WORST_CASE, Estimate, Protocol, Target, estimate, together
from .estimators.estimates import Results
from .interpolate import check_evaluator
from .rows import COLUMNS, Measured, Row, Sink, as_number, ascending, asked, of_study
from .saturation import saturated

if TYPE_CHECKING:
    from ..datasets import Dataset
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
    exclude: Names | None = None,
    protocol: Protocol | None = None,
    model: str = "",
    zeroshot: MutableMapping[tuple[str, float], Estimate] | None = None,
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
        exclude: names or ``re:`` patterns of layers that are not perturbed, such as the head or LayerNorms;
            None: all are.
        protocol: estimator, noise and stopping rule; None: ``Protocol()``. Its ``on`` defaults to
            ``"interpolated"`` here.
        model: name of the fine-tuned model, written into the rows.
        zeroshot: estimates at alpha = 0 by data set and rho, if there are any; the study adds what it needs.
            They are the same for all models fine-tuned from one checkpoint.
        only: numbers of the measurements to make; None: all. There is one per (alpha, data set), numbered
            from 0 in ascending order of alpha and, for each alpha, in the evaluator's order of data sets.
            Those at alpha = 0 are the same for all models fine-tuned from one checkpoint.
        sink: called with the number and the rows of each measurement as soon as it is made.

    Returns:
        One row per (alpha, rho, data set), with the columns of :data:`rft_fast.studies.COLUMNS`:

        - ``sharpness``, in nats, with ``sharpness_se`` and ``draws``: the error over draws, for the given
          images, of the draws of each ``noise_batch``, with ``sharpness_df`` degrees of freedom (for the
          worst case over these batches). NaN for a single draw. ``sharpness_se_images``: the error over
          images, for the given draws;
        - ``sharpness_change``, with ``_se`` and ``_df``: sharpness less that at alpha = 0, paired by draw, if
          0 is among the alphas;
        - ``loss``: the clean loss plus ``sharpness``;
        - ``accuracy``: the mean over draws, a fraction; of the clean model for ``"hessian"``;
        - ``estimator``: the one that was used; ``asked``: the one that the protocol names;
        - ``noise_alike``: the parameters whose noise the images of a ``noise_batch`` share, where no rule is
          known for what reads them and the others have noise per image; joined by ", ";
        - ``excluded``: the layers that were not perturbed, joined by ", ";
        - ``reached``: whether as many draws were made as ``protocol.goal`` calls for.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: alphas, rhos or draws out of range, ``exclude`` names no layer or all of them, the
            evaluator belongs to another model, or ``only`` holds a number that no measurement has.
    """
    protocol = _on(protocol, "interpolated")
    check_evaluator(path, evaluator, STUDY)
    target = _rest(path, evaluator, exclude)
    study = _Study(STUDY, path, evaluator, protocol, draws, model, {} if zeroshot is None else zeroshot)
    return study.run(alphas, rhos, [target], only, sink)


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
    study = _Study(LAYER_STUDY, path, evaluator, protocol, draws, model, {})
    return study.run(alphas, rhos, targets, only, sink)


def _on(protocol: Protocol | None, default: On) -> Protocol:
    """The protocol, with the study's default for ``on`` if it has none."""
    protocol = Protocol() if protocol is None else protocol
    if not isinstance(protocol, Protocol):
        raise TypeError(f"sharpness: protocol: expected a rft_fast.studies.Protocol, got {protocol!r}")
    return protocol if protocol.on else replace(protocol, on=default)


def _rest(path: Path, evaluator: Evaluator, exclude: Names | None) -> Target:
    """All layers but the excluded ones."""
    if exclude is None:
        return Target(None, 0, evaluator.stations - 1)
    try:
        excluded = path.select(exclude)
    except ValueError as error:
        raise ValueError(f"{STUDY}: exclude (--exclude): {error}") from None
    if not (rest := tuple(layer for layer in path.layers if layer not in set(excluded))):
        raise ValueError(f"{STUDY}: exclude leaves no layer to perturb; got {list(exclude)}")
    span = evaluator.span(tensor for layer in rest for tensor in path.tensors(layer))
    return Target(None, *span, tuple(excluded), rest)


@dataclass
class _Study:
    """What all measurements of a call share."""

    name: str
    path: Path
    evaluator: Evaluator
    protocol: Protocol
    draws: int
    model: str
    zeroshot: MutableMapping[tuple[str, float], Estimate]

    def run(
        self,
        alphas: Iterable[float],
        rhos: Iterable[float],
        targets: Sequence[Target],
        only: Collection[int] | None,
        sink: Sink | None,
    ) -> pd.DataFrame:
        self.protocol.check_draws(self.draws)
        positions, scales = _numbers("alphas", alphas), _numbers("rhos", rhos)
        if not all(rho > 0 for rho in scales):
            raise ValueError(f"{self.name}: rhos must be above 0; got {scales}")
        units = together(targets, self.protocol)
        places = [(alpha, data) for alpha in positions for data in self.evaluator.datasets]
        record = Measured(self.name, len(places) * len(units), only, sink)
        if self.protocol.noise_batch and self._images_per_noise is None:
            self.path.warn(
                f"{self.name}: the text tower makes the head for all images, so noise_batch is not "
                "used: all images share each draw, and each base of noise per image"
            )
        compared = self.name == STUDY and 0.0 in positions
        for place, (alpha, data) in enumerate(places):
            wanted = {n: unit for n, unit in enumerate(units, place * len(units)) if record.wants(n)}
            if not wanted:
                continue
            if compared and alpha and any((data.name, rho) not in self.zeroshot for rho in scales):
                self._start(data.name, targets, scales)
            numbers = {target: n for n, unit in wanted.items() for target in unit}
            for results in self._estimates(alpha, data.name, list(numbers), scales):
                rows = []
                for (target, rho), result in results.items():
                    row = self._row(data, target, alpha, rho, result)
                    rows.append(row | (self._change(data.name, alpha, rho, result) if compared else {}))
                record.add(numbers[target], rows)
        return record.frame()

    def _estimates(
        self, alpha: float, dataset: str, targets: Sequence[Target], rhos: Sequence[float]
    ) -> Iterator[Results]:
        parts = self.evaluator.parts(self._images_per_noise, dataset)
        found = estimate(self.path, parts, alpha, targets, rhos, self.draws, self.protocol)
        with closing(found):
            yield from found

    @property
    def _images_per_noise(self) -> int | None:
        return images_per_noise(self.protocol, self.evaluator)

    def _start(self, dataset: str, targets: Sequence[Target], rhos: Sequence[float]) -> None:
        """Measure the zero-shot model, with which others are compared."""
        for results in self._estimates(0.0, dataset, targets, rhos):
            for (_, rho), result in results.items():
                self.zeroshot[dataset, rho] = result

    def _change(self, dataset: str, alpha: float, rho: float, result: Estimate) -> Row:
        if not alpha:
            self.zeroshot[dataset, rho] = result
            return {"sharpness_change": 0.0, "sharpness_change_se": 0.0}
        change = result.change(self.zeroshot[dataset, rho])
        return {
            "sharpness_change": change.value,
            "sharpness_change_se": change.se,
            "sharpness_change_df": change.df,
        }

    def _row(self, data: Dataset, target: Target, alpha: float, rho: float, found: Estimate) -> Row:
        protocol = self.protocol
        drawn: Row = {"noise": protocol.noise, "seed": protocol.seed}
        if found.estimator in WORST_CASE:
            drawn = {"seed": protocol.seed if protocol.restarts > 1 else None, "restarts": protocol.restarts}
        (classes,) = (feed.among for feed in self.evaluator.feeds if feed.name == data.name)
        row: Row = {
            "study": self.name,
            "model": self.model,
            "dataset": data.name,
            "ood": data.ood,
            "layer": target.layer,
            "excluded": ", ".join(target.excluded) or None,
            "alpha": alpha,
            "rho": rho,
            "keep": 1.0,
            "on": protocol.where,
            "adaptive": protocol.adaptive,
            "estimator": found.estimator,
            "asked": protocol.estimator,
            **drawn,
            "noise_batch": self._images_per_noise,
            "noise_alike": ", ".join(found.alike) or None,
            "samples": len(data.labels),
            "skipped": data.skipped,
            "normalized": self.evaluator.normalize_logits,
            "precision": self.evaluator.precision,
            "sharpness": found.sharpness.value,
            "sharpness_se": found.sharpness.se,
            "sharpness_df": found.sharpness.df,
            "sharpness_se_images": found.images_se,
            "loss": found.loss + found.sharpness.value,
            "loss_se": found.sharpness.se,
            "accuracy": found.accuracy.value,
            "accuracy_se": found.accuracy.se,
            "draws": found.draws,
            "nonfinite": found.nonfinite,
            "reached": found.reached,
            "seconds": found.seconds,
        }
        return {**row, "saturated": saturated(row, classes)}


def images_per_noise(protocol: Protocol, evaluator: Evaluator) -> int | None:
    """Images that share a draw: ``noise_batch``, but all of them (None) where a text tower makes the head."""
    return None if evaluator.stages.text else protocol.noise_batch


def _numbers(name: str, values: Iterable[float]) -> list[float]:
    """Sort finite, distinct numbers; refuse others."""
    numbers = ascending(name, values)
    if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}: expected finite numbers, each once and at least one; got {numbers}")
    return numbers


def near_zero(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Find the flat layers, those of near-zero sharpness (the criterion of Alg. 1), by an equivalence test.

    A layer is near zero if, at every alpha > 0, the two-sided 95 % interval of its sharpness lies within
    ``margin`` of zero: ``|S| + t * se < margin``, with Student's t for ``sharpness_df`` degrees of freedom. A
    wide interval is no evidence, so a layer without a finite standard error is never near zero.

    Args:
        rows: rows of :func:`layerwise_sharpness`; rows of other studies are ignored.
        margin: largest sharpness that counts as zero, in nats, above 0.

    Returns:
        One row per (model, data set, on, rho, asked, noise, adaptive, noise_batch, normalized,
        layer), in the order of measurement: ``near_zero`` and ``margin``, and, from the alpha whose interval
        reaches furthest from zero, ``alpha``, ``sharpness``, ``sharpness_se``, ``bound`` (the far end, in
        nats) and ``draws``.

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
    rows = rows.assign(asked=asked(rows))
    keys = "model dataset on rho asked noise adaptive noise_batch normalized layer".split()
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


def student_t(rows: pd.DataFrame, of: str = "sharpness", tests: int = 1) -> pd.Series:
    """Student's t of the two-sided 95 % interval of each row's sharpness; NaN for a single draw.

    Args:
        rows: rows of a sharpness.
        of: column of the values, ``"sharpness"`` or ``"sharpness_change"``.
        tests: number of intervals that hold together, by Bonferroni's correction.

    Rows of versions without ``sharpness_df`` have one degree of freedom less than draws, or pairs of them.
    """
    pairs = rows["estimator"].str.startswith("antithetic").to_numpy(dtype=bool, na_value=False)
    freedom = (rows["draws"] // np.where(pairs, 2, 1) - 1).astype("float64")
    freedom = rows[f"{of}_df"].fillna(freedom.where(freedom > 0))
    return pd.Series(stdtrit(freedom, 1 - 0.025 / tests), index=rows.index)
