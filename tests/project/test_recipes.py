"""The recipes of the documentation: each runs, and does what the published formula says, in plain torch."""

from __future__ import annotations

import copy
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PATIENCE
from torch import Tensor, nn
from torch.func import functional_call

import rft_fast as rft

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
IMAGES = torch.randn(32, 20, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (32,), generator=torch.Generator().manual_seed(2))

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def as_before(one_thread: None) -> Iterator[None]:
    """The scripts seed torch's generator."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def recipe(name: str, run: bool = True) -> dict[str, Any]:
    """Names of a script, which runs as a program unless told otherwise; its result is ``result``."""
    return runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__" if run else name)


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 7), nn.GELU(), nn.Linear(7, 3))


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(IMAGES), LABELS)


def exact_loss(weights: Weights) -> Tensor:
    output = functional_call(build().double(), weights, IMAGES.double())
    return nn.functional.cross_entropy(output, LABELS)


def gradient(weights: Weights) -> Weights:
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    grads = torch.autograd.grad(exact_loss(leaves), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def exact(model: nn.Module) -> Weights:
    return {name: p.detach().double() for name, p in model.named_parameters()}


def noise(model: nn.Module, draw: int) -> Weights:
    return {name: eps.double() for name, eps in rft.noise_like(model, seed=0, draw=draw).items()}


def norm(weights: Weights) -> Tensor:
    return torch.cat([w.flatten() for w in weights.values()]).norm()


def assert_close(model: nn.Module, expected: Weights) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=2e-6)


def test_every_recipe_is_listed_and_short() -> None:
    files = {file.name: file.read_text("utf-8") for file in RECIPES.glob("*.py")}
    listed = re.findall(
        r"^\| \[(\w+\.py)\]\(\1\) \|", (RECIPES / "index.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(files) and len(files) == 10
    assert all(len(source.splitlines()) < 60 for source in files.values())


def test_mezo() -> None:
    found = recipe("mezo")
    first, last = found["result"]
    assert last < first - 0.1

    model, eps, lr = build(), 1e-2, 0.1

    @torch.no_grad()
    def number(model: nn.Module) -> float:
        return loss(model).item()

    for step in (0, 1, 7):
        w, z = exact(model), noise(model, step)
        slope = found["mezo_step"](model, number, step, eps, lr)
        with torch.no_grad():
            above, below = (exact_loss({n: w[n] + s * eps * z[n] for n in w}).item() for s in (1, -1))
        expected = (above - below) / (2 * eps)
        assert slope == pytest.approx(expected, abs=1e-4)  # losses in float32, over 2 eps
        assert_close(model, {n: w[n] - lr * slope * z[n] for n in w})


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_sam_and_asam(name: str) -> None:
    found = recipe(name)
    first, last = found["result"]
    assert last < first / 4

    model, rho, lr = build(), 0.3, 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    spare = [torch.empty_like(p) for p in model.parameters()]
    for _ in range(2):
        w = exact(model)
        g = gradient(w)
        if name == "sam":
            top = {n: w[n] + rho * g[n] / norm(g) for n in w}
        else:
            scaled = norm({n: w[n].abs() * g[n] for n in w})
            top = {n: w[n] + rho * w[n] ** 2 * g[n] / scaled for n in w}
        step = gradient(top)
        found[f"{name}_step"](model, optimizer, loss, spare, rho)
        assert_close(model, {n: w[n] - lr * step[n] for n in w})
    optimizer.param_groups[0]["lr"], w = 0.0, exact(model)
    found[f"{name}_step"](model, optimizer, loss, spare, rho)
    assert all(torch.equal(p.double(), w[n]) for n, p in model.named_parameters())


def test_average_sharpness() -> None:
    found = recipe("average_sharpness")
    means = [mean for mean, _ in found["result"].values()]
    assert 0 < means[0] < means[1] < means[2]

    model, rho, draws = build(), 0.3, 9
    w = exact(model)
    with torch.no_grad():
        mean, error = found["average_sharpness"](model, lambda model: loss(model).item(), rho, draws)
        rises = []
        for draw in range(draws):
            eps = noise(model, draw)
            rises.append(exact_loss({n: w[n] + rho * w[n].abs() * eps[n] for n in w}) - exact_loss(w))
    assert mean == pytest.approx(torch.stack(rises).mean().item(), abs=1e-6)
    assert error == pytest.approx(torch.stack(rises).std().item() / 3, abs=1e-6)
    assert all(torch.equal(p.double(), w[n]) for n, p in model.named_parameters())


def test_noisy_averaging() -> None:
    found = recipe("noisy_averaging")
    first, last = found["result"]
    assert last < first - 0.1

    model, rho, lr = build(), 0.1, 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    before = [torch.empty_like(p) for p in model.parameters()]
    average = [torch.zeros_like(p) for p in model.parameters()]
    w, seen = exact(model), []
    for step in range(4):
        eps = noise(model, step)
        g = gradient({n: w[n] + rho * w[n].abs() * eps[n] for n in w})
        w = {n: w[n] - lr * g[n] for n in w}
        seen.append(w)
        found["noisy_step"](model, optimizer, loss, before, average, step, rho)
    assert_close(model, w)
    for got, n in zip(average, w, strict=True):
        expected = torch.stack([weights[n] for weights in seen]).mean(0)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


def mean_of(models: list[nn.Module]) -> Weights:
    every = [exact(model) for model in models]
    return {n: torch.stack([w[n] for w in every]).mean(0) for n in every[0]}


def test_soups() -> None:
    found = recipe("soups")
    assert found["result"]["greedy"] > found["result"]["uniform"]

    models = [build() for _ in range(5)]
    for k, model in enumerate(models):
        rft.perturb_(model, 1.0, draw=k)
    soup = build()
    found["uniform_soup"](soup, models)
    assert_close(soup, mean_of(models))

    # An accuracy that is a function of the weights: the models' order, and what is kept, follow from it.
    def score(weights: Weights) -> float:
        return -round(weights["0.weight"].abs().sum().item() + 5 * weights["2.bias"].sum().item(), 2)

    ranked = sorted(models, key=lambda model: score(exact(model)), reverse=True)
    kept = ranked[:1]
    for model in ranked[1:]:
        if score(mean_of([*kept, model])) >= score(mean_of(kept)):
            kept = [*kept, model]
    assert 1 < len(kept)
    chosen = found["greedy_soup"](soup, models, lambda model: score(exact(model)))
    assert [models.index(model) for model in chosen] == [models.index(model) for model in kept]
    assert_close(soup, mean_of(kept))


def test_dare() -> None:
    found = recipe("dare")
    assert found["result"]["keep 0.1"] > found["result"]["zeroshot"] + 0.3

    zeroshot, finetuned, out = build(), build(), build()
    rft.perturb_(finetuned, 0.5, draw=0)
    found["dare"](out, zeroshot, finetuned, keep=0.25, scale=0.7, seed=5)
    w0, w1, mask = exact(zeroshot), exact(finetuned), rft.keep_mask_like(out, 0.25, seed=5)
    assert_close(out, {n: w0[n] + 0.7 * mask[n] * (w1[n] - w0[n]) / 0.25 for n in w0})


def test_lines() -> None:
    found = recipe("lines")
    assert found["result"] == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1, 1], abs=1e-5)

    zeroshot, finetuned, out = build(), build(), build()
    rft.perturb_(finetuned, 0.5, draw=0)
    found["lines"](out, zeroshot, finetuned, lambda name: 1 + int(name[0] == "2"), gamma=0.3, beta=0.5)
    w0, w1 = exact(zeroshot), exact(finetuned)
    alpha = {n: 0.3 if n.startswith("0") else 0.8 for n in w0}
    assert_close(out, {n: (1 - alpha[n]) * w0[n] + alpha[n] * w1[n] for n in w0})


@pytest.mark.compile
@pytest.mark.slow
def test_torch_compile() -> None:
    found = recipe("torch_compile")
    assert max(found["result"]) < 1e-6

    model = build()
    w, eps = exact(model), noise(model, 2)
    output = found["noisy_output"](model, IMAGES, 2)
    expected = functional_call(
        build().double(), {n: w[n] + 0.1 * w[n].abs() * eps[n] for n in w}, IMAGES.double()
    )
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p.double(), w[n]) for n, p in model.named_parameters())


@pytest.mark.slow
def test_fsdp2() -> None:
    """The script compares with the model in one piece; here, that model with its formula."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(RECIPES / "fsdp2.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"draw {draw}: the same bits" for draw in range(3)]

    whole = recipe("fsdp2", run=False)["build"]()
    before = copy.deepcopy(whole)
    rft.perturb_(whole, 0.1, draw=2)
    w, eps = exact(before), noise(before, 2)
    assert_close(whole, {n: w[n] + 0.1 * w[n].abs() * eps[n] for n in w})
