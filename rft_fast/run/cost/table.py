"""The cost of studies as a table of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...common.tables import aligned
from ...common.words import duration, paragraph, visible
from ...path import Path
from .footprint import Memory
from .operations import Flops
from .rates import Rates, forecast
from .work import Work


@dataclass(frozen=True)
class Line:
    """One study in the table.

    Attributes:
        study: Name of the study.
        models: Number of models.
        work: The work on all models.
        rates: The rates that hold for it.
        more: Further seconds, such as for loading.
    """

    study: str
    models: int
    work: Work
    rates: Rates
    more: float = 0.0

    @property
    def seconds(self) -> float:
        return forecast(self.work, self.rates) + self.more


@dataclass(frozen=True)
class Encoding:
    """The encoding of prompts before the first measurement.

    Attributes:
        heads: Number of heads that are made from prompts.
        prompts: Number of prompts, for all heads.
        flops: FLOPs, for all prompts.
        seconds: Estimated time, for all prompts.
    """

    heads: int
    prompts: int
    flops: float
    seconds: float


def table(
    lines: Sequence[Line],
    costs: Flops,
    peak: Memory,
    path: Path,
    notes: Sequence[str] = (),
    encoding: Encoding | None = None,
) -> str:
    """Format the cost of studies: a line for each, the total, peak memory, and the assumptions.

    Args:
        lines: One for each study, at least one.
        costs: FLOPs of the model's stages.
        peak: Peak memory of all studies.
        path: A path of the model.
        notes: Assumptions, one line each.
        encoding: The encoding of prompts; None: no head is made from prompts.
    """
    header = ["study", "models", "settings", "forwards", "TFLOP", "GB written", "time"]
    live = [slot.tensor for slot in path.slots]
    per_weight = sum(t.nbytes for t in live) / sum(t.numel() for t in live)

    def cells(study: str, models: str, work: Work, seconds: float, more: float = 0.0) -> list[str]:
        written = (work.written + work.noisy) * per_weight
        return [
            study,
            models,
            f"{work.scorings:,.0f}",
            f"{costs.forwards(work):,.0f}",
            f"{(costs.of(work) + more) / 1e12:,.4g}",
            f"{written / 1e9:,.4g}",
            duration(seconds),
        ]

    rows, total, seconds, flops = [header], lines[0].work * 0, 0.0, 0.0
    if encoding is not None:
        flops, seconds = encoding.flops, encoding.seconds
        count, tera = f"{encoding.prompts:,}", f"{flops / 1e12:,.4g}"
        rows.append(["prompts", str(encoding.heads), "", count, tera, "", duration(seconds)])
    for line in lines:
        rows.append(cells(line.study, str(line.models), line.work, line.seconds))
        total += line.work
        seconds += line.seconds
    rows.append(cells("total", "", total, seconds, flops))
    text = aligned(rows, indent="")
    parts = [f"{getattr(peak, f.name) / 2**30:.3g} GiB {_HELD[f.name]}" for f in fields(peak)]
    memory = f"peak memory: {peak.total / 2**30:.3g} GiB ({', '.join(parts)})"
    text += ["", *paragraph(memory), "", *paragraph(LEGEND)]
    if encoding is not None:
        notes = [PROMPTS, *notes]
    return "\n".join([*text, *(line for note in notes for line in paragraph(visible(note), bullet="- "))])


LEGEND = (
    "Settings: weights that are scored. Forwards: images through the whole model; a part of the model counts "
    "by its FLOPs. FLOPs: two per multiply-add of products, convolutions and attention."
)

PROMPTS = (
    "Prompts: heads are made from them by the text tower before the first measurement. They are not in the "
    "total of forwards, and their time is that of as many FLOPs of the image tower."
)

_HELD = {
    "program": "program",
    "weights": "weights",
    "images": "images",
    "held": "held activations",
    "batches": "batches",
    "copies": "gradients and copies",
}
