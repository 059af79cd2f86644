"""The frozen teacher of an objective that distils."""

import copy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.objectives import FewStep
from diffusion_cli.errors import UsageError
from diffusion_cli.samplers import UniPC, integrate
from diffusion_cli.training.ema import EMA


def few_step_callbacks(objective: FewStep, model: Denoiser, ema: EMA, *, sharded: bool) -> list["Teacher"]:
    """Give an objective the networks and the solver of its targets, and return the callbacks that keep them.

    Args:
        objective: objective with predictions as targets.
        model: denoiser in training.
        ema: its averaged weights.
        sharded: whether processes share the weights.

    Raises:
        UsageError: the targets need whole weights on the device of training, which the strategy does not keep.
    """
    if sharded and (objective.has_teacher or objective.uses_average):
        problem = "the targets of this objective need whole weights in each process"
        raise UsageError("trainer.strategy", "fsdp", problem, "use trainer.strategy=ddp")
    if objective.uses_average and ema.offload:
        problem = "objective.target=ema needs the averaged weights on the device of training"
        raise UsageError("trainer.offload_ema", True, problem, "set trainer.offload_ema=false")
    if objective.uses_average:
        objective.average = model.with_network(ema.network)
    return with_teacher(objective, model)


def with_teacher(objective: FewStep, model: Denoiser) -> list["Teacher"]:
    """Give an objective its solver and a teacher with the weights of a model; return the teacher if it has one."""
    sampler = UniPC(model.schedule)
    objective.solver = lambda denoise, x, times: integrate(sampler, denoise, x, times, _no_noise)
    return [Teacher(objective, model)] if objective.has_teacher else []


def _no_noise() -> Tensor:
    raise AssertionError("the solver of the teacher's paths is deterministic")


class Teacher(Callback):
    """Gives an objective its teacher: a frozen copy of the network at the start, or at the last stage.

    Checkpoints have its weights, so that a resumed run has the same targets.
    """

    def __init__(self, objective: FewStep, model: Denoiser) -> None:
        self.objective, self.model = objective, model
        self.network = copy.deepcopy(model.network).requires_grad_(False).eval()
        objective.teacher = model.with_network(self.network)

    @property
    def state_key(self) -> str:
        """Key of its state in checkpoints."""
        return "Teacher"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the teacher to the network's device."""
        self.network.to(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the weights of the network where a stage begins."""
        if self.objective.renews_teacher(trainer.global_step):
            self.network.load_state_dict(self.model.network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the teacher."""
        return {"network": self.network.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the weights of a checkpoint."""
        self.network.load_state_dict(state_dict["network"])
