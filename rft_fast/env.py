"""Print versions and, for each device, which backends work and why the others do not."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import rft_fast
from rft_fast.common import program
from rft_fast.common.tables import labelled

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "open_clip_torch", "timm", "numpy", "pandas", "safetensors")
MISSING = "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and its dependencies; "not installed" for missing ones."""
    found = {"rft_fast": rft_fast.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = MISSING
    return found


def devices() -> list[torch.device]:
    """Return the CPU and every CUDA device that torch sees."""
    import torch

    return [
        torch.device("cpu"),
        *(torch.device("cuda", index) for index in range(torch.cuda.device_count())),
    ]


def device(name: str | None) -> torch.device:
    """Return the device of a name.

    Args:
        name: As torch names it; None: a GPU if there is one, else the CPU.

    Raises:
        ValueError: The device cannot be used; the message gives the reason.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()
    except Exception as error:  # each backend raises its own
        reason = re.split(r"\n|\. ", str(error))[0]
        here = ", ".join(map(str, devices()))
        raise ValueError(
            f"argument --device: {name!r} cannot be used: {reason}; torch finds on this machine: {here}"
        ) from None
    return found


def report() -> str:
    """Return what ``python -m rft_fast.env`` prints."""
    import torch

    from rft_fast.kernels import native
    from rft_fast.kernels.registry import BACKENDS

    about = [
        *versions().items(),
        ("platform", platform.platform()),
        ("torch CUDA", torch.version.cuda or "not in this build of torch"),
        ("threads", str(torch.get_num_threads())),
    ]
    if isas := native.isas():
        about.append(("CPU kernels", f"{isas[-1]} (usable: {', '.join(isas)})"))
    lines = labelled(about)
    for device in devices():
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        lines.append(f"\nbackends on {device}{name}, in the order in which impl='auto' takes them:")
        reasons = {backend.name: backend.why_not(device) for backend in BACKENDS.values()}
        works = [(name, "works" if reason is None else f"no: {reason}") for name, reason in reasons.items()]
        lines += labelled(works, indent="  ")
    if len(devices()) == 1:
        lines.append("\nno CUDA device: torch.cuda.is_available() is False")
    return "\n".join(lines)


@program.command("env")
def main(argv: Sequence[str]) -> int:
    """Print the report; returns 0."""
    program.parser("env", description=__doc__).parse_args(argv)
    print(report())
    if missing := [name for name, version in versions().items() if version == MISSING]:
        print(program.next_step("pip install", *missing))
    else:
        print(program.next_step("sweep"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
