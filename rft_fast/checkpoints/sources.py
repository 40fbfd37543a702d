"""Sources of a zero-shot model: a file, a pretrained tag of open_clip, or a Hugging Face repository."""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Sequence
from contextlib import suppress

from ..common.words import first_line
from .activation import OPEN_CLIP, TRANSFORMERS
from .folders import located

# Neither part may contain "..", which would leave the cache's directories.
_HUB = re.compile(r"hf-hub:(\w[\w.-]*/\w[\w.-]*)(?:@((?!.*\.\.)\w[\w./-]*))?", re.ASCII)
# In order of preference: open_clip's files, then those of transformers.
_HUB_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


def check_source(source: str, arch: str) -> None:
    """Check the form of a source, without using the network.

    Args:
        source: a file, ``hf-hub:org/name`` or ``hf-hub:org/name@revision``, or a pretrained tag that
            open_clip lists for ``arch`` (``open_clip.list_pretrained_tags_by_model``). An existing file takes
            precedence.
        arch: a model name of open_clip.

    Raises:
        ValueError: it is none of these; the message lists the nearest tags.
    """
    if pathlib.Path(source).exists():
        located(source)
        return
    if _HUB.fullmatch(source):
        return
    if source.startswith("hf-hub:"):
        raise ValueError(f"{source!r} must be hf-hub:org/name or hf-hub:org/name@revision")
    if "/" in source or pathlib.Path(source).suffix in (".pt", ".pth", ".bin", ".pkl", ".safetensors"):
        raise ValueError(f"there is no file {source}")
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(arch)
    if open_clip.is_pretrained_cfg(arch, source):
        return
    if not tags:
        raise ValueError(
            f"{source!r} is not a file, and open_clip has no pretrained weights for "
            f"{arch!r}; give a file or hf-hub:ORG/NAME"
        )
    near = difflib.get_close_matches(source, tags, n=3, cutoff=0.4) or tags[:6]
    raise ValueError(
        f"{source!r} is neither a file nor a pretrained tag of {arch}; did you mean "
        f"{', '.join(near)}? open_clip.list_pretrained_tags_by_model({arch!r}) lists all {len(tags)}"
    )


def repository(source: str) -> tuple[str, str | None] | None:
    """Split ``hf-hub:org/name@revision`` into name and revision (None if missing); None for other sources."""
    match = _HUB.fullmatch(source)
    return (match[1], match[2]) if match else None


def fetch(source: str, arch: str, network: bool = True) -> pathlib.Path:
    """Return the local file of a source.

    Args:
        source: as for :func:`check_source`.
        arch: as for :func:`check_source`.
        network: whether to download it if needed, and to check that the cached version is current.

    Raises:
        ValueError: as :func:`check_source`; the download fails; or, without ``network``, it is not on this
            machine.
    """
    check_source(source, arch)
    if pathlib.Path(source).exists():
        return located(source, "fetch")
    if not network:
        if (local := cached(source, arch)) is None:
            raise ValueError(f"fetch: {source!r} of {arch} is not on this machine; --fetch downloads it")
        return local
    hub = _HUB.fullmatch(source)
    file = _from_hub(hub[1], hub[2]) if hub else _from_open_clip(source, arch)
    if not file.is_file():
        raise ValueError(f"fetch: {source!r} of {arch} was downloaded to {file}, but there is no such file")
    return file


def cached(source: str, arch: str) -> pathlib.Path | None:
    """Return the local file of a source without using the network; None if it is not on this machine.

    Args:
        source: as for :func:`check_source`.
        arch: as for :func:`check_source`.
    """
    if pathlib.Path(source).exists():
        return located(source, "cached")
    if hub := _HUB.fullmatch(source):
        return in_cache(hub[1], _HUB_FILES, hub[2])
    import open_clip

    known = open_clip.get_pretrained_cfg(arch, source)
    repository, _, name = known.get("hf_hub", "").rpartition("/")
    if repository:  # as open_clip does: safetensors first
        name = name or _HUB_FILES[1]
        safe = _HUB_FILES[0] if name == _HUB_FILES[1] else str(pathlib.Path(name).with_suffix(".safetensors"))
        return in_cache(repository, (safe, name))
    file = pathlib.Path("~/.cache/clip", known.get("url", "").rpartition("/")[2]).expanduser()
    return file if file.is_file() else None


def in_cache(repository: str, names: Sequence[str], revision: str | None = None) -> pathlib.Path | None:
    """Find a file of a repository in the local cache of huggingface_hub.

    Args:
        repository: ``org/name``.
        names: files, in order of preference.
        revision: branch, tag or commit; None: the default branch.

    Returns:
        Path of the first file that is cached; None if none is.
    """
    from huggingface_hub import try_to_load_from_cache

    files = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return next((pathlib.Path(file) for file in files if isinstance(file, str)), None)


def commit(file: pathlib.Path) -> str | None:
    """Return the commit of a file in the cache of huggingface_hub; None for other files."""
    whole = file.parent.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", file.parent.name)
    return file.parent.name if whole else None


def _from_hub(repository: str, revision: str | None) -> pathlib.Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing: Exception | None = None
    for name in _HUB_FILES:
        try:
            file = pathlib.Path(hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError as error:  # offline: another file may be cached
            missing = error
            continue
        except EntryNotFoundError:
            continue
        except Exception as error:  # client and network raise many kinds of errors
            raise ValueError(_offline(f"hf-hub:{repository}", error)) from error
        # The configuration, for evidence of activations; not every repository has it.
        beside = OPEN_CLIP if name.startswith("open_clip") else TRANSFORMERS
        with suppress(Exception):
            hf_hub_download(repository, beside, revision=commit(file) or revision)
        return file
    if missing is not None:
        raise ValueError(_offline(f"hf-hub:{repository}", missing)) from missing
    raise ValueError(
        f"fetch: hf-hub:{repository} has none of {', '.join(_HUB_FILES)}; download its "
        "weights and give their path"
    )


def _from_open_clip(tag: str, arch: str) -> pathlib.Path:
    import open_clip

    config = open_clip.get_pretrained_cfg(arch, tag)
    try:
        target = open_clip.download_pretrained(config)
    except Exception as error:
        raise ValueError(_offline(f"{tag!r} of {arch}", error)) from error
    if not target:
        raise ValueError(
            f"fetch: open_clip has no download for the tag {tag!r} of {arch}; give the path of a file"
        )
    return pathlib.Path(target)


def _offline(what: str, error: Exception) -> str:
    return (
        f"fetch: {what} is not on this machine and cannot be downloaded ({first_line(error)[:200]}). "
        "Offline: download it once with a network and copy the cache (HF_HOME, ~/.cache/clip), or give "
        "the path of the file"
    )
