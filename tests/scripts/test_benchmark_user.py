"""The table of what a user waits for: its arithmetic, and what an observed command writes."""

import json
import subprocess
import sys

import pytest

from benchmarks.user import OBSERVED, Spent, step_of, table
from helpers import TINY


def test_a_row_has_medians_and_the_share_beside_the_network():
    rounds = [Spent(2.0, 0.5), Spent(90.0, 0.4), Spent(1.0, 0.6)]  # a disturbed round moves no median
    made = table({"a command": rounds, "help": [Spent(0.25)]})
    assert made.rows == [("a command", "2", "0.5", "75 %"), ("help", "0.25", "0", "100 %")]
    assert len(made.head) == 4
    assert json.loads(json.dumps(made.measured))["help"] == [{"seconds": 0.25, "network": 0.0}]


def test_a_step_is_the_median_between_the_ends_of_steps():
    assert step_of([(1.0, 0.0), (2.0, 0.5), (9.0, 1.5), (11.0, 2.5)]) == (2.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("most_steps", [0, 2])
def test_an_observed_training_notes_its_steps_previews_and_checkpoints(tmp_path, most_steps):
    words = [
        *TINY,
        f"output_dir={tmp_path}",
        "max_steps=3",
        "preview_every=3",
        "preview_steps=2",
        "logger=csv",
    ]
    observed = [sys.executable, "-c", OBSERVED, str(tmp_path / "found.json"), str(most_steps), *words]
    done = subprocess.run(observed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = json.loads((tmp_path / "found.json").read_text())
    assert len(taken["steps"]) == (most_steps or 3)
    assert [len(taken[name]) for name in ("preview", "checkpoint")] == ([0, 0] if most_steps else [1, 1])
    networks = [network for _, network in taken["steps"]]
    assert networks == sorted(networks)
    assert 0 < networks[0] <= taken["network"]
    for seconds, network in taken["preview"]:
        assert 0 < network < seconds
    assert all(network == 0 for _, network in taken["checkpoint"])
