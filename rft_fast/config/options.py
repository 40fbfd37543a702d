"""The command line of ``python -m rft_fast.sweep``: its help, and which words are studies and zoo."""

from __future__ import annotations

import difflib
import os
import pathlib
import re
from collections import deque
from collections.abc import Sequence

from .. import catalogue
from ..common import program
from ..common.fields import Entry
from .builder import Builder, fits
from .settings import builder

DESCRIPTION = """\
Measure fine-tuned CLIP models along the straight line in weight space from
their zero-shot model (alpha = 0) to each of them (alpha = 1). A run leaves
rows, figures and a summary in a directory.

studies of the paper (default: all; what a named study needs runs, too):
{studies}

ZOO is a .toml file that names models and data, or a folder with a zoo.toml.
Without a zoo and without own models, the digits zoo of rft_fast is used.
"""

DETAILS = """\
Studies, a zoo and options may come in any order. A list of values, as for
--alphas, ends at the name of a study and at a zoo, unless that is its first
value or one of the choices of the option. docs/zoo.md describes zoo files.
"""

EXAMPLES = """\
examples:
  python -m rft_fast.sweep
  python -m rft_fast.sweep my-zoo interpolation layers --samples 2000 --plan
  python -m rft_fast.sweep --arch ViT-B-32-quickgelu --zeroshot openai \\
      --class-names imagenet --finetuned soup/model_*.pt \\
      --id-data imagenet=imagenet/val --data sketch=sketch --samples 5000
"""


def parser(options: Builder | None = None) -> program.Parser:
    """The options, without the words of :func:`split`.

    Args:
        options: None: those of the sweep.
    """
    listed = []
    for default in (True, False):
        texts = {each.name: each.help for each in catalogue.studies() if each.by_default == default}
        listed.append(program.listed(texts) if texts else "")
    studies, named = listed
    if named:
        studies += f"\n\nstudies beyond the paper, which run where they are named:\n{named}"
    top = program.parser(
        "sweep",
        usage="python -m rft_fast.sweep [ZOO] [STUDY ...] [options]",
        description=DESCRIPTION.format(studies=studies),
        details=DETAILS,
        epilog=EXAMPLES,
    )
    (options or builder()).add_to(top)
    return top


def split(argv: Sequence[str], options: Builder) -> tuple[list[str], list[str], list[str]]:
    """The studies and zoos of a command line, and the rest of it: options with their values.

    Args:
        argv: a command line; words and options may come in any order.

    Raises:
        ValueError: a word that is neither, or may be a study as well as a file.
    """
    words: list[str] = []
    rest: list[str] = []
    left = deque(argv)
    while left:
        word = left.popleft()
        if word == "--":
            words += left
            break
        if not _is_option(word):
            words.append(word)
            continue
        if word.partition("=")[0] not in options.strings:
            return [], [], [word]  # help, or an error: what comes behind may be values of it
        rest.append(word)
        entry = options.entries.get(word[2:])
        if entry is None or entry.flag:  # none: --no-NAME, or the value is behind "="
            continue
        values = 0
        while left and not _is_option(left[0]) and not (values and _ends(entry, left[0])):
            rest.append(left.popleft())
            values += 1
            if entry.option.many is None:
                break
    zoos = [word for word in words if word not in catalogue.names() and _may_be_zoo(word)]
    studies = [_study(word) for word in words if word not in zoos]
    return studies, zoos, rest


def _is_option(word: str) -> bool:
    """As argparse has it: numbers below 0, and what has a space in it, are none."""
    return len(word) > 1 and word[0] == "-" and " " not in word and not _NEGATIVE.fullmatch(word)


_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")


def _ends(entry: Entry, word: str) -> bool:
    """Whether the list of an option's values ends before a word, which is not its first."""
    option = entry.option
    if word in catalogue.names():
        if option.paths:
            if os.path.exists(word):
                raise ValueError(
                    f"argument --{entry.name}: {word} is the name of a study, and of a file here; write "
                    f"./{word} for the file, or name the study before --{entry.name}"
                )
            return True
        return option.choices is None or word not in option.choices
    if option.paths:
        return word.endswith(".toml") and "=" not in word
    is_zoo = word.endswith(".toml") or pathlib.Path(word, "zoo.toml").is_file()
    return is_zoo and (option.check is None or not fits(entry, word))


def _may_be_zoo(word: str) -> bool:
    return word.endswith(".toml") or pathlib.Path(word).is_dir()


def _study(word: str) -> str:
    if word not in (names := catalogue.names()):
        near = difflib.get_close_matches(word, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
        raise ValueError(f"argument STUDY: there is no study {word!r}; {hint}")
    return word
