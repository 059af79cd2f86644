"""Attributes and texts in the Python API."""

from pathlib import Path

import pytest
import torch

from diffusion_cli.commands import sample_conditions
from diffusion_cli.errors import UsageError
from diffusion_cli.model import loaded
from diffusion_cli.model.loaded import Model
from helpers.conditions import ATTRIBUTES, grey_model, letters


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
        ({"age": [1]}, r"y\.age: has 1 values; give 2, one for each image"),
        ({"species": ["dog", "cat"]}, r"label\.species=dog: unknown class"),
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
