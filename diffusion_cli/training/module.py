"""The LightningModule: one training step, and the randomness of it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from diffusion_cli.data import Batch
from diffusion_cli.denoiser import NoiseConditioned
from diffusion_cli.networks import BLOCKS
from diffusion_cli.objective import Objective, withheld
from diffusion_cli.ranks import Ranks
from diffusion_cli.seeding import mix
from diffusion_cli.times import Times
from diffusion_cli.training.optimizers import OptimizerConfig

QUARTILES = 4


class LevelMeter:
    """The mean of a number of images, as their loss, since the last reading; kept on the device.

    Whole and by quartile of the noise levels drawn. Nothing is synchronised until it is read, by all processes
    together: a step at which it went bad is remembered by its number.
    """

    def __init__(self, name: str = "loss") -> None:
        self.name = name
        self._sums: Tensor | None = None
        self._first_bad: Tensor | None = None

    def add(self, loss: Tensor, quantile: Tensor, step: int) -> None:
        """Count the losses [B] of a step, at levels that lie at these quantiles [B] of all levels drawn."""
        value, device = loss.detach(), loss.device
        if self._sums is None or self._first_bad is None:
            self._sums = torch.zeros(2, QUARTILES, device=device)
            self._first_bad = torch.full((), -1, device=device)
        quartile = (quantile * QUARTILES).long().clamp_(0, QUARTILES - 1)
        self._sums.index_add_(1, quartile, torch.stack([value, torch.ones_like(value)]))
        bad = ~value.sum().isfinite() & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)

    def first_bad_step(self) -> int | None:
        """The first step whose loss was not finite in any process, or None."""
        step = -1 if self._first_bad is None else int(self._first_bad)
        return min((bad for bad in Ranks().gather(step) if bad >= 0), default=None)

    def read(self) -> dict[str, float]:
        """The means since the last reading, and a new start."""
        mine = torch.zeros(2, QUARTILES) if self._sums is None else self._sums.cpu()
        totals, counts = torch.stack(Ranks().gather(mine)).sum(0).tolist()
        if self._sums is not None:
            self._sums.zero_()
        if not sum(counts):
            return {}
        values = {self.name: sum(totals) / sum(counts)}
        return values | {
            f"{self.name}_q{i + 1}": total / count
            for i, (total, count) in enumerate(zip(totals, counts, strict=True))
            if count
        }


class TrainingModule(LightningModule):
    """A denoiser or classifier in training; `about` is what its checkpoints say to build it again."""

    model: NoiseConditioned

    def __init__(
        self,
        model: NoiseConditioned,
        objective: Objective[Any],
        times: Times,
        optimizer: OptimizerConfig,
        seed: int,
        about: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.times = times
        self.optimizer_config = optimizer
        self.seed = seed
        self.about = about
        self.meter = LevelMeter()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the mean loss of a batch; its noise and times are a function of (seed, step) alone."""
        # Drawn for the whole batch of a step, then cut: the same whatever the number of processes and of parts.
        # Dropout, whose masks would be too many to draw, is each process's and each part's own.
        step, part = divmod(batch.number, self.trainer.accumulate_grad_batches)
        torch.manual_seed(mix(self.seed, "step", step))
        local, world = len(batch.images), self.trainer.world_size
        size = local * world * self.trainer.accumulate_grad_batches
        of_all = slice(part * local * world, (part + 1) * local * world)
        share = slice(of_all.start + self.global_rank * local, of_all.start + (self.global_rank + 1) * local)
        drawn = self.times(self.model.schedule, torch.rand(size, device=self.device))
        t, weight, quantile = drawn.t[share], drawn.weight[share], drawn.quantile[share]
        eps = torch.randn(size, *batch.images.shape[1:], device=self.device)[share]
        labels, num_classes = batch.labels, getattr(self.model, "num_classes", None)
        if labels is not None and num_classes is not None and self.objective.label_dropout:
            u = torch.rand(size, device=self.device)[share]
            labels = withheld(labels, num_classes, self.objective.label_dropout, u)
        if self.global_rank or part:
            torch.manual_seed(mix(self.seed, "dropout", batch.number, self.global_rank))
        loss = self.objective(self.model, batch.images, labels, t, eps)
        if drawn.bins is not None:
            self.times.observe(drawn.bins[of_all], Ranks().concatenated(loss.detach()))
        loss = weight * loss
        self.meter.add(loss, quantile, self.trainer.global_step)
        return loss.mean()

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its scheduler, stepped every step."""
        # A fused optimizer would take the scale of fp16's gradients off after they are clipped.
        scaled = self.trainer.precision_plugin.precision == "16-mixed"
        optimizer = self.optimizer_config.optimizer(self.parameters(), fused=not scaled)
        scheduler = self.optimizer_config.scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the configured norm; Lightning's own refuses fused optimizers, which matters only in fp16."""
        if self.optimizer_config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.optimizer_config.clip_norm)

    def configure_model(self) -> None:
        """Share the weights out among the processes where the strategy says so, block by block."""
        if self.device_mesh is None:
            return
        for block in self.model.network.modules():
            if isinstance(block, BLOCKS):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model.network, mesh=self.device_mesh["data_parallel"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let Lightning count the parts of batches as they are cut now."""
        parts = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = parts - counts["ready"]
            counts |= {stage: number + shift for stage, number in counts.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the model again."""
        checkpoint["diffuse"] = self.about
