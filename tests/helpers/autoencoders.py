"""Small autoencoders and their training."""

from pathlib import Path

import torch

from diffusion_cli.cli import run
from diffusion_cli.networks import AutoencoderKL
from diffusion_cli.runs.checkpoint import LAST, read

# A random network of diffusers 0.42.1, as `save_pretrained` wrote it, and what it makes of random images and latents:
#   AutoencoderKL(in_channels=2, out_channels=2, down_block_types=["DownEncoderBlock2D"] * 2,
#       up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 16], layers_per_block=1, latent_channels=3,
#       norm_num_groups=4), after torch.manual_seed(0); mean and logvar of encode(x).latent_dist; decode(z).sample
PUBLISHED = Path(__file__).parents[1] / "reference" / "autoencoder_kl"
SMALL = {
    "channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 3,
    "norm_groups": 4,
    "quant_conv": True,
    "gradient_checkpointing": False,
}


def small(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL((1, 8, 12), None, **SMALL | changes)


RUN = [
    "train", "task=autoencoder", "dataset=digits", "name=tiny", "model.channels=8", "model.channel_mult=[1,2]",
    "model.norm_groups=4", "batch_size=16", "lr_schedule=constant", "lr_schedule.warm_up_steps=3",
    "precision=fp32", "trainer=cpu", "logger=csv", "log_every=2", "checkpoint_every=50", "preview_every=50",
    "validate_every=50",
]  # fmt: skip


def train(folder: Path, *words: str) -> dict:
    """The checkpoint of a run that is trained."""
    assert run([*RUN, f"output_dir={folder}", *words]) == 0
    return read(folder / "tiny" / LAST).state
