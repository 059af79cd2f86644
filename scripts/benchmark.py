"""Benchmarks as Markdown tables: `python scripts/benchmark.py [train_step sample data startup fid memory ...]`.

Contestants alternate (A B A B ...) in one process. The tables give medians and their ratios, because absolute times
vary on a shared machine. Install the compared packages with `pip install '.[bench]'`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

# All contestants run in one process; otherwise oneDNN's default cache would be too small for their kernels.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import torch

from benchmarks import (
    data,
    fid,
    loop,
    memory,
    processes,
    roofline,
    sample,
    samplers,
    startup,
    train_step,
    training_memory,
)
from diffusion_cli.system.precision import device_of, has_fast_bf16

BENCHMARKS = {
    part.__name__.rpartition(".")[2]: part
    for part in (
        train_step, sample, data, startup, fid, memory, samplers, loop, processes, training_memory,
    )
}  # fmt: skip
PACKAGES = (
    "diffuse-cli", "torch", "torchvision", "lightning", "numpy", "pillow", "diffusers", "denoising-diffusion-pytorch",
    "torch-fidelity",
)  # fmt: skip


def main() -> None:
    """Run the given benchmarks, or all, and print their tables."""
    listed = "\n".join(f"  {name:<16} {(part.__doc__ or '').strip()}" for name, part in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar="name", help="default: all")
    parser.add_argument("--rounds", type=_positive, default=5, help="alternating rounds (default 5)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--short", action="store_true", help="fewer comparisons, for benchmarks with a short form"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="output file for all rounds and the machine's properties"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="output file for the roofline of the DDPM network, PNG or SVG",
    )
    arguments = parser.parse_args()
    for path in (arguments.json, arguments.plot):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: its folder does not exist; create it first")
    device = device_of(arguments.device)
    record: dict[str, Any] = {"machine": machine(device), "rounds": arguments.rounds, "tables": {}}
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items() if value is not None))
    names = arguments.names or ([] if arguments.plot else [*BENCHMARKS])
    for name in names:
        tables = record["tables"][name] = []
        part = BENCHMARKS[name]
        tables_of = getattr(part, "short_tables", part.tables) if arguments.short else part.tables
        for table in tables_of(arguments.rounds, device):
            print(f"\n{table.markdown()}", flush=True)
            tables.append({"caption": table.caption, **table.measured})
            _write(arguments.json, record)
    if arguments.plot:
        record["roofline"] = roofline.measured(device)
        roofline.draw(record["roofline"], arguments.plot)
        _write(arguments.json, record)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the properties of the machine: hardware, threads, versions and the command."""
    installed = {
        package.metadata["Name"].lower().replace("_", "-") for package in importlib.metadata.distributions()
    }
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "fast bf16": has_fast_bf16(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    """Return the name of the processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(record, indent=1))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    main()
