"""Class names and templates, and the tokens of their prompts."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm

from ..common import files
from ..common.words import some
from ..names import list_file
from . import tokenizers

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_STL10 = "airplane bird car cat deer dog horse monkey ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
    dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
    road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""

# In the order of the labels. ImageNet's are OpenAI's; two of these occur twice.
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(open_clip.IMAGENET_CLASSNAMES),
    "cifar10": tuple(_CIFAR10.split()),
    "cifar100": tuple(name.replace("_", " ") for name in _CIFAR100.split()),
    "stl10": tuple(_STL10.split()),
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "photo": ("a photo of a {}.",),
}


@dataclass(frozen=True)
class Prompts:
    """Prompts of a zero-shot head: every class in every template.

    Attributes:
        class_names: in the order of the head's rows.
        templates: each with one ``{}`` for the class name.

    Raises:
        ValueError: either is empty or not a tuple of strings, a name is blank, or a template has not exactly
            one ``{}``.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES["photo"]

    def __post_init__(self) -> None:
        for what, values in (("class names", self.class_names), ("templates", self.templates)):
            if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
                raise ValueError(f"Prompts: {what} must be a tuple of strings, got {values!r}")
            if not values:
                raise ValueError(f"Prompts: there are no {what}; at least one is needed")
        if not all(name.strip() for name in self.class_names):
            raise ValueError("Prompts: a class name is empty")
        for template in self.templates:
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ValueError(
                    "Prompts: a template must have exactly one {}, in place of the class name; got "
                    f"{template!r}"
                )

    def of(self, index: int) -> list[str]:
        """Return the prompts of one class.

        Args:
            index: of the class.
        """
        return [template.replace("{}", self.class_names[index]) for template in self.templates]


def class_names(source: str) -> tuple[str, ...]:
    """Return class names in the order of the head's rows.

    Args:
        source: ``imagenet``, ``cifar10``, ``cifar100`` or ``stl10``; or a file in UTF-8 with one name per
            line, or (``*.json``) a list of strings.

    Raises:
        ValueError: an unknown source (the message has the nearest); or a file that is empty, malformed, or
            has a blank line or a repeated name, which would shift the rows.
    """
    if source in CLASS_NAMES:
        return CLASS_NAMES[source]
    names = _read("class names", source, tuple(CLASS_NAMES))
    twice = sorted(
        name
        for name, count in Counter(unicodedata.normalize("NFKC", name) for name in names).items()
        if count > 1
    )
    if twice:
        raise ValueError(
            f"class names: {source} has {some(twice)} more than once; class names must be distinct"
        )
    return Prompts(names).class_names


def templates(source: str) -> tuple[str, ...]:
    """Return templates of prompts, each with one ``{}`` for the class name.

    Args:
        source: ``openai`` (the 80 of OpenAI's ImageNet evaluation), ``simple`` (7 of these), ``photo`` ("a
            photo of a {}."), or a file as for :func:`class_names`.

    Raises:
        ValueError: an unknown source (the message has the nearest), a malformed file or template.
    """
    if source in TEMPLATES:
        return TEMPLATES[source]
    texts = _read("templates", source, tuple(TEMPLATES))
    try:
        return Prompts(("any",), texts).templates
    except ValueError as error:
        raise ValueError(f"templates: {source}: {error}") from None


def tokens(arch: str | PathLike[str], prompts: Prompts, network: bool | None = None) -> Tensor:
    """Tokenise prompts for the text tower of an architecture.

    Args:
        arch: as for :func:`rft_fast.clip.architectures.config`.
        prompts: classes and templates.
        network: as for :func:`rft_fast.clip.tokenizers.tokenizer`.

    Returns:
        int64 [classes, templates, context].

    Raises:
        ValueError: the tokenizer cannot be loaded, or a prompt is longer than the context, which open_clip
            would truncate.
    """
    tokenizer = tokenizers.tokenizer(arch, network)
    rows = []
    for index in tqdm(range(len(prompts.class_names)), "tokenising prompts", disable=None, leave=False):
        texts = prompts.of(index)
        row = tokenizer(texts)
        # The last column is padding unless a prompt fills the context or exceeds it.
        if isinstance(tokenizer, open_clip.SimpleTokenizer) and row[:, -1].any():
            _refuse_long(tokenizer, texts, row.shape[1])
        rows.append(row)
    return torch.stack(rows)


def _refuse_long(tokenizer: open_clip.SimpleTokenizer, texts: Sequence[str], context: int) -> None:
    for prompt in texts:
        length = len(tokenizer.encode(prompt)) + 2  # tokens of start and end
        if length > context:
            raise ValueError(
                f"tokens: the prompt {prompt!r} has {length} tokens, more than the context of "
                f"{context}; shorten the class name or the template"
            )


def _read(what: str, source: str, known: Sequence[str]) -> tuple[str, ...]:
    file = list_file(what, source, known)
    try:
        text = files.read_text(file, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: {source} is not text in UTF-8: {error}") from error
    if file.suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what}: {source} is not valid JSON: {error}") from error
        if not isinstance(content, list) or not all(isinstance(entry, str) for entry in content):
            raise ValueError(f"{what}: {source} must hold a list of strings")
        lines = [entry.strip() for entry in content]
    else:
        lines = [line.strip() for line in text.rstrip().split("\n")]
    if not any(lines):
        raise ValueError(f"{what}: {source} is empty")
    if "" in lines:
        raise ValueError(
            f"{what}: {source}: entry {lines.index('') + 1} is empty, which would shift all later "
            "classes; complete or remove it"
        )
    return tuple(lines)
