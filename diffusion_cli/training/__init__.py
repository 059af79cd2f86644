"""Training with Lightning: modules, optimizers and callbacks."""

from diffusion_cli.training.device import Device
from diffusion_cli.training.logs import CSV, TensorBoard
from diffusion_cli.training.optimizers import Adam, AdamW
from diffusion_cli.training.trackers import MLflow, Trackio, WandB
from diffusion_cli.training.user_callbacks import EarlyStopping, LearningRateMonitor

__all__ = [
    "CSV",
    "Adam",
    "AdamW",
    "Device",
    "EarlyStopping",
    "LearningRateMonitor",
    "MLflow",
    "TensorBoard",
    "Trackio",
    "WandB",
]
