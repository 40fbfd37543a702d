"""``--paper``: the paper's choices, what wins over them, and the table of departures in the documentation."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support import tiny_zoo
from support.tiny_zoo import own_models, sweep_refused

from rft_fast import sweep
from rft_fast.catalogue import names
from rft_fast.config import paper, request
from rft_fast.config.builder import Builder
from rft_fast.config.options import split
from rft_fast.config.settings import builder
from rft_fast.settings import Along, Layers, Prune, Sharpness
from rft_fast.studies import COLUMNS, summarize

PAGE = (Path(__file__).parents[2] / "docs" / "paper.md").read_text("utf-8")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def zoo_file(zoo: Path, folder: Path, *options: str, data: str = "far", ood: str = "true") -> str:
    folder = Path(shutil.copytree(zoo, folder / "zoo"))
    lines = ['name = "tiny"', 'arch = "tiny.json"', 'zeroshot = "zeroshot.safetensors"', "[finetuned]"]
    lines += ['a = "a.safetensors"', "[data]", f'{data} = {{ path = "far.npz", ood = {ood} }}']
    file = folder / "zoo.toml"
    file.write_text("\n".join([*lines, "[options]", *options]))
    return str(file)


def test_the_papers_choices() -> None:
    asked = request.read(["--paper"])
    grid = tuple(i / 10 for i in range(11))
    along, layers, sharpness, prune = (asked.of(kind) for kind in (Along, Layers, Sharpness, Prune))
    assert along.paper and along.samples is None and along.alphas == pytest.approx(grid)
    assert layers.alphas == sharpness.alphas == along.alphas
    assert (layers.reference, layers.others, layers.samples) == ("models", "zeroshot", 7500)
    assert (sharpness.estimator, sharpness.rhos, sharpness.draws, sharpness.layer_draws) == (
        "plain", (1.0,), 20, 20,
    )  # fmt: skip
    assert (sharpness.noise_batch, sharpness.samples, sharpness.adaptive, sharpness.on) == (
        128, 1024, True, None,
    )  # fmt: skip
    assert (prune.criteria, prune.methods, prune.keep, prune.control) == (
        ("sharpness",), ("zero",), 0.5, False,
    )  # fmt: skip
    data, gone = asked.notices
    assert layers.data == sharpness.data == ("rotated",) and "--layer-data" in data and "rotated" in data
    for was in ("sharpness-alphas (0, 0.2, 0.6, 1)", "draws (4)", "layer-samples (500)"):
        assert was in gone
    assert not request.read([]).of(Along).paper


@pytest.mark.parametrize("name", ["a", "ImageNet-A", "imagenet_a"])
def test_imagenet_a_is_found_by_its_name(zoo: Path, tmp_path: Path, name: str) -> None:
    files = own_models(zoo)
    files[files.index("--data") + 1 : files.index("--id-data")] = [
        f"far={zoo / 'far.npz'}", f"{name}={zoo / 'far.npz'}",
    ]  # fmt: skip
    asked = request.read([*files, "--paper"])
    assert asked.of(Layers).data == asked.of(Sharpness).data == (name,) and asked.notices == ()


def test_imagenet_a_is_found_by_its_folder(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "near", tmp_path / "imagenet-a")
    files = [*own_models(zoo), "--data", f"hard={tmp_path / 'imagenet-a'}"]
    assert request.read([*files, "--paper"]).of(Layers).data == ("hard",)


@pytest.mark.parametrize(
    ("words", "kind", "field", "value", "facts"),
    [
        ("--rhos 0.1", Sharpness, "rhos", (0.1,), ["--rhos", "(0.1)", "Figures 3 and 4", "1"]),
        ("--estimator hessian", Sharpness, "estimator", "hessian", ["(hessian)", "Equation 3", "plain"]),
        ("--sharpness-data mnist", Sharpness, "data", ("mnist",), ["(mnist)", "rotated"]),
        ("--criteria instability", Prune, "criteria", ("instability",), ["(instability)", "sharpness"]),
        ("--draws 5", Sharpness, "layer_draws", 5, ["--draws", "(5)", "20"]),
        ("--alphas 0 .5 1", Sharpness, "alphas", (0, 0.5, 1), ["--alphas", "(0, 0.5, 1)"]),
        ("--no-adaptive", Sharpness, "adaptive", False, ["--no-adaptive replaces", "|w|"]),
        ("--noise-batch all", Sharpness, "noise_batch", None, ["--noise-batch", "(all)", "128"]),
    ],
)
def test_an_option_beside_it_wins_and_says_so(
    words: str, kind: type, field: str, value: object, facts: list[str]
) -> None:
    asked = request.read(["--paper", *words.split()])
    assert getattr(asked.of(kind), field) == value
    (notice,) = (text for text in asked.notices if "replaces" in text)
    assert all(fact in notice for fact in facts), notice


def test_the_same_value_beside_it_says_nothing() -> None:
    asked = request.read(["--paper", "--estimator", "plain", "--rhos", "1", "--layer-data", "rotated"])
    assert not [text for text in asked.notices if "replaces" in text]


def test_a_zoo_may_ask_for_it(zoo: Path, tmp_path: Path) -> None:
    file = zoo_file(zoo, tmp_path, "paper = true", "draws = 6", data="imagenet-a")
    asked = request.read([file, "--rhos", "0.5"])
    own = asked.of(Sharpness)
    assert asked.of(Along).paper and own.estimator == "plain" and own.data == ("imagenet-a",)
    assert (own.draws, own.layer_draws, own.rhos) == (6, 6, (0.5,))  # its own options, and the command line's
    draws, rhos = sorted(asked.notices)[::-1]
    assert "option draws of the zoo 'tiny' (6)" in draws and "argument --rhos (0.5)" in rhos


def test_without_data_out_of_distribution_it_is_refused(zoo: Path, tmp_path: Path) -> None:
    sweep_refused([zoo_file(zoo, tmp_path, ood="false"), "--paper"], "--paper", "far", "--data")


@pytest.mark.slow
def test_it_is_recorded_and_runs(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layers", "prune", *own_models(zoo), "--paper", "--draws", "2", "--alphas", "0", "0.5", "1"]
    words += ["--device", "cpu"]
    assert sweep.main([*words, "--plan"]) == 0
    assert "replaces the paper's choice (draws, Figure 3): 20" in " ".join(capsys.readouterr().out.split())
    assert sweep.main([*words, "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["along"]["paper"] is True and settings["sharpness"]["estimator"] == "plain"
    assert "replaces the paper's choice (draws, Figure 3): 20" in (tmp_path / "run" / "run.log").read_text()


# --- the documentation ------------------------------------------------------------------------------------


def table() -> list[tuple[str, ...]]:
    _, _, after = PAGE.partition("| definition | paper | here | option |\n")
    lines = after.partition("\n\n")[0].splitlines()[1:]
    return [tuple(cell.strip().replace("`", "") for cell in line.strip("| ").split("|")) for line in lines]


@pytest.fixture
def options() -> Builder:
    return builder()


def test_the_table_of_departures_is_that_of_the_defaults(options: Builder) -> None:
    documented = [row for row in table() if row[3].startswith("--")]
    assert sorted(documented) == sorted(row for row in paper.departures(options))


def test_departures_without_an_option_name_the_column_of_the_estimate() -> None:
    others = [row[3] for row in table() if not row[3].startswith("--")]
    assert len(others) == 3
    for what in others:
        found = re.fullmatch(r"column (\w+)", what)
        assert found and (found[1] in COLUMNS or f"``{found[1]}``" in str(summarize.__doc__))


def test_a_default_that_departs_would_be_found(options: Builder) -> None:
    # The defaults, by hand: where they are the paper's there is no row, where they are not there is one.
    told = {row[3].split()[0].removeprefix("--") for row in paper.departures(options)}
    same = {"alphas", "samples", "granularity", "others", "rhos", "draws", "noise", "no-adaptive", 
            "noise-batch", "sharpness-samples", "keep", "methods", "exclude", "normalize-logits"}  # fmt: skip
    assert {each.option for each in paper.CHOICES} >= same and not same & told
    assert {"estimator", "reference", "criteria", "no-control", "layer-data", "sharpness-data"} <= told


def test_the_commands_ask_for_the_papers_figures_on_their_data(options: Builder) -> None:
    block = PAGE.partition("## 2. The figures")[2].partition("```bash\n")[2].partition("```")[0]
    commands = [line.partition("#")[0] for line in block.splitlines() if line.startswith("python -m")]
    assert len(commands) >= 10
    for command in commands:
        studies, zoos, rest = split(shlex.split(re.sub(r"\$\w+", "", command))[3:], options)
        assert "--paper" in rest and not zoos and set(studies) <= set(names())
        if {"layers", "prune"} & set(studies) or not studies:
            assert rest[rest.index("--layer-data") + 1] == "a"
        if {"sharpness", "layer-sharpness", "prune"} & set(studies) or not studies:
            assert rest[rest.index("--sharpness-data") + 1] == "a"
