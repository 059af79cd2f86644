from diffusion_cli.networks.unet import UNet

__all__ = ["UNet"]
