"""Attributes and texts in the Python API."""

from pathlib import Path

import pytest
import torch

from diffusion_cli.commands import sample_conditions
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.errors import UsageError
from diffusion_cli.model import loaded
from diffusion_cli.model.loaded import Model
from helpers.conditions import ATTRIBUTES, grey_model, letters
from helpers.translation import model_of


@pytest.fixture
def model(schedules, monkeypatch):
    monkeypatch.setattr(loaded, "load_model", lambda *_: grey_model(schedules["cosine"]))
    monkeypatch.setattr(sample_conditions, "_encoder", lambda *_: letters)
    return Model(Path("told"), "ema", None, "cpu")


def grey(images):
    return [round(float(value), 2) for value in images.float().mean((1, 2, 3)) / 127.5 - 1]


def test_samples_have_the_conditions_of_a_mapping_and_texts(model):
    assert model.conditions.attributes == ATTRIBUTES
    found = model.sample(4, steps=2, label={"age": [0, 40.0], "species": "frog"}, prompt=["it's, a", "b"])
    assert grey(found) == pytest.approx([-0.3, 0.4] * 2, abs=0.01)
    assert grey(model.sample(2, steps=2, label=[{"species": "cat"}, {"age": 20}])) == pytest.approx(
        [0, 0.2], abs=0.01
    )
    words = {"prompt": "ab", "negative_prompt": "it's, a", "guidance": "cfg", "guidance_scale": 2}
    assert grey(model.sample(1, steps=2, **words)) == pytest.approx([0], abs=0.01)
    assert grey(model.sample(1, steps=2, label={"glasses": True})) == pytest.approx([0.05], abs=0.01)


def test_a_denoiser_gets_values_by_name(model):
    noise = torch.randn(2, 1, 8, 8)
    told = {"age": [20, 40], "species": ["frog", None], "text": [None, "ab"]}
    found = model.denoise(noise, 0.5, told).x0.mean((1, 2, 3))
    torch.testing.assert_close(found, torch.tensor([0.3, 0.2]))
    found = model.denoise(noise, 0.5, {"age": torch.tensor([20.0, 40.0])}).x0.mean((1, 2, 3))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4]))


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (
            {"agee": [1, 2]},
            r"y\.agee: the model has no such condition; choose from species, glasses, age, text",
        ),
        ({"age": [1]}, r"y\.age: has 1 value; give 2, one for each image"),
        ({"age": ["old", 3]}, r"y\.age=old: must be a number"),
        ({"species": ["dog", "cat"]}, r"y\.species=dog: unknown class"),
        ({"text": [None, 3]}, r"y\.text=3: must be text; give texts, or None for a missing one"),
        (
            ["cat", "dog"],
            "y: the model is not class-conditional; give a mapping of species, glasses, age, text to v",
        ),
    ],
)
def test_wrong_values_are_one_line(model, told, line):
    with pytest.raises(UsageError, match=f"^{line}"):
        model.denoise(torch.randn(2, 1, 8, 8), 0.5, told)


def test_wrong_labels_are_one_line(model):
    with pytest.raises(UsageError, match=r"^label\.age=object: must be a number or text"):
        model.sample(1, label={"age": object()})
    with pytest.raises(UsageError, match=r"^label\.species=dog: unknown class"):
        model.sample(1, label={"species": "dog"})


@pytest.fixture
def translator(monkeypatch):
    """A function from condition keys to a model that copies its condition image."""

    def build(**condition):
        monkeypatch.setattr(loaded, "load_model", lambda *_: model_of(Cosine(num_timesteps=20), **condition))
        return Model(Path("told"), "ema", None, "cpu")

    return build


def random(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_denoiser_gets_condition_images_without_noise(translator):
    """The model copies the condition image, and is black without one."""
    model, noise = translator(of="blur", noise_augmentation=0.5), torch.randn(2, 1, 8, 8)
    image, told = torch.rand(1, 8, 8), []
    model.denoiser.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    for given in ([None, image], torch.stack([torch.full_like(image, torch.nan), image])):
        found = model.denoise(noise, 0.5, {"image": given}).x0
        torch.testing.assert_close(found, torch.stack([-torch.ones_like(image), image]))
        assert told[-1].values["image"][0].isnan().all()
        assert (told[-1].values["image"][1, 1] == -1).all()  # level 0
    for given in (None, [None, None]):
        assert (model.denoise(noise, 0.5, {"image": given}).x0 == -1).all()


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (torch.zeros(2, 2, 8, 8), r"has an image of shape \(2, 8, 8\); give images of shape \(1, 8, 8\), or None"),
        ([torch.zeros(1, 4, 4), None], r"has an image of shape \(1, 4, 4\)"),
        (["a.png", None], "is no image; give images of shape"),
        ([object(), None], "is no image; give images of shape"),
        (torch.zeros(1, 1, 8, 8), "has 1 value; give 2"),
        (random(2, 1, 8, 8), r"has an image of uint8; give floating-point numbers in \[-1, 1\]"),
        (0.5, "is no list of values; give 2, one for each image"),
        ("ab", "is no list of values; give 2, one for each image"),
    ],
)  # fmt: skip
def test_wrong_condition_images_are_one_line(translator, image, line):
    model = translator(of="noise", noise_augmentation=0.5)
    with pytest.raises(UsageError, match=rf"^y\.image: {line}"):
        model.denoise(torch.randn(2, 1, 8, 8), 0.5, {"image": image})


def test_a_mask_that_does_not_apply_is_shown_without_a_value(translator):
    with pytest.raises(UsageError, match=r"^mask: applies only to a model trained with condition.of=mask"):
        translator(of="noise").edit("translate", random(1, 1, 8, 8), mask=torch.ones(8, 8).bool(), steps=2)


@pytest.mark.parametrize("size", [(8, 8), (8, 21), (19, 11)])
def test_images_of_any_size_are_translated(translator, size):
    images = random(3, 1, *size)
    assert torch.equal(translator(of="noise").edit("translate", images, steps=2), images)


def test_small_images_are_enlarged_and_originals_reduced_first(translator):
    model, small = translator(of="downsample", factor=2), random(2, 1, 4, 4)
    enlarged = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(model.edit("translate", small, steps=2), enlarged)
    assert torch.equal(model.edit("translate", enlarged, steps=2, overrides=["edit.degrade=true"]), enlarged)


@pytest.mark.parametrize("size", [(8, 8), (12, 9)])
def test_the_hidden_part_of_a_translation_is_that_of_the_mask(translator, size):
    images, mask = random(2, 1, *size), torch.zeros(size, dtype=torch.bool)
    mask[2:7, 1:4] = True
    found = translator(of="mask").edit("translate", images, mask=mask, steps=2)
    assert torch.equal(found[:, 0, ~mask], images[:, 0, ~mask])
    assert ((found[:, 0, mask].float() - 127.5).abs() < 1).all()  # the copied condition is 0 there


def test_wrong_translations_are_one_line(translator, model):
    with pytest.raises(UsageError, match=r"^mask=.*must be bool \[12, 9\]"):
        translator(of="mask").edit("translate", random(1, 1, 12, 9), mask=torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(UsageError, match=r"^images=.*must have shape \(1, 8, 8\) or larger"):
        translator(of="noise").edit("translate", random(1, 1, 7, 8), steps=2)
    with pytest.raises(UsageError, match=r"^edit=translate: the model has no condition image"):
        model.edit("translate", random(1, 1, 8, 8))


def test_attributes_of_images_are_changed(model):
    images = torch.full((2, 1, 8, 8), 128, dtype=torch.uint8)
    words = ["edit.source={age: 20, species: cat}", "edit.to={age: 40, glasses: true}", "edit.strength=1"]
    # The network shows 0.4 for the age and 0.05 for glasses, in place of the 0.2 of the inversion.
    told = []
    model.denoiser.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    found = model.edit("attribute", images, steps=3, overrides=words)
    assert found.shape == images.shape
    first, last = told[0].values, told[-1].values
    assert (first["age"].tolist(), first["species"].tolist(), first["glasses"].tolist()) == (
        [20, 20],
        [0, 0],
        [-1, -1],
    )
    assert (last["age"].tolist(), last["species"].tolist(), last["glasses"].tolist()) == (
        [40, 40],
        [0, 0],
        [1, 1],
    )
    assert grey(found) == pytest.approx([0.45, 0.45], abs=0.02)
