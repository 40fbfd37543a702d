"""Tokenizers of architectures, open_clip's and Hugging Face's."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from os import PathLike
from typing import Any

import open_clip

from ..checkpoints.sources import repository
from ..common.words import first_line
from . import allowed
from .architectures import HUB, config, text_config


class NotHere(ValueError):
    """A tokenizer is not on this machine, and must not be downloaded."""


def tokenizer(arch: str | PathLike[str], network: bool | None = None) -> Any:
    """Return the tokenizer of an architecture: strings -> int64 [n, context].

    Args:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        network: whether a tokenizer of Hugging Face may be downloaded. None: only that of an open_clip model
            name, or of the repository that ``arch`` is, not one that a file names.

    Raises:
        NotHere: it would have to be downloaded, and must not.
        ValueError: it cannot be loaded (Hugging Face's need the package transformers), does not fit the
            model's vocabulary, or a file must not name it (:func:`rft_fast.clip.allowed.tokenizer`).
    """
    label, model_cfg, _ = config(arch)
    text_cfg = text_config(label, model_cfg)
    context = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if name := text_cfg.get("hf_tokenizer_name"):
        return _of_hugging_face(label, name, context, text_cfg.get("tokenizer_mode"), options, network)
    try:
        simple = open_clip.SimpleTokenizer(context_length=context, **options)
    except Exception as error:  # options of a configuration can cause any error
        raise ValueError(f"arch: open_clip cannot build the tokenizer of {label}: {error}") from error
    vocabulary = text_cfg.get("vocab_size", 49408)
    if vocabulary != simple.vocab_size:
        raise ValueError(
            f"arch: {label} has a vocabulary of {vocabulary} tokens and names no tokenizer, but "
            f"the tokenizer of CLIP has {simple.vocab_size}, so that its prompts cannot be "
            "tokenised; give the head as a file (--zeroshot-head FILE)"
        )
    return simple


def _of_hugging_face(
    label: str, name: str, context: int, mode: str | None, options: Mapping[str, Any], network: bool | None
) -> Any:
    """Load a tokenizer of transformers, from the local cache first."""
    of, revision = repository(label) or ("", None)
    own, local = label in open_clip.list_models(), False
    if not own:
        beside = None if label.startswith(HUB) else pathlib.Path(label).parent
        name, local = allowed.tokenizer(name, beside, f"arch: {label}:")
        own = name == of
    if local:
        network = False
    elif network is None:
        network = own
    problem = Exception()
    pinned = {"revision": revision} if revision and name == of else {}
    for offline in (True, False) if network else (True,):
        try:
            return open_clip.tokenizer.HFTokenizer(
                name,
                context,
                tokenizer_mode=mode,
                **options,
                **pinned,
                local_files_only=offline,
                trust_remote_code=False,
            )
        except Exception as error:  # of the network, the hub or transformers, which may be missing
            problem = error
    failure = (
        f"arch: {label} needs the tokenizer {name!r} of Hugging Face, which could not be loaded: "
        f"{first_line(problem)}."
    )
    other = "or give the head as a file (--zeroshot-head FILE)"
    if local:
        raise ValueError(f"{failure} Install transformers, {other}") from problem
    if network:
        remedy = "Install transformers and download it once while online"
        raise ValueError(f"{failure} {remedy}, {other}") from problem
    raise NotHere(
        f"{failure} It is downloaded only on request: install transformers, then run hf "
        f"download {name} or use --fetch, {other}"
    ) from problem
