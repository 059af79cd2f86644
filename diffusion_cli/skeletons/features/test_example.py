"""The features `example` have their size and do not depend on the batch."""

from pathlib import Path

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")


def test_each_image_has_its_features() -> None:
    dataset = diffuse.option("dataset", "digits", "data")
    network = diffuse.option("features", "example", dataset, Path("cache"), torch.device("cpu"), size=2)
    images = dataset.load("val").pixels[:10]
    features = network(images).features
    assert features.shape == (10, network.dim)
    assert torch.equal(network(images[3:4]).features, features[3:4])


def test_a_gray_image_has_equal_features() -> None:
    dataset = diffuse.option("dataset", "digits", "data")
    network = diffuse.option("features", "example", dataset, Path("cache"), torch.device("cpu"))
    gray = torch.full((1, *dataset.shape), 51, dtype=torch.uint8)
    torch.testing.assert_close(network(gray).features, torch.full((1, network.dim), 0.2))
