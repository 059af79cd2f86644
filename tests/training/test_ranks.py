"""Processes of one group: their places, votes and errors."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from diffusion_cli.errors import Problem, UsageError
from diffusion_cli.system.distributed import (
    GRACE,
    Distributed,
    LostProcess,
    ProcessInfo,
    _counts,
    _first_host,
    launch,
    lost_process,
    started,
)

pytestmark = pytest.mark.slow


# --- Who started us ------------------------------------------------------------


def test_slurm_s_ways_to_write_are_read():
    assert _counts("2(x3),1") == [2, 2, 2, 1]
    assert _counts("4") == [4]
    assert _first_host("gpu[007-009,12],b1") == "gpu007"
    assert _first_host("n1,n2") == "n1"
    assert _first_host("rack3-n[4,6]-ib") == "rack3-n4-ib"


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, ProcessInfo(0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, ProcessInfo(5, 8, 1, 4)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            ProcessInfo(3, 4, 1, 2),
        ),
        # The script of a batch job has no step: what it starts is alone, whatever the job asked for.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ProcessInfo(0, 1)),
    ],
)  # fmt: skip
def test_a_process_knows_its_place(monkeypatch, env, place):
    for key in [key for key in os.environ if re.match("SLURM_|RANK|WORLD_SIZE|LOCAL_", key)]:
        monkeypatch.delenv(key)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert started() == place


def test_uneven_tasks_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1")
    with pytest.raises(ValueError, match="the same number on each node with --ntasks-per-node"):
        started()


# --- Together ------------------------------------------------------------


def _collect(folder: Path) -> int:
    ranks = Distributed()
    assert ranks.all_gather(ranks.rank) == list(range(ranks.world))
    assert ranks.broadcast(ranks.rank) == 0
    assert ranks.all_reduce_max(ranks.rank, -ranks.rank) == [ranks.world - 1, 0]
    rows = torch.full((2, 3), float(ranks.rank))
    assert torch.equal(ranks.concatenated(rows)[:, 0], torch.arange(ranks.world).repeat_interleave(2).float())
    shares = [list(share) for share in ranks.shard(10, 3)]
    together = ranks.all_gather(shares)
    in_order = [n for turn in range(len(shares)) for rank in range(ranks.world) for n in together[rank][turn]]
    assert in_order == list(range(10))
    (folder / str(ranks.rank)).touch()
    return 7 if ranks.is_main else 8


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("count", [1, 3])
def test_processes_work_together(monkeypatch, tmp_path, count):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 3)
    assert launch(_collect, tmp_path, processes=count) == 7
    assert sorted(file.name for file in tmp_path.iterdir()) == [str(rank) for rank in range(count)]


def test_no_more_processes_start_than_there_are_cores(monkeypatch):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 2)
    monkeypatch.setattr("diffusion_cli.system.distributed.start_processes", None)
    with pytest.raises(UsageError) as refused:
        launch(_fail, 0, processes=99)
    assert refused.value.lines == ("processes=99: CPU cores found: 2; use at most 2",)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_processes_with_gpus_may_exceed_the_cores(monkeypatch, device):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("diffusion_cli.system.distributed._in_new_processes", lambda count, *others: count)
    assert launch(_fail, 0, processes=8, device=device) == 8


def test_the_error_about_processes_names_the_key_of_the_command(monkeypatch):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 2)
    with pytest.raises(UsageError, match=r"^trainer\.devices=3: CPU cores found: 2"):
        launch(_fail, 0, processes=3, key="trainer.devices")


def _fail(victim: int) -> None:
    ranks = Distributed()
    if ranks.rank == victim:
        raise UsageError.several([Problem("one", 1, "is wrong"), Problem("two", 2, "is wrong")])
    ranks.all_gather(None)


def _die(victim: int) -> None:
    if Distributed().rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    Distributed().all_gather(None)


@pytest.mark.parametrize("victim", [0, 1])
def test_what_one_process_raises_is_raised_once(victim, capfd):
    with pytest.raises(UsageError) as mistakes:
        launch(_fail, victim, processes=2)
    assert mistakes.value.lines == ("one=1: is wrong", "two=2: is wrong")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim):
    start = time.monotonic()
    with pytest.raises(
        LostProcess, match=rf"rank {victim} of 2 was ended by SIGKILL \(possibly out of memory\)"
    ):
        launch(_die, victim, processes=2)
    assert time.monotonic() - start < 60 + 2 * GRACE


def test_errors_of_the_group_are_told_from_others():
    gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"
    )
    assert "one of them ended" in str(lost_process(gloo))
    assert lost_process(RuntimeError("shapes do not match")) is None
    assert lost_process(ValueError("gloo is no option")) is None


def test_a_signal_during_the_vote_is_not_lost(monkeypatch):
    """It once was: the outcome of the vote was written over it."""
    # Imported here, as the new processes of other tests import this file, and have no need of it.
    from diffusion_cli.training.callbacks import GracefulStop

    stop = GracefulStop(None, None)
    monkeypatch.setattr(
        Distributed, "all_reduce_max", lambda self, *numbers: (stop._on_signal(15, None), list(numbers))[1]
    )
    stop._mark = 0.0

    class Watched:
        is_global_zero, should_stop = True, False

    stop.on_optimizer_step(Watched(), None, 1)  # pyright: ignore[reportArgumentType]
    assert stop.signal == 15
