"""The training of an autoencoder, with and without a discriminator."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import relu

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, build
from diffusion_cli.runs.load import load_autoencoder
from diffusion_cli.training.autoencoder_loss import (
    Autoencoding,
    ReconstructionLoss,
    divergence,
    gradient_distance,
)
from diffusion_cli.training.autoencoding import AutoencodingModule
from diffusion_cli.training.optimizers import Optimization
from helpers import assert_same, checkpoint_info
from helpers.autoencoders import PUBLISHED, RUN, small, train


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the published one, to be changed."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "vae"))


ADVERSARY = [
    "objective.discriminator_start=2", "objective.discriminator_channels=8", "objective.discriminator_layers=1",
]  # fmt: skip
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def rows(folder: Path) -> list[dict[str, str]]:
    """The log of a run."""
    with (folder / "tiny" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def objective(**changes) -> ReconstructionLoss:
    node = yaml.safe_load((CONF / "objective" / "autoencoder.yaml").read_text())
    return build(node | changes)


@pytest.fixture
def adversarial() -> tuple[ReconstructionLoss, Autoencoding, Tensor, Tensor]:
    """An objective with a discriminator, a model of it, and images with noise for their latents."""
    made = objective(discriminator_start=2, discriminator_channels=8, discriminator_layers=1)
    return made, made.model(small(), (1, 8, 12)), torch.randn(4, 1, 8, 12), torch.randn(4, 3, 4, 6)


def gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True)
    return list(found)


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_divergence_is_that_of_normal_distributions():
    moments = torch.randn(3, 4, 2, 2)
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = Normal(mean, torch.exp(log_variance / 2))
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergence(moments), expected)


def test_the_distance_of_gradients_is_blind_to_brightness_and_sees_each_edge():
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(gradient_distance(x + 0.5, x), torch.zeros(2), atol=1e-6)
    ramp = torch.arange(8.0).expand(
        1, 1, 8, 8
    )  # a slope of 1, 2 and 4 a pixel at the three scales, one axis of two
    torch.testing.assert_close(gradient_distance(ramp, 0 * ramp), torch.tensor([(1 + 2 + 4) / 6]))


def test_the_terms_sum_to_the_published_loss_over_pixels():
    made = objective(kl_weight=0.01, perceptual="gradient", perceptual_weight=2.0)
    network, x, eps = small(), torch.randn(2, 1, 8, 12), torch.randn(2, 3, 4, 6)
    images, moments = network(x, eps)
    terms = made(made.model(network, (1, 8, 12)), x, eps, 0).terms
    pixels = 8 * 12
    summed = (images - x).abs().flatten(1).sum(1) + 0.01 * divergence(moments)
    torch.testing.assert_close(pixels * (terms["loss"] - 2 * gradient_distance(images, x)), summed)


def test_in_one_step_each_of_the_two_gets_the_gradient_of_its_own_loss(adversarial):
    made, model, x, eps = adversarial
    losses = made(model, x, eps, 2)
    discriminator = model.discriminator
    images, moments = model.network(x, eps)
    own = made.terms(images, moments, x)["loss"].mean()
    verdict = -discriminator(images).mean()
    last = model.network.decoder.conv_out.weight
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (own, verdict)]
    weight = 0.5 * (norms[0] / (norms[1] + 1e-4)).detach()
    hinge = 0.5 * (relu(1 - discriminator(x)).mean() + relu(1 + discriminator(images.detach())).mean())
    assert_close(gradients(losses.total, model.network), gradients(own + weight * verdict, model.network))
    assert_close(gradients(losses.total, discriminator), gradients(hinge, discriminator))
    torch.testing.assert_close(losses.terms["discriminator"].mean(), hinge)


def test_the_weight_of_the_discriminator_is_at_most_the_published_one(adversarial):
    made, model, x, eps = adversarial
    with torch.no_grad():
        for parameter in model.discriminator.parameters():
            parameter.mul_(1e-3)
    terms = made(model, x, eps, 2).terms
    # 10^4 beside a sum over the pixels; this loss is a mean of them.
    assert terms["generator_weight"].tolist() == pytest.approx([1e4 / (8 * 12)] * 4)


def test_before_its_start_the_discriminator_changes_nothing_and_learns_nothing(adversarial):
    made, model, x, eps = adversarial
    losses, alone = made(model, x, eps, 1), objective()(Autoencoding(model.network, None), x, eps, 1)
    assert torch.equal(losses.total, alone.total)
    assert not any(gradient.any() for gradient in gradients(losses.total, model.discriminator))


def test_autoencoder_and_discriminator_are_clipped_apart(adversarial):
    made, model, _, _ = adversarial
    node = {"_target_": "diffusion_cli.training.Adam", "lr": 1.0}
    optimization = Optimization(node, {"_target_": "diffusion_cli.training.ConstantRate"}, 1.0)
    module = AutoencodingModule(model, made, optimization, 0, checkpoint_info())
    for part, norm in ((model.network, 0.5), (model.discriminator, 40.0)):
        weights = list(part.parameters())
        count = sum(weight.numel() for weight in weights)
        for weight in weights:
            weight.grad = torch.full_like(weight, norm / math.sqrt(count))
    module.configure_gradient_clipping(torch.optim.SGD(module.parameters(), 1.0))
    for part, norm in ((model.network, 0.5), (model.discriminator, 1.0)):
        found = torch.nn.utils.get_total_norm([weight.grad for weight in part.parameters()])
        assert found.item() == pytest.approx(norm, rel=1e-4)


def test_a_run_with_a_discriminator_taken_up_again_equals_one_without_a_stop(tmp_path):
    whole = train(tmp_path / "whole", *ADVERSARY, "max_steps=6")
    train(tmp_path / "parts", *ADVERSARY, "max_steps=4")
    parts = train(tmp_path / "parts", *ADVERSARY, "max_steps=6")
    assert any(name.startswith("model.discriminator.") for name in whole["state_dict"])
    assert not any("discriminator" in name for name in whole["callbacks"]["EMA"]["network"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])
    assert [row["generator_weight"] != "" for row in rows(tmp_path / "whole")] == [False, False, True, True]


def test_a_run_too_short_for_its_discriminator_says_so(tmp_path, capsys):
    train(tmp_path, *ADVERSARY, "max_steps=2")
    said = "diffuse: objective.discriminator_start=2: is not reached, because the run ends at step 2"
    assert said in capsys.readouterr().err
    train(tmp_path, *ADVERSARY, "max_steps=3")
    assert "is not reached" not in capsys.readouterr().err


# The discriminator's weight is measured on one part of an accumulated batch: without one, all parts agree.
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("extra", "words"),
    [pytest.param("trainer.devices=2", ADVERSARY, marks=pytest.mark.slow), ("accumulate_grad_batches=2", [])],
)
def test_neither_processes_nor_parts_change_what_is_learned(tmp_path, extra, words):
    alone = train(tmp_path / "one", *words, "max_steps=4")
    shared = train(tmp_path / "two", *words, "max_steps=4", extra)
    for name, weight in alone["state_dict"].items():
        torch.testing.assert_close(shared["state_dict"][name], weight, rtol=1e-3, atol=1e-4)
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_loss_falls_and_the_averaged_weights_are_those_that_load(tmp_path):
    checkpoint = train(tmp_path, "max_steps=60", "optimizer.lr=0.005")
    logged = rows(tmp_path)
    assert float(logged[-1]["loss"] or logged[-2]["loss"]) < 0.6 * float(logged[0]["loss"])
    assert any(row.get("val_loss") for row in logged)
    assert (tmp_path / "tiny" / "previews" / "step_00000050.png").is_file()
    loaded = load_autoencoder(tmp_path / "tiny", torch.device("cpu"))
    assert loaded.shape == (1, 8, 8)
    assert not loaded.network.training
    assert_same(dict(loaded.network.state_dict()), dict(checkpoint["callbacks"]["EMA"]["network"]))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["schedule=cosine"], "schedule: does not apply to task=autoencoder"),
        (["sampler=ddim", "time_sampling=uniform"], "time_sampling, sampler: does not apply"),
        (["objective=simple"], "objective=simple: is for task=diffusion; set task=diffusion"),
        (["model=unet_tiny"], "model=unet_tiny: is for task=diffusion; set task=diffusion"),
        (["model.channel_mult=[1,1,1,1,1]"], "image sizes must be multiples of 16, but images are 8x8"),
        (["progressive=[4,8]"], "progressive=[4, 8]: not supported for task=autoencoder"),
        (["eval_every=2"], "eval_every=2: an autoencoder makes no samples"),
        (["objective.discriminator_start=1"], "discriminator_layers=3: needs at least 24 pixels"),
        (
            ["objective.perceptual=lpips", "objective.lpips_weights=nowhere"],
            "objective.lpips_weights=nowhere: no such",
        ),
        (
            ["task=diffusion", "model=kl_tiny"],
            "model=kl_tiny: is for task=autoencoder",
        ),
        (["task=diffusion", "objective=autoencoder"], "objective=autoencoder: is for task=autoencoder"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(tmp_path, capsys, words, line):
    others = any(word.startswith(("model=", "task=")) for word in words)
    base = [word for word in RUN if not others or "model." not in word]
    assert run([*base, f"output_dir={tmp_path}", "max_steps=2", *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert "Traceback" not in said


def test_an_autoencoder_is_no_denoiser_to_sample_from(tmp_path, capsys):
    train(tmp_path, "max_steps=1")
    assert run(["sample", "run=tiny", f"output_dir={tmp_path}"]) == 2
    assert "was trained with task=autoencoder; give a run of task=diffusion" in capsys.readouterr().err
    assert run(["sample", f"output_dir={tmp_path}"]) == 2
    assert "contains no runs" in capsys.readouterr().err
