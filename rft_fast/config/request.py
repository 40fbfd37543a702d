"""What a command line of ``python -m rft_fast.sweep`` asks for: its options, read and found valid."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from .. import catalogue, checkpoints, env
from ..common.fields import Tree
from ..common.words import visible
from ..datasets import cache
from ..names import CLASS_LISTS, KINDS, RUNS, TEMPLATE_LISTS, as_given, list_file
from ..settings import Layers, Sharpness, once
from . import quick, zoo
from .builder import COMMAND
from .conflicts import named, settle
from .options import parser, split
from .rounding import check_rounding, slower
from .settings import Computed, Figures, Head, Models, Running, builder
from .unused import unused

if TYPE_CHECKING:  # what can be refused without them is refused before they are imported
    import torch


_Settings = TypeVar("_Settings")


@dataclass(frozen=True)
class Request:
    """What the command line asks for, found valid. Nothing is loaded yet.

    Attributes:
        everything: whether no study was named: those of the paper.
        studies: those that were.
        measured: these, and what they need, in order.
        zoo: models and data, with what the command line says of them.
        settings: how they are studied, and how the run goes, without contradictions.
        out: directory of the run.
        device: where the models are.
        fetch: what may be downloaded: anything, nothing; None: what the command line names.
        notices: which defaults, and options of the zoo and of the paper, gave way to others, and
            which options have no effect, as sentences.
    """

    everything: bool
    studies: list[str]
    measured: list[str]
    zoo: zoo.Zoo
    settings: Tree
    out: pathlib.Path
    device: torch.device
    fetch: bool | None
    notices: tuple[str, ...] = ()

    def of(self, kind: type[_Settings]) -> _Settings:
        """The settings of a class."""
        return self.settings.of(kind)

    def but(self, *settings: object) -> Request:
        """The request with other settings of these classes."""
        return replace(self, settings=self.settings.but(*settings))

    def named(self, option: str) -> str:
        """An option, as whoever gave it knows it: for errors."""
        return named(self.settings, option, self.zoo.name)


class NotFetched(Exception):
    """What a plan needs is not on this machine yet; says what would be downloaded."""


def unfetched(what: object) -> str:
    """What is printed instead of a plan, where something would have to be downloaded first."""
    return (
        f"would be downloaded: {what}\nNothing was downloaded. Repeat the command with "
        "--fetch to download it and print the plan."
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
    options = builder()
    studies, zoos, rest = split(argv, options)
    given = options.given(parser(options).parse_args(rest))
    tree = options.tree({COMMAND: given})
    its_zoo = _zoo(tree, zoos)
    sources, replaced = quick.sources(options, its_zoo, given)
    return _request(studies, options.tree(sources), its_zoo, zoos, replaced)


def _request(
    studies: Sequence[str], tree: Tree, its_zoo: zoo.Zoo, zoos: Sequence[str], replaced: Sequence[str]
) -> Request:
    layers, running = tree.of(Layers), tree.of(Running)
    _check_models_named(tree, its_zoo)
    asked = [study for study in catalogue.names() if study in studies] or catalogue.default()
    models, ood = layers.models or its_zoo.finetuned, any(data.ood for data in its_zoo.data.values())
    for name in list(asked):
        if lacking := catalogue.study(name).lacks(len(models), ood):
            if studies:
                remedy = "more" if catalogue.study(name).lacks(len(models), True) else "some"
                raise ValueError(f"{name}: this study needs {lacking}; name {remedy}, or leave {name} out")
            asked.remove(name)

    def perturbed(tree: Tree) -> bool:
        measured = map(catalogue.study, catalogue.measured(asked, tree))
        return any(study.images == "images of sharpness" for study in measured)

    tree, notices = settle(tree, its_zoo.name, perturbed)
    if not tree.of(Sharpness).rhos:
        _check_auto(tree, its_zoo, perturbed(tree))
    measured = catalogue.measured(asked, tree)
    if running.plan and running.json:
        raise ValueError("argument --json: cannot be combined with --plan, which prints a table")
    if running.quiet and running.json:
        raise ValueError("argument --json: cannot be combined with --quiet")
    for option, names in (("layer-data", layers.data), ("sharpness-data", tree.of(Sharpness).data)):
        _check_data_named(named(tree, option, its_zoo.name), names or (), its_zoo)
    _check_lists(its_zoo)
    if running.track:
        from ..run import trackers

        trackers.check(running.track)
    if (file := tree.of(Figures).style) is not None:
        from ..figures import stylefile

        stylefile.read(file)
    device = _device(tree)
    its_zoo, fetch = _sources(its_zoo, running, zoos)
    _check_models(its_zoo, tree)
    out = its_zoo.outside(running.out or _new(its_zoo))
    running = replace(running, out=out, cache=running.cache if tree.giver("cache") else cache.directory())
    request = Request(
        everything=not studies,
        studies=asked,
        measured=measured,
        zoo=its_zoo,
        settings=tree.but(running),
        out=out,
        device=device,
        fetch=fetch,
        notices=(*replaced, *notices, *unused(tree, measured), *slower(tree, device.type)),
    )
    for name in measured:
        catalogue.study(name).validate(request)
    check_rounding(request.settings, measured, its_zoo.name)
    if running.workers is None:
        check_device(request)
    return request


def _check_auto(tree: Tree, its_zoo: zoo.Zoo, perturbed: bool) -> None:
    """Refuse ``--rhos auto`` where no sharpness is measured, or where there is no median model."""
    where = named(tree, "rhos", its_zoo.name)
    if not perturbed and tree.giver("rhos") == COMMAND:
        raise ValueError(
            f"{where}: auto needs a study of sharpness, and none is requested; add sharpness or "
            "layer-sharpness, or leave --rhos out"
        )
    if perturbed and len(its_zoo.finetuned) < 2:
        raise ValueError(
            f"{where}: auto makes models comparable, so it needs at least 2; got "
            f"{', '.join(its_zoo.finetuned)}, whose sharpness would be 0.1 nats by construction; "
            "name a rho"
        )


def _new(its_zoo: zoo.Zoo) -> pathlib.Path:
    """A directory for a run, where none is named."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return pathlib.Path(RUNS, f"{visible(its_zoo.name).replace('/', '-')}-{stamp}")


def check_device(request: Request) -> None:
    """Raises ValueError for kernels and a precision that the device of the request does not offer."""
    from ..evaluate import precision
    from ..kernels import registry

    computed = request.of(Computed)
    try:
        registry.pick(computed.impl, request.device)
    except RuntimeError as error:
        raise ValueError(f"{request.named('impl')}: {error}") from None
    try:
        precision.check(computed.precision, request.device)
    except ValueError as error:
        raise ValueError(f"{request.named('precision')}: {error}") from None


def _device(tree: Tree) -> torch.device:
    """Where the models are. Workers of a cluster have GPUs of their own; this machine may have none."""
    running, name = tree.of(Running), tree.of(Computed).device
    if running.workers is None or running.plan:
        return env.device(name)
    if name not in (None, "cpu", "cuda"):
        raise ValueError(
            f"argument --device: with --workers, the device of each worker is cpu or cuda; got {name!r}"
        )
    from ..run.cluster import connection

    connection.check()
    return connection.device(running.workers, name)


def _check_models_named(tree: Tree, its_zoo: zoo.Zoo) -> None:
    for name in tree.of(Layers).models or ():
        if name not in its_zoo.finetuned:
            names = list(its_zoo.finetuned)
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
            raise ValueError(
                f"{named(tree, 'models', its_zoo.name)}: there is no fine-tuned model {name!r}; the "
                f"nearest names are {', '.join(near)}"
            )


def _check_data_named(where: str, names: Sequence[str], its_zoo: zoo.Zoo) -> None:
    for name in names:
        if name not in its_zoo.data:
            raise ValueError(f"{where}: there is no data set {name!r}; there are {', '.join(its_zoo.data)}")


def _check_lists(its_zoo: zoo.Zoo) -> None:
    """Refuses lists of names that are not known: those that are files are read later."""
    head = its_zoo.head
    for what, source, known in (
        ("class names", head.class_names, CLASS_LISTS),
        ("templates", head.templates if head.class_names is not None else None, TEMPLATE_LISTS),
    ):
        if source is not None and source not in known:
            list_file(what, source, known)


def _zoo(tree: Tree, files: Sequence[str]) -> zoo.Zoo:
    """The zoo that is named, the one made of options, or that of digits; the other options on top."""
    models = tree.of(Models)
    given = {
        "--arch": models.arch,
        "--zeroshot": models.zeroshot,
        "--finetuned": models.finetuned,
        "--data or --id-data": models.data or models.id_data,
    }
    if len(files) > 1:
        raise ValueError(f"a sweep reads one zoo, got {', '.join(files)}")
    if files and any(given.values()):
        options = ", ".join(option for option, value in given.items() if value)
        raise ValueError(f"{files[0]} already names models and data; leave out {options}, or the zoo")
    if files:
        its_zoo = zoo.read(files[0])
    elif any(given.values()):
        if missing := [option for option, value in given.items() if not value]:
            raise ValueError(
                f"a sweep of your own models needs {', '.join(given)}; missing: {', '.join(missing)} "
                "(leave all of them out to use the digits zoo, or name a zoo file)"
            )
        its_zoo = _zoo_of_options(models)
    else:
        its_zoo = zoo.digits()
    return _changed(its_zoo, models, tree.of(Head))


def _zoo_of_options(models: Models) -> zoo.Zoo:
    if models.arch is None or models.zeroshot is None:
        raise ValueError("a sweep of your own models needs --arch and --zeroshot")
    for file in models.finetuned:
        try:
            checkpoints.located(file)
        except ValueError as error:
            raise ValueError(f"argument --finetuned: {error}") from None
    sources = [(name, zoo.DataSource(path, ood=False)) for name, path in models.id_data]
    sources += [(name, zoo.DataSource(path, ood=True)) for name, path in models.data]
    for name, source in sources:
        if not source.path.exists():
            raise ValueError(f"argument --data, --id-data: {name}: {source.path} does not exist")
    try:
        once([name for name, _ in sources])
    except ValueError as error:
        raise ValueError(
            f"argument --data, --id-data: {error}; give each a different name: NAME=PATH"
        ) from None
    try:
        checkpoints.check_source(models.zeroshot, models.arch)
    except ValueError as error:
        raise ValueError(f"argument --zeroshot: {error}") from None
    # Stems are the shortest names; files such as */final.pt need their whole paths.
    names = [file.stem for file in models.finetuned]
    if len(set(names)) < len(names):
        names = [str(file) for file in models.finetuned]
    try:
        once(names)
    except ValueError as error:
        raise ValueError(f"argument --finetuned: {error}") from None
    return zoo.Zoo(
        name=pathlib.Path(models.arch).stem,
        arch=models.arch,
        zeroshot=zoo.Weights(models.zeroshot),
        finetuned={name: zoo.Weights(str(file)) for name, file in zip(names, models.finetuned, strict=True)},
        data=dict(sources),
    )


def _changed(its_zoo: zoo.Zoo, models: Models, head: Head) -> zoo.Zoo:
    """With what the command line says of its checkpoints, its head and its data."""
    if head.zeroshot_head is not None and not head.zeroshot_head.is_file():
        raise ValueError(f"argument --zeroshot-head: the file {head.zeroshot_head} does not exist")
    data = dict(its_zoo.data)
    for option, values in (("--data-kind", models.data_kind), ("--data-labels", models.data_labels)):
        _check_data_named(f"argument {option}", [name for name, _ in values], its_zoo)
    for name, kind in models.data_kind:
        if kind not in KINDS:
            raise ValueError(
                f"argument --data-kind: {name}: there is no kind {kind!r}; known are {', '.join(KINDS)}"
            )
        data[name] = replace(data[name], kind=kind)
    for name, file in models.data_labels:
        labels = as_given(file)
        if isinstance(labels, pathlib.Path) and not labels.is_file():
            raise ValueError(f"argument --data-labels: {name}: the file {file} does not exist")
        data[name] = replace(data[name], labels=labels)
    of_weights: dict[str, Any] = {} if models.format is None else {"format": models.format}
    of_weights |= {"unrelated": True} if models.unrelated else {}
    of_weights |= {} if models.key is None else {"key": models.key}
    zeroshot = its_zoo.zeroshot
    if models.zeroshot_key is not None:
        zeroshot = replace(zeroshot, key=models.zeroshot_key)
    of_head: dict[str, Any] = {
        "choice": head.head,
        "towers": head.towers,
        "class_names": head.class_names,
        "templates": head.templates,
        "scale": head.head_scale,
        "given": head.zeroshot_head,
    }
    return replace(
        its_zoo,
        zeroshot=zeroshot,
        finetuned={name: replace(weights, **of_weights) for name, weights in its_zoo.finetuned.items()},
        data=data,
        head=replace(its_zoo.head, **{name: value for name, value in of_head.items() if value is not None}),
        resize_positions=its_zoo.resize_positions or models.resize_positions,
    )


def _sources(its_zoo: zoo.Zoo, running: Running, zoos: Sequence[str]) -> tuple[zoo.Zoo, bool | None]:
    """The zoo with its architecture pinned to a commit, and what of it may be downloaded.

    The command line may start a download, by naming what it takes; a zoo file may not, and no plan does.
    """
    from ..clip import architectures

    fetch = True if running.fetch else False if zoos or running.plan else None
    missing = []
    if its_zoo.arch.startswith(architectures.HUB):
        pinned = architectures.pin(its_zoo.arch, fetch is not False)
        missing += [] if pinned else [f"the configuration of {its_zoo.arch}"]
        its_zoo = replace(its_zoo, arch=pinned or its_zoo.arch)
    source = its_zoo.zeroshot.source
    if fetch is False and checkpoints.cached(source, its_zoo.arch) is None:
        missing.append(f"the zero-shot weights {source}")
    if missing and running.plan:
        raise NotFetched("; ".join(missing))
    if missing:
        raise ValueError(
            f"{zoos[0]} needs files that are not on this machine: {'; '.join(missing)}. Add "
            "--fetch to download them"
        )
    return its_zoo, fetch


def _check_models(its_zoo: zoo.Zoo, tree: Tree) -> None:
    """Refuses architectures, published weights and lists of names that are not known."""
    from ..clip import architectures, matching, prompts

    source, head = its_zoo.zeroshot.source, its_zoo.head
    published = None if pathlib.Path(source).exists() or source.startswith("hf-hub:") else source
    architectures.preprocess(its_zoo.arch, published)
    if published is not None:
        matching.check_activation(its_zoo.arch, published)
    if head.class_names is not None:
        prompts.class_names(head.class_names)
        prompts.templates(head.templates)
    elif head.towers == "both":
        raise ValueError("argument --towers: both towers need the names of the classes; give --class-names")
    elif head.templates != zoo.Head().templates:
        raise ValueError("argument --templates: templates need class names; give --class-names, too")
    if head.towers == "both" and head.choice != "interpolate":
        which = "argument --head" if tree.giver("head") else f"head of the zoo {its_zoo.name!r}"
        raise ValueError(
            f"{which}: {head.choice} keeps a linear head, but with --towers both there is none; "
            "leave it out, or use --towers image"
        )
