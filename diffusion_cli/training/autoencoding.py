"""Training of autoencoders, and previews of their reconstructions."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from diffusion_cli.captions import Captions
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.latents import PIXELS
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SampleFormat
from diffusion_cli.images import save_rows
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.seeding import mix
from diffusion_cli.training.autoencoder_loss import Autoencoding, ReconstructionLoss
from diffusion_cli.training.callbacks import GracefulStop
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.module import MicroBatch, TermMeter, Trainable, TrainingModule
from diffusion_cli.training.optimizers import Optimization
from diffusion_cli.training.previews import PreviewCallback

ROW = 8  # images in a row of a preview


class AutoencodingModule(TrainingModule[Autoencoding, TermMeter]):
    """Trains an autoencoder, with its discriminator if any."""

    def __init__(
        self,
        model: Autoencoding,
        objective: ReconstructionLoss,
        optimization: Optimization,
        seed: int,
        info: CheckpointInfo,
    ) -> None:
        super().__init__(model, TermMeter(), optimization, seed, info)
        self.objective = objective

    def loss(self, batch: Batch, share: MicroBatch) -> Tensor:
        eps = torch.randn(share.size, *self._latents(batch.images), device=self.device)[share.mine]
        losses = self.objective(self.model, batch.images, eps, self.trainer.global_step)
        self.meter.add(losses.terms, self.trainer.global_step)
        return losses.total

    def val_losses(self, model: Autoencoding, batches: Iterable[Batch]) -> Iterator[Tensor]:
        ranks = Distributed()
        for i, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(mix(self.seed, "held-out", i))
            eps = torch.randn(len(batch.images), *self._latents(batch.images), generator=generator)
            share = torch.arange(len(eps), device=self.device).tensor_split(ranks.world)[ranks.rank]
            if len(share):
                mine = batch.images[share]
                images, moments = model.network(mine, eps.to(self.device)[share])
                yield self.objective.terms(images, moments, mine)["loss"]

    def trial(self, images: Tensor) -> Tensor:
        eps = torch.zeros(len(images), *self._latents(images), device=images.device)
        return self.objective(self.model, images, eps, self.objective.start or 0).total

    def _latents(self, images: Tensor) -> tuple[int, ...]:
        return self.model.network.latent_shape(tuple(images.shape[1:]))

    def clipped(self) -> list[nn.Module]:
        # Separately, as with two optimizers: the gradients of one do not scale those of the other.
        return [part for part in (self.model.network, self.model.discriminator) if part is not None]

    def configure_model(self) -> None:
        if self.device_mesh is not None and self.model.discriminator is not None:
            raise UsageError(
                "trainer.strategy",
                "fsdp",
                "cannot shard the discriminator that objective.discriminator_start adds",
                "use trainer.strategy=ddp",
            )
        super().configure_model()


class ReconstructionPreview(PreviewCallback):
    """Saves pictures of images, each row above its reconstructions by the EMA weights.

    It also runs at steps 1, 10, 100, ... and at the last step.
    """

    stored_as = "Reconstructions"

    def __init__(
        self, every: int, ema: EMA, stop: GracefulStop, *, run: Path, images: Tensor, form: SampleFormat
    ) -> None:
        super().__init__(every, ema, stop, run=run, early=1)
        self.images, self.form = images, form

    def save(self, trainer: Trainer, model: Trainable, device: torch.device, step: int, path: Path) -> None:
        assert isinstance(model, Autoencoding)
        with trainer.precision_plugin.forward_context():
            parts = self.images.to(device).split(max(1, PIXELS // math.prod(self.images.shape[2:])))
            images = torch.cat([model.network.reconstruct(part) for part in parts])
        pairs = zip(self.images.split(ROW), images.cpu().split(ROW), strict=True)
        rows = [self.form.to_rgb(self.form.quantize(row)) for pair in pairs for row in pair]
        captions = Captions(["given", "reconstructed"] * (len(rows) // 2))
        save_rows(rows, path, captions)
