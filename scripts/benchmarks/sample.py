"""Sampling of 16 images by DDIM with 50 steps to PNG files, by diffusers' pipeline and by diffuse."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.ours import PARAMETERS, count, model_of
from benchmarks.peers import ddim_pipeline
from benchmarks.race import Contestant, NetworkClock, Table, ceilings, flops, raced, timed
from diffusion_cli.commands.samples import image_path
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.generate import SamplingPipeline, generate
from diffusion_cli.images import Writer, save_stored
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.samplers import DDIM, Sampler

IMAGES, STEPS = 16, 50
WARM_UP_STEPS = 2


def write_samples(model: LoadedDenoiser, sampler: Sampler, steps: int, precision: str) -> None:
    """`diffuse sample` for 16 images: sampling and writing of PNG files."""
    pipeline = SamplingPipeline(
        model=model, sampler=sampler, steps=steps, guidance=NoGuidance(), condition=None, clip=True,
        precision=precision,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Writer(2 * IMAGES) as writer:
        for seeds, images, _, _ in generate(pipeline, range(IMAGES), IMAGES):
            for seed, image in zip(seeds, images.cpu(), strict=True):
                writer(save_stored, image, image_path(Path(folder), seed, model.info.form), model.info.form)


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """The DDPM network in fp32 and bf16, and the overhead over network calls."""
    model, pipeline = model_of("ddpm", device), ddim_pipeline("ddpm", device)
    assert count(model.denoiser) == count(pipeline.unet) == PARAMETERS["ddpm"]
    sampler = DDIM(model.denoiser.schedule, eta=0.0, spacing="trailing")
    x, t = torch.randn(IMAGES, 3, 32, 32, device=device), torch.full((IMAGES,), 500.0, device=device)
    with torch.inference_mode():
        nominal = STEPS * flops(lambda: pipeline.unet(x, t))

    def theirs(steps: int, precision: str) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            made = pipeline(batch_size=IMAGES, num_inference_steps=steps, output_type="pil").images
            for seed, image in enumerate(made):
                image.save(image_path(Path(folder), seed, model.info.form))

    def ours(steps: int, precision: str) -> None:
        write_samples(model, sampler, steps, precision)

    within: dict[str, list[float]] = {}

    def contestant(
        name: str, samples: Callable[[int, str], None], clock: NetworkClock, precision: str
    ) -> Contestant:
        samples(WARM_UP_STEPS, precision)
        within[name] = []

        def once() -> float:
            clock.seconds = 0.0
            seconds = timed(lambda: samples(STEPS, precision), device)()
            within[name].append(clock.seconds)
            return seconds

        return Contestant(name, once, IMAGES, nominal, precision)

    their_clock, our_clock = (NetworkClock(net, device) for net in (pipeline.unet, model.denoiser.network))
    contestants = [
        contestant("diffusers fp32", theirs, their_clock, "fp32"),
        contestant("diffusers bf16", theirs, their_clock, "bf16"),
        contestant("diffuse fp32", ours, our_clock, "fp32"),
        contestant("diffuse bf16", ours, our_clock, "bf16"),
    ]
    caption = (
        f"{IMAGES} images of 32x32 by the network of {PARAMETERS['ddpm'] / 1e6:.1f}M parameters, DDIM, {STEPS} steps, "
        "PNG files and all. GFLOP/s are of the operations that diffusers' network takes; ours takes fewer where it "
        "upsamples. The last column is the time over that within the network calls of the same round; its target for "
        "ours is below 1.02."
    )
    table = raced(caption, contestants, rounds, ceilings(device))
    measured = table.measured["contestants"]
    for name, seconds in within.items():
        measured[name]["seconds_within_network"] = seconds
    overheads = [
        median(a / b for a, b in zip(measured[name]["seconds"], seconds, strict=True))
        for name, seconds in within.items()
    ]
    yield table.with_column("over its network calls", [f"{overhead:.4f}" for overhead in overheads])
