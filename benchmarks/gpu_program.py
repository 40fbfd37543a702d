"""A small program that runs every kernel, for compute-sanitizer.

Rows of sizes around the kernels' tiles, aligned and not, in all storage types, in place and out of place, in
several forms of the write. Results are compared with the CPU's, bit for bit, but for normals.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from rft_fast import env
from rft_fast.kernels import Plan
from rft_fast.kernels.registry import BACKENDS

SIZES = (0, 1, 3, 4, 5, 255, 1024, 2047, 2048, 2049, 4101)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For both backends, of which Triton compiles a variant for each.
FORMS = [
    {"alpha": 0.3},
    {"alpha": 0.7, "rho": 0.1, "noise": "normal", "seed": 5},
    {"alpha": 1.0, "rho": 0.1, "noise": "uniform", "keep": 0.5},
    {"alpha": 0.4, "rho": 0.1, "noise": "rademacher", "on": "interpolated", "adaptive": False},
    {"alpha": 0.4, "rho": 0.1, "noise": "normal", "keep": 0.9, "fill": "zeroshot", "draw": 2},
]
# With these, every kernel of csrc/cuda.cu runs: the usual forms with or without noise and mask, and the rest.
MORE_FORMS = [
    *(
        {"alpha": alpha, "rho": rho, "keep": keep}
        for alpha in (0.3, 0.7, 1.0)
        for rho in (0.0, 0.1)
        for keep in (1.0, 0.5)
    ),
    {"alpha": 0.0},
    {"alpha": 0.3, "keep": 0.5, "fill": "zeroshot"},
    {"alpha": 0.3, "rho": 0.1, "on": "interpolated"},
    {"alpha": 0.3, "rho": 0.1, "noise": "uniform"},
    {"alpha": 0.3, "rho": 0.1, "noise": "rademacher", "keep": 0.5},
]


def tensors(device: torch.device) -> list[list[torch.Tensor]]:
    """out, zeroshot, finetuned: each size in each storage type, once aligned and once one element off.

    And a few rows of several types, or aligned to eight bytes only.
    """
    generator = torch.Generator().manual_seed(0)
    roles: list[list[torch.Tensor]] = [[], [], []]
    for size, dtype, offset in itertools.product(SIZES, DTYPES, (0, 1)):
        for role in roles:
            # The view ends where its memory ends: an element too far is found.
            role.append(torch.randn(size + offset, generator=generator).to(device, dtype)[offset:])
    roles[0][::3] = roles[1][::3]  # in place
    for role, dtype in zip(roles, DTYPES):
        role.append(torch.randn(4101, generator=generator).to(device, dtype))
        role.append(torch.randn(4101, generator=generator).to(device, torch.bfloat16)[4:])
    return roles


def written(impl: str, device: torch.device, form: dict) -> list[torch.Tensor]:
    out, zeroshot, finetuned = tensors(device)
    plan = Plan(out, zeroshot, finetuned, impl)
    plan.write(**form, tensors=[(0, 10), (12, len(out))])
    return [t.cpu() for t in out]


def check(impl: str, device: torch.device) -> None:
    forms = FORMS if impl == "triton" else FORMS + MORE_FORMS
    for form in forms:
        expected = written("reference", torch.device("cpu"), form)
        for got, wanted in zip(written(impl, device, form), expected):
            close = {"rtol": 1e-2, "atol": 1e-6} if got.element_size() == 2 else {"rtol": 1e-5, "atol": 1e-6}
            if not form.get("rho") or form.get("noise", "normal") != "normal":
                close = {"rtol": 0, "atol": 0}
            torch.testing.assert_close(got, wanted, **close)
    print(f"{impl} on {device}: {len(forms)} forms of {len(expected)} rows are right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--backends", action="store_true", help="only tell which backends work; 1 if one does not"
    )
    options = parser.parse_args()
    device = torch.empty(0, device=options.device).device
    # On the CPU Triton is interpreted, for tests.
    impls = ("native",) if device.type == "cpu" else ("native", "triton")
    if options.backends:
        print(env.report())
        sys.exit(any(BACKENDS[impl].why_not(device) for impl in impls))
    for impl in impls:
        check(impl, device)


if __name__ == "__main__":
    main()
