"""Start-up times of commands in fresh processes."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from statistics import median

import torch

from benchmarks.race import Table, race, timed

WITHOUT_TORCH = """
import sys
from diffusion_cli.cli import run
code = run(sys.argv[1:])
sys.exit(code if "torch" not in sys.modules else 99)
"""

FIRST_CALL = """
import os, sys
from diffusion_cli.cli import run
from diffusion_cli.networks import UNet
UNet.forward = lambda *arguments: os._exit(0)
run(sys.argv[1:])
os._exit(99)
"""
"""A command up to the first call of the network."""

HELP, MISTAKE, IMPORT = "`diffuse --help`", "`diffuse train schedule=cosin`", '`python -c "import torch"`'
SAMPLE = "`diffuse sample`, up to the first call of its network"


def tables(rounds: int, device: torch.device) -> Iterator[Table]:
    """Help, a usage error, and sampling up to the network, relative to an import of torch."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train", f"output_dir={folder}", "name=run", "max_steps=1", "logger=csv", "trainer=cpu",
            "dataset.val_fraction=0", "preview_every=1000000",
        ]  # fmt: skip
        _python(["-m", "diffusion_cli", *words], 0)
        sample = ["sample", f"output_dir={folder}", "run=run", "num_samples=1", f"device={device.type}"]
        contestants = {
            HELP: (["-c", WITHOUT_TORCH, "--help"], 0),
            MISTAKE: (["-c", WITHOUT_TORCH, "train", "schedule=cosin"], 2),
            IMPORT: (["-c", "import torch"], 0),
            SAMPLE: (["-c", FIRST_CALL, *sample], 0),
        }
        runs = {
            name: timed(lambda words=words, code=code: _python(words, code), torch.device("cpu"))
            for name, (words, code) in contestants.items()
        }
        for once in runs.values():
            once()  # warms the file cache
        results = race(runs, rounds)
    base = median(results[IMPORT])
    limits = {HELP: "0.4 s", MISTAKE: "1 s", SAMPLE: "1.5 times"}
    rows = [
        (name, f"{median(seconds):.3f}", f"{median(seconds) / base:.2f}", limits.get(name, ""))
        for name, seconds in results.items()
    ]
    head = ("", "seconds", f"over {IMPORT}", "limit")
    yield Table(
        "Start-up, in fresh processes.", head, rows, {name: {"seconds": s} for name, s in results.items()}
    )


def _python(words: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode != code:
        raise RuntimeError(f"{words}: ended with {done.returncode}, not {code}: {done.stderr}")
