"""Describe a checkpoint, or check whether two are the ends of one path."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import checkpoints
from ..common import program
from ..common.tables import labelled
from ..common.words import many, visible
from ..names import FORMATS, Format
from ..path import layers
from .canonical import HEAD_WEIGHT, INERT

if TYPE_CHECKING:
    from torch import Tensor


@program.command("checkpoints")
def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        0; 1 for two files that cannot be ends of one path; 2 for a file that cannot be read.
    """
    parser = program.parser("checkpoints", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="checkpoint to describe")
    parser.add_argument(
        "other",
        metavar="FILE2",
        nargs="?",
        help="second checkpoint, to check whether both can be the ends of one path",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), help="expected format of FILE (default: any)")
    parser.add_argument(
        "--key",
        metavar="NAME",
        help=(
            "which weights of FILE and FILE2 to use if a file has several, such as state_dict_ema or teacher"
        ),
    )
    parser.add_argument(
        "--base",
        metavar="FILE",
        help="base weights for FILE or FILE2, if it is a LoRA adapter of peft",
    )
    parser.add_argument(
        "--unrelated",
        action="store_true",
        help=("accept checkpoints that were not fine-tuned from each other, as --unrelated of the sweep"),
    )
    options = parser.parse_args(arguments)
    try:
        files = [file for file in (options.file, options.other) if file is not None]
        if options.base is not None and not any(map(checkpoints.is_adapter, files)):
            raise ValueError(
                "--base has no effect: expected a LoRA adapter (adapter_model.safetensors or .bin, with "
                f"adapter_config.json beside it), got {' and '.join(files)}; leave it out"
            )
        first = _read(options.file, options.format, options.key, options.base)
        if options.other is None:
            print(describe(first))
            given = (("--key", options.key), ("--base", options.base))
            how = [word for pair in given if pair[1] is not None for word in pair]
            print(program.next_step("checkpoints", Path(options.file), "FILE2", *how))
            return 0
        second = _read(options.other, None, options.key, options.base)
    except (OSError, ValueError) as error:
        print(program.failure(parser.prog, error), file=sys.stderr)
        return 2
    lineage = checkpoints.compare(first, second, options.unrelated)
    for letter, checkpoint in (("a", first), ("b", second)):
        print(f"{letter}           {checkpoint.file} ({checkpoint.format})")
    print(lineage)
    if lineage.problems:
        return 1
    ends = ("--zeroshot", options.file, "--finetuned", options.other)
    print(program.next_step("merge", "interpolate", *ends, "--alpha", 0.5, "--out", "merged.safetensors"))
    return 0


def _read(file: str, format: Format | None, key: str | None, base: str | None) -> checkpoints.Checkpoint:
    if base is None or not checkpoints.is_adapter(file):
        return checkpoints.read(file, format, key)
    return checkpoints.read(file, format, base=checkpoints.load(base, key=key))


def describe(checkpoint: checkpoints.Checkpoint) -> str:
    """Describe a checkpoint: format, sizes, towers, head, layers with shapes, notes.

    Args:
        checkpoint: of :func:`rft_fast.checkpoints.read`.

    Returns:
        Lines of text, control characters escaped.
    """
    from ..clip import matching  # importing open_clip takes seconds; a comparison does not need it

    tensors = checkpoint.tensors
    parts: dict[str, list[str]] = {"image tower": [], "text tower": [], "head": [], "other": []}
    for name in tensors:
        parts[_part(name)].append(name)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    grouped = layers.group(list(tensors))
    whole = f"{_count(tensors.values())} in {many(len(tensors), 'tensor')}, {many(len(grouped), 'layer')}"
    about = [
        ("file", str(checkpoint.file)),
        ("format", f"{checkpoint.format}: {FORMATS[checkpoint.format]}"),
        ("parameters", whole),
        ("dtypes", ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.most_common())),
    ]
    for part, names in parts.items():
        if names:
            own = f"{_count(tensors[name] for name in names)} in {many(len(names), 'tensor')}"
            about.append((part, own + _classes(part, tensors)))
    likely = matching.likely(tensors)
    about.append(("likely arch", ", ".join(likely) or "none that open_clip knows"))
    if not parts["image tower"] and not parts["head"]:
        about.append(("note", "no image tower (visual.*) and no head, which a sweep needs"))
    about += [("note", note) for note in checkpoint.notes]
    lines = [*labelled(about), "", "layers"]
    order = list(tensors)
    for layer, indices in grouped.items():
        shapes = ", ".join(
            f"{order[i].removeprefix(layer).lstrip('._')} {list(tensors[order[i]].shape)}".lstrip()
            for i in indices
        )
        lines.append(f"  {layer}  {shapes}")
    return "\n".join(map(visible, lines))


def _part(name: str) -> str:
    first = name.partition(".")[0]
    if first == "visual":
        return "image tower"
    if first == "classification_head":
        return "head"
    return "text tower" if INERT.get(first, "").startswith("text tower") else "other"


def _classes(part: str, tensors: Mapping[str, Tensor]) -> str:
    weight = tensors.get(HEAD_WEIGHT)
    return (
        f", {weight.shape[0]} classes" if part == "head" and weight is not None and weight.ndim == 2 else ""
    )


def _count(tensors: Iterable[Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors):,}"


if __name__ == "__main__":
    sys.exit(main())
