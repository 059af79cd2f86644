"""Callbacks of the user: early stopping, states in checkpoints, and refused ones."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from diffusion_cli.cli import run
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.training.stored_state import problem_of_state
from diffusion_cli.training.user_callbacks import EarlyStopping, stop_reason
from helpers import TINY, state, train

WORDS = [word for word in TINY if not word.startswith(("validate_every=", "preview_every="))]
STOPPING = [
    "callback=early_stopping",
    "callback.early_stopping.min_delta=100",
    "callback.early_stopping.patience=2",
]
PLUGIN = '''
from lightning.pytorch import Callback

class Counts(Callback):
    """Counts validations, and stores what `kind` names."""

    def __init__(self, *, kind: str = "plain") -> None:
        print("made", kind)
        self.kind, self.started, self.ended = kind, 0, 0

    def on_validation_start(self, trainer, pl_module):
        self.started += 1

    def on_validation_end(self, trainer, pl_module):
        assert "val_loss" in trainer.callback_metrics
        self.ended += 1

    def state_dict(self):
        return {"started": self.started, "ended": self.ended, **({"kind": self} if self.kind == "object" else {})}

    def load_state_dict(self, state_dict):
        self.started, self.ended = state_dict["started"], state_dict["ended"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.kind == "object":
            checkpoint["mine"] = 1
'''


def trained(folder: Path, *words: str) -> int:
    return run([*WORDS, f"output_dir={folder}", "validate_every=5", *words])


def option(folder: Path, text: str) -> list[str]:
    """Write the option callback=mine, and return the words that select it."""
    (folder / "conf" / "callback").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "callback" / "mine.yaml").write_text(f"mine:\n{text}")
    return ["--config-dir", str(folder / "conf"), "callback=mine"]


@pytest.mark.slow
def test_early_stopping_ends_as_a_budget_does_and_continues_with_more_patience(tmp_path, capsys):
    assert trained(tmp_path, *STOPPING, "max_steps=100", "preview_every=100", "preview_steps=2") == 0
    said = capsys.readouterr().out
    reason = "callback=early_stopping (Monitored metric val_loss did not improve in the last 2 records. Best score: "
    assert f"Stopped by {reason}" in said
    assert "at step 15 of 100; to continue, change its values, or set callback=[]" in said
    stored = state(tmp_path)
    assert stored["global_step"] == 15
    (key,) = (key for key in stored["callbacks"] if key.startswith("EarlyStopping"))
    assert stored["callbacks"][key]["wait_count"] == 2
    assert (tmp_path / "tiny" / "previews" / "step_00000015.png").is_file()

    assert trained(tmp_path, *STOPPING, "max_steps=200", "preview_every=100", "preview_steps=2") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/tiny finished at step 15, stopped by {reason}")
    assert state(tmp_path)["global_step"] == 15

    more = [*STOPPING, "callback.early_stopping.patience=4", "preview_every=100", "preview_steps=2"]
    assert trained(tmp_path, *more, "max_steps=100") == 0
    assert "did not improve in the last 4 records" in capsys.readouterr().out
    assert state(tmp_path)["global_step"] == 25

    assert trained(tmp_path, "preview_every=100", "preview_steps=2", "max_steps=30") == 0
    assert state(tmp_path)["global_step"] == 30


@pytest.mark.slow
def test_early_stopping_on_a_metric_of_evaluations_and_by_the_class_of_lightning(tmp_path, capsys):
    words = option(
        tmp_path,
        "  _target_: lightning.pytorch.callbacks.EarlyStopping\n  monitor: fid\n  patience: 1\n"
        "  min_delta: 1000000.0\n",
    )
    more = ["eval_every=10", "eval_samples=16", "eval_steps=2", "features=classifier", "max_steps=60"]
    assert trained(tmp_path, *words, *more) == 0
    assert "Stopped by callback=mine (Monitored metric fid did not improve" in capsys.readouterr().out
    assert state(tmp_path)["global_step"] == 20


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Callable[[str], list[str]]:
    """Make a module with the callback `Counts`, and return the words that select it, by the kind of its state."""

    def words(kind: str) -> list[str]:
        (tmp_path / f"counting_{kind}.py").write_text(PLUGIN)
        return [
            *option(tmp_path, f"  _target_: counting_{kind}.Counts\n  kind: {kind}\n"),
            f"plugins=[counting_{kind}]",
        ]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("DIFFUSE_PLUGINS", "")
    return words


@pytest.mark.slow
def test_a_callback_of_a_plugin_gets_validations_and_keeps_its_state(tmp_path, plugin, capsys):
    for steps, count in ((10, 2), (20, 4)):
        assert trained(tmp_path, *plugin("plain"), f"max_steps={steps}") == 0
        assert capsys.readouterr().out.count("made plain") == 1
        assert state(tmp_path)["callbacks"]["Counts"] == {"started": count, "ended": count}


@pytest.mark.slow
def test_a_state_that_is_not_plain_is_left_out_with_one_line(tmp_path, plugin, capsys):
    for steps in (10, 20):
        assert trained(tmp_path, *plugin("object"), f"max_steps={steps}") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "callback=" in line]
        assert lines == [
            "diffuse: callback=mine: its state has a value of type Counts, so it is not stored; a resumed run "
            "starts it anew"
        ]
    stored = state(tmp_path)
    assert "Counts" not in stored["callbacks"]
    assert "mine" not in stored


@pytest.mark.slow
def test_a_changed_state_of_a_callback_is_refused(tmp_path, capsys):
    assert trained(tmp_path, *STOPPING, "max_steps=5") == 0
    path = tmp_path / "tiny" / LAST
    content = torch.load(path, weights_only=True)
    (key,) = (key for key in content["callbacks"] if key.startswith("EarlyStopping"))
    content["callbacks"][key] = {"wait_count": 1}
    torch.save(content, path)
    capsys.readouterr()
    assert trained(tmp_path, *STOPPING, "max_steps=10") == 2
    assert capsys.readouterr().err == (
        f"diffuse: {path}: callback=early_stopping cannot load its state (KeyError: 'stopped_epoch'); "
        "leave the callback out\n"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "  _target_: lightning.pytorch.callbacks.ModelCheckpoint\n",
            "callback.mine=ModelCheckpoint: writes checkpoints that diffuse does not read; use checkpoint_every, "
            "keep_last and keep_best",
        ),
        (
            "  _target_: lightning.pytorch.callbacks.TQDMProgressBar\n",
            "callback.mine=TQDMProgressBar: conflicts with the progress bar of diffuse; leave it out",
        ),
        (
            "  _target_: lightning.pytorch.callbacks.EarlyStopping\n  monitor: val_loss\n  mode: least\n",
            "callback.mine: MisconfigurationException: `mode` can be min, max, got least; correct its values, or "
            "leave it out",
        ),
        (
            "  _target_: lightning.pytorch.callbacks.ThroughputMonitor\n",
            "callback.mine.batch_size_fn: needs a function, which a configuration cannot give; derive a class in a "
            "plugin, or use another callback",
        ),
    ],
)
def test_callbacks_that_cannot_work_are_refused_before_training(tmp_path, capsys, text, line):
    words = option(tmp_path, text)
    assert trained(tmp_path / "o", *words, "max_steps=1") == 2
    assert capsys.readouterr().err == f"diffuse: {line}\n"
    assert not (tmp_path / "o").exists()


def test_a_value_that_is_not_measured_is_refused(tmp_path, capsys):
    words = ["callback=early_stopping", "callback.early_stopping.monitor=fid", "max_steps=1"]
    assert train(tmp_path, *words) == 2
    assert capsys.readouterr().err == (
        "diffuse: callback.early_stopping.monitor=fid: is not measured in this training; choose from loss, val_loss\n"
    )
    assert not (tmp_path / "tiny" / "config.yaml").exists()


class Other:
    """A value that is not plain."""


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [1, 2.5, None, ("x", True)], "b": torch.tensor(float("inf"))}, None),
        ({"a": Other()}, "has a value of type Other"),
        ({1: "a"}, "has a key that is not text"),
        ({"a": torch.nn.Parameter(torch.zeros(1))}, "has a value of type Parameter"),
    ],
)
def test_states_are_plain_values_and_tensors(value: Any, problem: str | None):
    assert problem_of_state(value) == problem


def test_a_state_that_contains_itself_is_refused():
    value: dict[str, Any] = {}
    value["self"] = value
    assert problem_of_state(value) == "is nested deeper than 32 levels"


def test_the_reason_of_a_stop_names_the_callback():
    stopping = EarlyStopping()
    assert stop_reason({"a": Callback(), "b": stopping}) == "callback=a,b"
    stopping.stopping_reason_message = "Stopping threshold reached. Signaling Trainer to stop."
    assert stop_reason({"a": Callback(), "b": stopping}) == "callback=b (Stopping threshold reached)"
