"""What the rows of a run say: each analysis is made once, when it is first needed.

Summary, figures and report draw from these, so that all show the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import pandas as pd

from ..names import STRAGGLER_MARGIN, XI, ZERO_MARGIN, Criterion, Others, never
from .chance import Chance, zeroshot_chances
from .correlation import correlate
from .interpolate import STUDY as INTERPOLATION
from .interpolate import best_gains, summarize
from .layers import STUDY as LAYERS
from .layers import stragglers
from .pruning import NAMED, pruning_effect
from .pruning import STUDY as PRUNING
from .sharpness import near_zero

ENDS = {"zeroshot": "zero-shot", "finetuned": "fine-tuned"}  # in words


@dataclass(frozen=True)
class Settings:
    """What rows do not say of themselves, and their reader must know. Fields are named as a request's are."""

    everything: bool = False  # were all studies requested?
    measured: Sequence[str] = ()
    xi: float = XI
    others: Others = "zeroshot"
    straggler_margin: float = STRAGGLER_MARGIN
    zero_margin: float = ZERO_MARGIN
    keep: float = 0.5
    criteria: Sequence[Criterion] = ("sharpness",)
    prune_layers: Sequence[str] | None = None
    mask_seeds: Sequence[int] = ()

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> Settings:
        """Picks the settings out of a request's fields, or of a run's ``config.json``.

        Args:
            source: with an entry for each field; others are left aside.

        Raises:
            KeyError: a field has no entry.
        """
        return cls(**{field.name: source[field.name] for field in fields(cls)})


class Facts:
    """The analyses of a run's rows, each made once.

    What an analysis raises is raised again at each use.

    Args:
        rows: of any studies; they are not changed.
        settings: margins, and what the run was to measure.
        classes: data set -> how many classes it is scored among, as far as it is known.
    """

    def __init__(
        self, rows: pd.DataFrame, settings: Settings | None = None, classes: Mapping[str, int] | None = None
    ) -> None:
        self.rows = rows
        self.settings = settings or Settings()
        self.classes = classes or {}
        self._renamed: Facts | None = None

    def part(self, study: str) -> pd.DataFrame:
        """The rows of one study, which may be none."""
        return self.rows[self.rows["study"] == study]

    def renamed(self, rows: pd.DataFrame) -> Facts:
        """Facts of these rows with other names in them, always the same ones; they are made once."""
        if self._renamed is None:
            self._renamed = Facts(rows, self.settings, self.classes)
        return self._renamed

    @cached_property
    def names(self) -> frozenset[str]:
        """Of models, data sets and layers."""
        single = self.rows["layer"].where(self.rows["study"] != PRUNING)  # whose layers are joined
        columns = (self.rows["model"], self.rows["dataset"], single)
        return frozenset(str(name) for column in columns for name in column.dropna().unique())

    @cached_property
    def path(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.summarize`."""
        return summarize(self.rows, self.settings.xi)

    @cached_property
    def ood_rows(self) -> pd.DataFrame:
        """Rows of the interpolation on out-of-distribution data, which may be none."""
        return self.rows[(self.rows["study"] == INTERPOLATION) & self.rows["ood"].fillna(False)]

    @cached_property
    def ood_path(self) -> pd.DataFrame:
        """:attr:`path` on out-of-distribution data; empty without such rows."""
        if self.ood_rows.empty:
            return pd.DataFrame(columns=["model", "dataset", "gain", "best_alpha"])
        return self.path[self.path["ood"]]

    @cached_property
    def ood_gains(self) -> pd.Series:
        """Model -> :func:`rft_fast.studies.best_gains` on out-of-distribution data; empty without any."""
        # The path's summary refuses an incomplete path.
        return pd.Series(dtype=float) if self.ood_path.empty else best_gains(self.ood_rows)

    @cached_property
    def deciding(self) -> pd.DataFrame:
        """:attr:`path` on the first out-of-distribution data set, or else on the first."""
        far = self.path[self.path["ood"]]
        return self.path[self.path["dataset"] == (far if len(far) else self.path)["dataset"].iloc[0]]

    @cached_property
    def stragglers(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.stragglers`."""
        return stragglers(self.rows, self.settings.straggler_margin)

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
        return near_zero(self.rows, self.settings.zero_margin)

    @cached_property
    def pruning(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.pruning_effect`."""
        return pruning_effect(self.rows)

    @cached_property
    def correlation(self) -> pd.DataFrame:
        """:func:`rft_fast.studies.correlation`."""
        return correlate(self.rows, lambda: self.path, lambda: self.stragglers)

    @cached_property
    def chances(self) -> list[Chance]:
        """:func:`rft_fast.studies.zeroshot_chances`."""
        return zeroshot_chances(self.rows, self.classes)

    def to_prune(self, model: str) -> dict[str, list[str]]:
        """Criterion -> the layers of a model that pruning takes."""
        if self.settings.prune_layers is not None:
            return {NAMED: list(self.settings.prune_layers)}
        found: dict[str, list[str]] = {}
        for criterion in self.settings.criteria:
            if criterion == "instability":
                own = self.stragglers[self.stragglers["model"] == model]
                found[criterion] = list(own.loc[own["straggler"], "layer"].unique())
            elif criterion == "sharpness":
                # At every rho and on every data set of the sharpness.
                own = self.near_zero[self.near_zero["model"] == model]
                everywhere = own.groupby("layer", sort=False)["near_zero"].all()
                found[criterion] = list(everywhere.index[everywhere])
            else:
                never(criterion)
        return found


def as_facts(rows: pd.DataFrame | Facts, **settings: float | None) -> Facts:
    """Facts of rows, or facts as they are, with some settings changed; None changes nothing."""
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(rows, Facts) and not given:
        return rows
    facts = rows if isinstance(rows, Facts) else Facts(rows)
    return Facts(facts.rows, replace(facts.settings, **given), facts.classes)  # type: ignore[arg-type]
