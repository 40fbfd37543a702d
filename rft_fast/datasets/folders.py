"""Reader of folders of class folders: ImageNet and its relatives, ObjectNet, anything for ImageFolder."""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image

from rft_fast.common.words import some
from rft_fast.datasets import cache as caches
from rft_fast.names import Kind

from . import imagenet
from .source import PART, Source, open_file

# Extensions of images in torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Folders that hold parts of a data set, not classes. Only parts to evaluate on are chosen.
EVALUATION = ("val", "val_in_folder", "validation", "test")
SPLITS = (*EVALUATION, "train", "training")
MAPPINGS = "mappings"
V2 = {str(number) for number in range(imagenet.CLASSES)}


@dataclass(frozen=True)
class Place:
    """The location of class folders.

    Attributes:
        kind: what they are.
        path: their parent folder.
        mappings: ObjectNet's folder of mappings.
        notes: how they were found.
    """

    kind: Kind
    path: pathlib.Path
    mappings: pathlib.Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The images of a folder, and every reason to refuse it, in words."""

    source: Source
    problems: list[str]


def source(path: pathlib.Path, where: str, kind: Kind | None = None) -> Source:
    """List the images of a folder; label i is its i-th class folder in order.

    Images are in class folders at any depth. Folder names that are all numbers are sorted as numbers (``10``
    after ``9``) and must be consecutive. Hidden files and folders, and files other than images beside the
    class folders, are ignored.

    Args:
        path: the folder of class folders, or one above it if there is no ambiguity: for ``imagenet/train``
            and ``imagenet/val``, that is ``val``.
        where: prefix of error messages.
        kind: "folder" (as it is), "imagenet" (WordNet ids), "imagenet-v2" (0 to 999), "objectnet"; None:
            detected.

    Raises:
        ValueError: anything that would silently give wrong scores.
    """
    try:
        listing = look(path, kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if listing.problems:
        more = (
            f" (python -m rft_fast.datasets {path} lists all problems)" if len(listing.problems) > 1 else ""
        )
        raise ValueError(f"{where}: {listing.problems[0]}{more}")
    return listing.source


def look(path: pathlib.Path, kind: Kind | None = None) -> Listing:
    """As :func:`source`, but collect the problems with classes and files.

    Raises:
        ValueError: there are no class folders.
    """
    place = find(path, kind)
    root = place.path
    entries = sorted(root.iterdir())
    names = [entry for entry in _folders(root) if place.mappings is None or entry != MAPPINGS]
    problems = []
    if not names:
        raise ValueError(f"{root} has no class folders")
    if stray := [entry.name for entry in entries if is_image(entry)]:
        problems.append(f"{root} has images outside its class folders: {some(stray)}")
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
        problems += _gaps([int(name) for name in names], root)
    files = _Files.of(root, names)
    problems += files.problems(root)
    scored = None
    if place.mappings is not None:
        known, scored = imagenet.objectnet(place.mappings)
        if unknown := [name for name in names if name not in known]:
            problems.append(f"{root} has folders that its mappings do not list: {some(unknown)}")
        if missing := sorted(scored.keys() - set(names)):
            problems.append(
                f"{root} lacks {len(missing)} of the {len(scored)} classes to score: {some(missing)}"
            )
    problems += _unfit(place.kind, root, names)
    found = Source(
        kind=place.kind,
        path=root,
        files=files.images,
        labels=torch.tensor(files.labels, dtype=torch.int64),
        class_names=tuple(names),
        open=partial(_open, root, files.images),
        notes=(*place.notes, *_about(names)),
        trim=2 if place.kind == "objectnet" else 0,
        imagenet=scored,
    )
    return Listing(found, problems)


def find(path: pathlib.Path, kind: Kind | None = None) -> Place:
    """Find the class folders and their kind.

    Raises:
        ValueError: there are none, they are ambiguous, or they are of another kind.
    """
    if not path.is_dir():
        raise ValueError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}")
    if kind == "folder":
        return Place("folder", path)
    place = _find(path)
    if kind is None or place.kind == kind:
        return place
    if kind == "objectnet":
        raise ValueError(
            f"{path} is not ObjectNet as published: expected the folder {MAPPINGS} (with "
            f"{imagenet.TO_IMAGENET} and other files) beside the images, or in or beside the "
            "folder of the classes"
        )
    wanted = "by WordNet ids such as n01440764" if kind == "imagenet" else "0 to 999"
    raise ValueError(
        f"{place.path} is not {kind}: expected class folders named {wanted}; got {some(_folders(place.path))}"
    )


def is_image(file: pathlib.Path) -> bool:
    """Whether a file exists and has the extension of an image."""
    return file.suffix.lower() in EXTENSIONS and _status(file) is not None


def _find(path: pathlib.Path) -> Place:
    mappings = next(
        (folder for folder in (path / MAPPINGS, path.parent / MAPPINGS) if _is_mappings(folder)), None
    )
    if mappings is not None:
        images = path / "images"
        inner = mappings.parent == path and images.is_dir()
        return Place("objectnet", images if inner else path, mappings)
    names = _folders(path)
    if names and (set(names) <= set(SPLITS) or ("train" in names and set(names) & set(EVALUATION))):
        return _split(path, names)
    if any(imagenet.WNID.fullmatch(name) for name in names):
        return Place("imagenet", path)
    if set(names) == V2:
        return Place("imagenet-v2", path)
    if sets := [name for name in names if _is_set(path / name)]:
        if names != sets or len(sets) > 1:
            raise ValueError(
                f"{path} contains data sets, not classes: {some(sets)}; give the path of one of them"
            )
        return _inside(path, sets[0])
    return Place("folder", path)


def _split(path: pathlib.Path, names: list[str]) -> Place:
    """The part of a data set to evaluate on, if there is only one."""
    fit = [name for name in names if name in EVALUATION and _folders(path / name)]
    if len(fit) == 1:
        return _inside(path, fit[0])
    which = (
        f"and several of them are for evaluation: {some(fit)}"
        if fit
        else "but none for evaluation that has class folders"
    )
    raise ValueError(
        f"{path} contains parts of a data set ({some(sorted(names))}), {which}; give the path "
        "of the folder of class folders that you mean (if these are classes, use the kind "
        "folder)"
    )


def _inside(path: pathlib.Path, name: str) -> Place:
    place = _find(path / name)
    return Place(place.kind, place.path, place.mappings, (f"{PART} {path / name}", *place.notes))


def _is_set(path: pathlib.Path) -> bool:
    """Whether a folder is a data set of its own, with classes known by name."""
    if _is_mappings(path / MAPPINGS):
        return True
    names = []
    with os.scandir(path) as entries:
        for entry in entries:  # up to the first that a data set does not have
            if not entry.name.startswith("."):
                if not (imagenet.WNID.fullmatch(entry.name) or entry.name in V2) or not entry.is_dir():
                    return False
                names.append(entry.name)
    return len(names) > 1 and (imagenet.are_wnids(names) or set(names) == V2)


def _is_mappings(folder: pathlib.Path) -> bool:
    with suppress(PermissionError):  # reported when the images of the class folder are listed
        return any((folder / name).is_file() for name in (imagenet.FOLDER_NAMES, imagenet.TO_IMAGENET))
    return False


@dataclass
class _Files:
    """The files in class folders: images with their labels, and whatever is not an image."""

    images: list[caches.File] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, root: pathlib.Path, names: list[str]) -> _Files:
        """List the files of the class folders with these names."""
        found = cls()
        for label, name in enumerate(names):
            empty = True
            for file in _files_below(root / name, found.loops):
                empty = False
                if file.suffix.lower() not in EXTENSIONS:
                    found.foreign.append(str(file))
                elif (status := _status(file)) is None:
                    found.broken.append(str(file))
                else:
                    image = caches.File(str(file.relative_to(root)), status.st_size, status.st_mtime_ns)
                    found.images.append(image)
                    found.labels.append(label)
            if empty:
                found.empty.append(name)
        return found

    def problems(self, root: pathlib.Path) -> list[str]:
        """Reasons to refuse the folder, in words."""
        found = (
            (self.empty, f"{root} has empty class folders", ""),
            (
                self.foreign,
                f"files that are not images ({', '.join(EXTENSIONS)})",
                "; move them elsewhere, or convert the images to one of these formats",
            ),
            (self.broken, "broken links, or not regular files", "; repair or remove them"),
            (self.loops, "a link to a folder that contains it, an endless loop", "; remove them"),
        )
        return [f"{what}: {some(names)}{cure}" for names, what, cure in found if names]


def _unfit(kind: Kind, root: pathlib.Path, names: list[str]) -> list[str]:
    """Problems with the classes of a known kind."""
    if kind != "imagenet":
        return []
    if other := [name for name in names if not imagenet.WNID.fullmatch(name)]:
        return [
            f"{root} has {len(names) - len(other)} folders that are WordNet ids, and others that "
            f"are not: {some(other)}"
        ]
    return []


def _about(names: list[str]) -> list[str]:
    if not imagenet.are_wnids(names):
        return []
    title = imagenet.title(names)
    return [f"its {len(names)} classes are those of {title}"] if title else []


def _gaps(numbers: list[int], folder: pathlib.Path) -> list[str]:
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return []
    missing = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    what = f"{some(missing)} missing" if missing else "a duplicate number"
    return [
        f"numbered folders in {folder} run from {numbers[0]} to {numbers[-1]} with {what}, so "
        "that labels would shift; complete or rename them"
    ]


def _open(root: pathlib.Path, files: list[caches.File], index: int) -> Image.Image:
    return open_file(root / files[index].name, files[index])


def _folders(path: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files_below(folder: pathlib.Path, loops: list[str]) -> Iterable[pathlib.Path]:
    """Yield all files, folder by folder; append links to a folder that contains them to ``loops``."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        within, inner = pathlib.Path(parent).resolve(), []
        for name in sorted(name for name in folders if not name.startswith(".")):
            link = pathlib.Path(parent, name)
            if link.is_symlink() and within.is_relative_to(link.resolve()):
                loops.append(str(link))
            else:
                inner.append(name)
        folders[:] = inner
        yield from (pathlib.Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _status(file: pathlib.Path) -> os.stat_result | None:
    """Status of a regular file, otherwise None."""
    try:
        status = file.stat()
    except OSError:  # such as a broken link
        return None
    return status if stat.S_ISREG(status.st_mode) else None
