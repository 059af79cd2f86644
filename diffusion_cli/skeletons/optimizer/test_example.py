"""The optimizer `example` moves weights as its formula says."""

import diffusion_cli as diffuse
import torch
from torch import nn

diffuse.allow_plugins("example_package")


def test_each_step_has_the_length_of_the_learning_rate() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = diffuse.option("optimizer", "example", [weight], lr=0.1)
    optimizer.step(lambda: weight.square().sum().backward())
    torch.testing.assert_close(weight.data, torch.tensor([0.9, -1.9]))


def test_it_finds_the_minimum_of_a_parabola() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = diffuse.option("optimizer", "example", [weight], lr=0.01, momentum=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() <= 0.02
