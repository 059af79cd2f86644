"""Translation of condition images: what the network gets, tiles of larger images, and wrong inputs."""

from dataclasses import replace

import pytest
import torch

from diffusion_cli.conditions import Condition, ImageCondition
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.editing import LargerShapes, Translate
from diffusion_cli.samplers import DDIM, integrate
from helpers.editing import F64, GRAY, noise, plain

SPREAD = 0.5
"""Standard deviation of the noise of a condition image, of pixels with mean 0 and deviation 1."""


def posterior(schedule, seen=None):
    """The guided denoiser of standard normal pixels x_0, given the condition image x_0 + SPREAD n."""

    def guided(condition):
        c = condition.values["image"]
        if seen is not None:
            seen.append(condition)

        def denoise(x, t):
            alpha, sigma = schedule(t)
            precision = 1 + 1 / SPREAD**2 + alpha**2 / sigma**2
            x0 = (c[:, :1] / SPREAD**2 + alpha / sigma**2 * x) / precision
            return Prediction(x0, (x - alpha * x0) / sigma, sigma)

        return denoise

    return guided


def translate(schedule, edit, images, seen=None, steps=40, condition=None, sampler=None):
    """The result of an edit of images, with the same noise at every call."""
    sampler = sampler or DDIM(schedule)
    whole = plain(sampler, None, steps, lambda: noise(len(images), *edit.results, seed=5))
    seeds = range(len(images))
    process = replace(whole, guided=posterior(schedule, seen), condition=condition, seeds=seeds)
    return edit.of(list(range(len(images))))(images, process)


def ready(shape=GRAY, channels=1, given=None, image=None, **options):
    edit = Translate(shape, **options).conditioned(image or ImageCondition(), channels)
    return edit.sized(given or edit.accepts()[0])


@pytest.mark.parametrize("tag", ["linear", "vp", "edm", "rectified"])
def test_samples_are_those_of_the_posterior(schedules, tag):
    """Results are affine in the noise, so two noises give mean and deviation of every pixel."""
    schedule = schedules[tag]
    images = noise(3, *GRAY, seed=1)
    found = []
    for draw in (torch.zeros, torch.ones):
        process = plain(DDIM(schedule), None, 400, lambda draw=draw: draw(3, *GRAY, dtype=F64))
        edit = ready()
        found.append(edit(images, replace(process, guided=posterior(schedule))).images[:, 0])
    mean, deviation = images / (1 + SPREAD**2), SPREAD / (1 + SPREAD**2) ** 0.5
    assert torch.allclose(found[0], mean, atol=2e-2)
    assert torch.allclose(found[1] - found[0], torch.full_like(mean, deviation), atol=2e-2)


@pytest.mark.parametrize("tiles_per_call", [1, 4, 100])
def test_each_tile_has_the_condition_and_the_noise_of_its_place(schedules, tiles_per_call):
    """Pixels of this model are independent, so tiles must give what one network call on the whole image gives."""
    schedule, images, seen = schedules["linear"], noise(2, 1, 13, 21, seed=1), []
    whole = ready((1, 13, 21))
    edit = ready(given=(1, 13, 21), overlap=3, tiles_per_call=tiles_per_call)
    assert edit.results == (1, 13, 21)
    expected = translate(schedule, whole, images)
    labels = Condition({"label": torch.tensor([3, 7])})
    result = translate(schedule, edit, images, seen, condition=labels)
    assert torch.allclose(result.images, expected.images, atol=1e-9)
    assert torch.equal(result.before[0], images)
    assert [len(condition) for condition in seen] == {1: [1] * 16, 4: [4] * 4, 100: [16]}[tiles_per_call]
    assert torch.cat([condition.values["label"] for condition in seen]).tolist() == [3] * 8 + [7] * 8


def test_an_input_of_the_own_size_is_one_tile(schedules):
    schedule, images, seen = schedules["linear"], noise(2, *GRAY, seed=1), []
    result = translate(schedule, ready(), images, seen)
    assert torch.equal(seen[0].values["image"], images)
    sampler = DDIM(schedule)
    process = plain(sampler, posterior(schedule)(seen[0]), 40, lambda: noise(2, *GRAY, seed=5))
    (*_, x) = integrate(sampler, process.denoise(), process.start(), process.times, process.draw)
    assert torch.equal(result.images[:, 0], x)


def test_small_inputs_are_enlarged_as_in_training(schedules):
    image, seen = ImageCondition(of="downsample", factor=4), []
    edit = ready(image=image)
    assert edit.accepts() == [(1, 2, 2)]
    assert edit.results == GRAY
    originals = noise(2, *GRAY, seed=1)
    small = originals.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    translate(schedules["linear"], edit, small, seen)
    assert torch.allclose(seen[0].values["image"], image.derived(originals, [0, 1]))
    wide = ready(image=image, given=(1, 3, 5))
    assert wide.results == (1, 12, 20)
    assert translate(schedules["linear"], wide, noise(1, 1, 3, 5), steps=3).images.shape == (1, 1, 1, 12, 20)


def test_originals_are_degraded_only_if_asked(schedules):
    image, seen = ImageCondition(of="mask", mask="pixels", noise_augmentation=0.3), []
    originals = noise(3, *GRAY, seed=1).clamp(-1, 1)
    edit = ready(image=image, channels=3, degrade=True)
    result = translate(schedules["linear"], edit, originals, seen)
    given = seen[0].values["image"]
    assert torch.equal(given[:, 0], originals[:, 0] * (given[:, 1] == 1))
    assert 0.5 < (given[:, 1] == 1).double().mean() < 0.95
    assert (given[:, 2] == -1).all()  # noise level 0
    assert [torch.equal(*pair) for pair in zip(result.before, (originals, given[:, :1]), strict=True)] == [
        True
    ] * 2
    assert len({row.numpy().tobytes() for row in given[:, 1]}) == 3  # the hidden part depends on the seed


@pytest.mark.parametrize("size", [(8, 8), (12, 15)])
def test_the_known_part_of_an_input_stays(schedules, size):
    image, seen = ImageCondition(of="mask"), []
    edit = ready(image=image, channels=2, given=(1, *size), mask=[2, 1, 6, 7])
    originals = noise(2, 1, *size, seed=1).clamp(-1, 1)
    result = translate(schedules["linear"], edit, originals, seen).images[:, 0]
    hidden = torch.zeros(size, dtype=torch.bool)
    hidden[1:7, 2:6] = True
    assert torch.equal(result[..., ~hidden], originals[..., ~hidden])
    assert (result[..., hidden] != originals[..., hidden]).all()
    assert result.abs().max() <= 1
    assert edit.known is not None
    assert torch.equal(edit.known[0, 0], ~hidden)
    by_file = ready(image=image, channels=2, given=(1, *size), mask="regions.png").masked(hidden[None, None])
    assert torch.equal(translate(schedules["linear"], by_file, originals).images[:, 0], result)


def test_images_of_the_dataset_bring_their_conditions(schedules):
    schedule, seen = schedules["linear"], []
    originals, given = noise(2, *GRAY, seed=1), noise(2, 2, 8, 8, seed=2)
    edit = Translate(GRAY).conditioned(ImageCondition(noise_augmentation=0.5), 2).of_rows()
    edit = edit.sized((3, 8, 8))
    result = translate(schedule, edit, torch.cat([originals, given], 1), seen)
    assert torch.equal(seen[0].values["image"], given)
    assert torch.equal(result.before[0], originals)
    assert torch.equal(result.before[1], given[:, :1])


def test_conditions_of_other_channels_are_shown_in_those_of_the_model():
    edit = Translate((3, 8, 8))
    gray, masked = noise(2, 1, 8, 8), noise(2, 4, 8, 8)
    assert torch.equal(edit._picture(gray), gray.expand(-1, 3, -1, -1))
    assert torch.equal(edit._picture(masked), masked[:, :3])


def test_larger_inputs_are_accepted_and_smaller_ones_are_not():
    shapes = LargerShapes([(1, 8, 8)])
    assert (1, 8, 8) in shapes
    assert (1, 8, 30) in shapes
    assert (1, 7, 30) not in shapes
    assert (3, 8, 8) not in shapes
    assert (1, 8, 8, 8) not in shapes
    assert ready((3, 8, 8), image=ImageCondition(of="gray")).accepts() == [(1, 8, 8)]
    assert ready(image=ImageCondition(of="edges"), degrade=True).accepts() == [GRAY]


@pytest.mark.parametrize(
    ("options", "image", "given", "message"),
    [
        ({"degrade": True}, {}, GRAY, r"edit.degrade=true: the model is conditioned on images of its dataset"),
        ({"mask": "centre"}, {"of": "edges"}, GRAY, r"edit.mask=centre: applies only to a model .*of=mask"),
        ({"mask": "centre", "degrade": True}, {"of": "mask"}, GRAY, r"edit.mask=centre: applies only .*degrade"),
        ({}, {"of": "mask"}, GRAY, r"edit.mask=null: needed.*centre, a box or a mask file, or set edit.degrade=true"),
        ({"mask": [0, 0, 9, 9]}, {"of": "mask"}, GRAY, r"edit.mask=.*within 8 x 8"),
        ({"overlap": 8}, {"of": "edges"}, (1, 9, 8), r"edit.overlap=8: must be less than the 8 pixels"),
        ({"degrade": True}, {"of": "downsample", "factor": 4}, (1, 8, 10), r"factor=4: does not divide 10 x 8"),
    ],
)  # fmt: skip
def test_options_that_do_not_suit_the_model_are_refused(options, image, given, message):
    with pytest.raises(ValueError, match=message):
        ready(
            image=ImageCondition(**image),
            channels=2 if image.get("of") == "mask" else 1,
            given=given,
            **options,
        )


def test_an_overlap_matters_only_for_larger_inputs():
    assert ready(overlap=8).results == GRAY
