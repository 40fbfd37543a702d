"""The sweeps as they are commonly run today, written in plain torch, in the strongest form of each practice.

Each peer keeps what makes the practice: state dicts merged and loaded for every draw and position, a full
forward pass, the data set rebuilt. It omits mere waste: gradients and synchronisations inside, copies of the
whole model, and a clean pass for every draw where one suffices. Three things favour the peers: their noise
comes from our kernel, which is faster for one layer than torch.randn_like; the batches of sharpness and
layer-wise interpolation wait on the device as normalised floats, without a data loader; and only ours makes
rows of results with intervals.

Batches are lists of (images [n, 3, h, w] in the model's type, labels int64 [n]) on the model's device. State
dicts are float32; loading them casts to the live model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from rft_fast.clip.architectures import Preprocess
from rft_fast.kernels import Plan

State = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
Measured = tuple[float, float]  # loss in nats, accuracy
Rises = tuple[list[list[float]], list[float]]  # of each draw and part, and each part's share of the images
Draw = Callable[[Sequence[str], int, int], dict[str, Tensor]]


def noise(weights: State) -> Draw:
    """Return draw(names, seed, number): normals for these weights, the same as those of a Path's writes.

    weights: all float parameters in the model's order, which decides their noise. Memory as large as the
    model is allocated once, where the practice allocates each time.
    """
    rows = {name: row for row, name in enumerate(weights)}
    zeros = [torch.zeros_like(tensor) for tensor in weights.values()]
    out = [torch.zeros_like(tensor) for tensor in weights.values()]
    plan = Plan(out, zeros, zeros)

    def draw(names: Sequence[str], seed: int, number: int) -> dict[str, Tensor]:
        runs = [(rows[name], rows[name] + 1) for name in names]
        plan.write(1.0, tensors=runs, rho=1.0, adaptive=False, seed=seed, draw=number)
        return {name: out[rows[name]] for name in names}

    return draw


def forward(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return losses and hits of all images, still on the device, without waiting for it."""
    losses, hits = [], []
    for images, labels in batches:
        logits = model(images).float()
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
        hits.append(logits.argmax(1) == labels)
    return torch.cat(losses), torch.cat(hits)


def merge(zeroshot: State, finetuned: State, alpha: float) -> dict[str, Tensor]:
    return {name: (1 - alpha) * zeroshot[name] + alpha * finetuned[name] for name in zeroshot}


@torch.inference_mode()
def layer_sharpness(
    model: nn.Module,
    zeroshot: State,
    finetuned: State,
    batches: Sequence[Batch],
    layers: Mapping[str, Sequence[str]],
    alphas: Sequence[float],
    rho: float,
    draws: int,
    seed: int,
    draw: Draw,
    noise_batch: bool,
) -> dict[tuple[str, float], Rises]:
    """Sharpness of each layer at each alpha, draw by draw, written by us: no published code measures it.

    As in published code for whole models, an original clone is kept and every draw made from it: a dict of
    deltas, one for each tensor of the layer. Then, as models are usually merged: a perturbed state dict,
    which is interpolated and loaded, and a full forward pass. A value is the mean over a part's images of
    perturbed minus clean loss.

    layers: name -> its parameters. noise_batch: draw for every batch, as in published code for whole models,
        instead of once for all.
    """
    original = {name: tensor.clone() for name, tensor in finetuned.items()}
    parts = [[batch] for batch in batches] if noise_batch else [list(batches)]
    found: dict[tuple[str, float], Rises] = {}
    for alpha in alphas:
        model.load_state_dict(merge(zeroshot, original, alpha))
        clean = [forward(model, part)[0] for part in parts]
        for layer, names in layers.items():
            drawn = []
            for number in range(draws):
                losses = []
                for index, part in enumerate(parts):
                    eps = draw(names, seed, number * len(parts) + index)
                    deltas = {name: rho * original[name].abs() * eps[name] for name in names}
                    perturbed = dict(original)
                    for name in names:
                        perturbed[name] = perturbed[name] + deltas[name]
                    model.load_state_dict(merge(zeroshot, perturbed, alpha))
                    losses.append(forward(model, part)[0])
                drawn.append(losses)
            found[layer, alpha] = rises(drawn, clean)
    return found


def rises(drawn: Sequence[Sequence[Tensor]], clean: Sequence[Tensor]) -> Rises:
    """Return mean rises of losses. drawn: of every draw, losses [n] of every part. clean: of every part."""
    means = [[(now.double() - then).mean() for now, then in zip(losses, clean)] for losses in drawn]
    images = sum(map(len, clean))
    return torch.stack([torch.stack(values) for values in means]).tolist(), [len(c) / images for c in clean]


@torch.inference_mode()
def general_sharpness(
    model: nn.Module,
    zeroshot: State,
    finetuned: State,
    batches: Sequence[Batch],
    alphas: Sequence[float],
    rho: float,
    draws: int,
    seed: int,
    draw: Draw,
    names: Sequence[str],
    noise_batch: bool,
) -> dict[float, Rises]:
    """Sharpness of all weights at each alpha, draw by draw, as in published code, written by us.

    The interpolated weights are kept. For every draw and every batch: a dict of deltas rho * |w| * eps, a
    perturbed state dict, its load, and a forward pass. Values are as in :func:`layer_sharpness`.

    names: of the parameters that are perturbed. noise_batch: as in :func:`layer_sharpness`.
    """
    parts = [[batch] for batch in batches] if noise_batch else [list(batches)]
    found: dict[float, Rises] = {}
    for alpha in alphas:
        original = merge(zeroshot, finetuned, alpha)
        model.load_state_dict(original)
        clean = [forward(model, part)[0] for part in parts]
        drawn = []
        for number in range(draws):
            losses = []
            for index, part in enumerate(parts):
                eps = draw(names, seed, number * len(parts) + index)
                deltas = {name: rho * original[name].abs() * eps[name] for name in names}
                perturbed = original | {name: original[name] + deltas[name] for name in names}
                model.load_state_dict(perturbed)
                losses.append(forward(model, part)[0])
            drawn.append(losses)
        found[alpha] = rises(drawn, clean)
    return found


@torch.inference_mode()
def layer_interpolation(
    model: nn.Module,
    zeroshot: State,
    finetuned: State,
    batches: Sequence[Batch],
    layers: Mapping[str, Sequence[str]],
    alphas: Sequence[float],
) -> dict[tuple[str, float], Measured]:
    """Each layer at alpha, the others zero-shot: one state dict, one load and one full forward pass for each.

    The zero-shot model, alpha = 0 of every layer, is measured once.
    """
    found = {}
    model.load_state_dict(zeroshot)
    base = forward(model, batches)
    for layer, names in layers.items():
        for alpha in alphas:
            if alpha == 0:
                found[layer, alpha] = base
                continue
            state = {name: tensor.clone() for name, tensor in zeroshot.items()}
            for name in names:
                state[name] = (1 - alpha) * zeroshot[name] + alpha * finetuned[name]
            model.load_state_dict(state)
            found[layer, alpha] = forward(model, batches)
    return {key: means(*result) for key, result in found.items()}


@torch.inference_mode()
def interpolation(
    model: nn.Module,
    zeroshot: State,
    finetuned: State,
    folder: str,
    preprocess: Preprocess,
    alphas: Sequence[float],
    batch_size: int,
    workers: int,
) -> dict[float, Measured]:
    """Sweep as WiSE-FT does: for every alpha clone and merge both state dicts, build and read the data set.

    (That code also pickles a checkpoint of every merged model, which is omitted here.)
    """
    device = next(model.parameters()).device
    found = {}
    for alpha in alphas:
        theta_0 = {name: tensor.clone() for name, tensor in zeroshot.items()}
        theta_1 = {name: tensor.clone() for name, tensor in finetuned.items()}
        model.load_state_dict(merge(theta_0, theta_1, alpha))
        transform = open_clip.image_transform(
            preprocess.size,
            is_train=False,
            mean=preprocess.mean,
            std=preprocess.std,
            resize_mode=preprocess.resize_mode,
            interpolation=preprocess.interpolation,
            fill_color=preprocess.fill_color,
        )
        loader = DataLoader(
            ImageFolder(folder, transform),
            batch_size,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        moved = (
            (images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            for images, labels in loader
        )
        found[alpha] = forward(model, moved)
    return {alpha: means(*result) for alpha, result in found.items()}


def means(losses: Tensor, hits: Tensor) -> Measured:
    return float(losses.double().mean()), float(hits.double().mean())
