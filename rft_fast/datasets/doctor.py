"""Describes a data set on disk and finds its errors."""

from __future__ import annotations

import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

from rft_fast.common.tables import labelled
from rft_fast.common.words import many, message, some
from rft_fast.names import ORDER, TREES, Kind

from . import decoding, folders, imagenet, kinds, maps
from .evidence import Rows, proposed
from .labels import assign
from .maps import LabelMap, read_map
from .naming import fold
from .source import Source

SHOWN = 20  # names listed per problem

# Images per class, if it is the same for all.
_EACH = {"ImageNet": 50, "ImageNetV2": 10}
_PUBLISHED = {
    "ImageNet": (50_000,),
    "ImageNet, training images": (1_281_167,),
    "ImageNetV2": (10_000,),
    "ImageNet-Sketch": (50_889,),
    "ImageNet-R": (30_000,),
    "ImageNet-A": (7_500,),
    "ObjectNet": (imagenet.OBJECTNET_IMAGES,),
    # test and training images
    "CIFAR-10": (10_000, 50_000),
    "CIFAR-10.1": (2_000, 2_021),
    "CIFAR-10.2": (2_000, 10_000),
    "CIFAR-100": (10_000, 50_000),
    "STL-10": (8_000, 5_000),
}
_COPY = re.compile(r"[\s_-]*(\(\d+\)|copy(\s*\d+)?|\d*~)$", re.IGNORECASE)


@dataclass
class Report:
    """The result of an examination, as lines of text.

    Attributes:
        facts: what was found, with a label for each.
        problems: errors that would make scores wrong, or stop a sweep.
        unchecked: checks that could not be made, so that the data set is not known to be sound.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.problems)
        end = [f"{many(count, 'problem')}:", *(f"- {p}" for p in self.problems)]
        if not self.problems:
            end = ["no problems found, but note:"] if self.unchecked else ["sound"]
        lines = [*end, *(f"- not checked: {text}" for text in self.unchecked)]
        return "\n".join([*labelled(self.facts), *map(message, lines)])


def examine(
    path: pathlib.Path,
    kind: Kind | None = None,
    rows: Rows | None = None,
    label_map: LabelMap | pathlib.Path | str | None = None,
    quick: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Examine a data set, as far as possible without a model.

    Args:
        path: where it is.
        kind: its format, as in :func:`rft_fast.datasets.load`; None: detected.
        rows: rows of the head, as there; None: ImageNet's, for ImageNet and its relatives.
        label_map: as there.
        quick: list the images without decoding them.
        progress: called with (images decoded, images in all).

    Raises:
        ValueError: the images cannot be listed, as the path has no data set or several; or the file is not a
            label map.
    """
    report = Report()
    if isinstance(label_map, pathlib.Path) or (isinstance(label_map, str) and label_map != ORDER):
        label_map = read_map(pathlib.Path(label_map))
    path = kinds.named(path)
    if (kind or kinds.detect(path)) in TREES:
        listing = folders.look(path, kind)
        source = listing.source
        report.problems += listing.problems
    else:
        source = kinds.open_source(path.name, path, kind)
    title = _title(source)
    report.facts += [("path", str(source.path)), ("kind", source.kind + (f" ({title})" if title else ""))]
    report.facts += [("note", note) for note in source.notes]
    _count(report, source, title)
    if source.kind in TREES:
        _look_for_copies(report, source)
    _scored(report, source, rows or _default_rows(source), label_map)
    if not quick:
        _decode(report, source, progress)
    return report


def write_labels(
    path: pathlib.Path, file: pathlib.Path, kind: Kind | None = None, rows: Rows | None = None
) -> str:
    """Write a draft of a label map: known rows, and a question mark for every class whose row is unknown.

    Args:
        path: the data set.
        file: a new ``.csv`` file.
        kind: as for :func:`examine`.
        rows: as for :func:`examine`.

    Returns:
        A summary in words.

    Raises:
        ValueError: the data set has no class names, the head is unknown, or ``file`` is not ``.csv``.
        FileExistsError: ``file`` exists.
    """
    path = kinds.named(path)
    source = kinds.open_source(path.name, path, kind)
    rows = rows or _default_rows(source)
    if not source.class_names or rows is None:
        what = (
            "its labels are rows of a head, without names"
            if not source.class_names
            else "the head is unknown; give --rows"
        )
        raise ValueError(f"cannot write a draft label map for {path}: {what}")
    if file.suffix != ".csv":
        raise ValueError(f"the label map must be a .csv file, got {file}")
    found = proposed(source, rows)
    maps.write_csv(file, {name: [maps.UNKNOWN if row is None else row] for name, row in found.items()})
    unknown = sum(row is None for row in found.values())
    state = "all have rows"
    if unknown:
        have = many(unknown, "has a question mark", "have question marks")
        state = f"{have}: replace each by a row, or by nothing if the class is not to be scored"
    return f"{file}: {many(len(found), 'class', 'classes')}; {state}"


def _title(source: Source) -> str:
    """Name of the published data set, as far as classes and files show it; else empty."""
    if source.kind == "objectnet":
        return "ObjectNet"
    if source.kind == "imagenet-v2":
        return "ImageNetV2"
    if source.kind == "cifar":
        return source.notes[0].partition(":")[0].partition(" (")[0]
    wnids = [name for name in source.class_names if imagenet.WNID.fullmatch(name)]
    title = imagenet.title(wnids) or imagenet.almost(wnids)[0]
    if title != "ImageNet-1k":
        return title
    counts = {
        "ImageNet-Sketch": sum("sketch" in pathlib.Path(file.name).name.lower() for file in source.files),
        "ImageNet": sum("_val_" in file.name for file in source.files),
    }
    named = max(counts, key=counts.__getitem__)
    if 2 * counts[named] > len(source.files):
        return named
    if len(source.files) > 500_000:
        return "ImageNet, training images"
    return min(
        ("ImageNet", "ImageNet-Sketch", "ImageNetV2"), key=lambda t: abs(_PUBLISHED[t][0] - len(source.files))
    )


def _count(report: Report, source: Source, title: str) -> None:
    names = source.class_names or [str(label) for label in sorted(set(source.labels.tolist()))]
    counter = Counter(source.labels.tolist())
    place = range(len(names)) if source.class_names else sorted(counter)
    counts = {name: counter[label] for name, label in zip(names, place, strict=True)}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    spread = f"{counts[least]:,} ({least}) to {counts[most]:,} ({most}) images"
    each = f"{_images(counts[least])} each" if counts[least] == counts[most] else spread
    classes = many(f"{len(counts):,}", "class", "classes")
    report.facts.append(("images", f"{_images(len(source.files))}, {classes} of {each}"))
    if title in _PUBLISHED:
        published = " or ".join(f"{count:,}" for count in _PUBLISHED[title])
        if len(source.files) not in _PUBLISHED[title]:
            report.problems.append(
                f"{title} has {published} images, but this data set has {len(source.files):,}"
            )
        else:
            report.facts.append(("published", f"{title} has {published} images, as this data set has"))
    if title in _EACH and (wrong := [f"{n} ({c:,})" for n, c in counts.items() if c != _EACH[title]]):
        have = many(len(wrong), "class does not have", "classes do not have")
        report.problems.append(f"{have} {_EACH[title]} images, as in {title}: {some(wrong, SHOWN)}")
    wnids = [name for name in names if imagenet.WNID.fullmatch(name)]
    if len(wnids) < len(names) and (missing := imagenet.almost(wnids)[1]):  # otherwise reported with the rows
        are = many(len(missing), f"class of {title} is", f"classes of {title} are")
        report.problems.append(f"{are} missing: {some(missing, SHOWN)}")
    if source.kind not in TREES:  # where the reader reports it
        if empty := [name for name, count in counts.items() if not count]:
            have = many(len(empty), "class has", "classes have")
            report.problems.append(f"{have} no images: {some(empty, SHOWN)}")
    if source.kind == "objectnet" and len(names) != imagenet.OBJECTNET_FOLDERS:
        report.problems.append(
            f"ObjectNet has {imagenet.OBJECTNET_FOLDERS} class folders, but this data set has {len(names)}"
        )


def _look_for_copies(report: Report, source: Source) -> None:
    """Find class folders that are copies of others, by name or by content."""
    alike: dict[str, list[str]] = {}
    for name in source.class_names:
        alike.setdefault(fold(_COPY.sub("", name)), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            report.problems.append(f"class folders that look like copies: {some(group, SHOWN)}")
    contents: dict[str, list[tuple[str, int]]] = {name: [] for name in source.class_names}
    first: dict[str, str] = {}
    nested = set()
    for file in source.files:
        parts = pathlib.Path(file.name).parts
        contents[parts[0]].append((parts[-1], file.size))
        first.setdefault(parts[0], file.name)
        if len(parts) > 2 and parts[1].casefold() == parts[0].casefold():
            nested.add(parts[0])
    if nested:
        report.problems.append(
            f"class folders inside a folder of the same name: {some(sorted(nested), SHOWN)}"
        )
    listed: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, files in contents.items():
        if len(files) > 1:
            listed.setdefault(tuple(sorted(files)), []).append(name)
    for group in listed.values():
        for same in _same([(name, source.path / first[name]) for name in group]):
            report.problems.append(f"classes with the same files: {some(same, SHOWN)}")


def _same(firsts: Sequence[tuple[str, pathlib.Path]]) -> list[list[str]]:
    """Groups of classes whose first files are equal."""
    if len(firsts) < 2:
        return []
    found: dict[bytes, list[str]] = {}
    for name, file in firsts:
        with suppress(OSError):  # reported on decoding
            found.setdefault(blake2b(file.read_bytes()).digest(), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def _default_rows(source: Source) -> Rows | None:
    names = source.class_names
    known = source.kind in ("imagenet", "imagenet-v2", "objectnet") or imagenet.are_wnids(names)
    if known or (
        len(names) == imagenet.CLASSES and 2 * sum(map(bool, imagenet.candidates(names))) > len(names)
    ):
        return Rows(imagenet.CLASSES)
    return None


def _scored(
    report: Report, source: Source, rows: Rows | None, label_map: LabelMap | pathlib.Path | str | None
) -> None:
    try:
        found = assign(source, rows, label_map)
    except ValueError as error:
        report.problems.append(str(error))
        return
    if rows is None:
        report.unchecked.append(
            "the rows of its own classes, because no head was given; use --rows (imagenet, "
            "cifar10, ..., a file of class names, or a number)"
        )
    elif label_map == ORDER and not rows.names:
        report.unchecked.append("whether its classes are in the order of the head, as requested")
    classes = len(set(found.labels.tolist()))
    rows_of = (
        f"the head's {rows.count:,} rows" if rows is not None else "the rows of a head whose row i is class i"
    )
    if rows is None and (found.classes is not None or source.imagenet or label_map is not None):
        rows_of = "a head's rows"
    among = f"all of {rows_of}" if found.classes is None else f"{len(found.classes):,} of {rows_of}"
    several = ""
    if found.groups is not None:
        right = Counter(found.groups.tolist())
        have = many(sum(n > 1 for n in right.values()), "class has", "classes have")
        several = f"; {have} several correct rows"
    of = many(f"{classes:,}", "class", "classes")
    scored = f"{_images(len(found.images))} of {of}, among {among}{several}; {found.how}"
    report.facts.append(("scored", scored))
    if source.kind == "objectnet" and label_map is None and len(found.images) != imagenet.OBJECTNET_SCORED:
        report.problems.append(
            f"ObjectNet has {imagenet.OBJECTNET_SCORED:,} images to score, but this data set has "
            f"{len(found.images):,}"
        )


def _decode(report: Report, source: Source, progress: Callable[[int, int], object] | None) -> None:
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: list[str] = []
    lossy: dict[str, list[str]] = {}
    for index, found in enumerate(_examined(source)):
        if isinstance(found, str):
            unreadable.append(found)
        else:
            mode, size = found
            modes[mode] += 1
            sizes[size] += 1
            if mode not in decoding.MODES:
                lossy.setdefault(mode, []).append(source.place(index))
        if progress is not None:
            progress(index + 1, len(source.files))
    if sizes:
        order = sorted(sizes, key=lambda size: size[0] * size[1])
        smallest, largest = (f"{width} x {height}" for width, height in (order[0], order[-1]))
        shape = f"all {smallest}" if len(sizes) == 1 else f"{smallest} to {largest}"
        kinds_of = ", ".join(f"{mode} {count:,}" for mode, count in modes.most_common())
        report.facts += [("modes", kinds_of), ("sizes", f"{shape} (width x height)")]
    if unreadable:
        report.problems.append(f"{_images(len(unreadable))} cannot be read: {some(unreadable, SHOWN)}")
    for mode, places in lossy.items():
        report.problems.append(f"{_images(len(places))} {decoding.loss(mode)}: {some(places, SHOWN)}")


def _examined(source: Source) -> Iterator[tuple[str, tuple[int, int]] | str]:
    indices: Sequence[int] = range(len(source.files))
    with decoding.threads() as pool, decoding.whole_images_only():
        yield from decoding.ahead(pool, partial(decoding.examine, source), indices)


def _images(count: int) -> str:
    return many(f"{count:,}", "image")
