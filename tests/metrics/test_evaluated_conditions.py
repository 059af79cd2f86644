"""Metrics of a model on real images: the conditions of these images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.data.sources import ColumnSource
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import EvaluatedModel
from helpers.metrics import CPU, DATA, pixels

AGE = AttributeDescription(name="age", kind="number", low=0, high=9)


def subject(conditions: Conditions) -> EvaluatedModel:
    info = SimpleNamespace(config=SimpleNamespace(condition=None))
    model: Any = SimpleNamespace(denoiser=SimpleNamespace(conditions=conditions), info=info)
    return EvaluatedModel(model, DATA, Path(), CPU, 0, 4, False, "fp32")


def aged(*ages: float) -> MemoryImages:
    images = MemoryImages(pixels(3, 0), torch.tensor([2, 0, 1]))
    return images.with_conditions({"age": ColumnSource(torch.tensor(ages))})


def test_a_model_with_attributes_gets_those_of_the_rows():
    images, y = subject(Conditions(attributes=(AGE,))).batch(aged(1, 5, 9), torch.tensor([2, 0]))
    assert torch.equal(images, pixels(3, 0)[[2, 0]])
    assert y is not None
    assert y.values["age"].tolist() == [9, 1]
    assert y.values["label"].tolist() == [1, 2]


def test_images_without_the_attributes_of_the_model_are_refused():
    images = MemoryImages(pixels(3, 0), None)
    with pytest.raises(
        UsageError, match=r"^dataset=held: its images have no age, on which the model is conditioned; use"
    ):
        subject(Conditions(attributes=(AGE,))).batch(images, torch.tensor([0]))
    assert subject(Conditions.of(3)).batch(images, torch.tensor([0]))[1] is None
    assert subject(Conditions()).batch(aged(1, 5, 9), torch.tensor([0]))[1] is None


def test_other_attributes_are_other_results_and_classes_alone_have_the_same_record():
    with_age = subject(Conditions(attributes=(AGE,)))
    assert with_age.identity(aged(1, 5, 9)) != with_age.identity(aged(1, 5, 8))
    images = aged(1, 5, 9)
    assert subject(Conditions.of(3)).identity(images) == {"images_sha256": images.digest()}
