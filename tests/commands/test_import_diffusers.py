"""Imported pipelines of diffusers make the same images as there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_cli.cli import run
from diffusion_cli.generate import SeededNoise
from diffusion_cli.runs.load import load_model
from helpers.pipelines import UNET, ddim_pipeline, dit_pipeline, ldm_pipeline, scheduler
from helpers.unets import CONDITIONAL, DDPM, IMPROVED, LSUN, NCSNPP_NARROW, unet

diffusers: Any = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
STEPS = 20


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sampled(*words: str) -> Tensor:
    """The images of seeds 0 and 1 that `diffuse sample` writes, uint8 [2, H, W, C]."""
    common = ["num_samples=2", f"steps={STEPS}", "precision=fp32", "device=cpu", "output=samples"]
    assert run(["sample", "run=x", *common, *words]) == 0
    images = (np.asarray(Image.open(f"samples/{seed:06d}.png")) for seed in range(2))
    return torch.from_numpy(np.stack([*images]))


def looped(network: Any, steps: Any, shape: tuple[int, ...], **step: Any) -> Tensor:
    """The states that a scheduler of diffusers makes of our noise of seeds 0 and 1."""
    steps.set_timesteps(STEPS)
    scaled = getattr(steps, "scale_model_input", lambda x, _: x)  # those of flows have none
    x = SeededNoise([0, 1], shape, CPU).noise() * getattr(steps, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in steps.timesteps:
            output = network(scaled(x, t), t)
            x = steps.step(output, t, x, return_dict=False, **step)[0]
    return x


def to_bytes(images: Tensor) -> Tensor:
    """8-bit images as diffusers makes them, [B, H, W, C]."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def one_gray_level(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.float().std() > 10
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_images_of_a_pipeline_are_at_most_one_gray_level_apart(prediction):
    pipeline = ddim_pipeline(Path("x"), clip_sample=False, prediction_type=prediction)
    assert run(["import", "source=x"]) == 0
    ours = sampled("sampler=ddim", "sampler.spacing=leading", "clip_x0=false")
    theirs = looped(lambda x, t: pipeline.unet(x, t).sample, pipeline.scheduler, (3, 8, 8))
    one_gray_level(ours, to_bytes(theirs))


@pytest.mark.parametrize(
    ("network", "shape", "words"),
    [
        (DDPM, (3, 32, 32), []),
        (LSUN | {"sample_size": 64}, (3, 64, 64), []),
        (IMPROVED | {"out_channels": 3}, (3, 16, 16), []),
        (IMPROVED, (3, 16, 16), []),
        (CONDITIONAL, (1, 8, 16), ["label=3"]),
        (NCSNPP_NARROW, (3, 8, 8), []),
    ],
    ids=["ddpm", "lsun", "scale_shift", "learned_variance", "classes", "ncsnpp"],
)
def test_ddim_images_of_published_networks_are_at_most_one_gray_level_apart(network, shape, words):
    pipeline = ddim_pipeline(Path("x"), network, clip_sample=False)
    assert run(["import", "source=x"]) == 0
    ours = sampled("sampler=ddim", "sampler.spacing=leading", "clip_x0=false", *words)
    labels = torch.tensor([3, 3]) if words else None

    def noise_of(x: Tensor, t: Tensor) -> Tensor:
        return pipeline.unet(x, t, labels).sample[:, : shape[0]]  # before the outputs of the variance

    theirs = to_bytes(looped(noise_of, pipeline.scheduler, shape))
    one_gray_level(ours.view(theirs.shape), theirs)


@pytest.mark.parametrize(("clip", "both"), [("true", True), ("keep_eps", False)])
def test_clipped_images_are_those_of_the_scheduler(clip, both, capsys):
    pipeline = ddim_pipeline(Path("x"), beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    assert run(["import", "source=x"]) == 0
    assert "sampler=ddim clip_x0=keep_eps" in capsys.readouterr().out
    ours = sampled("sampler=ddim", "sampler.spacing=trailing", f"clip_x0={clip}")
    network = pipeline.unet
    theirs = looped(
        lambda x, t: network(x, t).sample, pipeline.scheduler, (3, 8, 8), use_clipped_model_output=both
    )
    one_gray_level(ours, to_bytes(theirs))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}, ["sampler=dpmpp_2m", "sampler.spacing=linspace"]),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, ["sampler=ddim", "sampler.spacing=trailing"]),
        ("UniPCMultistepScheduler", {}, ["sampler=unipc", "sampler.spacing=linspace"]),
        ("FlowMatchEulerDiscreteScheduler", {}, ["sampler=ddim", "sampler.spacing=linspace"]),
    ],
)  # fmt: skip
def test_images_of_other_schedulers_are_at_most_one_gray_level_apart(name, settings, words):
    pipeline = ddim_pipeline(Path("x"))
    pipeline.scheduler = scheduler(name, **settings)
    pipeline.scheduler.save_pretrained("x/scheduler")
    assert run(["import", "source=x"]) == 0
    ours = sampled(*words, "clip_x0=false")
    theirs = looped(
        lambda x, t: pipeline.unet(x, t[None].expand(len(x))).sample, pipeline.scheduler, (3, 8, 8)
    )
    one_gray_level(ours, to_bytes(theirs))


def test_images_of_a_latent_pipeline_with_guidance_are_at_most_one_gray_level_apart(capsys):
    pipeline = dit_pipeline(Path("x"))
    assert run(["import", "source=x"]) == 0
    assert "sampler=ddim sampler.spacing=leading clip_x0=false" in capsys.readouterr().out
    assert load_model(Path("outputs/x"), "ema", CPU).info.class_names == ("cat", "dog", "red fox")
    network = pipeline.transformer

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with_label, without = (
            network(x, t.expand(2), torch.full((2,), label)).sample[:, :2] for label in (2, 3)
        )
        return without + 3 * (with_label - without)

    latents = looped(guided, pipeline.scheduler, (2, 8, 8)) / pipeline.vae.config.scaling_factor
    theirs = to_bytes(pipeline.vae.decode(latents).sample)
    words = ["sampler=ddim", "sampler.spacing=leading", "guidance=cfg", "guidance.scale=3", "label=red fox"]
    one_gray_level(sampled(*words), theirs)


def test_images_of_a_pipeline_with_a_codebook_are_at_most_one_gray_level_apart():
    pipeline = ldm_pipeline(Path("x"))
    assert run(["import", "source=x"]) == 0
    latents = looped(lambda x, t: pipeline.unet(x, t).sample, pipeline.scheduler, (3, 8, 8))
    theirs = to_bytes(pipeline.vqvae.decode(latents / pipeline.vqvae.config.scaling_factor).sample)
    one_gray_level(sampled("sampler=ddim", "sampler.spacing=leading"), theirs)


def test_a_training_starts_from_an_imported_model():
    ddim_pipeline(Path("x"), UNET | {"in_channels": 1, "out_channels": 1}, beta_schedule="squaredcos_cap_v2")
    assert run(["import", "source=x"]) == 0
    small = [
        "max_steps=1",
        "batch_size=4",
        "preview_every=null",
        "logger=csv",
        "trainer=cpu",
        "dataset=digits",
    ]
    assert run(["train", "init.run=x", "name=y", *small]) == 0
    trained = load_model(Path("outputs/y"), "ema", CPU)
    assert trained.info.init is not None
    assert trained.info.init.taken == trained.info.init.total
    assert (
        trained.info.config.parameterization
        == load_model(Path("outputs/x"), "ema", CPU).info.config.parameterization
    )


def test_a_variance_exploding_pipeline_has_its_score_in_our_range():
    fields: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False,
        "time_embedding_type": "fourier", "center_input_sample": True,
    }  # fmt: skip
    network = unet(fields)
    folder = Path("x")
    network.save_pretrained(folder / "unet")
    scheduler("ScoreSdeVeScheduler", sigma_max=5.0).save_pretrained(folder / "scheduler")
    index = '{"_class_name": "ScoreSdeVePipeline", "unet": ["diffusers", "UNet2DModel"], '
    (folder / "model_index.json").write_text(index + '"scheduler": ["diffusers", "ScoreSdeVeScheduler"]}')
    assert run(["import", "source=x"]) == 0
    denoiser = load_model(Path("outputs/x"), "ema", CPU).denoiser
    assert denoiser.schedule(torch.ones(()))[1].item() == pytest.approx(10.0)
    x = torch.rand(2, 3, 8, 8)
    sigma = torch.tensor(0.7)
    theirs = network(x, sigma.expand(2)).sample  # the score of pixels in [0, 1]
    t = denoiser.schedule.time_of(-2 * (2 * sigma.double()).log())
    ours = denoiser(2 * x - 1, t).score
    torch.testing.assert_close(ours, theirs / 2, rtol=1e-4, atol=1e-5)
