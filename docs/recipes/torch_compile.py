"""torch.compile: compile the model once, write its weights from outside.

Weights change in place, so the compiled model sees them, and nothing is compiled again. Inside compiled
code the functions work, too: they are operators of the graph, without a graph break.
"""

import torch
from torch import nn

import rft_fast as rft

BACKEND = "aot_eager"  # compiles in a moment; for speed, leave it out: torch.compile(model)


@torch.compile(backend=BACKEND, fullgraph=True)
def noisy_output(model, images, draw):
    """Compute the output under noise. The model's own weights are not touched."""
    params = dict(model.named_parameters())
    noisy = {name: torch.empty_like(p) for name, p in params.items()}
    rft.write_(noisy, params, params, 1.0, rho=0.1, draw=draw)
    return torch.func.functional_call(model, noisy, images)


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 3))
    images = torch.randn(64, 20)
    original = [p.detach().clone() for p in model.parameters()]
    plan = rft.Plan(model, original, original)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)

    outside, inside = [], []
    with torch.no_grad():
        for draw in range(3):
            plan.write(1.0, rho=0.1, draw=draw)
            expected = model(images)
            outside.append((compiled(images) - expected).abs().max().item())
            plan.write(1.0)
            inside.append((noisy_output(model, images, draw) - expected).abs().max().item())
    print(f"largest difference to the model as it is: {max(outside):.1e} outside, {max(inside):.1e} inside")
    return outside + inside


if __name__ == "__main__":
    result = main()
