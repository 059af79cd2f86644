"""The exponential moving average of the weights."""

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion_cli.denoiser import NoiseConditioned
from diffusion_cli.training.module import TrainingModule


class EMA(Callback):
    """Keep a frozen copy of the network that follows it, `w <- d w + (1 - d) w_network` after each step.

    With warm-up the decay at update n = 1, 2, ... is d = min(decay, (1 + n) / (10 + n)), as in the code of
    Song et al. 2021b, so that the first weights are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float, warm_up: bool) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay, self.warm_up = decay, warm_up
        self.updates = 0

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint holds it."""
        return "EMA"

    def decay_at(self, update: int) -> float:
        """The decay at update n = 1, 2, ..."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warm_up else self.decay

    def update(self, network: nn.Module) -> None:
        """Move the copy towards the network."""
        self.updates += 1
        average = get_ema_multi_avg_fn(self.decay_at(self.updates))
        average(list(self.network.parameters()), list(network.parameters()), self.updates)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def model(self, module: TrainingModule) -> NoiseConditioned:
        """What the module trains, with the averaged network."""
        return type(module.model)(self.network, module.model.schedule, module.model.parameterization)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module to its device."""
        self.network.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once an optimizer step, however many parts the batch has."""
        if trainer.global_step > self.updates:
            assert isinstance(pl_module, TrainingModule)
            self.update(pl_module.model.network)

    def state_dict(self) -> dict[str, Any]:
        """The average and how often it was updated."""
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self.network.load_state_dict(state_dict["network"])
        self.updates = state_dict["updates"]
