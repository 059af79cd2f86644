"""Runs of EDM2, with learned weights of the loss, equal runs without a stop and of one process."""

import pytest

from diffusion_cli.cli import run
from helpers import TINY, assert_same, distance, state, train

pytestmark = pytest.mark.slow

WEIGHTED = [
    "objective=edm2",
    "parameterization=edm",
    "schedule=edm",
    "time_sampling=log_normal",
    "sampler=heun",
]

NETWORK = [
    *(word for word in TINY if not word.startswith("model")), *WEIGHTED, "model=edm2_tiny", "model.channels=8",
    "model.head_channels=4", "model.dropout=0.1", "optimizer.lr=0.01",
]  # fmt: skip
"""A command with the small network of EDM2, too."""


def unit_rows(weights: dict) -> bool:
    """Whether rows of normalized weights have a root mean square of 1."""
    rows = weights["model.network.down.0.conv1.weight"].flatten(1)
    return (rows.square().mean(1) - 1).abs().max().item() < 1e-5


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_of_normalized_weights_equals_one_without_a_stop(tmp_path):
    for name, steps in (("whole", 14), ("parts", 5), ("parts", 14)):
        words = [f"output_dir={tmp_path}/{name}", f"max_steps={steps}", "accumulate_grad_batches=2"]
        assert run([*NETWORK, *words]) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert unit_rows(whole["state_dict"])
    for key in ("state_dict", "optimizer_states"):
        assert_same(whole[key], parts[key], key)
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_normalized_weights_do_not_depend_on_the_number_of_processes(tmp_path, strategy):
    words = ["max_steps=12", "model.dropout=0.0"]
    assert run([*NETWORK, f"output_dir={tmp_path}/one", *words]) == 0
    many = ["trainer.devices=2", f"trainer.strategy={strategy}"]
    assert run([*NETWORK, f"output_dir={tmp_path}/two", *words, *many]) == 0
    one, two = (state(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert unit_rows(two)
    assert distance(one, two) < 1e-4


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_of_learned_weights_equals_one_without_a_stop(tmp_path):
    words = [*WEIGHTED, "accumulate_grad_batches=2", "optimizer=muon"]
    assert train(tmp_path / "whole", "max_steps=14", *words) == 0
    assert train(tmp_path / "parts", "max_steps=5", *words) == 0
    assert train(tmp_path / "parts", "max_steps=14", *words) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["state_dict"]["learned.readout"].abs().min() > 0
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_learned_weights_do_not_depend_on_the_number_of_processes(tmp_path, strategy):
    words = [*WEIGHTED, "max_steps=12", "clip_norm=0.1"]
    assert train(tmp_path / "one", *words) == 0
    assert train(tmp_path / "two", *words, "trainer.devices=2", f"trainer.strategy={strategy}") == 0
    one, two = (state(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert one["learned.readout"].abs().max() > 1e-3
    assert distance(one, two) < 1e-5
