"""Style files of matplotlib: read as text and checked, line by line; nothing in them is executed."""

from __future__ import annotations

import ast
import difflib
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import matplotlib
from cycler import Cycler
from matplotlib.rcsetup import cycler

from ..common import disk
from ..common.words import suggestion
from . import fonts, styleranges

_LARGEST = 1 << 20  # bytes
# Settings of lines, text, colours and spacing. Others run programs (text.usetex, backend, animation), name
# files or code, would undo an option (figure.figsize, savefig.format), or make files differ (svg.hashsalt).
_ALLOWED = re.compile(
    r"axes\.(axisbelow|edgecolor|facecolor|grid(\.axis|\.which)?|label\w+|linewidth|prop_cycle|spines\.\w+"
    r"|title(color|pad|size|weight)|unicode_minus|[xy]margin|formatter\.(limits|useoffset|use_mathtext))"
    r"|errorbar\.capsize|figure\.(facecolor|edgecolor|constrained_layout\.[hw]_?(pad|space))"
    r"|font\.(cursive|family|fantasy|monospace|sans-serif|serif|size|stretch|style|variant|weight)"
    r"|grid\.[\w.]+|legend\.(?!loc$)\w+|lines\.\w+|markers\.fillstyle|mathtext\.\w+|patch\.\w+"
    r"|savefig\.(dpi|edgecolor|facecolor|transparent)|text\.(antialiased|color|hinting)"
    r"|[xy]axis\.labellocation|[xy]tick\.[\w.]+"
)
_INSTEAD = {
    "figure.figsize": "use --figure-width",
    "savefig.format": "use --figure-format",
    "figure.dpi": "use savefig.dpi",
    "text.usetex": "LaTeX runs programs; mathtext.fontset: stix (or cm) draws such formulas",
}


def read(file: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read the settings of a style file.

    Args:
        file: a file as ``matplotlib.style.use`` takes it: lines of ``key: value`` with comments.

    Returns:
        Key -> value, as ``matplotlib.rcParams`` holds it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large or not UTF-8, or a line is refused: not ``key: value``, an unknown key, a
            key given twice or not allowed here, an invalid value, a number out of range, or no font of
            ``font.family`` is installed. The message lists all such lines.
    """
    found, problems = dict[str, Any](), list[str]()
    for number, line in enumerate(_text(pathlib.Path(file)).splitlines(), 1):
        key, colon, text = (part.strip() for part in _uncommented(line).partition(":"))
        if not (key or colon):
            continue
        try:
            if not (key and colon):
                raise ValueError("expected key: value")
            if key in found:
                raise ValueError(f"{key} is given twice")
            found[key] = _value(key, text)
        except (ValueError, TypeError) as error:
            problems.append(f"line {number}: {' '.join(str(error).split())}")
    if not problems and not fonts.installed(found):
        problems.append(f"font.family: none of these fonts is installed: {', '.join(found['font.family'])}")
    if problems:
        raise ValueError(f"style file {file}: {'; '.join(problems)}")
    return MappingProxyType(found)


def _text(file: pathlib.Path) -> str:
    try:
        content = disk.read_plain(file, _LARGEST + 1)
    except OSError as error:
        raise OSError(f"style file {file}: {error.strerror}") from None
    if len(content) > _LARGEST:
        raise ValueError(f"style file {file}: larger than {_LARGEST:,} bytes; is it a style file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"style file {file}: expected text in UTF-8: {error}") from None


def _uncommented(line: str) -> str:
    """The line without its comment: a ``#`` in double quotes starts none."""
    found = re.match(r'(?:[^"#]|"[^"]*"|"(?=[^"]*$))*', line)
    return found[0] if found else line


def _value(key: str, text: str) -> Any:
    settings: Any = matplotlib.RcParams()
    known = settings.validate
    if key not in known:
        near = difflib.get_close_matches(key[:60], filter(_ALLOWED.fullmatch, known), n=3, cutoff=0)
        raise ValueError(f"matplotlib has no setting {key!r}; {suggestion(key, near, 'the nearest are')}")
    if not _ALLOWED.fullmatch(key):
        raise ValueError(
            f"{key} may not be set here; {_INSTEAD.get(key, 'remove the line')} (docs/figures.md)"
        )
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        text = text[1:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a deprecated key would have no effect
        try:
            settings[key] = _cycle(text) if key == "axes.prop_cycle" else text
        except Warning as warning:
            raise ValueError(str(warning)) from None
    value = settings[key]
    styleranges.check(key, value)
    return value


def _cycle(text: str) -> Cycler[Any, Any]:
    """Read sums and products of ``cycler('color', [...])``; early versions of matplotlib evaluate them."""
    try:
        cycle = _evaluated(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"axes.prop_cycle: expected cycler('color', [...]), got {text}") from None
    if "color" not in cycle.keys:
        raise ValueError("axes.prop_cycle: expected colours, as in cycler('color', ['0072B2', 'D55E00'])")
    styleranges.check_length(cycle)
    return cycle


def _evaluated(node: ast.expr) -> Cycler[Any, Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluated(node.left) + _evaluated(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _evaluated(node.left) * _evaluated(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cycler":
        named = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
        return cycler(*map(_literal, node.args), **named)
    raise ValueError("axes.prop_cycle: expected cycler('color', [...])")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"axes.prop_cycle: expected plain values, got {ast.unparse(node)}") from None
