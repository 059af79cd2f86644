"""Kill a short training run repeatedly, and compare its result with that of an uninterrupted run.

`python scripts/kill.py [--kills 200] [--seed 0]` prints a table, and fails if a run is lost, damaged or different. Runs
start as forks of this process, which has imported everything, so a start takes little time.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.cli import run
from diffusion_cli.commands import train  # noqa: F401  # imported before the forks
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.runs.find import newest

WORDS = [
    "train", "name=run", "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null",
    "batch_size=16", "lr_schedule=constant", "lr_schedule.warm_up_steps=3", "ema.decay=0.99", "precision=fp32",
    "trainer=cpu", "trainer.threads=1", "logger=csv",
    "checkpoint_every=3", "preview_every=100000", "validate_every=100000",
]  # fmt: skip
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "EMA")


def start(folder: Path, steps: int) -> int:
    """Start training in a child process, and return its process id."""
    child = os.fork()
    if child:
        return child
    sink = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    code = 1
    try:
        code = run([*WORDS, f"output_dir={folder}", f"max_steps={steps}"])
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> bool:
    """Return whether a child process has ended, and reap it."""
    return os.waitpid(child, os.WNOHANG)[0] != 0


def being_written(checkpoints: Path) -> set[Path]:
    """Return the unfinished temporary files of checkpoints."""
    return set(checkpoints.glob(".*.tmp"))


def kill_once(folder: Path, steps: int, chance: random.Random) -> str:
    """Start and kill training, at a random time or during a checkpoint write; return what was hit, or "ended"."""
    checkpoints = (folder / "run" / LAST).parent
    left = before = being_written(checkpoints)
    child = start(folder, steps)
    aimed = chance.random() < 0.5
    # Writing a checkpoint takes milliseconds: the kill is at a random time within it.
    delay = chance.uniform(0, 0.01) if aimed else chance.uniform(0, 2.5)
    writes = chance.randrange(1, 5)  # 1: the first numbered checkpoint, 2: `last`, and so on
    started = time.monotonic()
    while aimed and writes and time.monotonic() < started + 30:
        if ended(child):
            return "ended"
        now = being_written(checkpoints)
        writes -= bool(now - before)
        before = now
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "in a write" if being_written(checkpoints) - left else "elsewhere"


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values of nested data with their paths."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list | tuple)
        else None
    )
    if items is None:
        yield path, node
    else:
        for key, value in items:
            yield from leaves(value, f"{path}.{key}")


def bits_different(one: Any, other: Any) -> int:
    """Return the number of different bits of two states; ValueError if their structures differ."""
    total = 0
    for (path, a), (name, b) in zip(leaves(one), leaves(other), strict=True):
        if path != name or type(a) is not type(b):
            raise ValueError(f"{path} and {name} differ in structure")
        if isinstance(a, torch.Tensor):
            mine, theirs = (value.contiguous().flatten().view(torch.uint8) for value in (a, b))
            total += sum(int(byte).bit_count() for byte in (mine ^ theirs).tolist())
        elif a != b:
            total += 1
    return total


def state(folder: Path) -> dict[str, Any]:
    """Return the final state of a run: weights, optimizer and EMA."""
    found = newest(folder / "run")
    assert found is not None
    return {
        name: found.checkpoint.state.get(name, found.checkpoint.state["callbacks"].get(name))
        for name in PARTS
    }


def finish(folder: Path, steps: int) -> int:
    """Train to the end, and return the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(folder, steps), 0)[1])


def campaign(root: Path, kills: int, seed: int) -> Counter[str]:
    """Kill `kills` times, and count the outcomes."""
    chance, counts = random.Random(seed), Counter[str]()
    whole, parts = root / "whole", root / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    reached = 0
    while counts["kills"] < kills:
        where = kill_once(parts, reached + 10_000, chance)  # more steps than it can reach before the kill
        if where == "ended":
            counts["failed to resume"] += 1
            print((parts / "output.txt").read_text(), file=sys.stderr)
            continue
        counts["kills"] += 1
        counts["in a write"] += where == "in a write"
        found = newest(parts / "run")
        step = found.checkpoint.step if found else 0
        counts["steps lost"] += max(0, reached - step)
        reached = max(reached, step)
        print(f"\r{counts['kills']} kills, step {reached}", end="", file=sys.stderr)
    steps = reached + 5
    counts["failed to resume"] += finish(parts, steps) != 0
    counts["steps"] = steps
    if finish(whole, steps) != 0:
        raise RuntimeError((whole / "output.txt").read_text())
    counts["bits different"] = bits_different(state(whole), state(parts))
    counts["left behind"] = len(being_written((parts / "run" / LAST).parent))
    return counts


def main() -> int:
    """Print the table; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    torch.set_num_threads(1)
    start_time = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        counts = campaign(Path(root), words.kills, words.seed)
    rows = {
        "SIGKILLs": counts["kills"],
        "kills during a checkpoint write": counts["in a write"],
        "steps of the run": counts["steps"],
        "starts that failed to resume": counts["failed to resume"],
        "saved steps lost": counts["steps lost"],
        "unfinished files left at the end": counts["left behind"],
        "bits different from the uninterrupted run": counts["bits different"],
    }
    lines = [f"| {name} | {number} |" for name, number in rows.items()]
    print("\n| what | number |", "|---|---|", *lines, sep="\n")
    print(f"{time.monotonic() - start_time:.0f} s", file=sys.stderr)
    return int(any(list(rows.values())[3:]))


if __name__ == "__main__":
    sys.exit(main())
