"""A run of all studies, made of rows with known numbers, and names that try to break a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rft_fast import __version__, results
from rft_fast.config.recorded import tree_of
from rft_fast.names import STUDIES
from rft_fast.studies.facts import Facts

EVIL = "<script>document.title='owned'</script>"
MODELS = ["good", "bad", "<b>c&amp;%{x}"]
SETS = {"near": False, f"far {EVIL}": True, "fog": True}
FAR = f"far {EVIL}"
LAYERS = ["visual.conv1", "visual.blocks.0.mlp", "visual.blocks.1.mlp"]
ALPHAS = [0.0, 0.5, 1.0]
# Accuracy out of distribution at ALPHAS; the standard error of its differences is 0.01.
FAR_CURVES = {"good": [0.50, 0.60, 0.55], "bad": [0.50, 0.40, 0.30], MODELS[2]: [0.50, 0.51, 0.45]}


def make_rows() -> Iterator[dict[str, object]]:
    for model in MODELS:
        for dataset, ood in SETS.items():
            accuracy = FAR_CURVES[model] if ood else [0.8, 0.85, 0.9]
            for i, alpha in enumerate(ALPHAS):
                gain = accuracy[i] - accuracy[0]
                bump = (1 - alpha) * accuracy[0] + alpha * accuracy[2] - accuracy[i]
                yield {
                    "study": "interpolation", "model": model, "dataset": dataset, "ood": ood, "alpha": alpha,
                    "rho": 0.0, "keep": 1.0, "samples": 1234, "accuracy": accuracy[i], "accuracy_se": 0.01,
                    "loss": 2 - accuracy[i], "loss_se": 0.02, "gain": gain, "gain_se": 0.01 * (i > 0),
                    "rise": -gain, "rise_se": 0.02 * (i > 0), "bump": bump, "bump_se": 0.02 * (i == 1),
                }  # fmt: skip
    for model in MODELS[:2]:
        for layer_number, layer in enumerate(LAYERS):
            for alpha in ALPHAS:
                hump = 4 * alpha * (1 - alpha) * layer_number * 0.3 * (model == "bad")
                yield {
                    "study": "layers", "model": model, "dataset": FAR, "ood": True, "layer": layer,
                    "others": "zeroshot", "alpha": alpha, "rho": 0.0, "keep": 1.0, "samples": 77,
                    "loss": 1 + hump, "loss_se": 0.01, "accuracy": 0.5 - hump / 4, "accuracy_se": 0.01,
                    "rise": hump, "rise_se": 0.1 * (alpha > 0), "gain": -hump / 4, "gain_se": 0.01,
                    "bump": hump, "bump_se": 0.01 * (0 < alpha < 1), "reference": "own",
                    "instability": hump, "instability_se": 0.1 if layer_number == 1 else 0.01,
                    "instability_accuracy": hump / 4, "instability_accuracy_se": 0.01,
                }  # fmt: skip
    for m, model in enumerate(MODELS):
        for layer in [None, *LAYERS]:
            for alpha in ALPHAS:
                yield {
                    "study": "sharpness" if layer is None else "layer-sharpness", "model": model,
                    "dataset": "near", "ood": False, "layer": layer, "alpha": alpha, "rho": 0.5,
                    "on": "interpolated" if layer is None else "finetuned", "noise": "normal",
                    "adaptive": True, "estimator": "plain", "seed": 0,
                    "draws": 5 if alpha or not layer else 0, "samples": 64,
                    "sharpness": (3 + m) * 0.1 * (alpha + (layer is None)),
                    "sharpness_se": 0.5 if layer == LAYERS[0] and alpha else 0.001 * alpha,
                    "loss": 1.0, "accuracy": 0.5, "normalized": False, "keep": 1.0,
                }  # fmt: skip
    for method, control, seed in [(None, None, None)] + [
        ("zero", c, s) for c in (False, True) for s in (0, 1)
    ]:
        for alpha in ALPHAS:
            change = 0.0 if method is None else alpha * (-0.10 if control else 0.02) + 0.001 * (seed or 0)
            yield {
                "study": "prune", "model": "bad", "dataset": FAR, "ood": True, "alpha": alpha, "rho": 0.0,
                "keep": 0.5, "layer": None if method is None else LAYERS[2], "method": method,
                "criterion": None if method is None else "instability", "control": control, "seed": seed,
                "samples": 77, "accuracy": 0.5 - 0.2 * alpha + change, "loss": 1.0, "gain": -0.2 * alpha,
                "gain_se": 0.01, "change": change, "change_se": 0.01,
            }  # fmt: skip


CONFIG: dict[str, Any] = {
    "command": f"python -m rft_fast.sweep '{EVIL}'", "date": "2026-01-02T03:04:05+00:00",
    "zoo": f"zoo {EVIL}", "arch": "ViT-B-32",
    "zeroshot": {"path": "/z.pt", "format": None, "sha256": "0" * 64},
    "finetuned": {name: {"path": f"/{i}.pt", "sha256": f"{i}" * 64} for i, name in enumerate(MODELS, 1)},
    "data": {name: {"path": "/d", "ood": ood, "samples": 1234, "sha256 of scored images": "d" * 64}
             for name, ood in SETS.items()},
    "everything": True, "studies": list(STUDIES), "measured": list(STUDIES),
    "settings": {"along": {"alphas": ALPHAS}, "prune": {"criteria": ["instability"], "mask_seeds": 2}},
    "versions": {"rft_fast": __version__, "torch": "2.9"},
}  # fmt: skip


def make_facts(
    rows: Any,
    classes: dict[str, int] | None = None,
    measured: Sequence[str] = STUDIES,
    everything: bool = True,
) -> Facts:
    """The facts of such rows, with the settings of that configuration."""
    return Facts(rows, tree_of(CONFIG), classes, measured, everything)


SHORT = [row for row in make_rows() if row["study"] == "interpolation"]


def make_run(folder: Path, rows: list[dict[str, object]] | None = None, **config: Any) -> Path:
    """A finished run; every row is a measurement of its own."""
    numbers: Counter[tuple[str, str]] = Counter()
    with results.Run(folder, {**CONFIG, **config}) as run:
        for row in list(make_rows()) if rows is None else rows:
            study, model = str(row["study"]), str(row["model"])
            run.add(study, model, numbers[study, model], [row])
            numbers[study, model] += 1
    return folder


def make_other(folder: Path) -> Path:
    """The second run: one setting, one model's accuracies, and one model the less."""
    rows = [dict(row) for row in make_rows() if row["model"] != MODELS[2]]
    for row in rows:
        if row["study"] == "interpolation" and row["model"] == "bad" and row["alpha"] == 1.0:
            row["accuracy"] = float(str(row["accuracy"])) + 0.06  # of which the standard error is 0.014
        elif row["study"] == "interpolation" and row["model"] == "good" and row["alpha"] == 1.0:
            row["accuracy"] = float(str(row["accuracy"])) + 0.02
        elif row["study"] == "sharpness":
            row["seed"] = 7  # other noise, the same quantity
    settings = {**CONFIG["settings"], "along": {"alphas": ALPHAS, "seed": 7}}
    return make_run(folder, rows, settings=settings)
