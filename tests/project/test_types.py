"""Names that people choose by: signatures, command line and checks at run time know the same ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pandas as pd
import pytest
from support.wording import refused

import rft_fast as rft
from rft_fast import catalogue, checkpoints, datasets, names
from rft_fast.clip.endpoints import Setup
from rft_fast.config import options
from rft_fast.config.zoo import DataSource, Head, Weights
from rft_fast.evaluate import Evaluator
from rft_fast.finetune.__main__ import parser as finetune_parser
from rft_fast.finetune.settings import Setting
from rft_fast.finetune.work import Request as Training
from rft_fast.kernels import contract

# What the studies' modules import for type checkers only.
UNSEEN = {"Evaluator": Any, "Path": Any, "Scores": Any, "Sink": Any}

KERNELS = [rft.write_, rft.perturb_, rft.interpolate_, rft.noise_like, rft.keep_mask_like, rft.Plan]
WRITES = [rft.write_, rft.perturb_, rft.noise_like, rft.Plan.write, rft.Path.write, contract.Write]


def hint(function: Callable[..., Any], argument: str) -> Any:
    """The type of an argument; the functions that a decorator wraps are read inside."""
    of = function.__init__ if inspect.isclass(function) else inspect.unwrap(function)  # type: ignore[misc]
    return get_type_hints(of, localns=UNSEEN)[argument]


def closed(hint: Any) -> tuple[str, ...]:
    """The names of a Literal, of a list of them, or of either or None; () where any string may stand."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(dict.fromkeys(name for part in get_args(hint) for name in closed(part)))


def offered(option: str, parser: Any = options.parser) -> tuple[str, ...]:
    """What the command line takes."""
    choices: tuple[str, ...] = tuple(parser()._option_string_actions[option].choices)
    return choices


@pytest.mark.parametrize(
    ("functions", "argument", "expected"),
    [
        (KERNELS, "impl", offered("--impl")),
        ([rft.Path], "impl", offered("--impl")),
        (WRITES, "noise", offered("--noise")),
        ([rft.studies.Protocol], "noise", offered("--noise")),
        ([rft.write_, rft.Plan.write, rft.Path.write, contract.Write], "on", offered("--on")),
        ([rft.studies.Protocol], "on", offered("--on")),
        ([rft.write_, rft.Plan.write, rft.Path.write, contract.Write], "fill", ("zero", "zeroshot")),
        ([rft.studies.Protocol], "estimator", offered("--estimator")),
        ([rft.studies.prune_stragglers], "criterion", offered("--criteria")),
        ([rft.studies.prune_stragglers], "methods", offered("--methods")),
        ([rft.studies.layerwise_interpolation], "others", offered("--others")),
        ([Evaluator], "precision", offered("--precision")),
        ([Setup], "head", offered("--head")),
        ([Setup, Head], "towers", offered("--towers")),
        ([checkpoints.load, checkpoints.read, Weights], "format", offered("--format")),
        ([datasets.load, datasets.find, DataSource, Training], "kind", offered("--kind", finetune_parser)),
        ([Training], "precision", offered("--precision", finetune_parser)),
        ([Training], "store", offered("--dtype", finetune_parser)),
        ([Setting], "schedule", offered("--schedule", finetune_parser)),
    ],
)
def test_signatures_and_the_command_line_know_the_same_names(
    functions: list[Callable[..., Any]], argument: str, expected: tuple[str, ...]
) -> None:
    for function in functions:
        assert set(closed(hint(function, argument))) == set(expected) != set(), function


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (rft.studies.layerwise_interpolation, "layers"),
        (rft.studies.layerwise_sharpness, "layers"),
        (rft.studies.prune_stragglers, "layers"),
        (rft.studies.prune_stragglers, "methods"),
        (rft.studies.correlation, "stragglers"),
        (rft.Path.write, "layers"),
        (rft.Path.at, "layers"),
        (rft.Path.select, "layers"),
        (rft.Path, "inert"),
        (rft.Plan, "names"),
    ],
)
def test_a_lone_string_is_no_list_of_names(function: Callable[..., Any], argument: str) -> None:
    """Of what a type checker may take for it, nothing is a type that strings have."""
    for part in get_args(hint(function, argument)):
        assert not issubclass(str, get_origin(part) or part), part


def test_every_tuple_of_names_is_that_of_its_literal() -> None:
    pairs = {
        "SAMPLING": names.Sampling, "WORST_CASE": names.WorstCase,
        "ESTIMATORS": names.Estimator, "OTHERS": names.Others, "FORMATS": names.Format,
        "CRITERIA": names.Criterion,
    }  # fmt: skip
    for name, literal in pairs.items():
        assert tuple(getattr(names, name)) == get_args(literal)


def test_no_name_falls_through() -> None:
    with refused(ValueError):
        names.never("nonsense")  # type: ignore[arg-type]
    nothing: Any = None
    for study in ("correlation", "nonsense"):
        with refused(ValueError, study):
            catalogue.study(study).measure(nothing)


def test_the_face_is_public_and_typed() -> None:
    assert dir(rft) == sorted(rft.__all__)
    assert get_type_hints(rft.results.load)["return"] is pd.DataFrame
    for name in rft.__all__:
        assert getattr(rft, name) is not None
