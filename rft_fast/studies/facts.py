"""``Facts``: the analyses of a run's rows, each made once, on first use.

Summary, figures and report are made of them, so that all show the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import pandas as pd

from ..common.fields import Tree
from ..names import Criterion, never
from ..settings import Along, Layers, Prune, Sharpness
from .chance import Chance, zeroshot_chances
from .choice import choice, choice_means
from .claim import claim_tests, count_flat
from .coefficients import STUDY as COEFFICIENTS
from .correlation import correlate
from .cumulative import cumulative_effects
from .effects import coefficient_effects
from .ensemble import ensemble_difference
from .gains import gain_bounds
from .images import Images, Renamed
from .interpolate import STUDY as INTERPOLATION
from .interpolate import best_gains, summarize
from .layers import STUDY as LAYERS
from .layers import stragglers
from .pairs import STUDY as PAIRS
from .pairs import pair_effects
from .points import soup_points, stock_ratios
from .pruning import NAMED, pruning_effect
from .pruning import STUDY as PRUNING
from .rows import asked
from .saturation import flags
from .sharpness import near_zero

_Settings = TypeVar("_Settings")
ENDS = {"zeroshot": "zero-shot", "finetuned": "fine-tuned"}  # for display


class Facts:
    """The analyses of a run's rows, each made once.

    Attributes that are analyses raise the errors of these, at each use.

    Args:
        rows: rows of any studies, which are not modified.
        settings: settings of the run, such as margins; None: the defaults.
        classes: data set -> number of classes among which it is scored, as far as known.
        measured: names of the studies that the run measures.
        everything: whether no study was named, so that those of the paper were requested.
        images: gives the results of single images, of one model and data set at a time; None: there are none.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        settings: Tree | None = None,
        classes: Mapping[str, int] | None = None,
        measured: Sequence[str] = (),
        everything: bool = False,
        images: Images | None = None,
    ) -> None:
        self.rows = rows.assign(asked=asked(rows)) if "asked" in rows else rows
        self.images = images
        self.settings = settings or Tree()
        self.classes = classes or {}
        self.measured = tuple(measured)
        self.everything = everything
        self._renamed: Facts | None = None

    def of(self, kind: type[_Settings]) -> _Settings:
        """Return the settings of a class."""
        return self.settings.of(kind)

    def but(
        self,
        rows: pd.DataFrame | None = None,
        settings: Tree | None = None,
        measured: Sequence[str] | None = None,
    ) -> Facts:
        """Return facts of other rows, settings or measured studies; None changes nothing."""
        return Facts(
            self.rows if rows is None else rows,
            settings or self.settings,
            self.classes,
            self.measured if measured is None else measured,
            self.everything,
            self.images,
        )

    def part(self, study: str) -> pd.DataFrame:
        """Return the rows of one study, which may be none."""
        return self.rows[self.rows["study"] == study]

    def renamed(self, rows: pd.DataFrame) -> Facts:
        """Return facts of the same rows with other names; made once, as the names are always the same."""
        if self._renamed is None:
            self._renamed = self.but(rows)
            if self.images is not None:
                keys = ["model", "dataset"]
                pairs = self.rows[keys].drop_duplicates()
                new = rows.loc[pairs.index, keys]
                original = dict(zip(map(tuple, new.to_numpy()), map(tuple, pairs.to_numpy()), strict=True))
                self._renamed.images = Renamed(self.images, original)
        return self._renamed

    def saturated(self, rows: pd.DataFrame) -> pd.Series:
        """Return which rows of a sharpness are known to be of a perturbed model at chance."""
        return flags(rows, self.classes).fillna(False).astype(bool)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of models, data sets and layers."""
        joined = self.rows["study"].isin([PRUNING, COEFFICIENTS])  # which join names of layers
        single = self.rows["layer"].where(~joined)
        columns = (self.rows["model"], self.rows["dataset"], single, self.part(PAIRS)["partners"])
        return frozenset(str(name) for column in columns for name in column.dropna().unique())

    @cached_property
    def bounds(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.gain_bounds`."""
        return gain_bounds(self.rows, self.images)

    @cached_property
    def path(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.summarize`."""
        return summarize(self.rows, self.of(Along).xi, self.images, self.bounds)

    @cached_property
    def ood_rows(self) -> pd.DataFrame:
        """Rows of the interpolation on out-of-distribution data, which may be none."""
        return self.rows[(self.rows["study"] == INTERPOLATION) & self.rows["ood"].fillna(False)]

    @cached_property
    def ood_path(self) -> pd.DataFrame:
        """:attr:`path` on out-of-distribution data; empty without such rows."""
        if self.ood_rows.empty:
            return pd.DataFrame(columns=["model", "dataset", "gain", "best_alpha", "mode"])
        return self.path[self.path["ood"]]

    @cached_property
    def ood_gains(self) -> pd.Series:
        """Model -> :func:`rft_fast.studies.best_gains` on out-of-distribution data; empty without any."""
        # ood_path refuses an incomplete path.
        return pd.Series(dtype=float) if self.ood_path.empty else best_gains(self.ood_rows)

    @cached_property
    def deciding(self) -> pd.DataFrame:
        """:attr:`path` on the first out-of-distribution data set, or else on the first."""
        far = self.path[self.path["ood"]]
        return self.path[self.path["dataset"] == (far if len(far) else self.path)["dataset"].iloc[0]]

    @cached_property
    def stragglers(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.stragglers`."""
        return stragglers(self.rows, self.of(Layers).straggler_margin)

    @cached_property
    def cumulative(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.cumulative_effects`."""
        return cumulative_effects(self.rows)

    @cached_property
    def unstable(self) -> dict[str, set[str]]:
        """Model -> its stragglers on any data set; empty without rows of the layer-wise interpolation."""
        if self.part(LAYERS).empty:
            return {}
        models = self.stragglers.groupby("model")
        return {str(model): set(own.loc[own["straggler"], "layer"]) for model, own in models}

    @cached_property
    def near_zero(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.near_zero`."""
        return near_zero(self.rows, self.of(Sharpness).zero_margin)

    @cached_property
    def untested(self) -> bool:
        """Whether no layer-wise sharpness has a standard error, without which no layer can be flat."""
        return bool(self.near_zero["bound"].isna().all())

    @cached_property
    def pruning(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.pruning_effect`."""
        return pruning_effect(self.rows)

    @cached_property
    def coefficients(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.coefficient_effects`."""
        return coefficient_effects(self.rows, self.images)

    @cached_property
    def correlation(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.correlation`."""
        return correlate(self.rows, lambda: self.path, lambda: self.stragglers, classes=self.classes)

    @cached_property
    def claim(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.claim`."""
        return count_flat(self.rows, lambda: self.path, self.of(Sharpness).zero_margin, self.classes)

    @cached_property
    def claim_tests(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.claim_tests`."""
        return claim_tests(self.claim)

    @cached_property
    def choice(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.choice`."""
        return choice(self.rows, self.images)

    @cached_property
    def choice_means(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.choice_means`."""
        return choice_means(self.rows, self.images)

    @cached_property
    def ensemble(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.ensemble_difference`."""
        return ensemble_difference(self.rows, self.images)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.pair_effects`."""
        return pair_effects(self.rows, self.images)

    @cached_property
    def soups(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.soup_points`."""
        return soup_points(self.rows, self.images)

    @cached_property
    def stock(self) -> pd.Series:
        """:func:`rft_fast.studies.stock_ratios`."""
        return stock_ratios(self.rows)

    @cached_property
    def chances(self) -> list[Chance]:
        """:func:`rft_fast.studies.zeroshot_chances`."""
        return zeroshot_chances(self.rows, self.classes)

    @cached_property
    def sound(self) -> Facts:
        """Facts without the data sets that allow no conclusion: of one image, or scored among one class."""
        nothing = {end.dataset for end in self.chances if end.verdict == "unknown"}
        return self.but(self.rows[~self.rows["dataset"].isin(nothing)]) if nothing else self

    def to_prune(self, model: str) -> dict[str, list[str]]:
        """Return the layers of a model to prune, by criterion."""
        if (named := self.of(Prune).layers) is not None:
            return {NAMED: list(named)}
        return {criterion: self.picked(criterion, model) for criterion in self.of(Prune).criteria}

    def picked(self, criterion: Criterion, model: str) -> list[str]:
        """Return the layers of a model that a criterion picks."""
        if criterion == "instability":
            own = self.stragglers[self.stragglers["model"] == model]
            return list(own.loc[own["straggler"], "layer"].unique())
        if criterion == "sharpness":
            # Near zero at every rho and on every data set.
            own = self.near_zero[self.near_zero["model"] == model]
            everywhere = own.groupby("layer", sort=False)["near_zero"].all()
            return list(everywhere.index[everywhere])
        never(criterion)


def as_facts(
    rows: pd.DataFrame | Facts, straggler_margin: float | None = None, zero_margin: float | None = None
) -> Facts:
    """Facts of rows, or facts as they are, with other margins; None: as they are."""
    facts = rows if isinstance(rows, Facts) else Facts(rows)
    if straggler_margin is not None:
        facts = facts.but(
            settings=facts.settings.but(replace(facts.of(Layers), straggler_margin=straggler_margin))
        )
    if zero_margin is not None:
        facts = facts.but(settings=facts.settings.but(replace(facts.of(Sharpness), zero_margin=zero_margin)))
    return facts
