"""What a command line of ``python -m rft_fast.sweep`` asks for: its options, read and found valid."""

from __future__ import annotations

import argparse
import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalogue, checkpoints, env
from ..common.numeric import check_alphas
from ..common.words import visible
from ..datasets import cache
from ..names import (
    KINDS,
    Criterion,
    Estimator,
    Impl,
    Method,
    On,
    Others,
    Precision,
    TrackerName,
    as_given,
)
from . import zoo
from .options import parser, refused_in_zoo

if TYPE_CHECKING:  # what can be refused without them is refused before they are imported
    import torch

    from ..studies.estimators import Protocol


@dataclass(frozen=True)
class Subset:
    """The images that a study is measured on: at most so many of each data set; None: of the default one."""

    names: list[str] | None
    samples: int


@dataclass(frozen=True)
class Request:
    """What the command line asks for, found valid. Nothing is loaded yet."""

    everything: bool  # no study was named: all of them
    studies: list[str]  # those asked for
    measured: list[str]  # these, and what they need, in order
    zoo: zoo.Zoo
    alphas: list[float]
    samples: int | None
    batch_size: int | None
    seed: int
    device: torch.device
    impl: Impl
    xi: float
    out: Path
    overwrite: bool
    granularity: str
    layers: list[str] | None
    models: list[str] | None
    layer_alphas: list[float]
    layer_images: Subset
    others: Others
    straggler_margin: float
    sharpness_alphas: list[float]
    sharpness_images: Subset
    rhos: list[float]
    draws: int
    layer_draws: int
    normalize_logits: bool
    general: Protocol
    layerwise: Protocol
    zero_margin: float
    keep: float
    criteria: list[Criterion]
    prune_layers: list[str] | None
    methods: list[Method]
    mask_seeds: list[int]
    control: bool
    precision: Precision
    memory_limit: int | None  # bytes
    graphs: bool
    compile: bool
    cache: Path | None  # None: none
    skip_unreadable: bool
    plan: bool
    fetch: bool | None  # what may be downloaded: anything, nothing; None: what the command line names
    workers: str | None  # a number, "auto", or where a Ray cluster is; None: this process alone
    quiet: bool
    json: bool
    track: list[TrackerName]


class NotFetched(Exception):
    """What a plan needs is not on this machine yet; says what would be downloaded."""


def unfetched(what: object) -> str:
    """What is printed instead of a plan, where something would have to be downloaded first."""
    return (
        f"would be downloaded: {what}\nNothing was. The same command with --fetch downloads it and says what "
        "the run costs."
    )


def read(argv: Sequence[str]) -> Request:
    """The request of a command line, checked as far as is possible without loading anything.

    The options of a zoo file stand before those of the command line, which override them. Repositories of
    Hugging Face are pinned to the commit that they are at.

    Raises:
        ValueError: what argparse cannot check.
        NotFetched: ``--plan``, and something would have to be downloaded first.
        SystemExit: with 2, as argparse does, for the rest.
    """
    options = parser()
    arguments = options.parse_args(argv)
    its_zoo = _zoo(arguments)
    if its_zoo.options:
        of_zoo = parser(zoo=False)
        of_zoo.prog = f"options of the zoo {its_zoo.name!r}"
        _check_names(of_zoo, its_zoo.options)
        options.set_defaults(**vars(of_zoo.parse_args(its_zoo.options)))
        arguments = options.parse_args(argv)
    return _request(arguments, its_zoo)


def _request(arguments: argparse.Namespace, its_zoo: zoo.Zoo) -> Request:
    alphas = _checked("--alphas", check_alphas, _flat(arguments.alphas))
    layer_alphas = alphas
    if arguments.layer_alphas is not None:
        layer_alphas = _checked("--layer-alphas", check_alphas, _flat(arguments.layer_alphas))
    sharpness_alphas = alphas
    if arguments.sharpness_alphas is not None:
        sharpness_alphas = sorted(set(_flat(arguments.sharpness_alphas)))
    named = [study for study in arguments.words if study in catalogue.names()]
    asked = list(dict.fromkeys(named)) or catalogue.names()
    if arguments.models is not None:
        for name in arguments.models:
            if name not in its_zoo.finetuned:
                names = list(its_zoo.finetuned)
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
                raise ValueError(
                    f"argument --models: there is no fine-tuned model {name!r}; the nearest are "
                    + ", ".join(near)
                )
        _distinct("--models", arguments.models)
    models, ood = arguments.models or its_zoo.finetuned, any(data.ood for data in its_zoo.data.values())
    for name in list(asked):
        if lacking := catalogue.study(name).lacks(len(models), ood):
            if named:
                raise ValueError(f"{name}: it needs {lacking}; leave it out, or name more")
            asked.remove(name)
    measured = catalogue.measured(asked, arguments)
    perturbed = any(catalogue.study(name).images == "images of sharpness" for name in measured)
    extra = sorted(set(sharpness_alphas) - set(alphas))
    if extra and perturbed:
        raise ValueError(
            f"argument --sharpness-alphas: {extra} are not among --alphas, where accuracies are measured"
        )
    if not any(sharpness_alphas) and perturbed:
        raise ValueError(
            "argument --sharpness-alphas: expected at least one above 0; no fine-tuned weight matters at 0"
        )
    if arguments.plan and arguments.json:
        raise ValueError("argument --json: not together with --plan, which is a table to read")
    if arguments.quiet and arguments.json:
        raise ValueError("argument --json: not together with --quiet")
    if arguments.cache is not None and arguments.no_cache:
        raise ValueError("argument --no-cache: not together with --cache")
    layer_draws = arguments.layer_draws or arguments.draws
    if arguments.goal_se is not None and arguments.max_draws < max(arguments.draws, layer_draws):
        raise ValueError(
            f"argument --max-draws: expected at least --draws and --layer-draws, got {arguments.max_draws} "
            f"and {arguments.draws}, {layer_draws}"
        )
    if len(set(arguments.rhos)) < len(arguments.rhos):
        raise ValueError(f"argument --rhos: expected each once, got {arguments.rhos}")
    if not arguments.keep:
        raise ValueError("argument --keep: expected a fraction above 0")
    if arguments.track:
        from ..run import trackers

        trackers.check(arguments.track)
    layer_images = _subset("--layer-data", arguments.layer_data, arguments.layer_samples, its_zoo)
    sharpness_images = _subset(
        "--sharpness-data", arguments.sharpness_data, arguments.sharpness_samples, its_zoo
    )
    device = _device(arguments)
    its_zoo, fetch = _sources(its_zoo, arguments)
    _check_models(its_zoo)
    from ..studies.estimators import Protocol

    auto: tuple[Estimator, Estimator] = ("plain" if max(arguments.rhos) > 0.2 else "gradient", "gradient")
    own: tuple[On, On] = ("interpolated", "finetuned")
    general, by_layer = (
        Protocol(
            estimator=estimator if arguments.estimator == "auto" else arguments.estimator,
            on=arguments.on or on,
            noise=arguments.noise,
            adaptive=not arguments.no_adaptive,
            seed=arguments.seed,
            noise_batch=arguments.noise_batch,
            goal=arguments.goal_se,
            most=arguments.max_draws,
        )
        for on, estimator in zip(own, auto, strict=True)
    )
    general.check_draws(arguments.draws)
    by_layer.check_draws(layer_draws)
    if arguments.workers is None:
        _check_device(arguments.impl, arguments.precision, device)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = arguments.out or Path("rft-runs", f"{visible(its_zoo.name).replace('/', '-')}-{stamp}")
    return Request(
        everything=not named,
        studies=asked,
        measured=measured,
        zoo=its_zoo,
        alphas=alphas,
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=device,
        impl=arguments.impl,
        xi=arguments.xi,
        out=out,
        overwrite=arguments.overwrite,
        granularity=arguments.granularity,
        layers=arguments.layers,
        models=arguments.models,
        layer_alphas=layer_alphas,
        layer_images=layer_images,
        others=arguments.others,
        straggler_margin=arguments.straggler_margin,
        sharpness_alphas=sharpness_alphas,
        sharpness_images=sharpness_images,
        rhos=sorted(arguments.rhos),
        draws=arguments.draws,
        layer_draws=layer_draws,
        normalize_logits=arguments.normalize_logits,
        general=general,
        layerwise=by_layer,
        zero_margin=arguments.zero_margin,
        keep=arguments.keep,
        criteria=list(dict.fromkeys(arguments.criteria)),
        prune_layers=arguments.prune_layers,
        methods=list(dict.fromkeys(arguments.methods)),
        mask_seeds=list(range(arguments.seed, arguments.seed + arguments.mask_seeds)),
        control=not arguments.no_control,
        precision=arguments.precision,
        memory_limit=None if arguments.memory_limit is None else int(arguments.memory_limit * 2**30),
        graphs=not arguments.no_graphs,
        compile=arguments.compile,
        cache=None if arguments.no_cache else arguments.cache or cache.directory(),
        skip_unreadable=arguments.skip_unreadable,
        plan=arguments.plan,
        fetch=fetch,
        workers=arguments.workers,
        quiet=arguments.quiet,
        json=arguments.json,
        track=list(dict.fromkeys(arguments.track)),
    )


def check_device(request: Request) -> None:
    """Raises ValueError for kernels and a precision that the device of the request does not offer."""
    _check_device(request.impl, request.precision, request.device)


def _check_device(impl: Impl, wanted: Precision, device: torch.device) -> None:
    from ..evaluate import precision
    from ..kernels import registry

    try:
        registry.pick(impl, device)
    except RuntimeError as error:
        raise ValueError(f"argument --impl: {error}") from None
    try:
        precision.check(wanted, device)
    except ValueError as error:
        raise ValueError(f"argument --precision: {error}") from None


def _device(arguments: argparse.Namespace) -> torch.device:
    """Where the models are. Workers of a cluster have GPUs of their own; this machine may have none."""
    if arguments.workers is None or arguments.plan:
        return env.device(arguments.device)
    if arguments.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"argument --device: each worker has one device of its own: cpu or cuda; got {arguments.device!r}"
        )
    from ..run.cluster import connection

    connection.check()
    return connection.device(arguments.workers, arguments.device)


def _check_names(options: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuses an unknown entry of a zoo's options in the words that other entries are refused with."""
    known = sorted(name for action in options._actions for name in action.option_strings)
    for word in words:
        if word.startswith("--") and word not in known:
            if reason := refused_in_zoo(word[2:]):
                raise ValueError(f"{options.prog}: there is no option {word[2:]} here: {reason}")
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0][2:]}?" if near else "--help lists them"
            raise ValueError(f"{options.prog}: there is no option {word[2:]}; {hint}")


def _flat(parts: Sequence[Sequence[float]]) -> list[float]:
    return [number for part in parts for number in part]


def _checked(
    option: str, check: Callable[[Sequence[float]], list[float]], values: Sequence[float]
) -> list[float]:
    try:
        return check(values)
    except ValueError as error:
        raise ValueError(f"argument {option}: {error}") from None


def _subset(option: str, names: list[str] | None, samples: int, its_zoo: zoo.Zoo) -> Subset:
    for name in names or ():
        if name not in its_zoo.data:
            raise ValueError(
                f"argument {option}: there is no data set {name!r}; there are {', '.join(its_zoo.data)}"
            )
    _distinct(option, names or [])
    return Subset(names, samples)


def _zoo(arguments: argparse.Namespace) -> zoo.Zoo:
    """The zoo that is named, the one made of options, or that of digits; the other options on top."""
    files = [word for word in arguments.words if isinstance(word, Path)]
    given = {
        "--arch": arguments.arch,
        "--zeroshot": arguments.zeroshot,
        "--finetuned": arguments.finetuned,
        "--data or --id-data": arguments.data or arguments.id_data,
    }
    if len(files) > 1:
        raise ValueError(f"a sweep takes one zoo, got {', '.join(map(str, files))}")
    if files and any(given.values()):
        options = ", ".join(option for option, value in given.items() if value)
        raise ValueError(f"{files[0]} names models and data already; leave out {options}, or the zoo")
    if files:
        its_zoo = zoo.read(files[0])
    elif any(given.values()):
        if missing := [option for option, value in given.items() if not value]:
            raise ValueError(
                f"a sweep of your own models needs {', '.join(given)}; missing: {', '.join(missing)} "
                "(leave all of them out for the digits zoo, or name a zoo file)"
            )
        its_zoo = _zoo_of_options(arguments)
    else:
        its_zoo = zoo.digits()
    return _changed(its_zoo, arguments)


def _zoo_of_options(arguments: argparse.Namespace) -> zoo.Zoo:
    for file in arguments.finetuned:
        if not file.is_file():
            raise ValueError(f"argument --finetuned: there is no file {file}")
    try:
        checkpoints.check_source(arguments.zeroshot, arguments.arch)
    except ValueError as error:
        raise ValueError(f"argument --zeroshot: {error}") from None
    sources = [(name, zoo.DataSource(Path(path), ood=False)) for name, path in arguments.id_data]
    sources += [(name, zoo.DataSource(Path(path), ood=True)) for name, path in arguments.data]
    for name, source in sources:
        if not source.path.exists():
            raise ValueError(f"argument --data, --id-data: {name}: there is no {source.path}")
    _distinct("--data, --id-data", [name for name, _ in sources])
    # Stems are the shortest names; files such as */final.pt need their whole paths.
    names = [file.stem for file in arguments.finetuned]
    if len(set(names)) < len(names):
        names = [str(file) for file in arguments.finetuned]
    _distinct("--finetuned", names)
    return zoo.Zoo(
        name=Path(arguments.arch).stem,
        arch=arguments.arch,
        zeroshot=zoo.Weights(arguments.zeroshot),
        finetuned={
            name: zoo.Weights(str(file)) for name, file in zip(names, arguments.finetuned, strict=True)
        },
        data=dict(sources),
    )


def _changed(its_zoo: zoo.Zoo, arguments: argparse.Namespace) -> zoo.Zoo:
    """With what the command line says of its checkpoints, its head and its data."""
    head = {
        "choice": arguments.head,
        "towers": arguments.towers,
        "class_names": arguments.class_names,
        "templates": arguments.templates,
        "scale": arguments.head_scale,
        "given": arguments.zeroshot_head,
    }
    if arguments.zeroshot_head is not None and not arguments.zeroshot_head.is_file():
        raise ValueError(f"argument --zeroshot-head: there is no file {arguments.zeroshot_head}")
    data = dict(its_zoo.data)
    for option, values in (("--data-kind", arguments.data_kind), ("--data-labels", arguments.data_labels)):
        _distinct(option, [name for name, _ in values])
        for name, _ in values:
            if name not in data:
                raise ValueError(
                    f"argument {option}: there is no data set {name!r}; there are {', '.join(data)}"
                )
    for name, kind in arguments.data_kind:
        if kind not in KINDS:
            raise ValueError(f"argument --data-kind: {name}: no kind {kind!r}; known are {', '.join(KINDS)}")
        data[name] = replace(data[name], kind=kind)
    for name, file in arguments.data_labels:
        labels = as_given(file)
        if isinstance(labels, Path) and not labels.is_file():
            raise ValueError(f"argument --data-labels: {name}: there is no file {file}")
        data[name] = replace(data[name], labels=labels)
    finetuned = its_zoo.finetuned
    if arguments.format is not None:
        finetuned = {name: replace(w, format=arguments.format) for name, w in finetuned.items()}
    if arguments.unrelated:
        finetuned = {name: replace(w, unrelated=True) for name, w in finetuned.items()}
    changes = {name: value for name, value in head.items() if value is not None}
    resize = its_zoo.resize_positions or arguments.resize_positions
    its_zoo = replace(its_zoo, finetuned=finetuned, data=data, resize_positions=resize)
    return replace(its_zoo, head=replace(its_zoo.head, **changes))


def _sources(its_zoo: zoo.Zoo, arguments: argparse.Namespace) -> tuple[zoo.Zoo, bool | None]:
    """The zoo with its architecture pinned to a commit, and what of it may be downloaded.

    The command line may start a download, by naming what it takes; a zoo file may not, and no plan does.
    """
    from ..clip import architectures

    file = next((word for word in arguments.words if isinstance(word, Path)), None)
    fetch = True if arguments.fetch else None if file is None and not arguments.plan else False
    missing = []
    if its_zoo.arch.startswith(architectures.HUB):
        pinned = architectures.pin(its_zoo.arch, fetch is not False)
        missing += [] if pinned else [f"the configuration of {its_zoo.arch}"]
        its_zoo = replace(its_zoo, arch=pinned or its_zoo.arch)
    source = its_zoo.zeroshot.source
    if fetch is False and checkpoints.cached(source, its_zoo.arch) is None:
        missing.append(f"the zero-shot weights {source}")
    if missing and arguments.plan:
        raise NotFetched("; ".join(missing))
    if missing:
        raise ValueError(
            f"{file} names what is not on this machine: {'; '.join(missing)}. A zoo file starts no download; "
            "--fetch does"
        )
    return its_zoo, fetch


def _check_models(its_zoo: zoo.Zoo) -> None:
    """Refuses architectures, published weights and lists of names that are not known."""
    from ..clip import architectures, matching, prompts

    source, head = its_zoo.zeroshot.source, its_zoo.head
    published = None if Path(source).is_file() or source.startswith("hf-hub:") else source
    architectures.preprocess(its_zoo.arch, published)
    if published is not None:
        matching.check_activation(its_zoo.arch, published)
    if head.class_names is not None:
        prompts.class_names(head.class_names)
        prompts.templates(head.templates)
    elif head.towers == "both":
        raise ValueError("argument --towers: both towers need the names of the classes, --class-names")
    elif head.templates != zoo.Head().templates:
        raise ValueError("argument --templates: they are put around the names of --class-names; give both")
    if head.towers == "both" and head.choice != "interpolate":
        raise ValueError(
            f"argument --head: {head.choice} keeps a linear head, which there is none of with --towers both"
        )


def _distinct(option: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"argument {option}: given more than once: {', '.join(twice)}")
