"""Model soups: the mean of several fine-tuned models (Wortsman et al. 2022, Recipe 1).

The uniform soup is the mean of all. The greedy soup takes the models in order of their accuracy on held-out
data, and keeps each one that does not lower the soup's. For checkpoints on disk there are
`python -m rft_fast.merge soup` and `greedy-soup`.
"""

import copy

import torch
from torch import nn

import rft_fast as rft


def uniform_soup(soup, models):
    """Write the mean of the models into the model soup."""
    rft.interpolate_(soup, models[0], models[0], 0)
    for k, model in enumerate(models[1:], 2):
        rft.interpolate_(soup, soup, model, 1 / k)  # the mean of k models


def greedy_soup(soup, models, accuracy):
    """Write the greedy soup into the model soup; return the models in it."""
    ranked = sorted(models, key=accuracy, reverse=True)
    rft.interpolate_(soup, ranked[0], ranked[0], 0)
    chosen, best, trial = [ranked[0]], accuracy(soup), copy.deepcopy(soup)
    for model in ranked[1:]:
        rft.interpolate_(trial, soup, model, 1 / (len(chosen) + 1))
        if accuracy(trial) >= best:
            chosen, best = [*chosen, model], accuracy(trial)
            rft.interpolate_(soup, trial, trial, 0)
    return chosen


def main():
    torch.manual_seed(0)
    images, teacher = torch.randn(512, 20), nn.Linear(20, 3)
    labels = teacher(images).argmax(1)
    models = [copy.deepcopy(teacher) for _ in range(5)]
    for k, model in enumerate(models):  # instead of fine-tuning: noise on the right weights, more in the last
        rft.perturb_(model, 4.0 if k == 4 else 0.6, draw=k)

    def accuracy(model):
        return (model(images).argmax(1) == labels).float().mean().item()

    soups = {"uniform": nn.Linear(20, 3), "greedy": nn.Linear(20, 3)}
    uniform_soup(soups["uniform"], models)
    chosen = greedy_soup(soups["greedy"], models, accuracy)
    print("models", *(f"{accuracy(model):.3f}" for model in models))
    found = {name: accuracy(soup) for name, soup in soups.items()}
    print(f"soups: uniform {found['uniform']:.3f}, greedy {found['greedy']:.3f}, of {len(chosen)} models")
    return found


if __name__ == "__main__":
    result = main()
