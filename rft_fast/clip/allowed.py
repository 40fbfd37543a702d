"""The allow-list of architecture files, whose entries become arguments of other libraries.

A file may come from anyone. It describes shapes; it cannot start a download, import code or read the user's
files. All of open_clip's own configurations pass.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm

from ..common.words import suggestion


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30


def _signed(value: Any) -> bool:
    return _number(-value if isinstance(value, int | float) and value < 0 else value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _sizes(value: Any) -> bool:
    return _number(value) or (isinstance(value, list) and 0 < len(value) < 10 and all(map(_number, value)))


def _word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]*", value, re.ASCII) is not None


def _timm(value: Any) -> bool:
    return isinstance(value, str) and (
        value == "" or (re.fullmatch(r"[\w.]+", value, re.ASCII) is not None and timm.is_model(value))
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _within(known: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(k in known and known[k](v) for k, v in value.items())


# Far above any model: larger values would take more memory or time than any machine has.
_MOST = {
    **dict.fromkeys(("width", "head_width", "embed_dim", "attn_pooler_queries"), 1 << 14),
    **dict.fromkeys(("image_size", "patch_size", "context_length"), 1 << 13),
    **dict.fromkeys(("heads", "attn_pooler_heads"), 1 << 10),
    **{"layers": 500, "mlp_ratio": 100, "vocab_size": 1 << 22},
}

# Check of a value -> what it requires, in words.
_WORDS: dict[Any, str] = {
    _number: "a finite number, at least 0",
    _signed: "a finite number",
    _flag: "true or false",
    _sizes: "a number, at least 0, or a list of such numbers",
    _word: "a word",
    _timm: "the name of a model in timm.list_models(), not of a hub or a folder",
    _text: "a string",
}
_CLEAN = re.compile("lower|canonicalize|whitespace")
_ACTIVATION = _within({"approximate": _word})
_NORM = _within({"eps": _number, "elementwise_affine": _flag, "bias": _flag})
_TOKENIZER = _within(
    {
        "clean": lambda value: _word(value) and _CLEAN.fullmatch(value) is not None,
        "strip_sep_token": _flag,
        "language": _word,
        "reduction_mask": _word,
    }
)
_WORDS[_ACTIVATION] = "an object with only approximate"
_WORDS[_NORM] = "an object with only eps, elementwise_affine and bias"
_WORDS[_TOKENIZER] = (
    "an object with only clean (lower, canonicalize, whitespace), strip_sep_token, "
    "language and reduction_mask"
)


def _table(**kinds: str) -> dict[str, Callable[[Any], bool]]:
    by_kind = {"numbers": _number, "signed": _signed, "flags": _flag, "words": _word, "sizes": _sizes}
    return {name: by_kind[kind] for kind, names in kinds.items() for name in names.split()}


_BLOCKS = "qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc"
_VISION = {
    **_table(
        sizes="image_size layers patch_size",
        numbers="width head_width mlp_ratio ls_init_value patch_dropout attn_pooler_queries "
        "attn_pooler_heads timm_drop timm_drop_path",
        flags="attentional_pool no_ln_pre final_ln_after_pool output_tokens timm_model_pretrained "
        f"timm_proj_bias {_BLOCKS}",
        words="pos_embed_type pool_type block_type timm_pool timm_proj",
    ),
    "timm_model_name": _timm,
    "act_kwargs": _ACTIVATION,
    "norm_kwargs": _NORM,
}
_TEXT = {
    **_table(
        numbers="context_length vocab_size width heads layers mlp_ratio ls_init_value pad_id eos_id",
        flags="embed_cls no_causal_mask final_ln_after_pool proj_bias output_tokens hf_model_pretrained "
        + _BLOCKS,
        words="pool_type proj_type block_type tokenizer_mode hf_proj_type hf_pooler_type",
    ),
    "hf_tokenizer_name": _text,  # checked by tokenizer()
    "hf_model_name": _text,  # refused by architectures.text
    "tokenizer_kwargs": _TOKENIZER,
    "act_kwargs": _ACTIVATION,
    "norm_kwargs": _NORM,
}
_MODEL = {
    **_table(
        numbers="embed_dim",
        signed="init_logit_bias init_logit_scale",
        flags="custom_text quick_gelu nonscalar_logit_scale",
    ),
    "vision_cfg": _within(dict.fromkeys(_VISION, lambda _: True)),
    "text_cfg": _within(dict.fromkeys(_TEXT, lambda _: True)),
    "multimodal_cfg": lambda value: isinstance(value, dict),  # never used
}


def check(model_cfg: Mapping[str, Any], where: str) -> None:
    """Check that all entries and values of a model_cfg are on the allow-list.

    Args:
        model_cfg: in open_clip's format.
        where: start of the error message.

    Raises:
        ValueError: an unknown entry, with the nearest known one; or a value that is not allowed, with what
            is.
    """
    known(model_cfg, tuple(_MODEL), f"{where} model_cfg")
    tables = (("vision_cfg", _VISION), ("text_cfg", _TEXT))
    for name, table in tables:
        if isinstance(model_cfg.get(name), dict):
            known(model_cfg[name], tuple(table), f"{where} {name}")
    for name, table in (("model_cfg", _MODEL), *tables):
        entries = model_cfg if name == "model_cfg" else model_cfg.get(name)
        for key, value in entries.items() if isinstance(entries, dict) else ():
            allowed = table[key]
            most = _MOST.get(key, math.inf)
            if value is not None and not (allowed(value) and _largest(value) <= most):
                expected = _WORDS.get(allowed, "an object of such entries")
                expected += f" up to {most}" if key in _MOST else ""
                raise ValueError(f"{where} {name}.{key} must be {expected}; got {_brief(value)}")


def _largest(value: Any) -> float:
    numbers = value if isinstance(value, list) else [value]
    return max((number for number in numbers if _number(number)), default=0)


def known(table: Iterable[str], names: tuple[str, ...], where: str) -> None:
    """Check that all entries of a table are known.

    Args:
        table: names of the entries.
        names: known names.
        where: start of the error message.

    Raises:
        ValueError: an unknown entry, with the nearest known one.
    """
    for key in table:
        if key not in names:
            raise ValueError(f"{where} has no entry {key!r}; {suggestion(key, sorted(names))}")


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def tokenizer(name: str, beside: pathlib.Path | None, where: str) -> tuple[str, bool]:
    """Locate the tokenizer that a configuration names: a folder beside it, or a repository of Hugging Face.

    Args:
        name: as in the configuration.
        beside: folder of the file; None if the configuration is not a local file.
        where: start of the error message.

    Returns:
        The real path of the folder, or the repository; and whether it is a folder.

    Raises:
        ValueError: a path outside the folder, also through a link; links or special files in it; a tokenizer
            that imports Python; neither a folder nor the name of a repository.
    """
    if beside is not None and (os.path.lexists(beside / name) or not _HUB_NAME.fullmatch(name)):
        base, folder = beside.resolve(), (beside / name).resolve()
        if not folder.is_relative_to(base) or folder == base:
            raise ValueError(
                f"{where} the tokenizer {name!r} is in {folder}, outside the folder of the file, "
                f"{base}; move its folder there"
            )
        if not folder.is_dir():
            raise ValueError(f"{where} the tokenizer {name!r}: there is no folder {folder}")
        _check_folder(folder, where)
        return str(folder), True
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{where} the tokenizer {name!r} is neither a folder beside the file nor ORG/NAME")
    if os.path.lexists(name):  # transformers would use it
        raise ValueError(
            f"{where} the tokenizer {name!r} is a repository of Hugging Face, but the working "
            "directory contains a file or folder of that name, which would be loaded instead; "
            "run the command in another directory"
        )
    return name, False


def _check_folder(folder: pathlib.Path, where: str) -> None:
    for file in sorted(folder.rglob("*")):
        mode = file.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(
                f"{where} the tokenizer's folder contains {file}, a link or special file; replace it by "
                "the file itself"
            )
        if file.suffix == ".json" and stat.S_ISREG(mode):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # transformers reports what is wrong, if it matters
            if isinstance(content, dict) and "auto_map" in content:
                raise ValueError(
                    f"{where} {file} imports Python code (auto_map), which is not supported; remove that "
                    "entry, or give the head as a file (--zeroshot-head FILE)"
                )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
