"""Continuing a stranger's checkpoint: training state of another kind than the run's own is refused."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.training.stored_state import (
    Among,
    Like,
    Maybe,
    Number,
    OfType,
    Options,
    check_state,
    mend_state,
)

TINY = [
    "train", "name=tiny", "model.channels=4", "model.channel_mult=[1]", "model.num_res_blocks=1",
    "model.norm_groups=2", "model.num_heads=1", "model.head_channels=null", "model.attention_resolutions=[]",
    "batch_size=8", "lr_schedule=constant", "trainer=cpu", "logger=csv", "time_sampling=loss_second_moment",
    "time_sampling.bins=4", "time_sampling.memory=3", "preview_every=1000", "validate_every=2",
]  # fmt: skip
Change = Callable[[dict[str, Any]], Any]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def train(folder: Path, *words: str) -> int:
    return run([*TINY, f"output_dir={folder}", f"cache_dir={folder}/cache", *words])


class Run(NamedTuple):
    """The checkpoint of a run of two steps, and the template that it is compared with where the run continues."""

    checkpoint: dict[str, Any]
    expected: dict[str, Any]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def trained(request, tmp_path_factory) -> Run:
    folder, words = tmp_path_factory.mktemp(request.param), [f"precision={request.param}"]
    assert train(folder, "max_steps=2", *words) == 0
    checkpoint = copy.deepcopy(read(folder / "tiny" / LAST).state)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(
            "diffusion_cli.commands.train.check_state",
            lambda *given: (seen.append(given), check_state(*given)),
        )
        assert train(folder, "max_steps=3", *words) == 0
    assert read(folder / "tiny" / LAST).state["global_step"] == 3
    return Run(checkpoint, seen[0][2])


def put(checkpoint: dict[str, Any], folder: Path) -> Path:
    last = folder / "tiny" / LAST
    last.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, last)
    return last


def state(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The optimizer's state of the first convolution, [4, 1, 3, 3]."""
    return next(
        item for item in checkpoint["optimizer_states"][0]["state"].values() if item["exp_avg"].dim() == 4
    )


def set_in(*keys: Any, value: Any) -> Change:
    def change(checkpoint: dict[str, Any]) -> None:
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value

    return change


def in_state(name: str, made: Callable[[torch.Tensor], Any]) -> Change:
    return lambda checkpoint: state(checkpoint).update({name: made(state(checkpoint)[name])})


def group(name: str, value: Any) -> Change:
    return set_in("optimizer_states", 0, "param_groups", 0, name, value=value)


def scheduler(name: str, value: Any) -> Change:
    return set_in("lr_schedulers", 0, name, value=value)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


ATTACKS: dict[str, Change] = {
    "exp_avg: is float32 [1] and": in_state("exp_avg", lambda _: torch.full((5000,), 7.0)[:1]),
    "exp_avg_sq: is float64": in_state("exp_avg_sq", lambda tensor: tensor.double()),
    "exp_avg: must be a plain tensor": in_state("exp_avg", lambda tensor: torch.ones(()).expand(tensor.shape)),
    "exp_avg_sq: must be a plain tensor": in_state(
        "exp_avg_sq", lambda tensor: tensor.to(memory_format=torch.channels_last).contiguous().flip(0).mT
    ),
    "exp_avg_sq: shares its memory with": lambda checkpoint: state(checkpoint).update(
        exp_avg_sq=state(checkpoint)["exp_avg"]
    ),
    "exp_avg: has numbers from nan": in_state("exp_avg", filled(math.nan)),
    "exp_avg_sq: has numbers from -1": in_state("exp_avg_sq", filled(-1.0)),
    "step: has numbers from 9 to 9 and must be a finite number from 0 to 2": in_state("step", filled(9.0)),
    "step: is float32 [3]": in_state("step", lambda _: torch.zeros(3)),
    "exp_avg: must be a tensor": in_state("exp_avg", lambda _: [0.0]),
    "has 1 unknown entries max_exp_avg_sq": lambda checkpoint: state(checkpoint).update(max_exp_avg_sq=torch.ones(1)),
    "exp_avg_sq: is missing": lambda checkpoint: state(checkpoint).pop("exp_avg_sq"),
    "state: has 1 unknown entries": set_in("optimizer_states", 0, "state", 10**6, value={}),
    "optimizer_states: must have 1 items": set_in("optimizer_states", value=[]),
    "param_groups.0.lr: must be": group("lr", math.inf),
    "param_groups.0.betas.0: must be": group("betas", (2.0, 0.9)),
    "param_groups.0.params: must have": group("params", [0]),
    "param_groups.0.capturable: must be False": group("capturable", True),
    "param_groups.0.eps: must be": group("eps", torch.ones(3)),
    "lr_schedulers.0: has 1 unknown entries optimizer": scheduler("optimizer", torch.ones(1)),
    "lr_schedulers.0.last_epoch: is missing": lambda checkpoint: checkpoint["lr_schedulers"][0].pop("last_epoch"),
    "lr_schedulers.0.base_lrs.0: must be": scheduler("base_lrs", [1e9]),
    "lr_schedulers.0.lr_lambdas.0: has 1 unknown": scheduler("lr_lambdas", [{"__wrapped__": 1}]),
    "lr_schedulers.0.last_epoch: must be": scheduler("last_epoch", -5),
    "state_dict.model.network.stem.bias: is float32 [7]": set_in(
        "state_dict", "model.network.stem.bias", value=torch.zeros(7)
    ),
    "state_dict.times.count: has numbers from -1": set_in(
        "state_dict", "times.count", value=torch.full((4,), -1)
    ),
    "state_dict.times.history: is float32 [1, 3]": set_in("state_dict", "times.history", value=torch.zeros(1, 3)),
    "callbacks.EMA.updates: must be a whole number from 0 to 2": set_in("callbacks", "EMA", "updates", value=3),
    "callbacks.EMA.updates: must be a whole": set_in("callbacks", "EMA", "updates", value="two"),
    "callbacks.Stop.elapsed: must be": set_in("callbacks", "Stop", "elapsed", value=-1.0),
    "callbacks.HeldOutLoss.done: must be": set_in("callbacks", "HeldOutLoss", "done", value=10**400),
    "loops.fit_loop: must be a mapping": set_in("loops", "fit_loop", value=[]),
    "loops.fit_loop.epoch_progress.total.ready: must be": set_in(
        "loops", "fit_loop", "epoch_progress", "total", "ready", value=None
    ),
    "the checkpoint: has 1 unknown entries native_amp_scaling_state": set_in("native_amp_scaling_state", value={}),
}  # fmt: skip


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
@pytest.mark.parametrize("line", ATTACKS)
def test_a_foreign_training_state_is_refused(trained, line):
    checkpoint = copy.deepcopy(trained.checkpoint)
    ATTACKS[line](checkpoint)
    mend_state(checkpoint, trained.expected)
    with pytest.raises(ValueError, match=re.escape(line)):
        check_state(Path("last.ckpt"), checkpoint, trained.expected)


@pytest.mark.parametrize("trained", ["fp16"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value"), [("scale", 0.0), ("growth_factor", 1e30), ("_growth_tracker", -1), ("scale", "1")]
)
def test_the_scale_of_gradients_is_checked_too(trained, name, value):
    scaler = {**trained.checkpoint["MixedPrecision"], name: value}
    with pytest.raises(ValueError, match=f"MixedPrecision.{name}: must be"):
        check_state(Path("x"), {**trained.checkpoint, "MixedPrecision": scaler}, trained.expected)


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_training_stops_before_it_is_used(tmp_path, capsys, trained):
    checkpoint = copy.deepcopy(trained.checkpoint)
    ATTACKS["exp_avg: is float32 [1] and"](checkpoint)
    last = put(checkpoint, tmp_path)
    before = last.read_bytes()
    assert train(tmp_path, "max_steps=4", "precision=fp32") == 2
    error = capsys.readouterr().err
    assert f"{last}: is not a training state of this run (optimizer_states.0.state." in error
    assert "start again with another name=" in error
    assert last.read_bytes() == before


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_options_of_another_version_are_dropped_or_added(tmp_path, trained, monkeypatch):
    checkpoint = copy.deepcopy(trained.checkpoint)
    group, scheduler = checkpoint["optimizer_states"][0]["param_groups"][0], checkpoint["lr_schedulers"][0]
    loops, callers = checkpoint["loops"]["fit_loop"], []
    for options in (group, scheduler, loops, loops["epoch_progress"]["total"]):
        options["later"] = [1, "x"]
    scheduler["step"] = "not a method"
    del group["foreach"], group["eps"], loops["epoch_progress"]["current"]
    flags = [scheduler.pop(name) for name, value in list(scheduler.items()) if isinstance(value, bool)]
    put(checkpoint, tmp_path)
    load = torch.optim.lr_scheduler.LambdaLR.load_state_dict
    monkeypatch.setattr(
        torch.optim.lr_scheduler.LambdaLR,
        "load_state_dict",
        lambda self, state: (load(self, state), callers.append(self)),
    )
    assert flags
    assert train(tmp_path, "max_steps=3", "precision=fp32") == 0
    assert not {"later", "step"} & vars(callers[0]).keys()
    after = read(tmp_path / "tiny" / LAST).state
    assert after["global_step"] == 3
    assert after["optimizer_states"][0]["param_groups"][0].keys() == group.keys() - {"later"} | {
        "foreach",
        "eps",
    }


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_loops_that_would_begin_again_are_refused(tmp_path, trained, capsys):
    checkpoint = copy.deepcopy(trained.checkpoint)
    del checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    put(checkpoint, tmp_path)
    assert train(tmp_path, "max_steps=3", "precision=fp32") == 2
    assert (
        "the checkpoint of step 2: this version of Lightning continues it at step 0; install the version"
        in capsys.readouterr().err
    )


def test_unknown_tensors_are_not_dropped():
    stored = {"a": {"tensor": torch.ones(1), "tuple": (1, 2), "nested": [torch.ones(1)]}}
    mend_state(stored, {"a": Options({"b": [1]}, {"b": [1]})})
    assert stored["a"].keys() == {"tensor", "nested", "b"}


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_every_process_refuses_it(tmp_path, capfd, trained):
    checkpoint = copy.deepcopy(trained.checkpoint)
    ATTACKS["exp_avg: is float32 [1] and"](checkpoint)
    put(checkpoint, tmp_path)
    words = ["max_steps=4", "precision=fp32", "trainer.devices=2", "trainer.strategy=fsdp"]
    assert train(tmp_path, *words) == 2
    error = capfd.readouterr().err
    assert error.count("exp_avg: is float32 [1] and must be float32 [4, 1, 3, 3]") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
@pytest.mark.parametrize("version", ["0.9.0", "1.5.0dev", "2", "2.0" * 1000, "two", None])
def test_migrations_of_old_checkpoints_are_not_run(tmp_path, trained, version):
    last = put({**trained.checkpoint, "pytorch-lightning_version": version}, tmp_path)
    with pytest.raises(ValueError, match="pytorch-lightning_version: must be version 2"):
        read(last)


@pytest.mark.parametrize(
    ("stored", "expected", "line"),
    [
        ({"a": 1}, {"a": Number(0, 1, whole=True)}, None),
        ({"a": True}, {"a": Number(0, 1)}, "a: must be a finite number from 0 to 1"),
        ({"a": 1.0}, {"a": Number(0, 1, whole=True)}, "a: must be a whole number from 0 to 1"),
        ({"a": math.nan}, {"a": Number()}, "a: must be a finite number"),
        ({}, {"a": Maybe(1)}, None),
        ({"a": 2}, {"a": Maybe(1)}, "a: must be 1"),
        ({"a": 1, "b": 2}, Among({"a": 1}), None),
        ({"a": 1, "b": 2}, {"a": 1}, "the checkpoint: has 1 unknown entries b"),
        ({"a": "x" * 1001}, {"a": OfType(str)}, "a: must be of type str"),
        ({"a": (1, 2)}, {"a": [1, 2]}, None),
        ({"a": torch.zeros(2, 2).T}, {"a": Like(torch.zeros(2, 2))}, "a: must be a plain tensor"),
        ({"a": torch.zeros(4)[1:3]}, {"a": Like(torch.zeros(2))}, None),
        ({"a": torch.zeros(2).requires_grad_()}, {"a": Like(torch.zeros(2))}, "a: must be a plain tensor"),
        ({"a": torch.zeros(0)}, {"a": Like(torch.zeros(0))}, None),
    ],
)
def test_values_are_compared_with_a_template(stored, expected, line):
    if line is None:
        check_state(Path("x"), stored, expected)
        return
    with pytest.raises(ValueError, match=rf"x: is not a training state of this run \({line}"):
        check_state(Path("x"), stored, expected)
