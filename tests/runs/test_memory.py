"""Training without enough memory names the settings that fit."""

import os
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.plugins import Precision

from diffusion_cli.data import ResolutionSchedule
from diffusion_cli.data.progressive import Stage
from diffusion_cli.diffusion.objectives import Weighted
from diffusion_cli.training import out_of_memory as memory
from helpers import TINY, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.mark.parametrize(
    ("most", "line"),
    [
        (4, "but 4 do; set accumulate_grad_batches=4"),
        (8, "but 4 do; set accumulate_grad_batches=4"),  # 8 would, with nothing to spare
        (0, "nor does one;"),
    ],
)
def test_memory_that_runs_out_names_the_parts_that_fit(tmp_path, capsys, monkeypatch, most, line):
    loss = Weighted.__call__

    def limited(self, model, x0, *rest):
        if len(x0) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, model, x0, *rest)

    monkeypatch.setattr(Weighted, "__call__", limited)
    assert train(tmp_path, "max_steps=3") == 2
    (said,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("diffuse:")]
    assert said.startswith("diffuse: batch_size=16: 16 images at a time do not fit in cpu memory, ")
    assert line in said
    if most:
        assert train(tmp_path, "max_steps=3", "accumulate_grad_batches=4") == 0


LIMITED = """
import resource, sys
import diffusion_cli.commands.train
from pathlib import Path
from diffusion_cli.cli import run
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
sys.exit(run(sys.argv[1:]))
"""


def test_the_trial_is_on_the_device_that_ran_out(monkeypatch):
    """Lightning moves the module to the CPU before anyone can look into the error."""
    module = torch.nn.Linear(1, 1)
    tried = []

    def fits(module, images, context):
        tried.append((images.device.type, module.weight.device.type, len(images)))
        return len(images) <= 2

    class Failed:
        world_size, accumulate_grad_batches, optimizers, global_step = 2, 1, (), 0
        precision_plugin = Precision()

    monkeypatch.setattr(memory, "_fits", fits)
    failed: Any = Failed()
    error, stages = torch.OutOfMemoryError(), ResolutionSchedule([Stage(0, (1, 2, 2), 16)])
    said = str(memory._advice(error, cast(Any, module), torch.device("meta"), stages, failed))
    assert said.endswith("in meta memory, but 2 do; set accumulate_grad_batches=4")
    assert tried == [("meta", "meta", 1), ("meta", "meta", 2), ("meta", "meta", 4)]
    lasting = RuntimeError("could not create a primitive")  # no trial after this one would go well
    said = str(memory._advice(lasting, cast(Any, module), torch.device("meta"), stages, failed))
    assert said.endswith("in meta memory; try accumulate_grad_batches=2")
    assert len(tried) == 3


def test_what_is_said_to_fit_does(tmp_path):
    def limited(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, *TINY, f"output_dir={tmp_path}", "batch_size=4096", *words]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    words = ("model.channels=64", "max_steps=1", "validate_every=100")
    failed = limited(*words)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    accumulate = failed.stderr.rpartition("accumulate_grad_batches=")[2].strip()
    there = limited(*words, f"accumulate_grad_batches={accumulate}")
    assert there.returncode == 0, there.stderr
