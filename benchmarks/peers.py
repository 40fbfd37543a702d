"""The operations, the peers that perform them as is common today, and the shapes.

A contender takes a ``Case`` and an ``Operation`` and returns a ``Prepared``: one callable that performs a
write, and one that returns the random numbers of the last write. Memory is allocated in advance where
possible, unless allocating is the practice being measured ("state dicts", "published loop", "delta dict"). A
peer is called published only if it does, call for call, what published code does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from rft_fast.kernels import Plan, keep_mask_like, noise_like

ALPHA, RHO, KEEP, SEED = 0.3, 0.1, 0.5, 1
Run = Callable[[], object]

# Number of elements of the first tensor that are compared when a contender's numbers are checked.
CHECKED = 2**20


@dataclass(frozen=True)
class Operation:
    """out = lerp(zeroshot, w + rho * |w| * normal, alpha), w = finetuned where kept, else 0."""

    alpha: float = ALPHA
    rho: float = 0.0
    keep: float = 1.0

    @property
    def tensors(self) -> int:
        """Number of tensors that must be moved: the ends that matter, and the output."""
        return 2 if self.alpha == 1 else 3


OPERATIONS = {
    "interpolate": Operation(),
    "perturb": Operation(alpha=1.0, rho=RHO),
    "both": Operation(rho=RHO),
    "mask": Operation(keep=KEEP),
    "all": Operation(rho=RHO, keep=KEEP),
}


@dataclass
class Case:
    """The two ends and the output, as lists of tensors."""

    zeroshot: list[Tensor]
    finetuned: list[Tensor]
    out: list[Tensor]

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.out)


@dataclass(frozen=True)
class Drawn:
    """The first CHECKED random numbers of the last write: normals, and whether each weight was kept."""

    noise: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run. drawn: None where its random numbers are not accessible."""

    run: Run
    drawn: Callable[[], Drawn] | None = Drawn


Contender = Callable[[Case, Operation], Prepared]


def vit(width: int, layers: int, patch: int, embed: int) -> list[tuple[int, ...]]:
    """Parameter shapes of CLIP's image tower at 224 pixels, with a head of 1,000 classes."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    block = [*norm, *attention, *norm, *mlp]
    ends = [(width,), ((224 // patch) ** 2 + 1, width), (width, embed), (width, 3, patch, patch)]
    return [*ends, *norm, *block * layers, *norm, (1000, embed), (1000,)]


@cache
def shapes(name: str) -> list[tuple[int, ...]]:
    return {
        "64M": [(64 * 2**20,)],
        "256M": [(256 * 2**20,)],
        "layer": [(4096, 1024), (4096,)],  # ViT-L/14's mlp.c_fc
        "ViT-B-32": vit(768, 12, 32, 512),
        "ViT-L-14": vit(1024, 24, 14, 768),
    }[name]


def make_case(name: str, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=device)
    w0 = [make(s).mul_(0.02).to(dtype) for s in shapes(name)]
    w1 = [make(s).mul_(0.001).add_(w).to(dtype) for s, w in zip(shapes(name), w0)]
    return Case(w0, w1, [torch.zeros_like(w) for w in w0])


def first(tensors: list[Tensor] | None) -> Tensor | None:
    return None if tensors is None else tensors[0].flatten()[:CHECKED]


def ours(impl: str) -> Contender:
    def prepare(case: Case, op: Operation) -> Prepared:
        plan = Plan(case.out, case.zeroshot, case.finetuned, impl)

        def drawn() -> Drawn:
            like = torch.empty(min(CHECKED, case.out[0].numel()), device=case.out[0].device)
            return Drawn(
                noise_like(like, SEED, impl="reference"),
                keep_mask_like(like, op.keep, SEED, impl="reference"),
            )

        return Prepared(lambda: plan.write(op.alpha, rho=op.rho, keep=op.keep, seed=SEED), drawn)

    return prepare


def lerp_out(case: Case, op: Operation) -> Prepared:
    """torch.lerp into the parameter: the cheapest way in plain torch."""

    def run() -> None:
        for out, a, b in zip(case.out, case.zeroshot, case.finetuned):
            torch.lerp(a, b, op.alpha, out=out)

    return Prepared(run)


def state_dicts(case: Case, op: Operation) -> Prepared:
    """Merge as WiSE-FT's code does: clone both state dicts, build a third, and load it into the model."""
    model = torch.nn.ParameterList(torch.nn.Parameter(t) for t in case.out)
    theta_0, theta_1 = ({str(i): t for i, t in enumerate(end)} for end in (case.zeroshot, case.finetuned))

    def run() -> None:
        a = {k: v.clone() for k, v in theta_0.items()}
        b = {k: v.clone() for k, v in theta_1.items()}
        model.load_state_dict({k: (1 - op.alpha) * a[k] + op.alpha * b[k] for k in a})

    return Prepared(run)


def published_loop(case: Case, op: Operation) -> Prepared:
    """The published loop of average adaptive sharpness: one draw of it, without the forward pass.

    github.com/tml-epfl/sharpness-vs-generalization at 6d73be94, sharpness.py: eval_average_sharpness with
    random_init_lw, norm="l2", adaptive=True. Once for all draws: a clone of the parameters, a deep copy of
    the model, a dict of deltas. For each draw: noise for every tensor; |w|, times rho, times the noise; a new
    tensor for every parameter. It does not interpolate.
    """
    if op != Operation(alpha=1.0, rho=op.rho):
        raise ValueError(f"the published loop perturbs and does nothing else, got {op}")
    model = torch.nn.ParameterList(torch.nn.Parameter(t) for t in case.finetuned)
    original = {name: p.clone() for name, p in model.named_parameters()}
    noisy = copy.deepcopy(model)
    deltas = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    @torch.no_grad()
    def run() -> None:
        for name in deltas:
            deltas[name] = torch.randn_like(deltas[name])
        for name in deltas:
            deltas[name] *= op.rho * original[name].abs()
        for (name, _), (_, p) in zip(deltas.items(), noisy.named_parameters()):
            p.data = original[name] + deltas[name]
        case.out[:] = [p.data for p in noisy.parameters()]  # for the check: the loop makes its own tensors

    def drawn() -> Drawn:
        w = first(case.finetuned).float()
        noise = first(list(deltas.values())).float() / (op.rho * w.abs())
        return Drawn(torch.where(w == 0, 0, noise))

    return Prepared(run, drawn)


def delta_dict(case: Case, op: Operation) -> Prepared:
    """Written by us: for every draw a deep copy of the weights and a dict of deltas, then loaded."""
    model = torch.nn.ParameterList(torch.nn.Parameter(t) for t in case.out)
    noise: list[Tensor] = []

    def run() -> None:
        noise.clear()
        perturbed = copy.deepcopy(case.finetuned)
        deltas = {}
        for i, p in enumerate(perturbed):
            eps = torch.randn_like(p)
            if not noise:
                noise.append(eps)
            deltas[i] = eps * p.abs() * op.rho
        for i, p in enumerate(perturbed):
            p.data = p.data + deltas[i]
        if op.alpha != 1:
            ends = zip(case.zeroshot, perturbed)
            perturbed = [(1 - op.alpha) * a + op.alpha * b for a, b in ends]
        model.load_state_dict({str(i): p for i, p in enumerate(perturbed)})

    return Prepared(run, lambda: Drawn(first(noise)))


def like(case: Case, wanted: bool) -> list[Tensor] | None:
    return [torch.empty_like(t) for t in case.out] if wanted else None


def in_place(case: Case, op: Operation, stateless: bool = False) -> Prepared:
    """The fastest plain-torch sequence for the formula: in-place passes over preallocated memory.

    stateless: random numbers from torch.func._random, which depend on their key alone, like ours.
    """
    noise, mask = like(case, op.rho > 0), like(case, op.keep < 1)
    scratch = like(case, True)
    device = case.out[0].device

    def draw(tensor: Tensor, key: Tensor | None, index: int, normal: bool) -> Tensor:
        if key is None:
            return tensor.normal_() if normal else tensor.bernoulli_(op.keep)
        from torch.func import _random

        key = _random.fold_in(key, 2 * index + normal)
        return _random.normal_(key, tensor) if normal else _random.uniform_(key, tensor).lt_(op.keep)

    def run() -> None:
        key = None
        if stateless:
            from torch.func import _random

            key = _random.key(SEED, device=device)
        for i, (out, a, w, s) in enumerate(zip(case.out, case.zeroshot, case.finetuned, scratch)):
            if mask:
                w = torch.mul(w, draw(mask[i], key, i, normal=False), out=s)
            if noise:
                torch.abs(w, out=out)
                out.mul_(draw(noise[i], key, i, normal=True))
                w = torch.add(w, out, alpha=op.rho, out=out if op.alpha == 1 else s)
            if op.alpha != 1:
                torch.lerp(a, w, op.alpha, out=out)

    return Prepared(run, lambda: Drawn(first(noise), first(mask)))


def foreach(case: Case, op: Operation) -> Prepared:
    """One torch._foreach_* call per pass (normal_ and bernoulli_ have none)."""
    noise, mask = like(case, op.rho > 0), like(case, op.keep < 1)
    work, scratch = like(case, bool(noise or mask)), like(case, op.rho > 0)

    def run() -> None:
        w = case.finetuned
        if work:
            torch._foreach_copy_(work, w)
            w = work
        if mask:
            for m in mask:
                m.bernoulli_(op.keep)
            torch._foreach_mul_(w, mask)
        if noise:
            for eps in noise:
                eps.normal_()
            torch._foreach_copy_(scratch, w)
            torch._foreach_abs_(scratch)
            torch._foreach_addcmul_(w, scratch, noise, op.rho)
        torch._foreach_copy_(case.out, w if op.alpha == 1 else case.zeroshot)
        if op.alpha != 1:
            torch._foreach_lerp_(case.out, w, op.alpha)

    return Prepared(run, lambda: Drawn(first(noise), first(mask)))


def foreach_folded(case: Case, op: Operation) -> Prepared:
    """w * (1 + rho * eps): fewer passes, other numbers, the same distribution, as noise is symmetric."""
    noise = like(case, True)

    def run() -> None:
        for eps in noise:
            eps.normal_(1, op.rho)
        torch._foreach_mul_(noise, case.finetuned)
        torch._foreach_copy_(case.out, noise if op.alpha == 1 else case.zeroshot)
        if op.alpha != 1:
            torch._foreach_lerp_(case.out, noise, op.alpha)

    return Prepared(run, None)


def compiled(case: Case, op: Operation) -> Prepared:
    # All cases share the code below; torch keeps few variants of it before running it uncompiled.
    torch._dynamo.reset()

    @torch.compile(dynamic=False)
    def step(out: Tensor, a: Tensor, w: Tensor) -> None:
        if op.keep < 1:
            w = w * (torch.rand_like(w, dtype=torch.float32) < op.keep)
        if op.rho:
            w = w + op.rho * w.abs() * torch.randn_like(w)
        out.copy_(w if op.alpha == 1 else torch.lerp(a, w, op.alpha))

    def run() -> None:
        for tensors in zip(case.out, case.zeroshot, case.finetuned):
            step(*tensors)

    return Prepared(run, None)


def has_stateless() -> bool:
    """torch.func._random, of torch 2.15."""
    try:
        from torch.func import _random
    except ImportError:
        return False
    return hasattr(_random, "normal_")


def contenders(op: Operation, device: torch.device) -> dict[str, Contender]:
    """Return everything that can perform the operation on the device, ours first.

    On the CPU Triton is interpreted, for tests, and not measured.
    """
    random = op.rho > 0 or op.keep < 1
    backends = ("native", "triton", "reference") if device.type == "cuda" else ("native", "reference")
    peers: dict[str, Contender] = {name: ours(name) for name in backends}
    if not random:
        peers |= {
            "torch.lerp(out=)": lerp_out,
            "torch._foreach_lerp_": foreach,
            "state dicts (WiSE-FT)": state_dicts,
        }
    else:
        peers |= {
            "torch in place": in_place,
            "torch._foreach_*": foreach,
            "torch.func._random": partial(in_place, stateless=True),
        }
    if op.rho > 0 and op.keep == 1:
        peers |= {"torch._foreach_* folded": foreach_folded, "delta dict (written by us)": delta_dict}
    if op == Operation(alpha=1.0, rho=op.rho) and random:
        peers["published loop"] = published_loop
    return peers | {"torch.compile": compiled}
