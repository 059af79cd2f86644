"""The images of the dataset `example` are as its classes and its splits say."""

import diffusion_cli as diffuse
import torch

diffuse.allow_plugins("example_package")


def test_the_images_have_the_shape_and_a_class() -> None:
    dataset = diffuse.option("dataset", "example", "data", count=40)
    images = dataset.load("train")
    assert images.pixels.shape == (40, *dataset.shape)
    assert images.pixels.dtype == torch.uint8
    assert set(images.labels.tolist()) == set(range(len(dataset.class_names)))


def test_no_image_is_in_both_splits() -> None:
    dataset = diffuse.option("dataset", "example", "data", count=40)
    splits = [{image.numpy().tobytes() for image in dataset.load(split).pixels} for split in ("train", "val")]
    assert not splits[0] & splits[1]
