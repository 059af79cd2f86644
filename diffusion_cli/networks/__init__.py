"""Networks: F(x, c_noise, y), what a denoiser is built on."""

from diffusion_cli.networks.unet import UNet

__all__ = ["UNet"]
