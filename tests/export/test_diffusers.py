"""Folders of diffusers: they load there, and make the images that are sampled here."""

import json
from typing import Any

import pytest
import torch

from diffusion_cli.errors import UsageError
from diffusion_cli.export import Diffusers
from diffusion_cli.runs.schema import OriginInfo, StageInfo
from helpers.exports import DIT, KL, UNET, VQ, autoencoder, denoiser, option, sampled

diffusers: Any = pytest.importorskip("diffusers")

GRAY = 2 / 255
"""One gray level, of images in [-1, 1]."""


def written(model, folder, scheduler=None):
    """The names of the files of an export."""
    form = Diffusers(scheduler=scheduler)
    form.check(model)
    folder.mkdir()
    form.write(model, folder)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def images_of(pipeline, **settings) -> torch.Tensor:
    """The images [B, C, H, W] in [-1, 1] of a pipeline, for the noise of seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=5, output_type="np", **settings).images
    return torch.from_numpy(images).movedim(3, 1) * 2 - 1


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 3 * GRAY
    torch.testing.assert_close(ours, theirs, rtol=0, atol=GRAY)


@pytest.mark.parametrize(
    ("schedule", "parameterization"),
    [("linear", "eps"), ("cosine", "v"), ("sigmoid", "x0")],
)
def test_a_ddim_pipeline_makes_our_images(tmp_path, schedule, parameterization):
    model = denoiser(schedule=option("schedule", schedule), parameterization=parameterization)
    assert written(model, tmp_path / "out") == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")
    theirs = images_of(
        pipeline, batch_size=2, generator=torch.Generator().manual_seed(0), use_clipped_model_output=True
    )
    close(sampled(model, noise(2, 1, 8, 8)), theirs)


def test_the_continuous_schedule_has_its_noise_at_each_timestep(tmp_path):
    model = denoiser(schedule=option("schedule", "vp"))
    written(model, tmp_path / "out")
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler").alphas_cumprod
    timesteps = torch.arange(1000)
    t = timesteps.double() / 999
    torch.testing.assert_close(model.denoiser.schedule.timestep(t), timesteps.double())
    ours = model.denoiser.schedule(t)[0].square()
    torch.testing.assert_close(theirs.double(), ours, rtol=2e-4, atol=1e-5)


def test_a_flow_has_its_scheduler(tmp_path):
    model = denoiser(schedule=option("schedule", "rectified"), parameterization="flow")
    written(model, tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    theirs = images_of(pipeline, batch_size=2, generator=torch.Generator().manual_seed(0))
    ours = sampled(model, noise(2, 1, 8, 8), spacing="linspace", clip=False)
    close(ours, theirs)


def test_the_latents_of_a_unet_are_those_of_its_autoencoder(tmp_path):
    model = denoiser(latent=KL)
    assert "vqvae/config.json" in written(model, tmp_path / "out")
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    theirs = images_of(pipeline, batch_size=2, generator=torch.Generator().manual_seed(0))
    close(sampled(model, noise(2, 2, 4, 4)), theirs)


def test_latents_of_a_codebook_have_one_factor(tmp_path):
    model = denoiser(latent=VQ, mean=[0.0, 0.0], std=[0.5, 0.5])
    written(model, tmp_path / "out")
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.vqvae).__name__ == "VQModel"
    theirs = images_of(pipeline, batch_size=2, generator=torch.Generator().manual_seed(0))
    close(sampled(model, noise(2, 2, 4, 4)), theirs)
    with pytest.raises(UsageError, match="one factor for all latents"):
        Diffusers().check(denoiser(latent=VQ))


def test_an_unfinished_progressive_resolution_is_refused():
    stages = [
        StageInfo(first=0, shape=(1, 4, 4), batch_size=1),
        StageInfo(first=9, shape=(1, 8, 8), batch_size=1),
    ]
    with pytest.raises(UsageError, match="its progressive resolution has reached 1x4x4 of 1x8x8"):
        Diffusers().check(denoiser(stages=stages))


def test_a_dit_pipeline_makes_images_of_its_classes(tmp_path):
    model = denoiser(DIT, classes=3, latent=KL)
    assert {"transformer/config.json", "vae/config.json"} < written(model, tmp_path / "out")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.labels == {"class 0": 0, "class 1": 1, "class 2": 2}
    theirs = images_of(
        pipeline, class_labels=[0, 2], guidance_scale=1.0, generator=torch.Generator().manual_seed(0)
    )
    close(sampled(model, noise(2, 2, 4, 4), labels=torch.tensor([0, 2])), theirs)


UNNAMED = OriginInfo(kind="test", source="test", sha256={}, numbered_classes=True)
WITHOUT_PIPELINE = {
    "classes": lambda: denoiser(classes=3),
    "unnamed classes": lambda: denoiser(classes=3, origin=UNNAMED),
    "pixels of DiT": lambda: denoiser(DIT),
    "learned variance of DiT": lambda: denoiser(DIT | {"learn_variance": True}),
    "rectangle": lambda: denoiser(shape=(1, 8, 16), latent=KL),
}


@pytest.mark.parametrize("kind", WITHOUT_PIPELINE)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_the_example_of_a_model_without_a_pipeline_samples(tmp_path, monkeypatch, kind, scheduler):
    model = WITHOUT_PIPELINE[kind]()
    assert "model_index.json" not in written(model, tmp_path / "out", scheduler)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(Diffusers(scheduler=scheduler).example(model, "out").replace("(50)", "(5)"), found)
    assert found["images"].shape == (4, *model.shape)
    if scheduler == "ddim":
        labels = None if model.num_classes is None else torch.arange(4) % model.num_classes
        close(sampled(model, noise(4, *model.space.shape), labels=labels), found["images"])


def test_only_stated_names_of_classes_are_written(tmp_path):
    for name, changes in {"named": {}, "unnamed": {"origin": UNNAMED}}.items():
        written(denoiser(DIT, classes=3, latent=KL, **changes), tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert ("id2label" in index) == (name == "named")


def test_an_autoencoder_is_a_model_alone(tmp_path):
    model = autoencoder()
    assert written(model, tmp_path / "out") == {"config.json", "diffusion_pytorch_model.safetensors"}
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    images = noise(2, 1, 8, 8)
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.mean
        ours = model.network.moments(images).chunk(2, dim=1)[0]
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)
    assert "AutoencoderKL.from_pretrained" in Diffusers().example(model, "out")


def test_a_learned_variance_needs_ddpm(tmp_path):
    model = denoiser(UNET | {"learn_variance": True})
    written(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["_class_name"], config["variance_type"]) == ("DDPMScheduler", "learned_range")
    with pytest.raises(
        UsageError, match=r"format=diffusers: .*format\.scheduler=ddim has no learned variance"
    ):
        Diffusers(scheduler="ddim").check(model)


SET = option("model", "set_tiny")
REFUSED = [
    (lambda: denoiser(SET, (3, 16)), "SetTransformer is neither a UNet nor a DiT"),
    (lambda: denoiser(UNET | {"patch_size": 2}), "patch_size=2"),
    (lambda: denoiser(UNET, (1, 8, 8, 8)), "needs images"),
    (lambda: denoiser(DIT | {"embedding_layout": "cos_sin"}), "embedding_layout=cos_sin"),
    (lambda: denoiser(schedule=option("schedule", "edm"), parameterization="edm"), "EDMPreconditioning"),
    (lambda: denoiser(schedule=option("schedule", "subvp")), "schedule SubVP has no equivalent"),
    (lambda: denoiser(schedule=option("schedule", "ve")), "centered=false only"),
    (
        lambda: denoiser(schedule=option("schedule", "rectified"), parameterization="v"),
        "needs parameterization=flow",
    ),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_diffusers_cannot_express_is_refused(model, reason):
    with pytest.raises(UsageError, match=reason) as refused:
        Diffusers().check(model())
    (line,) = refused.value.lines
    assert line.startswith("format=diffusers: cannot express this model: ")
    assert line.endswith("; choose format=safetensors, which takes any model")


def test_an_autoencoder_has_no_scheduler():
    with pytest.raises(UsageError, match="an autoencoder has no scheduler"):
        Diffusers(scheduler="ddim").check(autoencoder())
