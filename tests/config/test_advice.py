"""Warnings about a training that goes wrong or does not fit the machine."""

import math

import numpy as np
import pytest
import torch
import yaml

from diffusion_cli.cli import run
from diffusion_cli.commands import train_checks
from diffusion_cli.config import CONF, at_hand, build
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.training import duration, loss_check, progress
from diffusion_cli.training.loss_check import LossCheck, ZeroNetwork
from diffusion_cli.training.module import DenoisingModule
from helpers.recipes import photos, train_config

# --- Warnings ------------------------------------------------------------


def check(**optimizer: float) -> LossCheck:
    model = {"channels": 64, "channel_mult": [1, 2, 2, 3]}
    return LossCheck({"optimizer": {"lr": 0.003, **optimizer}, "model": model, "batch_size": 64})


def test_a_stuck_loss_is_named_once_with_a_remedy():
    warnings = [check_.warning(1.0, step, 1.0) for check_ in [check()] for step in range(50, 500, 50)]
    assert [line is not None for line in warnings] == [False] * 3 + [True] + [False] * 5
    assert warnings[3] == (
        "loss 1.00 at step 200: no better than predicting zero (1.00); stop (Ctrl-C) and train again with "
        "optimizer.lr=0.00036 name=NEW"
    )
    line = check(lr=0.0003).warning(1.0, 200, 1.0)
    assert line is not None
    assert "with optimizer.lr=3e-05" in line


def test_a_rising_loss_is_named_once():
    losses = {50: 0.12, 75: 0.08, 100: 0.56, 125: 0.7}
    warnings = [check_.warning(loss, step, 1.0) for check_ in [check()] for step, loss in losses.items()]
    assert [line is not None for line in warnings] == [False, False, True, False]
    assert str(warnings[2]).startswith(
        "loss 0.56 at step 100: diverging, from 0.08 at step 75; stop (Ctrl-C) and train again with optimizer.lr="
    )


def test_a_loss_that_falls_with_noise_is_not_named():
    generator = np.random.default_rng(0)
    losses = 0.05 + np.exp(-np.arange(100) / 5) * generator.uniform(0.5, 1.5, 100)
    check_ = check()
    assert [check_.warning(loss, 10 * step, 1.0) for step, loss in enumerate(losses)] == [None] * 100


@pytest.mark.parametrize("name", ["eps", "x0", "v", "flow", "score"])
def test_the_loss_of_zero_is_the_mean_square_of_the_target(name):
    """Of eps it is 1, of x_0 the mean square of the images, of v between the two."""
    schedule = build(yaml.safe_load((CONF / "schedule" / "cosine.yaml").read_text()))
    parameterization = build(yaml.safe_load((CONF / "parameterization" / f"{name}.yaml").read_text()))
    objective = build(yaml.safe_load((CONF / "objective" / "target.yaml").read_text()))
    model = Denoiser(ZeroNetwork(False), schedule, parameterization)
    module = DenoisingModule(model, objective, Uniform(), Pixels((1, 16, 16)), None, seed=0, info=None)  # pyright: ignore
    images = torch.full((16, 1, 16, 16), 0.5)
    images[::2] = -0.25
    zero = module.loss_of_zero(Batch(0, images, None, torch.arange(16)))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = Uniform()(schedule, u).t
    c_skip, c_out, _, _ = parameterization(schedule, times)
    alpha, sigma = schedule(times)
    of_image, of_noise = (1 - alpha * c_skip) / c_out, sigma * c_skip / c_out
    square = images.double().square().mean()
    exact = (of_image**2 * square + of_noise**2).mean().item()
    assert zero == pytest.approx(exact, rel=0.05)


def test_objectives_of_low_noise_have_no_loss_of_zero():
    schedule = build(yaml.safe_load((CONF / "schedule" / "cosine.yaml").read_text()))
    eps = build(yaml.safe_load((CONF / "parameterization" / "eps.yaml").read_text()))
    objective = build(yaml.safe_load((CONF / "objective" / "likelihood.yaml").read_text()))
    model = Denoiser(ZeroNetwork(False), schedule, eps)
    module = DenoisingModule(model, objective, Uniform(), Pixels((1, 4, 4)), None, seed=0, info=None)  # pyright: ignore
    assert module.loss_of_zero(Batch(0, torch.zeros(2, 1, 4, 4), None, torch.arange(2))) is None


TINY = ["model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null"]


def test_training_names_a_stuck_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_check, "PATIENCE", 4)
    monkeypatch.setattr(loss_check, "USELESS", 0.8)  # four steps of sixteen images measure no more exactly
    words = [
        "train",
        *TINY,
        "max_steps=4",
        "log_every=2",
        "batch_size=16",
        "preview_every=100",
        "trainer=cpu",
    ]
    words += ["logger=csv", f"output_dir={tmp_path}", "precision=fp32"]
    assert run([*words, "optimizer.lr=1e-9", "name=stuck"]) == 0
    err = capsys.readouterr().err
    assert "diffuse: loss " in err
    assert "at step 4: no better than predicting zero (" in err
    assert "train again with optimizer.lr=0.0015 name=NEW" in err
    header, *rows = (tmp_path / "stuck" / "metrics.csv").read_text().splitlines()
    relative = [dict(zip(header.split(","), row.split(","), strict=True))["relative_loss"] for row in rows]
    assert [math.isclose(float(value), 1, abs_tol=0.2) for value in relative] == [True] * 3


def test_training_names_a_time_of_days(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(duration, "LONG", 0.0)
    monkeypatch.setattr(progress.Progress, "MEASURED", 0.0)
    words = ["train", *TINY, "max_steps=5", "batch_size=16", "preview_every=100", "trainer=cpu", "logger=csv"]
    assert run([*words, f"output_dir={tmp_path}", "precision=fp32"]) == 0
    assert capsys.readouterr().err.count("s per step without a GPU: 2 steps take about 0 hours; ") == 1


def test_the_time_of_a_training():
    config = {
        "schedule": {},
        "dataset": {"resolution": 64},
        "model": {"_target_": "x.UNet", "channels": 64, "channel_mult": [1, 3]},
    }
    assert duration.warning(config, 0.5, 20_000) is None
    assert duration.warning(config, 17.0, 100_000) == (
        "17.0 s per step without a GPU: 100,000 steps take about 20 days; stop (Ctrl-C) and train with "
        "model=unet_patch2 dataset.resolution=32 max_steps=20000 name=NEW"
    )
    small = {"schedule": {}, "dataset": {"resolution": 16}, "model": {"_target_": "x.UNet", "channels": 32}}
    assert duration.warning(small, 17.0, 5000) == (
        "17.0 s per step without a GPU: 5,000 steps take about 24 hours; add max_time=1h to stop after an hour"
    )
    points = {
        "schedule": {},
        "dataset": {"num_points": 9},
        "model": {"_target_": "x.SetTransformer", "hidden_size": 512},
    }
    assert "unet_patch2" not in str(duration.warning(points, 17.0, 100_000))


# --- What the machine has ------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, True),
        ("0", True),
        ("1,2", True),
        ("GPU-8932f937", True),
        ("", False),
        ("-1", False),
        ("NoDevFiles", False),
    ],
)
def test_a_gpu_that_is_hidden_is_none(visible, expected, monkeypatch):
    monkeypatch.setattr(at_hand.os.path, "exists", lambda path: path == "/dev/dxg")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert at_hand.gpu("auto") == expected
    assert (at_hand.gpu("cuda"), at_hand.gpu("cpu")) == (True, False)


def test_a_value_for_a_group_is_a_mistake(capsys):
    assert run(["train", "ema=0.99"]) == 2
    assert (
        "ema=0.99: not a single value; set ema.profile or ema.decay or ema.warm_up" in capsys.readouterr().err
    )


def test_a_recipe_for_another_machine_than_torch_finds_is_named(tmp_path, monkeypatch):
    own = train_config("dataset=folder", f"dataset.path={photos(tmp_path / 'p', (20, 20))}")
    for assumed, there, line in [
        (True, False, "trainer=cpu"),
        (False, True, "trainer=gpu"),
        (True, True, None),
    ]:
        monkeypatch.setattr(train_checks, "gpu", lambda accelerator, assumed=assumed: assumed)
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        remark = train_checks.remark_on_machine(own)
        assert remark is None if line is None else line in str(remark)
        assert (
            train_checks.remark_on_machine(train_config()) is None
        )  # the recipe of digits is the same everywhere
