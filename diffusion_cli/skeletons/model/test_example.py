"""The network `example` keeps the shape of images and starts at zero."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")


def test_the_output_has_the_shape_of_the_images_and_starts_at_zero() -> None:
    network = diffuse.option("model", "example", (3, 16, 16), None, width=8)
    x = torch.randn(2, 3, 16, 16)
    output = network(x, torch.tensor([10.0, 20.0]))
    assert output.shape == x.shape
    assert not output.any()


def test_every_weight_gets_a_gradient() -> None:
    network = diffuse.option("model", "example", (1, 8, 8), None, width=8)
    torch.nn.init.normal_(network.last.weight)
    network(torch.randn(2, 1, 8, 8), torch.tensor([10.0, 20.0])).sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())
