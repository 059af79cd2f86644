"""Condition images of batches: exactly those of the operator, whatever the order, the flips, workers and processes."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.conditions import ImageCondition, NoImage
from diffusion_cli.data import Batch, Batches, Images, ProgressiveBatches, ResolutionSchedule, at_size
from diffusion_cli.data.conditioned import image_conditioned
from diffusion_cli.data.image_sources import DerivedImage, with_image_condition
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.progressive import Stage
from helpers.data import folder, take, write_images
from helpers.pairs import pairs, write_pairs

PIXELS = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DERIVED = [
    {"of": "downsample", "factor": 2}, {"of": "gray"}, {"of": "mask"}, {"of": "edges"}, {"of": "blur"}, {"of": "noise"},
]  # fmt: skip


def image_of(batch: Batch) -> torch.Tensor:
    assert batch.condition is not None
    return batch.condition.values["image"]


def in_memory(condition: ImageCondition | NoImage) -> Images:
    return with_image_condition(MemoryImages(PIXELS, None), condition)


@pytest.mark.parametrize("settings", [*DERIVED[:2], *DERIVED[3:5]], ids=lambda settings: settings["of"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_the_operators_images_of_its_own_images(tmp_path, settings, workers):
    condition = ImageCondition(**settings)
    images = folder(write_images(tmp_path, 12), in_memory=False).load("train")
    for batch in take(
        Batches(with_image_condition(images, condition), 5, 0, flip=True, num_workers=workers), 4
    ):
        assert_close(image_of(batch), condition.derived(batch.images, [0] * 5), rtol=0, atol=0)


@pytest.mark.parametrize("settings", DERIVED, ids=lambda settings: settings["of"])
def test_two_processes_have_the_condition_images_of_one(settings):
    images = in_memory(ImageCondition(**settings, noise_augmentation=0.2))
    whole = take(Batches(images, 4, 0, flip=True), 3)
    parts = [take(Batches(images, 4, 0, flip=True, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        assert_close(torch.cat([image_of(part[number]) for part in parts]), image_of(batch), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings", [{"of": "mask"}, {"of": "noise"}, {"of": "gray", "noise_augmentation": 0.5}]
)
def test_random_choices_change_with_the_step_and_repeat_with_the_seed(settings):
    images = in_memory(ImageCondition(**settings))
    whole_epochs = [take(Batches(images, 12, seed, flip=False), 2) for seed in (0, 0, 1)]
    ordered = [[image_of(batch)[batch.index.argsort()] for batch in batches] for batches in whole_epochs]
    assert torch.equal(ordered[0][0], ordered[1][0])
    assert not torch.equal(ordered[0][0], ordered[0][1])
    assert not torch.equal(ordered[0][0], ordered[2][0])


def unrelated(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether values and squares of two samples [N, ...] correlate by less than 5 standard errors."""
    sides = [torch.cat([each.flatten(1), each.flatten(1).square()], 1).double() for each in (one, other)]
    scaled = [(side - side.mean(0)) / side.std(0).clamp(min=1e-9) for side in sides]
    return bool((scaled[0].T @ scaled[1] / len(one)).abs().max() < 5 / len(one) ** 0.5)


@pytest.mark.parametrize("settings", [{"of": "mask"}, {"of": "mask", "mask": "pixels"}, {"of": "noise"}])
def test_the_random_choices_of_a_training_image_are_independent(settings):
    """Otherwise the level of its noise would tell the hidden part, or the noise."""
    images, rows = torch.zeros(2000, 1, 8, 8), torch.arange(2000)
    result, clean = (
        DerivedImage(ImageCondition(**settings, noise_augmentation=most)).values(rows, images, draw=3)
        for most in (1.0, 0.0)
    )
    level = (result[:, -1:, :1, :1] + 1) / 2
    noise = ((result[:, :-1] - clean) / level)[:, :1]
    choice = clean[:, -1:]
    assert_close(noise.std().item(), 1.0, rtol=0.02, atol=0)
    assert unrelated(level, choice)
    assert unrelated(level, noise)
    assert unrelated(choice, noise)


def test_outside_training_random_choices_depend_on_the_row_alone():
    images = in_memory(ImageCondition(of="noise", noise_augmentation=0.5))
    rows = torch.arange(12)
    x = PIXELS / 127.5 - 1
    whole, part = images.condition(rows, x), images.condition(rows[3:5], x[3:5])
    assert whole is not None
    assert part is not None
    assert torch.equal(part.values["image"], whole.values["image"][3:5])
    assert torch.equal(whole.values["image"][:, -1], torch.full((12, 8, 8), -1.0))


def test_settings_that_change_condition_images_change_their_digest():
    def digest(**settings) -> str:
        return in_memory(ImageCondition(**settings)).conditions["image"].digest()

    other = [*DERIVED, {"of": "downsample"}, {"of": "mask", "mask": "pixels"}, {"of": "mask", "ratio": 0.5}]
    assert len({digest(**settings) for settings in other}) == len(other)
    assert digest(of="downsample", factor=4) == digest(of="downsample")
    assert digest(of="gray", noise_augmentation=0.5) == digest(of="gray")  # evaluations have none


def test_the_noise_augmentation_of_pairs_is_that_of_training_alone(tmp_path):
    condition = ImageCondition(noise_augmentation=0.5)
    images = with_image_condition(pairs(write_pairs(tmp_path)).load("train"), condition)
    rows = torch.arange(6)
    x = images[rows] / 127.5 - 1
    outside = images.condition(rows, x)
    assert outside is not None
    assert_close(outside.values["image"][:, 0], x[:, 0])
    (batch,) = take(Batches(images, 6, 0, flip=False), 1)
    level = 0.25 * (image_of(batch)[:, 1, 0, 0] + 1)
    difference = image_of(batch)[:, 0] - batch.images[:, 0]
    assert_close(difference.std((1, 2)), level, rtol=0.4, atol=0)


def test_a_model_without_condition_images_ignores_those_of_the_dataset(tmp_path):
    root = write_pairs(tmp_path)
    (root / "sources/a/0.bmp").write_bytes(b"junk")  # is not decoded
    images = with_image_condition(pairs(root).load("train"), NoImage())
    (batch,) = take(Batches(images, 4, 0, flip=True), 1)
    assert batch.condition is not None
    assert [*batch.condition.values] == ["label"]
    derived = with_image_condition(pairs(root).load("train"), ImageCondition(of="gray"))
    (batch,) = take(Batches(derived, 4, 0, flip=True), 1)
    assert image_of(batch).shape == (4, 1, 8, 12)


def test_all_splits_of_a_dataset_have_the_condition_images_of_a_model(tmp_path):
    dataset = pairs(write_pairs(tmp_path), val_fraction=0.3)
    augmented = image_conditioned(dataset, ImageCondition(noise_augmentation=0.5))
    assert (augmented.name, augmented.shape, augmented.num_classes) == (dataset.name, (3, 8, 12), 2)
    without = image_conditioned(dataset, NoImage())
    for split, pick in product(("train", "val"), ("load", "stream")):
        images = getattr(augmented, pick)(split)
        rows = torch.arange(1)
        condition = images.condition(rows, images[rows] / 127.5 - 1)
        assert condition is not None
        assert condition.values["image"].shape == (1, 2, 8, 12)
        assert not getattr(without, pick)(split).conditions


def test_progressive_batches_reduce_condition_images_as_images():
    images = in_memory(ImageCondition(of="gray"))
    stages = ResolutionSchedule([Stage(0, (3, 4, 4), 4), Stage(2, (3, 8, 8), 4)])
    grown = [batch for _, batch in zip(range(3), ProgressiveBatches(images, stages, 0, True), strict=False)]
    whole = take(Batches(images, 4, 0, flip=True), 3)
    for batch, full in zip(grown, whole, strict=True):
        assert image_of(batch).shape[2:] == batch.images.shape[2:]
        assert_close(image_of(batch), image_of(at_size(full, batch.images.shape[1:])))
        assert_close(
            image_of(batch), ImageCondition(of="gray").derived(batch.images, [0] * 4), rtol=0, atol=1e-5
        )


def test_images_on_disk_and_in_memory_have_the_same_batches(tmp_path):
    root = write_pairs(tmp_path)
    batches = [
        take(Batches(pairs(root, in_memory=there).load("train"), 4, 0, flip=True, num_workers=workers), 3)
        for there, workers in ((True, 0), (False, 0), (False, 2))
    ]
    for one, *others in zip(*batches, strict=True):
        for other in others:
            assert torch.equal(image_of(one), image_of(other))
            assert torch.equal(one.images, other.images)
