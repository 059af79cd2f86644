"""Training on Lightning: the module, its optimizers, and what watches over a run."""

from diffusion_cli.training.device import Device
from diffusion_cli.training.logs import CSV, TensorBoard
from diffusion_cli.training.optimizers import Adam, AdamW

__all__ = ["CSV", "Adam", "AdamW", "Device", "TensorBoard"]
