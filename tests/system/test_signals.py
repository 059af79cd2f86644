"""Signals outside the steps of training: the documented exit code, one line at most, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.commands import train
from diffusion_cli.metrics import EvaluationCancelled
from diffusion_cli.system.signals import STOPPED, UNFINISHED, handled, handling
from diffusion_cli.training.callbacks import GracefulStop
from helpers import TINY

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="takes /proc")
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line for line in lines if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def wait_until(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def diffuse(*words: str, code: str = "", nohup: bool = False) -> subprocess.Popen:
    """A process that runs `diffuse`."""
    program = f"{code}\nimport sys; from diffusion_cli.__main__ import main; sys.argv[1:] = {words}; main()"
    return subprocess.Popen(
        [*(["nohup"] if nohup else []), sys.executable, "-c", program],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "after"), [*((number, 0.3) for number in ALL), (signal.SIGTERM, 0), (signal.SIGINT, 1.5)]
)
def test_a_signal_while_a_command_starts_ends_it_with_one_line(tmp_path, number, after):
    process = diffuse("train", *TINY[1:], f"output_dir={tmp_path}")
    wait_until(lambda: catches(process.pid, signal.SIGUSR2), process)
    time.sleep(after)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == UNFINISHED, err
    assert err.splitlines() == [STOPPED]
    assert out == ""


@LINUX
@pytest.mark.slow
def test_nohup_ignores_a_closed_terminal_and_no_other_signal(tmp_path):
    process = diffuse("train", *TINY[1:], f"output_dir={tmp_path}", nohup=True)
    wait_until(lambda: catches(process.pid, signal.SIGUSR2), process)
    assert not catches(process.pid, signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == UNFINISHED
    assert err.splitlines()[-1] == STOPPED


def test_the_outcome_of_a_command_that_has_ended_stands():
    code = "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    process = diffuse("--version", code=code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("diffuse ")


@pytest.mark.parametrize("number", ALL)
def test_a_signal_before_the_first_step_of_training_is_not_waited_with(tmp_path, monkeypatch, capsys, number):
    """As while latents are encoded, data is read or a judge is trained."""

    def interrupted(*_: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("the signal was only noted")

    monkeypatch.setattr(train, "set_up", interrupted)
    assert run([*TINY, f"output_dir={tmp_path}"]) == UNFINISHED
    assert capsys.readouterr().err.splitlines() == [STOPPED]
    assert not (tmp_path / "tiny").exists()  # nor its lock


@pytest.mark.parametrize("number", ALL)
def test_training_notes_each_signal_and_an_evaluation_is_left_at_once(number):
    stop = GracefulStop(None, None)
    with stop.listening():
        with stop.interrupting(), pytest.raises(EvaluationCancelled):
            signal.raise_signal(number)
        assert (stop.signal, stop.stopping) == (number, True)
    noted = GracefulStop(None, None)
    with noted.listening():
        signal.raise_signal(number)
    assert (noted.signal, noted.stopping) == (number, False)


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in handled()
        with handling(lambda *_: pytest.fail("was handled")):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@LINUX
@pytest.mark.slow
def test_a_parent_killed_while_its_processes_start_leaves_none(tmp_path):
    """The first of two processes waits for the second, which the parent no longer starts."""
    script = tmp_path / "orphans.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "def work(folder): time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    from diffusion_cli.system import distributed\n"
        "    import torch.multiprocessing.spawn as spawn\n"
        "    distributed._forwarding = lambda processes: os.kill(os.getpid(), 9)\n"
        "    distributed.launch(work, Path('.'), processes=2)\n"
    )
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"FAMILY": str(tmp_path)})
    process.wait(60)
    assert process.returncode == -signal.SIGKILL
    end = time.monotonic() + 40
    while left := processes_with(str(tmp_path)):
        assert time.monotonic() < end, [os.kill(pid, signal.SIGKILL) for pid in left]
        time.sleep(0.1)


def processes_with(text: str) -> list[int]:
    """The other processes with a text in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_an_evaluation_during_training_ends_at_a_signal_in_the_middle_of_its_work(
    tmp_path, monkeypatch, capsys
):
    def batch(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal was only noted")

    words = ["eval_every=2", "eval_steps=1", "eval_samples=70", "features=classifier", "features.steps=2"]
    words += [f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}", "max_steps=4", "log_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_cli.training.evaluation.TrainingSamples.batch", batch)
        assert run([*TINY, *words]) == UNFINISHED
    assert "SIGTERM: saved" in capsys.readouterr().out
    assert "frechet_classifier" not in (tmp_path / "tiny" / "metrics.csv").read_text()
    assert run([*TINY, *words]) == 0
    assert "frechet_classifier" in (tmp_path / "tiny" / "metrics.csv").read_text()
