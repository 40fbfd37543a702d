"""Studies that bf16x3 would spoil are refused, unless they are asked for twice."""

from __future__ import annotations

import pytest
from support.wording import refused

from rft_fast.config import request
from rft_fast.config.request import Request

SPLIT = ["--device", "cpu", "--precision", "bf16x3"]


def read(*words: str) -> Request:
    return request.read([*words[:1], *SPLIT, *words[1:]])


FEW = "--draws 6 --layer-draws 6 --sharpness-samples 64"  # as measured in docs/speed.md
MORE = "--draws 20 --layer-draws 20 --sharpness-samples 256"


@pytest.mark.parametrize(
    ("study", "options", "facts"),
    [
        ("layer-sharpness", f"--rhos 0.5 0.01 0.019 {FEW}", ["0.01, 0.019", 0.02, 0.3, "auto"]),
        ("layer-sharpness", f"--rhos 0.019 --estimator gradient {FEW}", [0.019, 0.02, 0.3, "gradient"]),
        ("layer-sharpness", f"--rhos 0.01 --estimator per-image-antithetic {FEW}", [0.01, 0.02, 0.3]),
        # Measured: 0.57 and 0.45 standard errors at .02, which is 0.3 at .0276 and .0245.
        ("layer-sharpness", f"--rhos 0.027 {MORE}", [0.027, 0.028, 0.3]),
        ("layer-sharpness", f"--rhos 0.024 --estimator gradient {MORE}", [0.024, 0.026, 0.3]),
        # 0.092 at .005, which is 0.05 at .0068.
        ("sharpness", f"--rhos 0.0066 {MORE}", [0.0066, 0.0072, 0.05]),
        ("layer-sharpness", f"--rhos 0.0001 --estimator plain {FEW}", [0.0001, 0.0002, 0.3, "plain"]),
        ("layer-sharpness", f"--rhos 0.0002 --estimator per-image {MORE}", [0.0002, 0.00027, 0.3]),
        ("layer-sharpness", "--rhos 0.004 --estimator apgd-l2", [0.004, 0.005, "1 %"]),
        ("layer-sharpness", "--goal-se 0.0000009", ["9e-07", "1e-06", 0.3]),
        ("sharpness", f"--rhos 0.004 {FEW}", [0.004, 0.005, 0.05]),
        ("sharpness", "--rhos 0.01 --draws 20 --sharpness-samples 1200 --samples 1200", [0.01, 0.011, 0.05]),
        ("sharpness", f"--rhos 0.00005 --estimator per-image {FEW}", ["5e-05", 0.0001, 0.05]),
        ("sharpness", f"--rhos 0.006 --estimator gradient --noise-batch 1 {MORE}", [0.006, 0.015, 0.05]),
        ("sharpness", "--goal-se 0.000009", ["9e-06", "1e-05", 0.05]),
        ("claim", f"--rhos 0.01 {FEW}", ["layer-sharpness", 0.01, 0.02]),
    ],
)
def test_what_rounding_spoils_is_refused(study: str, options: str, facts: list[object]) -> None:
    found = "--goal-se" if "goal" in options else "--rhos"
    with refused(ValueError, found, "bf16x3", "--precision fp32", "--despite-rounding", *map(str, facts)):
        read(study, *options.split())
    assert read(study, *options.split(), "--despite-rounding").measured
    assert request.read([study, "--device", "cpu", *options.split()]).measured


@pytest.mark.parametrize(
    ("study", "options"),
    [
        ("layer-sharpness", f"--rhos 0.02 {FEW}"),
        ("layer-sharpness", f"--rhos 0.028 {MORE}"),
        ("layer-sharpness", "--rhos auto"),
        ("layer-sharpness", "--rhos 1"),
        ("layer-sharpness", "--rhos 0.002 --estimator hessian"),
        ("layer-sharpness", f"--rhos 0.0002 --estimator per-image {FEW}"),
        ("layer-sharpness", "--rhos 0.005 --estimator apgd-linf"),
        ("layer-sharpness", "--goal-se 0.000001"),
        ("layer-sharpness", "--rhos 0.001 --no-adaptive"),
        ("sharpness", f"--rhos 0.005 {FEW}"),
        ("sharpness", f"--rhos 0.005 --estimator gradient {MORE}"),
        ("sharpness", "--rhos 0.005 --draws 6 --sharpness-samples 1200 --samples 64"),
        ("interpolation", ""),
        ("layers", ""),
    ],
)
def test_what_it_is_good_enough_for_is_not(study: str, options: str) -> None:
    assert study in read(study, *options.split()).measured


def test_bf16x3_is_not_compiled() -> None:
    with refused(ValueError, "--compile", "bf16x3"):
        read("interpolation", "--compile")


def test_asking_twice_for_another_precision_has_no_effect() -> None:
    (notice,) = request.read(["interpolation", "--device", "cpu", "--despite-rounding"]).notices
    assert "--despite-rounding" in notice and "bf16x3" in notice
    (notice,) = read("interpolation", "--despite-rounding").notices
    assert "slower than fp32" in notice and "--despite-rounding" not in notice
