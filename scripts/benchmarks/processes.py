"""Training with one and several processes, each with 8 images and one thread: throughput and scaling efficiency."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.probe import afresh, observed, trainer_option
from benchmarks.race import Cells, Table, in_a_row
from diffusion_cli.system.distributed import Distributed, launch


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """DDP and FSDP with one process per GPU, or two processes."""
    several = max(2, torch.cuda.device_count()) if device.type == "cpu" else torch.cuda.device_count()
    runs = {"1 process": (1, "ddp")}
    if several > 1:
        runs |= {f"{several} processes, {strategy}": (several, strategy) for strategy in ("ddp", "fsdp")}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (count, strategy) in runs.items():
            words = [
                "model=unet_small", f"batch_size={8 * count}", "max_steps=8", trainer_option(device),
                "trainer.threads=1", f"trainer.devices={count}", f"trainer.strategy={strategy}",
            ]  # fmt: skip
            taken[name].append(afresh(observed, words))
    work = {name: median(each["cpu_seconds"] for each in all_of_it) for name, all_of_it in taken.items()}
    rates = {
        name: [8 * runs[name][0] / each["seconds"] for each in all_of_it] for name, all_of_it in taken.items()
    }
    one = median(rates["1 process"])
    rows: list[Cells] = []
    for name, (count, _) in runs.items():
        rate, ratio = median(rates[name]), work[name] / work["1 process"]
        over_one = rate / (count * one)
        rows.append(
            (f"{name}, images/s", f"{rate:.3g}", f"{over_one:.3g}", f"{ratio:.3g}", in_a_row(rates[name]))
        )
    measured: dict[str, Any] = {"taken": taken}
    if several > 1:
        times = measured["agreement_seconds"] = [afresh(agreement, several) for _ in range(rounds)]
        rows.append((
            f"what {several} agree on at each step, ms", f"{1000 * median(times):.3g}",
            f"{median(times) * one / 8:.2g} of a step", "", in_a_row([1000 * each for each in times]),
        ))  # fmt: skip
    head = ("", "median", "over N times one's", "CPU time over one's", "rounds")
    yield Table(
        "Training of `unet_small`, 8 images of 3x32x32 and one thread a process.", head, rows, measured
    )


def agreement(count: int) -> float:
    """Return the seconds that `count` processes need to agree on stopping and saving, without waiting."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        launch(_agree, found, processes=count)
        return json.loads(found.read_text())


def _agree(found: Path) -> None:
    ranks, seconds = Distributed(), []
    for _ in range(1000):
        start = time.perf_counter()
        ranks.all_reduce_max(0, False, False)
        seconds.append(time.perf_counter() - start)
    if ranks.is_main:
        found.write_text(json.dumps(median(seconds[100:])))
