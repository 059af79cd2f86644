"""`diffuse runs`: list the runs in a folder. It does not import torch."""

import json
from dataclasses import asdict
from pathlib import Path

from diffusion_cli.config import RunsConfig
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.overview import RunSummary, summaries
from diffusion_cli.system.terminal import table

COLUMNS = ("run", "data", "task", "step", "newest results", "size", "date")
SHOWN_RESULTS = 3
"""Most results of a run in the table."""


def run(config: RunsConfig) -> None:
    """Print a table of the runs, or JSON with all their results."""
    runs = summaries(Path(config.output_dir))
    if config.format == "json":
        print(json.dumps([asdict(each) for each in runs], indent=2))
    elif runs:
        print(table([COLUMNS, *map(_row, runs)]))
    else:
        raise UsageError("output_dir", config.output_dir, "contains no runs", "train one with: diffuse train")


def _row(run: RunSummary) -> tuple[str, ...]:
    step = "?" if run.step is None else f"{run.step}" + (f"/{run.max_steps}" if run.max_steps else "")
    results = ", ".join(
        f"{name} {value:.4g}{_earlier(run, name)}" for name, value in [*run.results.items()][:SHOWN_RESULTS]
    )
    more = ", ..." if len(run.results) > SHOWN_RESULTS else ""
    size, date = f"{run.bytes / 1e6:.1f} MB", run.date.replace("T", " ")[:-3]
    return run.name, run.dataset or "?", run.task or "?", step, f"{results or '-'}{more}", size, date


def _earlier(run: RunSummary, name: str) -> str:
    """Return the step of a result that is not of the newest step."""
    step = run.result_steps.get(name)
    return "" if step is None or step == run.step else f" at step {step}"
