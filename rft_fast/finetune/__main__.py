"""``python -m rft_fast.finetune``: a zero-shot CLIP and images in, a zoo of fine-tuned models out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft_fast import names
from rft_fast.common import program
from rft_fast.datasets import cache as caches

from ..common.words import message
from .settings import SHORT, Setting, at_random, grid

if TYPE_CHECKING:
    from . import Request

DESCRIPTION = """\
Fine-tune the image encoder and head of a zero-shot CLIP model, once for every combination of the values
given for the options of a grid, and leave a zoo that `python -m rft_fast.sweep` reads. A run that was
killed goes on where it was when it is started again; models that are finished are skipped.
"""

EXAMPLES = """\
examples:
  python -m rft_fast.finetune --arch ViT-B-32-quickgelu --zeroshot openai \\
      --class-names imagenet --head-scale 100 --train imagenet/train --val imagenet=imagenet/val \\
      --ood sketch=sketch --lr 1e-5 3e-5 --epochs 4 8 --precision bf16 --out zoos/b32
  python -m rft_fast.finetune --arch ViT-B-32-quickgelu --zeroshot zeroshot.pt --train imagenet/train \\
      --random 72 --precision fp16 --out zoos/soup
"""


@program.command("finetune")
def main(argv: Sequence[str]) -> int:
    """Runs a command line; ``argv`` without the program's name, left out for the process's own.

    Returns 0 when all is done; 1 when a model diverged, or disk, memory or an image failed on the way; 130
    when interrupted. Exits with 2, as argparse does, for whatever is refused; that is always before the
    first step of training.
    """
    try:
        return _run(parser().parse_args(argv))
    except (KeyboardInterrupt, program.Interrupted):
        print("\nfinetune: interrupted; the same command goes on from the last state kept", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        settings = _settings(options)
        if options.dry_run:
            _list(settings)
            return 0
        named = _named_paths(options)
        import torch
        from tqdm import tqdm

        from .work import Work

        if options.deterministic:
            # cuBLAS reads this when it is first used, and torch refuses without it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        work = Work(_request(options, settings, named))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser().error(str(error))
    try:
        with program.Stop(tqdm.write, "training step") as stop:
            outcome = work.run(stop)
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        print(
            f"finetune: error: {message(error)}; the same command goes on from the last state kept",
            file=sys.stderr,
        )
        return 1
    made = options.out / "zoo.toml"
    print(
        f"{len(outcome.trained)} trained, {len(outcome.skipped)} skipped; "
        + (f"zoo: {made}" if made.exists() else "no zoo yet")
    )
    if outcome.diverged:
        print(
            f"finetune: error: {len(outcome.diverged)} diverged: {', '.join(outcome.diverged)}",
            file=sys.stderr,
        )
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    top = program.parser(
        "finetune",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_models(top)
    _add_grid(top)
    _add_training(top)
    _add_running(top)
    return top


def _add_models(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("model and data")
    add = group.add_argument
    add("--arch", metavar="NAME", required=True, help="open_clip model name, JSON file, or hf-hub:org/name")
    add(
        "--zeroshot",
        metavar="SOURCE",
        required=True,
        help="checkpoint to start from: a file, a pretrained tag of open_clip, or hf-hub:org/name",
    )
    add("--train", metavar="PATH", required=True, type=Path, help="images that are trained on")
    add("--kind", choices=sorted(names.KINDS), help="format of --train (default: as its files tell)")
    add(
        "--label-map",
        metavar="FILE",
        type=names.as_given,
        help="rows of the head for the classes of --train, --val and --ood, where their names do not show "
        "them; or the word order: class i is row i",
    )
    add(
        "--val",
        metavar="NAME=PATH",
        type=_named_path,
        nargs="+",
        action="extend",
        default=[],
        help="in-distribution data, scored after every epoch",
    )
    add(
        "--ood",
        metavar="NAME=PATH",
        type=_named_path,
        nargs="+",
        action="extend",
        default=[],
        help="out-of-distribution data, which is only named in the zoo: no image is opened",
    )
    add("--out", metavar="DIR", required=True, type=Path, help="directory of the zoo")
    head = top.add_argument_group(
        "classes of the head",
        "names of its rows, by which data sets go to them; a checkpoint without a head gets one, made of the "
        "names in the templates",
    )
    head.add_argument("--class-names", metavar="WHAT", help="imagenet, cifar10, ... or a file, one per line")
    head.add_argument("--templates", metavar="WHAT", help="openai (default), simple, photo, or a file")
    head.add_argument(
        "--head-scale", metavar="X", type=float, help="factor of the head (default: exp of the logit scale)"
    )


def _add_grid(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group(
        "grid: each option may have several values, and every combination makes a model"
    )
    default = Setting()
    for field, option, kind, what in (
        ("lr", "--lr", float, "peak learning rate"),
        ("epochs", "--epochs", int, "passes over the data"),
        ("weight_decay", "--weight-decay", float, "of AdamW, on matrices only"),
        ("label_smoothing", "--label-smoothing", float, "fraction spread over all classes"),
        ("mixup", "--mixup", float, "parameter of the Beta distribution, 0 for none"),
        ("augment", "--augment", str, "none (evaluation's transform), crop, crop-flip, or rand-mM-nN"),
        ("warmup", "--warm-up", int, "steps of linear warm-up"),
        ("seed", "--seed", int, "of order, crops and all else that is random"),
    ):
        what += f" (default: {getattr(default, field)})"
        group.add_argument(option, dest=field, metavar="X", type=kind, nargs="+", help=what)
    group.add_argument(
        "--random",
        metavar="N",
        type=int,
        help="N settings drawn at random instead: from the values given, for other options from the ranges "
        "of the model-soups models",
    )
    group.add_argument("--search-seed", metavar="N", type=int, default=0, help="of --random (default: 0)")
    group.add_argument("--dry-run", action="store_true", help="only list the settings")


def _add_training(top: argparse.ArgumentParser) -> None:
    group, default = top.add_argument_group("training"), Setting()
    add = group.add_argument
    add(
        "--batch-size",
        metavar="N",
        type=int,
        default=default.batch_size,
        help="images per step (%(default)s)",
    )
    add(
        "--accumulate",
        metavar="N",
        type=int,
        default=1,
        help="compute each batch in N parts: the same step in less memory, unless batch norm is trained "
        "(%(default)s)",
    )
    add(
        "--clip",
        metavar="X",
        type=float,
        default=default.clip,
        help="largest norm of the gradient (%(default)s)",
    )
    add("--no-clip", dest="clip", action="store_const", const=None, help="leave gradients as they are")
    add("--schedule", choices=names.SCHEDULES, default="cosine", help="after the warm-up (%(default)s)")
    add(
        "--probe-epochs",
        metavar="N",
        type=int,
        default=0,
        help="first train the head alone so long, on features that are computed once: LP-FT (%(default)s)",
    )
    add(
        "--probe-lr",
        metavar="X",
        type=float,
        default=default.probe_lr,
        help="learning rate then (%(default)s)",
    )
    add("--freeze", metavar="REGEX", nargs="+", default=[], help="parameters, by whole names, that stay")
    add(
        "--freeze-blocks", metavar="N", type=int, default=0, help="the first N blocks and what is before stay"
    )
    add("--precision", choices=names.MIXED, default="fp32", help="bf16, fp16: mixed (%(default)s)")
    add("--grad-checkpointing", action="store_true", help="compute activations twice: less memory")
    add("--deterministic", action="store_true", help="on a GPU, only kernels that always sum in one order")


def _add_running(top: argparse.ArgumentParser) -> None:
    add = top.add_argument_group("how it runs").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--workers", metavar="N", type=int, help="threads that decode images (default: all cores)")
    add("--in-memory", action="store_true", help="keep all training images decoded in memory")
    add("--no-check", action="store_true", help="do not open every training image before the first step")
    add(
        "--keep-every",
        metavar="N",
        type=int,
        default=500,
        help="steps between two states that a killed run goes on from (%(default)s; also every epoch)",
    )
    add("--dtype", choices=names.STORED, default="float32", help="of the weights in the files (%(default)s)")
    add("--cache", metavar="DIR", type=Path, help="where decoded images of --val are kept")
    add("--no-cache", action="store_true", help="keep none")


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    choices = {option: getattr(options, option) for option in SHORT if getattr(options, option) is not None}
    fixed: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("batch_size", "accumulate", "clip", "schedule", "probe_epochs", "probe_lr")
    }
    if options.random is None:
        return grid(choices, **fixed)
    return at_random(options.random, choices, options.search_seed, **fixed)


def _list(settings: dict[str, Setting]) -> None:
    for name, setting in settings.items():
        print(name, *(f"{option}={value}" for option, value in asdict(setting).items()))
    print(f"{len(settings)} models")


def _named_paths(options: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """The data sets of --val and of --ood, by name."""
    named = {name: dict(getattr(options, name)) for name in ("val", "ood")}
    for name, paths in named.items():
        if len(paths) != len(getattr(options, name)):
            raise ValueError(f"--{name}: two data sets have the same name")
    return named


def _request(
    options: argparse.Namespace, settings: dict[str, Setting], named: dict[str, dict[str, Path]]
) -> Request:
    from .work import Request

    return Request(
        arch=options.arch,
        zeroshot=options.zeroshot,
        train=options.train,
        out=options.out,
        settings=settings,
        **named,
        kind=options.kind,
        label_map=options.label_map,
        class_names=options.class_names,
        templates=options.templates,
        head_scale=options.head_scale,
        freeze=options.freeze,
        freeze_blocks=options.freeze_blocks,
        precision=options.precision,
        checkpointing=options.grad_checkpointing,
        store=options.dtype,
        device=options.device,
        workers=options.workers,
        in_memory=options.in_memory,
        check_images=not options.no_check,
        keep_every=options.keep_every,
        cache=None if options.no_cache else options.cache or caches.directory(),
    )


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
