"""Arrows between modules point one way, those that only type checkers follow among them."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterable, Mapping

import pytest

import rft_fast

ROOT = pathlib.Path(rft_fast.__file__).parent
Arrows = Mapping[str, Iterable[str]]


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted name -> file, of all modules of a package."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def typed(tree: ast.Module) -> list[ast.ImportFrom]:
    """What a face imports for type checkers: where the names are at home that it gives when they are used."""
    blocks = [node for node in tree.body if isinstance(node, ast.If) and "lazy.face(" in ast.unparse(node)]
    return [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]


def absolute(node: ast.ImportFrom, package: str) -> str:
    """The dotted name of what an import is from."""
    above = package.rsplit(".", node.level - 1)[0] if node.level else ""
    return ".".join(filter(None, (above, node.module)))


def arrows(root: pathlib.Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports: at its top, in functions, under TYPE_CHECKING.

    ``from package import name`` leads to the module of that name, to the module where a face has it from, or
    else to the package itself.
    """
    files = modules(root)
    trees = {module: ast.parse(file.read_text("utf-8")) for module, file in files.items()}
    homes = {
        f"{package}.{alias.asname or alias.name}": absolute(line, package)
        for package, tree in trees.items()
        for line in typed(tree)
        for alias in line.names
    }
    found: dict[str, set[str]] = {module: set() for module in files}
    for module, tree in trees.items():
        package = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
        face = typed(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node not in face:
                home = absolute(node, package)
                for alias in node.names:
                    name = f"{home}.{alias.name}"
                    found[module].add(name if name in files else homes.get(name, home))
        found[module] &= files.keys()
    return found


def circles(arrows: Arrows) -> list[list[str]]:
    """Groups of modules each of which leads to all others of its group (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in arrows.get(name, ()):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in arrows.get(name, ()):
                found.append(sorted(group))

    for name in arrows:
        if name not in number:
            visit(name)
    return found


@pytest.mark.slow
def test_no_module_leads_back_to_itself() -> None:
    assert circles(arrows(ROOT)) == []


# The table of studies and what they are made of, whose modules are imported when a study runs.
UNDER_WAY = "rft_fast.catalogue"


@pytest.mark.slow
def test_no_package_leads_back_to_itself() -> None:
    found: dict[str, set[str]] = {}
    for module, others in arrows(ROOT).items():
        if module not in ("rft_fast", *commands()):  # a command may know all packages
            own = first_package(module)
            found.setdefault(own, set()).update(
                {first_package(other) for other in others} - {own, "rft_fast"}
            )
    assert [group for group in circles(found) if UNDER_WAY not in group] == []


def commands() -> list[str]:
    return [module for module in modules(ROOT) if module.endswith(".__main__")]


def first_package(module: str) -> str:
    """The package or module of rft_fast that it is in."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from . import b", "b": "from .c import x", "c": ""}, []),
        ({"a": "from .b import x", "b": "def f():\n    from . import a"}, [["p.a", "p.b"]]),
        ({"a": "import p.b", "b": "if TYPE_CHECKING:\n    from .a import A"}, [["p.a", "p.b"]]),
        (
            {"a": "from .q import x", "q/__init__": "from . import b", "q/b": "from ..a import x"},
            [["p.a", "p.q", "p.q.b"]],
        ),
        (
            {
                "__init__": "if T:\n    from .a import A\nelse:\n    x = lazy.face(1)",
                "a": "from . import b",
                "b": "from . import A",
            },
            [["p.a", "p.b"]],
        ),
        (
            {
                "__init__": "if T:\n    from .a import A\nelse:\n    x = lazy.face(1)",
                "a": "from . import version",
            },
            [],
        ),
        ({"a": "from . import a"}, [["p.a"]]),
    ],
)
def test_circles_are_found(
    tmp_path: pathlib.Path, files: Mapping[str, str], expected: list[list[str]]
) -> None:
    for name, text in ({"__init__": ""} | dict(files)).items():
        file = tmp_path / "p" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert circles(arrows(tmp_path / "p")) == expected
