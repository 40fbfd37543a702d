"""``python -m rft_fast.finetune``: a zero-shot CLIP and images in, a zoo of fine-tuned models out."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rft_fast.common import program
from rft_fast.config.builder import Builder, Given
from rft_fast.datasets import cache as caches

from ..common import again
from ..common.tables import aligned, labelled
from ..common.words import many
from .settings import (
    DATA,
    GRID,
    HEAD,
    MOST_WARMUP,
    SHORT,
    Invocation,
    Request,
    Setting,
    at_random,
    compact,
    grid,
)

BUILDER = Builder((Setting, Request, Invocation), (DATA, HEAD, GRID))

DESCRIPTION = """\
Fine-tune the image encoder and head of a zero-shot CLIP model, once for every
combination of the values in the grid, and write a zoo for the sweep. A stopped
or killed run resumes with the same command; finished models are skipped.
"""

EXAMPLES = """\
examples:
  python -m rft_fast.finetune --arch ViT-B-32-quickgelu --zeroshot openai \\
      --class-names imagenet --head-scale 100 --train imagenet/train \\
      --val imagenet=imagenet/val --ood sketch=sketch --lr 1e-5 3e-5 \\
      --epochs 4 8 --precision bf16 --out zoos/b32
  python -m rft_fast.finetune --arch ViT-B-32-quickgelu --zeroshot zeroshot.pt \\
      --train imagenet/train --random 72 --precision fp16 --out zoos/soup
"""


@program.command("finetune")
def main(argv: Sequence[str]) -> int:
    """Runs a command line; ``argv`` without the program's name, left out for the process's own.

    Returns 0 when all is done; 1 when a model diverged, or disk, memory or an image failed on the way; 130
    when interrupted. Exits with 2, as argparse does, for whatever is refused; that is always before the
    first step of training.
    """
    try:
        return _run(argv)
    except (KeyboardInterrupt, program.Interrupted):
        print("\nfinetune: interrupted; the same command resumes from the last saved state", file=sys.stderr)
        return 130


def _run(argv: Sequence[str]) -> int:
    top = parser()
    try:
        given = BUILDER.given(top.parse_args(argv))
        settings, wanted = _settings(given), BUILDER.of(Invocation, given)
        if wanted.dry_run:
            print("\n".join(listed(settings)))
            print(program.next_step("finetune", *again.without(argv, "--dry-run")))
            return 0
        request = BUILDER.of(Request, {"cache": caches.directory(), **given}, settings=settings)
        import torch
        from tqdm import tqdm

        from .work import Work

        if wanted.deterministic:
            # cuBLAS reads this when it is first used, and torch refuses without it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        work = Work(request)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        top.error(_by_option(str(error)))
    try:
        with program.Stop(tqdm.write, "training step") as stop:
            outcome = work.run(stop)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        text = f"{error}; the same command resumes from the last saved state"
        print(program.failure("finetune", text), file=sys.stderr)
        return 1
    made = request.out / "zoo.toml"
    print(
        f"{len(outcome.trained)} trained, {len(outcome.skipped)} skipped; "
        + (f"zoo: {made}" if made.exists() else "no zoo yet")
    )
    if made.exists():
        print(program.next_step("sweep", request.out))
    if outcome.diverged:
        text = f"{len(outcome.diverged)} diverged: {', '.join(outcome.diverged)}"
        print(program.failure("finetune", text), file=sys.stderr)
        return 1
    return 0


def _by_option(text: str) -> str:
    """Name the option in a message that begins with a field of Setting."""
    for entry in BUILDER.entries.values():
        start = f"Setting: {entry.field} "
        if entry.kind is Setting and text.startswith(start):
            return f"argument --{entry.name}: {text.removeprefix(start)}"
    return text


def parser() -> program.Parser:
    """The options of the command line."""
    top = program.parser(
        "finetune",
        usage="python -m rft_fast.finetune --arch NAME --zeroshot SOURCE --train PATH\n"
        "           --out DIR [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    BUILDER.add_to(top)
    return top


def _settings(given: Given) -> dict[str, Setting]:
    """Those of a grid, or as many at random."""
    wanted = BUILDER.of(Invocation, given)
    values = BUILDER.fields(Setting, given)
    choices = {field: values.pop(field) for field in SHORT if field in values}
    if wanted.random is None:
        return grid(choices, **values)
    return at_random(wanted.random, choices, wanted.search_seed, **values)


def listed(settings: Mapping[str, Setting]) -> list[str]:
    """Return a table of models with the options that differ between them, after those that all share."""
    tables = {name: asdict(setting) for name, setting in settings.items()}
    options = {entry.field: entry.name for entry in BUILDER.entries.values() if entry.kind is Setting}
    fields = list(next(iter(tables.values())))
    differ = [field for field in fields if len({table[field] for table in tables.values()}) > 1]
    shared = next(iter(tables.values()))
    same = [(options.get(f, f), _cell(f, shared[f])) for f in fields if f not in differ]
    rows = [["model", *(options.get(field, field) for field in differ)]]
    rows += [[name, *(_cell(f, table[f]) for f in differ)] for name, table in tables.items()]
    return [*labelled(same), "", *aligned(rows, indent=""), "", many(len(settings), "model")]


def _cell(field: str, value: object) -> str:
    if value is None:
        return f"a tenth of the steps, at most {MOST_WARMUP}" if field == "warmup" else "none"
    if isinstance(value, tuple):
        return ", ".join(map(compact, value))
    return compact(value) if isinstance(value, (int, float)) else str(value)


if __name__ == "__main__":
    sys.exit(main())
