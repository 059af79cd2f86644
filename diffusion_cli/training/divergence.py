"""The end of a training with a loss or a weight that is not finite."""

from pathlib import Path

from torch import nn
from torch.distributed.tensor import DTensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.training.module import TrainingModule


class DivergedError(UsageError):
    """The loss or a weight is not finite."""


def stop_if_diverged(module: TrainingModule, last: Path, step: int | None = None) -> None:
    """Raise DivergedError in all processes if a loss was not finite or, with `step`, a weight is not."""
    bad_loss = module.meter.first_bad_step()
    if bad_loss is None and step is not None:
        norm = nn.utils.get_total_norm([p.detach() for p in module.model.parameters()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        step = None if norm.isfinite() else step
    else:
        step = bad_loss
    if step is not None:
        what = "loss" if bad_loss is not None else "weights"
        rate = module.trainer.optimizers[0].param_groups[0]["lr"]
        kept, place = "there is no checkpoint yet", ""
        if last.is_file():
            kept, place = f"the last good checkpoint is {last}", " with another name="
        raise DivergedError(
            what,
            NO_VALUE,
            f"not a finite number at step {step}, learning rate {rate:.3g}; {kept}",
            f"try a smaller optimizer.lr, a longer lr_schedule.warm_up_steps or precision=fp32{place}",
        )
