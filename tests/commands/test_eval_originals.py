"""Samples of a model with condition images, measured against their targets."""

from pathlib import Path

import pytest
import torch

from diffusion_cli.commands.dataset_conditions import with_conditions_of
from diffusion_cli.commands.samples import ModelSamples
from diffusion_cli.commands.trained import dataset_of, prepare
from diffusion_cli.conditions import ImageCondition
from diffusion_cli.config import SampleConfig, load
from diffusion_cli.data.conditioned import image_conditioned
from diffusion_cli.data.image_sources import DerivedImage
from diffusion_cli.metrics import PSNR, FeatureExtractors, GivenReference, evaluate, unlike
from diffusion_cli.metrics.originals import peak_ratio
from diffusion_cli.metrics.repeats import parts
from helpers.translation import Shades, model_of

CONDITION = {"of": "noise", "noise_sigma": 0.2}


@pytest.fixture
def samples(schedules, tmp_path):
    """A function from a number to samples for the condition images of the validation images of a dataset."""

    def build(count, dataset, condition=CONDITION):
        config = load("sample", ["steps=2"])
        assert isinstance(config, SampleConfig)
        trained = prepare(config.sampling, tmp_path, model_of(schedules["cosine"], **condition))
        if dataset is not None:
            told = image_conditioned(dataset, ImageCondition(**condition))
            trained, _ = with_conditions_of(told, trained, Path())
        return ModelSamples(trained, range(count), None)

    return build


def test_the_dataset_of_a_run_has_its_condition_images(schedules, tmp_path):
    trained = model_of(schedules["cosine"], **CONDITION)
    dataset = dataset_of(tmp_path, trained, "", {})
    for split in ("train", "val"):
        images, rows = dataset.stream(split), torch.tensor([5])
        x = images[rows].float() / 127.5 - 1
        y = images.condition(rows, x)
        assert y is not None
        expected = DerivedImage(ImageCondition(**CONDITION)).values(rows, x, None)
        assert torch.equal(y.values["image"], expected)


def test_originals_are_the_targets_of_the_validation_images(samples):
    dataset = Shades("")
    made = samples(13, dataset)  # ten images, so three have a second sample
    originals = made.originals(range(13))
    assert originals is not None
    shades = originals.flatten(1)
    assert (shades == shades[:, :1]).all()
    assert sorted(shades[:10, 0].tolist()) == [20 * row for row in range(10)]
    assert torch.equal(originals[10:], originals[:3])
    images, _ = made.batch(range(13))
    places = (originals[:, 0, 0, 0] / 20).long()
    given = DerivedImage(ImageCondition(**CONDITION)).values(places, originals.float() / 127.5 - 1, None)
    assert torch.equal(images, ((given + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    _, second = parts(samples(12, dataset), 2)
    later = second.originals(range(6))
    assert later is not None
    assert torch.equal(later, originals[6:12])


def test_psnr_of_samples_is_that_of_the_copied_conditions(samples, tmp_path):
    dataset = Shades("")
    made = samples(10, dataset)
    (result,) = evaluate(
        {"psnr": PSNR()},
        FeatureExtractors({}, dataset, tmp_path, torch.device("cpu")),
        made,
        GivenReference(dataset, path="none"),
        batch_size=4,
    ).report.results
    originals = made.originals(range(10))
    assert originals is not None
    ratios = peak_ratio(made.batch(range(10))[0], originals)
    assert result.value == pytest.approx(float(ratios.mean()))
    assert 10 < result.value < 30


def test_samples_without_rows_of_a_dataset_have_no_originals(samples):
    assert samples(3, None).originals([0]) is None


def test_values_for_other_condition_images_are_unlike(samples):
    dataset = Shades("")
    one, same, other = (
        {"sampling": samples(10, dataset, condition).protocol()}
        for condition in (CONDITION, CONDITION, {**CONDITION, "noise_sigma": 0.3})
    )
    assert unlike(one, same) == []
    assert unlike(one, other) == ["sampling.conditions"]
