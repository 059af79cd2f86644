"""What many tests share."""

from typing import Any

from diffusion_cli.formats import Uint8Image
from diffusion_cli.runs.schema import CheckpointInfo


def checkpoint_info(shape: tuple[int, ...] = (1, 8, 8), **changes: Any) -> CheckpointInfo:
    """What a checkpoint says of a small run on 8-bit images, with other values of some entries or config keys."""
    config = {
        "max_steps": 1, "ema": {}, "dataset": {"_target_": "diffusion_cli.data.Digits"}, "schedule": {},
        "objective": {"label_dropout": 0.1}, "parameterization": {}, "model": {},
        "latent": {"run": None, "pretrained": None},
    }  # fmt: skip
    config |= {key: changes.pop(key) for key in config.keys() & changes.keys()}
    names = changes.get("class_names")
    entries = {
        "task": "diffusion", "num_images": 1, "shape": shape, "form": Uint8Image(),
        "num_classes": None if names is None else len(names),
    }  # fmt: skip
    return CheckpointInfo.model_validate(entries | {"config": config} | changes)
