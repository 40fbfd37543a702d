"""What packages load, and that commands read their arguments before they load anything large."""

from __future__ import annotations

import ast
import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import rft_fast
from rft_fast import names, program
from rft_fast.options import parser

PACKAGE = Path(rft_fast.__file__).parent
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


def loaded(code: str, status: int = 0) -> set[str]:
    """The modules that a fresh interpreter has when it ends, with that exit status."""
    last = "atexit.register(lambda: print(json.dumps([*sys.modules]), file=sys.stderr))"
    code = f"import atexit, json, sys\n{last}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def of_command(name: str, *words: str, status: int) -> set[str]:
    """The modules of a command that ends before it measures anything."""
    run = f"runpy.run_module('rft_fast.{name}', run_name='__main__')"
    return loaded(f"import runpy, sys\nsys.argv = ['x', *{words!r}]\n{run}", status)


def test_the_package_loads_nothing_large_and_shows_what_is_public() -> None:
    code = "import rft_fast as rft\nassert dir(rft) == sorted(rft.__all__), dir(rft)"
    assert not loaded(code) & (HEAVY | {"numpy"})


def test_kernels_load_torch_and_numpy_alone_and_register_their_operator() -> None:
    use = "rft.write_, rft.Plan, torch.ops.rft_fast.write_.default"
    modules, torchs = (
        loaded(f"import torch, rft_fast as rft, rft_fast.kernels\n{use}"),
        loaded("import torch, numpy"),
    )
    assert "torch" in modules & HEAVY
    assert {name.partition(".")[0] for name in modules - torchs} - sys.stdlib_module_names == {"rft_fast"}


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
        ("sweep", "interpolatoin"),
        ("sweep", "--precision fp8"),
        ("finetune", "--lr x"),
        ("datasets", ""),
        ("results", ""),
        ("report", ""),
        ("checkpoints", ""),
    ],
)
def test_what_is_refused_is_refused_before(name: str, line: str) -> None:
    assert not of_command(name, *line.split(), status=2) & HEAVY


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
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_names_are_those_that_something_is_done_for() -> None:
    from rft_fast import studies, trackers
    from rft_fast.datasets import KINDS
    from rft_fast.evaluate.precision import PRECISIONS
    from rft_fast.finetune.training import AUTOCAST
    from rft_fast.finetune.work import DTYPES
    from rft_fast.kernels.registry import BACKENDS

    choices = {action.dest: action.choices for action in parser()._actions}
    assert choices["impl"] == ("auto", *BACKENDS)
    assert choices["precision"] == tuple(PRECISIONS) == names.PRECISIONS
    assert choices["estimator"] == ("auto", *studies.ESTIMATORS)
    assert tuple(KINDS) == names.KINDS
    assert tuple(AUTOCAST) == names.MIXED and tuple(DTYPES) == names.STORED
    assert choices["track"] == tuple(trackers._CLIENTS)
