"""Pipelines of diffusers with small random networks, saved in folders."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from helpers.networks import randomised
from helpers.unets import unet

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
"""A class of networks with one level of attention."""


def scheduler(name: str, **settings: Any) -> Any:
    """A scheduler of diffusers."""
    return getattr(import_module("diffusers"), name)(**settings)


def ddim_pipeline(folder: Path, network: dict[str, Any] = UNET, **settings: Any) -> Any:
    """A DDIMPipeline that is saved in a folder."""
    pipeline = import_module("diffusers").DDIMPipeline(
        unet=unet(network), scheduler=scheduler("DDIMScheduler", **settings)
    )
    pipeline.save_pretrained(folder)
    return pipeline


def autoencoder() -> Any:
    """A small AutoencoderKL with two latent channels, which halves the sides of images."""
    network = import_module("diffusers").AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=2,
        norm_num_groups=4,
        scaling_factor=0.5,
        sample_size=16,
    )
    return randomised(network).eval().requires_grad_(False)


def ldm_pipeline(folder: Path) -> Any:
    """An LDMPipeline with a codebook that is saved in a folder."""
    diffusers = import_module("diffusers")
    codebook = diffusers.VQModel(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    pipeline = diffusers.LDMPipeline(
        vqvae=randomised(codebook).eval().requires_grad_(False),
        unet=unet(UNET),
        scheduler=scheduler(
            "DDIMScheduler", clip_sample=False, beta_schedule="scaled_linear", beta_end=0.0195
        ),
    )
    pipeline.save_pretrained(folder)
    return pipeline


def dit_pipeline(folder: Path) -> Any:
    """A DiTPipeline of three classes with an autoencoder that is saved in a folder."""
    diffusers = import_module("diffusers")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=3,
    )  # fmt: skip
    randomised(network).eval().requires_grad_(False)
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    pipeline = diffusers.DiTPipeline(
        transformer=network,
        vae=autoencoder(),
        scheduler=scheduler("DDIMScheduler", clip_sample=False),
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    # Published pipelines have it, although diffusers does not save it.
    index["id2label"] = {"0": "cat", "1": "dog", "2": "red fox"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipeline
