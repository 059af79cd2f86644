"""Growing resolution: what each step trains on follows from its number, and a run that grows is one run."""

import csv
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.train_checks import check_shares
from diffusion_cli.commands.train_data import resolution_schedule
from diffusion_cli.config import TrainConfig, load
from diffusion_cli.data import Batch, NoDataset, ProgressiveBatches, ResolutionSchedule, reduced
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.runs.load import load_model
from diffusion_cli.runs.schema import parse_info
from helpers import TINY, assert_same, state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

GROWING = ["progressive=[2,4,8]", "stage_steps=[4,5]", "stage_batch=[24,8]"]  # to steps 4 and 9


def train(folder: Path, *words: str) -> int:
    return run([*TINY, *GROWING, f"output_dir={folder}", *words])


def images(count: int = 50) -> MemoryImages:
    pixels = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return MemoryImages(pixels.to(torch.uint8), torch.arange(count) % 10)


STAGES = ResolutionSchedule.from_sizes((1, 8, 8), 16, [2, 4, 8], [4, 5], [24, 8])


def batches(stop: int, **changes) -> list[Batch]:
    return list(islice(ProgressiveBatches(images(), STAGES, seed=3, flip=True, **changes), stop))


# --- Stages -------------------------------------------------------------------------------


def test_the_stage_of_a_step_follows_from_its_number():
    assert [STAGES.at(step).size for step in range(11)] == [2] * 4 + [4] * 5 + [8] * 2
    assert [STAGES.after(steps).size for steps in (0, 1, 4, 5, 9, 10)] == [2, 2, 2, 4, 4, 8]


def test_images_are_counted_as_the_sum_over_steps_and_back():
    each = [STAGES.at(step).batch_size for step in range(30)]
    for steps in range(30):
        assert STAGES.images(steps) == sum(each[:steps])
        assert STAGES.steps(sum(each[:steps])) == steps
        assert STAGES.steps(sum(each[:steps]) + 1) == steps + 1


def test_sides_that_are_not_equal_keep_their_proportion():
    stages = ResolutionSchedule.from_sizes((3, 12, 18, 24), 2, [4, 6, 12], [1, 1], None)
    assert [stage.shape for stage in stages.all] == [(3, 4, 6, 8), (3, 6, 9, 12), (3, 12, 18, 24)]


@pytest.mark.parametrize("sides", [(12,), (8, 12), (4, 8, 12)])
def test_images_of_any_dimension_are_reduced_to_the_means_of_blocks(sides):
    x = torch.randn(2, 3, *sides, dtype=torch.float64)
    small = reduced(x, (3, *(side // 2 for side in sides)))
    blocks = x
    for dim in range(2, x.ndim):
        blocks = blocks.unflatten(dim, (-1, 2)).mean(dim + 1)
    torch.testing.assert_close(small, blocks)
    assert reduced(x, x.shape[1:]) is x


# --- Batches ------------------------------------------------------------------------------


def test_one_stream_of_images_goes_through_all_stages():
    found = batches(14)
    assert [batch.number for batch in found] == list(range(14))
    assert [tuple(batch.images.shape) for batch in found[:10:4]] == [
        (24, 1, 2, 2),
        (8, 1, 4, 4),
        (8, 1, 4, 4),
    ]
    rows = torch.cat([batch.index for batch in found])
    assert len(rows) == STAGES.images(14) == 4 * 24 + 5 * 8 + 5 * 16
    for epoch in rows[:200].split(50):
        assert epoch.sort().values.equal(torch.arange(50))


def test_a_stream_taken_up_anywhere_goes_on_as_it_would_have():
    whole = batches(14)
    for start in (2, 4, 6, 9, 11):
        assert_same(batches(14 - start, start=start), whole[start:])


def test_parts_and_shares_make_up_the_batch_of_a_step():
    whole, halves = batches(12), batches(24, parts=2)
    shares = [batches(12, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = halves[2 * step : 2 * step + 2]
        for made in (parts, [share[step] for share in shares]):
            assert torch.cat([some.images for some in made]).equal(batch.images)
            assert torch.cat([some.index for some in made]).equal(batch.index)


# --- Runs ---------------------------------------------------------------------------------


def test_a_run_stopped_in_any_stage_or_between_equals_one_without_a_stop(tmp_path):
    extra = ["accumulate_grad_batches=2", "model.dropout=0.1", "dataset.flip=true"]
    assert train(tmp_path / "whole", "max_steps=12", *extra) == 0
    for steps in (2, 4, 7, 9, 12):
        assert train(tmp_path / "parts", f"max_steps={steps}", *extra) == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["global_step"] == 12
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key], key)
    assert_same(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"])


def test_a_run_too_short_for_its_last_size_says_so(tmp_path, capsys):
    said = "diffuse: stage_steps: size 8 begins at step 9, but the run ends at step 9; train for"
    assert train(tmp_path, "max_steps=9") == 0
    assert said in capsys.readouterr().err
    assert train(tmp_path, "max_steps=10") == 0
    assert "stage_steps: size" not in capsys.readouterr().err


def test_shares_of_the_budget_stay_what_they_were_when_the_run_began(tmp_path):
    words = [*TINY, f"output_dir={tmp_path}", "progressive=[4,8]"]
    assert run([*words, "max_steps=6"]) == 0
    assert run([*words, "max_steps=20"]) == 0
    assert [stage["first"] for stage in state(tmp_path)["diffuse"]["stages"]] == [0, 3]


def test_what_is_seen_of_a_run_is_of_its_size_and_one_curve(tmp_path):
    words = ["max_steps=12", "log_every=1", "validate_every=3", "preview_every=3", "preview_steps=2"]
    assert train(tmp_path, *words) == 0
    with (tmp_path / "tiny" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["size"]) for row in rows if row["size"]] == [2] * 4 + [4] * 5 + [8] * 3
    assert [int(row["step"]) for row in rows if row.get("val_loss")] == [3, 6, 9, 12]
    small, large = (Image.open(tmp_path / "tiny" / "previews" / f"step_{n:08d}.png") for n in (3, 12))
    assert small.size == large.size
    # A pixel of 8x8 is drawn as 4x4, and the grid has a margin of one: a pixel of 2x2 is 16x16.
    assert [len(np.unique(np.asarray(picture)[1:17, 1:17])) > 1 for picture in (small, large)] == [
        False,
        True,
    ]


def test_evaluations_wait_for_images_as_they_are(tmp_path):
    words = ["max_steps=12", "eval_every=3", "eval_samples=70", "eval_steps=2", "metric=fid", "features=classifier",
             "features.steps=2", f"cache_dir={tmp_path}/cache"]  # fmt: skip
    assert train(tmp_path, *words) == 0
    with (tmp_path / "tiny" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row.get("frechet_classifier")] == ["12"]


def test_weights_of_an_early_stage_make_images_of_its_size(tmp_path, capsys):
    assert train(tmp_path, "max_steps=12", "checkpoint_every=4", "keep_last=3") == 0
    folder = tmp_path / "tiny"
    assert load_model(folder, "ema", torch.device("cpu")).shape == (1, 8, 8)
    words = [f"output_dir={tmp_path}", "run=tiny", "steps=2", "device=cpu"]
    capsys.readouterr()
    assert run(["sample", *words, "step=4", "num_samples=3", f"output={tmp_path}/early"]) == 0
    said = "step_00000004.ckpt: progressive resolution has reached size 2 of 8"
    assert said in capsys.readouterr().err
    assert Image.open(tmp_path / "early" / "000001.png").size == (2, 2)
    for command in (["eval"], ["edit", "edit=reconstruct", "input=val"]):
        assert run([*command, *words, "step=8"]) == 2
        said = f"run={folder}: is trained for size 4 at step 8, but its dataset has size 8; continue training"
        assert said in capsys.readouterr().err


def test_a_classifier_grows_too(tmp_path):
    words = ["train", "name=tiny", f"output_dir={tmp_path}", "task=classifier", "trainer=cpu", "logger=csv"]
    assert run([*words, "progressive=[4,8]", "max_steps=4", "validate_every=2", "log_every=1"]) == 0


def test_an_epoch_is_a_pass_over_the_images_whatever_the_batches(tmp_path):
    assert train(tmp_path, "max_steps=null", "max_epochs=1", "dataset.val_fraction=0.9") == 0
    made = state(tmp_path)
    stages = parse_info(made["diffuse"]).resolution_schedule
    assert stages is not None
    count = made["diffuse"]["num_images"]
    assert stages.images(made["global_step"] - 1) < count <= stages.images(made["global_step"])


def test_other_stages_are_another_run(tmp_path, capsys):
    assert train(tmp_path, "max_steps=2") == 0
    assert train(tmp_path, "max_steps=4", "stage_steps=[4,6]") == 2
    assert "stage_steps=[4,6]: the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["progressive=[8]"], "progressive=[8]: must be a list of 2 or more values"),
        (["progressive=[8,4]"], "progressive=[8, 4]: sizes must increase"),
        (["progressive=[4,4,8]"], "progressive=[4, 4, 8]: sizes must increase"),
        (["progressive=[3,8]"], "progressive=[3, 8]: images of 8x8 cannot be reduced to 3 by averaging blocks of "
         "pixels; use sizes among [1, 2, 4, 8]"),
        (["progressive=[2,4]"], "progressive=[2, 4]: ends at 4, but the images are 8x8; end with 8"),
        (["progressive=[4,16]"], "progressive=[4, 16]: images of 8x8 cannot be reduced to 16"),
        (["stage_steps=[5]"], "stage_steps=[5]: applies only with progressive=; set progressive"),
        (["stage_batch=[5]"], "stage_batch=[5]: applies only with progressive=; set progressive"),
        (["progressive=[2,4,8]", "stage_steps=[5]"], "stage_steps=[5]: must have one value for each "
         "size except the last; give 2"),
        (["progressive=[4,8]", "stage_batch=[8,8]"], "stage_batch=[8, 8]: must have one value for each "
         "size except the last; give 1"),
        (
            ["progressive=[4,8]", "stage_batch=[9]", "accumulate_grad_batches=2"],
            "accumulate_grad_batches=2: does not divide stage_batch=9",
        ),
        (["progressive=[4,8]", "max_steps=null", "max_time=9s"], "stage_steps=null: cannot be derived "
         "from max_steps=null"),
        (["progressive=[2,4,8]", "max_steps=2"], "stage_steps=null: cannot be derived from max_steps=2"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused_before_training(tmp_path, capfd, words, line):
    assert run([*TINY, f"output_dir={tmp_path}", "max_steps=5", *words]) == 2
    err = capfd.readouterr().err
    assert f"diffuse: {line}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "tiny").exists()


def test_the_steps_of_stages_are_shares_of_the_budget():
    config = load("train", ["progressive=[2,4,8]", "max_steps=100"])
    assert isinstance(config, TrainConfig)
    assert [stage.first for stage in resolution_schedule(config, NoDataset("images", (1, 8, 8))).all] == [
        0,
        33,
        66,
    ]


def test_the_batch_of_each_stage_is_shared_out_evenly():
    config = load("train", ["progressive=[4,8]", "stage_batch=[9]"])
    assert isinstance(config, TrainConfig)
    with pytest.raises(ValueError, match="stage_batch=9: cannot be split evenly among 2 processes"):
        check_shares(resolution_schedule(config, NoDataset("images", (1, 8, 8))), 1, 2)
