"""The reference `example` has the images that it says."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")


def test_it_has_the_first_training_images() -> None:
    dataset = diffuse.option("dataset", "digits", "data")
    reference = diffuse.option("reference", "example", dataset, count=10)
    assert len(reference.images) == 10
    assert torch.equal(reference.images[torch.arange(10)], dataset.load("train").pixels[:10])
    assert reference.protocol()["images"] == 10


def test_it_has_no_more_images_than_the_dataset() -> None:
    dataset = diffuse.option("dataset", "digits", "data")
    reference = diffuse.option("reference", "example", dataset, count=10**6)
    assert len(reference.images) == len(dataset.load("train"))
