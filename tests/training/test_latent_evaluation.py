"""`diffuse eval` of latent diffusion models."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.data import Digits
from diffusion_cli.runs.load import load_model
from helpers.latents import FEATURES, call, refused

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def measured(latent_runs: Path, *words: str) -> dict[str, float]:
    """The first number of an evaluation of `a`, with its details."""
    assert call(latent_runs, "eval", f"cache_dir={latent_runs}/cache", *words) == 0
    result = json.loads((latent_runs / "o" / "a" / "metrics.json").read_text())[-1]["results"][0]
    return {"value": result["value"], **result["details"]}


def test_the_latents_of_validation_images_have_mean_0_and_standard_deviation_1(latent_runs):
    found = measured(latent_runs, "metric=latents", "batch_size=100")
    values = [abs(found[f"mean_{i}"]) for i in range(3)] + [abs(found[f"std_{i}"] - 1) for i in range(3)]
    assert found["value"] == max(values)
    assert found["value"] < 0.1
    assert found["images"] == 359
    assert measured(latent_runs, "metric=latents", "metric.latents.split=train")["value"] < 1e-3


def test_inversion_has_no_smaller_error_than_the_autoencoder(latent_runs):
    model = load_model(latent_runs / "o" / "a", "ema", torch.device("cpu"))
    x = Digits("", val_fraction=0.2, flip=False).load("val")[torch.arange(50)].float() / 127.5 - 1
    alone = 127.5 * (model.space.decode(model.space.encode(x)) - x).square().flatten(1).mean(1).mean().sqrt()
    words = ["metric=inversion", "metric.inversion.num_images=50", "metric.inversion.steps=100"]
    found = measured(latent_runs, *words, "metric.inversion.strength=0.01")
    assert found["value"] == pytest.approx(float(alone), rel=0.02)  # next to no way to go


def test_samples_of_latents_are_measured_and_compared(latent_runs, tmp_path):
    words = [*FEATURES, "metric=fid", "num_samples=80", f"cache_dir={latent_runs}/cache"]
    assert call(latent_runs, "compare", *words, "steps=[1,2]", f"output={tmp_path}/compared") == 0
    assert (tmp_path / "compared" / "plot.png").is_file()
    assert call(latent_runs, "report", f"output={tmp_path}/report.html") == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["metric=bits_per_dim"],
            "metric=bound: needs a pixel-space model",
        ),
        (["metric=flow_likelihood"], "metric=flow_likelihood: needs a pixel-space model"),
        (
            ["run=pixels", "metric=latents"],
            "metric=latents: applies to latent models, but the model works in pixels",
        ),
    ],
)
def test_numbers_that_a_space_does_not_have_are_refused_in_a_line(latent_runs, capsys, words, line):
    words = words if words[0].startswith("run=") else ["run=a", *words]
    assert run(["eval", f"output_dir={latent_runs}/o", f"cache_dir={latent_runs}/cache", *words]) == 2
    refused(capsys, line)
