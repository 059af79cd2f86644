"""Moving averages (EMA) of the weights."""

import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion_cli.diffusion.power_averages import decay_at, exponent
from diffusion_cli.runs.checkpoint import EMA_KEY
from diffusion_cli.training.module import Trainable, TrainingModule


class DecayRule(Protocol):
    """The decay of an average by the number of the update."""

    def decay_at(self, update: int) -> float:
        """Return the decay at update n = 1, 2, ..."""
        ...


@dataclass(frozen=True)
class ExponentialAverage:
    """An average with a constant decay in [0, 1).

    With warm-up the decay at update n is `min(decay, (1 + n) / (10 + n))`, as in the code of Song et al. 2021b, so that
    the influence of the first weights fades quickly.
    """

    decay: float
    warm_up: bool

    def decay_at(self, update: int) -> float:
        """Return the decay at update n = 1, 2, ..."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warm_up else self.decay


@dataclass(frozen=True)
class PowerAverage:
    """An average with weights in proportion to a power of the update's number (Karras et al. 2024, Sec. 3.1).

    `length` is its standard deviation relative to the number of updates, above 0 and below 12^-1/2.
    """

    length: float

    def decay_at(self, update: int) -> float:
        """Return the decay at update n = 1, 2, ..."""
        return decay_at(update, self._exponent)

    @cached_property
    def _exponent(self) -> float:
        return exponent(self.length)


class EMA(Callback):
    """Updates a frozen copy of the network, `w <- d w + (1 - d) w_network`, after each optimizer step.

    Weights that training does not change are not averaged. The copy is on the network's device, or with `offload` on
    the CPU. It is sharded as the network is.

    Args:
        network: network to average.
        rule: decay d of each update.
        offload: whether the copy stays on the CPU.
        key: key of its state in checkpoints.
    """

    def __init__(
        self, network: nn.Module, rule: DecayRule, offload: bool = False, *, key: str = EMA_KEY
    ) -> None:
        # Weights that no checkpoint has, as those below adapters, never change: they need no copy.
        stored = network.state_dict().keys()
        shared = {id(weight): weight for name, weight in network.named_parameters() if name not in stored}
        self.network = copy.deepcopy(network, shared).requires_grad_(False).eval()
        self.rule, self.offload = rule, offload
        self._key = key
        self.updates = 0
        self._parts: dict[str, _Part] = {}
        """This process's shards of the average, in place of the weights of `network`; else empty."""

    @property
    def state_key(self) -> str:
        """Key of its state in checkpoints."""
        return self._key

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update the average with the current weights."""
        self.updates += 1
        averages = [part.mine for part in self._parts.values()] or list(self.network.parameters())
        trained = [weight.requires_grad for weight in network.parameters()]
        averages = [*compress(averages, trained)]
        weights = [_local(weight) for weight in network.parameters() if weight.requires_grad]
        if self.offload:
            weights = [weight.to("cpu") for weight in weights]
        get_ema_multi_avg_fn(self.rule.decay_at(self.updates))(averages, weights, self.updates)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def model(self, module: TrainingModule) -> Trainable:
        """Return the model with the complete EMA weights, on the module's device.

        If the weights are sharded, all processes must call this together.
        """
        network = self.network
        if self._parts:
            network = copy.deepcopy(network)
            whole = {name: part.whole() for name, part in self._parts.items()}
            network.load_state_dict(whole, strict=False, assign=True)
            network.requires_grad_(False)
        elif self.offload:
            network = copy.deepcopy(network).to(module.device)
        return module.model.with_network(network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the network's device, and shard it if the network is sharded."""
        assert isinstance(pl_module, TrainingModule)
        weights = dict(pl_module.model.network.named_parameters())
        if not self.offload:
            self.network.to(pl_module.device)
        for name, average in list(self.network.named_parameters()):
            weight = weights[name]
            if isinstance(weight, DTensor):
                part = distribute_tensor(average.to(weight.device), weight.device_mesh, weight.placements)
                self._parts[name] = _Part(part.to_local().to(average.device), weight)
                owner, _, key = name.rpartition(".")
                nothing = nn.Parameter(average.to("meta"), requires_grad=False)
                self.network.get_submodule(owner).register_parameter(key, nothing)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimizer step, not per part of an accumulated batch."""
        if trainer.global_step > self.updates:
            assert isinstance(pl_module, TrainingModule)
            self.update(pl_module.model.network)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates; if sharded, all processes must call this together."""
        whole = {name: part.whole().cpu() for name, part in self._parts.items()}
        return {"network": {**self.network.state_dict(), **whole}, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.network.load_state_dict(state_dict["network"])
        self.updates = state_dict["updates"]


class _Part(NamedTuple):
    """This process's shard of an average."""

    mine: Tensor
    weight: DTensor
    """The averaged weight, sharded in the same way."""

    def whole(self) -> Tensor:
        """Return the complete average from all processes, on the weight's device."""
        weight = self.weight
        return DTensor.from_local(
            self.mine.to(weight.device), weight.device_mesh, weight.placements,
            run_check=False, shape=weight.shape, stride=weight.stride(),
        ).full_tensor()  # fmt: skip


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
