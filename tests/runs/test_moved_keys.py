"""Keys of earlier versions, of the optimizer and of plugins: on command lines, in option files and in stored runs."""

import sys

import pytest

from diffusion_cli.config import TrainConfig, load, plugins
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.migrate import migrated
from helpers.plugins import forget_modules

ADAMW = {"_target_": "diffusion_cli.training.AdamW", "lr": 0.1}
COSINE = {"_target_": "diffusion_cli.training.CosineDecay", "warm_up_steps": 3}
CONSTANT = {"_target_": "diffusion_cli.training.ConstantRate", "warm_up_steps": 3}


@pytest.mark.parametrize(
    ("steps", "derived", "schedule", "after"),
    [
        (9, None, {**COSINE, "decay_steps": 9}, None),
        (None, None, CONSTANT, None),
        (None, ["ema.decay"], CONSTANT, ["ema.decay"]),
        (None, ["optimizer.decay_steps"], {**COSINE, "decay_steps": None}, ["lr_schedule.decay_steps"]),
        (9, ["optimizer.warm_up_steps"], {**COSINE, "decay_steps": 9}, ["lr_schedule.warm_up_steps"]),
    ],
)
def test_an_optimizer_of_format_6_is_split(steps, derived, schedule, after):
    then = {"optimizer": ADAMW | {"warm_up_steps": 3, "decay_steps": steps, "clip_norm": None}}
    then |= {} if derived is None else {"derived": derived}
    now = {"optimizer": ADAMW, "lr_schedule": schedule, "clip_norm": None}
    now |= {} if after is None else {"derived": after}
    assert migrated({"config": then}, 6) == {"config": now}
    assert migrated({"config": now}) == {"config": now}


def test_moved_keys_of_a_command_line_name_the_new_ones():
    with pytest.raises(UsageError) as error:
        load("train", ["optimizer.warm_up_steps=5", "optimizer.decay_steps=null", "optimizer.clip_norm=2"])
    assert error.value.lines == (
        "optimizer.warm_up_steps=5: renamed to lr_schedule.warm_up_steps; use lr_schedule.warm_up_steps=5",
        "optimizer.decay_steps=null: renamed to lr_schedule.decay_steps; use lr_schedule=constant",
        "optimizer.clip_norm=2: renamed to clip_norm; use clip_norm=2",
    )


@pytest.mark.parametrize(
    ("steps", "kind"), [("null", "ConstantRate"), ("${max_steps}", "CosineDecay"), ("7", "CosineDecay")]
)
def test_moved_keys_of_an_option_file_are_migrated(tmp_path, steps, kind):
    (tmp_path / "optimizer").mkdir()
    lines = ["_target_: diffusion_cli.training.Adam", "lr: auto", "betas: [0.9, 0.999]", "eps: 1.0e-8",
             "warm_up_steps: auto", f"decay_steps: {steps}", "clip_norm: 3.0"]  # fmt: skip
    (tmp_path / "optimizer" / "mine.yaml").write_text("\n".join(lines))
    config = load("train", ["optimizer=mine", "max_steps=240"], [tmp_path])
    assert isinstance(config, TrainConfig)
    assert config.lr_schedule["_target_"] == f"diffusion_cli.training.{kind}"
    assert (config.lr_schedule["warm_up_steps"], config.clip_norm) == (10, 3.0)
    assert config.lr_schedule.get("decay_steps") == {"null": None, "${max_steps}": 240, "7": 7}[steps]
    assert ("lr_schedule.decay_steps" in config.derived) == (steps == "${max_steps}")
    with pytest.raises(
        UsageError, match=r"optimizer\.clip_norm=3.0: renamed to clip_norm; use clip_norm=3.0"
    ):
        load("train", ["optimizer=mine", "clip_norm=1"], [tmp_path])


PLUGIN = """
import torch


class MyOpt(torch.optim.SGD):
    def __init__(self, params, *, lr: float = 0.1, clip_norm: float = 5.0, warm_up_steps: int = 7):
        super().__init__(params, lr=lr)
"""


def test_an_optimizer_of_a_plugin_keeps_arguments_with_the_names_of_moved_keys(tmp_path, monkeypatch):
    (tmp_path / "with_norm.py").write_text(PLUGIN)
    (tmp_path / "optimizer").mkdir()
    lines = "_target_: with_norm.MyOpt\nlr: 0.1\nclip_norm: 5.0\nwarm_up_steps: 7\n"
    (tmp_path / "optimizer" / "mine.yaml").write_text(lines)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv(plugins.VARIABLE, "with_norm")
    for words, clip_norm in ([], 5.0), (["optimizer.clip_norm=3"], 3), (["clip_norm=3"], 5.0):
        config = load("train", ["optimizer=mine", "max_steps=240", *words], [tmp_path])
        assert isinstance(config, TrainConfig)
        assert config.optimizer["clip_norm"] == clip_norm
        assert config.optimizer["warm_up_steps"] == 7
        assert config.clip_norm == (3.0 if words == ["clip_norm=3"] else 1.0)
        assert config.lr_schedule["warm_up_steps"] == 10
        assert migrated(config.model_dump()) == config.model_dump()
    both = load("train", ["optimizer=mine", "optimizer.clip_norm=3", "clip_norm=2"], [tmp_path]).model_dump()
    assert "clip_norm_3" in both["name"]
    assert "clip_norm_2" in both["name"]
    forget_modules("with_norm")


def test_arguments_of_other_packages_are_not_renamed():
    plugin = {
        "_target_": "plugin.Part",
        "method": 1,
        "times": None,
        "split": "held_out",
        "more": {"floor": 2},
    }
    ours = {"_target_": "diffusion_cli.data.Digits"}
    config = {"model": plugin | {"data": ours | {"held_out": 0.1}}, "accumulate": 2}
    now = {"model": plugin | {"data": ours | {"val_fraction": 0.1}}, "accumulate_grad_batches": 2}
    assert migrated(config) == migrated(now) == now


ODE = """
from diffusion_cli.samplers import DDIM


class Solver(DDIM):
    def __init__(self, schedule, *, method: str = "rk4", restoration: int = 0):
        super().__init__(schedule)
"""


def test_a_plugin_may_have_arguments_with_the_names_of_renamed_keys(tmp_path, monkeypatch):
    (tmp_path / "with_method.py").write_text(ODE)
    (tmp_path / "sampler").mkdir()
    lines = "_target_: with_method.Solver\nmethod: rk4\nrestoration: 1\n"
    (tmp_path / "sampler" / "mine.yaml").write_text(lines)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv(plugins.VARIABLE, "with_method")
    for words, method in ([], "rk4"), (["sampler.method=euler"], "euler"):
        config = load("sample", ["sampler=mine", *words], [tmp_path]).model_dump()
        assert config["sampler"] == {"_target_": "with_method.Solver", "method": method, "restoration": 1}
    forget_modules("with_method")
