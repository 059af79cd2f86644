"""LightningModules of the tasks: training steps, validation losses and their random numbers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.conditions.condition import AUGMENTATION
from diffusion_cli.data import Batch, EDMAugmentation
from diffusion_cli.diffusion.coupling import Coupling, optimal_noise
from diffusion_cli.diffusion.denoiser import Denoiser, NoiseConditioned, NoisyClassifier
from diffusion_cli.diffusion.latents import Space
from diffusion_cli.diffusion.objectives import Objective
from diffusion_cli.diffusion.time_sampling import Times, Uniform
from diffusion_cli.networks import BLOCKS
from diffusion_cli.networks.layers import float64_device
from diffusion_cli.networks.magnitude import normalize_weights, normalized_layers
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.compat import set_batch_progress
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.seeding import mix
from diffusion_cli.training.autoencoder_loss import Autoencoding
from diffusion_cli.training.loss_check import ZeroNetwork
from diffusion_cli.training.optimizers import Optimization
from diffusion_cli.training.windows import random_windows

QUARTILES = 4
ZERO_SAMPLES = 256
"""Number of noised images that measure the loss of predicting zero."""
Trainable = NoiseConditioned | Autoencoding


class Meter(ABC):
    """Means over images since the last reading, accumulated on the device.

    Only reading synchronises, and all processes must read together. Until then the device records the first
    step with a loss that is not finite.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def watch(self, loss: Tensor, step: int) -> None:
        """Record the step if one of its losses is not finite."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, device=loss.device)
        bad = ~loss.detach().sum().isfinite() & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)

    def first_bad_step(self) -> int | None:
        """Return the first step with a loss that was not finite in any process, or None."""
        step = -1 if self._first_bad is None else int(self._first_bad)
        return min((bad for bad in Distributed().all_gather(step) if bad >= 0), default=None)

    @abstractmethod
    def read(self) -> dict[str, float]:
        """Return the means since the last reading, and reset them."""


class LevelMeter(Meter):
    """Means of a number per image, such as the loss: in total and by quartile of the noise level."""

    def __init__(self, name: str = "loss") -> None:
        super().__init__()
        self.name = name
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, quantile: Tensor, step: int) -> None:
        """Add the losses [B] of a step; `quantile` [B] gives the ranks of their noise levels in [0, 1]."""
        value = loss.detach()
        if self._sums is None:
            self._sums = torch.zeros(2, QUARTILES, device=loss.device)
        quartile = (quantile * QUARTILES).long().clamp_(0, QUARTILES - 1)
        self._sums.index_add_(1, quartile, torch.stack([value, torch.ones_like(value)]))
        self.watch(value, step)

    def read(self) -> dict[str, float]:
        mine = torch.zeros(2, QUARTILES) if self._sums is None else self._sums.cpu()
        totals, counts = torch.stack(Distributed().all_gather(mine)).sum(0).tolist()
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


class TermMeter(Meter):
    """Means of named numbers per image, such as the terms of a loss."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], step: int) -> None:
        """Add the terms [B] of a step; all processes must add the same names."""
        for name, values in terms.items():
            seen = torch.stack([values.detach().float().sum(), values.new_tensor(len(values)).float()])
            self._sums[name] = self._sums.get(name, 0) + seen
            self.watch(values, step)

    def read(self) -> dict[str, float]:
        parts = Distributed().all_gather({name: sums.cpu() for name, sums in self._sums.items()})
        self._sums.clear()
        totals: dict[str, Tensor] = {}
        for part in parts:  # a process may have no images
            totals |= {name: totals.get(name, 0) + sums for name, sums in part.items()}
        return {name: float(total / count) for name, (total, count) in totals.items()}


ModelT = TypeVar("ModelT", bound=Trainable)
MeterT = TypeVar("MeterT", bound=Meter)


class MicroBatch(NamedTuple):
    """This process's slice of the global batch of an optimizer step."""

    size: int
    """Images of the global batch, in all processes and parts."""
    part: slice
    """Its images in this part, in all processes."""
    mine: slice
    """Its images in this part, in this process."""


class TrainingModule(LightningModule, ABC, Generic[ModelT, MeterT]):
    """A model in training; `info` is stored in its checkpoints."""

    def __init__(
        self, model: ModelT, meter: MeterT, optimization: Optimization, seed: int, info: CheckpointInfo
    ) -> None:
        super().__init__()
        self.model = model
        self.meter = meter
        self.optimization = optimization
        self.seed = seed
        self.info = info
        self.schedule_error: ValueError | None = None
        """Error of a schedule of a library or a plugin that has no further step."""

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the mean loss of a batch; its random numbers depend only on seed and step."""
        # Drawn for the global batch, then sliced: independent of the number of processes and parts.
        step, part = divmod(batch.number, self.trainer.accumulate_grad_batches)
        torch.manual_seed(mix(self.seed, "step", step))
        local, world = len(batch.images), self.trainer.world_size
        size = local * world * self.trainer.accumulate_grad_batches
        of_all = slice(part * local * world, (part + 1) * local * world)
        first = of_all.start + self.global_rank * local
        return self.loss(batch, MicroBatch(size, of_all, slice(first, first + local)))

    @abstractmethod
    def loss(self, batch: Batch, share: MicroBatch) -> Tensor:
        """Add the losses of a batch to the meter, and return their mean; draws cover the global batch."""

    @abstractmethod
    def val_losses(self, model: Any, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Yield the losses [B] on this process's share of batches, with the same noise every time."""

    @abstractmethod
    def trial(self, images: Tensor) -> Tensor:
        """Return a loss of images [B, C, H, W] with the memory use of a training step."""

    def loss_of_zero(self, batch: Batch) -> float | None:
        """Return the approximate loss of a network that predicts zero, or None where it is undefined."""
        return None

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its scheduler, which steps every optimizer step."""
        # A fused optimizer would unscale fp16 gradients only after clipping.
        scaled = self.trainer.precision_plugin.precision == "16-mixed"
        optimizer, scheduler = self.optimization.make(
            self, not scaled and self.device.type in ("cpu", "cuda")
        )
        if layers := normalized_layers(self.model.network):
            optimizer.register_step_post_hook(lambda *_: normalize_weights(layers))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the configured norm; Lightning's version rejects fused optimizers."""
        if self.optimization.clip_norm is not None:
            for part in self.clipped():
                nn.utils.clip_grad_norm_(part.parameters(), self.optimization.clip_norm)

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        """Move the learning rate to the next step; note an error, which ends training after a checkpoint."""
        try:
            scheduler.step()
        except ValueError as error:  # as OneCycleLR after its last step
            self.schedule_error = error

    def clipped(self) -> list[nn.Module]:
        """Return the modules that have their gradients clipped separately."""
        return [self.model]

    def configure_model(self) -> None:
        """Shard the weights among the processes block by block, if the strategy is FSDP."""
        if self.device_mesh is None:
            return
        for block in self.model.network.modules():
            if isinstance(block, BLOCKS):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model.network, mesh=self.device_mesh["data_parallel"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count the batches of earlier steps with the current accumulate_grad_batches."""
        set_batch_progress(checkpoint, checkpoint["global_step"] * self.trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the information that rebuilds the model; dictionaries of schedulers become plain."""
        checkpoint["diffuse"] = self.info.model_dump()
        # MultiStepLR has a Counter, which `weights_only` does not read.
        checkpoint["lr_schedulers"] = [
            {name: dict(value) if isinstance(value, dict) else value for name, value in state.items()}
            for state in checkpoint["lr_schedulers"]
        ]


class DenoisingModule(TrainingModule[NoiseConditioned, LevelMeter]):
    """Trains a denoiser or a classifier of noised images, at random times."""

    def __init__(
        self,
        model: NoiseConditioned,
        objective: Objective[Any],
        times: Times,
        space: Space,
        optimization: Optimization,
        *,
        seed: int,
        info: CheckpointInfo,
        coupling: Coupling = "none",
        augmentation: EDMAugmentation | None = None,
    ) -> None:
        super().__init__(model, LevelMeter(), optimization, seed, info)
        self.coupling: Coupling = coupling
        self.augmentation = augmentation
        self.objective = objective
        self.learned = objective.learned
        self.times = times
        self.space = space

    def loss(self, batch: Batch, share: MicroBatch) -> Tensor:
        # Except dropout masks, which each process and part draws: those of the global batch are too large.
        size, of_all, mine = share
        # Times stay where float64 is: coefficients that are computed from them move to the images.
        drawn = self.times(self.model.schedule, torch.rand(size, device=float64_device(self.device)))
        t, weight, quantile = drawn.t[mine], *(x[mine].to(self.device, torch.float32) for x in drawn[1:3])
        images, transforms = self._augmented(batch, share)
        x0 = self.space.states(images, lambda shape: torch.randn(size, *shape[1:], device=self.device)[mine])
        condition = batch.condition
        if self._window is not None:
            x0, condition = random_windows(x0, condition, self._window, self._window_draws(batch, share))
        noise = torch.randn(size, *x0.shape[1:], device=self.device, generator=self._repeated())
        if condition is not None and isinstance(self.model, Denoiser):
            condition = self._dropped(condition, self.model.conditions.names, share)
        if transforms is not None:  # never dropped: without them, samples would have the transforms too
            condition = Condition.of(condition).replaced({AUGMENTATION: transforms})
        eps = noise[mine] if self.coupling == "none" else self._coupled(x0, noise[of_all], condition)
        if self.global_rank or of_all.start:
            torch.manual_seed(mix(self.seed, "dropout", batch.number, self.global_rank))
        self.objective.step = self.trainer.global_step
        self.objective.part = batch.number % self.trainer.accumulate_grad_batches
        loss = self.objective(self.model, x0, condition, t, eps)
        if drawn.bins is not None:
            self.times.observe(drawn.bins[of_all], Distributed().concatenated(loss.detach()))
        self.meter.add(weight * loss, quantile, self.trainer.global_step)
        return (weight * self.objective.minimized(loss, self.model.schedule, t)).mean()

    @property
    def _window(self) -> tuple[int, ...] | None:
        """Sizes of a window, for networks that see a window at a time."""
        return getattr(self.model.network, "window", None)

    def _window_draws(self, batch: Batch, share: MicroBatch) -> Tensor:
        """Return the random numbers of the windows of this process's images, the same while a batch is repeated."""
        step = batch.number // self.trainer.accumulate_grad_batches // self.objective.repeats
        generator = torch.Generator().manual_seed(mix(self.seed, "window", step))
        return torch.rand(share.size, batch.images.dim() - 2, generator=generator)[share.mine]

    def _repeated(self) -> torch.Generator | None:
        """Return a generator that gives the same noise while a batch is repeated; None for a new batch at each step."""
        repeats = self.objective.repeats
        if repeats == 1:
            return None
        seed = mix(self.seed, "noise", self.trainer.global_step // repeats)
        return torch.Generator(self.device).manual_seed(seed)

    def clipped(self) -> list[nn.Module]:
        # Separately: without the learned part, the gradients of the network would be scaled by another factor.
        return [self.model, *self._learned()]

    def configure_model(self) -> None:
        super().configure_model()
        if self.device_mesh is not None:
            for part in self._learned():
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def _learned(self) -> list[nn.Module]:
        return [] if self.learned is None else [self.learned]

    def _augmented(self, batch: Batch, share: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return the transformed images and the parameters for the network; None without augmentation."""
        if self.augmentation is None:
            return batch.images, None
        # A separate generator, so that the noise is the same as without augmentation.
        step = batch.number // self.trainer.accumulate_grad_batches
        generator = torch.Generator().manual_seed(mix(self.seed, "augmentation", step))
        parameters = self.augmentation.draw(share.size, generator)[share.mine]
        return self.augmentation(batch.images, parameters), parameters.to(self.device)

    def _coupled(self, x0: Tensor, noise: Tensor, condition: Condition | None) -> Tensor:
        """Return the noise of this process's images, coupled with those of all processes in this part."""
        ranks, read = Distributed(), self._read(condition).values
        everyones = Condition({name: ranks.concatenated(value) for name, value in read.items()})
        coupled = optimal_noise(ranks.concatenated(x0), noise, everyones)
        return coupled[self.global_rank * len(x0) :][: len(x0)]

    def _read(self, condition: Condition | None) -> Condition:
        """Return the conditions that the network reads; batches may have others, such as the labels of the data."""
        assert isinstance(self.model, Denoiser)
        values, names = Condition.of(condition).values, self.model.conditions.names
        return Condition({name: value for name, value in values.items() if name in names})

    def _dropped(self, condition: Condition, names: Sequence[str], share: MicroBatch) -> Condition:
        """Return the condition without random values: all names of an image together, and each one alone."""
        objective = self.objective
        if names and objective.label_dropout:
            u = torch.rand(share.size, device=self.device)[share.mine]
            condition = condition.dropped(where=u < objective.label_dropout)
        if len(names) > 1 and objective.single_dropout:
            u = torch.rand(share.size, len(names), device=self.device)[share.mine]
            for column, name in enumerate(names):
                condition = condition.dropped([name], u[:, column] < objective.single_dropout)
        return condition

    @torch.no_grad()
    def loss_of_zero(self, batch: Batch) -> float | None:
        if isinstance(self.model, NoisyClassifier):
            assert self.info.num_classes is not None
            return math.log(self.info.num_classes)
        if not self.objective.compares_to_zero:
            return None
        assert isinstance(self.model, Denoiser)
        zero = self.model.with_network(ZeroNetwork(self.model.learns_variance))
        generator = torch.Generator().manual_seed(mix(self.seed, "loss of zero"))

        def noise(shape: Sequence[int]) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device)

        # Stratified over all noise levels: the batch is noised at several of them.
        copies = -(-ZERO_SAMPLES // len(batch.images))
        levels = torch.randperm(copies * len(batch.images), generator=generator) + 0.5
        levels = levels.to(float64_device(self.device))
        losses = []
        for u in (levels / len(levels)).chunk(copies):
            drawn = self.times(self.model.schedule, u)
            x0 = self.space.states(batch.images, noise)
            weight = drawn.weight.to(self.device)
            losses.append((weight * self.objective(zero, x0, None, drawn.t, noise(x0.shape))).mean())
        means = Distributed().all_gather(torch.stack(losses).mean().item())
        return sum(means) / len(means)

    def val_losses(self, model: NoiseConditioned, batches: Iterable[Batch]) -> Iterator[Tensor]:
        self.objective.step = None
        for batch, t, eps, _ in self.at_levels(batches):
            yield self.objective(model, batch.images, batch.condition, t, eps)

    def at_levels(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
        """Yield this process's share of batches, with fixed times, coupled noise and quantiles of the times [B]."""
        ranks = Distributed()
        for i, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(mix(self.seed, "held-out", i))
            size = len(batch.images)
            # Stratified times reduce the variance over few images.
            u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
            # Importance sampling estimates a mean over uniform times: validation draws them directly.
            times = Uniform() if self.times.uniform else self.times
            drawn = times(self.model.schedule, u.to(float64_device(self.device)))
            x0 = self.space.states(
                batch.images, lambda shape, of=generator: torch.randn(shape, generator=of).to(self.device)
            )
            batch, eps = batch._replace(images=x0), torch.randn(x0.shape, generator=generator).to(self.device)
            if self.coupling == "ot":
                eps = optimal_noise(x0, eps, self._read(batch.condition))
            of_times = torch.arange(size, device=drawn.t.device).tensor_split(ranks.world)[ranks.rank]
            share = of_times.to(self.device)
            if len(share):
                quantile = drawn.quantile[of_times].to(self.device, torch.float32)
                yield batch.part(share), drawn.t[of_times], eps[share], quantile

    def trial(self, images: Tensor) -> Tensor:
        conditions = Conditions.of(self.info.num_classes)  # labels of a classifier
        if isinstance(self.model, Denoiser):
            conditions = self.model.conditions
        condition = conditions.example(len(images), images.shape[2:], images.device)
        if self._window is not None:
            corner = torch.zeros(len(images), images.dim() - 2)
            images, condition = random_windows(images, condition, self._window, corner)
        t = self.model.schedule.time(torch.full((len(images),), 0.5, device=float64_device(images.device)))
        self.objective.step = None  # these images are of no batch
        return self.objective(self.model, images, condition, t, torch.zeros_like(images)).mean()
