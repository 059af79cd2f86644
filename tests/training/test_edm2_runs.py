"""Runs of EDM2: a loss with learned weights, resumed and on several processes."""

import pytest

from helpers import assert_same, distance, state, train

pytestmark = pytest.mark.slow

WEIGHTED = [
    "objective=edm2",
    "parameterization=edm",
    "schedule=edm",
    "time_sampling=log_normal",
    "sampler=heun",
]


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
