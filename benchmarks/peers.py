"""What people run today instead of the kernels, written out; and the shapes they run it on.

Every function takes a ``Case`` and returns a callable that performs one write. What can be allocated before
is allocated before, unless allocating is the practice being measured ("naive").
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rft_fast.kernels import Plan

ALPHA, RHO, SEED = 0.3, 0.1, 1
Run = Callable[[], object]


@dataclass
class Case:
    """The two ends and the place to write, lists of tensors; out starts as zeros."""

    zeroshot: list[Tensor]
    finetuned: list[Tensor]
    out: list[Tensor]

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.out)


@cache
def shapes(name: str) -> tuple[tuple[int, ...], ...]:
    """Parameter shapes of an image tower with a 1,000-class head, or one tensor of 64 M elements."""
    if name == "64M":
        return ((64 * 2**20,),)
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
    tower = [tuple(p.shape) for p in model.visual.parameters()]
    return (*tower, (1000, model.visual.output_dim), (1000,))


def make_case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(0)
    w0 = [torch.randn(s, generator=generator).mul_(0.02).to(dtype) for s in shapes(name)]
    w1 = [torch.randn(s, generator=generator).mul_(0.001).to(dtype).add_(w) for s, w in zip(shapes(name), w0)]
    return Case(w0, w1, [torch.zeros_like(w) for w in w0])


def ours(impl: str, **write: float) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        plan = Plan(case.out, case.zeroshot, case.finetuned, impl)
        return lambda: plan.write(ALPHA, seed=SEED, **write)

    return prepare


# ---------------------------------------------------------------- interpolation


def lerp_out(case: Case) -> Run:
    """torch.lerp into the parameter: the least that plain torch can do."""

    def run() -> None:
        for out, a, b in zip(case.out, case.zeroshot, case.finetuned):
            torch.lerp(a, b, ALPHA, out=out)

    return run


def foreach_lerp(case: Case) -> Run:
    def run() -> None:
        torch._foreach_copy_(case.out, case.zeroshot)
        torch._foreach_lerp_(case.out, case.finetuned, ALPHA)

    return run


def state_dict_merge(case: Case) -> Run:
    """As WiSE-FT's code merges: both state dicts cloned, a third built, and loaded into the model."""
    model = torch.nn.ParameterList(torch.nn.Parameter(t) for t in case.out)
    theta_0, theta_1 = ({str(i): t for i, t in enumerate(end)} for end in (case.zeroshot, case.finetuned))

    def run() -> None:
        a = {k: v.clone() for k, v in theta_0.items()}
        b = {k: v.clone() for k, v in theta_1.items()}
        model.load_state_dict({k: (1 - ALPHA) * a[k] + ALPHA * b[k] for k in a})

    return run


def compiled_lerp(case: Case) -> Run:
    @torch.compile(dynamic=False)
    def step(out: Tensor, a: Tensor, b: Tensor) -> None:
        out.copy_(torch.lerp(a, b, ALPHA))

    return lambda: [step(*t) for t in zip(case.out, case.zeroshot, case.finetuned)]


# ---------------------------------------------------------------- interpolation and perturbation


def in_place_torch(case: Case) -> Run:
    """The fastest plain-torch sequence: four in-place passes over preallocated noise and scratch."""
    noise = [torch.empty_like(t) for t in case.out]
    scratch = [torch.empty_like(t) for t in case.out]

    def run() -> None:
        for out, a, b, eps, s in zip(case.out, case.zeroshot, case.finetuned, noise, scratch):
            torch.abs(b, out=s)
            s.mul_(eps.normal_())
            torch.add(b, s, alpha=RHO, out=s)
            torch.lerp(a, s, ALPHA, out=out)

    return run


def foreach(case: Case) -> Run:
    """As in_place_torch, each pass one torch._foreach_* call (which has no normal_)."""
    noise = [torch.empty_like(t) for t in case.out]
    scratch = [torch.empty_like(t) for t in case.out]

    def run() -> None:
        for eps in noise:
            eps.normal_()
        torch._foreach_copy_(scratch, case.finetuned)
        torch._foreach_abs_(scratch)
        torch._foreach_mul_(scratch, noise)
        torch._foreach_mul_(scratch, RHO)
        torch._foreach_add_(scratch, case.finetuned)
        torch._foreach_copy_(case.out, case.zeroshot)
        torch._foreach_lerp_(case.out, scratch, ALPHA)

    return run


def delta_dict(case: Case) -> Run:
    """As published sharpness code perturbs: a copy of the weights, a dict of deltas, new tensors."""
    model = torch.nn.ParameterList(torch.nn.Parameter(t) for t in case.out)

    def run() -> None:
        perturbed = copy.deepcopy(case.finetuned)
        deltas = {i: torch.randn_like(p) * p.abs() * RHO for i, p in enumerate(perturbed)}
        for i, p in enumerate(perturbed):
            p.data = p.data + deltas[i]
        model.load_state_dict(
            {str(i): (1 - ALPHA) * a + ALPHA * b for i, (a, b) in enumerate(zip(case.zeroshot, perturbed))}
        )

    return run


def compiled(case: Case) -> Run:
    @torch.compile(dynamic=False)
    def step(out: Tensor, a: Tensor, b: Tensor) -> None:
        out.copy_(torch.lerp(a, b + RHO * b.abs() * torch.randn_like(b), ALPHA))

    return lambda: [step(*t) for t in zip(case.out, case.zeroshot, case.finetuned)]


def stateless(case: Case) -> Run:
    """torch.func._random (torch >= 2.15): seeded noise that depends on nothing but its key, as ours."""
    from torch.func import _random

    noise = [torch.empty_like(t) for t in case.out]
    scratch = [torch.empty_like(t) for t in case.out]

    def run() -> None:
        key = _random.key(SEED)
        for i, (out, a, b, eps, s) in enumerate(zip(case.out, case.zeroshot, case.finetuned, noise, scratch)):
            _random.normal_(_random.fold_in(key, i), eps)
            torch.abs(b, out=s)
            s.mul_(eps)
            torch.add(b, s, alpha=RHO, out=s)
            torch.lerp(a, s, ALPHA, out=out)

    return run


def has_stateless() -> bool:
    try:
        from torch.func import _random
    except ImportError:
        return False
    return hasattr(_random, "normal_")


INTERPOLATE: dict[str, Callable[[Case], Run]] = {
    "native": ours("native"),
    "torch.lerp(out=)": lerp_out,
    "torch._foreach_lerp_": foreach_lerp,
    "torch.compile": compiled_lerp,
    "state dicts (WiSE-FT)": state_dict_merge,
    "reference": ours("reference"),
}
PERTURB: dict[str, Callable[[Case], Run]] = {
    "native": ours("native", rho=RHO),
    "torch in place": in_place_torch,
    "torch._foreach_*": foreach,
    "torch.compile": compiled,
    "torch.func._random": stateless,
    "delta dict": delta_dict,
    "reference": ours("reference", rho=RHO),
}
EXTRA: dict[str, Callable[[Case], Run]] = {
    "native, uniform noise": ours("native", rho=RHO, noise="uniform"),
    "native, mask": ours("native", keep=0.5),
    "native, all three": ours("native", rho=RHO, keep=0.5),
}
