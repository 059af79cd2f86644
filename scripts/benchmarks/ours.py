"""Networks of diffuse, and a bare training loop of the parts of `diffuse train`."""

import torch
from torch import Tensor, nn

from diffusion_cli import config
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.formats import Uint8Image
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.runs.schema import CheckpointInfo, StoredConfig
from diffusion_cli.system.seeding import mix
from diffusion_cli.training.ema import EMA, ExponentialAverage
from diffusion_cli.training.optimizers import Optimization

PARAMETERS = {"ddpm": 35_746_307, "small": 1_539_329}
"""Settings of each network that is compared with a peer, for 3 channels and for 1."""

OF_DIFFUSERS = [
    "schedule=linear", "optimizer.lr=1e-4", "optimizer.betas=[0.95,0.999]", "optimizer.weight_decay=1e-6",
    "lr_schedule.warm_up_steps=500", "max_steps=100000", "ema.decay=0.9999",
]  # fmt: skip
"""Settings of diffusers' training script for unconditional models."""

WORDS = {
    "ddpm": ["model=unet_cifar10", *OF_DIFFUSERS],
    "small": [
        "model=unet_cifar10", "model.channels=32", "model.channel_mult=[1,2,2]", "model.attention_resolutions=[]",
        "model.num_heads=null", "model.head_channels=32", "model.norm_groups=8", "model.dropout=0", *OF_DIFFUSERS,
    ],
}  # fmt: skip


def configured(words: list[str]) -> TrainConfig:
    """Return the configuration of `diffuse train` with these arguments."""
    checked = config.load("train", words)
    assert isinstance(checked, TrainConfig)
    return checked


def denoiser_of(checked: TrainConfig, shape: tuple[int, int, int]) -> Denoiser:
    """Return an untrained denoiser for images of a shape."""
    torch.manual_seed(mix(checked.seed, "weights"))
    network = build(checked.model, shape, None)
    return Denoiser(network, build(checked.schedule), build(checked.parameterization))


def model_of(name: str, device: torch.device) -> LoadedDenoiser:
    """Return a model of 32x32 images, ready to sample."""
    shape = (3, 32, 32)
    checked = configured(WORDS[name])
    denoiser = denoiser_of(checked, shape).to(device).eval().requires_grad_(False)
    info = CheckpointInfo(
        task=Denoiser.task,
        num_images=0,
        config=StoredConfig(**checked.model_dump()),
        shape=shape,
        form=Uint8Image(),
    )
    return LoadedDenoiser(info, 0, "", denoiser, Pixels(shape))


def count(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


class Training:
    """A training step of `diffuse train` without Lightning and callbacks."""

    def __init__(
        self, checked: TrainConfig, shape: tuple[int, int, int], device: torch.device, precision: str
    ) -> None:
        self.device, self.precision, self.seed = device, precision, checked.seed
        self.denoiser = denoiser_of(checked, shape).to(device)
        self.network = self.denoiser.network
        self.times, self.objective = build(checked.time_sampling), build(checked.objective)
        assert checked.ema.decay is not None
        self.ema = EMA(self.network, ExponentialAverage(checked.ema.decay, checked.ema.warm_up))
        self.clip_norm = checked.clip_norm
        made = Optimization(checked.optimizer, checked.lr_schedule, checked.clip_norm)
        self.optimizer, self.scheduler = made.make(self.network, fused=True)
        if device.type == "cuda":
            self.network.compile()

    def step(self, x0: Tensor, number: int = 0) -> None:
        """Train on images [B, C, H, W] on the device."""
        torch.manual_seed(mix(self.seed, "step", number))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            drawn = self.times(self.denoiser.schedule, torch.rand(len(x0), device=self.device))
            loss = self.objective(self.denoiser, x0, None, drawn.t, torch.randn_like(x0))
            loss = (drawn.weight * loss).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update(self.network)
