"""Settings: one field is an option of the command line, of a zoo and of config.json; words in any order."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import tiny_zoo
from support.tiny_zoo import own_models, sweep_refused
from support.toy_study import Halfway
from support.wording import command_refused, refused

from rft_fast import catalogue, results, sweep
from rft_fast.common.fields import Group, Tree, option
from rft_fast.common.numeric import positive
from rft_fast.config import recorded, request
from rft_fast.config.builder import COMMAND, ZOO, Builder
from rft_fast.config.settings import Computed, Models, Running, builder
from rft_fast.finetune.__main__ import main as finetune
from rft_fast.merge.__main__ import main as merge
from rft_fast.results import directory
from rft_fast.settings import Along, Layers, Prune, Sharpness


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_zoo.make(tmp_path_factory.mktemp("zoo"))


def zoo_file(folder: Path, *options: str) -> Path:
    lines = ['name = "tiny"', 'arch = "tiny.json"', 'zeroshot = "zeroshot.safetensors"', "[finetuned]"]
    lines += ['a = "a.safetensors"', "[data.far]", 'path = "far.npz"', "[options]", *options]
    (folder / "zoo.toml").write_text("\n".join(lines))
    return folder / "zoo.toml"


# --- an option is one field -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Toy:
    """Settings of a study that is not the paper's."""

    GROUP: ClassVar = Group("toy", place=("settings", "toy"))

    turns: int = option(
        3,
        "how often it turns (default: %(default)s)",
        common="turns (default: 3)",
        metavar="N",
        check=positive,
    )
    loud: bool = option(True, "be silent", name="no-noise-at-all")


class Toys(Halfway):
    name = "toys"
    help = "what is no study of the paper"
    options = Toy


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_TABLE", {**catalogue._TABLE, "toys": Toys()})


@pytest.mark.usefixtures("toys")
def test_a_new_field_is_an_option_everywhere(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--help-all"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--turns N how often it turns (default: 3)" in printed and "--no-noise-at-all be silent" in printed
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--turns N turns (default: 3)" in printed and "--no-noise-at-all" not in printed

    file = zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo")), "turns = 4", "no-noise-at-all = true")
    assert request.read([]).of(Toy) == Toy()
    assert request.read([str(file)]).of(Toy) == Toy(4, False)
    assert request.read([str(file), "--turns", "5"]).of(Toy) == Toy(5, False)
    sweep_refused(["--turns", "0"], "--turns")
    zoo_file(file.parent, "turns = 0")
    sweep_refused([str(file)], file, "options.turns")
    zoo_file(file.parent, "turms = 4")
    sweep_refused([str(file)], "options.turms")

    words = ["interpolation", *own_models(zoo), "--alphas", "0", "1", "--device", "cpu", "--quiet"]
    words += ["--out", str(tmp_path / "run")]
    assert sweep.main([*words, "--turns", "6"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["toy"] == {"turns": 6, "loud": True}
    sweep_refused(words, "--turns", "6", "3")


@pytest.mark.usefixtures("toys")
def test_runs_from_before_an_option_have_its_default(tmp_path: Path) -> None:
    config = {"settings": {"along": {"xi": 0.1}}}
    with results.Run(tmp_path, config):
        pass
    there = results.recorded(tmp_path)
    assert there is not None and there["settings"]["toy"] == {"turns": 3, "loud": True}
    assert there["settings"]["along"]["xi"] == 0.1


def test_two_fields_of_one_option_are_refused() -> None:
    with refused(ValueError):
        Builder([Along, Along])


def test_what_is_no_number_is_refused_in_words() -> None:
    command_refused(finetune, ["--lr", "1e-5", "abc"], "--lr", "number", "'abc'")
    command_refused(finetune, ["--epochs", "1.5"], "--epochs", "integer", "'1.5'")
    command_refused(merge, ["dare", "--seed", "x"], "--seed", "integer", "'x'")


def test_a_tree_holds_settings_by_class() -> None:
    tree = Tree(Along(seed=3))
    assert tree.of(Along).seed == 3 and tree.of(Prune) == Prune()
    changed = tree.but(Along(seed=4), Prune(keep=0.1))
    assert (changed.of(Along).seed, changed.of(Prune).keep, tree.of(Along).seed) == (4, 0.1, 3)
    assert tree == Tree(Along(seed=3)) != changed


def test_json_gives_the_tree_back() -> None:
    options = builder()
    tree = options.tree(
        {
            ZOO: {"layer-draws": 5, "xi": 0.5},
            COMMAND: {"xi": 0.25, "alphas": (0.0, 0.5, 1.0), "layers": ("a", "b"), "no-control": False},
        }
    )
    assert tree.of(Along).xi == 0.25 and tree.of(Layers).alphas == (0.0, 0.5, 1.0)
    assert (tree.giver("xi"), tree.giver("layer-draws"), tree.giver("seed")) == (COMMAND, ZOO, "")
    config = json.loads(json.dumps(options.as_json(tree)))
    assert options.of_json(config) == tree
    assert set(config) == {"settings", "run"}
    studies = {"layers", "sharpness", "prune", "cumulative", "coefficients"}
    assert set(config["settings"]) == {"along", *studies, "computed"}


def test_defaults_pass_their_own_checks() -> None:
    """What the help calls the default is what the option makes of it."""
    for name, entry in builder().entries.items():
        values = entry.default if entry.option.many else (entry.default,)
        if entry.flag or entry.default in (None, ()):
            continue
        assert entry.option.choices is None or set(values) <= set(entry.option.choices), name
        if entry.option.whole is not None:
            assert entry.option.whole(list(values)) == entry.default, name


# --- runs of earlier versions -----------------------------------------------------------------------------

PROTOCOL = {"estimator": "plain", "on": "interpolated", "noise": "uniform", "adaptive": False, "seed": 2}
PROTOCOL |= {"noise_batch": 128, "goal": 0.1, "most": 500}
FLAT: dict[str, Any] = {
    "measured": ["sharpness"], "alphas": [0.0, 1.0], "samples": 7, "seed": 2, "xi": 0.1,
    "granularity": "block", "layers": ["a"], "models": None, "layer_alphas": [0.0, 0.5, 1.0],
    "others": "finetuned", "straggler_margin": 0.2, "sharpness_alphas": [1.0], "rhos": [0.5], "draws": 8,
    "layer_draws": 6, "normalize_logits": True, "general": PROTOCOL, "zero_margin": 0.3, "keep": 0.25,
    "layerwise": {**PROTOCOL, "estimator": "gradient", "on": "finetuned"}, "criteria": ["instability"],
    "prune_layers": ["b"], "methods": ["magnitude"], "mask_seeds": [2, 3, 4, 5], "control": False,
    "precision": "ieee", "graphs": False, "compile": True, "skip_unreadable": True, "batch_size": 5,
    "memory_limit": 99, "impl": "native", "device": "cpu", "layer images": {"far": 39},
    "sharpness images": {"near": 12}, "options of the zoo": ["--xi", "0.1"], "zoo": "tiny",
}  # fmt: skip


def test_a_flat_configuration_becomes_the_tree() -> None:
    found = recorded.upgraded(FLAT)
    tree = recorded.tree_of(found)
    assert tree.of(Along) == Along((0.0, 1.0), 7, 2, 0.1)
    assert tree.of(Layers) == Layers(
        "block", ("a",), None, ("far",), 39, (0.0, 0.5, 1.0), "finetuned", straggler_margin=0.2
    )
    assert tree.of(Sharpness) == Sharpness(
        (0.5,),
        8,
        6,
        (1.0,),
        ("near",),
        12,
        "auto of an earlier version (shared noise)",  # type: ignore[arg-type]
        None,
        "uniform",
        False,
        128,
        1,
        None,
        True,
        0.1,
        500,
        0.3,
    )
    assert tree.of(Prune) == Prune(("instability",), ("b",), 0.25, ("magnitude",), 4, False)
    assert tree.of(Computed) == Computed("native", 5, "ieee", False, True, "cpu", 99, True)
    left = {"measured", "zoo", "layer images", "sharpness images", "settings"}
    assert set(found) == left and recorded.upgraded(found) == found
    one = recorded.upgraded(FLAT | {"layerwise": PROTOCOL})  # one estimator, and one place, for both
    assert recorded.tree_of(one).of(Sharpness).estimator == "plain"
    assert recorded.tree_of(one).of(Sharpness).on == "interpolated"


def test_what_is_no_sweeps_configuration_is_left_alone() -> None:
    assert recorded.upgraded({"alphas": [0, 1], "xi": 3}) == {"alphas": [0, 1], "xi": 3}


# --- words in any order -----------------------------------------------------------------------------------


def test_words_and_options_in_any_order(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_models(zoo)  # it ends with the values of --id-data
    asked = request.read([*own, "interpolation", "--data", f"b={zoo / 'far.npz'}", "layers"])
    assert asked.studies == ["interpolation", "layers"] and set(asked.zoo.data) == {"far", "b", "near"}
    file = str(zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo"))))
    for where in (file, str(tmp_path / "zoo")):
        asked = request.read(["--alphas", "0", ".5", "1", where, "--xi", "0.1", "prune"])
        assert asked.zoo.name == "tiny" and asked.of(Along).alphas == (0, 0.5, 1)
        assert asked.studies == ["prune"]
    asked = request.read(["--layers", "visual.conv1", "layers"])
    assert asked.of(Layers).layers == ("visual.conv1",) and asked.studies == ["layers"]
    asked = request.read(["--layers", "layers", "--xi=0.1", "layers"])  # the first value is one
    assert asked.of(Layers).layers == ("layers",) and asked.studies == ["layers"]
    asked = request.read(["--criteria", "sharpness", "prune", "--", "layers"])
    assert asked.of(Prune).criteria == ("sharpness",) and asked.studies == ["layers", "prune"]
    asked = request.read(["--criteria", "instability", "sharpness"])
    assert asked.of(Prune).criteria == ("instability", "sharpness") and len(asked.studies) == 7
    monkeypatch.chdir(zoo)
    asked = request.read([*own[:-2], "--finetuned", "c.safetensors", "sharpness", "--no-graphs", "layers"])
    assert list(asked.zoo.finetuned) == ["a", "b", "c"] and asked.studies == ["layers", "sharpness"]


def test_a_file_with_the_name_of_a_study_is_refused_with_the_cure(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    shutil.copy(folder / "a.safetensors", folder / "layers")
    monkeypatch.chdir(folder)
    models = ["--arch", "tiny.json", "--zeroshot", "zeroshot.safetensors", "--data", "far.npz"]
    sweep_refused([*models, "--finetuned", "b.safetensors", "layers"], "./layers")
    asked = request.read(["interpolation", *models, "--finetuned", "b.safetensors", "./layers"])
    assert list(asked.zoo.finetuned) == ["b", "layers"]


def test_data_go_by_the_name_of_their_folder(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ["--arch", "../tiny.json", "--zeroshot", "../zeroshot.safetensors"]
    models += ["--finetuned", "../a.safetensors", "--out", "../run"]  # not among the images
    monkeypatch.chdir(zoo / "near")
    asked = request.read([*models, "--data", ".", "../far.npz", f"x={zoo}/near", "interpolation"])
    assert list(asked.zoo.data) == ["near", "far", "x"] and asked.zoo.data["near"].path == Path(".")
    clash = [*models, "--data", "../near", "--id-data", "."]
    sweep_refused(clash, "NAME=PATH")
    sweep_refused([*models, "--data", "/"], "NAME=/")
    sweep_refused([*models, "--data", "nowhere"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--sampels", "3"], "did you mean --samples?"),
        (["--nothing-like-it"], "--help-all lists all options"),
        (["--xi", "2"], "--help lists the options"),
        (["interpolatoin"], "--help lists the options"),
    ],
)
def test_an_error_is_a_line_and_a_hint(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep.main(words)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("sweep: error: ") and second.startswith("(") and hint in second


# --- what gives way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words", "kind", "field", "value", "notice"),
    [
        (
            ["sharpness-alphas = [0, 0.2, 1]"], "--alphas 0:1:3", Sharpness, "alphas", (0, 1),
            "option sharpness-alphas of the zoo 'tiny' (0, 0.2, 1) is overridden by --alphas: 0, 1",
        ),
        (["sharpness-alphas = [0.2]"], "--alphas 0 1", Sharpness, "alphas", (0, 1), "by --alphas: 0, 1"),
        (["layer-draws = 5"], "--estimator per-image-antithetic", Sharpness, "layer_draws", 6, "(5) is"),
        (["layer-draws = 3"], "--goal-se 0.1", Sharpness, "layer_draws", 4, "by --goal-se: 4"),
        ([], "--goal-se 0.1 --draws 2000", Sharpness, "max_draws", 4000, "the default of --max-draws (1000)"),
        (["goal-se = 0.1"], "--estimator apgd-l2", Sharpness, "goal_se", None, "apgd-l2: none"),
        (
            ['estimator = "apgd-l2"', "restarts = 4"], "--estimator plain", Sharpness, "restarts", 1,
            "option restarts of the zoo 'tiny' (4) is overridden by --estimator plain: 1",
        ),
        (['prune-layers = "re:.*"'], "--criteria sharpness", Prune, "layers", None, "by --criteria: none"),
    ],
)  # fmt: skip
def test_what_nobody_said_gives_way(
    zoo: Path, tmp_path: Path, options: list[str], words: str, kind: type, field: str, value: Any, notice: str
) -> None:
    file = zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo")), *options)
    asked = request.read([str(file), "sharpness", "layer-sharpness", "prune", *words.split()])
    assert getattr(asked.of(kind), field) == value
    assert len(asked.notices) == 1 and notice in asked.notices[0]


@pytest.mark.parametrize(
    ("options", "words", "facts"),
    [
        (
            ["sharpness-alphas = [0.55]"],
            "",
            "tiny 0.55",
        ),
        ([], "--sharpness-alphas 0.55", "--sharpness-alphas 0.55"),
        (['estimator = "per-image-antithetic"'], "--draws 5", "6 tiny"),
        ([], "--restarts 2 --estimator hessian", "--restarts 2 'hessian' apgd-l2"),
        (['layer-data = "nowhere"'], "", "tiny"),
        (['models = "x"'], "", "tiny x"),
        (['layers = "visual.conv2"'], "", "tiny"),
    ],
)
def test_what_cannot_give_way_is_explained(
    zoo: Path, tmp_path: Path, options: list[str], words: str, facts: str,
) -> None:  # fmt: skip
    file = zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo")), *options)
    sweep_refused(
        [str(file), *words.split(), "--out", str(tmp_path / "run"), "--device", "cpu"], *facts.split()
    )


def test_what_gives_way_decides_what_is_measured(zoo: Path, tmp_path: Path) -> None:
    file = str(zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo")), 'prune-layers = "re:.*"'))
    assert request.read([file, "prune"]).measured == ["interpolation", "prune"]
    asked = request.read([file, "prune", "--criteria", "instability"])
    assert asked.measured == ["interpolation", "layers", "prune"]


def test_nothing_is_said_where_it_does_not_matter() -> None:
    assert request.read(["--alphas", "0:1:3", "interpolation"]).notices == ()
    (notice,) = request.read(["--alphas", "0:1:3"]).notices
    assert notice.startswith("option sharpness-alphas of the zoo 'digits' (0, 0.2, 0.6, 1)")


@pytest.mark.slow
def test_what_gave_way_is_said_by_the_run_and_by_its_plan(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo")), "sharpness-alphas = [0.5]")
    words = [str(file), "sharpness", "--alphas", "0", "1", "--draws", "2", "--device", "cpu"]
    assert sweep.main([*words, "--plan"]) == 0
    assert "is overridden by --alphas: 0, 1" in " ".join(capsys.readouterr().out.split())
    assert sweep.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("is overridden by --alphas: 0, 1") == 1
    assert "is overridden by --alphas: 0, 1" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(("words", "size"), [("", 128), ("--noise-batch all", None), ("--noise-batch 9", 9)])
def test_images_that_share_noise(words: str, size: int | None) -> None:
    assert request.read(["sharpness", *words.split()]).of(Sharpness).noise_batch == size


@pytest.mark.parametrize(
    ("estimator", "coupling", "now"),
    [
        ("auto", "shared", "auto of an earlier version (shared noise)"),
        ("auto", "image", "auto of an earlier version (noise per image)"),
        ("gradient", "shared", "gradient"),
        ("gradient", "image", "per-image-gradient"),
        ("plain", "image", "per-image"),
        ("hessian", "shared", "hessian"),
    ],
)
def test_estimators_of_earlier_versions_have_their_present_names(
    estimator: str, coupling: str, now: str
) -> None:
    own = {"estimator": estimator, "coupling": coupling, "noise_batch": None}
    found = recorded.upgraded({"settings": {"sharpness": own}})
    assert recorded.tree_of(found).of(Sharpness).estimator == now
    assert recorded.upgraded(found) == found


def test_a_run_whose_estimator_no_option_names_cannot_be_resumed(tmp_path: Path) -> None:
    own = {"estimator": "auto", "coupling": "shared", "noise_batch": None}
    there = recorded.upgraded({"settings": {"sharpness": own}})
    now = builder().as_json(builder().tree({}))
    unlike = directory.differences(there, {**there, **now})
    assert [text.partition(":")[0] for text in unlike] == ["--estimator", "--noise-batch"]
    assert unlike[1] == "--noise-batch: all in the run, 128 requested"
    with refused(results.Mismatch, tmp_path, "earlier version", "auto requested", "--out", "--overwrite"):
        raise directory.mismatch(tmp_path, unlike, {})


def test_a_rho_to_be_found_is_called_auto() -> None:
    there, now = (builder().as_json(builder().tree({COMMAND: {"rhos": rhos}})) for rhos in ((), (0.1,)))
    assert directory.differences(there, now) == ["--rhos: auto in the run, [0.1] requested"]


# --- options without effect -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "option", "facts"),
    [
        ("sharpness --max-draws 50", "max-draws", "--goal-se"),
        ("sharpness --goal-se 0.1 --max-draws 50", None, ""),
        ("layer-sharpness --exclude re:.*bias", "exclude", "sharpness"),
        ("sharpness --exclude re:.*", None, ""),
        ("sharpness --estimator apgd-l2 --noise uniform", "noise", "apgd-l2"),
        ("sharpness --estimator hessian --noise uniform", None, ""),
        ("sharpness --estimator apgd-l2 --noise-batch 64", None, ""),
        ("interpolation --draws 5", "draws", "layer-sharpness"),
        ("interpolation --layers re:.*", "layers", "prune"),
        ("sharpness --layer-draws 5", "layer-draws", "layer-sharpness"),
        ("layer-sharpness --draws 5", None, ""),
        ("correlation --layer-draws 5", None, ""),
        ("layers --keep 0.3", "keep", "prune"),
        ("layer-sharpness --layer-samples 9", "layer-samples", "layers"),
        ("prune --criteria sharpness --prune-layers re:.*", "criteria", "--prune-layers"),
        ("prune --methods magnitude --no-control --mask-seeds 5", "mask-seeds", "magnitude"),
        ("prune --methods magnitude --mask-seeds 5", None, ""),
        ("layers --cumulative last", "cumulative", "(cumulative does)"),
        ("cumulative --cumulative last --layer-alphas 0 1 --layer-samples 9", None, ""),
        ("cumulative --others finetuned", "others", "(layers does)"),
        ("prune --methods magnitude zero --mask-seeds 5", None, ""),
    ],
)
def test_options_without_effect_are_said(words: str, option: str | None, facts: str) -> None:
    notices = request.read(words.split()).notices
    found = [notice for notice in notices if "has no effect" in notice]
    assert len(found) == (option is not None)
    if option is not None:
        assert found[0].startswith(f"--{option} has") and facts in found[0]


def test_options_without_effect_for_one_reason_are_one_sentence() -> None:
    notices = request.read(
        "interpolation --rhos 0.1 --draws 5 --methods zero --layer-samples 9".split()
    ).notices
    assert [notice for notice in notices if "no effect" in notice] == [
        "--layer-samples has no effect: no requested study uses it (layers, cumulative, prune do)",
        "--rhos, --draws have no effect: no requested study uses them (sharpness, layer-sharpness do)",
        "--methods has no effect: no requested study uses it (prune does)",
    ]


def test_options_of_a_zoo_may_be_for_other_studies(zoo: Path, tmp_path: Path) -> None:
    file = zoo_file(Path(shutil.copytree(zoo, tmp_path / "zoo")), "max-draws = 50", "keep = 0.3")
    assert request.read([str(file), "interpolation"]).notices == ()


def test_models_and_running_settings_are_no_zoos_to_give() -> None:
    for name, entry in builder().entries.items():
        if entry.kind in (Models, Running):
            assert entry.option.own or entry.group.own, name
