"""Networks: denoising networks F(x, c_noise, y), classifiers of noisy images, and autoencoders."""

from diffusion_cli.networks.autoencoder import AutoencoderKL, ImageAutoencoder, Level, Middle, VQModel
from diffusion_cli.networks.classifier import Classifier
from diffusion_cli.networks.discriminator import PatchDiscriminator
from diffusion_cli.networks.dit import DiT
from diffusion_cli.networks.edm2 import EDM2UNet
from diffusion_cli.networks.encoder import Block
from diffusion_cli.networks.magnitude import MPBlock
from diffusion_cli.networks.set_transformer import SetTransformer
from diffusion_cli.networks.transformer import TransformerBlock
from diffusion_cli.networks.unet import UNet

BLOCKS = (Block, MPBlock, TransformerBlock, Level, Middle)
"""Modules that contain most of a network's weights, the units of sharding and checkpointing."""

__all__ = [
    "BLOCKS",
    "AutoencoderKL",
    "Classifier",
    "DiT",
    "EDM2UNet",
    "ImageAutoencoder",
    "PatchDiscriminator",
    "SetTransformer",
    "UNet",
    "VQModel",
]
