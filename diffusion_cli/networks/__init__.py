"""Networks: F(x, c_noise, y), what a denoiser is built on, and the classifiers that guide one."""

from diffusion_cli.networks.classifier import Classifier
from diffusion_cli.networks.encoder import Block
from diffusion_cli.networks.unet import UNet

__all__ = ["Block", "Classifier", "UNet"]
