"""Advice when memory runs out: the parts of a batch that fit, found by trial steps."""

import gc
import math
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffusion_cli.batch_size import ONEDNN, ran_out
from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.errors import Problem, UsageError
from diffusion_cli.training.autoencoding import AutoencodingModule
from diffusion_cli.training.module import TrainingModule

MARGIN = 8  # trials use 1/8 more images than advised, because memory fragments over time


@contextmanager
def advise_on_oom(
    module: TrainingModule, device: torch.device, stages: ResolutionSchedule, trainer: Trainer
) -> Iterator[None]:
    """Turn an out-of-memory error into a UsageError that suggests `accumulate_grad_batches`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they reference the tensors of the failed step
        raise UsageError(*_advice(error, module, device, stages, trainer)) from None


def _advice(
    error: BaseException,
    module: TrainingModule,
    device: torch.device,
    stages: ResolutionSchedule,
    trainer: Trainer,
) -> Problem:
    stage, accumulate = stages.at(trainer.global_step), trainer.accumulate_grad_batches
    share = stage.batch_size // trainer.world_size
    key, value = stages.key(stage), stage.batch_size
    problem = f"{share // accumulate} images at a time do not fit in {device.type} memory"
    # In these cases a trial step would wait for the other processes.
    together = trainer.world_size > 1 and isinstance(module, AutoencodingModule)
    sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    if together or sharded or ONEDNN in str(error):
        return Problem(key, value, problem, f"try accumulate_grad_batches={2 * accumulate}")
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    module.to(device)  # Lightning has moved it to the CPU
    # One number of parts applies at all resolutions, so each must fit.
    shares = {each.shape: each.batch_size // trainer.world_size for each in stages.all}
    fewest = None
    # From small parts to large: after a trial runs out, less memory is free for the next.
    for parts in _more(math.gcd(*shares.values()), accumulate):
        sizes = {shape: of // parts for shape, of in shares.items()}
        batches = (torch.zeros(of + of // MARGIN, *shape, device=device) for shape, of in sizes.items())
        if not all(_fits(module, images, trainer.precision_plugin.forward_context()) for images in batches):
            break
        fewest = parts
    if fewest is None:
        return Problem(
            key,
            value,
            f"{problem}, nor does one",
            "use a smaller model, or model.gradient_checkpointing=true",
        )
    return Problem(
        key, value, f"{problem}, but {share // fewest} do", f"set accumulate_grad_batches={fewest}"
    )


def _more(images: int, accumulate: int) -> Iterator[int]:
    """Return the divisors of `images` above `accumulate`, in descending order."""
    return (parts for parts in range(images, accumulate, -1) if images % parts == 0)


def _fits(module: TrainingModule, images: Tensor, context: AbstractContextManager[object]) -> bool:
    """Return whether a training step on these images fits, with gradients and the state of Adam."""
    _free(module)
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    try:
        kept = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        with context, torch.compiler.set_stance("force_eager"):
            loss = module.trial(images)
            # Not backward(), which would wait for the gradients of other processes.
            torch.autograd.grad(loss, parameters, allow_unused=True)
        del kept, loss
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            return False
        raise
    return True


def _free(module: TrainingModule) -> None:
    """Free the memory of the failed step."""
    module.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
