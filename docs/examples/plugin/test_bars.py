"""The classes of the images are right, and the options build."""

import diffusion_cli as diffuse

diffuse.allow_plugins("bars")


def test_a_row_is_bright_along_its_width() -> None:
    images = diffuse.option("dataset", "bars", "data").load("train")
    image, label = images.pixels[0], images.labels[0]
    assert label == 0
    assert image[0].amax(dim=1).count_nonzero() == 1


def test_the_network_keeps_the_shape() -> None:
    import torch

    network = diffuse.option("model", "convolutions", (1, 8, 8), None)
    x = torch.randn(2, 1, 8, 8)
    assert network(x, torch.tensor([10.0, 20.0])).shape == x.shape
