"""Merged models against the papers' formulas in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_merge
from support.tiny_merge import State, close, merged
from support.wording import refused

import rft_fast as rft
from rft_fast.merge import lines, provenance
from rft_fast.merge.__main__ import main

ZERO = tiny_merge.base()
ONE, TWO, THREE = (tiny_merge.moved(ZERO, seed) for seed in (1, 2, 3))


def each(formula: Callable[..., torch.Tensor], *states: State) -> State:
    """The formula, tensor by tensor in float64."""
    return {name: formula(*(state[name].double() for state in states)) for name in states[0]}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return tiny_merge.put(tmp_path, zero=ZERO, one=ONE)


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    return tiny_merge.put(tmp_path, zero=ZERO, one=ONE, two=TWO, three=THREE)


@pytest.mark.parametrize("alpha", [0.4, -0.5, 1.7])
def test_interpolation(pair: dict[str, Path], tmp_path: Path, alpha: float) -> None:
    got, outcome = merged("interpolate", pair, tmp_path / "out.safetensors", alpha=(alpha,))
    close(got, each(lambda a, b: (1 - alpha) * a + alpha * b, ZERO, ONE))
    assert outcome.merged == len(ZERO) and outcome.copied == 0


@pytest.mark.parametrize(("alpha", "end"), [(0.0, ZERO), (1.0, ONE)])
def test_ends_are_exact(pair: dict[str, Path], tmp_path: Path, alpha: float, end: State) -> None:
    got, _ = merged("interpolate", pair, tmp_path / "out.safetensors", alpha=(alpha,))
    assert all(torch.equal(got[name], end[name]) for name in end)


def test_runs_of_elements_fit_together(tmp_path: Path) -> None:
    """A tensor of several runs and a rest, of each dtype and of two."""
    n = (1 << 20) + 17
    for dtypes in (
        (torch.float32,) * 2,
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64,) * 2,
    ):
        a = {"visual.x": torch.randn(1, n).to(dtypes[0])}
        b = {"visual.x": (a["visual.x"].double() + 0.1 * torch.randn(1, n)).to(dtypes[1])}
        files = tiny_merge.put(tmp_path, zero=a, one=b)
        got, _ = merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.3,), overwrite=True)
        assert got["visual.x"].dtype == dtypes[1]
        truth = 0.7 * a["visual.x"].double() + 0.3 * b["visual.x"].double()
        unit = torch.finfo(dtypes[1]).eps if dtypes[1] != torch.float64 else 1e-12
        assert ((got["visual.x"].double() - truth).abs() <= unit * truth.abs() + 1e-7).all()


def test_a_table_of_layers(pair: dict[str, Path], tmp_path: Path) -> None:
    table = (0.5, ("visual.conv1", 0.0), (r"re:visual\.transformer\.resblocks\.1\..*", 2.0))
    got, _ = merged("interpolate", pair, tmp_path / "out.safetensors", alpha=table)

    def alpha(name: str) -> float:
        return 0.0 if "conv1" in name else 2.0 if "resblocks.1." in name else 0.5

    close(got, {n: (1 - alpha(n)) * ZERO[n].double() + alpha(n) * ONE[n].double() for n in ZERO})


def numbers(file: Path) -> Any:
    found = provenance(file)
    assert found is not None
    return found["numbers"]


def test_a_table_in_a_file_is_the_table(pair: dict[str, Path], tmp_path: Path) -> None:
    """To the bit, and so does the result say; from the command line, too."""
    file, pattern = tmp_path / "table.toml", r"re:visual\.transformer\.resblocks\.1\..*"
    file.write_text(f"rest = 0.5\nvisual.conv1 = 0\n'{pattern}' = 2.0\n")
    table = (0.5, ("visual.conv1", 0.0), (pattern, 2.0))
    results: dict[str, tuple[State, Any]] = {}
    for name, how in {"words": {"alpha": table}, "file": {"alpha_table": table}}.items():
        got, _ = merged("interpolate", pair, tmp_path / f"{name}.safetensors", **how)
        results[name] = got, numbers(tmp_path / f"{name}.safetensors")
    command = ["interpolate", "--zeroshot", str(pair["zero"]), "--finetuned", str(pair["one"])]
    out = tmp_path / "command.safetensors"
    assert main([*command, "--alpha-table", str(file), "--out", str(out)]) == 0
    results["command"] = load_file(out), numbers(out)
    for got, said in results.values():
        assert said == results["words"][1]
        assert all(torch.equal(got[n], results["words"][0][n]) for n in ZERO)


def test_lines_of_the_paper(pair: dict[str, Path], tmp_path: Path) -> None:
    """Wang et al. 2024: gamma + beta (l - 1) / (L - 1) for block l of L."""
    got, _ = merged("interpolate", pair, tmp_path / "out.safetensors", lines=(0.2, 0.6))
    alphas = {"resblocks.0.": 0.2, "resblocks.1.": 0.5, "resblocks.2.": 0.8, "conv1": 0.2, "class_emb": 0.2}

    def alpha(name: str) -> float:
        return next((value for part, value in alphas.items() if part in name), 0.8)

    close(got, {n: (1 - alpha(n)) * ZERO[n].double() + alpha(n) * ONE[n].double() for n in ZERO})
    towers = lines([f"{tower}resblocks.{i}.x" for tower in ("visual.", "") for i in range(11)], 0, 1)
    assert list(towers.values()) == pytest.approx([i / 10 for i in range(11)] * 2)


def test_soup_is_the_mean(four: dict[str, Path], tmp_path: Path) -> None:
    del four["zero"]
    got, _ = merged("soup", four, tmp_path / "out.safetensors")
    close(got, each(lambda *ws: sum(ws[1:], ws[0]) / 3, ONE, TWO, THREE))


def test_task_arithmetic_with_models_and_differences(four: dict[str, Path], tmp_path: Path) -> None:
    """Ilharco et al. 2023; a file that is a difference is recognised."""
    vector = {name: TWO[name] - ZERO[name] for name in ZERO}
    files = tiny_merge.put(tmp_path, two=vector)
    got, outcome = merged(
        "task-arithmetic", four | files, tmp_path / "out.safetensors", scale=(0.5, -0.3, 1.0)
    )
    close(got, each(lambda w, a, b, c: w + 0.5 * (a - w) - 0.3 * (b - w) + (c - w), ZERO, ONE, TWO, THREE))
    assert [s.get("difference", False) for s in outcome.provenance["sources"]] == [False, False, True, False]


def test_model_stock(four: dict[str, Path], tmp_path: Path) -> None:
    """Jang et al. 2024, with the mean of the cosines of all pairs, as mergekit has it."""

    def truth(w: torch.Tensor, *ws: torch.Tensor) -> torch.Tensor:
        if not w.numel():
            return w
        pairs = [((a - w).flatten(), (b - w).flatten()) for a, b in itertools.combinations(ws, 2)]
        cosine = sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        return t * (ws[0] + ws[1] + ws[2]) / 3 + (1 - t) * w

    torch.manual_seed(0)
    shared = {name: 0.2 * torch.randn(ZERO[name].shape) for name in ZERO}  # so that cosines are positive
    states = [{name: state[name] + shared[name] for name in state} for state in (ONE, TWO, THREE)]
    files = tiny_merge.put(tmp_path, **dict(zip(("one", "two", "three"), states, strict=True)))
    got, _ = merged("model-stock", four | files, tmp_path / "b.safetensors")
    close(got, each(truth, ZERO, *states))


def test_model_stock_in_closed_form(tmp_path: Path) -> None:
    """Differences at 60 degrees: t = 2/3 for two models; at 120 degrees t = -2; at 180 no result."""
    zero = {"visual.x": torch.tensor([[10.0, 10.0]])}
    for degrees, t in ((60, 2 / 3), (120, -2), (180, None)):
        step = torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])
        one, two = zero["visual.x"] + torch.tensor([[1.0, 0.0]]), zero["visual.x"] + step
        files = tiny_merge.put(tmp_path, zero=zero, one={"visual.x": one}, two={"visual.x": two})
        out = tmp_path / f"{degrees}.safetensors"
        if t is None:
            with refused(ValueError, "visual.x"):
                merged("model-stock", files, out)
        else:
            mean = (one.double() + two.double()) / 2
            close(merged("model-stock", files, out)[0], {"visual.x": t * mean + (1 - t) * zero["visual.x"]})


def elected(vectors: list[torch.Tensor], how: str) -> torch.Tensor:
    """Element by element, in plain Python."""
    rows = [vector.flatten().tolist() for vector in vectors]
    out = []
    for values in zip(*rows, strict=True):
        positive = sum(values) >= 0
        same = [value for value in values if value and (value > 0) == positive]
        out.append(sum(same) / (len(same) if how == "mean" and same else 1))
    return torch.tensor(out, dtype=torch.float64).view(vectors[0].shape)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_ties(four: dict[str, Path], tmp_path: Path, how: str) -> None:
    """Yadav et al. 2023, Alg. 1; one of the files is the difference itself."""
    files = four | tiny_merge.put(tmp_path, two={name: TWO[name] - ZERO[name] for name in ZERO})
    got, outcome = merged("ties", files, tmp_path / "o.safetensors", density=0.4, scale=(0.7,), agreeing=how)

    def trimmed(vector: torch.Tensor) -> torch.Tensor:
        flat = vector.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))
        kept = set(order[: max(1, int(0.4 * len(flat)))])
        values = [value if i in kept else 0.0 for i, value in enumerate(flat)]
        return torch.tensor(values, dtype=torch.float64).view(vector.shape)

    def truth(w: torch.Tensor, *ws: torch.Tensor) -> torch.Tensor:
        return w + 0.7 * elected([trimmed(one - w) for one in ws], how)

    close(got, each(truth, ZERO, ONE, TWO, THREE))
    assert "difference" in outcome.provenance["sources"][2]


def dropped(folder: Path, method: str, **options: Any) -> State:
    """What a merge adds to the zero-shot model, of models whose differences are 1 and 2 everywhere."""
    names = ("visual.a.weight", "visual.b.weight")
    zero = {name: 10 * torch.randn(200, 300) for name in names}
    models = [{name: zero[name] + size for name in names} for size in (1.0, 2.0)]
    files = tiny_merge.put(folder, zero=zero, one=models[0], two=models[1])
    got, _ = merged(method, files, folder / f"{method}.safetensors", drop=0.75, overwrite=True, **options)
    return {name: got[name].double() - zero[name].double() for name in names}


def shares(values: torch.Tensor, expected: dict[float, float]) -> None:
    """Compare the frequencies of values with their probabilities; there are no other values."""
    hits = {level: (values - level).abs() < 1e-4 for level in expected}
    assert sum(int(hit.sum()) for hit in hits.values()) == values.numel()
    for level, share in expected.items():
        limit = 4 * math.sqrt(share * (1 - share) / values.numel())
        assert abs(hits[level].double().mean() - share) < limit, level


def test_dare_by_its_distribution(tmp_path: Path) -> None:
    """Yu et al. 2024: an element is dropped with probability .75, and four times as large otherwise.

    The masks of two models, and of two tensors, are independent.
    """
    added = dropped(tmp_path, "dare", scale=(0.5, -1.0), seed=3)
    for values in added.values():
        shares(values, {0: 9 / 16, 2: 3 / 16, -8: 3 / 16, -6: 1 / 16})
    a, b = (values.abs() < 1e-4 for values in added.values())
    shares((a & b).double(), {1: (9 / 16) ** 2, 0: 1 - (9 / 16) ** 2})


def test_dare_that_drops_nothing_is_task_arithmetic(four: dict[str, Path], tmp_path: Path) -> None:
    got, _ = merged("dare", four, tmp_path / "out.safetensors", drop=0.0, scale=(0.3,))
    close(got, each(lambda w, *ws: w + 0.3 * sum(v - w for v in ws), ZERO, ONE, TWO, THREE))


def test_dare_ties_by_its_distribution(tmp_path: Path) -> None:
    """Signs agree here: of 4 and 8 times the scale both are kept, one of them, or nothing."""
    for agreeing, both in (("mean", 3.0), ("sum", 6.0)):
        added = dropped(tmp_path, "dare-ties", scale=(0.5,), agreeing=agreeing)
        for values in added.values():
            shares(values, {0: 9 / 16, 2: 3 / 16, 4: 3 / 16, both: 1 / 16})


def test_slerp(tmp_path: Path) -> None:
    """Shoemake 1985 where the angle is large, linear where it is small or a tensor is zero."""
    far = tiny_merge.moved(ZERO, 5, size=0.8)
    far["visual.ln_post.weight"] = ZERO["visual.ln_post.weight"] * 1.5  # the same direction
    far["logit_scale"] = torch.zeros(())
    files = tiny_merge.put(tmp_path, zero=ZERO, one=far)
    got, _ = merged("slerp", files, tmp_path / "out.safetensors", alpha=(0.3,))

    def truth(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        norms = float(a.norm() * b.norm())
        cosine = float((a * b).sum()) / norms if norms else 1.0
        if abs(cosine) > 0.9995:
            return 0.7 * a + 0.3 * b
        t = math.acos(cosine)
        return (math.sin(0.7 * t) * a + math.sin(0.3 * t) * b) / math.sin(t)

    close(got, each(truth, ZERO, far))


def test_held_layers_are_those_of_the_zero_shot_model(pair: dict[str, Path], tmp_path: Path) -> None:
    chosen = ("visual.conv1", r"re:.*resblocks\.2\..*")
    got, _ = merged("hold", pair, tmp_path / "out.safetensors", layers=chosen)
    held = {name for name in ZERO if "conv1" in name or "resblocks.2." in name}
    assert all(torch.equal(got[name], (ZERO if name in held else ONE)[name]) for name in ZERO)
    got, _ = merged("hold", pair, tmp_path / "b.safetensors", layers=chosen, alpha=(0.25,))
    alpha = {name: 0.0 if name in held else 0.25 for name in ZERO}
    close(got, {n: (1 - alpha[n]) * ZERO[n].double() + alpha[n] * ONE[n].double() for n in ZERO})


@pytest.mark.parametrize("fill", ["zero", "zeroshot"])
def test_pruning_masks_fine_tuned_weights_and_interpolates(tmp_path: Path, fill: str) -> None:
    """Algorithm 1: each weight of the layers is kept with its probability, by masks that differ."""
    shape, names = (200, 300), ("visual.a.weight", "visual.b.weight", "visual.c.weight")
    zero = {name: torch.randn(shape) for name in names}
    one = {name: zero[name] + 0.1 for name in names}
    files = tiny_merge.put(tmp_path, zero=zero, one=one)
    options = {"layers": ("visual.a", "visual.b"), "keep": 0.3, "fill": fill, "alpha": (0.5,), "seed": 7}
    got, _ = merged("prune", files, tmp_path / "out.safetensors", **options)
    masks = []
    for name in names[:2]:
        pruned = zero[name] if fill == "zeroshot" else torch.zeros(shape)
        whole, masked = (0.5 * (zero[name].double() + w.double()) for w in (one[name], pruned))
        kept = (got[name].double() - whole).abs() < 1e-6
        assert (kept | ((got[name].double() - masked).abs() < 1e-6)).all()
        assert abs(kept.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / kept.numel())
        masks.append(kept)
    agree = (masks[0] == masks[1]).double().mean()  # of independent masks: .3 ** 2 + .7 ** 2
    assert abs(agree - 0.58) < 4 * math.sqrt(0.58 * 0.42 / agree.numel() / 60000)
    torch.testing.assert_close(got[names[2]], (zero[names[2]] + one[names[2]]) / 2)
    again, _ = merged("prune", files, tmp_path / "b.safetensors", **options)
    other, _ = merged("prune", files, tmp_path / "c.safetensors", **options | {"seed": 8})
    assert torch.equal(got[names[0]], again[names[0]]) and not torch.equal(got[names[0]], other[names[0]])


def test_pruning_to_zero_shot_weights_does_not_round_them(tmp_path: Path) -> None:
    """Weights in float32 beside fine-tuned ones in bfloat16: all masked, the result is zero-shot."""
    zero = {"visual.a.weight": torch.randn(64, 48)}
    one = {"visual.a.weight": (zero["visual.a.weight"] + 0.1).bfloat16()}
    files = tiny_merge.put(tmp_path, zero=zero, one=one)
    options = {"layers": ("visual.a",), "keep": 0.0, "fill": "zeroshot", "alpha": (0.5,), "dtype": "float32"}
    got, _ = merged("prune", files, tmp_path / "out.safetensors", **options)
    torch.testing.assert_close(got["visual.a.weight"], zero["visual.a.weight"], rtol=0, atol=1e-6)


def test_interpolation_is_that_of_the_kernels(pair: dict[str, Path], tmp_path: Path) -> None:
    """A merged model has the very bits of the path's point."""
    got, _ = merged("interpolate", pair, tmp_path / "out.safetensors", alpha=(0.4,))
    names = [name for name in ZERO if ZERO[name].numel()]
    out = [torch.empty_like(ZERO[name]) for name in names]
    rft.interpolate_(out, [ZERO[name] for name in names], [ONE[name] for name in names], 0.4, "reference")
    assert all(torch.equal(got[name], tensor) for name, tensor in zip(names, out, strict=True))


def test_dtypes_are_those_of_the_fine_tuned_file(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in ONE.items()}
    files = tiny_merge.put(tmp_path, zero=ZERO, one=half)
    got, _ = merged("interpolate", files, tmp_path / "out.safetensors", alpha=(0.4,))
    assert {tensor.dtype for tensor in got.values()} == {torch.float16}
    got, _ = merged("interpolate", files, tmp_path / "b.safetensors", alpha=(0.4,), dtype="float32")
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    close(got, each(lambda a, b: 0.6 * a + 0.4 * b, ZERO, half))
