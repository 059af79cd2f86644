"""Times of everything that a user of the digits demo waits for, each command in a new process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.probe import trainer_option
from benchmarks.race import Table

ROOT = Path(__file__).resolve().parents[2]
OWN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""Environment variable that `scripts/benchmark.py` sets for itself, and that a user does not have."""
STEPS, UNTIMED = 60, 10
SAMPLES, EVALUATED = 64, 2000

OBSERVED = """
import json, os, sys, time
import torch
from diffusion_cli.__main__ import main
from diffusion_cli.networks import UNet

path, most_steps = sys.argv[1], int(sys.argv[2])
sys.argv = ["diffuse", *sys.argv[3:]]
taken = {"network": 0.0, "steps": [], "preview": [], "checkpoint": []}

def now():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()

def watch(owner, name, note):
    original = getattr(owner, name)
    def watched(*arguments, **options):
        start, network = now(), taken["network"]
        try:
            return original(*arguments, **options)
        finally:
            note(now() - start, taken["network"] - network)
    setattr(owner, name, watched)

def add(seconds, _):
    taken["network"] += seconds

def write():
    with open(path, "w") as file:
        json.dump(taken, file)

watch(UNet, "forward", add)
watch(torch.autograd, "backward", add)
if sys.argv[1] == "train":
    from diffusion_cli.training.callbacks import GracefulStop
    from diffusion_cli.training.checkpoints import CheckpointCallback
    from diffusion_cli.training.previews import Preview

    def ended(*_):
        taken["steps"].append((now(), taken["network"]))
        if len(taken["steps"]) == most_steps:
            write()
            os._exit(0)

    watch(GracefulStop, "on_optimizer_step", ended)
    watch(Preview, "run", lambda *spent: taken["preview"].append(spent))
    watch(CheckpointCallback, "save", lambda *spent: taken["checkpoint"].append(spent))
try:
    main()
finally:
    write()
"""
"""A command that writes the seconds within its network, and those of each training step, preview and checkpoint.

It ends after a number of steps, unless that is 0.
"""


class Spent(NamedTuple):
    """Seconds of something, and those within calls of the denoising network and its backward passes."""

    seconds: float
    network: float = 0.0


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """Installation, the first training step, a step, a preview, a checkpoint, samples, an evaluation, a report."""
    measured: dict[str, list[Spent]] = {}
    with tempfile.TemporaryDirectory() as folder:
        wheel = _wheel(Path(folder))
        for number in range(rounds):
            for name, spent in _round(Path(folder, str(number)), wheel, device).items():
                measured.setdefault(name, []).append(spent)
    yield table(measured)


def table(measured: Mapping[str, Sequence[Spent]]) -> Table:
    """Return the table of medians; the share is that of the medians."""
    rows = []
    for name, rounds in measured.items():
        seconds, network = (median(each[place] for each in rounds) for place in (0, 1))
        rows.append((name, f"{seconds:.3g}", f"{network:.3g}", f"{100 * (1 - network / seconds):.0f} %"))
    caption = (
        "What a user of the digits demo waits for; each command is a new process. Network: forward passes of the "
        "denoising network, and backward passes in training. Installation: the wheel without its dependencies, into "
        "a new environment."
    )
    head = ("", "seconds", "of which network", "share that is not network")
    return Table(
        caption,
        head,
        rows,
        {name: [spent._asdict() for spent in rounds] for name, rounds in measured.items()},
    )


def _round(folder: Path, wheel: Path, device: torch.device) -> dict[str, Spent]:
    """Return what each row takes, once."""
    folder.mkdir()
    demo = [
        f"output_dir={folder}", "name=demo", "model.class_conditional=true", trainer_option(device),
        f"max_steps={STEPS}", f"preview_every={STEPS // 2}", f"checkpoint_every={STEPS // 3}",
    ]  # fmt: skip
    whole, of_run = _observed(folder, ["train", *demo])
    first, of_first = _observed(folder, ["train", *demo, "name=first"], most_steps=1)
    run = [f"output_dir={folder}", "run=demo"]
    drawing = [*run, f"device={device.type}"]
    sampled, of_samples = _observed(folder, ["sample", *drawing, "label=all", f"num_samples={SAMPLES}"])
    measure = ["metric=fid", "features=classifier", f"num_samples={EVALUATED}", f"cache_dir={folder}/cache"]
    evaluated, of_evaluation = _observed(folder, ["eval", *drawing, *measure])
    return {
        "installation": Spent(_timed(lambda: _install(folder / "environment", wheel))),
        "`diffuse --help`": Spent(_timed(lambda: _python("-m", "diffusion_cli", "--help"))),
        "`diffuse train`, up to its first step": Spent(first, of_first["network"]),
        "a training step, batch 64": step_of(of_run["steps"][UNTIMED:]),
        "a preview": _median(of_run["preview"]),
        "a checkpoint": _median(of_run["checkpoint"]),
        f"`diffuse train`, {STEPS} steps with previews and checkpoints": Spent(whole, of_run["network"]),
        f"`diffuse sample`, {SAMPLES} samples": Spent(sampled, of_samples["network"]),
        f"`diffuse eval`, {EVALUATED:,} samples": Spent(evaluated, of_evaluation["network"]),
        "`diffuse report`": Spent(_timed(lambda: _python("-m", "diffusion_cli", "report", *run))),
    }


def step_of(ends: Sequence[tuple[float, float]]) -> Spent:
    """Return the median step from the times at which steps ended and the seconds within the network until then."""
    return _median([(after - before, used - unused) for (before, unused), (after, used) in pairwise(ends)])


def _median(spent: Sequence[tuple[float, float]]) -> Spent:
    return Spent(median(seconds for seconds, _ in spent), median(network for _, network in spent))


def _observed(folder: Path, words: list[str], most_steps: int = 0) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a command, and what `OBSERVED` writes."""
    found = folder / "found.json"
    seconds = _timed(lambda: _python("-c", OBSERVED, str(found), str(most_steps), *words))
    return seconds, json.loads(found.read_text())


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _python(*words: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != OWN_CACHE}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words}: ended with {done.returncode}: {done.stderr}")


def _wheel(folder: Path) -> Path:
    """Build the wheel with the installed build tools."""
    _python(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def _install(environment: Path, wheel: Path) -> None:
    """Install a wheel without its dependencies into a new environment."""
    _python("-m", "venv", str(environment))
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
