"""What packages load, what commands load before they read arguments, and plans, which encode nothing."""

from __future__ import annotations

import ast
import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from support import tiny_zoo
from support.wording import refused

import rft_fast
from rft_fast import checkpoints, names, sweep
from rft_fast.clip import prompts
from rft_fast.clip.endpoints import Ends, Setup
from rft_fast.common import meter, program
from rft_fast.config.options import parser
from rft_fast.run import cost

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(rft_fast.__file__).parent
ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "pandas",
    "scipy",
    "pyarrow",
    "PIL",
    "torchvision",
    "open_clip",
    "timm",
    "matplotlib",
    "plotly",
    "tqdm",
    "huggingface_hub",
    "safetensors",
    "sklearn",
    "ray",
}
FACES = [
    ".".join(["rft_fast", *init.parent.relative_to(PACKAGE).parts])
    for init in sorted(PACKAGE.rglob("__init__.py"))
    if "lazy.face(" in init.read_text("utf-8")
]


def loaded(code: str, status: int = 0, folder: Path | None = None) -> set[str]:
    """The modules of a fresh interpreter, started in that folder, when it ends with that exit status."""
    last = "atexit.register(lambda: print(json.dumps([*sys.modules]), file=sys.stderr))"
    code = f"import atexit, json, sys\n{last}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == status, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def of_command(name: str, *words: str, status: int, folder: Path | None = None) -> set[str]:
    """The modules of a command that ends before it measures anything."""
    run = f"runpy.run_module('rft_fast.{name}', run_name='__main__')"
    return loaded(f"import runpy, sys\nsys.argv = ['x', *{words!r}]\n{run}", status, folder)


def test_every_package_is_installed() -> None:
    """Those that pyproject.toml names, which an installation in place does not need."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {init.parent.relative_to(ROOT) for init in (ROOT / "rft_fast").rglob("__init__.py")}
    assert listed == sorted(".".join(folder.parts) for folder in folders)


def test_the_package_loads_nothing_large_and_shows_what_is_public() -> None:
    code = "import rft_fast as rft\nassert dir(rft) == sorted(rft.__all__), dir(rft)"
    assert not loaded(code) & (HEAVY | {"numpy"})


@pytest.mark.slow
def test_kernels_load_torch_and_numpy_alone_and_register_their_operator() -> None:
    use = "rft.write_, rft.Plan, torch.ops.rft_fast.write_.default"
    modules, torchs = (
        loaded(f"import torch, rft_fast as rft, rft_fast.kernels\n{use}"),
        loaded("import torch, numpy"),
    )
    assert "torch" in modules & HEAVY
    assert {name.partition(".")[0] for name in modules - torchs} - sys.stdlib_module_names == {"rft_fast"}


@pytest.mark.slow
def test_rows_are_read_without_models_or_images() -> None:
    code = "import rft_fast.results as results\nresults.load, results.recover, results.Run, results.Damaged"
    modules = loaded(code)
    assert "pandas" in modules
    assert not modules & {"torchvision", "open_clip", "timm", "PIL", "matplotlib"}


@pytest.mark.parametrize("name", program.COMMANDS)
@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--version", 0), ("--no-such-option", 2)])
def test_commands_answer_before_they_load_anything_large(name: str, word: str, status: int) -> None:
    assert not of_command(name, word, status=status) & HEAVY


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sweep", "--samples x"),
        ("sweep", "--rhos -1"),
        ("sweep", "--alphas 0:1:1"),
        ("sweep", "--alphas 0 2"),
        ("sweep", "--alphas .5 1"),
        ("sweep", "--rhos .1 .1"),
        ("sweep", "--keep 0"),
        ("sweep", "--goal-se .1 --max-draws 3"),
        ("sweep", "--quiet --json"),
        ("sweep", "--models nobody"),
        ("sweep", "--layer-data nowhere"),
        ("sweep", "--head-scale 0"),
        ("sweep", "interpolatoin"),
        ("sweep", "--arch ViT-B-32"),
        ("sweep", "--arch ViT-B-32 --zeroshot nowhere.pt --finetuned nowhere.pt --data a=nowhere"),
        ("sweep", "nowhere.toml"),
        ("sweep", "--precision fp8"),
        ("sweep", "--device gpu"),
        ("sweep", "--estimator per-image-antithetic --draws 5"),
        ("sweep", "--class-names imagnet"),
        ("sweep", "--class-names imagenet --templates opnai"),
        ("sweep", "--sharpness-alphas .55"),
        ("sweep", "--arch ViT-B-32 --zeroshot openai --finetuned setup.py --data nowhere"),
        ("sweep", "--data-labels uci=nowhere.json"),
        ("finetune", "--lr x"),
        ("finetune", "--arch a --zeroshot b --train c --out d --lr -1"),
        ("finetune", "--arch a --zeroshot b --train c --out d --val a=x a=y"),
        ("datasets", ""),
        ("results", ""),
        ("report", ""),
        ("checkpoints", ""),
    ],
)
def test_what_is_refused_is_refused_before(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "setup.py").touch()  # else an empty folder: `report` alone draws the newest run that it finds
    assert not of_command(name, *line.split(), status=2, folder=tmp_path) & HEAVY


def test_help_takes_no_time() -> None:
    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare = seconds("-c", "import argparse, json")  # some 0.03 s; torch alone takes sixty times as long
    assert seconds("-m", "rft_fast.sweep", "--help") < 20 * bare


@pytest.mark.parametrize("package", FACES)
def test_faces_say_what_their_imports_say(package: str) -> None:
    """The names that type checkers read are those that the package gives when it runs."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__ or "").read_text("utf-8"))
    typed = {}
    for block in tree.body:
        if isinstance(block, ast.If):
            assert ast.unparse(block.test) == "TYPE_CHECKING"
            for line in block.body:
                assert isinstance(line, ast.ImportFrom)
                home = "." * line.level + (line.module or "")
                typed |= {alias.asname or alias.name: home for alias in line.names}
    assert typed.keys() <= set(module.__all__) and dir(module) == sorted(module.__all__)
    modules = {file.stem for file in Path(module.__file__ or "").parent.glob("*.py")}
    for name in module.__all__:
        value = getattr(module, name)
        if name in typed and not isinstance(value, type(sys)):
            home = importlib.import_module(typed[name], package)
            assert value is getattr(home, name)
            assert name not in modules, "importing the module would hide what is public"
    with refused(AttributeError, "no_such_name"):
        _ = module.no_such_name


def test_names_are_those_that_something_is_done_for() -> None:
    from rft_fast import studies
    from rft_fast.datasets import KINDS
    from rft_fast.evaluate.precision import PRECISIONS
    from rft_fast.finetune.losses import AUTOCAST
    from rft_fast.finetune.work import DTYPES
    from rft_fast.kernels.registry import BACKENDS
    from rft_fast.run import trackers

    choices = {action.dest: action.choices for action in parser()._actions}
    assert choices["impl"] == ("auto", *BACKENDS)
    assert choices["precision"] == tuple(PRECISIONS) == names.PRECISIONS
    assert choices["estimator"] == ("auto", *studies.ESTIMATORS)
    assert tuple(KINDS) == names.KINDS
    assert tuple(prompts.CLASS_NAMES) == names.CLASS_LISTS
    assert tuple(prompts.TEMPLATES) == names.TEMPLATE_LISTS
    assert tuple(AUTOCAST) == names.MIXED and tuple(DTYPES) == names.STORED
    assert choices["track"] == tuple(trackers._CLIENTS)


# --- a plan needs the shapes of heads alone ---------------------------------------------------------------

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}
MODEL = {"embed_dim": 6, "vision_cfg": tiny_zoo.ARCH["model_cfg"]["vision_cfg"], "text_cfg": TEXT}
CLASSES = 3


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIPs without a head: two fine-tuned from one, one of another text tower alone; and one with a head."""
    folder = tiny_zoo.make(tmp_path_factory.mktemp("clips"))
    (folder / "clip.json").write_text(json.dumps({**tiny_zoo.ARCH, "model_cfg": MODEL}))
    (folder / "names.txt").write_text("cat\ndog\nfish\n")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = open_clip.CLIP(**MODEL).state_dict()
        states = {"zero": base, "one": moved(base), "two": moved(base)}
        states["text"] = base | {k: v for k, v in moved(base).items() if k.startswith("transformer.")}
        states["headed"] = moved(base) | {"classification_head.weight": torch.randn(CLASSES, 6)}
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    return folder


def moved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}


def planned(folder: Path, finetuned: list[str], *more: str) -> list[str]:
    models = [str(folder / f"{name}.pt") for name in finetuned]
    return [
        *("interpolation", "--arch", str(folder / "clip.json"), "--zeroshot", str(folder / "zero.pt")),
        *("--finetuned", *models, "--data", f"far={folder / 'far.npz'}", "--alphas", "0", "1"),
        *("--class-names", str(folder / "names.txt"), "--templates", "simple", "--device", "cpu", *more),
    ]


@pytest.mark.parametrize(
    ("finetuned", "head", "heads"),
    [
        (["one", "two"], "interpolate", 3),
        (["one", "two", "headed"], "interpolate", 3),
        (["text"], "interpolate", 2),  # the image towers are the same, the heads are not
        (["one", "two"], "zeroshot", 1),
        (["one", "two", "headed"], "finetuned", 2),
    ],
)
def test_a_plan_encodes_no_prompts_and_counts_them(
    clips: Path,
    finetuned: list[str],
    head: str,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = planned(clips, finetuned, "--head", head)
    monkeypatch.setattr(open_clip.transformer.TextTransformer, "forward", lambda *_: pytest.fail("it ran"))
    assert sweep.main([*words, "--plan"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("prompts"))
    assert line.split()[:3] == [
        "prompts",
        str(heads),
        f"{heads * CLASSES * len(prompts.TEMPLATES['simple'])}",
    ]


@pytest.mark.slow
def test_the_count_is_what_a_run_encodes(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, tables = planned(clips, ["one", "headed"]), []
    table = cost.table
    monkeypatch.setattr(cost, "table", lambda *rest: tables.append(rest[-1]) or table(*rest))
    assert sweep.main([*words, "--plan"]) == 0
    encode, encoded, flops = open_clip.transformer.TextTransformer.forward, [], []

    def forward(tower: Any, tokens: torch.Tensor) -> Any:
        encoded.append(len(tokens))
        flops.append(meter.measure(lambda: encode(tower, tokens)).flops)
        return encode(tower, tokens)

    monkeypatch.setattr(open_clip.transformer.TextTransformer, "forward", forward)
    assert sweep.main([*words, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert tables[0].prompts == sum(encoded) and tables[0].heads == 2
    # All but the projection of a prompt's last token, which is small in any tower but this one.
    projections = 2 * sum(encoded) * TEXT["width"] * MODEL["embed_dim"]
    assert tables[0].flops == pytest.approx(sum(flops) - projections, rel=0.01)


def test_a_plan_refuses_what_a_run_refuses(clips: Path) -> None:
    """A fine-tuned end that is the zero-shot one, text tower and all, which stand-ins must not hide."""
    tiny_zoo.sweep_refused([*planned(clips, ["zero"]), "--plan"])


def test_the_same_text_tower_has_the_same_stand_in(clips: Path) -> None:
    chosen = prompts.Prompts(("cat", "dog"), prompts.templates("photo"))
    states = {name: checkpoints.load(clips / f"{name}.pt") for name in ("zero", "one")}
    ends = Ends(Setup(str(clips / "clip.json"), prompts=chosen), states["zero"], stand_ins=True)
    (a, b), (_, c) = ends.pair(states["one"]), ends.pair(states["zero"])
    first, last, again = (state["classification_head.weight"] for state in (a, b, c))
    assert first.shape == (2, 6) and torch.equal(first, again) and not torch.equal(first, last)
    real = Ends(Setup(str(clips / "clip.json"), prompts=chosen), states["zero"]).pair(states["one"])[0]
    assert real["classification_head.weight"].dtype == first.dtype
    norms = [head.norm(dim=1) for head in (real["classification_head.weight"], first)]
    torch.testing.assert_close(*norms)


@pytest.mark.slow
def test_former_names_of_modules_still_import_with_a_warning() -> None:
    code = (
        "import importlib, warnings\n"
        "for name in ('architectures', 'classifier', 'endpoints', 'prompts'):\n"
        "    with warnings.catch_warnings(record=True) as said:\n"
        "        warnings.simplefilter('always')\n"
        "        former = importlib.import_module(f'rft_fast.{name}')\n"
        "        assert former is importlib.import_module(f'rft_fast.clip.{name}')\n"
        "    ours = [w.category for w in said if 'rft_fast.clip' in str(w.message)]\n"
        "    assert ours == [DeprecationWarning], ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
