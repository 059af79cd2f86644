"""Condition images that are derived from images: their values, random choices, channels and wrong settings."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.testing import assert_close

from diffusion_cli.conditions import ImageCondition
from diffusion_cli.errors import UsageError

IMAGES = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
SEEDS = [5, 6, 7]


def derived(
    images: torch.Tensor = IMAGES, seeds: list[int] = SEEDS, has_masks: bool = False, **settings
) -> torch.Tensor:
    condition = ImageCondition(**settings)
    result = condition.derived(images, seeds)
    channels = condition.channels(tuple(images.shape[1:]), has_masks=has_masks)
    assert result.shape == (len(images), channels, *images.shape[2:])
    assert result.abs().max() <= 1
    return result


def test_a_reduced_image_has_the_means_of_blocks_at_the_size_of_the_image():
    blocks = IMAGES.numpy().reshape(3, 3, 4, 2, 6, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3)
    assert_close(derived(of="downsample", factor=2).numpy(), blocks)
    condition = ImageCondition(of="downsample", factor=2)
    assert condition.degradation is not None
    assert condition.degradation.sizes((3, 8, 12)) == (4, 6)
    assert tuple(condition.degradation(IMAGES, SEEDS).shape[2:]) == (4, 6)


def test_the_usual_factor_is_four():
    assert torch.equal(derived(of="downsample"), derived(of="downsample", factor=4))


def test_a_gray_image_is_the_luma():
    red, green, blue = IMAGES.unbind(1)
    assert_close(derived(of="gray")[:, 0], 0.299 * red + 0.587 * green + 0.114 * blue)


@pytest.mark.parametrize("kind", ["box", "pixels", "centre"])
def test_the_hidden_part_is_zero_and_marked(kind):
    result = derived(of="mask", mask=kind)
    known = result[:, 3:]
    assert set(known.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(result[:, :3], torch.where(known == 1, IMAGES, 0.0))


def test_a_hidden_box_is_one_box_of_at_most_its_share():
    images = torch.ones(1000, 1, 16, 24)
    hidden = (derived(images, list(range(1000)), of="mask", ratio=0.5)[:, 1] < 0).numpy()
    shares = hidden.mean((1, 2))
    assert 0.08 < shares.min() < 0.2
    assert 0.4 < shares.max() <= 0.5
    for each in hidden:
        rows, columns = np.flatnonzero(each.any(1)), np.flatnonzero(each.any(0))
        assert each.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert hidden.any(0).all()  # any pixel can be hidden


def test_hidden_pixels_have_their_share():
    result = derived(torch.ones(100, 1, 16, 16), list(range(100)), of="mask", mask="pixels", ratio=0.3)
    assert_close((result[:, 1] < 0).double().mean().item(), 0.3, rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", [(1, 9, 11), (1, 6, 7, 9)])
def test_a_blurred_image_is_that_of_scipy(shape):
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    result = derived(images, [0, 0], of="blur", blur_sigma=1.5)
    expected = [ndimage.gaussian_filter(image[0].numpy(), 1.5, mode="nearest") for image in images]
    assert_close(result[:, 0].numpy(), np.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 9, 11), (1, 6, 7, 9)])
def test_edges_are_those_of_sobel_in_scipy(shape):
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ndim = len(shape) - 1
    for image, result in zip(images, derived(images, [0, 0], of="edges"), strict=True):
        slopes = [
            ndimage.sobel(image[0].numpy(), axis, mode="nearest") / 2 / 4 ** (ndim - 1)
            for axis in range(ndim)
        ]
        strength = np.sqrt(np.square(slopes).sum(0)).clip(max=1)
        assert_close(result[0].numpy(), 2 * strength - 1, rtol=0, atol=1e-5)


def test_a_step_from_black_to_white_is_the_strongest_edge():
    images = torch.full((1, 1, 8, 8), -1.0)
    images[..., 4:] = 1
    columns = derived(images, [0], of="edges")[0, 0, 0]
    assert_close(columns, torch.tensor([-1.0, -1, -1, 1, 1, -1, -1, -1]))


def test_noise_has_its_standard_deviation_and_is_clipped():
    images = torch.zeros(4, 1, 64, 64)
    noise = derived(images, [1, 2, 3, 4], of="noise", noise_sigma=0.2)
    assert_close(noise.std().item(), 0.2, rtol=0.03, atol=0)
    assert derived(images + 1, [1, 2, 3, 4], of="noise", noise_sigma=0.2).max() == 1


def test_segmentation_is_the_last_channel():
    masked = torch.cat([IMAGES, IMAGES[:, :1]], dim=1)
    assert torch.equal(derived(masked, has_masks=True, of="segmentation"), IMAGES[:, :1])


@pytest.mark.parametrize("settings", [{"of": "mask"}, {"of": "mask", "mask": "pixels"}, {"of": "noise"}])
def test_random_choices_depend_on_the_seed_of_the_image_alone(settings):
    whole = derived(IMAGES, SEEDS, **settings)
    assert torch.equal(derived(IMAGES[1:2], SEEDS[1:2], **settings), whole[1:2])
    assert not torch.equal(derived(IMAGES, [8, 9, 10], **settings), whole)


def test_noise_augmentation_adds_noise_of_the_level_in_its_channel():
    condition = ImageCondition(noise_augmentation=0.4)
    images = torch.zeros(400, 1, 16, 16)
    assert condition.channels((3, 16, 16), source=1) == 2
    result = condition.augmented(images, list(range(400)))
    level = 0.4 * (result[:, 1, 0, 0] + 1) / 2
    assert torch.equal(result[:, 1], result[:, 1, :1, :1].expand(-1, 16, 16))
    assert_close(result[:, 0].std((1, 2)), level, rtol=0.2, atol=0)
    assert_close(level.mean().item(), 0.2, rtol=0, atol=0.02)
    assert level.min() >= 0
    assert level.max() < 0.4


@pytest.mark.parametrize("sizes", [(16, 16), (8, 8, 8)])
def test_the_noise_of_reduced_images_is_that_of_their_own_pixels(sizes):
    """Noise that differs within a block would have a quarter of this deviation in the mean of 4 x 4 pixels."""
    condition = ImageCondition(of="downsample", factor=4, noise_augmentation=0.4)
    assert condition.degradation is not None
    result = condition.augmented(torch.zeros(400, 1, *sizes), list(range(400)))
    small = condition.degradation(result, [0] * 400)
    assert_close(condition.degradation.enlarged(small), result)
    level = 0.4 * (small[:, 1].flatten(1)[:, 0] + 1) / 2
    relative = small[:, 0].flatten(1) / level[:, None]
    assert_close(relative.std().item(), 1.0, rtol=0.05, atol=0)


def test_noise_augmentation_leaves_the_mark_of_the_known_part():
    condition = ImageCondition(of="mask", noise_augmentation=0.4)
    clean = derived(of="mask")
    result = condition.augmented(clean, SEEDS)
    assert torch.equal(result[:, 3], clean[:, 3])
    assert (result[:, :3] != clean[:, :3]).all()


def test_without_a_seed_the_augmented_image_is_the_clean_one_at_level_zero():
    result = ImageCondition(noise_augmentation=0.4).augmented(IMAGES)
    assert torch.equal(result[:, :3], IMAGES)
    assert torch.equal(result[:, 3], torch.full((3, 8, 12), -1.0))
    assert ImageCondition().augmented(IMAGES, SEEDS) is IMAGES


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"of": "gray", "factor": 2},
            "condition.factor=2: applies only with condition.of=downsample; leave it out",
        ),
        ({"blur_sigma": 1.0}, "condition.blur_sigma=1.0: applies only with condition.of=blur; leave it out"),
        (
            {"of": "mask", "mask": "centre", "ratio": 0.5},
            "condition.ratio=0.5: applies only with condition.mask=box or condition.mask=pixels; leave it out",
        ),
    ],
)
def test_a_setting_that_does_not_apply_is_an_error(settings, line):
    with pytest.raises(UsageError) as error:
        ImageCondition(**settings)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("settings", "shape", "source", "line"),
    [
        (
            {}, (3, 8, 8), None,
            "condition=image: the dataset has no condition images; use dataset=pairs, or set condition.of",
        ),
        (
            {"of": "blur"}, (3, 8, 8), 1,
            "condition.of=blur: conflicts with dataset=pairs, which has condition images; set condition.of=null",
        ),
        ({"of": "downsample"}, (3, 8, 10), None, "condition.factor=4: does not divide 10 x 8 pixels; use a divisor"),
        (
            {"of": "gray"}, (1, 8, 8), None,
            "condition.of=gray: needs colour images, and these have 1 channel; use a dataset with dataset.channels=3",
        ),
        (
            {"of": "segmentation"}, (2, 8, 8), None,
            "condition.of=segmentation: needs images with a mask as their last channel; "
            "set dataset.masks, or has_masks in the .npz file",
        ),
        (
            {"of": "segmentation"}, (3, 8, 8), None,
            "condition.of=segmentation: needs images with a mask as their last channel; "
            "set dataset.masks, or has_masks in the .npz file",
        ),
    ],
)  # fmt: skip
def test_images_that_do_not_allow_the_condition_are_refused(settings, shape, source, line):
    with pytest.raises(UsageError) as error:
        ImageCondition(**settings).channels(shape, source)
    assert str(error.value) == line


def test_a_small_input_is_enlarged_for_the_network():
    condition = ImageCondition(of="downsample", factor=2, noise_augmentation=0.1)
    assert condition.own_size((8, 12)) == (4, 6)
    small = IMAGES[:, :, ::2, ::2]
    result = condition.given(small)
    assert torch.equal(result[:, :3], small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(result[:, 3], torch.full((3, 8, 12), -1.0))
    assert ImageCondition().own_size((8, 12)) == (8, 12)
    assert ImageCondition().given(IMAGES) is IMAGES
