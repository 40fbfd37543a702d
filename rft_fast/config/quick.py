"""``--quick``: a first look in under a minute, by upper limits on images, positions and draws."""

from __future__ import annotations

from typing import Any

from ..settings import ALPHAS, Along, Layers, Prune, Sharpness
from . import paper
from .builder import COMMAND, QUICK, ZOO, Builder, Given
from .conflicts import said
from .zoo import Zoo

IMAGES, POSITIONS, DRAWS, MASKS = 200, ALPHAS[::2], 4, 2
# Option -> its limit in words; an option of the command line replaces it.
_AT_MOST = {
    "samples": f"{IMAGES} images of each data set",
    "alphas": f"{len(POSITIONS)} positions",
    "draws": f"{DRAWS} draws",
    "mask-seeds": f"{MASKS} masks",
}


def sources(options: Builder, zoo: Zoo, given: Given) -> tuple[dict[str, Given], list[str]]:
    """Return the sources of settings in order, the limits of ``--quick`` among them where it was given.

    Limits replace larger defaults and larger options of the zoo; smaller ones, and the command line, stay.

    Args:
        options: the sweep's options.
        zoo: models and data, with options of their own.
        given: options of the command line.

    Returns:
        As :func:`rft_fast.config.paper.sources`.

    Raises:
        ValueError: ``--paper`` beside it, or what :func:`rft_fast.config.paper.sources` raises.
    """
    if "quick" not in given:
        return paper.sources(options, zoo, given)
    if "paper" in {**zoo.options, **given}:
        who = "--paper" if "paper" in given else f"option paper of the zoo {zoo.name!r}"
        raise ValueError(
            f"argument --quick: not together with {who}, which asks for the paper's images, positions and "
            "draws; leave one of them out"
        )
    limits = _limits(options, zoo, given)
    notices = [
        f"argument --{name} ({_short(given[name])}) replaces the limit of --quick: {said(limits[name])}"
        for name in limits
        if name in given and given[name] != limits[name]
    ]
    at_most = ", ".join(text for name, text in _AT_MOST.items() if name not in given)
    limited = f"at most {at_most}" if at_most else "all of its main limits are replaced"
    notices.insert(0, f"--quick: {limited}; for a first look, with wide intervals")
    return {ZOO: zoo.options, QUICK: limits, COMMAND: given}, notices


def _short(value: Any) -> str:
    """Return a value as :func:`said` does, or for a long list the number of its values."""
    return f"{len(value)} values" if isinstance(value, tuple) and len(value) > 8 else said(value)


def _limits(options: Builder, zoo: Zoo, given: Given) -> dict[str, Any]:
    """Return the limits that reduce what would be measured: option -> value."""
    tree = options.tree({ZOO: zoo.options})
    along, layers, sharpness = tree.of(Along), tree.of(Layers), tree.of(Sharpness)
    numbers = {
        "samples": (along.samples, IMAGES),
        "layer-samples": (layers.samples, IMAGES),
        "sharpness-samples": (sharpness.samples, IMAGES),
        "draws": (sharpness.draws, DRAWS),
        "layer-draws": (sharpness.layer_draws, DRAWS),
        "mask-seeds": (tree.of(Prune).mask_seeds, MASKS),
    }
    limits: dict[str, Any] = {
        name: most for name, (value, most) in numbers.items() if value is None or value > most
    }
    if sharpness.goal_se is not None:
        limits["goal-se"] = None
    for name, alphas in (("alphas", along.alphas), ("layer-alphas", layers.alphas)):
        if len(alphas) > len(POSITIONS):
            limits[name] = POSITIONS
    if "alphas" in limits and "alphas" not in given:
        left = tuple(alpha for alpha in sharpness.alphas if alpha in POSITIONS)
        limits["sharpness-alphas"] = left if any(left) else POSITIONS
    for name in ("layer-alphas", "layer-draws"):  # which follow --alphas and --draws
        followed = options.entries[name].option.follows
        if followed is not None and followed in given and name in limits:
            limits[name] = given[followed]
    return limits
