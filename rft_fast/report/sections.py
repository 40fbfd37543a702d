"""The sections of a report: text, charts and tables, independent of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pandas as pd

from ..common.words import many, some
from ..names import REFERENCES
from ..settings import Along, Layers, Prune, Sharpness
from ..studies.facts import ENDS, Facts
from ..studies.verdicts import association, mode, straggling
from . import charts, layer_charts, tables
from .phrases import PAPER_CORRELATION, SATURATED, images, limits, pruned_layers, span
from .shown import Attempts, Section, Shown
from .summary import sections as printed
from .tables import Table


def studied(facts: Facts, studies: Iterable[Shown], captions: Mapping[str, str]) -> list[Section]:
    """Create a section for each study with results.

    Args:
        facts: facts of the run.
        studies: the studies, in order.
        captions: study -> caption of its figure.

    Returns:
        The sections, with captions and summaries as the sweep prints them. One that fails says so instead.
    """
    attempts = Attempts()
    made = []
    for study in studies:
        if not study.done(facts):
            continue
        section = Section(study.name, "", study.name, "This section failed.")
        with attempts.at(study.name):
            section = study.section(facts)
        if study.name in attempts.failed:
            section = replace(section, warnings=[attempts.failed[study.name]])
        text = printed(facts, [study]).strip("\n")
        made.append(replace(section, printed=text, caption=captions.get(study.name, ""), study=study.name))
    return made


def path(facts: Facts) -> Section:
    """Create the section on the path (Figure 1)."""
    warnings = []
    far = facts.path[facts.path["mode"].notna()]  # in distribution a path has no mode
    for dataset, group in far.groupby("dataset", sort=False):
        undecided = [fact["model"] for fact in group.to_dict("records") if mode(fact) == "undecided"]
        if undecided:
            warnings.append(
                f"On {dataset} (n = {group['samples'].iloc[0]:,}) it is undecided whether the path of "
                f"{some(undecided, 4)} beats zero-shot: the bounds include both no gain and a "
                f"gain of {100 * facts.of(Along).xi:g} points."
            )
    return Section(
        "path",
        "Figure 1 · Eq. 1 and 2",
        "The path",
        "Accuracy and loss on the straight line from zero-shot to fine-tuned. Choose one model to see its "
        "band, of the difference to zero-shot, paired over images: for accuracy bounds that hold at all "
        "positions at once, each side with 95 % probability; for the loss pointwise 95 % intervals. The gain "
        "is the best position against zero-shot on the same images, which makes it optimistic; held out, the "
        "position is chosen on four fifths of the images and measured on the others. The "
        "barrier is the highest loss above that of zero-shot; the bump, the highest above the straight line "
        "between the losses of the two ends: a loss that only slopes upward has a barrier and no bump.",
        charts.path(facts),
        [tables.path(facts)],
        warnings,
    )


def layers(facts: Facts) -> Section:
    """Create the section on the layer-wise interpolation (Figure 2)."""
    known = facts.stragglers
    unclear = known[[straggling(fact) == "unclear" for fact in known.to_dict("records")]]
    warnings = []
    for (model, dataset), group in unclear.groupby(["model", "dataset"], sort=False):
        warnings.append(
            f"{model} on {dataset}: it is unclear whether the instability of {many(len(group), 'layer')} "
            f"exceeds {facts.of(Layers).straggler_margin:g} nats: {some(list(group['layer']), 4)}."
        )
    part = facts.part("layers")
    return Section(
        "layers",
        "Figure 2 · Def. 1.1 and 1.2",
        "Layer by layer",
        f"Each layer on the path alone, the others {ENDS[facts.of(Layers).others]}; {_images(part)}. A "
        "straggler's instability lies above the margin with 95 % confidence, corrected for all layers and "
        "positions (Bonferroni), and its loss above that at α = 0. Instability is measured from "
        f"{REFERENCES[facts.of(Layers).reference]}. By a bump: the loss also rises above the straight line "
        "between the layer's own ends, with the same correction. By a slope: this is not shown. Bars are "
        "pointwise 95 % intervals, not corrected.",
        layer_charts.interpolation(facts),
        [tables.layers(facts)],
        warnings,
    )


def _images(part: pd.DataFrame) -> str:
    return images(part, "n = ", "; ")


def _unclear(table: Table, reason: str = "their sign is unclear") -> list[str]:
    """Describe how many intervals of a table are too wide to conclude."""
    wide = len(table.wide())
    of = f"of {len(table.rows):,} intervals"
    include = many(f"{wide:,}", f"{of} includes 0 or is missing", f"{of} include 0 or are missing")
    return [f"{include}: {reason}."] if wide else []


def _saturated(facts: Facts, part: pd.DataFrame) -> list[str]:
    """Describe how many perturbed models answer at chance."""
    count = int(facts.saturated(part).sum())
    of = f"of {len(part):,} values"
    are = many(f"{count:,}", f"{of} is", f"{of} are")
    return [f"{are} saturated: {SATURATED}; use a smaller rho."] if count else []


def _drawn(part: pd.DataFrame) -> str:
    count = span(part.loc[part["draws"].fillna(1) > 0, "draws"])
    return f"{many(count, 'draw')}, {_images(part)}"


def sharpness(facts: Facts) -> Section:
    """Create the section on general sharpness (Figure 3)."""
    part = facts.part("sharpness")
    table = tables.sharpness(facts, "sharpness")
    return Section(
        "sharpness",
        "Figure 3 · Eq. 3",
        "Sharpness of all weights",
        f"The mean rise of the loss under noise on every weight; {_drawn(part)}. Bars are pointwise 95 % "
        "intervals: of sharpness over draws (Student's t), of accuracy over images.",
        charts.sharpness(facts),
        [table],
        _unclear(table) + _saturated(facts, part),
    )


def layer_sharpness(facts: Facts) -> Section:
    """Create the section on layer-wise sharpness (Figure 4)."""
    part = facts.part("layer-sharpness")
    table = tables.sharpness(facts, "layer-sharpness")
    return Section(
        "layer-sharpness",
        "Figure 4 · Sec. 3.1",
        "Sharpness of each layer",
        f"The same for one layer at a time; {_drawn(part)}. A layer is flat when its 95 % interval lies "
        f"within {facts.of(Sharpness).zero_margin:g} nats at every α above 0. A wide interval is no evidence "
        "of that.",
        layer_charts.sharpness(facts),
        [table],
        _unclear(table) + _saturated(facts, part),
    )


def prune(facts: Facts) -> Section:
    """Create the section on pruning (Figure 5)."""
    part, own = facts.part("prune"), facts.of(Prune)
    table = tables.prune(facts)
    warnings = [
        f"{row[0].text} on {row[-1].text}, {row[1].text} ({row[2].text}): mean change {row[3].text} points "
        f"over {many(row[5].text, 'mask')}; {row[4].text}."
        for row in table.wide()
    ]
    return Section(
        "prune",
        "Figure 5 · Algorithm 1",
        "Pruning flat layers and stragglers",
        f"{100 * own.keep:g} % of the weights of {pruned_layers(own)} kept, "
        f"{many(own.mask_seeds, 'mask')}; {_images(part)}. Bands reach from the lowest to the highest "
        "mask; that of the unpruned path is the pointwise 95 % interval of its difference to zero-shot. The "
        "control prunes as many other layers, at random.",
        charts.prune(facts),
        [table],
        warnings,
    )


def correlation(facts: Facts) -> Section:
    """Create the section on the correlation of sharpness with accuracy and gain."""
    known = facts.correlation
    picture, names = charts.correlation(known)
    table = tables.correlation(known, names)
    models = int(known["models"].max())
    judged = [association(fact) for fact in known.to_dict("records")]
    tested = [verdict for verdict in judged if verdict in ("above", "below", "unclear")]
    of = f"of {len(tested):,} tests"
    are = many(f"{tested.count('unclear'):,}", f"{of} is", f"{of} are")
    warnings = [f"{are} not significant after correction."]
    if count := judged.count("saturated"):
        are = many(f"{count:,}", "correlation is", "correlations are")
        warnings.append(f"{are} not tested, because the sharpness is saturated: {SATURATED}.")
    if known["circular"].any():
        warnings.append("Circular: measure and outcome are of the same images.")
    return Section(
        "correlation",
        "The central claim",
        "Does sharpness predict accuracy?",
        f"Rank correlation over n = {models} models of sharpness, and of measures that cost less, with "
        "accuracy or gain out of distribution. p by permutation of the models, corrected for all rows of the "
        f"same outcome (max-T). {PAPER_CORRELATION} {limits(known)} Intervals are pointwise 95 %, for "
        "orientation. Stragglers found on the same models make their own line optimistic.",
        picture,
        [table],
        warnings,
    )
