"""Training step of `diffuse train` on the digits at batch size 128, compared with a bare training loop."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import islice, pairwise
from statistics import median

import torch
from torch import Tensor

from benchmarks.ours import Training, configured
from benchmarks.probe import trainer_option
from benchmarks.race import Contestant, Table, raced
from diffusion_cli.commands import train
from diffusion_cli.config import build
from diffusion_cli.data import Batches
from diffusion_cli.training.module import TrainingModule

BATCH, STEPS, UNTIMED = 128, 40, 5


class Clock:
    """Records the start of each training step of `diffuse train`."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        original = TrainingModule.training_step

        def stamped(module: TrainingModule, batch: object, index: int) -> Tensor:
            self.starts.append(time.perf_counter())
            return original(module, batch, index)  # pyright: ignore[reportArgumentType]

        TrainingModule.training_step = stamped  # pyright: ignore[reportAttributeAccessIssue]


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """`diffuse train` with logs, previews and callbacks, against a loop without them."""
    clock = Clock()
    words = [f"batch_size={BATCH}", "precision=fp32", f"max_steps={STEPS}", trainer_option(device)]
    checked = configured(words)
    images = build(checked.dataset, "").load("train")

    def ours() -> float:
        clock.starts.clear()
        with (
            tempfile.TemporaryDirectory() as folder,
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            train.run(configured([*words, f"output_dir={folder}"]))
        return _period(clock.starts)

    def bare() -> float:
        training, starts = Training(checked, (1, 8, 8), device, "fp32"), []
        for batch in islice(Batches(images, BATCH, 0, flip=False, device=device), STEPS):
            starts.append(time.perf_counter())
            training.step(batch.images, batch.number)
        return _period(starts)

    ours()
    yield raced(
        f"Training step of `unet_tiny`, {BATCH} digits of 8x8, fp32. Ours takes at most 1.05 times as long.",
        [Contestant("a bare loop", bare, BATCH), Contestant("`diffuse train`", ours, BATCH)],
        rounds,
    )


def _period(starts: list[float]) -> float:
    """Return the median time between starts."""
    return median(after - before for before, after in pairwise(starts[UNTIMED:]))
