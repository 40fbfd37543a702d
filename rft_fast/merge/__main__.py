"""``python -m rft_fast.merge``: several models in, one model out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rft_fast.common import program
from rft_fast.config.builder import Builder
from rft_fast.names import MERGE_METHODS

from ..common.words import visible
from .settings import METHOD, MODELS, OUTPUT, Request, refuse_unused

BUILDER = Builder((Request,), (MODELS, METHOD, OUTPUT))

DESCRIPTION = """\
Merge several models into one and write it; its metadata record its origin.

methods:
{methods}
"""

EXAMPLES = """\
examples:
  python -m rft_fast.merge interpolate --zeroshot zeroshot.pt \\
      --finetuned tuned.pt --alpha 0.4 --out wise.safetensors
  python -m rft_fast.merge task-arithmetic --zeroshot zeroshot.pt \\
      --finetuned cars.pt dtd.pt --scale 0.3 --out both.safetensors
  python -m rft_fast.merge greedy-soup --finetuned soup/model_*.pt \\
      --out soup.safetensors -- --arch ViT-B-32-quickgelu \\
      --id-data imagenet=imagenet/val --samples 10000
"""

_DATA = {
    True: "{method} measures nothing, but there are options behind --; leave them out",
    False: "{method} needs data; give the architecture and data after --, as for the sweep: -- "
    "--arch NAME --id-data NAME=PATH",
}


@program.command("merge")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: of the command line, without the program's name.

    Returns:
        0; 1 if a file or the disk failed while the result was written. Exits with 2, as argparse does, for
        what is refused before.
    """
    top = parser()
    argv = list(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    options, data = top.parse_args(argv[:place]), argv[place + 1 :]
    try:
        given = BUILDER.given(options)
        fields = BUILDER.fields(Request, given)
        refuse_unused(options.method, fields.__contains__)
        request = Request(method=options.method, **fields)
        if request.measures != bool(data):
            raise ValueError(_DATA[bool(data)].format(method=request.method))
        from .work import run

        if data:
            from rft_fast.run.measures import Measured

            files, keys = [*request.finetuned], (request.key, request.key)
            if request.zeroshot is not None:
                files, keys = [request.zeroshot, *files], (request.key, request.zeroshot_key)
            outcome = run(request, Measured(data, files, *keys, request.unrelated))
        else:
            outcome = run(request)
    except ValueError as error:
        top.error(str(error))
    except (OSError, RuntimeError) as error:
        print(program.failure(top.prog, f"{error}; nothing was written"), file=sys.stderr)
        return 1
    for note in outcome.notes:
        print(f"note: {visible(note)}")
    print(f"{visible(str(outcome.out))}: {outcome.merged} tensors merged, {outcome.copied} copied")
    ends = [] if request.zeroshot is None else [request.zeroshot]
    print(program.next_step("checkpoints", *ends, outcome.out))
    return 0


def parser() -> program.Parser:
    """The options of the command line."""
    top = program.parser(
        "merge",
        usage="python -m rft_fast.merge METHOD [options] [-- options of the sweep]",
        description=DESCRIPTION.format(methods=program.listed(MERGE_METHODS)),
        epilog=EXAMPLES,
    )
    top.add_argument("method", metavar="METHOD", choices=tuple(MERGE_METHODS), help="how models are merged")
    BUILDER.add_to(top)
    return top


if __name__ == "__main__":
    sys.exit(main())
