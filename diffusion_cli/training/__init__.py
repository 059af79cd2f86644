"""Training with Lightning: modules, optimizers and callbacks."""

from diffusion_cli.training.device import Device
from diffusion_cli.training.logs import CSV, TensorBoard
from diffusion_cli.training.optimizers import Adam, AdamW
from diffusion_cli.training.trackers import MLflow, Trackio, WandB

__all__ = ["CSV", "Adam", "AdamW", "Device", "MLflow", "TensorBoard", "Trackio", "WandB"]
