"""Learning-rate schedules at exact points, alone and as the scheduler of an optimizer."""

import math
import sys

import pytest
import torch
from torch import nn

from diffusion_cli.cli import run
from diffusion_cli.training import (
    ConstantRate,
    CosineDecay,
    InverseSqrtDecay,
    LinearDecay,
    WarmUpStableDecay,
)
from diffusion_cli.training.optimizers import Optimization
from helpers import TINY, state
from helpers.plugins import forget_modules

SCHEDULES = [
    (ConstantRate(), {0: 1, 1: 1, 1000: 1}),
    (ConstantRate(warm_up_steps=4), {0: 1 / 4, 1: 2 / 4, 2: 3 / 4, 3: 1, 4: 1, 99: 1}),
    (
        CosineDecay(decay_steps=8),
        {0: 1, 2: (2 + 2**0.5) / 4, 4: 1 / 2, 6: (2 - 2**0.5) / 4, 8: 0, 9: 0, 99: 0},
    ),
    (CosineDecay(warm_up_steps=4, decay_steps=8), {0: 1 / 4, 2: 3 / 4 * (2 + 2**0.5) / 4, 4: 1 / 2, 8: 0}),
    (CosineDecay(warm_up_steps=2), {0: 1 / 2, 1: 1, 10**6: 1}),
    (LinearDecay(decay_steps=8), {0: 1, 2: 3 / 4, 4: 1 / 2, 8: 0, 99: 0}),
    (LinearDecay(warm_up_steps=2, decay_steps=4), {0: 1 / 2, 1: 3 / 4, 2: 1 / 2, 4: 0}),
    (WarmUpStableDecay(decay_steps=20), {0: 1, 16: 1, 17: 1 / 2, 18: 1 - 0.5**0.5, 20: 0, 21: 0}),
    (
        WarmUpStableDecay(warm_up_steps=2, decay_steps=8, decay_fraction=0.5),
        {0: 1 / 2, 1: 1, 4: 1, 5: 1 / 2, 8: 0},
    ),
    (WarmUpStableDecay(), {0: 1, 10**6: 1}),
    (InverseSqrtDecay(warm_up_steps=4), {0: 1 / 4, 3: 1, 15: 1 / 2, 63: 1 / 4}),
    (InverseSqrtDecay(warm_up_steps=2, constant_steps=9), {0: 1 / 2, 1: 1, 8: 1, 35: 1 / 2}),
    (InverseSqrtDecay(), {0: 1, 3: 1 / 2}),
]


@pytest.mark.parametrize(("schedule", "factors"), SCHEDULES)
def test_the_learning_rate_at_each_step(schedule, factors):
    assert {step: schedule.factor(step) for step in factors} == pytest.approx(factors, abs=1e-15)
    lr_schedule = {"_target_": f"diffusion_cli.training.{type(schedule).__name__}", **vars(schedule)}
    made = Optimization({"_target_": "torch.optim.SGD", "lr": 2.0}, lr_schedule, None)
    optimizer, scheduler = made.make(nn.Linear(1, 1), fused=False)
    for step in range(min(100, max(factors)) + 1):
        if step in factors:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * factors[step], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_schedule_of_torch_is_used_as_it_is():
    node = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 8}
    optimizer, scheduler = Optimization({"_target_": "torch.optim.SGD", "lr": 2.0}, node, None).make(
        nn.Linear(1, 1), False
    )
    assert isinstance(scheduler, torch.optim.lr_scheduler.CosineAnnealingLR)
    for step in range(9):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1 + math.cos(math.pi * step / 8))
        optimizer.step()
        scheduler.step()


PLUGIN = """
from torch.optim.lr_scheduler import LRScheduler


class Short(LRScheduler):
    def get_lr(self):
        if self.last_epoch > 2:
            raise ValueError("no rate after step 2")
        return [0.001]
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_is_saved_where_its_schedule_ends(tmp_path, monkeypatch, capsys):
    (tmp_path / "ending.py").write_text(PLUGIN)
    (tmp_path / "conf" / "lr_schedule").mkdir(parents=True)
    (tmp_path / "conf" / "lr_schedule" / "short.yaml").write_text("# Short\n_target_: ending.Short\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("DIFFUSE_PLUGINS", "ending")
    words = [word for word in TINY if not word.startswith("lr_schedule")]
    assert (
        run([*words, "--config-dir=conf", "lr_schedule=short", f"output_dir={tmp_path}", "max_steps=8"]) == 2
    )
    line = f"lr_schedule: no rate after step 2; {tmp_path}/tiny is saved at step 3; use a longer schedule and another"
    assert line in capsys.readouterr().err
    assert state(tmp_path)["global_step"] == 3
    forget_modules("ending")
