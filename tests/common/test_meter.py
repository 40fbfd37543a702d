"""The meter: FLOPs and bytes worked out by hand, and what a process really takes."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d
from support.wording import refused
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rft_fast.common import meter
from rft_fast.common.meter import Peak, Reading, available, measure

# Two FLOPs per multiply-add of products, convolutions and attention; biases and the rest count nothing.
FLOAT = 4  # bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def forward(model: nn.Module, x: Tensor) -> Reading:
    with torch.inference_mode():
        return measure(lambda: model(x))


def backward(model: nn.Module, x: Tensor) -> Reading:
    weights = list(model.parameters())
    return measure(lambda: torch.autograd.grad(model(x).sum(), weights))


# --- FLOPs ----------------------------------------------------------------------------------------


def test_flops_of_a_linear_layer() -> None:
    assert forward(nn.Linear(5, 7), torch.zeros(3, 5)).flops == 2 * 3 * 5 * 7


def test_flops_of_a_linear_layer_over_tokens() -> None:
    assert forward(nn.Linear(5, 7, bias=False), torch.zeros(3, 11, 5)).flops == 2 * 3 * 11 * 5 * 7


def test_flops_of_a_gradient_without_that_of_the_input() -> None:
    # Forward, and the weight's gradient; nothing asks for the input's.
    assert backward(nn.Linear(5, 7), torch.zeros(3, 5)).flops == 2 * 2 * 3 * 5 * 7


def test_flops_of_a_gradient_through_two_layers() -> None:
    first, second = 2 * 3 * 5 * 7, 2 * 3 * 7 * 2
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    assert backward(model, torch.zeros(3, 5)).flops == 2 * first + 3 * second


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flops_of_a_convolution(groups: int) -> None:
    model = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
    once = 2 * (5 * 8 * 4 * 4) * (4 // groups * 3 * 3)  # outputs times inputs of each
    assert forward(model, torch.zeros(5, 4, 8, 8)).flops == once
    # The weight's gradient, not the image's; a grouped one is no dearer than its forward pass.
    assert backward(model, torch.zeros(5, 4, 8, 8)).flops == 2 * once


def test_flops_of_a_transposed_convolution() -> None:
    model = nn.ConvTranspose2d(4, 8, 3, stride=2)
    once = 2 * (5 * 4 * 6 * 6) * (8 * 3 * 3)  # each input goes to 8 x 3 x 3 outputs
    assert forward(model, torch.zeros(5, 4, 6, 6)).flops == once
    assert backward(model, torch.zeros(5, 4, 6, 6)).flops == 2 * once


def test_flops_of_functional_convolutions() -> None:
    w = torch.zeros(8, 4, 3)
    found = measure(lambda: nn.functional.conv1d(torch.zeros(5, 4, 10), w))
    assert found.flops == 2 * (5 * 8 * 8) * (4 * 3)


def test_flops_of_attention() -> None:
    batch, heads, n, d = 2, 3, 7, 16
    q, k, v = torch.zeros(3, batch, heads, n, d)
    once = 2 * 2 * batch * heads * n * n * d  # q k^T, and the result times v
    attend = nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        assert measure(lambda: attend(q, k, v)).flops == once
    q.requires_grad_()
    k.requires_grad_()
    v.requires_grad_()
    found = measure(lambda: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))
    # The fused kernel makes q k^T once more; then two products for each of the two.
    assert found.flops == once + 5 * once // 2


@pytest.mark.parametrize("inference", [True, False])
def test_flops_of_multihead_attention_off_its_fast_path(inference: bool) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.zeros(3, 5, 8)
    with torch.inference_mode(inference), torch.set_grad_enabled(not inference):
        found = measure(lambda: model(x, x, x, need_weights=False))
    projections = 4 * (2 * 15 * 8 * 8)
    assert found.flops == projections + 2 * 2 * 3 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_fast_path_is_as_it_was_even_after_a_failure() -> None:
    for state in (False, True):
        torch.backends.mha.set_fastpath_enabled(state)
        with pytest.raises(RuntimeError):
            measure(lambda: torch.zeros(2).sum().item())
        assert torch.backends.mha.get_fastpath_enabled() is state


def test_flops_of_a_whole_image_tower() -> None:
    width, layers, patch, size, out = 32, 2, 8, 32, 16
    visual = open_clip.transformer.VisionTransformer(size, patch, width, layers, 4, 4.0, output_dim=out)
    visual.eval()
    n = (size // patch) ** 2 + 1
    block = 2 * n * width * width * (3 + 1 + 4 + 4) + 2 * 2 * n * n * width
    whole = 2 * (n - 1) * width * 3 * patch * patch + layers * block + 2 * width * out
    assert forward(visual, torch.zeros(5, 3, size, size)).flops == 5 * whole


def test_flops_of_the_attention_pool_of_resnets() -> None:
    pool = AttentionPool2d(spacial_dim=4, embed_dim=8, num_heads=2, output_dim=6).eval()
    n = 17
    # Queries of all places, though only that of the mean is used afterwards.
    once = 2 * n * 8 * (8 + 8 + 8 + 6) + 2 * 2 * n * n * 8
    assert forward(pool, torch.zeros(3, 8, 4, 4)).flops == 3 * once


@pytest.mark.slow
def test_flops_of_timm_trunks() -> None:
    timm = pytest.importorskip("timm")
    trunk = timm.create_model("convnext_atto", num_classes=0).eval()
    macs = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs += out.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in trunk.modules()]
    with torch.inference_mode():
        trunk(torch.zeros(2, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert forward(trunk, torch.zeros(2, 3, 64, 64)).flops == 2 * macs


def test_flops_of_a_product_with_the_hessian() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    weights = list(model.parameters())
    signs = [torch.ones_like(weight) for weight in weights]

    def run() -> None:
        loss = nn.functional.cross_entropy(model(torch.zeros(5, 4)), torch.zeros(5, dtype=torch.long))
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad(grads, weights, signs)

    with sdpa_kernel(SDPBackend.MATH):
        found = measure(run)
    assert found.flops > backward(model, torch.zeros(5, 4)).flops


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_of_results_alive_at_once() -> None:
    def run() -> None:
        a = torch.zeros(10)
        b = a + 1  # two
        del a
        c = b * 2  # two again
        d = c - 1  # three
        del b, c, d
        torch.zeros(25)  # alone

    assert measure(run).peak == 3 * 10 * FLOAT


def test_bytes_are_those_of_each_type() -> None:
    assert measure(lambda: torch.zeros(10, dtype=torch.float64)).peak == 80
    assert measure(lambda: torch.zeros(10, dtype=torch.bool)).peak == 10


def test_views_do_not_count_twice_and_keep_their_storage() -> None:
    def run() -> None:
        a = torch.zeros(6, 4)
        b = a.view(24)[:1]
        c = a.t()
        del a, c
        torch.zeros(2)  # while one element holds all of them
        del b

    assert measure(run).peak == (24 + 2) * FLOAT


def test_what_was_there_before_counts_nothing() -> None:
    weight, x = torch.zeros(4, 4), torch.zeros(100, 4)

    def run() -> None:
        weight.t()
        weight[1:]
        x.view(-1)
        x.add_(1)
        x[:2] @ weight.t()

    assert measure(run).peak == 2 * 4 * FLOAT
    assert x.sum() == 0  # nothing was computed


def test_bytes_of_a_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 2, bias=False))
    # The hidden values before and after ReLU; Sequential lets go of the first as it goes on.
    assert forward(model, torch.zeros(3, 5)).peak == 2 * 3 * 7 * FLOAT


def test_bytes_of_a_gradient_hold_activations_and_gradients() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(10)])
    x = torch.zeros(100, 8)
    kept = 10 * 100 * 8 * FLOAT
    found = backward(model, x).peak
    assert kept < found <= kept + 10 * 64 * FLOAT + 3 * 100 * 8 * FLOAT
    assert forward(model, x).peak == 2 * 100 * 8 * FLOAT


def test_all_memory_is_let_go_of_between_two_measurements() -> None:
    def run() -> Tensor:
        return torch.zeros(10)

    assert [measure(run).peak for _ in range(3)] == [40, 40, 40]


def test_tensors_that_are_not_allocated() -> None:
    # A petabyte.
    assert measure(lambda: torch.zeros(2**20, 2**28)).peak == 2**50


def test_constants_keep_their_values() -> None:
    found = measure(lambda: torch.zeros(int(torch.tensor(3).item())))
    assert found.peak >= 3 * FLOAT


def test_a_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # in training mode, so that it would move
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(value) for name, value in model.named_parameters()}
    measure(lambda: model(torch.zeros(2, 3, 8, 8)))
    backward(model, torch.ones(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: type(value) for name, value in model.named_parameters()} == kinds
    assert all(p.grad is None for p in model.parameters())


# --- what cannot be measured so ---------------------------------------------------------------------


def test_values_are_refused_by_name() -> None:
    with refused(RuntimeError) as caught:
        measure(lambda: torch.zeros(2).sum().item())
    assert caught.value.__cause__ is not None


def test_an_error_of_the_run_itself_is_the_cause() -> None:
    with refused(RuntimeError, "ValueError") as caught:
        measure(lambda: (_ for _ in ()).throw(ValueError("mine")))
    assert isinstance(caught.value.__cause__, ValueError)


def test_tensors_are_real_again_afterwards() -> None:
    with pytest.raises(RuntimeError):
        measure(lambda: torch.zeros(2).sum().item())
    assert torch.ones(2).sum().item() == 2


# --- the peak of a process ----------------------------------------------------------------------------


@pytest.mark.slow
@linux
def test_peak_is_that_of_its_stretch_alone() -> None:
    size = 1 << 27

    def touch() -> None:
        with mmap.mmap(-1, size) as memory:
            memory.write(b"1" * size)
        gc.collect()

    with Peak() as quiet:
        pass
    if not quiet.resets:
        pytest.skip("this Linux forbids starting anew")
    with Peak() as loud:
        before = loud.bytes
        touch()
        assert loud.bytes >= before + size
    assert loud.bytes >= quiet.bytes + size
    with Peak() as after:
        pass
    assert after.bytes < loud.bytes - size // 2
    kept = loud.bytes
    touch()
    assert loud.bytes == kept  # it ended


def test_peak_without_linux_says_that_it_cannot_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_status", lambda name: None)
    with Peak() as peak:
        pass
    assert not peak.resets
    assert peak.bytes > 1 << 20  # a process with torch in it


def test_peak_on_cuda_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    with Peak("cuda:0") as peak:
        assert calls == ["wait", "reset"]
    assert peak.bytes == 123
    assert peak.resets


# --- what can still be had ----------------------------------------------------------------------------


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  100 kB\nMemFree: 10 kB\nMemAvailable:    50 kB\n"}


def test_available_without_limits(tmp_path: Path) -> None:
    assert meter._available(system(tmp_path, MEMINFO)) == 50 * 1024


@pytest.mark.parametrize(
    ("limit", "expected"), [("10000", 10000 - 8000 + 3000 + 1000), ("max", 51200), ("9999999", 51200)]
)
def test_available_under_version_2(tmp_path: Path, limit: str, expected: int) -> None:
    group = "sys/fs/cgroup/a/b"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": limit + "\n",
        f"{group}/memory.current": "8000\n",
        f"{group}/memory.stat": "anon 4000\nfile 4000\ninactive_file 3000\nactive_file 1000\n",
    }
    assert meter._available(system(tmp_path, MEMINFO | files)) == expected


def test_available_under_the_limit_of_a_group_above(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/a"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        f"{top}/b/memory.max": "max\n",
        f"{top}/b/memory.current": "10\n",
        f"{top}/memory.max": "20000\n",
        f"{top}/memory.current": "15000\n",
    }
    assert meter._available(system(tmp_path, MEMINFO | files)) == 5000


def test_available_where_the_own_group_is_seen_as_the_top(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/123\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "20000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "12000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\n",
    }
    assert meter._available(system(tmp_path, MEMINFO | files)) == 10000


def test_nothing_less_than_nothing_is_available(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "100\n",
        "sys/fs/cgroup/memory.current": "200\n",
    }
    assert meter._available(system(tmp_path, MEMINFO | files)) == 0


def test_available_elsewhere_is_all_there_is(tmp_path: Path) -> None:
    found = meter._available(tmp_path)  # no /proc
    assert found > 1 << 27
    assert found >= available("cpu")


def test_available_is_sane() -> None:
    assert 1 << 20 < available("cpu") < 1 << 50
    assert available(torch.device("cpu")) > 1 << 20


def test_available_on_cuda_counts_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert available("cuda:0") == 1200
