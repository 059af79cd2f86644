"""Networks and loops of other packages, as in their own scripts."""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ours import OF_DIFFUSERS, configured

_DOWN, _UP = "DownBlock2D", "UpBlock2D"
OF_UNET_2D: dict[str, dict[str, Any]] = {
    "ddpm": {
        "block_out_channels": (128, 256, 256, 256), "dropout": 0.1, "attention_head_dim": None,
        "down_block_types": (_DOWN, "AttnDownBlock2D", _DOWN, _DOWN),
        "up_block_types": (_UP, _UP, "AttnUpBlock2D", _UP),
    },
    "small": {
        "block_out_channels": (32, 64, 64), "dropout": 0.0, "attention_head_dim": 32, "norm_num_groups": 8,
        "down_block_types": (_DOWN,) * 3, "up_block_types": (_UP,) * 3,
    },
}  # fmt: skip
OF_LUCIDRAINS = {"ddpm": {"dim": 64, "dim_mults": (1, 2, 4, 8)}, "small": {"dim": 24, "dim_mults": (1, 2, 4)}}
"""Settings of networks with similar numbers of parameters: 35,711,491 and 1,517,873."""


def imported(name: str) -> ModuleType:
    """Import a peer's module; SystemExit if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(
            f"{name}: cannot be imported ({error}); the peers come with: pip install '.[bench]'"
        ) from error


def unet_2d(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """Return a network of diffuse as a diffusers model."""
    channels, size, _ = shape
    return imported("diffusers").UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=2, norm_eps=1e-6,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, **OF_UNET_2D[name],
    )  # fmt: skip


class Diffusers:
    """Training loop of diffusers' script for unconditional models, on one device and without logging.

    `recommended` adds the documented advice for GPUs: channels_last and torch.compile.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        device: torch.device,
        precision: str,
        recommended: bool = False,
    ) -> None:
        self.device, self.precision = device, precision
        self.network: Any = unet_2d(name, shape).to(device)
        self.layout = torch.channels_last if recommended else torch.contiguous_format
        if recommended:
            self.network.to(memory_format=torch.channels_last)
            self.network.compile()
        self.noising = imported("diffusers").DDPMScheduler(num_train_timesteps=1000)
        average = imported("diffusers.training_utils").EMAModel
        self.ema = average(self.network.parameters(), decay=0.9999, use_ema_warmup=True)
        checked = configured(OF_DIFFUSERS)
        settings, schedule = checked.optimizer, checked.lr_schedule
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"]
        )  # fmt: skip
        cosine = imported("diffusers.optimization").get_cosine_schedule_with_warmup
        self.scheduler = cosine(self.optimizer, schedule["warm_up_steps"], schedule["decay_steps"])

    def step(self, x0: Tensor) -> None:
        """Train on images [B, C, H, W] on the device."""
        eps, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=self.device)
        noisy = self.noising.add_noise(x0, eps, t).to(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.network(noisy, t).sample
        nn.functional.mse_loss(output.float(), eps).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())


class Lucidrains:
    """Training loop of denoising-diffusion-pytorch's Trainer, with its defaults and without logging."""

    def __init__(self, name: str, shape: tuple[int, int, int], device: torch.device) -> None:
        package = imported("denoising_diffusion_pytorch")
        network = package.Unet(channels=shape[0], flash_attn=True, **OF_LUCIDRAINS[name])
        self.network: Any = package.GaussianDiffusion(network, image_size=shape[1]).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4, (0.9, 0.99))
        self.ema = imported("ema_pytorch").EMA(self.network, beta=0.995, update_every=10).to(device)

    def step(self, x0: Tensor) -> None:
        """Train on images [B, C, H, W] on the device, with values in 0..1."""
        self.network(x0 * 0.5 + 0.5).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()


def ddim_pipeline(name: str, device: torch.device) -> Any:
    """Return diffusers' pipeline for sampling 32x32 images, as shipped."""
    diffusers = imported("diffusers")
    network = unet_2d(name, (3, 32, 32)).to(device).eval()
    pipeline = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
