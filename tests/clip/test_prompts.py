"""Class names, templates and tokens against open_clip's own."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from support.wording import refused

from rft_fast.clip import prompts
from rft_fast.clip.prompts import Prompts


def test_builtin_templates_say_what_open_clips_functions_say() -> None:
    for source, functions in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        got = Prompts(("Saint Bernard",), prompts.templates(source))
        assert got.of(0) == [function("Saint Bernard") for function in functions]
    assert [len(prompts.templates(source)) for source in ("openai", "simple")] == [80, 7]
    assert prompts.templates("photo") == ("a photo of a {}.",)


def test_builtin_class_names() -> None:
    assert prompts.class_names("imagenet") == tuple(open_clip.IMAGENET_CLASSNAMES)
    for source, count in (("cifar10", 10), ("cifar100", 100), ("stl10", 10)):
        names = prompts.class_names(source)
        assert len(names) == len(set(names)) == count
        assert list(names) == sorted(names)  # as these data sets number them
    assert prompts.class_names("cifar100")[1] == "aquarium fish"


@pytest.mark.parametrize(
    "content",
    ["tench\ngreat white shark", "tench\ngreat white shark\n\n", "\ufefftench\r\n great white shark \r\n"],
)
def test_names_from_text_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content.encode())
    assert prompts.class_names(str(file)) == ("tench", "great white shark")


def test_names_from_json_and_templates_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps(["b", "a {curly} one"]))
    assert prompts.class_names(str(file)) == ("b", "a {curly} one")
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}.\nthe {} of it\n")
    got = Prompts(prompts.class_names(str(file)), prompts.templates(str(templates)))
    assert got.of(1) == ["a a {curly} one.", "the a {curly} one of it"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ""),
        ("a.txt", " \n\n"),
        ("a.txt", "a\n\nb\n"),
        ("a.txt", "a\nb\na\n"),
        ("a.txt", "caf\u00e9\nb\ncafe\u0301\n"),
        ("a.txt", b"\xff\xfe"),
        ("a.json", "["),
        ("a.json", '{"a": 1}'),
        ("a.json", "[1]"),
        ("a.json", '["a", ""]'),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(ValueError) as caught:
        prompts.class_names(str(file))
    assert str(caught.value).startswith(f"class names: {file}")


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{0}", "a {c} of {}", "}{"])
def test_bad_templates(tmp_path: Path, template: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(f"a {{}}.\n{template}\n")
    with refused(ValueError) as caught:
        prompts.templates(str(file))
    assert repr(template) in str(caught.value)


def test_unknown_sources_come_with_the_nearest() -> None:
    with refused(ValueError, "imagnet", "imagenet"):
        prompts.class_names("imagnet")
    with refused(ValueError, "8"):
        prompts.templates("8")


def test_bad_prompts() -> None:
    for bad in (
        ((),),
        (("a", " "),),
        (("a",), ()),
        (["a"],),
    ):
        with refused(ValueError):
            Prompts(*bad)  # type: ignore[arg-type]


def test_tokens() -> None:
    asked = Prompts(("tench", "great white shark", "goldfish"), ("a photo of a {}.", "the {}!"))
    got = prompts.tokens("ViT-B-32", asked)
    assert got.dtype == torch.int64 and got.shape == (3, 2, 77)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for c, name in enumerate(asked.class_names):
        assert torch.equal(got[c], tokenizer([f"a photo of a {name}.", f"the {name}!"]))


def test_prompts_are_not_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "arch.json"

    def tokens(context: int) -> torch.Tensor:
        config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"context_length": context}}
        file.write_text(json.dumps(config))
        return prompts.tokens(file, Prompts(("dog", "tench")))

    longest = open_clip.SimpleTokenizer()(["a photo of a tench."]).count_nonzero()
    assert tokens(int(longest)).shape == (2, 1, longest)
    with refused(ValueError, "a photo of a tench.", int(longest)) as caught:
        tokens(int(longest) - 1)
    assert f"context of {longest - 1}" in str(caught.value)
