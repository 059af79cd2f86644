"""Trainings in processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusion_cli.runs.checkpoint import LAST, read


def kill_training(
    words: list[str],
    run: Path,
    log: Path,
    *,
    env: Mapping[str, str] = os.environ,
    ready: Callable[[], bool] = lambda: True,
) -> int:
    """Train in the folder of `log`, kill the process once there is a checkpoint, and return the step of the last one.

    Args:
        words: command line after `diffuse`.
        run: folder of the run.
        log: file of what the process prints.
        env: environment of the process.
        ready: condition of the kill, besides the checkpoint.
    """
    command, end = [sys.executable, "-m", "diffusion_cli", *words], time.monotonic() + 300
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=log.parent, env=env, stdout=file, stderr=file)
        try:
            while not ((run / LAST).is_file() and ready()):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    return read(run / LAST).step  # a numbered checkpoint may be newer, if the kill came between the two
