"""``config.json``: settings as a tree, also of runs of versions that had them side by side in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.fields import Tree
from ..names import NOISE_BATCH
from .settings import builder

EARLIER = "of an earlier version"
"""In the value of a setting: it means what no option of this version does."""

# What every flat configuration has.
_FLAT = {"alphas", "control", "general", "graphs", "layerwise", "mask_seeds", "measured", "rhos"}


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as this version writes it; settings that are not recorded have their defaults.

    Args:
        config: of a sweep of any version; others are returned as they are.
    """
    if "settings" not in config:
        if not config.keys() >= _FLAT:
            return dict(config)
        config = _nested(config)
    config = _renamed(config)
    options = builder()
    return {**config, "settings": options.as_json(options.of_json(config))["settings"]}


def tree_of(config: Mapping[str, Any]) -> Tree:
    """The settings that an :func:`upgraded` configuration records."""
    return builder().of_json(config)


def shown_as(names: Sequence[str], between: str = " › ") -> str:
    """What people know an entry by: its option, or else all its names."""
    entry = builder().recorded(names)
    return between.join(names) if entry is None else f"--{entry.name}"


def value_as(names: Sequence[str], value: Any) -> Any:
    """What the value of an entry is shown as."""
    entry = builder().recorded(names)
    return entry.option.none if value in (None, []) and entry is not None and entry.option.none else value


def named_differences(names: Sequence[str], there: Any, now: Any, sides: tuple[str, str]) -> str:
    """What differs between two values of an entry whose values have names; empty for any other entry.

    Args:
        names: the entry's.
        there: pairs of a name and a content.
        now: likewise.
        sides: what the two are called.
    """
    entry = builder().recorded(names)
    if entry is None or not entry.option.named or not (isinstance(there, list) and isinstance(now, list)):
        return ""
    a, b = dict(there), dict(now)
    parts = [f"{name} has another content" for name in a if name in b and a[name] != b[name]]
    parts += [f"{name} only {sides[0]}" for name in a if name not in b]
    parts += [f"{name} only {sides[1]}" for name in b if name not in a]
    return ", ".join(parts) or "another order"


def is_compared(names: Sequence[str]) -> bool:
    """Whether an entry decides if two runs are the same (:attr:`rft_fast.common.fields.Option.compared`)."""
    entry = builder().recorded(names)
    return entry is None or entry.option.compared


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the estimator's present name, of versions that had ``coupling`` beside it, or no such setting.

    Their ``auto`` was another choice: as it has no present name, such a run is only resumed by its version.
    """
    own = dict(config["settings"].get("sharpness", {}))
    if "exclude" in own:  # which came with the names
        return dict(config)
    shared = own.pop("coupling", "shared") == "shared"
    estimator = own.get("estimator", "auto")
    if estimator == "auto":
        own["estimator"] = f"auto {EARLIER} ({'shared noise' if shared else 'noise per image'})"
    elif not shared:
        own["estimator"] = "per-image" if estimator == "plain" else f"per-image-{estimator}"
    own.setdefault("noise_batch", None if shared else NOISE_BATCH)
    return {**config, "settings": {**config["settings"], "sharpness": own}}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat configuration as a tree."""
    left = dict(flat)
    general, layerwise = left.pop("general"), left.pop("layerwise")
    both = general["estimator"] == layerwise["estimator"]
    usual = (general["on"], layerwise["on"]) == ("interpolated", "finetuned")
    left |= {
        "estimator": general["estimator"] if both else "auto",
        "on": None if usual else general["on"],
        "noise": general["noise"],
        "no_adaptive": general["adaptive"],
        "noise_batch": general["noise_batch"],
        "goal_se": general["goal"],
        "max_draws": general["most"],
        "no_control": left.pop("control"),
        "no_graphs": left.pop("graphs"),
        "mask_seeds": len(left["mask_seeds"]),
    }
    for which in ("layer", "sharpness"):
        images = left.get(f"{which} images", {})
        left |= {f"{which}_data": [*images], f"{which}_samples": max(images.values(), default=1)}
    left.pop("options of the zoo", None)
    settings: dict[str, Any] = {}
    for name, entry in builder().entries.items():
        if entry.group.place[:1] == ("settings",) and (key := name.replace("-", "_")) in left:
            settings.setdefault(entry.group.place[1], {})[entry.field] = left.pop(key)
    return {**left, "settings": settings}
