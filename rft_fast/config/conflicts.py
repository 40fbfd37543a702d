"""Conflicts between settings: the command line overrides defaults and options of a zoo that contradict it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..common.fields import Tree
from ..names import WORST_CASE
from ..settings import Along, Prune, Sharpness, check_draws
from .builder import COMMAND, PAPER, QUICK, ZOO


def named(tree: Tree, option: str, zoo: str) -> str:
    """The name of an option for errors: of the zoo where it comes from there, else of the command line."""
    if (giver := tree.giver(option)) in (PAPER, QUICK):
        return f"the choice of --{giver} for --{option}"
    return f"option {option} of the zoo {zoo!r}" if giver == ZOO else f"argument --{option}"


def settle(tree: Tree, zoo: str, perturbed: Callable[[Tree], bool]) -> tuple[Tree, list[str]]:
    """Resolve conflicts between settings.

    Args:
        tree: the settings as given.
        zoo: name of the zoo.
        perturbed: whether any sharpness is measured with some settings.

    Returns:
        The settings without conflicts, and a sentence for each option that changed.

    Raises:
        ValueError: the command line, or the zoo, contradicts itself.
    """
    settling = _Settling(tree, zoo)
    if settling.may_give_way("prune-layers", "criteria") and tree.of(Prune).layers is not None:
        settling.give_way("prune-layers", None, "--criteria")
    if perturbed(settling.tree):
        settling.positions()
        settling.draws()
        return settling.tree, settling.notices
    notices = list(settling.notices)
    settling.draws()  # what contradicts itself is refused all the same
    return settling.tree, notices


class _Settling:
    """Changes settings until none contradicts the command line."""

    def __init__(self, tree: Tree, zoo: str) -> None:
        self.tree, self.zoo = tree, zoo
        self.notices: list[str] = []

    def may_give_way(self, option: str, *to: str) -> bool:
        """Whether the command line gave one of the others, and not the option."""
        return self.tree.giver(option) != COMMAND and any(self.tree.giver(name) == COMMAND for name in to)

    def give_way(self, option: str, value: Any, to: str) -> None:
        """Set an option to another value and add a notice. to: what it contradicted."""
        kind, field = _FIELDS[option]
        settings = self.tree.of(kind)
        was = getattr(settings, field)
        whose = (
            named(self.tree, option, self.zoo)
            if self.tree.giver(option) in (ZOO, PAPER, QUICK)
            else f"the default of --{option}"
        )
        self.notices.append(f"{whose} ({said(was)}) is overridden by {to}: {said(value)}")
        self.tree = self.tree.but(replace(settings, **{field: value}))

    @property
    def _sharpness(self) -> Sharpness:
        return self.tree.of(Sharpness)

    def positions(self) -> None:
        alphas, own = self.tree.of(Along).alphas, self._sharpness.alphas
        extra = sorted(set(own) - set(alphas))
        if extra and self.may_give_way("sharpness-alphas", "alphas"):
            left = tuple(alpha for alpha in own if alpha in alphas)
            self.give_way("sharpness-alphas", left if any(left) else alphas, "--alphas")
        elif extra or not any(own):
            where = named(self.tree, "sharpness-alphas", self.zoo)
            raise ValueError(
                f"{where}: {extra} are not in --alphas, the positions at which accuracy is measured"
                if extra
                else f"{where}: expected at least one above 0, because at 0 no fine-tuned weight matters"
            )

    def draws(self) -> None:
        own = self._sharpness
        goal, estimator, chosen = own.goal_se, own.estimator, f"--estimator {own.estimator}"
        if goal is not None and estimator in WORST_CASE and self.may_give_way("goal-se", "estimator"):
            self.give_way("goal-se", None, chosen)
            goal = None
        if own.restarts > 1 and estimator not in WORST_CASE and self.may_give_way("restarts", "estimator"):
            self.give_way("restarts", 1, chosen)
        for option in ("draws", "layer-draws"):
            draws: int = getattr(self._sharpness, _FIELDS[option][1])
            if goal is not None and draws < 4 and self.may_give_way(option, "goal-se"):
                self.give_way(option, 4, "--goal-se")
            elif estimator == "per-image-antithetic" and draws % 2 and self.may_give_way(option, "estimator"):
                self.give_way(option, draws + 1, chosen)
        own = self._sharpness
        least = 2 * max(own.draws, own.layer_draws)
        if goal is not None and own.max_draws < least:
            if not self.may_give_way("max-draws", "draws", "layer-draws"):
                raise ValueError(
                    f"{named(self.tree, 'max-draws', self.zoo)}: expected at least {least}, twice --draws "
                    f"and --layer-draws (the draws of the pilot), got {own.max_draws}"
                )
            self.give_way("max-draws", least, "the number of draws")
        for draws in (own.draws, own.layer_draws):
            try:
                check_draws(draws, estimator, goal, max(own.max_draws, least))
            except ValueError as error:
                if self.tree.giver("estimator") != ZOO:
                    raise
                raise ValueError(f"{error} ({named(self.tree, 'estimator', self.zoo)})") from None


# Option that may give way -> its field.
_FIELDS: dict[str, tuple[Any, str]] = {
    "sharpness-alphas": (Sharpness, "alphas"),
    "goal-se": (Sharpness, "goal_se"),
    "draws": (Sharpness, "draws"),
    "layer-draws": (Sharpness, "layer_draws"),
    "max-draws": (Sharpness, "max_draws"),
    "restarts": (Sharpness, "restarts"),
    "prune-layers": (Prune, "layers"),
}


def said(value: Any) -> str:
    """A value of an option in a sentence."""
    if isinstance(value, tuple):
        return ", ".join(map(said, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
