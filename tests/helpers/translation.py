"""A model that copies its condition image, and images with condition images."""

import torch
from torch import nn

from diffusion_cli.conditions import Conditions, ImageCondition
from diffusion_cli.data import Dataset
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.parameterizations import X0
from diffusion_cli.runs.load import LoadedDenoiser
from helpers import checkpoint_info

SHAPE = (1, 8, 8)


class Copy(nn.Module):
    """Predicts the first channel of the condition image, and black without one."""

    takes_conditions = True

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.conditions, self.num_classes = conditions, conditions.num_classes
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, y=None):
        given = None if y is None else y.get("image")
        return self.zero - torch.ones_like(x) if given is None else self.zero + given[:, :1].nan_to_num(-1)


def model_of(schedule, shape=SHAPE, label_dropout=0.1, **condition):
    """A model of copied condition images; without `condition` keys, of an unconditional model."""
    image = ImageCondition(**condition)
    conditions = Conditions(image=image.channels(shape, None if image.of else 1))
    node = {"_target_": "diffusion_cli.conditions.ImageCondition", **condition}
    info = checkpoint_info(
        shape,
        conditions=conditions.model_dump(),
        objective={"label_dropout": label_dropout},
        condition=node,
        dataset={"_target_": "diffusion_cli.data.Digits", "label": None, "val_fraction": 0.2, "flip": False},
    )
    return LoadedDenoiser(
        info, 20, "0" * 64, Denoiser(Copy(conditions), schedule, X0()).eval(), Pixels(shape)
    )


class Shades(Dataset):
    """Images of one shade each, of which the condition images are derived."""

    name, shape, class_names, flip = "shades", SHAPE, None, False

    def load(self, split):
        shades = torch.arange(10, dtype=torch.uint8) * (20 if split == "val" else 10)
        return MemoryImages(shades.view(-1, 1, 1, 1).expand(-1, *SHAPE).clone(), None)
