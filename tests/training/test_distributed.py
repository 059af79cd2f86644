"""Training and sampling do not depend on the number of processes."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_cli.cli import run
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.system.distributed import GRACE
from diffusion_cli.system.signals import UNFINISHED
from helpers import distance

pytestmark = pytest.mark.slow

TINY = [
    "train", "name=tiny", "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null",
    "batch_size=16", "lr_schedule=constant", "optimizer.lr=0.001", "lr_schedule.warm_up_steps=3", "precision=fp32",
    "trainer=cpu", "logger=csv", "log_every=5", "checkpoint_every=5", "preview_every=1000", "validate_every=10",
]  # fmt: skip
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def train(folder: Path, *words: str) -> int:
    return run([*TINY, f"output_dir={folder}", *words])


def state(folder: Path) -> dict:
    return read(folder / "tiny" / LAST).state


def losses(folder: Path, column: str = "loss") -> Tensor:
    with (folder / "tiny" / "metrics.csv").open(newline="") as file:
        return torch.tensor([float(row[column]) for row in csv.DictReader(file) if row.get(column)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr("diffusion_cli.system.machine.usable_cores", lambda: 4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Twenty steps by one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder, "max_steps=20") == 0
    return folder


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "words", [("trainer.devices=2",), ("trainer.devices=4",), ("trainer.devices=2", "trainer.strategy=fsdp")]
)
def test_training_does_not_depend_on_the_number_of_processes(alone, tmp_path, words):
    assert train(tmp_path, "max_steps=20", *words) == 0
    one, many = state(alone), state(tmp_path)
    assert one["global_step"] == many["global_step"] == 20
    assert distance(one["state_dict"], many["state_dict"]) < 1e-5
    assert distance(one["callbacks"]["EMA"]["network"], many["callbacks"]["EMA"]["network"]) < 1e-5
    for column in ("loss", "val_loss"):
        torch.testing.assert_close(losses(alone, column), losses(tmp_path, column), rtol=1e-5, atol=0)
    assert len(losses(tmp_path)) == 5  # also at step 1


@pytest.mark.usefixtures("forked")
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    for steps, words in (
        (5, ("trainer.devices=2",)),
        (10, ("trainer.devices=2", "trainer.strategy=fsdp")),
        (20, ()),
    ):
        assert train(tmp_path, f"max_steps={steps}", *words) == 0
    assert distance(state(alone)["state_dict"], state(tmp_path)["state_dict"]) < 1e-5
    assert state(alone)["callbacks"]["EMA"]["updates"] == state(tmp_path)["callbacks"]["EMA"]["updates"] == 20
    torch.testing.assert_close(losses(alone), losses(tmp_path), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("forked")
def test_importance_sampling_and_labels_do_not_depend_on_it_either(tmp_path):
    words = ["max_steps=12", "time_sampling=loss_second_moment", "time_sampling.bins=4", "time_sampling.memory=3",
             "dataset.flip=true", "model.class_conditional=true", "objective.label_dropout=0.3",
             "accumulate_grad_batches=2", "coupling=ot"]  # fmt: skip
    assert train(tmp_path / "one", *words) == 0
    assert train(tmp_path / "two", *words, "trainer.devices=2") == 0
    one, two = state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"]
    assert torch.equal(one["times.count"], two["times.count"])
    assert one["times.count"].sum() == 12 * 16
    assert distance(one, two) < 1e-5


@pytest.mark.usefixtures("forked")
def test_the_paths_of_a_teacher_do_not_depend_on_it_either(tmp_path):
    """Nor on a stop between the steps that share a batch and its noise."""
    assert train(tmp_path, "parameterization=v", "max_steps=5") == 0
    words = ["experiment=trajectory_distillation", f"init.run={tmp_path / 'tiny'}", "max_steps=7",
             "objective.steps=4", "accumulate_grad_batches=2", "preview_every=null"]  # fmt: skip
    assert train(tmp_path / "one", *words) == 0
    assert train(tmp_path / "two", *words, "max_steps=6") == 0
    assert train(tmp_path / "two", *words, "trainer.devices=2") == 0
    assert distance(state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"]) < 1e-5


@pytest.mark.usefixtures("forked")
def test_a_run_that_grows_does_not_depend_on_it_either(tmp_path):
    words = ["progressive=[4,8]", "stage_steps=[6]", "stage_batch=[24]", "validate_every=5", "max_steps=10",
             "augmentation=edm", "augmentation.probability=0.5", "accumulate_grad_batches=2"]  # fmt: skip
    assert train(tmp_path / "one", *words) == 0
    assert train(tmp_path / "two", *words, "max_steps=5") == 0
    assert train(tmp_path / "two", *words, "trainer.devices=2") == 0
    assert distance(state(tmp_path / "one")["state_dict"], state(tmp_path / "two")["state_dict"]) < 1e-5
    for column in ("loss", "val_loss"):
        one, two = losses(tmp_path / "one", column), losses(tmp_path / "two", column)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("forked")
def test_images_do_not_depend_on_the_number_of_processes(alone, tmp_path):
    words = ["sample", "run=tiny", f"output_dir={alone}", "num_samples=70", "steps=3", "batch_size=16"]
    for count in (1, 2, 4):
        assert run([*words, f"processes={count}", f"output={tmp_path}/{count}"]) == 0
    for name in [f"{seed:06d}.png" for seed in range(70)]:
        one, two, four = ((tmp_path / count / name).read_bytes() for count in "124")
        assert one == two == four
    assert (tmp_path / "1" / "manifest.json").read_text() == (tmp_path / "4" / "manifest.json").read_text()
    for name in ("000003.png", "000040.png"):
        (tmp_path / "2" / name).unlink()
    assert run([*words, "processes=2", f"output={tmp_path}/2"]) == 0
    assert (tmp_path / "2" / "000040.png").read_bytes() == (tmp_path / "1" / "000040.png").read_bytes()


def test_torchrun_on_two_nodes_trains_in_one_folder(alone, tmp_path):
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
             "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "diffusion_cli",
             *TINY, f"output_dir={tmp_path}", "max_steps=20", "trainer.num_nodes=2"],
            env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    told = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert [out.count("Trained 20 steps") for out, _ in told] == [1, 0]
    assert "2 x cpu on 2 nodes" in told[0][1]
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]
    assert distance(state(alone)["state_dict"], state(tmp_path)["state_dict"]) < 1e-5


def start(folder: Path, *words: str, first: Path | str = LAST) -> subprocess.Popen:
    """A run that has started, as its first file shows."""
    command = [
        sys.executable,
        "-m",
        "diffusion_cli",
        *TINY,
        f"output_dir={folder}",
        "max_steps=100000",
        *words,
    ]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "tiny" / first).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def server(process: subprocess.Popen) -> int:
    """The process that forks those that work for one."""
    (pid,) = [
        pid for pid in children(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return pid


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that work for one, in the order of their ranks."""
    return children(server(process))


@pytest.mark.parametrize(("to", "number"), [("all", signal.SIGTERM), ("one", signal.SIGUSR1)])
def test_a_signal_to_any_process_stops_all_at_one_step(tmp_path, to, number):
    process = start(tmp_path, "trainer.devices=2")
    os.kill(process.pid if to == "all" else workers(process)[1], number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == UNFINISHED, err
    assert f"{number.name}: saved {tmp_path}/tiny at step {state(tmp_path)['global_step']}" in out
    assert "Traceback" not in err


def test_the_signals_of_a_scheduler_one_after_another_are_one(tmp_path):
    """A warning, then the end itself, and each by two ways: to all of the job, and passed on. It once lost the run."""
    process = start(tmp_path, "trainer.devices=2", "checkpoint_every=100000", first="metrics.csv")
    everyone = [*workers(process), process.pid]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == UNFINISHED, err
    assert f"saved {tmp_path}/tiny at step {state(tmp_path)['global_step']}" in out


def test_an_evaluation_on_the_way_is_left_at_a_signal_and_made_when_the_run_goes_on(tmp_path):
    words = [
        "eval_every=3",
        "eval_steps=2",
        "features=classifier",
        "features.steps=20",
        f"cache_dir={tmp_path}/cache",
    ]
    process = start(
        tmp_path, "trainer.devices=2", *words, "eval_samples=100000", "log_every=3", first="metrics.csv"
    )
    time.sleep(3)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == UNFINISHED, err
    assert "at step 3" in out
    assert len(losses(tmp_path, "frechet_classifier")) == 0
    assert train(tmp_path, "max_steps=4", *words, "eval_samples=70") == 0
    with (tmp_path / "tiny" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row.get("frechet_classifier")] == ["3"]


def test_a_killed_rank_ends_the_run_which_goes_on(tmp_path):
    process = start(tmp_path, "trainer.devices=2")
    begun = time.monotonic()
    os.kill(workers(process)[0], signal.SIGKILL)  # the one that writes checkpoints
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - begun < 30 + 2 * GRACE
    assert process.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("diffuse:")]
    assert "rank 0 of 2 was ended by SIGKILL" in line
    assert "Traceback" not in err
    done = state(tmp_path)["global_step"]
    assert train(tmp_path, f"max_steps={done + 3}") == 0
    assert state(tmp_path)["global_step"] == done + 3


def test_processes_whose_server_is_killed_save_their_work(tmp_path):
    process = start(tmp_path, "trainer.devices=2", "checkpoint_every=100000", first="metrics.csv")
    os.kill(server(process), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    line = "diffuse: processes: rank 0 of 2 failed, so all stopped; run the same command again to continue"
    assert line in err.splitlines()
    assert f"saved {tmp_path}/tiny at step {state(tmp_path)['global_step']}" in out
    assert "Traceback" not in err


def test_workers_do_not_outlive_the_process_that_started_them(tmp_path):
    process = start(tmp_path, "trainer.devices=2")
    pids = workers(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert train(tmp_path, f"max_steps={state(tmp_path)['global_step'] + 2}") == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["trainer.num_nodes=2"],
            "trainer.num_nodes=2: nodes on which diffuse was started: 1; start it with torchrun or srun on 2 nodes",
        ),
        (
            ["trainer.devices=3"],
            "batch_size=16: cannot be split evenly among 3 processes with accumulate_grad_batches=1; use a",
        ),
        (["trainer.devices=99"], "trainer.devices=99: CPU cores found: 4; use at most 4"),
        (["trainer.strategy=zero"], "trainer.strategy=zero: must be ddp or fsdp"),
        (["checkpoint_period=soon"], "checkpoint_period=soon: must be a duration (90s, 45m"),
        (["checkpoint_period=0s"], "checkpoint_period=0s: must be a duration (90s, 45m"),
        (["trainer.timeout=9"], "trainer.timeout=9: must be at least 120"),
        (
            ["trainer.threads=99999999999"],
            "trainer.threads=99999999999: must be at most 4096",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path, capfd, words, line):
    assert train(tmp_path, "max_steps=5", *words) == 2
    err = capfd.readouterr().err
    (said,) = [row for row in err.splitlines() if row.startswith("diffuse: ")]
    assert said.startswith(f"diffuse: {line}")
    assert "Traceback" not in err
    assert not (tmp_path / "tiny").exists()


def test_a_checkpoint_is_due_by_time(tmp_path):
    words = [
        "max_steps=null",
        "max_time=3s",
        "checkpoint_every=100000",
        "checkpoint_period=1s",
        "keep_last=9",
    ]
    assert train(tmp_path, *words) == 0
    saved = len(list((tmp_path / "tiny" / "checkpoints").glob("step_*.ckpt")))
    assert 2 <= saved <= 4  # after one and two seconds, and at the end
