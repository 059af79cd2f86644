"""Where training runs."""

from typing import Literal

import torch
from pydantic import PositiveInt

from diffusion_cli.precision import device_of


class Device:
    """One device of this machine."""

    def __init__(self, *, accelerator: Literal["auto", "cpu", "cuda"], threads: PositiveInt | None) -> None:
        try:
            self.torch_device: torch.device = device_of(accelerator)
        except ValueError as error:
            raise ValueError(
                f"trainer={accelerator}: torch sees no GPU here; take trainer=cpu or auto"
            ) from error
        if threads is not None:
            torch.set_num_threads(threads)

    @property
    def trainer_arguments(self) -> dict[str, object]:
        """What Lightning's Trainer is told."""
        return {"accelerator": self.torch_device.type, "devices": 1}
