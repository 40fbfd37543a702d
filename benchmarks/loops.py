"""The kernels inside published loops, and the newer operations beside the fused write.

    python benchmarks/loops.py --out loops.json
    python benchmarks/loops.py --shapes layer --rounds 2 --draws 2  # some seconds

Loops: average sharpness, MeZO, SAM and ASAM as published (``published.py``), beside the recipes of the
documentation (docs/recipes). Forward and backward passes are left out of both. Operations: ``add_``, numbers
for each tensor, offsets, each beside a write or an interpolation that moves as many bytes.

Each row first checks that both sides leave the same numbers, given the same noise. Then both are timed in
turns, from cold caches: medians and quartiles in milliseconds, and the ratios of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import runpy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle
from typing import Any

import clock
import machine
import peers
import published
import torch
from torch import Tensor, nn

import rft_fast as rft
from rft_fast.names import Weight

RECIPES = pathlib.Path(__file__).parents[1] / "docs" / "recipes"
CPU = torch.device("cpu")
RHO, EPS, LR, SEED = 0.05, 1e-3, 1e-2, 0
LOSSES = (0.7, 0.5)  # what a step of MeZO measures above and below
# How many elements of each tensor are compared.
COMPARED = 4096

Run = Callable[[], object]
# Index, zero-shot, fine-tuned, noise -> what a write should give, in float64.
Exact = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One measurement.

    faster: whether goal is how many times faster ours should be, at least; else how many times as long it may
    take, at most.
    """

    name: str
    ours: Run
    other: Run
    check: Callable[[], None]
    goal: float
    rounds: int
    faster: bool = True
    moved: int = 0  # bytes of each element that ours reads and writes at least; 0: bound by arithmetic
    seconds: list[tuple[float, float]] = field(default_factory=list)

    def measure(self) -> None:
        self.check()
        self.ours(), self.other()  # warm up
        self.seconds = [
            (clock.measure(CPU, self.ours), clock.measure(CPU, self.other)) for _ in range(self.rounds)
        ]


def model_of(tensors: list[Tensor]) -> nn.Module:
    return nn.ParameterList(nn.Parameter(t.clone()) for t in tensors)


class Watch:
    """Stands for the loss in a loop that is checked: keeps some weights, returns losses known beforehand."""

    def __init__(self, losses: tuple[float, ...] = LOSSES) -> None:
        self._losses = cycle(losses)
        self.seen: list[list[Tensor]] = []

    def __call__(self, model: nn.Module) -> float:
        self.seen.append([p.detach().flatten()[:COMPARED].clone() for p in model.parameters()])
        return next(self._losses)


def same(ours: list[list[Tensor]], theirs: list[list[Tensor]], what: str) -> None:
    """Check that both sides had the same weights at every evaluation."""
    if len(ours) != len(theirs):
        raise AssertionError(f"{what}: {len(ours)} evaluations of ours, {len(theirs)} of the other's")
    for at, (mine, others) in enumerate(zip(ours, theirs)):
        for i, (a, b) in enumerate(zip(mine, others)):
            torch.testing.assert_close(
                a,
                b,
                rtol=1e-5,
                atol=1e-7,
                msg=lambda text, at=at, i=i: f"{what}, evaluation {at}, tensor {i}: {text}",
            )


def losses() -> Callable[[nn.Module], float]:
    """Stands for the loss in a loop that is timed."""
    numbers = cycle(LOSSES)
    return lambda _model: next(numbers)


def sharpness(case: peers.Case, rounds: int, draws: int) -> Row:
    ours = runpy.run_path(str(RECIPES / "average_sharpness.py"))["average_sharpness"]
    model = model_of(case.finetuned)

    def check() -> None:
        mine, theirs, numbers = Watch(), Watch(), count()
        eps: list[Tensor] = []

        def noise(i: int, _like: Tensor) -> Tensor:
            if i == 0:
                eps[:] = rft.noise_like(case.finetuned, SEED, next(numbers))
            return eps[i]

        ours(model, mine, RHO, 2, SEED)
        published.average_sharpness(model, theirs, RHO, 2, noise)
        same(mine.seen, theirs.seen, "average sharpness")

    return Row(
        f"average sharpness, {draws} draws",
        partial(ours, model, losses(), RHO, draws, SEED),
        partial(published.average_sharpness, model, losses(), RHO, draws),
        check,
        4.5,
        rounds,
    )


def mezo(case: peers.Case, rounds: int) -> Iterator[Row]:
    ours = runpy.run_path(str(RECIPES / "mezo.py"))["mezo_step"]
    mine, theirs = model_of(case.finetuned), model_of(case.finetuned)
    steps = count()

    def perturb() -> None:
        rft.perturb_(mine, EPS, seed=SEED, draw=next(steps), adaptive=False)

    def step() -> None:
        ours(mine, loss, next(steps), EPS, LR, SEED)

    def check_step() -> None:
        first, second = Watch(), Watch()
        a, b = model_of(case.finetuned), model_of(case.finetuned)
        eps = rft.noise_like(case.finetuned, SEED, 3)
        ours(a, first, 3, EPS, LR, SEED)
        published.mezo_step(b, second, EPS, LR, SEED, lambda i, _like: eps[i])
        first(a), second(b)
        same(first.seen, second.seen, "MeZO")

    def check_call() -> None:
        first, second = Watch(), Watch()
        a, b = model_of(case.finetuned), model_of(case.finetuned)
        rft.perturb_(a, EPS, seed=SEED, draw=3, adaptive=False)
        eps = rft.noise_like(case.finetuned, SEED, 3)
        published.mezo_perturb(b, 1, EPS, SEED, lambda i, _like: eps[i])
        first(a), second(b)
        same(first.seen, second.seen, "MeZO")

    loss, their_loss = losses(), losses()
    yield Row(
        "MeZO, zo_perturb_parameters once",
        perturb,
        lambda: published.mezo_perturb(theirs, 1, EPS, next(steps)),
        check_call,
        4.5,
        rounds,
    )
    yield Row(
        "MeZO, a whole step (ours: restored and updated in one pass)",
        step,
        lambda: published.mezo_step(theirs, their_loss, EPS, LR, next(steps)),
        check_step,
        4.5,
        rounds,
    )


class OurSam:
    """The recipes sam.py and asam.py around their two gradients."""

    def __init__(self, base: torch.optim.Optimizer, rho: float, adaptive: bool) -> None:
        recipe = runpy.run_path(str(RECIPES / ("asam.py" if adaptive else "sam.py")))
        self.climb, self.swap, self.base, self.rho = recipe["climb"], recipe["swap"], base, rho
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.spare = [torch.empty_like(p) for p in self.params]

    def first_step(self) -> None:
        self.climb(self.params, self.spare, self.rho)

    def second_step(self) -> None:
        self.swap(self.params, self.spare)
        self.base.step()


def sam(case: peers.Case, rounds: int, adaptive: bool) -> Row:
    def steps(kind: type[OurSam] | type[published.Sam]) -> OurSam | published.Sam:
        model = model_of(case.finetuned)
        for p, g in zip(model.parameters(), case.zeroshot):
            p.grad = g
        return kind(torch.optim.SGD(model.parameters(), lr=1e-4), RHO, adaptive)

    def both(made: OurSam | published.Sam) -> None:
        made.first_step()
        made.second_step()

    def check() -> None:
        found = []
        for kind in (OurSam, published.Sam):
            made, watch = steps(kind), Watch()
            for step in (made.first_step, made.second_step):
                step()
                watch(nn.ParameterList(made.params))
            found.append(watch.seen)
        same(*found, "ASAM" if adaptive else "SAM")

    name = f"{'ASAM' if adaptive else 'SAM'}, both steps and SGD's"
    # In float32: the norm reads g (ASAM: w, too), add_ reads w and g and writes, and so does SGD.
    moved = 4 * (8 if adaptive else 7)
    run, other = (partial(both, steps(kind)) for kind in (OurSam, published.Sam))
    return Row(name, run, other, check, 2.0, rounds, moved=moved)


def operations(case: peers.Case, rounds: int) -> Iterator[Row]:
    """The newer operations; the other side is an interpolation or a write that moves as many bytes."""
    out, w0, w1 = case.out, case.zeroshot, case.finetuned
    alphas = [0.1 + 0.8 * i / len(out) for i in range(len(out))]
    rhos = [RHO * (1 + i % 3) for i in range(len(out))]
    plan = rft.Plan(out, w0, w1)
    interpolate = partial(rft.interpolate_, out, w0, w1, 0.3)

    def row(name: str, run: Run, beside: Run, exact: Exact) -> Row:
        return Row(name, run, beside, partial(expect, run, exact), 1.1, rounds, faster=False)

    def expect(run: Run, exact: Exact) -> None:
        run()
        for i, (got, a, b, eps) in enumerate(zip(out, w0, w1, rft.noise_like(w1, SEED, 0))):
            a, b, eps, got = (t.flatten()[:COMPARED].double() for t in (a, b, eps, got))
            torch.testing.assert_close(got, exact(i, a, b, eps), rtol=1e-5, atol=1e-8)

    def added(weight: Weight, factor: Callable[[Tensor], Tensor]) -> Row:
        run = partial(rft.add_, out, w1, w0, 0.3, weight)
        name = f'add_, weight="{weight}"; interpolate_'
        return row(name, run, interpolate, lambda i, a, b, eps: b + 0.3 * factor(b) * a)

    yield added("none", torch.ones_like)
    yield added("abs", torch.abs)
    yield added("square", torch.square)
    yield row(
        "add_, a scale for each tensor; interpolate_",
        partial(rft.add_, out, w1, w0, alphas, "square"),
        interpolate,
        lambda i, a, b, eps: b + alphas[i] * b * b * a,
    )
    yield row(
        "an alpha for each tensor; one alpha",
        partial(plan.write, alphas),
        partial(plan.write, 0.3),
        lambda i, a, b, eps: a + alphas[i] * (b - a),
    )
    noisy = partial(plan.write, 0.3, rho=RHO, seed=SEED)
    yield row(
        "alpha and rho for each tensor; one of each",
        partial(plan.write, alphas, rho=rhos, seed=SEED),
        noisy,
        lambda i, a, b, eps: a + alphas[i] * (b + rhos[i] * b.abs() * eps - a),
    )
    # All tensors, from some place in a larger model on, with the noise of that place.
    start = 4 * 2**32
    placed = rft.Plan(out, w0, w1, offsets=start)
    there = [eps.flatten()[:COMPARED].double() for eps in rft.noise_like(w1, SEED, 0, offset=start)]
    yield row(
        "noise with an offset; without",
        partial(placed.write, 0.3, rho=RHO, seed=SEED),
        noisy,
        lambda i, a, b, eps: a + 0.3 * (b + RHO * b.abs() * there[i] - a),
    )


def facts(row: Row, elements: int) -> dict[str, Any]:
    """Return the figures of a row, in seconds. ratio: times faster than a loop; times as long as a write."""
    ours, theirs = ([s[side] for s in row.seconds] for side in (0, 1))
    ratios = [b / a if row.faster else a / b for a, b in row.seconds]
    ratio = statistics.median(ratios)
    return {
        "name": row.name,
        "elements": elements,
        "seconds": row.seconds,
        "ours": spread(ours),
        "other": spread(theirs),
        "ratio": spread(ratios),
        "GB/s": row.moved * elements / statistics.median(ours) / 1e9,
        "range": [min(ratios), max(ratios)],
        "goal": f"{'at least' if row.faster else 'at most'} {row.goal:g}",
        "reached": ratio >= row.goal if row.faster else ratio <= row.goal,
    }


def spread(numbers: list[float]) -> list[float]:
    """Return the median and the quartiles."""
    if len(numbers) < 2:
        return [*numbers] * 3
    first, middle, last = statistics.quantiles(numbers, method="inclusive")
    return [middle, first, last]


def head(title: str, beside: str) -> str:
    columns = [title, "ours, ms (quartiles)", f"{beside}, ms (quartiles)", "ratio (range)", "goal"]
    return f"\n| {' | '.join(columns)} |\n| --- | ---: | ---: | ---: | ---: |"


def line(row: dict[str, Any]) -> str:
    times = "{:.4g} ({:.4g} to {:.4g})"
    cells = [row["name"], *(times.format(*(1e3 * s for s in row[side])) for side in ("ours", "other"))]
    cells.append("{:.2f} ({:.2f} to {:.2f})".format(row["ratio"][0], *row["range"]))
    cells.append(f"{row['goal']}: {'reached' if row['reached'] else 'missed'}")
    return f"| {' | '.join(cells)} |"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the kernels inside published loops")
    parser.add_argument("--shapes", default="ViT-B-32", help="layer, 64M, ViT-B-32 or ViT-L-14")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=5, help="of the loops; of operations three times as many"
    )
    parser.add_argument("--draws", type=int, default=5, help="of average sharpness")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for all figures")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    case = peers.make_case(options.shapes, torch.float32, CPU)

    def loops() -> Iterator[Row]:
        yield sharpness(case, options.rounds, options.draws)
        yield from mezo(case, options.rounds)
        yield sam(case, options.rounds, adaptive=False)
        yield sam(case, options.rounds, adaptive=True)

    about = {**machine.about(CPU), "options": {name: str(value) for name, value in vars(options).items()}}
    torch_version = about["versions"]["torch"]
    print(f"{about['device']}, torch {torch_version}, {options.shapes}, float32, {about['date'][:10]}")
    found: dict[str, Any] = {"about": about}
    kinds = {
        "loops": (loops(), "as published"),
        "operations": (operations(case, 3 * options.rounds), "beside"),
    }
    for kind, (rows, versus) in kinds.items():
        found[kind] = []
        print(head(kind, versus))
        for row in rows:
            row.measure()
            found[kind].append(facts(row, case.elements))
            print(line(found[kind][-1]), flush=True)
        if kind == "loops":
            found["copy, GB/s"] = copy = clock.bandwidth(CPU, 8 * case.elements, 2)
            at = ", ".join(f"{r['name'].split(',')[0]} {r['GB/s']:.3g}" for r in found[kind] if r["GB/s"])
            print(f"\nGB/s, of bytes that must be moved: {at}; a copy in the same run {copy:.3g}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
