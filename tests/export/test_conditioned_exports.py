"""Exports have class labels alone; models with other conditions are refused."""

from dataclasses import replace

import pytest

from diffusion_cli.conditions import AttributeDescription, Conditions, TextDescription
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.errors import UsageError
from diffusion_cli.export import Diffusers, ExportFormat, Onnx, Safetensors, Torch
from diffusion_cli.networks import UNet
from helpers.exports import denoiser
from helpers.networks import SMALL

AGE = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
TEXT = TextDescription(length=4, vocabulary=9, width=8, depth=1, heads=2)


@pytest.mark.parametrize("form", [Diffusers(), Onnx(), Safetensors(), Torch()], ids=lambda form: form.name)
@pytest.mark.parametrize(("given", "names"), [
    (Conditions(attributes=(*Conditions.of(3).attributes, AGE)), "label, age"),
    (Conditions(image=1), "image"),
    (Conditions(text=TEXT), "text"),
])  # fmt: skip
def test_a_model_with_other_conditions_than_classes_is_refused(
    form: ExportFormat, given: Conditions, names: str
):
    model = denoiser()
    network = UNet((1, 8, 8), given, **SMALL, class_conditional=bool(given.attributes))
    rich = replace(
        model, denoiser=Denoiser(network, model.denoiser.schedule, model.denoiser.parameterization)
    )
    line = (
        f"format={form.name}: the model is conditioned on {names}, and exports have class labels alone; copy"
    )
    with pytest.raises(UsageError, match=line):
        form.check(rich)
