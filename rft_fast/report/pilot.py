"""What the pilot of ``--rhos auto`` chose, in words."""

from __future__ import annotations

from collections.abc import Iterator

from ..common.words import many, visible
from ..studies.facts import Facts
from ..studies.pilot import STUDY, TARGET, by_model, progress


def notices(facts: Facts) -> Iterator[str]:
    """Yield the chosen rho with the sharpness of each model there.

    Raises:
        studies.pilot.NoCrossing: there is no such rho.
    """
    part = facts.part(STUDY)
    if part.empty:
        return
    models = list(facts.part("interpolation")["model"].unique())
    found = progress(facts.rows, models)
    if not found.found:
        return
    first, here = part.iloc[0], by_model(facts.rows, models)[found.rho]
    sets = ", ".join(map(visible, part["dataset"].unique()))
    each = ", ".join(f"{visible(name)} {value:.3g}" for name, value in here.items())
    yield (
        f"--rhos auto: rho = {found.rho:g}, where the median sharpness of {len(models)} models at alpha = "
        f"{first['alpha']:g} on {sets} is {here.median():.3g} nats (aim: {TARGET:g}; "
        f"{many(first['draws'], 'draw')}): {each}"
    )
