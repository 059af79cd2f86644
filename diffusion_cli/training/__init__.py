"""Training with Lightning: modules, optimizers and callbacks."""

from diffusion_cli.training.device import Device
from diffusion_cli.training.logs import CSV, TensorBoard
from diffusion_cli.training.lr_schedules import (
    ConstantRate,
    CosineDecay,
    InverseSqrtDecay,
    LinearDecay,
    LRSchedule,
    WarmUpStableDecay,
)
from diffusion_cli.training.optimizers import Adam, AdamW, Lion, Muon
from diffusion_cli.training.trackers import MLflow, Trackio, WandB
from diffusion_cli.training.user_callbacks import EarlyStopping

__all__ = [
    "CSV",
    "Adam",
    "AdamW",
    "ConstantRate",
    "CosineDecay",
    "Device",
    "EarlyStopping",
    "InverseSqrtDecay",
    "LRSchedule",
    "LinearDecay",
    "Lion",
    "MLflow",
    "Muon",
    "TensorBoard",
    "Trackio",
    "WandB",
    "WarmUpStableDecay",
]
