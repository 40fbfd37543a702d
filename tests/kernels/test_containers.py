"""What may hold tensors: modules, named tensors, parameter groups; by name where both have names."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from support.wording import refused
from torch import Tensor, nn

import rft_fast as rft
from rft_fast.kernels import Plan


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=nn.Linear(3, 5), norm=nn.BatchNorm1d(5), last=nn.Linear(5, 2)))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 1.0}]


class Optimizer:
    """As those of torch, whose import takes seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = groups(model)


FORMS = {
    "module": lambda model: model,
    "iterator": lambda model: model.parameters(),
    "pairs": lambda model: model.named_parameters(),
    "dict": lambda model: dict(model.named_parameters()),
    "groups": groups,
    "one group": lambda model: {"params": list(model.parameters()), "lr": 0.1},
    "state dict": lambda model: {
        k: v for k, v in model.state_dict().items() if k in dict(model.named_parameters())
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_container_is_its_tensors_in_order(form: str) -> None:
    model, other = build(), build()
    expected = [p.detach() for p in other.parameters()]
    rft.perturb_(expected, 0.1, draw=1)
    rft.perturb_(FORMS[form](model), 0.1, draw=1)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    eps, mask = rft.noise_like(FORMS[form](model)), rft.keep_mask_like(FORMS[form](model), 0.5)
    if form in ("module", "pairs", "dict", "state dict"):
        names = [name for name, _ in model.named_parameters()]
        assert list(eps) == list(mask) == list(rft.offsets(FORMS[form](model))) == names  # type: ignore[arg-type]
        eps, mask = eps.values(), mask.values()  # type: ignore[attr-defined]
    for got, wanted in zip(eps, rft.noise_like(expected), strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(mask, rft.keep_mask_like(expected, 0.5), strict=True):
        assert torch.equal(got, wanted)


def test_named_tensors_are_matched_by_name() -> None:
    model, zeroshot = build(), build()
    with torch.no_grad():
        for p in zeroshot.parameters():
            p.mul_(2)
    finetuned = {name: p.detach() + 1 for name, p in model.named_parameters()}
    backwards = dict(reversed(finetuned.items()))
    expected = {
        name: torch.lerp(p.detach(), finetuned[name], 0.25) for name, p in zeroshot.named_parameters()
    }
    rft.interpolate_(model, zeroshot, backwards, 0.25)
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name])
    plan = Plan(model.named_parameters(), zeroshot, backwards)
    plan.write(1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, finetuned[name])
    rft.interpolate_(list(model.parameters()), zeroshot, finetuned, 0)  # by order, where one has no names
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), zeroshot.parameters(), strict=True))


TIED = torch.ones(3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's: a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("container", "error", "facts"),
    [
        (lambda model: [model], TypeError, ("params[0]", "model.parameters()")),
        (Optimizer, TypeError, ("params", "param_groups")),
        (lambda model: [model.state_dict()], TypeError, ("params[0]", "state_dict()")),
        (lambda model: {"state_dict": {}, "epoch": 3}, TypeError, ("'state_dict'",)),
        (lambda model: {"w": torch.ones(2), "epoch": 3}, TypeError, ("'epoch'", "is_tensor")),
        (lambda model: model.state_dict(), TypeError, ("norm.num_batches_tracked", "int64")),
        (lambda model: {0: torch.ones(2)}, TypeError, ("params[0]",)),
        (lambda model: [("a", torch.ones(2)), ("a", torch.ones(2))], ValueError, ("a", "twice")),
        (lambda model: "model", TypeError, ("params", "str")),
        (lambda model: [{"params": [3]}], TypeError, ("params[0]['params'][0]",)),
        (lambda model: 3.0, TypeError, ("params", "float")),
        (lambda model: np.ones(2), TypeError, ("params", "from_numpy")),
        (lambda model: torch.eye(3).to_sparse(), ValueError, ("tensor 0", "sparse_coo", "to_dense()")),
        (lambda model: {"w": torch.eye(3).to_sparse_csr()}, ValueError, ("params of w", "sparse_csr")),
        (lambda model: [NESTED], ValueError, ("tensor 0", "nested")),
        (lambda model: {"a": TIED, "b": TIED}, ValueError, ("params of a", "params of b", "tied")),
    ],
)
def test_what_holds_something_else_is_refused(container: Any, error: Any, facts: Any) -> None:
    with refused(error, "perturb_", *facts):
        rft.perturb_(container(build()), 0.1, draw=0)


@pytest.mark.parametrize("like", [rft.noise_like, lambda params: rft.keep_mask_like(params, 0.5)])
@pytest.mark.parametrize("given", [torch.eye(3).to_sparse(), NESTED])
def test_noise_of_what_is_not_dense_is_refused(like: Any, given: Tensor) -> None:
    with refused(ValueError, "params of w"):
        like({"w": given})


def test_names_that_differ_are_refused() -> None:
    model = build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with refused(ValueError, "zeroshot", "norm.running_mean", "norm.num_batches_tracked"):
        rft.interpolate_(model, state, state, 0.5)
    some = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("last")}
    with refused(ValueError, "finetuned", "last.weight"):
        rft.interpolate_(model, model, some, 0.5)
    with refused(ValueError, "b", "last.weight"):
        rft.add_(model, model, some, 0.5)


def test_errors_name_the_tensor_as_its_container_does() -> None:
    named = {"conv.weight": torch.ones(3), "conv.bias": torch.ones(4, 6)[:, ::2]}
    with refused(ValueError, "params of conv.bias"):
        rft.perturb_(named, 0.1, draw=0)
    with refused(ValueError, "conv.bias", "conv.weight"):
        rft.noise_like(named, offset=[0, 0])


def test_draw_is_required() -> None:
    with pytest.raises(TypeError, match="'draw': the number of this perturbation"):
        rft.perturb_(torch.ones(3), 0.1)  # type: ignore[call-arg]


def test_a_state_dict_of_a_batch_norm_is_written_tensor_by_tensor() -> None:
    model = build()
    floats = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    ends: dict[str, Tensor] = {k: torch.full_like(v, 3.0) for k, v in floats.items()}
    rft.interpolate_(floats, floats, ends, 1)
    assert (model.get_buffer("norm.running_mean") == 3).all()


ALONE = """
import sys
import warnings

class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"{top} is blocked here", name=top)

import torch, numpy
allowed = {module.partition(".")[0] for module in sys.modules} | {"rft_fast", "torch", "numpy"}
allowed -= {"pandas", "scipy", "PIL", "matplotlib", "open_clip", "safetensors", "sklearn", "ray", "tqdm"}
sys.meta_path.insert(0, Only())
import rft_fast as rft
w = [torch.ones(9), torch.ones(2, 3)]
rft.perturb_(w, 0.1, draw=0)
rft.add_(w, w, rft.noise_like(w, offset=rft.offsets(w)), 0.5, weight="square")
rft.Plan(w, w, w).write(0.5)
rft.keep_mask_like(w, 0.5)
loaded = {module.partition(".")[0] for module in sys.modules}
print(sorted(loaded & {"pandas", "scipy", "PIL", "open_clip", "safetensors"}))
try:
    rft.studies.frame
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_kernels_need_torch_and_numpy_only() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0] == "[]" and "pandas" in done.stdout
