"""The callback `example` acts at its steps."""

from types import SimpleNamespace
from typing import Any

import diffusion_cli as diffuse
import pytest
import torch
from torch import nn

diffuse.allow_plugins("example_package")


def test_it_prints_at_every_second_step(capsys: pytest.CaptureFixture[str]) -> None:
    callback = diffuse.option("callback", "example", every=2)
    module: Any = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, 3.0)
    for step in (1, 2, 3, 4):
        trainer: Any = SimpleNamespace(is_global_zero=True, global_step=step)
        callback.on_train_batch_end(trainer, module, torch.zeros(()), None, step)
    line = "norm of the weights 4.243"
    assert capsys.readouterr().out.splitlines() == [f"step 2: {line}", f"step 4: {line}"]
