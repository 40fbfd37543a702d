"""The findings of a run: at most eight sentences, the same on the terminal, in the log and on the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..common.words import visible
from ..studies.facts import Facts
from .shown import Attempts, Finding, Rank, Shown

MOST = 8
"""Most sentences; the tables hold everything else."""


def findings(facts: Facts, studies: Iterable[Shown], attempts: Attempts | None = None) -> list[Finding]:
    """Collect the findings of studies, the most important first.

    Studies that fail, and data sets whose zero-shot accuracy is near chance, come first. Data sets that allow
    no conclusion, such as a single image, support no other finding.

    Args:
        facts: facts of a run, with rows of the interpolation.
        studies: the studies; those without rows are skipped.
        attempts: records the studies that fail.

    Returns:
        At most :data:`MOST` findings, each one sentence.
    """
    attempts = Attempts() if attempts is None else attempts
    found: list[Finding] = []
    sound = facts
    with attempts.at("interpolation"):
        found += _of_chances(facts)
        sound = facts.sound
    if not sound.part("interpolation").empty:
        for study in studies:
            if study.done(sound):
                with attempts.at(study.name):
                    found += list(study.findings(sound))
    if attempts.failed:
        errors = "; ".join(f"{study}: {visible(error)}" for study, error in attempts.failed.items())
        found.append(
            Finding(
                f"Parts of the results are missing, because an analysis failed ({errors}).", "", Rank.FAILED
            )
        )
    return sorted(found, key=lambda one: one.rank)[:MOST]


def _of_chances(facts: Facts) -> Iterator[Finding]:
    """Yield which data sets allow no conclusion, and where the zero-shot end is not above chance."""
    ends = facts.chances
    nothing = [
        f"{end.dataset} ({'one image' if end.samples == 1 else 'one class'})"
        for end in ends
        if end.verdict == "unknown"
    ]
    if nothing:
        text = f"Accuracies on {', '.join(dict.fromkeys(nothing))} allow no conclusion."
        yield Finding(text, "interpolation", Rank.CHANCE)
    low = [end for end in ends if end.verdict in ("near", "below")]
    if not low:
        return
    shown = []
    for end in low[:3]:
        of = f" of {end.models[0]}" if len(end.models) == 1 else ""
        shown.append(
            f"{100 * end.accuracy:.1f} % on {end.dataset}{of} [95 % interval {100 * end.low:.1f}, "
            f"{100 * end.high:.1f}; {end.samples:,} images] where chance is {100 * end.chance:.3g} %"
        )
    more = f" and {len(low) - 3} more" if len(low) > 3 else ""
    text = f"Zero-shot accuracy is not shown to be above chance, {', '.join(shown)}{more}: check the order "
    yield Finding(f"{text}of the labels and the architecture.", "interpolation", Rank.CHANCE)
