"""Networks: F(x, c_noise, y), what a denoiser is built on, the classifiers that guide one, and autoencoders."""

from diffusion_cli.networks.autoencoder import AutoencoderKL
from diffusion_cli.networks.classifier import Classifier
from diffusion_cli.networks.encoder import Block
from diffusion_cli.networks.unet import UNet

__all__ = ["AutoencoderKL", "Block", "Classifier", "UNet"]
