"""What a training shows early and at its end: losses, previews, and the outcome."""

import csv
import re

import pytest

from helpers import assert_same, state, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_losses_and_previews_come_early_and_at_the_end_and_change_no_weight(tmp_path, capsys):
    shown, plain = tmp_path / "shown", tmp_path / "plain"
    assert train(shown, "max_steps=12", "log_every=50", "preview_every=50", "preview_steps=1") == 0
    run = shown / "tiny"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "10", "12"]
    previews = [file.name for file in sorted((run / "previews").glob("step_*"))]
    assert previews == ["step_00000010.png", "step_00000012.png"]
    out, err = capsys.readouterr()
    line = rf"Trained 12 steps in \d\d:\d\d, \d+ images/s, loss {float(rows[-1]['loss']):.4f}; the run is {run}\n"
    assert re.search(line, out)
    assert f"loss {float(rows[0]['loss']):.4f}" in err  # in a log, too

    assert train(plain, "max_steps=12", "log_every=7", "preview_every=50", "preview_steps=100") == 0
    assert not list((plain / "tiny" / "previews").glob("step_*"))  # 12 steps are faster than a preview
    for key in ("state_dict", "optimizer_states", "callbacks"):
        one, other = state(shown)[key], state(plain)[key]
        if key == "callbacks":  # all but the step of the last preview, and the time
            one, other = ({"EMA": callbacks["EMA"]} for callbacks in (one, other))
        assert_same(one, other)


def test_the_outcome_of_a_start_is_that_of_its_steps(tmp_path, capsys):
    assert train(tmp_path, "max_steps=2") == 0
    assert train(tmp_path, "max_steps=3") == 0
    assert re.search(
        r"Trained 3 steps, 1 of them now, in 00:0\d, \d+ images/s, loss ", capsys.readouterr().out
    )
